# SPDX-License-Identifier: Apache-2.0
"""The planner's prediction beside published runs of other frameworks.

    python benchmarks/published_runs.py --json out.json [--only "llama3.1-8b v6e-8"]

Each row is a public recipe (architecture, chips, sequences per chip, length) with the speed that
its authors published. The same architecture and batch are compiled with *our* step, so the error
holds both the predictor's and what differs between the two programs; `differs` says what is known
of that. Nothing is tuned per row. Needs the extra `tpu`.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from flexolmo_jax.pods import process

os.environ.update(process.environment())
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flexolmo_jax import programs
from flexolmo_jax.config import (
    DataConfig,
    ExecConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    RunConfig,
)
from flexolmo_jax.pods import chips, compile


def llama(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    d_ffn: int,
    vocab: int,
    d_head: int = 128,
) -> ModelConfig:
    """A dense pre-norm model."""
    return ModelConfig(
        vocab_size=vocab,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_ffn=d_ffn,
        max_len=8192,
        norm_placement="pre",
        qk_norm="none",
        router=RouterConfig(renormalize=True),
    )


LLAMA2_70B = llama(8192, 80, 64, 8, 28_672, 32_000)
# MaxText's own shapes, `global_parameter_scale` 16.
SCALE_16B = llama(4096, 32, 64, 64, 28_672, 32_000)
LLAMA31_8B = llama(4096, 32, 32, 8, 14_336, 128_256)
LLAMA31_70B = llama(8192, 80, 64, 8, 28_672, 128_256)
MIXTRAL = llama(4096, 32, 32, 8, 14_336, 32_000).replace(n_slots=8, n_active=2)


@dataclasses.dataclass(frozen=True)
class Published:
    """One published run.

    Attributes:
      rows: sequences per chip and step.
      tokens: tokens per second and chip that were published, or what their TFLOP/s come to.
      mfu: as published.
      source: page or recipe.
      remat: our policy that is nearest to what the recipe keeps and still fits; "full" where it
        names none.
      expert: devices of the expert axis; the matrices are gathered over it too, as theirs are.
      differs: what of the recipe our step does not do alike.
    """

    name: str
    model: ModelConfig
    topology: str
    rows: int
    seq_len: int
    tokens: float
    mfu: float
    source: str
    remat: str
    differs: str = ""
    expert: int = 1


TIERS = "MaxText, docs/reference/models/tiering.md"
RECIPES = "tpu-recipes, training"
OFFLOAD = "they offload layer inputs and projections to the host, we recompute"
MAXTEXT = "MaxText, configs"
# 12·L·T·N·H of attention beside six FLOPs per parameter and token turn their TFLOP/s into tokens.
WHOLE = "their FLOPs count attention without the causal half; tokens from TFLOP/s by that count"
RUNS = (
    Published(
        *("llama3.1-8b v6e-8", LLAMA31_8B, "v6e:2x4", 3, 8192, 7139, 0.0),
        f"{RECIPES}/trillium/Llama3.1-8B-MaxText/v6e-8",
        "full",
        OFFLOAD,
    ),
    Published(
        *("llama2-70b v5p-512", LLAMA2_70B, "v5p:8x8x8", 2, 4096, 692, 0.654, TIERS),
        "projections",
    ),
    Published(
        *("mixtral-8x7b v5p-256", MIXTRAL, "v5p:4x8x8", 36, 4096, 2909, 0.5256, TIERS),
        "full",
        "bfloat16 parameters there; the chips of the page (256) and its shape (8x4x4) disagree",
        8,
    ),
    Published(
        *("llama3.1-8b v6e-256", LLAMA31_8B, "v6e:16x16", 4, 8192, 7207, 0.4546, TIERS),
        "full",
        OFFLOAD,
    ),
    Published(
        *("mixtral-8x7b v6e-256", MIXTRAL, "v6e:16x16", 12, 4096, 3899, 0.3523, TIERS),
        "full",
        f"capacity 1.25 there, dropless here; {OFFLOAD}",
        8,
    ),
    Published(
        *("llama3.1-70b v6e-256", LLAMA31_70B, "v6e:16x16", 5, 8192, 960, 0.5033, TIERS),
        "full",
        OFFLOAD,
    ),
    Published(
        *("maxtext-16b v5e-256", SCALE_16B, "v5e:16x16", 6, 2048, 1192, 0.611),
        f"{MAXTEXT}/v5e/16b.sh and README.md",
        "full",
        WHOLE,
    ),
)


def predict(run: Published) -> compile.Plan:
    """Compiles our step for a published run."""
    topology = chips.parse(run.topology)
    stage = "joint" if run.model.n_slots > 1 else "anchor"
    config = RunConfig(
        stage=stage,
        model=run.model,
        tokenizer="t",
        data=DataConfig(batch_rows=run.rows * topology.chips, seq_len=run.seq_len),
        optim=OptimConfig(),
        exec=ExecConfig(remat=run.remat, mesh_expert=run.expert, expert_parallel="fsdp"),
    )
    grid = compile.grid(topology, config.exec)
    return compile.measure(programs.training(config, run.model, grid), topology)


def row(run: Published) -> dict:
    """A published run and its prediction."""
    plan = predict(run).to_json()
    tokens = plan["tokens_per_s_per_chip"]
    out = {
        "run": run.name,
        "published": {"tokens_per_s_per_chip": run.tokens, "mfu": run.mfu or None},
        "predicted": {"tokens_per_s_per_chip": tokens, "mfu": plan["mfu"]},
        "remat": run.remat,
        "fits": plan["fits"],
        "hbm_gib": plan["hbm_gib"],
        "compile_s": plan["compile_s"],
        "source": run.source,
        "differs": run.differs,
    }
    if tokens and run.tokens:
        middle = (tokens["low"] + tokens["high"]) / 2
        out["error_of_middle"] = round(middle / run.tokens - 1, 3)
        out["inside"] = tokens["low"] <= run.tokens <= tokens["high"]
    return out


def main() -> None:
    """Compiles every row and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a part of the names of the runs to take")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for run in RUNS:
        if args.only and args.only not in run.name:
            continue
        rows.append(row(run))
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

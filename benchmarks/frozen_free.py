# SPDX-License-Identifier: Apache-2.0
"""What freezing saves: one expert step compiled for a TPU slice in four ways.

    python benchmarks/frozen_free.py --size 7b --topology v5p:2x2x1 --rows 4 --json out.json

  ours    frozen and trained leaves are two trees: no gradient, moment or float32 copy of the first.
  mask    the reference's way: both experts in one stacked float32 tensor, its gradient and both
          moments computed for all of it, then the half of the public expert set to zero; shared
          weights are float32 and have no gradient.
  full    full fine-tuning of the same two experts: everything is differentiated.
  kept    ours again, with what was saved spent on keeping more of the forward pass (`--keep`).

Needs the extra `tpu`; the numbers are the compiler's, not measured on a TPU.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path

from flexolmo_jax.pods import process

os.environ.update(process.environment())
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import optax

from experiments import common
from flexolmo_jax import optim, programs, step
from flexolmo_jax.config import DataConfig, ExecConfig, ModelConfig, OptimConfig, RunConfig
from flexolmo_jax.pods import chips, compile

OPTIM = OptimConfig()


def masked_step(config, run, optimizer, state, frozen, batch):
    """One step whose gradient of the public half is computed and then thrown away."""
    grads, _ = step.gradients(config, run, "router", OPTIM, state["params"], frozen, batch)
    grads = jax.tree.map(lambda g: g.at[:, 0].set(0), grads)
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt": opt, "step": state["step"] + 1}


def run_config(stage: str, model: ModelConfig | None, args, keep: bool = False) -> RunConfig:
    """A configuration of the expert stage, or of joint training for "full"."""
    names = {"anchor": "a", "expert_id": "e"} if stage == "expert" else {"tokenizer": "t"}
    return RunConfig(
        stage=stage,
        model=model,
        data=DataConfig(batch_rows=args.rows, seq_len=args.seq_len),
        optim=OPTIM,
        exec=ExecConfig(remat=args.keep if keep else args.remat),
        **names,
    )


def variants(pair: ModelConfig, grid, args) -> dict[str, programs.Program]:
    """The four programs."""
    full = programs.training(run_config("joint", pair, args), pair, grid)
    state, run = full.arguments["state"], full.runtime
    experts = state["params"]["experts"] | full.arguments["frozen"]["experts"]
    trained = {"experts": experts}
    optimizer = optim.make_optimizer(OPTIM, trained)
    mask = programs.Program(
        stage="expert",
        config=pair,
        runtime=run,
        mesh=grid,
        function=functools.partial(masked_step, pair, run, optimizer),
        arguments={
            "state": programs.training_state(optimizer, trained, grid),
            "frozen": {"shared": state["params"]["shared"], "experts": {}},
            "batch": full.arguments["batch"],
        },
        donated=("state",),
        tokens=full.tokens,
        seq_len=full.seq_len,
    )
    ours = programs.training(run_config("expert", None, args), pair, grid)
    kept = programs.training(run_config("expert", None, args, keep=True), pair, grid)
    return {"mask": mask, "full": full, "ours": ours, "kept": kept}


def row(name: str, plan) -> dict:
    """The figures of one way."""
    gib = plan.memory.gib()
    return {
        "way": name,
        "tflop_per_chip": plan.compiled_flops / plan.topology.chips / 1e12,
        "hbm_gib": gib,
        "step_s": plan.to_json()["step_s"],
        "mfu": plan.mfu(),
        "fits": plan.fits,
    }


def main() -> None:
    """Compiles and prints the four ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="7b")
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--keep", default="dots")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    topology = chips.parse(args.topology)
    pair = ModelConfig(**common.pick(common.sizes(), args.size)).replace(n_slots=2, n_active=2)
    grid = compile.grid(topology, ExecConfig())
    rows = []
    for name, program in variants(pair, grid, args).items():
        rows.append(row(name, compile.measure(program, topology)))
        print(json.dumps(rows[-1]), flush=True)
    for mine in rows[2:]:
        for other in rows[:2]:
            flops = mine["tflop_per_chip"] / other["tflop_per_chip"]
            memory = mine["hbm_gib"]["total"] / other["hbm_gib"]["total"]
            ways = f"{mine['way']} / {other['way']}"
            print(f"{ways}: {flops:.2f} of the FLOPs, {memory:.2f} of the memory")
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": ""}, "rows": rows}))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Peak memory and speed of importing, verifying, exporting and loading a model of gigabytes.

Makes a random FlexOlmo directory in shards as another program would write it, then runs each
stage in a process of its own and asks the system for the most memory that it held.

.venv/bin/python benchmarks/interop_memory.py --layers 7 --workdir runs/interop-memory
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import mesh, model, sharding
from flexolmo_jax import tree as trees
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data import tokenize
from flexolmo_jax.experts import model_dir, model_info, verify
from flexolmo_jax.interop import hf_config, hf_export, hf_import, hf_names
from flexolmo_jax.interop import safetensors_writer as writer

BLOCK = 4 << 20  # Values per block that is made.
MIB, DEVICES = 1 << 20, 8


def config(layers: int, experts: int) -> ModelConfig:
    """A mixture with a vocabulary as large as FlexOlmo's, so that one tensor stands out."""
    return ModelConfig(
        vocab_size=100_352,
        d_model=2048,
        n_layers=layers,
        n_heads=16,
        n_kv_heads=16,
        d_head=128,
        d_ffn=8192,
        n_slots=experts,
        n_active=min(2, experts),
    )


def write_source(folder: Path, c: ModelConfig, dtype: str) -> int:
    """Writes the directory; returns the bytes of its tensors."""
    architecture = hf_config.architecture_for(c)
    rng = np.random.default_rng(0)
    stock = (0.02 * rng.standard_normal(BLOCK, np.float32)).astype(jnp.dtype(dtype))

    def blocks(count: int) -> Iterator[np.ndarray]:
        for start in range(0, count, BLOCK):
            yield np.roll(stock, int(rng.integers(BLOCK)))[: min(BLOCK, count - start)]

    tensors = []
    for row in hf_names.rows(architecture, c):
        for name, _, _ in hf_names.tensors(row, c):
            make = functools.partial(blocks, int(np.prod(row.shape)))
            tensors.append(writer.Tensor(name, dtype, row.shape, make))
    folder.mkdir(parents=True)
    raw = hf_config.write(c, architecture, dtype=dtype, eos_id=0, pad_id=None, extra={})
    del raw[hf_config.EXTRA]
    (folder / hf_config.NAME).write_text(json.dumps(raw))
    tokenize.save(tokenize.train(["a b c"], 258), folder / "tokenizer.json")
    writer.write_model(folder, tensors, 1 << 30)
    return sum(t.nbytes for t in tensors)


def import_source(work: Path) -> None:
    """The stage that is measured first."""
    hf_import.import_hf(work / "hf", work / "model")


def verify_model(work: Path) -> None:
    """Every byte and every value against its digest."""
    assert verify.verify(work / "model") == []


def export_model(work: Path) -> None:
    """The way back, in shards of 1 GB."""
    out = work / "export"
    hf_export.execute(hf_export.plan(work / "model", shard_size="1GB"), out)
    shutil.rmtree(out)


def load_model(work: Path) -> None:
    """Onto a mesh of fake devices, all in this process, so the weights themselves count too."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    info = model_info.read_info(work / "model")
    abstract, axes = model.abstract_params(info.config), model.param_axes(info.config)
    made = mesh.make_mesh(data=2, expert=2, model=2)
    wanted = trees.flatten(sharding.param_shardings(abstract, axes, made))
    _, params, _ = model_dir.load_model(work / "model", sharding_fn=lambda name, _: wanted[name])
    shards = [s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
    print(f"on {DEVICES} devices, shared weights on more than one: {sum(shards) / MIB:.0f} MiB")


STAGES: dict[str, Callable[[Path], None]] = {
    "libraries": lambda _work: None,  # What they alone take.
    "import": import_source,
    "verify": verify_model,
    "export": export_model,
    "load": load_model,
}


def measured(stage: str, work: Path) -> tuple[float, float, int]:
    """Seconds, processor seconds and peak resident bytes of a stage in a process of its own."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--workdir", str(work), "--stage", stage]
    process = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"stage {stage} failed")
    busy = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - started, busy, usage.ru_maxrss * 1024


def main() -> None:
    """Prints one line per stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/interop-memory"))
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--stage", choices=list(STAGES), help="run this stage in this process")
    args = parser.parse_args()
    if args.stage:
        STAGES[args.stage](args.workdir)
        return
    shutil.rmtree(args.workdir, ignore_errors=True)
    c = config(args.layers, args.experts)
    size = write_source(args.workdir / "hf", c, args.dtype)
    largest = c.vocab_size * c.d_model * jnp.dtype(args.dtype).itemsize
    print(f"{size / MIB:.0f} MiB in tensors, the largest {largest / MIB:.0f} MiB, {args.dtype}")
    print(json.dumps(dataclasses.asdict(c)))
    for stage in STAGES:
        seconds, busy, peak = measured(stage, args.workdir)
        speed = f"{size / MIB / seconds:6.0f} MiB/s" if stage != "libraries" else ""
        times = f"{seconds:7.1f} s ({busy:6.1f} s of processor)"
        print(f"{stage:10}{times}  peak {peak / MIB:6.0f} MiB {speed}", flush=True)
    shutil.rmtree(args.workdir)


if __name__ == "__main__":
    main()

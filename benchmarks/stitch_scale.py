# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory of stitching at scale beside a plain copy of the same bytes.

Makes an anchor and slices of random weights, then runs each stage in a process of its own, in
turn, several times, with nothing of its input in the page cache. Seconds are of the stage itself,
without starting Python; peak memory is the process's, libraries included.

PYTHONPATH=. .venv/bin/python benchmarks/stitch_scale.py --size 8x1b --experts 7
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from flexolmo_jax import mesh, model, sharding
from flexolmo_jax import tree as trees
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.experts import leafio, model_dir, model_info, stitch, verify
from flexolmo_jax.experts import slice as slices

MIB, GIB = 1 << 20, 1 << 30
DEVICES = 8
STOCK = 4 << 20  # Random values that every leaf is cut from.


def config(size: str) -> ModelConfig:
    """The anchor of a stitched size."""
    fields = common.pick(common.stitched_sizes(), size)
    return ModelConfig(**{**fields, "n_slots": 1, "n_active": 1})


def random_leaf(like: jax.ShapeDtypeStruct, seed: int) -> leafio.Leaf:
    """bfloat16 values in pieces; cheap to make, and no two leaves alike."""
    rng = np.random.default_rng(seed)
    stock = (0.02 * rng.standard_normal(STOCK, np.float32)).astype(jnp.bfloat16)
    count = int(np.prod(like.shape))

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, count, STOCK):
            yield np.roll(stock, start // STOCK)[: count - start]

    return leafio.Leaf(tuple(like.shape), np.dtype(jnp.bfloat16), blocks)


def random_tree(expected: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> trees.Tree:
    """A tree of such leaves."""
    return trees.unflatten(
        {
            name: random_leaf(like, 1000 * seed + i)
            for i, (name, like) in enumerate(expected.items())
        }
    )


def make(work: Path, size: str, experts: int) -> int:
    """Writes the anchor and the slices; returns their bytes."""
    c = config(size)
    work.mkdir(parents=True)
    (work / "tokenizer.json").write_text("{}")
    shared = random_tree(model_info.expected_shared(c), 0)
    public = random_tree(slices.expected_slice(c), 1)
    anchor = model_dir.write_model(work / "in/anchor", c, shared, public, work / "tokenizer.json")
    for i in range(experts):
        slices.write_slice(
            work / f"in/slices/e{i}",
            random_tree(slices.expected_slice(c), 2 + i),
            expert=f"e{i}",
            config=c,
            anchor_digest=anchor.anchor_digest,
            tokenizer_digest=anchor.tokenizer_digest,
            training={"steps": 0, "tokens": 0, "seed": i},
        )
    return sum(p.stat().st_size for p in (work / "in").rglob("*") if p.is_file())


def forget_pages(work: Path) -> None:
    """Takes every file out of the page cache."""
    for path in work.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # What is not written yet stays in the cache.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(work: Path) -> None:
    """What any reader must do at least."""
    buffer = bytearray(MIB)
    for path in sorted((work / "in").rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def stitched(work: Path, **options: Any) -> None:
    """From the slices to a model."""
    plan = stitch.plan(work / "in/anchor", sorted((work / "in/slices").iterdir()))
    result = stitch.execute(plan, work / "out", **options)
    print(json.dumps({"copied_gib": result["bytes_copied"] / GIB}))


def verified(work: Path) -> None:
    """Every byte and every value against its digest."""
    assert verify.verify(work / "out") == []


def loaded(work: Path, check: bool = True) -> None:
    """Onto a mesh of fake devices; what they hold is memory of this process and told apart."""
    info = model_info.read_info(work / "out")
    abstract, axes = model.abstract_params(info.config), model.param_axes(info.config)
    grid = mesh.make_mesh(data=2, expert=2, model=2)
    wanted = trees.flatten(sharding.param_shardings(abstract, axes, grid))
    _, params, _ = model_dir.load_model(
        work / "out", sharding_fn=lambda name, _: wanted[name], verify=check
    )
    shards = [s.data for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
    print(json.dumps({"device_gib": sum(x.nbytes for x in shards) / GIB}))


STAGES: dict[str, Callable[[Path], None]] = {
    "libraries": lambda _work: None,
    "read": read_all,
    "stitch": stitched,
    "verify": verified,
    "load": loaded,
    "load, unverified": lambda work: loaded(work, check=False),
    "link": lambda work: stitched(work, link=True),
    "verify linked": verified,
    "load linked": loaded,
}
MAKES_OUT = ("cp", "cp and sync", "stitch", "link")


def run_stage(name: str, work: Path) -> None:
    """In a process of its own: the stage, then its seconds."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    if name.startswith("load"):
        jax.devices()
    started = time.perf_counter()
    STAGES[name](work)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_gib": stitch.peak_host_gib()}))


def measured(command: list[str]) -> dict[str, float]:
    """Figures that a command prints as JSON lines, and the processor seconds of all of it."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    out = {"seconds": time.perf_counter() - started}
    for line in text.splitlines():
        out |= json.loads(line) if line.startswith("{") else {}
    return {**out, "busy": usage.ru_utime + usage.ru_stime}


def measure(stage: str, work: Path) -> dict[str, float]:
    """One stage, from a cold page cache."""
    if stage in MAKES_OUT:
        shutil.rmtree(work / "out", ignore_errors=True)
    forget_pages(work)
    if stage == "cp":
        return measured(["cp", "-r", str(work / "in"), str(work / "out")])
    if stage == "cp and sync":
        line = 'cp -r "$0" "$1" && sync "$1" $(find "$1" -type f)'
        return measured(["sh", "-c", line, str(work / "in"), str(work / "out")])
    return measured([sys.executable, __file__, "--workdir", str(work), "--stage", stage])


def main() -> None:
    """Prints one line per stage: medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/stitch-scale"))
    parser.add_argument("--size", default="8x1b")
    parser.add_argument("--experts", type=int, default=7, help="slices beside the anchor")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="+", default=["cp", "cp and sync", *STAGES])
    parser.add_argument("--keep", action="store_true", help="leave the files for another run")
    parser.add_argument("--stage", choices=list(STAGES), help="run this stage in this process")
    args = parser.parse_args()
    work = args.workdir
    if args.stage:
        run_stage(args.stage, work)
        return
    if not (work / "in").exists():
        make(work, args.size, args.experts)
    size = sum(p.stat().st_size for p in (work / "in").rglob("*") if p.is_file())
    print(f"{args.size}, {args.experts} slices: {size / GIB:.2f} GiB, {args.rounds} rounds")
    found: dict[str, list[dict[str, float]]] = {stage: [] for stage in args.stages}
    for _ in range(args.rounds):
        for stage in args.stages:
            found[stage].append(measure(stage, work))
    for stage, runs in found.items():
        middle = {key: statistics.median(r[key] for r in runs) for key in runs[0] if key != "peak"}
        middle["gib_per_s"] = size / GIB / middle["seconds"]
        spread = [round(r["seconds"], 2) for r in runs]
        print(f"{stage:16}", {k: round(v, 3) for k, v in middle.items()}, spread, flush=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    if not args.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Where the time and the memory of one program on one pod go, by the TPU compiler.

    python benchmarks/pod_step.py --config experiments/expert.py:size=7b \\
        --model experiments/anchor.py:size=7b --topology v5p:2x2x1 --rows 4 --layers 2 \\
        [--config.exec.remat=outputs] [--hlo step.txt]

`flexolmo plan` answers whether a step fits and how fast it is; this shows why. Units are grouped
by part of the model (attention, mixture, unembedding, embedding, optimizer) and phase (forward,
backward, recomputed in the backward pass); collectives by kind, and whether the program starts
them early. With --layers only so many are compiled: the body of the loop over layers is the same.
Needs the extra `tpu`.
"""

import argparse
import collections
import dataclasses
import os
import re
import sys
from pathlib import Path

from flexolmo_jax.pods import process

os.environ.update(process.environment())
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flexolmo_jax.pods import compile as compiling
from flexolmo_jax.pods import predict, target, work

PARTS = (
    ("unembed", r"unembed|BCV|logsumexp"),
    ("mixture", r"/mixture/"),
    ("attention", r"/attention/|splash"),
    ("embedding", r"gather|scatter"),
    ("layer", r"while/body"),
)
MIB, G = 2**20, 1e9


def part_of(unit: work.Unit) -> tuple[str, str]:
    """(part of the model, phase) of a unit, by the name of the operation it came from."""
    name = unit.op_name
    part = next((p for p, pattern in PARTS if re.search(pattern, name)), "optimizer, other")
    if "rematted_computation" in name:
        return part, "recompute"
    if "transpose(" in name:
        return part, "backward"
    return part, "forward" if "jvp(" in name else "-"


def kind_of(unit: work.Unit) -> str:
    """What a unit is called without its number: fusions of one kind share it."""
    return unit.kernel or re.sub(r"(\.clone)?[.\d]+$", "", unit.name)


def show_parts(plan: compiling.Plan) -> None:
    """Time, FLOPs and HBM traffic by part and phase, then by kind of unit."""
    units = plan.work.units if plan.work else ()
    for title, key in (("part", part_of), ("kind", kind_of)):
        table = collections.defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
        for u in units:
            low, high = predict.unit_seconds(u, plan.topology)
            row = table[key(u)]
            for i, value in enumerate((low * 1e3, high * 1e3, u.flops / G, u.read + u.written)):
                row[i] += value * u.times
        print(f"\n{title:40s} {'ms':>17s} {'GFLOP':>10s} {'HBM MiB':>9s}")
        for name, (low, high, flops, moved) in sorted(table.items(), key=lambda r: -r[1][1])[:16]:
            name = " / ".join(name) if isinstance(name, tuple) else name
            print(f"{name[:40]:40s} {low:8.2f} {high:8.2f} {flops:10.0f} {moved / MIB:9.0f}")


def show_collectives(plan: compiling.Plan) -> None:
    """Bytes and time of collectives by kind."""
    over = compiling.layout(plan.topology, plan.program.mesh)
    table = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for u in plan.work.units if plan.work else ():
        for c in u.collectives:
            span = over.span(c.groups)
            row = table[c.kind, span.mesh, "early" if c.overlapped else "waited for"]
            row[0] += u.times
            row[1] += u.times * c.size / MIB
            row[2] += u.times * predict.collective_seconds(c, span, plan.topology) * 1e3
    print(f"\n{'collective':20s} {'mesh axes':16s} {'':10s} {'count':>6s} {'MiB':>9s} {'ms':>8s}")
    for (kind, axes, when), (count, size, ms) in sorted(table.items(), key=lambda r: -r[1][2]):
        print(f"{kind:20s} {axes:16s} {when:10s} {count:6d} {size:9.0f} {ms:8.2f}")


def arguments() -> tuple[argparse.Namespace, tuple[str, ...]]:
    """What was asked, and the overrides of the configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--config", "--topology"):
        parser.add_argument(name, required=True)
    for name in ("--model", "--stage", "--hlo"):
        parser.add_argument(name, default="")
    for name in ("--rows", "--layers"):
        parser.add_argument(name, type=int, default=0)
    asked, rest = parser.parse_known_args()
    return asked, tuple(rest)


def main() -> None:
    """Compiles and prints."""
    asked, overrides = arguments()
    request = process.Request(
        *(asked.config, asked.topology),
        overrides=overrides,
        model=asked.model,
        stage=asked.stage,
        rows=asked.rows,
    )
    found = target.read(request)
    if asked.layers:
        model = found.model.replace(n_layers=asked.layers)
        run = found.run
        run = dataclasses.replace(run, model=model if run.model is not None else None)
        found = dataclasses.replace(found, model=model, run=run)
    plan = found.measure()
    if asked.hlo:
        text = found.program().lower().compile().as_text() or ""
        Path(asked.hlo).write_text(text, encoding="utf-8")
    print(found.program().runtime)
    print("GiB per chip:", plan.memory.gib(), "" if plan.fits else plan.refusal)
    show_parts(plan)
    show_collectives(plan)
    if plan.times:
        each = "all layers" if not asked.layers else f"{asked.layers} layers"
        print(f"\nstep {plan.times.low * 1e3:.1f} .. {plan.times.high * 1e3:.1f} ms ({each})")
        print(f"compiled in {plan.compile_s:.0f} s, MFU {plan.mfu()}")


if __name__ == "__main__":
    main()

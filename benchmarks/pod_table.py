# SPDX-License-Identifier: Apache-2.0
"""The table over pods: memory, time and MFU of every program of `experiments/pods.py`.

    python benchmarks/pod_table.py --out runs/pods [--only 37.6B] [--quick]

Each row is what `flexolmo plan` answers; an answer in the folder is not asked for again. The tests
of whole pods leave theirs there too, so that nothing is compiled twice:

    FLEXOLMO_POD_ANSWERS=runs/pods make test-pods PODS=

Needs the extra `tpu`; nothing here was measured on a TPU.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import pods
from flexolmo_jax.pods import process

ROOT = Path(__file__).resolve().parents[1]

HEAD = ("program", "pod", "mesh", "rows", "HBM, GiB", "", "step, s", "tokens/s/chip", "MFU, %")


def answer(pod: pods.Pod, folder: Path) -> dict:
    """The plan of a pod, from the folder or from the compiler."""
    path = folder / pod.answer
    if not path.is_file():
        result = process.plan(pod.request(str(ROOT / "experiments")))
        path.write_text(json.dumps(result, indent=1) + "\n")
    return json.loads(path.read_text())


def line(pod: pods.Pod, plan: dict) -> str:
    """One row of the table."""
    shape, hbm = plan["mesh"], plan["hbm_gib"]
    cells = [
        pod.name,
        pod.topology + (f" x {pod.slices}" if pod.slices > 1 else ""),
        "x".join(str(shape[axis]) for axis in ("data", "expert", "model")),
        f"{plan['rows']:,} x {plan['seq_len']:,}",
        f"{hbm['total']:.1f} of {hbm['limit']:.1f}",
        "fits" if plan["fits"] else "DOES NOT FIT",
        _range(plan["step_s"], "{:.3g}"),
        _range(plan["tokens_per_s_per_chip"], "{:,.0f}"),
        _range(plan["mfu"] and {k: 100 * v for k, v in plan["mfu"].items()}, "{:.1f}"),
    ]
    return f"| {' | '.join(cells)} |"


def _range(value: dict | None, form: str) -> str:
    return f"{form.format(value['low'])} to {form.format(value['high'])}" if value else ""


def main() -> None:
    """Asks for what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the answers")
    parser.add_argument("--only", default="", help="a part of the names to take")
    parser.add_argument("--quick", action="store_true", help="only what every test run compiles")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}", flush=True)
    for pod in pods.PODS:
        if args.only in pod.name and (pod.quick or not args.quick):
            print(line(pod, answer(pod, args.out)), flush=True)


if __name__ == "__main__":
    main()

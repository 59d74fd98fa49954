# SPDX-License-Identifier: Apache-2.0
"""The main job: an anchor, four experts trained apart, one stitched model, opt-out, a report.

Everything lands in the workdir; run again, it does only what is missing or has changed.
"""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo demo`."""
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="(runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument(
        "--quick", action="store_true", help="a few minutes: proves the path, not the idea"
    )
    parser.add_argument("--max-parallel", type=int, default=1, help="jobs at once (1)")
    parser.add_argument(
        "--only", choices=("evaluate",), help="one step alone, as the plan of the demo calls it"
    )
    parser.add_argument("--rows", type=int, default=128, help="rows per domain to evaluate on")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per row of these")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the demo; returns the content of its report.json."""
    from flexolmo_jax import demo

    def say(line: str) -> None:
        print(line, flush=True)

    if args.only == "evaluate":
        return demo.evaluate(
            args.workdir, rows=args.rows, seq_len=args.seq_len, seed=args.seed, say=say
        )
    return demo.run(
        args.workdir, seed=args.seed, quick=args.quick, max_parallel=args.max_parallel, say=say
    )

# SPDX-License-Identifier: Apache-2.0
"""Compares the methods with each other: trains what is missing, scores it, and writes results.

OUT/results-SUITE.json has every number, .md the tables and .html the page with plots. The same
command goes on where it stopped; suites that share a folder share what is trained.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import ConfigError

PARTS = ("starts", "models", "judge")
# Jobs that share the GPUs: so many of 135M parameters fit on one, and most of their time is start
# and compilation. Where there are several GPUs, each job spreads over all of them.
ON_GPU = 3


def _parallel(devices: Path = Path("/dev")) -> int:
    """Jobs at once by default. JAX is not asked, since asking takes hold of the devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*")):
        return 1  # A process that uses a TPU has it alone.
    return min(cores, ON_GPU) if any(devices.glob("nvidia[0-9]*")) else cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--suite", default="main", help="which comparison (experiments/studies.py)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … of every training")
    parser.add_argument("--size", default="tiny", help="size of the models")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the study"
    )
    parser.add_argument("--anchor", default="", help="an existing anchor instead of a new one")
    parser.add_argument(
        "--max-parallel",
        type=int,
        default=_parallel(),
        help="jobs at once; each gets its share of the cores (default: one per core, "
        f"{ON_GPU} on GPUs, one on a TPU)",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to prove the path only")
    parser.add_argument("--only", choices=PARTS, help="one job of a study that has begun")
    parser.add_argument("--seed", type=int, help="of the job of --only (0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the study, or one part of it."""
    from flexolmo_jax import configfile
    from flexolmo_jax.study import jobs
    from flexolmo_jax.study import run as running

    if args.only:
        return running.part(args.only, args.out, args.suite, args.seed or 0)
    if args.seed is not None:
        raise ConfigError(
            "--seed belongs to one job of a study",
            got=args.seed,
            fix=f"for {args.seed + 1} seeds give --seeds {args.seed + 1}; else add --only",
        )
    jobs.check_checkout()
    configfile.argument_path(args.out, "The folder of a study")
    anchor = ""
    if args.anchor:
        anchor = configfile.argument_path(args.anchor, "The path of the anchor", ",")
    arg = f"suite={args.suite},size={args.size},seeds={args.seeds},anchor={anchor}"
    arg += f",quick={args.quick}"
    study = configfile.load_function(f"{jobs.EXPERIMENTS / 'studies.py'}:{arg}", "get_study")()
    command = f"flexolmo study --suite {args.suite} --seeds {args.seeds} --size {args.size}"
    command += f" --out {args.out}" + (f" --anchor {args.anchor}" if args.anchor else "")
    command += " --quick" if args.quick else ""
    return running.run(study, args.out, max_parallel=args.max_parallel, command=command)

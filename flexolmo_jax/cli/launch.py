# SPDX-License-Identifier: Apache-2.0
"""Run a plan of independent jobs. A rerun skips what is done and unchanged.

flexolmo launch --plan experiments/plans/demo.py:workdir=runs/demo --dry-run
"""

import argparse
import dataclasses
import shlex
from typing import Any

from flexolmo_jax import configfile
from flexolmo_jax.jobs import local, progress

BACKENDS = ("local",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo launch`."""
    parser.add_argument(
        "--plan", required=True, metavar="FILE[:ARG]", help="a plan file with its argument"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="where jobs run")
    parser.add_argument("--dry-run", action="store_true", help="list the jobs and run none")
    parser.add_argument(
        "--max-parallel", type=int, default=1, help="jobs at once, which share the cores (1)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs or lists the plan; returns its jobs and how each ended."""
    plan = configfile.load_function(args.plan, "get_plan")()
    if args.dry_run:
        steps = local.describe(plan)
        for job, action in steps:
            print(f"{action:4}  {job.name}: {shlex.join(job.command)}")
        return {"plan": plan.to_json(), "actions": {j.name: a for j, a in steps}}
    results = local.run(plan, max_parallel=args.max_parallel, report=progress.Printer(plan))
    problems = local.failure_text(plan, results)
    if problems:
        print(problems)
    local.raise_on_failure(results)
    return {"plan": plan.to_json(), "jobs": [dataclasses.asdict(r) for r in results]}

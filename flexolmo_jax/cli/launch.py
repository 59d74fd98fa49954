# SPDX-License-Identifier: Apache-2.0
"""Run a plan of independent jobs. A rerun skips what is done and goes on with the rest.

  flexolmo launch --plan experiments/plans/demo.py:workdir=runs/demo --dry-run
  flexolmo launch --plan experiments/plans/8x7b.py:org=example --backend gke \\
      --cluster launch/tpu/cluster.yaml --dry-run
"""

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from flexolmo_jax import configfile
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs import launching, local, places, progress, remote
from flexolmo_jax.jobs.plan import Plan

BACKENDS = ("local", *launching.REMOTE)
POLL_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo launch`."""
    parser.add_argument(
        "--plan", required=True, metavar="FILE[:ARG]", help="a plan file with its argument"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="where jobs run")
    parser.add_argument("--dry-run", action="store_true", help="show everything and run nothing")
    parser.add_argument(
        "--max-parallel",
        type=int,
        metavar="N",
        help="local: jobs at once, which share the cores (1)",
    )
    group = parser.add_argument_group("back ends gke, tpu-vm and slurm")
    group.add_argument(
        "--cluster", type=Path, metavar="FILE", help="settings of the cluster (launch/README.md)"
    )
    group.add_argument(
        "--set",
        dest="given",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one setting; OWNER.NAME=VALUE for the jobs of one owner",
    )
    group.add_argument(
        "--owner",
        dest="owners",
        action="append",
        default=[],
        metavar="NAME",
        help="only the jobs of this owner (nobody: those without one)",
    )
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="with --dry-run: write manifests and scripts here"
    )
    group.add_argument(
        "--no-report", action="store_true", help="with --dry-run: do not ask the planner"
    )
    group.add_argument(
        "--no-wait", action="store_true", help="hand over what can be, and return at once"
    )
    group.add_argument(
        "--poll", type=float, metavar="S", help=f"seconds between looks ({POLL_S:g})"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs or shows the plan; returns its jobs and how each stands."""
    plan = configfile.load_function(args.plan, "get_plan")()
    if args.backend == "local":
        return _here(args, plan)
    _refuse(args.backend, {"--max-parallel": args.max_parallel})
    if not args.dry_run and (args.out or args.no_report):
        option = "--out" if args.out else "--no-report"
        raise ConfigError(f"{option} is about what a dry run shows", fix="add --dry-run")
    jobs = launching.select(plan, args.owners)
    backend = launching.make_backend(args.backend, plan, jobs, args.cluster, args.given)
    if args.dry_run:
        reports = {}
        if not args.no_report:
            # Imported here: to launch needs no planner.
            from flexolmo_jax import launch_report

            reports = launch_report.report(jobs)
        return launching.show(plan, backend, jobs, reports=reports, out=args.out)
    poll_s = POLL_S if args.poll is None else args.poll
    launch = remote.Launch(plan, backend, jobs, wait=not args.no_wait, poll_s=poll_s)
    results = launch.run()
    remote.raise_on_failure(results)
    return {"plan": plan.to_json(), "jobs": [dataclasses.asdict(r) for r in results]}


def _refuse(backend: str, options: dict[str, Any]) -> None:
    """Refuses options that would be without effect."""
    for option, value in options.items():
        # Compared one by one, since 0 is a number that was given, and equal to False.
        if value is not None and value is not False and value != []:
            raise ConfigError(
                f"Back end {backend} has no such option", got=option, fix="leave it out"
            )


def _here(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """The back end `local`."""
    remote_only = {"--cluster": args.cluster, "--set": args.given, "--owner": args.owners}
    remote_only |= {"--out": args.out, "--no-report": args.no_report}
    _refuse("local", {**remote_only, "--no-wait": args.no_wait, "--poll": args.poll})
    away = [p for j in plan.jobs for p in (*j.outputs, *j.state) if places.is_url(p)]
    if away:
        raise ConfigError(
            "Back end local keeps what its jobs write on this machine",
            got=away[0],
            fix="give the plan directories of this machine, or use another back end",
        )
    if args.dry_run:
        steps = local.describe(plan)
        for job, action in steps:
            print(f"{action:4}  {job.name}: {shlex.join(job.command)}")
        return {"plan": plan.to_json(), "actions": {j.name: a for j, a in steps}}
    parallel = 1 if args.max_parallel is None else args.max_parallel
    results = local.run(plan, max_parallel=parallel, report=progress.Printer(plan))
    problems = local.failure_text(plan, results)
    if problems:
        print(problems)
    local.raise_on_failure(results)
    return {"plan": plan.to_json(), "jobs": [dataclasses.asdict(r) for r in results]}

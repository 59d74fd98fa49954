# SPDX-License-Identifier: Apache-2.0
"""What `flexolmo launch` does for every back end: choose, check, show, run."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.jobs import cost, gke, remote, settings, slices, slurm, stamps, tools, tpu_vm
from flexolmo_jax.jobs.cost import Cost
from flexolmo_jax.jobs.plan import Job, Plan, order
from flexolmo_jax.jobs.remote import Backend

REMOTE = {"gke": gke.Gke, "tpu-vm": tpu_vm.TpuVm, "slurm": slurm.Slurm}
NOBODY = "nobody"


@dataclasses.dataclass(frozen=True)
class Planned:
    """What the planner says of a job: lines for people and, of a training job, its cost."""

    lines: tuple[str, ...] = ()
    cost: Cost | None = None


def select(plan: Plan, owners: Sequence[str]) -> list[Job]:
    """The jobs of these owners in order ("nobody" for those of no owner); all, if none is named.

    Raises:
      ConfigError: the plan is not sound, or has no such owner.
    """
    jobs = order(plan)
    known = {j.owner or NOBODY for j in jobs}
    for owner in owners:
        if owner not in known:
            raise ConfigError(
                "The plan has no jobs of this owner", got=owner, fix=nearest(owner, known)
            )
    return [j for j in jobs if not owners or (j.owner or NOBODY) in owners]


def make_backend(
    name: str, plan: Plan, jobs: list[Job], cluster: Path | None, given: Sequence[str]
) -> Backend:
    """The back end `name` with the settings of the plan, a file and the command line.

    Raises:
      ConfigError: a setting is missing or wrong, or a job asks for what the back end has not.
    """
    sources: list[Mapping[str, str]] = []
    if cluster is not None:
        own = REMOTE_KNOWN[name]
        others = {n for known in REMOTE_KNOWN.values() for n in known} - set(own)
        # One file may describe several clusters; what another back end knows is not for this one.
        values = settings.from_file(cluster)
        sources.append({k: v for k, v in values.items() if k.rpartition(".")[2] not in others})
    sources.append(settings.from_options(given))
    return REMOTE[name](plan, jobs, *sources)


REMOTE_KNOWN = {"gke": gke.KNOWN, "tpu-vm": tpu_vm.KNOWN, "slurm": slurm.KNOWN}


def show(
    plan: Plan,
    backend: Backend,
    jobs: list[Job],
    *,
    reports: Mapping[str, Planned],
    out: Path | None,
) -> dict[str, Any]:
    """Prints what a launch would do, and does none of it; writes the files if `out` is given.

    Args:
      reports: job name to its memory, speed and cost.

    Raises:
      ConfigError: a launch would refuse what has changed since it finished.
    """
    remote.check_finished(plan, backend, jobs)
    where = remote.folder(plan, backend) if out is None else out
    actions = {j.name: "skip" if _is_recorded(plan, backend, j) else "run" for j in jobs}
    todo = sum(a == "run" for a in actions.values())
    print(f"plan {plan.name} on {backend.name}: {len(jobs)} jobs, {todo} to run")
    outside = _taken_as_there(jobs)
    if outside:
        print(f"taken to be done already, by others: {', '.join(outside)}")
    written: list[str] = []
    for number, job in enumerate(jobs, 1):
        print(f"\n== {number}/{len(jobs)} {job.name} " + "=" * max(3, 60 - len(job.name)))
        if actions[job.name] == "skip":
            print("up to date: would be skipped")
            continue
        for name, text in _lines(job, backend, where, reports.get(job.name, Planned()).lines):
            print(f"{name:<10}{text}")
        if out is None:
            for name, text in backend.files(job).items():
                print(f"--- {name}\n{text}", end="")
        else:
            written += [str(p) for p in remote.write_files(job, backend, out)]
    table = cost_table(jobs, reports)
    print("\n".join(["", *table, ""] if table else [""]), end="")
    print(f"nothing was run{f'; {len(written)} files in {out}' if out else ''}")
    return {
        "plan": plan.to_json(),
        "backend": backend.name,
        "actions": actions,
        "files": written,
        "planned": {name: dataclasses.asdict(said) for name, said in reports.items()},
    }


def _lines(job: Job, backend: Backend, where: Path, report: Sequence[str]) -> list[tuple[str, str]]:
    """The facts of one job: name and text of each line."""
    res = job.resources
    place = f" in {res.zone or res.region}" if res.zone or res.region else ""
    identity = f", as {res.identity}" if res.identity else ""
    lines = [
        ("owner", job.owner or NOBODY),
        ("needs", ", ".join(job.needs) or "nothing"),
        ("runs on", f"{slices.describe(job)}{place}{identity}"),
    ]
    lines += _column("reads", job.inputs)
    lines += _column("writes", (*job.state, *job.outputs))
    lines += _column("program", tools.wrapped(job.command))
    lines += _column("planned", report)
    handles = {need: f"<number of {need}>" for need in job.needs}
    for step in (*backend.steps(job, where, handles), *backend.by_hand(job)):
        lines += _column(step.what, tools.wrapped(step.command))
    return lines


def _column(name: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(name if i == 0 else "", text) for i, text in enumerate(texts)]


def _is_recorded(plan: Plan, backend: Backend, job: Job) -> bool:
    """Whether a launch has seen the end of this job, without asking the back end."""
    record = remote.read_record(plan, backend, job)
    return record.status == "done" and record.work == stamps.work_digest(job)


def _taken_as_there(jobs: list[Job]) -> list[str]:
    names = {j.name for j in jobs}
    return list(dict.fromkeys(n for j in jobs for n in j.needs if n not in names))


def planned(result: Mapping[str, Any], tokens: int, chips: int) -> Planned:
    """The answer of `flexolmo plan` for a job, and what the whole job costs at that speed."""
    hbm = result["hbm_gib"]
    word = "FITS" if result["fits"] else "DOES NOT FIT"
    lines = [f"{word}: {hbm['total']:.1f} of {hbm['limit']:.1f} GiB per chip"]
    speed, mfu = result.get("tokens_per_s_per_chip"), result.get("mfu")
    if not speed or not mfu:
        return Planned(tuple(lines))
    low, high = speed["low"], speed["high"]
    lines.append(
        f"{cost.amount(low)} to {cost.amount(high)} tokens/s/chip, "
        f"MFU {100 * mfu['low']:.0f} to {100 * mfu['high']:.0f} %"
    )
    if not tokens:
        return Planned(tuple(lines))
    c = cost.cost(tokens, chips, (low, high))
    lines.append(
        f"{cost.amount(tokens)} tokens: {_range(c.chip_hours)} chip-hours, "
        f"{cost.duration(c.hours[0])} to {cost.duration(c.hours[1])}"
    )
    return Planned(tuple(lines), c)


def _range(pair: tuple[float, float]) -> str:
    return " to ".join(f"{n:,.0f}" if n >= 10 else f"{n:.2g}" for n in pair)


def cost_table(jobs: Sequence[Job], reports: Mapping[str, Planned]) -> list[str]:
    """Lines of a Markdown table: what each training job costs, and all together."""
    rows, total = [], [0.0, 0.0]
    for job in jobs:
        c = reports[job.name].cost if job.name in reports else None
        if c is None:
            continue
        total = [a + b for a, b in zip(total, c.chip_hours, strict=True)]
        time = f"{cost.duration(c.hours[0])} to {cost.duration(c.hours[1])}"
        where = slices.describe(job)
        rows.append(
            f"| {job.name} | {where} | {cost.amount(c.tokens)} | {_range(c.chip_hours)} | {time} |"
        )
    if not rows:
        return []
    head = ["| job | runs on | tokens | chip-hours | time |", "| --- | --- | --- | --- | --- |"]
    return [*head, *rows, f"| all | | | {_range((total[0], total[1]))} | |"]

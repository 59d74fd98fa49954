# SPDX-License-Identifier: Apache-2.0
"""What `flexolmo launch` does for every back end: choose, check, show, run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.jobs import cost, gke, remote, settings, slices, slurm, stamps, tools, tpu_vm
from flexolmo_jax.jobs.plan import Job, Plan, order
from flexolmo_jax.jobs.remote import Backend

REMOTE = {"gke": gke.Gke, "tpu-vm": tpu_vm.TpuVm, "slurm": slurm.Slurm}
NOBODY = "nobody"


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
    reports: Mapping[str, Sequence[str]],
    out: Path | None,
) -> dict[str, Any]:
    """Prints what a launch would do, and does none of it; writes the files if `out` is given.

    Args:
      reports: job name to lines on its memory, speed and cost.
    """
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
        for name, text in _lines(job, backend, where, reports.get(job.name, ())):
            print(f"{name:<10}{text}")
        if out is None:
            for name, text in backend.files(job).items():
                print(f"--- {name}\n{text}", end="")
        else:
            written += [str(p) for p in remote.write_files(job, backend, out)]
    print(f"\nnothing was run{f'; {len(written)} files in {out}' if out else ''}")
    return {"plan": plan.to_json(), "backend": backend.name, "actions": actions, "files": written}


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
    return record.status == "done" and record.digest == stamps.job_digest(job)


def _taken_as_there(jobs: list[Job]) -> list[str]:
    names = {j.name for j in jobs}
    return list(dict.fromkeys(n for j in jobs for n in j.needs if n not in names))


def cost_lines(result: Mapping[str, Any], tokens: int, chips: int) -> list[str]:
    """What `flexolmo plan` found for a job, and what the whole job costs at that speed."""
    hbm = result["hbm_gib"]
    word = "FITS" if result["fits"] else "DOES NOT FIT"
    lines = [f"{word}: {hbm['total']:.1f} of {hbm['limit']:.1f} GiB per chip"]
    speed = result.get("tokens_per_s_per_chip")
    if not speed:
        return lines
    low, high = speed["low"], speed["high"]
    mfu = result["mfu"]
    lines.append(
        f"{cost.amount(low)} to {cost.amount(high)} tokens/s/chip, "
        f"MFU {100 * mfu['low']:.0f} to {100 * mfu['high']:.0f} %"
    )
    if tokens:
        c = cost.cost(tokens, chips, (low, high))
        lines.append(
            f"{cost.amount(tokens)} tokens: {c.chip_hours[0]:,.0f} to {c.chip_hours[1]:,.0f} "
            f"chip-hours, {cost.duration(c.hours[0])} to {cost.duration(c.hours[1])}"
        )
    return lines

# SPDX-License-Identifier: Apache-2.0
"""A plan: independent jobs, what each needs, reads and writes. Data only; back ends run it."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.jobs import isolation, places


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a job asks a machine for. Back ends read the fields that mean something to them.

    Attributes:
      cpus: cores; 0 takes all that the back end gives to one job.
      memory_gib: host memory of each process; 0 takes what the back end gives.
      accelerator: family of chips, such as v5p, v6e, v5e or h100, or "" for none.
      topology: shape of one TPU slice such as "4x4x8", or "".
      slices: TPU slices, joined by the data centre's network.
      processes: processes of a job without a topology; a TPU slice has one on each of its hosts.
      region, zone: where the machines must be; "" leaves it to the back end's settings.
      identity: service account of the job; its own, if it belongs to an owner.
      bucket: where the job keeps what nobody else may read: a URL, or a directory on a cluster.
      image: container image; "" takes the back end's setting.
    """

    cpus: int = 0
    memory_gib: int = 0
    accelerator: str = ""
    topology: str = ""
    slices: int = 1
    processes: int = 1
    region: str = ""
    zone: str = ""
    identity: str = ""
    bucket: str = ""
    image: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
      name: unique in its plan; letters, digits, '-', '_', '.' and ':'.
      command: the argument list; never a shell line.
      needs: names of jobs that must have finished.
      inputs: files and directories it reads; a change of one makes the job run again.
      outputs: files and directories that exist once it is done: inside the plan's workdir, its
        exchange or the job's own bucket.
      state: directories from which an interrupted run goes on. They are removed only when the job
        has changed since. A job without state starts over: its old outputs are removed. What no
        run of the plan has left is never removed.
      workdir: directory that it starts in, made if absent.
      env: variables it gets beside the few that every process needs.
      owner: whose closed data it may see; "" is nobody's.
      expected_s: rough seconds, to estimate the time left; 0 is unknown.
      planned: options of `flexolmo plan` for the job's program; a training job has its own.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    workdir: str = "."
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resources: Resources = Resources()
    owner: str = ""
    expected_s: float = 0.0
    planned: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A graph of jobs.

    Attributes:
      workdir: where logs and stamps go.
      closed: owner to the directories or URLs that hold that owner's closed data.
      exchange: the one place that jobs of different owners hand things over in (anchor, slices,
        the stitched model): a URL or a directory, or "" where owners share a workdir.
      settings: what a back end must be told about its cluster, such as namespace and queue; a
        name like "legal.namespace" holds for the jobs of one owner. Options override these.
      family: plans of one family may share a workdir and replace what is out of date of each
        other's; "" is the plan alone.
    """

    name: str
    workdir: str
    jobs: tuple[Job, ...]
    closed: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    exchange: str = ""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    family: str = ""

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, for `--dry-run --json`."""
        return dataclasses.asdict(self)


def file_stem(name: str) -> str:
    """The name of a job in file names: not every file system takes a colon."""
    return name.replace(":", "-")


def order(plan: Plan) -> tuple[Job, ...]:
    """Checks the plan and returns its jobs so that each comes after all that it needs.

    Raises:
      ConfigError: a bad or repeated name, an unknown need, a cycle, two writers of one output, an
        owner's job that mentions what is another owner's, or a hand-over outside the exchange.
    """
    _check_names(plan)
    _check_outputs(plan)
    isolation.check(plan)
    done: set[str] = set()
    out: list[Job] = []
    left = list(plan.jobs)
    while left:
        ready = [j for j in left if set(j.needs) <= done]
        if not ready:
            names = ", ".join(j.name for j in left)
            raise ConfigError(
                "The jobs of the plan wait for each other", got=names, where=plan.name
            )
        # One at a time, so that the plan's own order decides among jobs that could all start.
        out.append(ready[0])
        done.add(ready[0].name)
        left.remove(ready[0])
    return tuple(out)


def _check_names(plan: Plan) -> None:
    names = [j.name for j in plan.jobs]
    files = [file_stem(n) for n in names]
    for job in plan.jobs:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]*", job.name):
            raise ConfigError("Not a name for a job", got=repr(job.name), where=plan.name)
        if files.count(file_stem(job.name)) > 1:
            raise ConfigError(
                "Two jobs have the same name for their log", got=job.name, where=plan.name
            )
        if not job.command:
            raise ConfigError("A job has no command", where=f"{plan.name}:{job.name}")
        for need in job.needs:
            if need not in names:
                raise ConfigError(
                    "A job needs one that the plan does not have",
                    got=need,
                    where=f"{plan.name}:{job.name}",
                    fix=nearest(need, names),
                )


def _check_outputs(plan: Plan) -> None:
    writers: dict[str, str] = {}
    for job in plan.jobs:
        # What is removed before a job starts over must be the plan's own.
        roots = (plan.workdir, plan.exchange, job.resources.bucket)
        for path in (*job.outputs, *job.state):
            if not any(places.is_inside(path, root) for root in roots):
                raise ConfigError(
                    "A job writes outside the workdir of its plan",
                    got=path,
                    expected="a path in " + ", ".join(r for r in roots if r),
                    where=f"{plan.name}:{job.name}",
                )
        for output in job.outputs:
            path = places.plain(output) if places.is_url(output) else str(Path(output).absolute())
            if path in writers:
                raise ConfigError(
                    "Two jobs write the same output",
                    got=f"{writers[path]} and {job.name}",
                    where=output,
                )
            writers[path] = job.name

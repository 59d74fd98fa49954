# SPDX-License-Identifier: Apache-2.0
"""A plan: independent jobs, what each needs, reads and writes. Data only; back ends run it."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a job asks a machine for.

    Attributes:
      cpus: cores; 0 takes all that the back end gives to one job.
      accelerator: type of accelerator as the back end names it, or "" for none.
      topology: shape of a TPU slice such as "4x4x8", or "".
    """

    cpus: int = 0
    accelerator: str = ""
    topology: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
      name: unique in its plan; letters, digits, '-', '_', '.' and ':'.
      command: the argument list; never a shell line.
      needs: names of jobs that must have finished.
      inputs: files and directories it reads; a change of one makes the job run again.
      outputs: files and directories that exist once it is done, inside the plan's workdir.
      state: directories from which an interrupted run goes on. They are removed only when the job
        has changed since. A job without state starts over: its old outputs are removed.
      workdir: directory that it starts in, made if absent.
      env: variables it gets beside the few that every process needs.
      owner: whose closed data it may see; "" is nobody's.
      expected_s: rough seconds, to estimate the time left; 0 is unknown.
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """A graph of jobs.

    Attributes:
      workdir: where logs and stamps go.
      closed: owner to the directories that hold that owner's closed data.
    """

    name: str
    workdir: str
    jobs: tuple[Job, ...]
    closed: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, for `--dry-run --json`."""
        return dataclasses.asdict(self)


def file_stem(name: str) -> str:
    """The name of a job in file names: not every file system takes a colon."""
    return name.replace(":", "-")


def order(plan: Plan) -> tuple[Job, ...]:
    """Checks the plan and returns its jobs so that each comes after all that it needs.

    Raises:
      ConfigError: a bad or repeated name, an unknown need, a cycle, two writers of one output, or
        an owner's job that mentions another owner's closed data.
    """
    _check_names(plan)
    _check_outputs(plan)
    _check_isolation(plan)
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
    writers: dict[Path, str] = {}
    root = Path(plan.workdir).resolve()
    for job in plan.jobs:
        # What is removed before a job starts over must be the plan's own.
        for path in (*job.outputs, *job.state):
            if root not in Path(path).resolve().parents:
                raise ConfigError(
                    "A job writes outside the workdir of its plan",
                    got=path,
                    where=f"{plan.name}:{job.name}",
                )
        for output in job.outputs:
            path = Path(output).absolute()
            if path in writers:
                raise ConfigError(
                    "Two jobs write the same output",
                    got=f"{writers[path]} and {job.name}",
                    where=output,
                )
            writers[path] = job.name


def _check_isolation(plan: Plan) -> None:
    """An owner's job must not even learn the path of another owner's closed data."""
    for job in plan.jobs:
        barred = [p for o, paths in plan.closed.items() if o != job.owner for p in paths]
        visible = (*job.command, *job.inputs, job.workdir, *job.env.values())
        seen = [p for p in barred if any(_mentions(text, p) for text in visible)]
        if job.owner and seen:
            raise ConfigError(
                "A job would see closed data of another owner",
                got=", ".join(seen),
                where=f"{plan.name}:{job.name}",
                fix=f"a job of {job.owner!r} may read its own data and public data only",
            )


def _mentions(text: str, path: str) -> bool:
    """Whether `text` contains the path itself, not merely a longer name that starts with it."""
    return re.search(re.escape(path.rstrip("/")) + r"(?![A-Za-z0-9_.-])", text) is not None

# SPDX-License-Identifier: Apache-2.0
"""Finished jobs elsewhere that have changed since: what they wrote stands in their own way.

A job writes where nothing lies. On this machine what is out of date is removed before it runs; in
somebody's bucket only its owner may do that.
"""

import shlex
from collections.abc import Collection, Iterable

from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs import places
from flexolmo_jax.jobs.plan import Job


def stale(jobs: Iterable[Job], finished: Collection[str], changed: Collection[str]) -> list[Job]:
    """Finished jobs that must run again: those that changed, and those after them.

    A changed job that writes nothing, as a score does, is in nobody's way and is not among them.

    Args:
      jobs: in order.
      finished: names of jobs that have ended well, by whatever command.
      changed: those of them whose command is another one now.
    """
    names: set[str] = set()
    out = []
    for job in jobs:
        writes = bool(job.outputs or job.state)
        if names.intersection(job.needs) or (job.name in changed and writes):
            names.add(job.name)
            out += [job] if job.name in finished else []
    return out


def removal(jobs: Iterable[Job]) -> list[tuple[str, ...]]:
    """The commands that remove all that jobs have written."""
    paths = [
        path
        for job in jobs
        for path in (*job.state, *job.outputs)
        if not any(places.is_inside(path, folder) for folder in job.state)
    ]
    s3 = [path for path in paths if places.plain(path).lower().startswith("s3://")]
    here = [path for path in paths if not places.is_url(path)]
    rest = [path for path in paths if path not in (*s3, *here)]
    out = [("gcloud", "storage", "rm", "--recursive", *rest)] if rest else []
    out += [("aws", "s3", "rm", "--recursive", path) for path in s3]
    return [*out, ("rm", "-r", "--", *here)] if here else out


def refusal(jobs: list[Job], where: str, forget: Iterable[tuple[str, ...]]) -> ConfigError:
    """The error that names stale jobs and the commands after which a launch starts them again.

    Args:
      forget: commands after which neither the launcher nor the back end knows them.
    """
    commands = " && ".join(map(shlex.join, (*removal(jobs), *forget)))
    return ConfigError(
        "Finished jobs of the plan have changed, and what they wrote is in their way",
        got=", ".join(job.name for job in jobs),
        expected="the commands that they finished with, or nothing where they write",
        where=where,
        fix="launch the plan as it was, or remove what they have written and that they are known "
        f"to be done (`{commands}`), then launch again",
    )

# SPDX-License-Identifier: Apache-2.0
"""Stamps: a finished job is not run again while its command and its inputs stay the same."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flexolmo_jax
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs.plan import Job, Plan, file_stem
from flexolmo_jax.tree import file_digest, json_digest

# Directories that describe themselves: this file holds digests of everything beside it.
MANIFESTS = ("flexolmo.json", "tokens.json")
SMALL_FILE = 1 << 20


def fingerprint(path: Path) -> Any:
    """A value that changes when a file or directory does.

    Manifests and small files count by content; other files by size and time of change, since
    reading terabytes to skip a job would cost more than the job.
    """
    if path.is_file():
        stat = path.stat()
        if stat.st_size <= SMALL_FILE:
            return file_digest(path)
        return [stat.st_size, stat.st_mtime_ns]
    if path.is_dir():
        for name in MANIFESTS:
            if (path / name).is_file():
                return file_digest(path / name)
        files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return {p.relative_to(path).as_posix(): fingerprint(p) for p in files}
    return None


def job_digest(job: Job) -> str:
    """Digest of all that decides the result of a job: command, settings, inputs, version."""
    settings = dataclasses.asdict(job)
    for unrelated in ("needs", "expected_s", "outputs", "planned"):
        del settings[unrelated]
    settings["inputs"] = {p: fingerprint(Path(p)) for p in job.inputs}
    settings["version"] = flexolmo_jax.__version__
    return json_digest(settings)


def work_digest(job: Job) -> str:
    """Digest of what a job computes, wherever: neither machines nor this program's version count.

    A finished job of weeks must not run again because a zone or a version changed.
    """
    return json_digest([job.command, dict(job.env), job.workdir, job.owner, job.inputs, job.state])


def hand_over_digest(job: Job) -> str:
    """Digest of what a job computes and of the machines that it was handed over for."""
    return json_digest([work_digest(job), dataclasses.asdict(job.resources)])


def stamp_path(plan: Plan, job: Job) -> Path:
    """Where the stamp of a job is kept."""
    return Path(plan.workdir) / "jobs" / f"{file_stem(job.name)}.json"


def read(plan: Plan, job: Job) -> dict[str, Any] | None:
    """The stamp of a job that is done and up to date, or None."""
    path = stamp_path(plan, job)
    if not path.is_file() or not all(Path(o).exists() for o in job.outputs):
        return None
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        # A torn stamp is no stamp: the job runs again.
        return None
    return stamp if stamp.get("digest") == job_digest(job) else None


def write(plan: Plan, job: Job, digest: str, seconds: float) -> None:
    """Notes that a job is done; `digest` was taken before it started."""
    path = stamp_path(plan, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = {
        "schema": 1,
        "job": job.name,
        "digest": digest,
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def require_own(plan: Plan, jobs: Iterable[Job]) -> None:
    """Refuses jobs in whose way something lies that no run of the plan has left.

    Raises:
      ConfigError: see above, with the paths.
    """
    found = [(path, job) for job in jobs for path in _foreign(plan, job)]
    if not found:
        return
    path, job = found[0]
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise ConfigError(
        "The plan writes where something lies that it has not made",
        got=f"{path}{others}",
        expected="nothing, or what an earlier run of the plan has left",
        where=f"{plan.name}:{job.name}",
        fix="choose another folder for the plan, or move away what lies there",
    )


def prepare(plan: Plan, job: Job, digest: str) -> None:
    """Makes way for a job that is about to run: no stamp, no outputs or state of another job.

    Raises:
      ConfigError: see `require_own`.
    """
    require_own(plan, [job])
    stamp_path(plan, job).unlink(missing_ok=True)
    before, _ = _started(plan, job)
    if not job.state:
        _remove(job.outputs)
    elif before not in (None, digest):
        _remove((*job.state, *job.outputs))
    path = _started_path(plan, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{digest}\n{_family(plan)}\n", encoding="utf-8")


def _family(plan: Plan) -> str:
    return plan.family or plan.name


def _started_path(plan: Plan, job: Job) -> Path:
    return stamp_path(plan, job).with_suffix(".started")


def _started(plan: Plan, job: Job) -> tuple[str | None, str | None]:
    """Digest of the job that was last started under this name, and the family of its plan.

    The first notes had no family: what they stand for is taken to be the plan's own.
    """
    path = _started_path(plan, job)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    digest, family, *_ = (*lines, None, None)
    return digest, family


def _foreign(plan: Plan, job: Job) -> list[str]:
    """What would be removed for this job, and was left by none of the plan's."""
    digest, family = _started(plan, job)
    if digest is not None and family in (None, _family(plan)):
        return []
    if digest is None and job.state:
        return []  # It is gone on with, not removed.
    removed = (*job.state, *job.outputs)
    found = [path for path in removed if os.path.lexists(path)]
    return [] if found and read(plan, job) is not None else found


def _remove(paths: Iterable[str]) -> None:
    for path in map(Path, paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

# SPDX-License-Identifier: Apache-2.0
"""Stamps: a finished job is not run again while its command and its inputs stay the same."""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flexolmo_jax
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


def prepare(plan: Plan, job: Job, digest: str) -> None:
    """Makes way for a job that is about to run: no stamp, no outputs or state of another job."""
    stamp_path(plan, job).unlink(missing_ok=True)
    started = stamp_path(plan, job).with_suffix(".started")
    if not job.state:
        _remove(job.outputs)
    elif started.is_file() and started.read_text(encoding="utf-8") != digest:
        _remove((*job.state, *job.outputs))
    started.parent.mkdir(parents=True, exist_ok=True)
    started.write_text(digest, encoding="utf-8")


def _remove(paths: Iterable[str]) -> None:
    for path in map(Path, paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

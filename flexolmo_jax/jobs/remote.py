# SPDX-License-Identifier: Apache-2.0
"""Runs a plan on machines elsewhere: hands over jobs that are ready, looks again, goes on.

The launcher may stop at any time: jobs run on without it, and the same command continues. What it
has seen done is kept in small records under the plan's workdir; all else it asks the back end.
"""

import dataclasses
import hashlib
import json
import re
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from flexolmo_jax.errors import ConfigError, MachineError
from flexolmo_jax.jobs import changed, stamps, tools
from flexolmo_jax.jobs.plan import Job, Plan, file_stem

# Kubernetes appends "-slice-0-0-" and five letters to the names of pods and takes 63 in all.
MAX_NAME = 40
# A look may fail while a control plane is busy; this many in a row are a fault.
MAX_BLIND = 10
ENDED = ("done", "skipped", "failed", "blocked")


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a back end says of a job.

    Attributes:
      status: "absent", "waiting" (for machines), "ready" (machines are there, nothing runs),
        "running", "done", "failed", or "lost" (its machines were taken away).
      digest: of the job that was handed over, "" if the back end does not keep it.
    """

    status: str
    detail: str = ""
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Record:
    """What the launcher remembers of a job.

    Attributes:
      work: digest of what it computes.
      digest: of that and its machines, as it was handed over.
      handle: the back end's name for it.
      status: "started", "ended" (its machines are not given back yet), "done" or "failed".
    """

    work: str = ""
    digest: str = ""
    handle: str = ""
    status: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of a launch, and what it is for."""

    what: str
    command: tuple[str, ...]


class Backend(Protocol):
    """What the launcher asks of a back end. No method keeps state of its own."""

    name: str
    # Whether jobs may be handed over before what they need is done.
    queues_itself: bool
    # Whether a job that has ended is still there under its name.
    keeps_finished: bool

    def files(self, job: Job) -> dict[str, str]:
        """File name to text of all that the job needs there."""
        ...

    def steps(self, job: Job, folder: Path, needs: Mapping[str, str]) -> list[Step]:
        """The commands that hand the job over; `needs` are the handles of jobs before it."""
        ...

    def by_hand(self, job: Job) -> list[Step]:
        """What the launcher does after that, as commands; for people."""
        ...

    def start(self, job: Job, folder: Path, needs: Mapping[str, str]) -> str:
        """Hands the job over and returns its handle."""
        ...

    def look(self, job: Job, handle: str) -> Seen:
        """Asks how the job is."""
        ...

    def proceed(self, job: Job) -> None:
        """Starts the job on machines that are "ready"."""
        ...

    def release(self, job: Job, folder: Path) -> None:
        """Gives machines back after the job ended, if they would be kept otherwise."""
        ...

    def removal(self, job: Job, handle: str) -> list[Step]:
        """The commands that remove what is left of the job, its machines included."""
        ...

    def log_command(self, job: Job, handle: str) -> tuple[str, ...]:
        """The command that shows the job's output."""
        ...


@dataclasses.dataclass(frozen=True)
class RemoteResult:
    """How a job stands when the launcher stops looking."""

    name: str
    status: str
    seconds: float
    handle: str
    detail: str = ""


def resource_name(plan: Plan, job: Job) -> str:
    """A name that every back end takes: lower case, digits and hyphens, at most 40."""
    plain = re.sub(r"[^a-z0-9]+", "-", f"{plan.name}-{file_stem(job.name)}".lower()).strip("-")
    name = f"flexolmo-{plain}"
    if len(name) <= MAX_NAME and plain == f"{plan.name}-{file_stem(job.name)}":
        return name
    digest = hashlib.sha256(f"{plan.name}\n{job.name}".encode()).hexdigest()[:6]
    return f"{name[: MAX_NAME - 7].rstrip('-')}-{digest}"


def folder(plan: Plan, backend: Backend) -> Path:
    """Where the launcher keeps its records and what it hands over."""
    return Path(plan.workdir) / "launch" / backend.name


def read_record(plan: Plan, backend: Backend, job: Job) -> Record:
    """What earlier launches remember of a job."""
    return _read(folder(plan, backend), job)


def check_finished(plan: Plan, backend: Backend, jobs: list[Job]) -> None:
    """Refuses to start finished jobs by another command where their outputs are in the way.

    Raises:
      ConfigError: see above, with the commands that remove them.
    """
    records = {job.name: read_record(plan, backend, job) for job in jobs}
    finished = {n for n, r in records.items() if r.status in ("ended", "done")}
    others = {j.name for j in jobs if records[j.name].work != stamps.work_digest(j)} & finished
    found = changed.stale(jobs, finished, others)
    if not found:
        return
    known = [j for j in found if backend.keeps_finished or records[j.name].status == "ended"]
    raise _in_the_way(plan, backend, found, known)


def _in_the_way(plan: Plan, backend: Backend, jobs: list[Job], known: list[Job]) -> ConfigError:
    """Refuses finished jobs that have changed; `known` are those that the back end knows too."""
    forget = [step.command for job in known for step in backend.removal(job, "")]
    notes = [str(_path(folder(plan, backend), job)) for job in jobs]
    where = f"{plan.name} on {backend.name}"
    return changed.refusal(jobs, where, [*forget, ("rm", "-f", "--", *notes)])


def write_files(job: Job, backend: Backend, where: Path) -> list[Path]:
    """Writes a job's manifests and scripts; returns their paths."""
    where.mkdir(parents=True, exist_ok=True)
    out = []
    for name, text in backend.files(job).items():
        partial = where / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        out.append(partial.replace(where / name))
    return out


class Launch:
    """One run of a plan on one back end.

    Args:
      jobs: those to run, in order; what others make is taken to be in the exchange.
      wait: stay until all is done; otherwise hand over what can be and return.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        jobs: list[Job],
        *,
        wait: bool = True,
        poll_s: float = 30.0,
        report: Callable[[str], None] = print,
    ):
        self.plan, self.backend, self.wait = plan, backend, wait
        self.poll_s, self.say = poll_s, report
        self.folder = folder(plan, backend)
        self.jobs = jobs
        self.results: dict[str, RemoteResult] = {}
        self.records: dict[str, Record] = {}
        self.met: set[str] = set()
        self.blind: dict[str, int] = {}
        self.last: dict[str, str] = {}
        self.started = time.monotonic()

    def run(self) -> list[RemoteResult]:
        """Runs until nothing is left to do (or, without `wait`, to hand over).

        Raises:
          ConfigError: a job is there in another version and still runs, or has finished.
          MachineError: the back end does not answer.
        """
        check_finished(self.plan, self.backend, self.jobs)
        while True:
            for job in self.jobs:
                if self.results.get(job.name, _NOTHING).status not in ENDED:
                    self._visit(job)
            left = [j for j in self.jobs if self._status(j.name) not in ENDED]
            if not left or not self.wait:
                return [self.results[j.name] for j in self.jobs]
            time.sleep(self.poll_s)

    def _status(self, name: str) -> str:
        return self.results.get(name, _NOTHING).status

    def _visit(self, job: Job) -> None:
        """One look at one job, and the one step that follows from it."""
        digest = stamps.hand_over_digest(job)
        record = self.records.setdefault(job.name, _read(self.folder, job))
        if record.status in ("ended", "done") and record.work == stamps.work_digest(job):
            if record.status == "ended":
                self._finish(job, record)
            return self._note(job, "skipped", "done before")
        needs = [n for n in job.needs if n in {j.name for j in self.jobs}]
        if any(self._status(n) in ("failed", "blocked") for n in needs):
            return self._block(job, record)
        seen = self._look(job, record)
        if seen is None:
            return None
        seen = self._first_sight(job, record, digest, seen)
        if seen.status in ("absent", "lost"):
            return self._hand_over(job, digest, needs, seen)
        if seen.status == "ready":
            self.backend.proceed(job)
            seen = Seen("running", "started")
        if seen.status == "failed" and not all(map(self._is_done, needs)):
            # It cannot have run: a queue took it out, and the job that it needs is seen next.
            seen = Seen("waiting", "for " + ", ".join(needs))
        if seen.status in ("done", "failed"):
            self._end(job, record, digest, seen)
        return self._note(job, seen.status, seen.detail)

    def _look(self, job: Job, record: Record) -> Seen | None:
        """Asks the back end; None while it does not answer."""
        try:
            seen = self.backend.look(job, record.handle)
        except MachineError as error:
            self.blind[job.name] = self.blind.get(job.name, 0) + 1
            if job.name not in self.met or self.blind[job.name] > MAX_BLIND:
                raise
            self.say(f"        {job.name}: no answer, will ask again ({error.what})")
            return None
        self.blind[job.name] = 0
        return seen

    def _first_sight(self, job: Job, record: Record, digest: str, seen: Seen) -> Seen:
        """What an earlier launch left: taken over if it is this job, cleared if it failed."""
        if job.name in self.met:
            return seen
        self.met.add(job.name)
        known = seen.digest or record.digest
        other = seen.status != "absent" and known != digest
        # Handed over for other machines: the one that runs is not where this plan looks.
        elsewhere = seen.status == "absent" and record.status == "started"
        hidden = elsewhere and bool(record.digest) and record.digest != digest
        if hidden or (other and seen.status in ("waiting", "ready", "running")):
            stop = " && ".join(shlex.join(s.command) for s in self._removal(job))
            raise ConfigError(
                "A job of the plan is under way in another version",
                got=f"{job.name}: {'handed over elsewhere' if hidden else seen.status}",
                where=f"{self.plan.name} on {self.backend.name}",
                fix=f"launch the plan as it was, or stop the job (`{stop}`) and remove "
                f"{_path(self.folder, job)}, then launch again",
            )
        if other and seen.status == "done" and (job.outputs or job.state):
            # Its record is lost, or of another version; its outputs are there.
            raise _in_the_way(self.plan, self.backend, [job], [job])
        if seen.status == "failed" or other:
            why = "failed before" if seen.status == "failed" else "has changed since"
            self.say(f"        {job.name}: {why}, starts again")
            self._clear(job)
            return Seen("absent")
        return seen

    def _hand_over(self, job: Job, digest: str, needs: list[str], seen: Seen) -> None:
        open_ = [n for n in needs if not self._is_done(n)]
        if open_ and not (self.backend.queues_itself and all(map(self._is_under_way, open_))):
            return self._note(job, "needs", ", ".join(open_))
        if seen.status == "lost":
            self.say(f"        {job.name}: its machines were taken away ({seen.detail})")
            self._clear(job)
        write_files(job, self.backend, self.folder)
        before = {n: self.records[n].handle for n in open_}
        handle = self.backend.start(job, self.folder, before)
        self._keep(job, Record(stamps.work_digest(job), digest, handle, "started"))
        return self._note(job, "waiting", f"handed over as {handle}")

    def _is_done(self, name: str) -> bool:
        return self._status(name) in ("done", "skipped")

    def _is_under_way(self, name: str) -> bool:
        return self._status(name) in ("waiting", "ready", "running")

    def _removal(self, job: Job) -> list[Step]:
        return self.backend.removal(job, self.records[job.name].handle)

    def _clear(self, job: Job) -> None:
        for step in self._removal(job):
            tools.call(step.command)

    def _end(self, job: Job, record: Record, digest: str, seen: Seen) -> None:
        if seen.status == "failed":
            command = shlex.join(self.backend.log_command(job, record.handle))
            self.say(f"        {job.name}: its output: {command}")
            self.backend.release(job, self.folder)
            self._keep(job, dataclasses.replace(record, status="failed"))
            return
        # Kept before the machines go, which are the only trace of it elsewhere.
        ended = Record(stamps.work_digest(job), digest, record.handle, "ended")
        self._keep(job, ended)
        self._finish(job, ended)

    def _finish(self, job: Job, record: Record) -> None:
        self.backend.release(job, self.folder)
        self._keep(job, dataclasses.replace(record, status="done"))

    def _block(self, job: Job, record: Record) -> None:
        """What waits for a failed job is taken out of the queue that it stands in."""
        if record.handle and record.status == "started" and self.backend.queues_itself:
            self._clear(job)
            self._keep(job, Record())
        self._note(job, "blocked", "a job that it needs failed")

    def _keep(self, job: Job, record: Record) -> None:
        self.records[job.name] = record
        _write(self.folder, job, record)

    def _note(self, job: Job, status: str, detail: str = "") -> None:
        """Keeps how a job stands, and says it when that is news."""
        handle = self.records[job.name].handle
        seconds = time.monotonic() - self.started
        self.results[job.name] = RemoteResult(job.name, status, round(seconds, 1), handle, detail)
        line = f"{WORDS[status]}{': ' if detail else ''}{detail}"
        if self.last.get(job.name) == line:
            return
        self.last[job.name] = line
        ended = sum(r.status in ENDED for r in self.results.values())
        self.say(f"[{ended:>2}/{len(self.jobs)}] {job.name}: {line}")


_NOTHING = RemoteResult("", "", 0.0, "")
WORDS = {
    "needs": "waits for other jobs",
    "waiting": "waits for machines",
    "running": "runs",
    "done": "done",
    "skipped": "up to date",
    "failed": "failed",
    "blocked": "not run",
}


def _path(where: Path, job: Job) -> Path:
    return where / f"{file_stem(job.name)}.json"


def _read(where: Path, job: Job) -> Record:
    """The record of a job; an unreadable one is none, the back end is asked instead."""
    try:
        values: Any = json.loads(_path(where, job).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return Record()
    names = [f.name for f in dataclasses.fields(Record)]
    if not isinstance(values, dict) or not all(isinstance(values.get(n), str) for n in names):
        return Record()
    return Record(**{n: values[n] for n in names})


def _write(where: Path, job: Job, record: Record) -> None:
    where.mkdir(parents=True, exist_ok=True)
    partial = _path(where, job).with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", encoding="utf-8")
    partial.replace(_path(where, job))


def raise_on_failure(results: list[RemoteResult]) -> None:
    """Turns jobs that failed into one error that names them.

    Raises:
      MachineError: a job failed.
    """
    bad = [r.name for r in results if r.status == "failed"]
    if bad:
        raise MachineError(
            "Jobs of the plan failed",
            got=", ".join(bad),
            fix="see their output; the same command then runs only what is missing",
        )

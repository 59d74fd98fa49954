# SPDX-License-Identifier: Apache-2.0
"""Runs a plan on this machine: each job as one process or several, with a log file each.

Several processes of one job find each other over the loopback interface and are otherwise what
they would be on the hosts of a pod.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flexolmo_jax.errors import ConfigError, MachineError, Preempted
from flexolmo_jax.jobs import stamps
from flexolmo_jax.jobs.plan import Job, Plan, order

# All that a process gets from the caller's environment; the rest could name others' data.
PASSED = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONWARNINGS")
PASSED_PREFIXES = ("JAX_", "XLA_", "CUDA_", "NVIDIA_", "LD_", "TPU_", "LIBTPU_", "PIP_", "SSL_")
# What must never reach a job from around us: it would join processes that are not its own.
OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS")
OURS += ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LOOPBACK = "127.0.0.1"
PREEMPTED = 75
# A job that is no reason not to start those that need it.
GOOD = ("done", "skipped")
TAIL_LINES = 25
POLL_S = 0.05
# Time that a job gets to save its state when the run is stopped.
SAVE_S = 120.0
# The other processes of a job whose first has died wait for it: they cannot save.
LEAVE_S = 5.0


@dataclasses.dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
      status: "done", "skipped" (its stamp was valid), "failed", "preempted" or "blocked" (a job
        that it needs did not finish).
      seconds: run time; of the earlier run if skipped.
      log: of its only or first process; of the one that failed first, if one did.
    """

    name: str
    status: str
    seconds: float
    log: str
    exit_code: int | None = None


class _Process:
    """A child and the moment of its end: of several, the first to fail is the one to blame."""

    def __init__(self, child: subprocess.Popen):
        self.child, self.ended = child, 0.0
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        self.child.wait()
        self.ended = time.monotonic()

    @property
    def code(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self.child.returncode if self.ended else None

    def stop(self, patience_s: float) -> None:
        """Waits for an end that was asked for, then enforces it."""
        self._waiter.join(patience_s)
        if not self.ended:
            self.child.kill()
            self._waiter.join()


@dataclasses.dataclass
class _Running:
    job: Job
    processes: Sequence[_Process]
    digest: str
    started: float
    slot: int

    def ended(self) -> tuple[int, int] | None:
        """(exit code, number of the process that decides it), or None while the job runs.

        It runs until all processes have ended well or saved, or one has not.
        """
        codes = [process.code for process in self.processes]
        bad = [i for i, code in enumerate(codes) if code not in (None, 0, PREEMPTED)]
        if bad:
            # The others fail because it is gone.
            first = min(bad, key=lambda i: self.processes[i].ended)
            return codes[first] or 0, first
        if None in codes:
            return None
        code = PREEMPTED if PREEMPTED in codes else 0
        return code, codes.index(code)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a caller's `report` function is told.

    Attributes:
      kind: "start", "end" or "tick".
      results: jobs that ended so far.
      left_s: estimated seconds until the plan is done, or None.
    """

    kind: str
    job: Job
    result: JobResult | None
    results: tuple[JobResult, ...]
    elapsed_s: float
    left_s: float | None


def log_path(plan: Plan, job: Job, index: int = 0) -> Path:
    """The log file of a process of a job."""
    return stamps.stamp_path(plan, job).with_suffix(f".{index}.log" if index else ".log")


def environment(job: Job, index: int = 0, port: int = 0) -> dict[str, str]:
    """The environment of a process: a short list of the caller's variables and the job's own.

    Args:
      index: number of the process, if the job has several.
      port: where process 0 waits for the others.
    """
    kept = {
        k: v
        for k, v in os.environ.items()
        if (k in PASSED or k.startswith(PASSED_PREFIXES)) and k not in OURS
    }
    joined: dict[str, str] = {}
    if job.resources.processes > 1:
        address = f"{LOOPBACK}:{port}"
        values = (address, address, str(job.resources.processes), str(index))
        joined = dict[str, str](zip(OURS, values, strict=True))
        joined["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    return {**kept, "PYTHONUNBUFFERED": "1", **job.env, **joined}


def _free_port() -> int:
    """A port that nothing listens on; the system gives them out in turn, so not twice soon."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log."""
    if not path.is_file():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def describe(plan: Plan) -> list[tuple[Job, str]]:
    """Jobs in order with "run" or "skip", without running anything; the view of `--dry-run`.

    A job after one that will run is listed as "run" too: its inputs are about to change.

    Raises:
      ConfigError: the plan is not sound, or would remove what it has not made.
    """
    out: list[tuple[Job, str]] = []
    stale: set[str] = set()
    jobs = order(plan)
    stamps.require_own(plan, jobs)
    for job in jobs:
        fresh = not stale.intersection(job.needs) and stamps.read(plan, job) is not None
        if not fresh:
            stale.add(job.name)
        out.append((job, "skip" if fresh else "run"))
    return out


def run(
    plan: Plan,
    *,
    max_parallel: int = 1,
    report: Callable[[Progress], None] = lambda _: None,
) -> list[JobResult]:
    """Runs the jobs of a plan, each as soon as all that it needs is done.

    A failed job stops those that need it and no others. Finished jobs are skipped on a rerun.

    Raises:
      ConfigError: the plan is not sound, or would remove what it has not made.
      MachineError: a process could not be started.
    """
    if max_parallel < 1:
        raise ConfigError("max_parallel must be at least 1", got=max_parallel)
    stamps.require_own(plan, order(plan))
    with _children_end_with_us():
        return _Runner(plan, max_parallel, report).run()


class _Runner:
    """State of one run of a plan."""

    def __init__(self, plan: Plan, max_parallel: int, report: Callable[[Progress], None]):
        self.plan, self.max_parallel, self.report = plan, max_parallel, report
        self.waiting = list(order(plan))
        self.running: list[_Running] = []
        self.results: dict[str, JobResult] = {}
        self.started = time.monotonic()

    def run(self) -> list[JobResult]:
        try:
            while self.waiting or self.running:
                self._start_ready()
                self._collect()
        finally:
            self._stop_all()
        return list(self.results.values())

    def _start_ready(self) -> None:
        for job in list(self.waiting):
            ended = [self.results[n].status for n in job.needs if n in self.results]
            if any(status not in GOOD for status in ended):
                self.waiting.remove(job)
                self._end(job, "blocked", 0.0)
            elif self._is_ready(job) and len(self.running) < self.max_parallel:
                self.waiting.remove(job)
                self._start(job)

    def _is_ready(self, job: Job) -> bool:
        return all(n in self.results and self.results[n].status in GOOD for n in job.needs)

    def _start(self, job: Job) -> None:
        stamp = stamps.read(self.plan, job)
        if stamp is not None:
            self._end(job, "skipped", stamp["seconds"])
            return
        log_path(self.plan, job).parent.mkdir(parents=True, exist_ok=True)
        digest = stamps.job_digest(job)
        # Before the directory is made: it may be among what an older job left behind.
        stamps.prepare(self.plan, job, digest)
        Path(job.workdir).mkdir(parents=True, exist_ok=True)
        port = _free_port() if job.resources.processes > 1 else 0
        processes: list[_Process] = []
        slot = min(set(range(self.max_parallel)) - {r.slot for r in self.running})
        cores = self._cores(slot)
        item = _Running(job, processes, digest, time.monotonic(), slot)
        # Known before the first starts, so that an interrupt stops those that have started.
        self.running.append(item)
        for index in range(job.resources.processes):
            child = self._spawn(job, index, port)
            processes.append(_Process(child))
            _pin(child.pid, cores)
        self._tell("start", job)

    def _spawn(self, job: Job, index: int, port: int) -> subprocess.Popen:
        try:
            with log_path(self.plan, job, index).open("w", encoding="utf-8") as out:
                return subprocess.Popen(
                    list(job.command),
                    cwd=job.workdir,
                    env=environment(job, index, port),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
        except OSError as error:
            raise MachineError(
                "A job could not be started",
                got=error.strerror,
                where=shlex.join(job.command),
            ) from error

    def _cores(self, slot: int) -> list[int]:
        """Cores of a job that is about to start: those of its slot, or all if it stays alone.

        Parallel jobs have disjoint cores, since XLA takes as many threads as it may use cores.
        With nothing beside it and nothing ready, nothing can start before this job ends.
        """
        if not hasattr(os, "sched_getaffinity"):
            return []
        cores = sorted(os.sched_getaffinity(0))
        if not self.running and not any(self._is_ready(job) for job in self.waiting):
            return cores
        share = max(1, len(cores) // self.max_parallel)
        return cores[slot * share : (slot + 1) * share] or cores

    def _collect(self) -> None:
        time.sleep(POLL_S)
        for item in list(self.running):
            ended = item.ended()
            if ended is None:
                self._tell("tick", item.job)
                continue
            _stop(item.processes, LEAVE_S)
            self.running.remove(item)
            code, index = ended
            seconds = time.monotonic() - item.started
            missing = [o for o in item.job.outputs if not Path(o).exists()]
            if code == 0 and not missing:
                stamps.write(self.plan, item.job, item.digest, seconds)
                self._end(item.job, "done", seconds, code)
                continue
            if code == 0:
                with log_path(self.plan, item.job).open("a", encoding="utf-8") as log:
                    log.write(f"exit code 0, but these outputs are missing: {missing}\n")
            status = "preempted" if code == PREEMPTED else "failed"
            self._end(item.job, status, seconds, code, index)

    def _end(
        self, job: Job, status: str, seconds: float, code: int | None = None, index: int = 0
    ) -> None:
        log = str(log_path(self.plan, job, index))
        self.results[job.name] = JobResult(job.name, status, seconds, log, code)
        self._tell("end", job)

    def _tell(self, kind: str, job: Job) -> None:
        now = time.monotonic()
        result = self.results.get(job.name)
        running = {r.job.name: now - r.started for r in self.running}
        left = time_left(self.plan, self.results, running, self.max_parallel)
        ended = tuple(self.results.values())
        self.report(Progress(kind, job, result, ended, now - self.started, left))

    def _stop_all(self) -> None:
        """Ends the children after an interrupt; a training job saves its state on the way."""
        _stop([process for item in self.running for process in item.processes], SAVE_S)


def _stop(processes: Sequence[_Process], patience_s: float) -> None:
    """Tells processes to end and ends those that do not; all are told before one is waited for."""
    for process in processes:
        process.child.terminate()
    end = time.monotonic() + patience_s
    for process in processes:
        process.stop(max(0.0, end - time.monotonic()))


@contextlib.contextmanager
def _children_end_with_us() -> Iterator[None]:
    """Makes SIGTERM unwind the stack, so that no job outlives the run that started it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _pin(pid: int, cores: list[int]) -> None:
    if not cores:
        return
    try:
        os.sched_setaffinity(pid, cores)
    except ProcessLookupError:
        # The process has already ended; its exit code is collected as usual.
        return


def time_left(
    plan: Plan, results: dict[str, JobResult], running: dict[str, float], max_parallel: int = 1
) -> float | None:
    """Estimated seconds until the plan is done; None if no job says what to expect.

    Expected times are scaled by how the finished jobs compare with theirs. The first jobs of a
    plan are often small and mostly start-up, so a tenth of the plan counts as finished in the
    time that was expected.

    Args:
      running: seconds that each running job has taken so far, by name.
    """
    done = [j for j in plan.jobs if j.name in results and results[j.name].status == "done"]
    open_jobs = [j for j in plan.jobs if j.name not in results]
    if not any(j.expected_s for j in plan.jobs):
        return None
    expected = sum(j.expected_s for j in done)
    spent = sum(results[j.name].seconds for j in done if j.expected_s)
    prior = (expected + sum(j.expected_s for j in open_jobs)) / 10
    scale = (spent + prior) / (expected + prior) if prior else 1.0
    each = [max(0.0, j.expected_s * scale - running.get(j.name, 0.0)) for j in open_jobs]
    return max(sum(each) / max_parallel, max(each, default=0.0))


def failure_text(plan: Plan, results: list[JobResult]) -> str:
    """For each job that failed: the tail of its log and the command that runs it alone."""
    jobs = {j.name: j for j in plan.jobs}
    parts = []
    for result in results:
        if result.status in ("failed", "preempted"):
            command = shlex.join(jobs[result.name].command)
            parts.append(
                f"job {result.name} {result.status} (exit code {result.exit_code}); "
                f"end of {result.log}:\n{tail(Path(result.log))}\n"
                f"to run it alone: cd {shlex.quote(jobs[result.name].workdir)} && {command}"
            )
    blocked = [r.name for r in results if r.status == "blocked"]
    if blocked:
        parts.append("not run, since they need a job that failed: " + ", ".join(blocked))
    return "\n\n".join(parts)


def raise_on_failure(results: list[JobResult]) -> None:
    """Turns jobs that did not finish into one error that names them.

    Raises:
      Preempted: a job saved its state and stopped; the same command goes on.
      MachineError: a job failed.
    """
    bad = [r for r in results if r.status in ("failed", "preempted")]
    if not bad:
        return
    names = ", ".join(r.name for r in bad)
    if all(r.status == "preempted" for r in bad):
        raise Preempted("Jobs were preempted after saving", got=names, fix="run the same again")
    fix = "see the log; the same command then runs only what is missing"
    raise MachineError("Jobs of the plan failed", got=names, where=bad[0].log, fix=fix)

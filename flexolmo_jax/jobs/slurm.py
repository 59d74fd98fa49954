# SPDX-License-Identifier: Apache-2.0
"""Slurm: one batch script per job, one process per node, the order kept by Slurm itself.

Source: the manual pages of sbatch, srun, sacct and scontrol.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from flexolmo_jax.errors import ConfigError, MachineError
from flexolmo_jax.jobs import settings as names
from flexolmo_jax.jobs import slices, tools
from flexolmo_jax.jobs.plan import Job, Plan, file_stem
from flexolmo_jax.jobs.remote import Seen, Step, resource_name
from flexolmo_jax.jobs.settings import Setting

KNOWN = {
    "partition": Setting("a partition with the accelerators", names.WORD),
    "account": Setting("the account that is charged", names.WORD),
    "cpu_partition": Setting("a partition for jobs without accelerators", names.WORD, ""),
    "qos": Setting("a quality of service", names.WORD, ""),
    "time": Setting("a time limit such as 2-00:00:00", "[0-9]+([-:][0-9]+)*", ""),
    "grace_s": Setting("seconds to save in before the time limit", names.NUMBER, "120"),
    "gpus_per_node": Setting("GPUs of a node", "[0-9]{1,2}", ""),
    "gres_type": Setting("the cluster's name for the GPUs", names.WORD, ""),
    "chdir": Setting("directory that jobs start in, with experiments/", names.LINE, ""),
    "bin": Setting("directory of the program flexolmo", names.LINE, ""),
}
NEEDED = ("partition", "account")
PREEMPTED = 75
# JAX's coordinator listens in a range that other services leave alone.
PORTS = (61440, 4096)
# Source: Slurm's page of job state codes.
WAITING = (
    *("PENDING", "CONFIGURING", "EXPEDITING", "POWER_UP_NODE", "REQUEUED", "REQUEUE_FED"),
    *("REQUEUE_HOLD", "RESIZING", "RESV_DEL_HOLD", "SUSPENDED"),
)
RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "UPDATE_DB")
# Slurm puts these back into the queue by itself; to see one means that it could not.
LOST = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL", "REVOKED")
FAILED = ("FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE", "SPECIAL_EXIT")


class Slurm:
    """The back end for one plan with its settings.

    Raises:
      ConfigError: settings are missing or of another form, or a job asks for TPUs.
    """

    name = "slurm"
    queues_itself = True
    keeps_finished = False

    def __init__(self, plan: Plan, jobs: list[Job], *given: Mapping[str, str]):
        self.plan = plan
        self.settings = names.resolve(self.name, KNOWN, plan, *given)
        names.require(self.name, self.settings, [(j, n) for j in jobs for n in NEEDED])
        for job in jobs:
            self._check(job)

    def _check(self, job: Job) -> None:
        kind = job.resources.accelerator
        if slices.is_tpu(job):
            raise ConfigError(
                "Slurm clusters have no TPUs", got=kind, where=job.name, fix="use --backend gke"
            )
        if kind and kind not in slices.GPUS and not self._get(job, "gpus_per_node"):
            raise ConfigError(
                "How many of these a node has is not known",
                got=kind,
                expected=", ".join(slices.GPUS),
                where=job.name,
                fix="--set gpus_per_node=N",
            )
        if kind and not re.fullmatch(names.WORD, kind):
            raise ConfigError("Not the name of an accelerator", got=repr(kind), where=job.name)
        bad = [k for k in job.env if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", k)]
        if bad:
            raise ConfigError("Not the name of a variable", got=repr(bad[0]), where=job.name)

    def _get(self, job: Job, name: str) -> str:
        return self.settings.get(job, name)

    def files(self, job: Job) -> dict[str, str]:
        """The batch script of the job."""
        return {f"{resource_name(self.plan, job)}.sbatch": self.script(job)}

    def steps(self, job: Job, folder: Path, needs: Mapping[str, str]) -> list[Step]:
        """One `sbatch`; the handles of jobs that must end well first are its dependency."""
        (name,) = self.files(job)
        # singleton: a job that is handed over twice by mistake never runs twice at once.
        ids = sorted({handle for handle in needs.values() if handle})
        parts = [*(["afterok:" + ":".join(ids)] if ids else []), "singleton"]
        command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
        command.append(f"--dependency={','.join(parts)}")
        command.append(f"--output={(folder / f'{file_stem(job.name)}.log').resolve()}")
        directory = job.workdir if job.workdir != "." else self._get(job, "chdir")
        if directory:
            command.append(f"--chdir={directory}")
        return [Step("hand over", (*command, str(folder / name)))]

    def by_hand(self, job: Job) -> list[Step]:
        """How to look at the job."""
        return [Step("look", ("squeue", f"--name={resource_name(self.plan, job)}"))]

    def start(self, job: Job, folder: Path, needs: Mapping[str, str]) -> str:
        """Submits the script; the handle is Slurm's number."""
        (step,) = self.steps(job, folder, needs)
        answer = tools.call(step.command).strip().split(";")[0]
        if not answer.isdecimal():
            raise MachineError("sbatch's answer is not the number of a job", got=answer[:200])
        return answer

    def look(self, job: Job, handle: str) -> Seen:
        """Asks the accounting for the state of the job."""
        if not handle:
            return Seen("absent")
        options = ("--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
        lines = tools.call(("sacct", f"--jobs={handle}", *options)).split("\n")
        found = [line.split("|") for line in lines if line.strip()]
        if not found:
            return Seen("waiting", "for the accounting to know it")
        state, code = found[-1][0].split(" ")[0].rstrip("+"), found[-1][-1].strip()
        return read_state(state, code)

    def proceed(self, job: Job) -> None:
        """Nothing to do: a batch script starts by itself."""

    def release(self, job: Job, folder: Path) -> None:
        """Nothing to do: the nodes of a finished job are free."""

    def removal(self, job: Job, handle: str) -> list[Step]:
        """Cancels the job, if it was handed over."""
        return [Step("remove", ("scancel", handle))] if handle else []

    def log_command(self, job: Job, handle: str) -> tuple[str, ...]:
        """The log is a file."""
        where = Path(self.plan.workdir) / "launch" / self.name / f"{file_stem(job.name)}.log"
        return ("tail", "-n", "50", str(where))

    def script(self, job: Job) -> str:
        """The batch script: options, environment, one process per node, a way to save and go on."""
        lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in self._options(job))]
        lines += ["set -u", *self._environment(job)]
        words = shlex.join(job.command)
        if job.resources.processes > 1:
            # Each task learns its own number; JAX alone would give it one GPU of its node.
            per_task = """bash -c 'export JAX_PROCESS_ID="$SLURM_PROCID"; exec "$@"' task """
            words = per_task + words
        lines += [
            # A task that ends must not take the others with it while they save.
            # The script started without the submitter's variables; the tasks get the script's.
            f"srun --export=ALL --kill-on-bad-exit=0 --wait={self._get(job, 'grace_s')} \\",
            f"  {words} &",
            RUN_AND_REQUEUE,
        ]
        return "\n".join(lines) + "\n"

    def _options(self, job: Job) -> list[str]:
        res = job.resources
        partition = self._get(job, "partition")
        if not res.accelerator:
            partition = self._get(job, "cpu_partition") or partition
        options = [
            f"--job-name={resource_name(self.plan, job)}",
            f"--partition={partition}",
            f"--account={self._get(job, 'account')}",
            f"--nodes={res.processes}",
            "--ntasks-per-node=1",
            # To the script alone: it passes the signal on and waits for the processes to save.
            f"--signal=B:TERM@{self._get(job, 'grace_s')}",
            "--requeue",
            "--open-mode=append",
            "--export=NONE",
        ]
        for name in ("qos", "time"):
            if self._get(job, name):
                options.append(f"--{name}={self._get(job, name)}")
        if res.accelerator:
            count = self._get(job, "gpus_per_node") or str(slices.GPUS[res.accelerator])
            kind = self._get(job, "gres_type") or res.accelerator
            options += [f"--gpus-per-node={kind}:{count}", "--exclusive"]
        if res.cpus:
            options.append(f"--cpus-per-task={res.cpus}")
        if res.memory_gib:
            options.append(f"--mem={res.memory_gib}G")
        return options

    def _environment(self, job: Job) -> list[str]:
        platforms = "cuda,cpu" if job.resources.accelerator else "cpu"
        plain = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": platforms, **job.env}
        lines = [f"export {name}={shlex.quote(value)}" for name, value in plain.items()]
        if self._get(job, "bin"):
            lines.append(f'export PATH={shlex.quote(self._get(job, "bin"))}:"$PATH"')
        if job.resources.processes > 1:
            first, size = PORTS
            lines += [
                'head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
                f"port=$(({first} + SLURM_JOB_ID % {size}))",
                'export JAX_COORDINATOR_ADDRESS="$head:$port"',
                f"export JAX_NUM_PROCESSES={job.resources.processes}",
            ]
        return lines


RUN_AND_REQUEUE = f"""child=$!
# Not to srun, which would kill its tasks: to the tasks themselves.
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
code=0
wait "$child" || code=$?
# A signal ends the first wait; the processes are still saving.
while kill -0 "$child" 2>/dev/null; do
  code=0
  wait "$child" || code=$?
done
if [ "$code" -eq {PREEMPTED} ]; then
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60
fi
exit "$code"
"""


def read_state(state: str, code: str) -> Seen:
    """What a state of Slurm's accounting means.

    Raises:
      MachineError: a state that no manual page lists.
    """
    if state == "COMPLETED":
        return Seen("done")
    for states, word in ((WAITING, "waiting"), (RUNNING, "running"), (LOST, "lost")):
        if state in states:
            return Seen(word, "" if word == "running" else state.lower().replace("_", " "))
    if state in FAILED:
        return Seen("failed", f"{state.lower().replace('_', ' ')}, exit code {code}")
    raise MachineError("A state of a Slurm job is not known", got=state)

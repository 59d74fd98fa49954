# SPDX-License-Identifier: Apache-2.0
"""Cloud TPU VMs: one queued resource per job, a container on each of its hosts, all with gcloud.

Source: the reference of `gcloud compute tpus` and the guide to queued resources.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import ConfigError, MachineError
from flexolmo_jax.jobs import settings as names
from flexolmo_jax.jobs import slices, stamps, tools
from flexolmo_jax.jobs.plan import Job, Plan, file_stem
from flexolmo_jax.jobs.remote import Seen, Step, resource_name
from flexolmo_jax.jobs.settings import Setting

KNOWN = {
    "project": Setting("the cloud project", r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]"),
    "zone": Setting("a zone with the TPUs", r"[a-z]+-[a-z]+[0-9]-[a-z]"),
    "reservation": Setting("reserved, spot or on-demand", "reserved|spot|on-demand"),
    "image": Setting("a container image with this package", names.WORD),
    "cpu_type": Setting("a TPU VM for jobs without TPUs, such as v5litepod-8", names.LABEL),
    "cpu_zone": Setting("the zone of that", r"[a-z]+-[a-z]+[0-9]-[a-z]", ""),
    "runtime_version": Setting("system image of the VMs", names.WORD, ""),
    "network": Setting("a network", names.LABEL, ""),
    "subnetwork": Setting("a subnetwork", names.LABEL, ""),
    "grace_s": Setting("seconds to save in after SIGTERM", names.NUMBER, "120"),
}
NEEDED = ("project", "reservation", "image")
CONTAINER, MARK = "flexolmo", "flexolmo-state"
DIGEST = "flexolmo-digest"
PREEMPTED = 75
# Of a queued resource; Source: the guide to queued resources.
COMING = ("CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES")
GOING = ("DELETING", "SUSPENDING", "SUSPENDED", "FAILED")


class TpuVm:
    """The back end for one plan with its settings.

    Raises:
      ConfigError: settings are missing or of another form, or a job asks for what is not offered.
    """

    name = "tpu-vm"
    queues_itself = False
    keeps_finished = False

    def __init__(self, plan: Plan, jobs: list[Job], *given: Mapping[str, str]):
        self.plan = plan
        self.settings = names.resolve(self.name, KNOWN, plan, *given)
        needed = [(j, n) for j in jobs for n in NEEDED if n != "image" or not j.resources.image]
        needed += [(j, "cpu_type") for j in jobs if not slices.is_tpu(j)]
        needed += [(j, "zone") for j in jobs if not j.resources.zone and not self._cpu_zone(j)]
        names.require(self.name, self.settings, needed)
        for job in jobs:
            self._check(job)

    def _check(self, job: Job) -> None:
        if job.resources.accelerator and not slices.is_tpu(job):
            raise ConfigError(
                "TPU VMs have TPUs only",
                got=job.resources.accelerator,
                where=job.name,
                fix="use --backend slurm for GPUs",
            )
        if not slices.is_tpu(job) and job.resources.processes > 1:
            raise ConfigError("A job without TPUs has one process on TPU VMs", where=job.name)
        if not re.fullmatch(names.WORD, job.resources.image or "x"):
            raise ConfigError(
                "Not the name of an image", got=repr(job.resources.image), where=job.name
            )
        if not re.fullmatch(r"([a-z0-9][a-z0-9.@-]*)?", job.resources.identity):
            raise ConfigError(
                "Not a service account", got=repr(job.resources.identity), where=job.name
            )

    def _get(self, job: Job, name: str) -> str:
        return self.settings.get(job, name)

    def _cpu_zone(self, job: Job) -> str:
        return "" if slices.is_tpu(job) else self._get(job, "cpu_zone")

    def _where(self, job: Job) -> tuple[str, ...]:
        zone = self._cpu_zone(job) or job.resources.zone or self._get(job, "zone")
        return (f"--project={self._get(job, 'project')}", f"--zone={zone}")

    def _queued(self, job: Job, verb: str, *options: str) -> tuple[str, ...]:
        name = resource_name(self.plan, job)
        verbs = ("compute", "tpus", "queued-resources", verb)
        return ("gcloud", *verbs, name, *self._where(job), *options, "--quiet")

    def _nodes(self, job: Job) -> list[str]:
        """Names of the slices' nodes, as the queued resource numbers them."""
        name, count = resource_name(self.plan, job), job.resources.slices
        return [name] if count == 1 else [f"{name}-{i}" for i in range(count)]

    def _ssh(self, job: Job, node: str, remote: str) -> tuple[str, ...]:
        verbs = ("compute", "tpus", "tpu-vm", "ssh")
        options = ("--worker=all", f"--command={remote}", "--quiet")
        return ("gcloud", *verbs, node, *self._where(job), *options)

    def files(self, job: Job) -> dict[str, str]:
        """A script of the same commands, to read or to run by hand."""
        name = resource_name(self.plan, job)
        steps = [*self.steps(job, Path(), {}), *self._later(job), *self.removal(job, "")]
        lines = ["#!/bin/bash", f"# {self.plan.name}: {job.name}", "set -eu"]
        lines.append('case "${1:-}" in')
        verbs: dict[str, list[Step]] = {}
        for step in steps:
            verbs.setdefault(step.what, []).append(step)
        for verb, same in verbs.items():
            commands = [f"  {line}" for s in same for line in tools.wrapped(s.command)]
            lines += [f"{verb})", *commands, "  ;;"]
        lines += [f'*) echo "usage: $0 {"|".join(verbs)}" >&2; exit 2 ;;', "esac"]
        return {f"{name}.sh": "\n".join(lines) + "\n"}

    def steps(self, job: Job, folder: Path, needs: Mapping[str, str]) -> list[Step]:
        """The request for the machines; the container starts once they are there."""
        name, tpu = resource_name(self.plan, job), slices.is_tpu(job)
        kind = slices.vm_type(job) if tpu else self._get(job, "cpu_type")
        options = [f"--accelerator-type={kind}", f"--runtime-version={self._runtime(job, kind)}"]
        if job.resources.slices > 1:
            options += [f"--node-count={job.resources.slices}", f"--node-prefix={name}"]
        else:
            options.append(f"--node-id={name}")
        if job.resources.identity:
            options.append(f"--service-account={self._account(job)}")
            options.append("--scopes=https://www.googleapis.com/auth/cloud-platform")
        reservation = self._get(job, "reservation")
        if reservation != "on-demand":
            options.append(f"--{reservation}")
        for setting in ("network", "subnetwork"):
            if self._get(job, setting):
                options.append(f"--{setting}={self._get(job, setting)}")
        options.append(f"--labels={DIGEST}={label(stamps.hand_over_digest(job))}")
        return [Step("create", self._queued(job, "create", *options, "--async"))]

    def by_hand(self, job: Job) -> list[Step]:
        """Nothing more: the job's script has all commands that follow."""
        return []

    def _later(self, job: Job) -> list[Step]:
        """What follows `create`: look, and start the container on every host."""
        steps = [Step("describe", self._queued(job, "describe", "--format=json"))]
        for what, remote in (("start", self.remote_start(job)), ("state", REMOTE_STATE)):
            steps += [Step(what, self._ssh(job, node, remote)) for node in self._nodes(job)]
        return steps

    def _runtime(self, job: Job, kind: str) -> str:
        if self._get(job, "runtime_version"):
            return self._get(job, "runtime_version")
        if slices.is_tpu(job):
            return slices.family(job).runtime
        types = {tpu.vm_type: tpu.runtime for tpu in slices.TPUS.values() if tpu.vm_type}
        if kind.partition("-")[0] not in types:
            raise ConfigError(
                "Not a type of TPU VM",
                got=kind,
                expected=", ".join(f"{t}-N" for t in types),
                where="cpu_type",
            )
        return types[kind.partition("-")[0]]

    def _account(self, job: Job) -> str:
        name = job.resources.identity
        project = self._get(job, "project")
        return name if "@" in name else f"{name}@{project}.iam.gserviceaccount.com"

    def remote_start(self, job: Job) -> str:
        """The command line that starts the job's container on one host, in place of an old one."""
        image = job.resources.image or self._get(job, "image")
        platforms = "tpu,cpu" if slices.is_tpu(job) else "cpu"
        env = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": platforms, **job.env}
        run = ["sudo", "docker", "run", "--detach", f"--name={CONTAINER}"]
        # The chips are devices of the host, and the hosts of a slice talk over its network.
        run += ["--privileged", "--net=host", f"--stop-timeout={self._get(job, 'grace_s')}"]
        run += [f"--env={name}={value}" for name, value in env.items()]
        if job.workdir != ".":
            run.append(f"--workdir={job.workdir}")
        # The image's own entry point must not take the first word for an argument.
        run += [f"--entrypoint={job.command[0]}", image, *job.command[1:]]
        parts = [f"sudo docker rm --force {CONTAINER} >/dev/null 2>&1", shlex.join(run)]
        host = image.partition("/")[0]
        if host.endswith("docker.pkg.dev"):
            login = ["sudo", "gcloud", "auth", "configure-docker", host, "--quiet"]
            parts.insert(0, shlex.join(login))
        return "; ".join(parts)

    def start(self, job: Job, folder: Path, needs: Mapping[str, str]) -> str:
        """Asks for the machines."""
        for step in self.steps(job, folder, needs):
            tools.call(step.command)
        return resource_name(self.plan, job)

    def look(self, job: Job, handle: str) -> Seen:
        """The state of the request and, once it is granted, of the containers."""
        try:
            text = tools.call(self._queued(job, "describe", "--format=json"))
        except tools.ToolError as error:
            if _is_gone(error):
                return Seen("absent")
            raise
        try:
            seen = read_state(json.loads(text))
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            raise MachineError(
                "gcloud's answer is not a queued resource", got=text[:200]
            ) from error
        digest = stamps.hand_over_digest(job)
        if seen.digest == label(digest):
            seen = dataclasses.replace(seen, digest=digest)
        if seen.status != "ready":
            return seen
        states = [s for node in self._nodes(job) for s in self._containers(job, node)]
        expected = slices.processes(job) if slices.is_tpu(job) else 1
        return read_containers(states, expected, seen.digest)

    def _containers(self, job: Job, node: str) -> list[tuple[str, int]]:
        """State and exit code of the container on each host of a node."""
        text = tools.call(self._ssh(job, node, REMOTE_STATE))
        return [(s, int(c)) for s, c in re.findall(rf"{MARK} ([a-z]+) (\d+)", text)]

    def proceed(self, job: Job) -> None:
        """Starts the container on every host."""
        for node in self._nodes(job):
            tools.call(self._ssh(job, node, self.remote_start(job)))

    def release(self, job: Job, folder: Path) -> None:
        """Keeps the end of the logs and gives the machines back, since they cost until then."""
        for node in self._nodes(job):
            try:
                text = tools.call(self._ssh(job, node, REMOTE_LOG))
            except MachineError as error:
                text = f"the log of {node} could not be read: {error}\n"
            with (folder / f"{file_stem(job.name)}.log").open("a", encoding="utf-8") as log:
                log.write(text)
        try:
            for step in self.removal(job, ""):
                tools.call(step.command)
        except tools.ToolError as error:
            if not _is_gone(error):
                raise

    def removal(self, job: Job, handle: str) -> list[Step]:
        """Deletes the request and its machines."""
        return [Step("delete", self._queued(job, "delete", "--force"))]

    def log_command(self, job: Job, handle: str) -> tuple[str, ...]:
        """The log that `release` kept."""
        where = Path(self.plan.workdir) / "launch" / self.name / f"{file_stem(job.name)}.log"
        return ("tail", "-n", "50", str(where))


REMOTE_STATE = (
    f"sudo docker inspect --format='{MARK} {{{{.State.Status}}}} {{{{.State.ExitCode}}}}' "
    f"{CONTAINER} 2>/dev/null || echo {MARK} absent 0"
)


REMOTE_LOG = f"sudo docker logs --tail 200 {CONTAINER} 2>&1"


def _is_gone(error: tools.ToolError) -> bool:
    """Whether gcloud says that there is no such queued resource."""
    return "NOT_FOUND" in error.text or "not found" in error.text.lower()


def label(digest: str) -> str:
    """A digest as the value of a label, which takes neither colons nor more than 63 letters."""
    return re.sub(r"[^a-z0-9_-]", "-", digest.lower())[:63]


def read_state(resource: dict[str, Any]) -> Seen:
    """What the state of a queued resource means; "ready" once its machines are there.

    Raises:
      MachineError: a state that the guide does not list.
    """
    state = resource["state"]["state"]
    labels = resource["tpu"]["nodeSpec"][0]["node"].get("labels") or {}
    digest = labels.get(DIGEST, "")
    if state == "ACTIVE":
        return Seen("ready", "", digest)
    for states, word in ((COMING, "waiting"), (GOING, "lost")):
        if state in states:
            return Seen(word, state.lower().replace("_", " "), digest)
    raise MachineError("A state of a queued resource is not known", got=state)


def read_containers(states: list[tuple[str, int]], expected: int, digest: str) -> Seen:
    """What the containers of all hosts say together."""
    if len(states) < expected:
        return Seen("waiting", f"for {expected - len(states)} host(s) to answer", digest)
    codes = [code for state, code in states if state in ("exited", "dead")]
    bad = [c for c in codes if c not in (0, PREEMPTED)]
    if bad:
        return Seen("failed", f"exit code {bad[0]}", digest)
    if any(state in ("running", "created", "restarting") for state, _ in states):
        return Seen("running", "", digest)
    if len(codes) == len(states) and not any(codes):
        return Seen("done", "", digest)
    # Nothing started yet, or the processes saved and stopped: (again) from the last checkpoint.
    return Seen("ready", "", digest)

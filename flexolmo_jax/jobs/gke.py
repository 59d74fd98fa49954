# SPDX-License-Identifier: Apache-2.0
"""Google Kubernetes Engine: one JobSet per job, queued by Kueue, asked after with kubectl.

Source: the JobSet API jobset.x-k8s.io/v1alpha2 and GKE's guide to TPU Multislice.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import ConfigError, MachineError
from flexolmo_jax.jobs import settings as names
from flexolmo_jax.jobs import slices, stamps, tools
from flexolmo_jax.jobs.plan import Job, Plan
from flexolmo_jax.jobs.remote import Seen, Step, resource_name
from flexolmo_jax.jobs.settings import Setting

KNOWN = {
    "namespace": Setting("a namespace of the cluster", names.LABEL),
    "queue": Setting("a LocalQueue of Kueue in that namespace", names.LABEL),
    "priority": Setting("a WorkloadPriorityClass of Kueue", names.LABEL),
    "reservation": Setting("the name of a reservation, or spot, or on-demand", names.LABEL),
    "image": Setting("a container image with this package", names.WORD),
    "context": Setting("a context of kubectl", names.WORD, ""),
    "max_restarts": Setting(
        "restarts of a job that fails; preemptions are free", "[0-9]{1,3}", "3"
    ),
    "grace_s": Setting("seconds to save in after SIGTERM", names.NUMBER, "120"),
    "cpus": Setting("cores of a pod without TPUs", names.NUMBER, "8"),
    "memory_gib": Setting("memory of a pod without TPUs, GiB", names.NUMBER, "32"),
}
NEEDED = ("namespace", "queue", "priority", "image")
RESOURCE = "jobsets.jobset.x-k8s.io"
DIGEST = "flexolmo/digest"
# Where the parts of a JobSet find each other: names of its replicated job and its container.
SLICE, CONTAINER = "slice", "job"
COORDINATOR_PORT = 8482
PREEMPTED, REFUSED = 75, (2, 3)


class Gke:
    """The back end for one plan with its settings.

    Raises:
      ConfigError: settings are missing or of another form, a job asks for what GKE does not have,
        or two owners would run under one identity.
    """

    name = "gke"
    queues_itself = False
    keeps_finished = True

    def __init__(self, plan: Plan, jobs: list[Job], *given: Mapping[str, str]):
        self.plan = plan
        self.settings = names.resolve(self.name, KNOWN, plan, *given)
        needed = [(j, n) for j in jobs for n in NEEDED if n != "image" or not j.resources.image]
        needed += [(j, "reservation") for j in jobs if slices.is_tpu(j)]
        names.require(self.name, self.settings, needed)
        for job in jobs:
            self._check(job)
        self._check_identities(jobs)

    def _check(self, job: Job) -> None:
        if job.resources.accelerator and not slices.is_tpu(job):
            raise ConfigError(
                "The GKE back end starts TPU slices and CPU pods only",
                got=job.resources.accelerator,
                where=job.name,
                fix="use --backend slurm for GPUs",
            )
        if slices.is_tpu(job) and job.resources.slices > 1 and slices.hosts(job) == 1:
            raise ConfigError(
                "Several slices need slices of several hosts on GKE",
                got=slices.describe(job),
                where=job.name,
                fix="take a larger topology",
            )
        image = job.resources.image
        if image and not re.fullmatch(names.WORD, image):
            raise ConfigError("Not the name of an image", got=repr(image), where=job.name)

    def _check_identities(self, jobs: list[Job]) -> None:
        """Owners under one service account could read each other's buckets."""
        owners: dict[tuple[str, str, str], str] = {}
        for job in jobs:
            key = (self._get(job, "context"), self._get(job, "namespace"), account(job))
            if account(job) and owners.setdefault(key, job.owner) != job.owner:
                raise ConfigError(
                    "Two owners would run under one service account",
                    got=f"{key[2]} in namespace {key[1]} for {owners[key] or 'nobody'!r} "
                    f"and {job.owner or 'nobody'!r}",
                    where=job.name,
                    fix="give each its own identity, or its own namespace: OWNER.namespace=...",
                )

    def _get(self, job: Job, name: str) -> str:
        return self.settings.get(job, name)

    def _kubectl(self, job: Job, *words: str) -> tuple[str, ...]:
        context = self._get(job, "context")
        prefix = ("kubectl", f"--context={context}") if context else ("kubectl",)
        return (*prefix, words[0], f"--namespace={self._get(job, 'namespace')}", *words[1:])

    def files(self, job: Job) -> dict[str, str]:
        """The manifest of the job."""
        return {f"{resource_name(self.plan, job)}.yaml": to_yaml(self.manifest(job))}

    def steps(self, job: Job, folder: Path, needs: Mapping[str, str]) -> list[Step]:
        """One `kubectl apply`."""
        (name,) = self.files(job)
        apply = self._kubectl(job, "apply", f"--filename={folder / name}")
        return [Step("hand over", apply)]

    def by_hand(self, job: Job) -> list[Step]:
        """How to look at the job."""
        name = resource_name(self.plan, job)
        return [Step("look", self._kubectl(job, "get", RESOURCE, name))]

    def start(self, job: Job, folder: Path, needs: Mapping[str, str]) -> str:
        """Applies the manifest."""
        for step in self.steps(job, folder, needs):
            tools.call(step.command)
        return resource_name(self.plan, job)

    def look(self, job: Job, handle: str) -> Seen:
        """Reads the JobSet's conditions."""
        name = resource_name(self.plan, job)
        options = ("--ignore-not-found", "--output=json")
        text = tools.call(self._kubectl(job, "get", RESOURCE, name, *options))
        if not text.strip():
            return Seen("absent")
        try:
            return read_state(json.loads(text))
        except (ValueError, AttributeError, TypeError) as error:
            raise MachineError("kubectl's answer is not a JobSet", got=text[:200]) from error

    def proceed(self, job: Job) -> None:
        """Nothing to do: pods start by themselves."""

    def release(self, job: Job, folder: Path) -> None:
        """Nothing to do: the nodes of a finished JobSet are free."""

    def removal(self, job: Job, handle: str) -> list[Step]:
        """Deletes the JobSet and waits until its pods are gone."""
        name = resource_name(self.plan, job)
        words = ("delete", RESOURCE, name, "--ignore-not-found", "--wait=true")
        return [Step("remove", self._kubectl(job, *words))]

    def log_command(self, job: Job, handle: str) -> tuple[str, ...]:
        """`kubectl logs` of all pods."""
        name = resource_name(self.plan, job)
        selector = f"--selector=jobset.sigs.k8s.io/jobset-name={name}"
        return self._kubectl(job, "logs", selector, "--prefix", "--tail=50")

    def manifest(self, job: Job) -> dict[str, Any]:
        """The JobSet of a job as plain values."""
        name = resource_name(self.plan, job)
        spread = slices.is_tpu(job) and slices.processes(job) > 1
        # One slice is one node pool; without this, pods of two slices could share one.
        exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {
                "name": name,
                "namespace": self._get(job, "namespace"),
                "labels": {
                    "app.kubernetes.io/managed-by": "flexolmo",
                    "kueue.x-k8s.io/queue-name": self._get(job, "queue"),
                    "kueue.x-k8s.io/priority-class": self._get(job, "priority"),
                },
                "annotations": {
                    "flexolmo/plan": self.plan.name,
                    "flexolmo/job": job.name,
                    DIGEST: stamps.hand_over_digest(job),
                    **(exclusive if spread else {}),
                },
            },
            "spec": {
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "failurePolicy": self._failure_policy(job),
                "replicatedJobs": [
                    {
                        "name": SLICE,
                        "replicas": job.resources.slices,
                        "template": {"spec": self._batch_job(job)},
                    }
                ],
            },
        }

    def _failure_policy(self, job: Job) -> dict[str, Any]:
        codes = "|".join(map(str, REFUSED))
        refused = {
            "name": "refused",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            # A wrong configuration or refused input is as wrong the next time.
            "onJobFailureMessagePatterns": [f"failed with exit code ({codes}) "],
        }
        preempted = {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
        }
        return {
            "maxRestarts": int(self._get(job, "max_restarts")),
            # The old pods are gone before the new ones start: two never write one checkpoint.
            "restartStrategy": "BlockingRecreate",
            "rules": [refused, preempted],
        }

    def _batch_job(self, job: Job) -> dict[str, Any]:
        count = slices.hosts(job) if slices.is_tpu(job) else job.resources.processes
        ours = {"containerName": CONTAINER, "operator": "In"}
        rules = [
            {"action": "FailJob", "onExitCodes": {**ours, "values": [*REFUSED]}},
            {"action": "FailJob", "onExitCodes": {**ours, "values": [PREEMPTED]}},
            {
                "action": "FailJob",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            },
        ]
        return {
            "parallelism": count,
            "completions": count,
            "completionMode": "Indexed",
            # Processes of one step stand and fall together: the JobSet restarts all or none.
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": rules},
            "template": {
                "metadata": {
                    "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
                },
                "spec": self._pod(job),
            },
        }

    def _pod(self, job: Job) -> dict[str, Any]:
        # No host network: there a pod would have the node's identity instead of its own.
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": int(self._get(job, "grace_s")),
            "containers": [self._container(job)],
        }
        if self._nodes(job):
            pod["nodeSelector"] = self._nodes(job)
        if account(job):
            pod["serviceAccountName"] = account(job)
        else:
            # Without an identity of its own a job gets none of the namespace's.
            pod["automountServiceAccountToken"] = False
        if slices.is_tpu(job):
            pod["tolerations"] = [{"key": "google.com/tpu", "operator": "Exists"}]
        return pod

    def _nodes(self, job: Job) -> dict[str, str]:
        """Labels of the nodes that a job may run on."""
        res, where = job.resources, {}
        if res.zone:
            where["topology.kubernetes.io/zone"] = res.zone
        elif res.region:
            where["topology.kubernetes.io/region"] = res.region
        if not slices.is_tpu(job):
            return where
        where["cloud.google.com/gke-tpu-accelerator"] = slices.family(job).label
        where["cloud.google.com/gke-tpu-topology"] = res.topology
        reservation = self._get(job, "reservation")
        if reservation == "spot":
            where["cloud.google.com/gke-spot"] = "true"
        elif reservation != "on-demand":
            where["cloud.google.com/reservation-name"] = reservation
        return where

    def _container(self, job: Job) -> dict[str, Any]:
        container: dict[str, Any] = {
            "name": CONTAINER,
            "image": job.resources.image or self._get(job, "image"),
            "command": [literal(word) for word in job.command],
            "env": self._env(job),
            "resources": self._amounts(job),
        }
        if job.workdir != ".":
            container["workingDir"] = job.workdir
        if slices.processes(job) > 1:
            container["ports"] = [{"containerPort": COORDINATOR_PORT}]
        return container

    def _amounts(self, job: Job) -> dict[str, Any]:
        if slices.is_tpu(job):
            amount = {"google.com/tpu": slices.chips_per_host(job)}
            return {"requests": amount, "limits": dict(amount)}
        cpus = job.resources.cpus or int(self._get(job, "cpus"))
        memory = job.resources.memory_gib or int(self._get(job, "memory_gib"))
        return {
            "requests": {"cpu": cpus, "memory": f"{memory}Gi"},
            "limits": {"memory": f"{memory}Gi"},
        }

    def _env(self, job: Job) -> list[dict[str, Any]]:
        tpu = slices.is_tpu(job)
        # A pod that finds no TPU must fail, not compute on the host.
        platforms = "tpu,cpu" if tpu else "cpu"
        plain = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": platforms, **job.env}
        env: list[dict[str, Any]] = [{"name": k, "value": literal(v)} for k, v in plain.items()]
        count = slices.processes(job)
        if count == 1:
            return env
        name = resource_name(self.plan, job)
        # The first pod of the first slice, by the name that the JobSet's headless service gives it.
        head = f"{name}-{SLICE}-0-0.{name}"
        if job.resources.slices > 1:
            # Each slice numbers its own hosts; JAX reads the rest from what GKE tells TPU pods.
            return [
                *env,
                {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": head},
                {"name": "MEGASCALE_NUM_SLICES", "value": str(job.resources.slices)},
                _from_field("MEGASCALE_SLICE_ID", "labels['jobset.sigs.k8s.io/job-index']"),
            ]
        index = "annotations['batch.kubernetes.io/job-completion-index']"
        return [
            *env,
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{head}:{COORDINATOR_PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(count)},
            _from_field("JAX_PROCESS_ID", index),
        ]


def _from_field(name: str, path: str) -> dict[str, Any]:
    """A variable that gets its value from the metadata of the pod."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.{path}"}}}


def literal(text: str) -> str:
    """A text that Kubernetes leaves alone: it would take $(NAME) for a variable."""
    return text.replace("$", "$$")


def account(job: Job) -> str:
    """The Kubernetes service account of a job: the local part of its identity.

    Raises:
      ConfigError: not a name for one.
    """
    name = job.resources.identity.partition("@")[0]
    if name and not re.fullmatch(names.LABEL, name):
        raise ConfigError(
            "Not the name of a service account",
            got=repr(job.resources.identity),
            expected="lower case, digits and hyphens",
            where=job.name,
        )
    return name


def to_yaml(value: Any) -> str:
    """A manifest as YAML; the writer quotes whatever could be read as something else."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, default_flow_style=False, allow_unicode=False)


def read_state(jobset: dict[str, Any]) -> Seen:
    """What the status of a JobSet means."""
    status = jobset.get("status") or {}
    digest = (jobset.get("metadata", {}).get("annotations") or {}).get(DIGEST, "")
    conditions = {c["type"]: c for c in status.get("conditions") or [] if c["status"] == "True"}
    for kind, word in (("Completed", "done"), ("Failed", "failed")):
        if kind in conditions or status.get("terminalState") == kind:
            return Seen(word, str(conditions.get(kind, {}).get("message", "")), digest)
    restarts = int(status.get("restarts") or 0)
    again = f"{restarts} restart{'s' if restarts > 1 else ''}" if restarts else ""
    parts = status.get("replicatedJobsStatus") or []
    if "Suspended" in conditions or jobset.get("spec", {}).get("suspend"):
        return Seen("waiting", "in the queue" + (f", {again}" if again else ""), digest)
    if parts and all(int(p.get("ready", 0)) + int(p.get("succeeded", 0)) for p in parts):
        return Seen("running", again, digest)
    return Seen("waiting", "for its pods" + (f", {again}" if again else ""), digest)

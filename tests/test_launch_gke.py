# SPDX-License-Identifier: Apache-2.0
"""JobSets for GKE: valid by the published schemas, and true to the job whatever is in it."""

import copy
import json
import re

import jsonschema
import launch_samples as samples
import pytest
import yaml
from launch_facts import FACTS
from launch_samples import GKE, HOSTILE, gke_backend, job, plan_of

from flexolmo_jax.errors import ConfigError, MachineError
from flexolmo_jax.jobs import gke, remote
from flexolmo_jax.jobs.plan import Resources, order

PUBLISHED = json.loads(FACTS.read_text())
JOBSET = PUBLISHED["schemas"]["JobSet"]
# A label, by Kubernetes' rules for names of objects and for values of labels.
NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")


def manifests(plan, **given):
    """Manifests as kubectl reads them."""
    backend = gke_backend(plan, **given)
    texts = [text for j in order(plan) for text in backend.files(j).values()]
    return [yaml.safe_load(text) for text in texts]


def pod_of(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def container_of(manifest):
    return pod_of(manifest)["containers"][0]


def env_of(manifest):
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container_of(manifest)["env"]}


@pytest.mark.parametrize("reference", ["8x7b.py", "two.py", "two.py:on="])
def test_manifests_of_our_plans_are_valid(reference):
    found = manifests(samples.plan_file(reference))
    assert len(found) == len(samples.plan_file(reference).jobs)
    for manifest in found:
        jsonschema.validate(manifest, JOBSET)


def test_every_shape_of_a_job_is_valid():
    found = list(samples.jobsets())
    assert len(found) > 3
    for manifest in found:
        jsonschema.validate(manifest, JOBSET)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurPolicy"), {}),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "failurePolicy", "restartStrategy"), "Restart"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "replicatedJobs", 0, "replicas"), -1),
        (("spec", "replicatedJobs", 0, "template", "spec", "parallelism"), "4"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completion"), 4),
    ],
)
def test_the_schemas_see_a_fault(path, value):
    manifest = copy.deepcopy(samples.jobsets()[0])
    node = manifest
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, JOBSET)


def test_the_queue_of_the_readme_is_valid():
    kinds = [v["kind"] for v in samples.cluster_objects()]
    assert set(kinds) <= set(PUBLISHED["schemas"])
    for value in samples.cluster_objects():
        jsonschema.validate(value, PUBLISHED["schemas"][value["kind"]])


def test_names_and_labels_keep_to_kubernetes_rules(tmp_path):
    names = ["a", "A", "a.b", "a_b", "train:x", "x" * 200, "x" * 199 + "y", "9", "train-x."]
    plan = plan_of(tmp_path, *(job(n) for n in names))
    found = {n: remote.resource_name(plan, j) for n, j in zip(names, plan.jobs, strict=True)}
    assert len(set(found.values())) == len(names)
    for name in found.values():
        # The longest name that is made of it: a pod's.
        assert NAME.fullmatch(f"{name}-{gke.SLICE}-999-9999-abcde"), name
    for manifest in manifests(samples.plan_file("8x7b.py")):
        assert all(LABEL.fullmatch(v) for v in manifest["metadata"]["labels"].values())


def test_hosts_slices_and_chips():
    plan = samples.every_shape("w")
    one, hosts, many, cpu, cpus = manifests(plan)
    batch = [m["spec"]["replicatedJobs"][0] for m in (one, hosts, many, cpu, cpus)]
    assert [b["replicas"] for b in batch] == [1, 1, 3, 1, 1]
    assert [b["template"]["spec"]["parallelism"] for b in batch] == [1, 16, 16, 1, 2]
    assert [b["template"]["spec"]["completions"] for b in batch] == [1, 16, 16, 1, 2]
    assert container_of(many)["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod_of(many)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert [exclusive in m["metadata"]["annotations"] for m in (one, hosts, many, cpu)] == [
        *(False, True, True, False)
    ]
    assert container_of(cpu)["resources"]["requests"] == {"cpu": 4, "memory": "16Gi"}
    assert "nodeSelector" not in pod_of(cpu) and env_of(cpu)["JAX_PLATFORMS"] == "cpu"


def test_processes_find_each_other():
    one, hosts, many, cpu, _ = manifests(samples.every_shape("w"))
    name = hosts["metadata"]["name"]
    found = env_of(hosts)
    assert found["JAX_COORDINATOR_ADDRESS"] == f"{name}-slice-0-0.{name}:8482"
    assert found["JAX_NUM_PROCESSES"] == "16"
    assert "job-completion-index" in found["JAX_PROCESS_ID"]["fieldRef"]["fieldPath"]
    found, name = env_of(many), many["metadata"]["name"]
    assert found["MEGASCALE_COORDINATOR_ADDRESS"] == f"{name}-slice-0-0.{name}"
    assert found["MEGASCALE_NUM_SLICES"] == "3"
    assert "jobset.sigs.k8s.io/job-index" in found["MEGASCALE_SLICE_ID"]["fieldRef"]["fieldPath"]
    # With one of JAX's three alone a process would refuse to start.
    assert not any(name.startswith("JAX_C") or name == "JAX_PROCESS_ID" for name in found)
    for alone in (one, cpu):
        assert not {"JAX_NUM_PROCESSES", "MEGASCALE_NUM_SLICES"} & set(env_of(alone))


def test_saving_restarts_and_gives_up():
    (manifest,) = manifests(plan_of("w", job("a", resources=samples.tpu())), grace_s="300")
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert pod_of(manifest)["terminationGracePeriodSeconds"] == 300
    assert pod_of(manifest)["restartPolicy"] == "Never" and spec["backoffLimit"] == 0
    codes = [r["onExitCodes"]["values"] for r in spec["podFailurePolicy"]["rules"][:2]]
    assert codes == [[2, 3], [75]]
    refused, preempted = manifest["spec"]["failurePolicy"]["rules"]
    assert refused["action"] == "FailJobSet"
    assert preempted["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    said = "Container job for pod ns/x failed with exit code {} matching FailJob rule at index 0"
    (pattern,) = refused["onJobFailureMessagePatterns"]
    found = [bool(re.search(pattern, said.format(code))) for code in (2, 3, 75, 23, 32, 1)]
    assert found == [True, True, False, False, False, False]


def test_an_identity_becomes_a_service_account():
    def pod(identity):
        return pod_of(manifests(plan_of("w", job("a", resources=Resources(identity=identity))))[0])

    assert (
        pod("me@p.iam.gserviceaccount.com")["serviceAccountName"]
        == "me"
        == pod("me")["serviceAccountName"]
    )
    assert pod("")["automountServiceAccountToken"] is False
    assert "hostNetwork" not in pod("me")
    with pytest.raises(ConfigError, match="service account"):
        pod("Not A Name")


def test_two_owners_never_share_a_service_account():
    # Two cloud identities of different projects are one name inside a namespace.
    jobs = [
        job(n, owner=n, resources=Resources(identity=f"trainer@{n}.iam.gserviceaccount.com"))
        for n in ("code", "news")
    ]
    with pytest.raises(ConfigError, match="Two owners would run under one service account"):
        gke_backend(plan_of("w", *jobs))
    apart = gke_backend(plan_of("w", *jobs), **{"code.namespace": "code"})
    assert apart.manifest(jobs[0])["metadata"]["namespace"] == "code"
    assert apart.manifest(jobs[1])["metadata"]["namespace"] == "flexolmo"


def expand(text, known):
    """What Kubernetes makes of a command's word: $(NAME) is a variable, $$ a dollar."""
    return re.sub(
        r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else known.get(m[1], m[0]), text
    )


def test_hostile_texts_arrive_as_they_are():
    words = ("flexolmo", *HOSTILE, *HOSTILE)
    env = {f"V{i}": text for i, text in enumerate(HOSTILE)}
    (manifest,) = manifests(plan_of("w", job("a", *words, env={**env, "touch": "x", "HOME": "y"})))
    jsonschema.validate(manifest, JOBSET)
    container = container_of(manifest)
    known = {"touch pwned": "!", "HOME": "!", "touch": "!", "V1": "!"}
    assert tuple(expand(word, known) for word in container["command"]) == words
    found = {e["name"]: expand(e["value"], known) for e in container["env"]}
    assert {k: found[k] for k in env} == env


@pytest.mark.parametrize("name", sorted(GKE))
@pytest.mark.parametrize(
    "text", ["two words", "$(touch pwned)", "-n", "--x=y", "a\nb", "UPPER!", ""]
)
def test_settings_are_names(name, text):
    plan = plan_of("w", job("a", resources=samples.tpu()))
    with pytest.raises(ConfigError, match=f"setting {name}"):
        gke_backend(plan, **{name: text})


def test_missing_settings_are_named_together():
    plan = plan_of("w", job("a", resources=samples.tpu()), job("b"))
    with pytest.raises(ConfigError) as caught:
        gke.Gke(plan, list(plan.jobs))
    assert all(f"--set {name}=" in str(caught.value) for name in GKE)
    with pytest.raises(ConfigError, match="did you mean 'namespace'"):
        gke_backend(plan, namespce="x")
    with pytest.raises(ConfigError, match="no such owner"):
        gke_backend(plan, **{"who.queue": "x"})
    # A job that computes nothing on TPUs needs no reservation, one with an image no other.
    small = plan_of("w", job("b", resources=Resources(image="i:1")))
    needed = {k: v for k, v in GKE.items() if k not in ("reservation", "image")}
    assert gke.Gke(small, list(small.jobs), needed)


def test_what_gke_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="--backend slurm"):
        gke_backend(plan_of("w", job("a", resources=Resources(accelerator="h100"))))
    with pytest.raises(ConfigError, match="larger topology"):
        gke_backend(plan_of("w", job("a", resources=samples.tpu(slices=2))))
    with pytest.raises(ConfigError, match="name of an image"):
        gke_backend(plan_of("w", job("a", resources=Resources(image="--privileged x"))))


@pytest.mark.parametrize(
    ("status", "word"),
    [
        ({}, "waiting"),
        ({"conditions": [{"type": "Suspended", "status": "True"}]}, "waiting"),
        ({"replicatedJobsStatus": [{"ready": 1}]}, "running"),
        ({"replicatedJobsStatus": [{"ready": 1}, {"ready": 0}]}, "waiting"),
        ({"terminalState": "Completed"}, "done"),
        ({"conditions": [{"type": "Completed", "status": "True"}]}, "done"),
        ({"conditions": [{"type": "Failed", "status": "True", "message": "m"}]}, "failed"),
        ({"conditions": [{"type": "Failed", "status": "False"}]}, "waiting"),
    ],
)
def test_states_of_a_jobset(status, word):
    assert gke.read_state({"metadata": {}, "status": status}).status == word


def test_commands_use_options_that_kubectl_has(tmp_path):
    plan = samples.every_shape(tmp_path)
    backend = gke_backend(plan, context="mine")
    for j in plan.jobs:
        steps = [*backend.steps(j, tmp_path, {}), *backend.by_hand(j), *backend.removal(j, "")]
        for command in [*(s.command for s in steps), backend.log_command(j, "")]:
            verb = next(w for w in command[1:] if not w.startswith("-"))
            used = {w[2:].split("=")[0] for w in command if w.startswith("--")}
            assert used <= set(PUBLISHED["options"][f"kubectl {verb}"]), command


def test_an_answer_that_is_no_jobset_is_named(monkeypatch):
    backend = gke_backend(plan_of("w", job("a")))
    monkeypatch.setattr(gke.tools, "call", lambda command: "Welcome!")
    with pytest.raises(MachineError, match="not a JobSet"):
        backend.look(job("a"), "")

# SPDX-License-Identifier: Apache-2.0
"""Scripts for Slurm and TPU VMs: run by bash with programs that note their arguments."""

import json
import os
import re
import subprocess
import sys

import launch_samples as samples
import pytest
from launch_facts import FACTS
from launch_samples import HOSTILE, SLURM, TPU_VM, job, plan_of

from flexolmo_jax.errors import ConfigError, MachineError
from flexolmo_jax.jobs import slices, slurm, tools, tpu_vm
from flexolmo_jax.jobs.plan import Resources, order

PUBLISHED = json.loads(FACTS.read_text())
# Notes its arguments, one JSON list per call, and what of its environment a test asks for.
NOTE = """#!{python} -SI
import json, os, sys
names = {names!r}
seen = {{k: os.environ[k] for k in names if k in os.environ}}
with open({log!r}, "a") as log:
    log.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], seen]) + "\\n")
{then}
"""
NODES = "node[07-08]"
ENVIRONMENT = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": NODES, "SLURM_PROCID": "1"}
# What srun does as far as these scripts are concerned: its options end, the program starts.
SRUN = """
words = sys.argv[1:]
while words and words[0].startswith("--"):
    del words[0]
os.execvp(words[0], words)
"""


def programs(tmp_path, then, names=()):
    """A folder of programs; `then` is name to what each does after noting its call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "calls"
    for name, code in then.items():
        path = folder / name
        values = {"python": sys.executable, "names": list(names), "log": str(log), "then": code}
        path.write_text(NOTE.format(**values))
        path.chmod(0o755)
    return folder, log


def noted(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def slurm_backend(plan, **given):
    return slurm.Slurm(plan, list(order(plan)), {**SLURM, **given})


def tpu_backend(plan, **given):
    return tpu_vm.TpuVm(plan, list(order(plan)), {**TPU_VM, **given})


def run_batch(tmp_path, job_, then, names=(), **given):
    """Runs a job's batch script; returns its exit code and the calls that it made."""
    backend = slurm_backend(plan_of(tmp_path, job_), **given)
    (text,) = backend.files(job_).values()
    script = tmp_path / "script"
    script.write_text(text)
    tools_ = {"srun": SRUN, "scontrol": "print('node07\\nnode08')", "scancel": "", "sleep": ""}
    folder, log = programs(tmp_path, {**tools_, **then}, names)
    env = {**ENVIRONMENT, "PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run(["bash", str(script)], env=env, cwd=tmp_path, timeout=60)
    return done.returncode, noted(log)


def test_a_batch_script_gives_the_job_its_words(tmp_path):
    words = ("flexolmo", *HOSTILE)
    env = {f"V{i}": text for i, text in enumerate(HOSTILE)}
    j = job("a", *words, env=env, resources=Resources(accelerator="h100", processes=2))
    code, calls = run_batch(
        tmp_path, j, {"flexolmo": ""}, (*env, "JAX_PROCESS_ID", "JAX_NUM_PROCESSES")
    )
    assert code == 0
    (seen,) = [c for c in calls if c[0] == "flexolmo"]
    assert tuple(seen[1]) == HOSTILE
    assert {k: seen[2][k] for k in env} == env
    assert (seen[2]["JAX_PROCESS_ID"], seen[2]["JAX_NUM_PROCESSES"]) == ("1", "2")
    assert not (tmp_path / "pwned").exists()


def test_the_coordinator_is_the_first_host(tmp_path):
    j = job("a", "flexolmo", resources=Resources(accelerator="h100", processes=2))
    _, calls = run_batch(tmp_path, j, {"flexolmo": ""}, ("JAX_COORDINATOR_ADDRESS",))
    found = next(c[2] for c in calls if c[0] == "flexolmo")
    assert found == {"JAX_COORDINATOR_ADDRESS": f"node07:{61440 + 4242 % 4096}"}
    assert ["scontrol", ["show", "hostnames", NODES], {}] in [[c[0], c[1], {}] for c in calls]


@pytest.mark.parametrize("code", [0, 1, 3, 75])
def test_only_a_job_that_saved_goes_back_into_the_queue(tmp_path, code):
    ended, calls = run_batch(tmp_path, job("a", "flexolmo"), {"flexolmo": f"sys.exit({code})"})
    assert ended == code
    requeued = [c[1] for c in calls if c[0] == "scontrol"]
    assert requeued == ([["requeue", "4242"]] if code == 75 else [])


def test_a_signal_reaches_the_tasks_and_the_script_waits(tmp_path):
    # The job tells the script's shell to stop, as Slurm does, and saves until it gets its own
    # signal: from the program that stands for scancel.
    saves = (
        "import signal, time\n"
        "open('pid', 'w').write(str(os.getpid()))\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(75)))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )
    stop = "import signal\nos.kill(int(open('pid').read()), signal.SIGTERM)"
    code, calls = run_batch(tmp_path, job("a", "flexolmo"), {"flexolmo": saves, "scancel": stop})
    assert code == 75
    assert ["scancel", ["--signal=TERM", "4242.0"]] in [c[:2] for c in calls]
    assert ["scontrol", ["requeue", "4242"]] in [c[:2] for c in calls]


def used(words):
    """Names of long options in a list of words."""
    return {w[2:].split("=")[0] for w in words if re.match(r"--[a-z]", w)}


def test_options_are_those_of_slurms_manual(tmp_path):
    resources = Resources(accelerator="h100", processes=2, cpus=8, memory_gib=64)
    plan = plan_of(tmp_path, job("a", resources=resources), job("b", needs=("a",), workdir="x"))
    given = {"qos": "high", "time": "2-00:00:00", "cpu_partition": "cpu", "bin": "/opt/my venv/bin"}
    backend = slurm_backend(plan, **given)
    options = PUBLISHED["options"]
    for j in plan.jobs:
        (text,) = backend.files(j).values()
        lines = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
        (step,) = backend.steps(j, tmp_path, {"a": "7"} if j.needs else {})
        assert used([*lines, *step.command]) <= set(options["sbatch"])
        srun = next(line for line in text.splitlines() if line.startswith("srun"))
        assert used(srun.split()) <= set(options["srun"])
        assert used(backend.by_hand(j)[0].command) <= set(options["squeue"])
    assert "--dependency=afterok:7,singleton" in step.command
    assert "#SBATCH --partition=cpu\n" in backend.script(plan.jobs[1])
    for wanted in ("--gpus-per-node=h100:8", "--nodes=2", "--signal=B:TERM@120", "--requeue"):
        assert f"#SBATCH {wanted}\n" in backend.script(plan.jobs[0])


def test_states_are_those_of_slurms_page():
    ours = {"COMPLETED", *slurm.WAITING, *slurm.RUNNING, *slurm.LOST, *slurm.FAILED}
    assert ours == set(PUBLISHED["slurm_states"])
    with pytest.raises(MachineError, match="not known"):
        slurm.read_state("HAPPY", "0:0")


@pytest.mark.parametrize("name", ["partition", "account", "time", "bin"])
@pytest.mark.parametrize("text", ["-x", "--uid=0", "a\n#SBATCH --uid=0", "", "\tx"])
def test_settings_of_slurm_are_words(name, text):
    with pytest.raises(ConfigError, match=f"setting {name}"):
        slurm_backend(plan_of("w", job("a")), **{name: text})


def test_what_slurm_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="--backend gke"):
        slurm_backend(plan_of("w", job("a", resources=samples.tpu())))
    odd = plan_of("w", job("a", resources=Resources(accelerator="mi300x")))
    with pytest.raises(ConfigError, match="gpus_per_node"):
        slurm_backend(odd)
    assert "--gpus-per-node=mi300x:4" in slurm_backend(odd, gpus_per_node="4").script(odd.jobs[0])
    with pytest.raises(ConfigError, match="name of a variable"):
        slurm_backend(plan_of("w", job("a", env={"A B": "x"})))
    with pytest.raises(ConfigError, match=r"--set partition=\.\.\. --set account="):
        slurm.Slurm(odd, list(odd.jobs))


def test_a_tpu_vm_gives_the_container_the_jobs_words(tmp_path):
    words = ("flexolmo", *HOSTILE)
    env = {f"V{i}": text for i, text in enumerate(HOSTILE)}
    j = job("a", *words, env=env, resources=samples.tpu())
    remote = tpu_backend(plan_of(tmp_path, j)).remote_start(j)
    folder, log = programs(tmp_path, {"sudo": ""})
    # What ssh does at the far end: it gives the whole text to a shell.
    path = {"PATH": f"{folder}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", remote], env=path, cwd=tmp_path, timeout=60, check=True)
    login, removed, run = (c[1] for c in noted(log))
    assert login == ["gcloud", "auth", "configure-docker", "us-docker.pkg.dev", "--quiet"]
    assert removed == ["docker", "rm", "--force", "flexolmo"]
    image = run.index(TPU_VM["image"])
    assert tuple(run[image + 1 :]) == HOSTILE
    assert run[image - 1] == "--entrypoint=flexolmo"
    assert [f"--env={k}={v}" for k, v in env.items()] == run[:image][-len(env) - 1 : -1]
    assert not (tmp_path / "pwned").exists()


def test_the_script_of_a_tpu_vm_is_the_launchers_commands(tmp_path):
    j = job("a", "flexolmo", *HOSTILE, resources=samples.tpu("4x4x4", slices=2, identity="me"))
    backend = tpu_backend(plan_of(tmp_path, j))
    ((name, text),) = backend.files(j).items()
    (tmp_path / name).write_text(text)
    folder, log = programs(tmp_path, {"gcloud": ""})
    path = {"PATH": f"{folder}:/usr/bin:/bin"}
    for verb in ("create", "start", "delete"):
        subprocess.run(["bash", name, verb], env=path, cwd=tmp_path, timeout=60, check=True)
    assert (
        subprocess.run(["bash", name], env=path, cwd=tmp_path, capture_output=True).returncode == 2
    )
    create, first, second, delete = (("gcloud", *c[1]) for c in noted(log))
    assert create == backend.steps(j, tmp_path, {})[0].command
    assert delete == backend.removal(j, "")[0].command
    assert f"--command={backend.remote_start(j)}" in first
    assert [words[5] for words in (first, second)] == [f"{create[5]}-0", f"{create[5]}-1"]
    assert "--service-account=me@example-project.iam.gserviceaccount.com" in create
    assert {"--accelerator-type=v5p-128", "--node-count=2", "--reserved"} <= set(create)


def test_options_are_those_of_gcloud(tmp_path):
    plan = samples.every_shape(tmp_path)
    plan = plan_of(tmp_path, *(j for j in plan.jobs if slices.is_tpu(j)), job("cpu"))
    for reservation in ("reserved", "spot", "on-demand"):
        backend = tpu_backend(plan, reservation=reservation, network="n", subnetwork="s")
        for j in plan.jobs:
            steps = [*backend.steps(j, tmp_path, {}), *backend._later(j), *backend.removal(j, "")]
            for command in (s.command for s in steps):
                known = PUBLISHED["options"][" ".join(command[:5])]
                assert used(command) <= set(known), command


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ([("absent", 0), ("absent", 0)], "ready"),
        ([("running", 0), ("running", 0)], "running"),
        ([("running", 0), ("exited", 75)], "running"),
        ([("exited", 75), ("exited", 75)], "ready"),
        ([("exited", 0), ("exited", 75)], "ready"),
        ([("exited", 0), ("exited", 0)], "done"),
        ([("exited", 0), ("exited", 3)], "failed"),
        ([("running", 0), ("exited", 1)], "failed"),
        ([("running", 0)], "waiting"),
        ([("absent", 0), ("running", 0)], "running"),
    ],
)
def test_containers_of_all_hosts_count(states, status):
    assert tpu_vm.read_containers(states, 2, "").status == status


def test_what_tpu_vms_cannot_run_is_refused():
    for resources, words in (
        (Resources(accelerator="h100"), "--backend slurm"),
        (Resources(accelerator="tpu7x", topology="2x2x1"), "--backend gke"),
        (Resources(processes=2), "one process"),
        (samples.tpu(identity="not a name"), "service account"),
        (samples.tpu(image="-x y"), "name of an image"),
    ):
        j = job("a", resources=resources)
        with pytest.raises(ConfigError, match=words):
            tpu_backend(plan_of("w", j)).steps(j, samples.ROOT, {})
    with pytest.raises(ConfigError, match="cpu_type"):
        j = job("a")
        tpu_backend(plan_of("w", j), cpu_type="n2-standard-8").steps(j, samples.ROOT, {})
    with pytest.raises(ConfigError) as caught:
        tpu_vm.TpuVm(plan_of("w", job("a")), [job("a")])
    assert all(f"--set {n}=" in str(caught.value) for n in TPU_VM)


def test_absent_programs_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("kubectl", "gcloud", "sbatch"):
        with pytest.raises(MachineError, match=f"not installed. Got: {name}"):
            tools.call((name, "--version"))


def test_a_wrapped_command_is_one_command(tmp_path):
    folder, log = programs(tmp_path, {"say": ""})
    words = ["say", "--config", "x" * 90, *HOSTILE, "--flag", "--other=1", "y" * 90]
    path = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": os.getcwd()}
    text = "\n".join(tools.wrapped(words))
    subprocess.run(["bash", "-c", text], env=path, cwd=tmp_path, timeout=60, check=True)
    assert noted(log)[0][1] == words[1:]

# SPDX-License-Identifier: Apache-2.0
"""A launch from start to end on back ends that only seem to be there: tests/fake_programs.py."""

import dataclasses
import re
import shlex
import subprocess

import fake_programs
import pytest
from launch_samples import GKE, SLURM, TPU_VM, job, plan_of, tpu
from test_launch_scripts import slurm_backend

from flexolmo_jax.errors import ConfigError, MachineError
from flexolmo_jax.jobs import changed, gke, remote, slurm, tpu_vm
from flexolmo_jax.jobs.plan import Resources, order

CLASSES = {
    "gke": (gke.Gke, GKE, Resources()),
    "tpu-vm": (tpu_vm.TpuVm, TPU_VM, tpu()),
    "slurm": (slurm.Slurm, SLURM, Resources()),
}
VM_DONE = {"machines": ["ACTIVE"], "containers": ["exited 0"]}
VM_FAILED = {"machines": ["ACTIVE"], "containers": ["exited 3"]}
DONE = {"gke": ["queued", "running", "done"], "slurm": ["PENDING", "RUNNING", "COMPLETED"]}
DONE["tpu-vm"] = {
    "machines": ["ACCEPTED", "WAITING_FOR_RESOURCES", "ACTIVE"],
    "containers": ["running 0", "exited 0"],
}
FAILED = {"gke": ["running", "failed"], "slurm": ["RUNNING", "FAILED|3:0"], "tpu-vm": VM_FAILED}


@pytest.fixture(params=sorted(CLASSES))
def kind(request):
    return request.param


def the_plan(tmp_path, kind, *names_and_needs):
    resources = CLASSES[kind][2]
    jobs = [job(n, needs=tuple(needs.split()), resources=resources) for n, needs in names_and_needs]
    return plan_of(tmp_path / "w", *jobs)


def launch(plan, kind, lines=None, wait=True, jobs=None):
    """One launch; returns job name to status."""
    make, given, _ = CLASSES[kind]
    jobs = list(order(plan)) if jobs is None else jobs
    say = (lambda line: None) if lines is None else lines.append
    run = remote.Launch(plan, make(plan, jobs, given), jobs, wait=wait, poll_s=0, report=say)
    return {r.name: r.status for r in run.run()}


DIAMOND = (("a", ""), ("b", "a"), ("c", ""), ("d", "b c"))


def started(folder, kind):
    """Names of jobs in the order in which they were handed over."""
    if kind == "gke":
        files = [c[-1] for c in fake_programs.calls(folder, "kubectl") if c[1] == "apply"]
    elif kind == "slurm":
        files = [c[-1] for c in fake_programs.calls(folder, "sbatch")]
    else:
        files = [c[5] for c in fake_programs.calls(folder, "gcloud") if c[4] == "create"]
    return [f.rpartition("flexolmo-p-")[2].partition(".")[0] for f in files]


def test_a_plan_runs_in_order_and_a_rerun_does_nothing(monkeypatch, tmp_path, kind):
    plays = dict.fromkeys("abcd", DONE[kind])
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", plays)
    plan = the_plan(tmp_path, kind, *DIAMOND)
    lines = []
    assert set(launch(plan, kind, lines).values()) == {"done"}
    first = started(folder, kind)
    assert sorted(first) == ["a", "b", "c", "d"]
    assert first.index("a") < first.index("b") < first.index("d") == 3
    assert any("b: waits for other jobs: a" in line for line in lines) == (kind != "slurm")
    assert lines[-1].startswith("[ 4/4] d: done")
    before = len(fake_programs.calls(folder))
    assert set(launch(plan, kind).values()) == {"skipped"}
    assert len(fake_programs.calls(folder)) == before


def test_the_programs_are_called_as_processes(monkeypatch, tmp_path, kind):
    play = VM_DONE if kind == "tpu-vm" else DONE[kind][-1:]
    folder = fake_programs.install(monkeypatch, tmp_path / "bin", {"a": play})
    plan = the_plan(tmp_path, kind, ("a", ""))
    assert launch(plan, kind) == {"a": "done"}
    assert started(folder, kind) == ["a"]
    assert {c[0] for c in fake_programs.calls(folder)} <= set(fake_programs.PROGRAMS)


def test_a_failure_stops_what_needs_it_and_a_rerun_goes_on(monkeypatch, tmp_path, kind):
    plays = {**dict.fromkeys("abcd", DONE[kind]), "a": FAILED[kind]}
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", plays)
    plan = the_plan(tmp_path, kind, *DIAMOND)
    lines = []
    found = launch(plan, kind, lines)
    assert found == {"a": "failed", "b": "blocked", "c": "done", "d": "blocked"}
    assert any("a: its output: " in line for line in lines)
    if kind == "slurm":
        # They stood in Slurm's queue and were taken out.
        assert len(fake_programs.calls(folder, "scancel")) == 2
    # A back end that keeps a failed job shows it once more.
    again = {"gke": ["failed", *DONE["gke"]], "slurm": ["FAILED|3:0", *DONE["slurm"]]}
    plays = {**dict.fromkeys("abcd", DONE[kind]), "a": again.get(kind, DONE["tpu-vm"])}
    fake_programs.set_plays(folder, plays)
    count = len(started(folder, kind))
    found = launch(plan, kind)
    assert found == {"a": "done", "b": "done", "c": "skipped", "d": "done"}
    assert started(folder, kind)[count:] == ["a", "b", "d"]


def test_a_launcher_that_died_goes_on_where_it_was(monkeypatch, tmp_path, kind):
    plays = {"a": DONE[kind], "b": DONE[kind]}
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", plays)
    plan = the_plan(tmp_path, kind, ("a", ""), ("b", "a"))
    first = launch(plan, kind, wait=False)
    assert first == {"a": "waiting", "b": "waiting" if kind == "slurm" else "needs"}
    again = len(started(folder, kind))
    assert set(launch(plan, kind).values()) == {"done"}
    # What ran already was taken over, not started again.
    assert started(folder, kind)[again:] == ([] if kind == "slurm" else ["b"])


def test_a_job_that_changed_runs_again_but_not_beside_itself(monkeypatch, tmp_path, kind):
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", {"a": DONE[kind]})
    plan = the_plan(tmp_path, kind, ("a", ""))
    launch(plan, kind, wait=False)
    changed = dataclasses.replace(plan.jobs[0], command=("flexolmo", "verify", "other"))
    other = dataclasses.replace(plan, jobs=(changed,))
    before = started(folder, kind)
    with pytest.raises(ConfigError, match="under way in another version") as caught:
        launch(other, kind)
    assert started(folder, kind) == before
    # The message has the command that stops it.
    stop = {"gke": "kubectl delete", "slurm": "scancel 101", "tpu-vm": "queued-resources delete"}
    assert stop[kind] in str(caught.value)
    assert launch(plan, kind) == {"a": "done"}
    assert launch(other, kind) == {"a": "done"}
    assert len(started(folder, kind)) == len(before) + 1


def chain(tmp_path, kind, **changes):
    """A training, its package, and two that need them; `changes` are the commands of some."""
    bucket = "gs://mine" if kind != "slurm" else str(tmp_path / "mine")
    resources = dataclasses.replace(CLASSES[kind][2], bucket=bucket)
    run, out = f"{bucket}/runs/a", f"{bucket}/slices/a"
    fields = {
        "a": {"outputs": (f"{run}/final",), "state": (run,)},
        "b": {"outputs": (out,), "needs": ("a",)},
        "c": {"needs": ("b",)},
        "d": {"outputs": (f"{bucket}/other",)},
    }
    jobs = [job(n, *changes.get(n, ()), resources=resources, **f) for n, f in fields.items()]
    return plan_of(tmp_path / "w", *jobs)


# Broken once: the job was started again, and died of its own output.
def test_a_finished_job_that_changed_is_refused_until_its_output_is_gone(
    monkeypatch, tmp_path, kind
):
    plays = dict.fromkeys("abcd", DONE[kind])
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", plays)
    assert set(launch(chain(tmp_path, kind), kind).values()) == {"done"}
    before = started(folder, kind)
    other = chain(tmp_path, kind, a=("flexolmo", "train", "another"))
    with pytest.raises(ConfigError, match=r"have changed.*Got: a, b, c\.") as caught:
        launch(other, kind)
    assert started(folder, kind) == before
    bucket = other.jobs[0].resources.bucket
    remove = "rm -r --" if kind == "slurm" else "gcloud storage rm --recursive"
    assert f"(`{remove} {bucket}/runs/a {bucket}/slices/a && " in str(caught.value)
    assert str(caught.value).count("kubectl delete") == (3 if kind == "gke" else 0)
    records = [str(tmp_path / "w" / "launch" / kind / f"{n}.json") for n in "abc"]
    assert f" && {shlex.join(['rm', '-f', '--', *records])}`" in str(caught.value)
    # The plan as it was is done; after the commands of the message it all starts again.
    assert set(launch(chain(tmp_path, kind), kind).values()) == {"skipped"}
    for words in re.search(r"done \(`(.*)`\)", str(caught.value))[1].split(" && "):
        argv = shlex.split(words)
        if argv[0] == "kubectl":
            fake_programs._save(folder, {**fake_programs._load(folder), "there": {}})
        elif argv[:2] == ["rm", "-f"]:
            subprocess.run(argv, check=True)
    fake_programs.set_plays(folder, plays)
    assert launch(other, kind) == {"a": "done", "b": "done", "c": "done", "d": "skipped"}
    assert started(folder, kind)[len(before) :] == ["a", "b", "c"]


def test_a_changed_job_whose_record_is_lost_is_refused_too(monkeypatch, tmp_path):
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", {n: ["done"] for n in "abcd"})
    launch(chain(tmp_path, "gke"), "gke")
    before = started(folder, "gke")
    (tmp_path / "w" / "launch" / "gke" / "d.json").unlink()
    with pytest.raises(
        ConfigError, match=r"have changed.*Got: d\..*rm --recursive gs://mine/other"
    ):
        launch(chain(tmp_path, "gke", d=("flexolmo", "verify", "another")), "gke")
    assert started(folder, "gke") == before


def test_a_score_that_changed_runs_again(monkeypatch, tmp_path, kind):
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", dict.fromkeys("abcd", DONE[kind]))
    launch(chain(tmp_path, kind), kind)
    before = started(folder, kind)
    found = launch(chain(tmp_path, kind, c=("flexolmo", "eval", "another")), kind)
    assert found == {"a": "skipped", "b": "skipped", "c": "done", "d": "skipped"}
    assert started(folder, kind)[len(before) :] == ["c"]


def test_what_is_removed_of_each_kind_of_storage():
    wrote = job(
        "a", outputs=("s3://x/run/final", "s3://y/z", "gs://x/a b", "there"), state=("s3://x/run",)
    )
    assert changed.removal([wrote]) == [
        ("gcloud", "storage", "rm", "--recursive", "gs://x/a b"),
        ("aws", "s3", "rm", "--recursive", "s3://x/run"),
        ("aws", "s3", "rm", "--recursive", "s3://y/z"),
        ("rm", "-r", "--", "there"),
    ]


def test_a_job_that_moved_is_not_started_twice(monkeypatch, tmp_path):
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", {"a": ["running"]})
    plan = the_plan(tmp_path, "gke", ("a", ""))
    launch(plan, "gke", wait=False)
    # In another cluster or zone nobody knows the job.
    state = fake_programs._load(folder)
    fake_programs._save(folder, {**state, "there": {}})
    moved = dataclasses.replace(plan.jobs[0], resources=Resources(zone="us-east5-a"))
    other = dataclasses.replace(plan, jobs=(moved,))
    with pytest.raises(ConfigError, match="handed over elsewhere"):
        launch(other, "gke")
    assert started(folder, "gke") == ["a"]


def test_a_finished_job_that_moved_is_finished(monkeypatch, tmp_path, kind):
    fake_programs.here(monkeypatch, tmp_path / "bin", {"a": DONE[kind]})
    plan = the_plan(tmp_path, kind, ("a", ""))
    launch(plan, kind)
    resources = dataclasses.replace(plan.jobs[0].resources, zone="us-west4-a")
    moved = dataclasses.replace(plan.jobs[0], resources=resources)
    monkeypatch.setattr("flexolmo_jax.__version__", "99.0")
    assert launch(dataclasses.replace(plan, jobs=(moved,)), kind) == {"a": "skipped"}


def test_slices_that_are_taken_away_are_asked_for_again(monkeypatch, tmp_path):
    plays = {"machines": ["ACTIVE", "ACTIVE", "SUSPENDED", "ACCEPTED", "ACTIVE"]}
    plays["containers"] = ["running 0", "running 0", "exited 75", "running 0", "exited 0"]
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", {"a": plays})
    plan, lines = the_plan(tmp_path, "tpu-vm", ("a", "")), []
    assert launch(plan, "tpu-vm", lines) == {"a": "done"}
    verbs = [c[4] for c in fake_programs.calls(folder, "gcloud")]
    assert verbs.count("create") == 2 and verbs.count("delete") == 2
    assert verbs[-1] == "delete"
    runs = [c for c in fake_programs.calls(folder, "gcloud") if "docker run" in shlex.join(c)]
    # At first, on the new machines, and after a process had saved and stopped.
    assert len(runs) == 3
    assert any("taken away (suspended)" in line for line in lines)
    log = tmp_path / "w" / "launch" / "tpu-vm" / "a.log"
    assert "the last line of" in log.read_text()


def test_machines_are_given_back_even_if_the_launcher_died_before(monkeypatch, tmp_path):
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", {"a": VM_DONE})
    plan = the_plan(tmp_path, "tpu-vm", ("a", ""))

    def dies(self, job_, folder_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tpu_vm.TpuVm, "release", dies)
        with pytest.raises(KeyboardInterrupt):
            launch(plan, "tpu-vm")
    assert not [c for c in fake_programs.calls(folder) if "delete" in c]
    assert launch(plan, "tpu-vm") == {"a": "skipped"}
    assert len([c for c in fake_programs.calls(folder) if "delete" in c]) == 1
    assert launch(plan, "tpu-vm") == {"a": "skipped"}
    assert len([c for c in fake_programs.calls(folder) if "delete" in c]) == 1


def test_a_restart_of_a_jobset_is_said(monkeypatch, tmp_path):
    fake_programs.here(monkeypatch, tmp_path / "bin", {"a": ["restarted", "done"]})
    lines = []
    launch(the_plan(tmp_path, "gke", ("a", "")), "gke", lines)
    assert any("runs: 2 restarts" in line for line in lines)


def test_slurm_gets_the_order_at_once(monkeypatch, tmp_path):
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", {n: [""] for n in "abcd"})
    found = launch(the_plan(tmp_path, "slurm", *DIAMOND), "slurm", wait=False)
    assert set(found.values()) == {"waiting"}
    options = [c[3] for c in fake_programs.calls(folder, "sbatch")]
    numbers = dict(zip(started(folder, "slurm"), range(101, 105), strict=True))
    expected = f"--dependency=afterok:{numbers['b']}:{numbers['c']},singleton"
    assert options[numbers["d"] - 101] == expected
    assert options[numbers["a"] - 101] == "--dependency=singleton"


def test_what_a_queue_took_out_is_blocked_not_failed(monkeypatch, tmp_path):
    # Slurm cancels b in the moment in which a fails; a was looked at before.
    plays = {"a": ["RUNNING", "RUNNING", "FAILED|1:0"], "b": ["CANCELLED by 0"]}
    fake_programs.here(monkeypatch, tmp_path / "bin", plays)
    found = launch(the_plan(tmp_path, "slurm", ("a", ""), ("b", "a")), "slurm")
    assert found == {"a": "failed", "b": "blocked"}


def test_a_control_plane_may_be_away_for_a_while(monkeypatch, tmp_path):
    fake_programs.install(
        monkeypatch, tmp_path / "bin", {"a": ["running", "error", "error", "done"]}
    )
    plan, lines = the_plan(tmp_path, "gke", ("a", "")), []
    assert launch(plan, "gke", lines) == {"a": "done"}
    assert sum("will ask again" in line for line in lines) == 2
    fake_programs.here(monkeypatch, tmp_path / "gone", {"b": ["running", "error"]})
    with pytest.raises(MachineError, match=r"exit code 1: Unable to connect"):
        launch(the_plan(tmp_path, "gke", ("b", "")), "gke")


def test_a_program_that_is_absent_is_named(monkeypatch, tmp_path, kind):
    fake_programs.install(monkeypatch, tmp_path / "bin", programs=())
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    program = {"gke": "kubectl", "tpu-vm": "gcloud", "slurm": "sbatch"}[kind]
    with pytest.raises(MachineError, match=program):
        launch(the_plan(tmp_path, kind, ("a", "")), kind)


def test_jobs_of_others_are_taken_as_done(monkeypatch, tmp_path, kind):
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", {"b": DONE[kind]})
    plan = the_plan(tmp_path, kind, ("a", ""), ("b", "a"))
    assert launch(plan, kind, jobs=[plan.jobs[1]]) == {"b": "done"}
    assert started(folder, kind) == ["b"]


def test_a_torn_record_is_no_record(monkeypatch, tmp_path):
    folder = fake_programs.here(monkeypatch, tmp_path / "bin", {"a": ["done"]})
    plan = the_plan(tmp_path, "gke", ("a", ""))
    launch(plan, "gke")
    record = tmp_path / "w" / "launch" / "gke" / "a.json"
    for text in ("{", "[]", '{"digest": 1}'):
        record.write_text(text)
        assert launch(plan, "gke") == {"a": "done"}
    # The cluster still knew it: nothing was applied twice.
    assert started(folder, "gke") == ["a"]


def test_answers_that_are_no_answers(monkeypatch, tmp_path):
    backend = slurm_backend(plan_of(tmp_path, job("a")))
    monkeypatch.setattr(slurm.tools, "call", lambda command: "Welcome to the cluster!\n")
    with pytest.raises(MachineError, match="not the number of a job"):
        backend.start(job("a"), tmp_path, {})

# SPDX-License-Identifier: Apache-2.0
"""Jobs of several processes, as on the hosts of a pod: through the launcher, over loopback.

An anchor trains on two processes; two owners train beside it at the same time, one of them is
killed on the way and finds its newest checkpoint damaged; the slices are stitched here, on one
process and another mesh. A second anchor on four processes, whose model axis crosses them, is
told to stop and goes on here. All of it ends with the bits of runs that one process made alone.
"""

import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from flexolmo_jax import mesh, run_checkpoints, train, training_job, tree
from flexolmo_jax.config import (
    DataConfig,
    ExecConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    RouterInitConfig,
    RunConfig,
    SourceConfig,
)
from flexolmo_jax.errors import CheckpointError
from flexolmo_jax.experts import package, stitch
from flexolmo_jax.jobs import local
from flexolmo_jax.jobs.plan import Job, Plan, Resources
from flexolmo_jax.run_checkpoints import RunCheckpoints
from flexolmo_jax.tasks import runner

# One file for every configuration: the launcher starts what a user would type.
EXPERIMENT = """
import json, pathlib
def get_config(arg):
    return json.loads(pathlib.Path(arg).read_text())
"""
STEPS, EVERY = 24, 4
# Sums over devices are added up in another order between processes than inside one: after these
# steps that is 1.0e-6 of a leaf's largest value.
ORDER = 1e-5


def run_config(texts, stage, grid, **changes) -> RunConfig:
    """A small job on a mesh of this shape (data, expert, model)."""
    public = SourceConfig(str(texts.public), 0.5, public=True)
    own = SourceConfig(str(texts.own), 0.5)
    fields = {
        "stage": stage,
        "data": DataConfig(
            sources=(public,) if stage == "anchor" else (own, public),
            heldout=(SourceConfig(str(texts.own)),),
            seq_len=16,
            batch_rows=8,
        ),
        "optim": OptimConfig(peak_lr=3e-3, total_steps=STEPS, warmup_steps=2),
        "exec": ExecConfig(
            compute_dtype="float32", mesh_data=grid[0], mesh_expert=grid[1], mesh_model=grid[2]
        ),
        "router_init": RouterInitConfig(method="hidden_mean", documents=8, norm=1.0),
        "checkpoint_every": EVERY,
        "eval_every": STEPS // 2,
        "eval_rows": 8,
        "log_every": 1,
    }
    if stage == "anchor":
        fields["tokenizer"] = str(texts.tokenizer)
        fields["model"] = ModelConfig(
            vocab_size=texts.vocab_size,
            d_model=16,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            d_head=8,
            d_ffn=32,
            max_len=32,
            router=RouterConfig(context="document"),
        )
    return RunConfig(**{**fields, **changes})


def train_job(root: Path, name: str, config: RunConfig, processes: int, devices: int) -> Job:
    """`flexolmo train` on several processes with some fake devices each."""
    (root / "experiment.py").write_text(EXPERIMENT)
    written = root / f"{name}.json"
    written.write_text(json.dumps(dataclasses.asdict(config)))
    workdir = root / "runs" / name
    reference = f"{root / 'experiment.py'}:{written}"
    return Job(
        name=name,
        command=(
            *(sys.executable, "-m", "flexolmo_jax", "train"),
            *("--config", reference, "--workdir", str(workdir)),
        ),
        outputs=(str(workdir / "final"),),
        state=(str(workdir),),
        workdir=str(root / "runs"),
        env={"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        resources=Resources(processes=processes),
        owner=config.expert_id,
    )


def run_plan(plan: Plan, each=lambda event: None) -> dict[str, local.JobResult]:
    """Runs a plan with two jobs at once; gives up after minutes rather than never."""

    def report(event):
        assert event.elapsed_s < 400, "a job hangs"
        each(event)

    results = local.run(plan, max_parallel=2, report=report)
    return {r.name: r for r in results}


def environment_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def process_of(root: Path, name: str, index: int) -> int | None:
    """The running process of this number of a job, or None."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text().split("\0")
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) != os.getpid() or str(root / "runs" / name) not in command:
                continue
            if environment_of(int(folder.name)).get("JAX_PROCESS_ID") == str(index):
                return int(folder.name)
        except (OSError, IndexError):
            continue  # it has just ended
    return None


def saved_steps(root: Path, name: str) -> list[int]:
    found = (root / "runs" / name / "checkpoints").glob("*/digests.json")
    return sorted(int(p.parent.name) for p in found if p.parent.name.isdigit())


def signal_once(root: Path, name: str, index: int, number: signal.Signals):
    """A watcher that signals one process of a job once its second checkpoint is there."""
    sent = []

    def watch(_event):
        if not sent and saved_steps(root, name)[-1:] >= [2 * EVERY]:
            sent.append(process_of(root, name, index))
            os.kill(sent[0], number)

    return watch


def final_params(workdir: Path) -> dict[str, np.ndarray]:
    return tree.flatten(package.read_params(package.read_final(workdir)))


def alone(config: RunConfig, workdir: Path, devices: int, monkeypatch) -> dict[str, np.ndarray]:
    """What this one process makes of a configuration with so many devices."""
    some = functools.partial(mesh.make_mesh, devices=jax.devices()[:devices])
    with monkeypatch.context() as patch:
        patch.setattr(training_job.mesh, "make_mesh", some)
        train.fit(config, workdir)
    return final_params(workdir)


def assert_close(got, want):
    assert set(got) == set(want)
    for name, leaf in want.items():
        scale = float(np.abs(leaf).max())
        np.testing.assert_allclose(got[name], leaf, rtol=0, atol=ORDER * scale, err_msg=name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The runs that the tests look at."""
    root = tmp_path_factory.mktemp("hosts")
    texts = toy.texts(root)
    (root / "runs").mkdir()
    narrow = run_config(texts, "anchor", (4, 1, 1))
    wide = run_config(texts, "anchor", (2, 1, 4))
    first = Plan(
        "anchors",
        str(root),
        (train_job(root, "narrow", narrow, 2, 2), train_job(root, "wide", wide, 4, 2)),
    )
    results = run_plan(first, signal_once(root, "wide", 2, signal.SIGTERM))
    package.package(root / "runs" / "narrow", root / "anchor")

    # The owners' texts are equal, so that whoever trains undisturbed shows what the other missed.
    owners = {}
    for owner in ("bay", "cape"):
        shutil.copytree(texts.own, root / "closed" / owner)
        owned = dataclasses.replace(texts, own=root / "closed" / owner)
        owners[owner] = run_config(
            owned, "expert", (2, 1, 2), anchor=str(root / "anchor"), expert_id=owner
        )
    jobs = tuple(train_job(root, owner, c, 2, 2) for owner, c in owners.items())
    closed = {owner: (str(root / "closed" / owner),) for owner in owners}
    second = Plan("owners", str(root), jobs, closed=closed)
    seen = {}
    kill = signal_once(root, "bay", 1, signal.SIGKILL)

    def watch(event):
        kill(event)
        for owner in owners:
            pid = process_of(root, owner, 0)
            if pid and owner not in seen:
                seen[owner] = environment_of(pid)

    cut = run_plan(second, watch)
    left = saved_steps(root, "bay")
    newest = root / "runs/bay/checkpoints" / str(left[-1]) / "state"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    again = run_plan(second)
    return types.SimpleNamespace(
        root=root,
        texts=texts,
        configs={"narrow": narrow, "wide": wide, **owners},
        results={**results, **{f"{n}, cut": r for n, r in cut.items()}, **again},
        environments=seen,
        steps_left=left,
    )


def test_processes_that_end_well_make_a_job_that_is_done(world):
    assert world.results["narrow"].status == "done"
    logs = [world.root / "jobs" / name for name in ("narrow.log", "narrow.1.log")]
    said = [log.read_text() for log in logs]
    assert "process 0 of 2, 2 devices here, 4 in all" in said[0]
    # One voice: the others log warnings alone.
    assert f"step {STEPS}/{STEPS}" in said[0] and "step" not in said[1]


# Broken once by giving every process the first rows of each batch.
def test_two_processes_train_as_one_does(world, monkeypatch):
    config, workdir = world.configs["narrow"], world.root / "runs" / "narrow"
    want = alone(config, world.root / "alone", 4, monkeypatch)
    assert_close(final_params(workdir), want)
    mine, theirs = (
        [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
        for w in (world.root / "alone", workdir)
    )
    assert [m["step"] for m in mine] == [m["step"] for m in theirs]
    for one, other in zip(mine, theirs, strict=True):
        for key in {"loss", "heldout"} & set(one):
            assert other[key] == pytest.approx(one[key], rel=ORDER), one["step"]


def test_four_processes_told_to_stop_go_on_as_one_on_another_mesh(world, monkeypatch):
    assert (world.results["wide"].status, world.results["wide"].exit_code) == ("preempted", 75)
    steps = saved_steps(world.root, "wide")
    assert 2 * EVERY <= steps[-1] < STEPS
    exec_config = dataclasses.replace(
        world.configs["wide"].exec, mesh_data=8, mesh_expert=1, mesh_model=1
    )
    config = dataclasses.replace(world.configs["wide"], exec=exec_config)
    got = alone(config, world.root / "runs" / "wide", 8, monkeypatch)
    assert_close(got, final_params(world.root / "runs" / "narrow"))


def test_a_killed_process_fails_the_job_which_goes_on_to_the_same_bits(world):
    cut = world.results["bay, cut"]
    assert (cut.status, cut.exit_code) == ("failed", -signal.SIGKILL)
    assert cut.log.endswith("bay.1.log")
    assert world.results["cape, cut"].status == "done"
    assert world.steps_left[-1] < STEPS
    assert (world.results["bay"].status, world.results["cape"].status) == ("done", "skipped")
    bay, cape = (tree.digests(final_params(world.root / "runs" / n)) for n in ("bay", "cape"))
    assert bay == cape


# Broken once by letting each process take the newest step that it sees: the run failed.
def test_all_processes_pass_over_a_damaged_checkpoint(world):
    text = (world.root / "jobs" / "bay.log").read_text()
    assert f"damaged checkpoint passed over: [file-digest] {world.steps_left[-1]}/state" in text
    assert f"resumed at step {world.steps_left[-2]}" in text
    assert (world.root / "runs/bay/checkpoints" / f"damaged-{world.steps_left[-1]}").is_dir()


def test_an_expert_of_two_processes_is_that_of_one(world, monkeypatch):
    want = alone(world.configs["cape"], world.root / "cape-alone", 4, monkeypatch)
    assert_close(final_params(world.root / "runs" / "cape"), want)


def test_owners_at_the_same_time_see_nothing_of_each_other(world):
    bay, cape = (world.environments[owner] for owner in ("bay", "cape"))
    assert bay["JAX_COORDINATOR_ADDRESS"] != cape["JAX_COORDINATOR_ADDRESS"]
    assert not [k for k, v in bay.items() if "cape" in v]
    assert not [k for k, v in cape.items() if "bay" in v]
    for owner, other in (("bay", "cape"), ("cape", "bay")):
        found = [p for p in (world.root / "runs" / owner).rglob("*") if p.is_file()]
        assert not [p for p in found if f"closed/{other}".encode() in p.read_bytes()]


def test_their_slices_are_stitched_here_and_evaluated_on_another_mesh(world):
    root = world.root
    slices = [root / "slices" / owner for owner in ("bay", "cape")]
    for path in slices:
        package.package(root / "runs" / path.name, path)
    stitch.execute(stitch.plan(root / "anchor", slices, active=2), root / "model")
    shutil.copytree(world.texts.own, root / "data/own/heldout")
    score = functools.partial(runner.evaluate, root / "model", ["bpb"], data=root / "data")
    before = runner.evaluate(root / "anchor", ["bpb"], data=root / "data", n_rows=8)
    command = (sys.executable, "-m", "flexolmo_jax", "eval", "--model", str(root / "model"))
    command += ("--data", str(root / "data"), "--rows", "8", "--json", str(root / "bpb.json"))
    env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    job = Job("eval", command, env=env, resources=Resources(processes=2), workdir=str(root))
    (result,) = run_plan(Plan("eval", str(root), (job,))).values()
    assert result.status == "done", Path(result.log).read_text()
    two = json.loads((root / "bpb.json").read_text())["bpb"]["own"]["value"]
    whole = score(n_rows=8)["bpb"]["own"]["value"]
    spread = score(n_rows=8, grid=mesh.make_mesh(4, 1, 2))["bpb"]["own"]["value"]
    assert spread == pytest.approx(whole, rel=ORDER)
    assert two == pytest.approx(whole, rel=ORDER)
    assert whole < before["bpb"]["own"]["value"]


# --- what processes do when one of them fails

FAIL = """
import sys
from flexolmo_jax import distributed
from flexolmo_jax.errors import DataError

try:
    with distributed.session() as first:
        distributed.from_first(lambda: "ready", "the start")
        if sys.argv[1] == "alone" and not first:
            raise DataError("A shard is torn")
        if sys.argv[1] == "alone":
            distributed.from_first(lambda: "never", "waiting")
        with distributed.together("reading"):
            if not first:
                raise DataError("A shard is torn")
except DataError as error:
    print(error)
    sys.exit(error.exit_code)
"""


# Broken once by leaving the processes to JAX (they aborted each other), and by telling nobody.
@pytest.mark.parametrize("how", ["alone", "together"])
def test_a_fault_of_one_process_ends_all_of_them_soon(tmp_path, how):
    resources = Resources(processes=2)
    env = {"JAX_PLATFORMS": "cpu"}
    command = (sys.executable, "-c", FAIL, how)
    job = Job("faulty", command, env=env, resources=resources, workdir=str(tmp_path))
    plan = Plan("p", str(tmp_path), (job,))
    (result,) = run_plan(plan).values()
    assert (result.status, result.exit_code) == ("failed", 3)
    assert "A shard is torn" in Path(result.log).read_text()
    if how == "together":
        assert "Process 1 of this run failed at reading" in local.log_path(plan, job).read_text()


def test_every_process_says_why_a_configuration_cannot_run(tmp_path):
    config = run_config(toy.texts(tmp_path), "anchor", (4, 1, 1))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_rows=6))
    (tmp_path / "runs").mkdir()
    job = train_job(tmp_path, "odd", config, 2, 2)
    plan = Plan("odd", str(tmp_path), (job,))
    (result,) = run_plan(plan).values()
    assert (result.status, result.exit_code) == ("failed", 2)
    for index in range(2):
        said = local.log_path(plan, job, index).read_text()
        assert "The batch does not divide over devices" in said


CHECKPOINTS = """
import sys
import jax, numpy as np
from flexolmo_jax import distributed, mesh
from flexolmo_jax.run_checkpoints import RunCheckpoints
from jax.sharding import NamedSharding, PartitionSpec

with distributed.session():
    grid = mesh.make_mesh(2, 1, 2)
    where = NamedSharding(grid, PartitionSpec("data", "model"))
    like = {"w": jax.ShapeDtypeStruct((8, 6), np.float32, sharding=where)}
    with RunCheckpoints(sys.argv[1]) as run:
        state, meta = run.restore(1, like)
        # The buffer is given away while it is being written.
        step = jax.jit(lambda w: 2 * w, donate_argnums=0)
        run.save(2, state, meta)
        state = {"w": step(state["w"])}
        run.save(3, state, {"made": "by two"})
"""


# Broken once by leaving the checksum out of what is compared: the last restore passed.
def test_checkpoints_move_between_one_process_and_several(tmp_path):
    w = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    folder = tmp_path / "checkpoints"
    with RunCheckpoints(folder, keep=3) as run:
        run.save(1, {"w": w}, {"made": "by one"})
    command = (sys.executable, "-c", CHECKPOINTS, str(folder))
    env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    job = Job("c", command, env=env, resources=Resources(processes=2), workdir=str(tmp_path))
    (result,) = run_plan(Plan("p", str(tmp_path), (job,))).values()
    assert result.status == "done", Path(result.log).read_text()
    with RunCheckpoints(folder, keep=3) as run:
        assert run.steps() == [2, 3]  # they kept two
        for step, want, made in ((2, w, "one"), (3, 2 * w, "two")):
            state, meta = run.restore(step, {"w": w})
            np.testing.assert_array_equal(state["w"], want)
            assert meta == {"made": f"by {made}"}
        digests = run_checkpoints._read_digests(folder / "3")
        assert digests["leaves"]["w"]["digest"] is None
        digests["leaves"]["w"]["checksum"] = "0" * 16
        run_checkpoints._save_digests(folder / "3", digests)
        assert run.check(3) == []
        with pytest.raises(CheckpointError, match="differs from what was saved"):
            run.restore(3, {"w": w})

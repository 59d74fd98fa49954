# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damage import KINDS, damaged

from flexolmo_jax import files, run_checkpoints
from flexolmo_jax import tree as trees
from flexolmo_jax.checkpoint import restore_tree, save_tree
from flexolmo_jax.errors import CheckpointError, ConfigError, MachineError
from flexolmo_jax.run_checkpoints import RunCheckpoints

P = jax.sharding.PartitionSpec


def some_tree(seed=0):
    rng = np.random.default_rng(seed)
    odd = rng.integers(0, 2**32, (5, 7), dtype=np.uint32).view(np.float32)  # NaNs, subnormals
    return {
        "a": {"b": rng.standard_normal((8, 3)).astype(np.float32), "odd": odd},
        "half": jnp.asarray(rng.standard_normal((4, 6)), jnp.bfloat16),
        "step": np.asarray(7, np.int32),
        "key": jax.random.key_data(jax.random.key(seed)),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def same(a, b):
    return trees.digests(a) == trees.digests(b)


# ---------------------------------------------------------------- trees


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    tree = some_tree()
    save_tree(tmp_path / "t", tree)
    restored = restore_tree(tmp_path / "t", abstract(tree))
    assert same(restored, tree)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(restored))
    (only,) = restore_tree(tmp_path / "t", abstract(tree), only=["a/b"]).items()
    assert only[0] == "a/b"
    np.testing.assert_array_equal(only[1], tree["a"]["b"])


def test_any_pytree_keeps_its_structure(tmp_path):
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros((2,))}
    state = optax.adamw(1e-3).init(params)
    save_tree(tmp_path / "t", state)
    restored = restore_tree(tmp_path / "t", abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_equal_trees_give_equal_files_without_a_trace_of_the_machine(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = {"w": np.arange(64, dtype=np.float32).reshape(8, 8)}
    sharded = jax.device_put(tree, jax.sharding.NamedSharding(mesh, P("x")))
    save_tree(tmp_path / "one", tree)
    save_tree(tmp_path / "two", sharded)
    one, two = (
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()}
        for d in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert not any(str(tmp_path).encode() in content for content in one.values())


def test_restore_places_leaves_by_their_sharding(tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tree = {"w": np.arange(64, dtype=np.float32).reshape(8, 8), "v": np.ones((4,), np.float32)}
    save_tree(tmp_path / "t", tree)
    want = jax.sharding.NamedSharding(mesh, P("y", "x"))
    target = abstract(tree) | {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=want)}
    restored = restore_tree(tmp_path / "t", target)
    assert restored["w"].sharding.is_equivalent_to(want, 2)
    assert isinstance(restored["v"], np.ndarray)
    assert same(restored, tree)


def test_every_leaf_that_does_not_fit_is_listed_at_once(tmp_path):
    save_tree(tmp_path / "t", {"a": np.ones(3), "b": np.ones(3), "c": np.ones(3), "d": np.ones(3)})
    target = {"a": np.ones(3), "b": np.ones(4), "c": np.ones(3, np.float32), "e": np.ones(3)}
    with pytest.raises(CheckpointError) as error:
        restore_tree(tmp_path / "t", target)
    for code, leaf in (
        ("leaf-shape", "b"),
        ("leaf-dtype", "c"),
        ("leaf-extra", "d"),
        ("leaf-missing", "e"),
    ):
        assert f"[{code}] :{leaf}:" in str(error.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "int32"])
def test_restore_never_casts(tmp_path, dtype):
    save_tree(tmp_path / "t", {"w": np.full((2,), 1.2346, np.float32)})
    with pytest.raises(CheckpointError, match="leaf-dtype"):
        restore_tree(tmp_path / "t", {"w": jax.ShapeDtypeStruct((2,), jnp.dtype(dtype))})


def test_a_link_inside_is_refused(tmp_path):
    for name in ("mine", "other"):
        save_tree(tmp_path / name, {"w": np.ones((2, 2), np.float32)})
    (tmp_path / "mine" / "w" / "0.0").unlink()
    (tmp_path / "mine" / "w" / "0.0").symlink_to(tmp_path / "other" / "w" / "0.0")
    with pytest.raises(CheckpointError, match="symlink"):
        restore_tree(tmp_path / "mine", {"w": np.ones((2, 2), np.float32)})


@pytest.mark.parametrize("what", ["nothing", "file", "empty", "garbage"])
def test_what_is_no_checkpoint_is_refused(tmp_path, what):
    path = tmp_path / "t"
    if what == "file":
        path.write_text("x")
    elif what == "empty":
        path.mkdir()
    elif what == "garbage":
        save_tree(path, {"w": np.ones(2)})
        (path / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError):
        restore_tree(path, {"w": np.ones(2)})


def test_names_that_would_collide_or_leave_the_folder_are_refused(tmp_path):
    for tree in ({"../x": np.ones(1)}, {"a.b": np.ones(1)}, {"": np.ones(1)}):
        with pytest.raises(CheckpointError):
            save_tree(tmp_path / "t", tree)
    with pytest.raises(CheckpointError, match="typed key"):
        save_tree(tmp_path / "t", {"k": jax.random.key(0)})
    save_tree(tmp_path / "t", {"w": np.ones(1)})
    with pytest.raises(CheckpointError, match="exists"):
        save_tree(tmp_path / "t", {"w": np.ones(1)})


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), files.atomic_directory(tmp_path / "d") as work:
        (work / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with files.atomic_directory(tmp_path / "d") as work:
        (work / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    with pytest.raises(ConfigError, match="exists"), files.atomic_directory(tmp_path / "d"):
        pass


# ---------------------------------------------------------------- training runs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with steps 2 and 3, and the states that they hold."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    states = {step: some_tree(step) for step in (1, 2, 3)}
    with RunCheckpoints(folder, keep=2) as run:
        for step, state in states.items():
            assert run.save(step, state, {"step": step, "iterator": {"at": [step, 2]}})
    return folder, states


def copy_of(folder, tmp_path):
    target = tmp_path / "checkpoints"
    subprocess.run(["cp", "-r", str(folder), str(target)], check=True)
    return target


def test_a_run_restores_what_it_saved(saved):
    folder, states = saved
    run = RunCheckpoints(folder)
    assert run.steps() == [2, 3]
    assert run.latest_step() == 3
    for step in (2, 3):
        state, meta = run.restore(step, abstract(states[step]))
        assert same(state, states[step])
        assert meta == {"step": step, "iterator": {"at": [step, 2]}}
    restored = run.restore_latest(abstract(states[3]))
    assert (restored.step, restored.skipped) == (3, ())
    assert RunCheckpoints(folder / "none").restore_latest({}) is None


# Broken once by a look at the chosen step that forgot what it had found.
def test_the_files_of_the_newest_step_are_hashed_once(saved, monkeypatch):
    folder, states = saved
    hashed = []

    def check(root, expected, **options):
        hashed.append(root.name)
        return files.check_files(root, expected, **options)

    monkeypatch.setattr(run_checkpoints, "check_files", check)
    restored = RunCheckpoints(folder).restore_latest(abstract(states[3]))
    assert restored is not None and same(restored.state, states[3])
    assert hashed == ["3"]


def test_every_kind_of_damage_to_a_run_checkpoint_is_found_and_named(saved):
    folder, _ = saved
    run = RunCheckpoints(folder)
    rng = np.random.default_rng(0)
    assert run.check(3) == []
    for trial in range(600):
        with damaged(folder / "3", rng, KINDS[trial % len(KINDS)]) as (kind, touched):
            problems = run.check(3)
            assert problems, (kind, touched)
            named = {p.path.removeprefix("3/") for p in problems}
            assert named & touched, (kind, touched, problems)
    assert run.check(3) == []


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(saved, tmp_path):
    folder, states = saved
    folder = copy_of(folder, tmp_path)
    victim = next(p for p in (folder / "3" / "state").rglob("*") if p.stat().st_size > 100)
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=str(victim.relative_to(folder / "3"))):
        RunCheckpoints(folder).restore(3, abstract(states[3]))
    with RunCheckpoints(folder) as run:
        restored = run.restore_latest(abstract(states[2]))
        assert restored.step == 2
        assert same(restored.state, states[2])
        assert [p.path for p in restored.skipped] == [str(victim.relative_to(folder))]
        assert (folder / "damaged-3").is_dir()
        assert run.save(3, states[3], {"again": True})
        run.wait()
        assert run.restore(3, abstract(states[3]))[1] == {"again": True}


def test_with_every_checkpoint_damaged_nothing_is_restored(saved, tmp_path):
    folder, states = saved
    folder = copy_of(folder, tmp_path)
    for step in ("2", "3"):
        (folder / step / "meta" / "metadata").unlink()
    with pytest.raises(CheckpointError, match="Every checkpoint"):
        RunCheckpoints(folder).restore_latest(abstract(states[2]))
    assert (folder / "3").is_dir()


def test_a_state_of_another_shape_is_an_error_and_no_reason_for_an_older_step(saved, tmp_path):
    folder, states = saved
    folder = copy_of(folder, tmp_path)
    target = abstract(states[3]) | {"step": jax.ShapeDtypeStruct((), np.int16)}
    with pytest.raises(CheckpointError, match="leaf-dtype"):
        RunCheckpoints(folder).restore_latest(target)
    assert RunCheckpoints(folder).steps() == [2, 3]


def test_a_step_without_digests_is_never_considered(saved, tmp_path):
    folder, states = saved
    folder = copy_of(folder, tmp_path)
    (folder / "3" / "digests.json").unlink()
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    (folder / "5").mkdir()
    run = RunCheckpoints(folder)
    assert run.latest_step() == 2
    assert run.restore_latest(abstract(states[2])).step == 2
    assert run.save(3, states[3], {})
    assert run.save(5, states[3], {})
    run.close()
    assert run.steps() == [3, 5]


def test_digests_are_inside_before_the_step_gets_its_name(tmp_path, monkeypatch):
    seen = []
    original = run_checkpoints._save_digests
    monkeypatch.setattr(
        run_checkpoints,
        "_save_digests",
        lambda d, *a, **k: (seen.append(d.name), original(d, *a, **k)),
    )
    with RunCheckpoints(tmp_path) as run:
        run.save(1, {"w": np.ones(2)}, {})
    assert seen[0].startswith("1.orbax-checkpoint-tmp")


def test_retention_keeps_the_newest_and_the_permanent_ones(tmp_path):
    with RunCheckpoints(tmp_path, every=2, keep=2, keep_period=4) as run:
        assert [s for s in range(1, 7) if run.due(s)] == [2, 4, 6]
        for step in range(1, 11):
            assert run.save(step, {"w": np.full((2,), step)}, {})
            assert not run.save(step, {"w": np.zeros((2,))}, {})
    assert run.steps() == [4, 8, 9, 10]
    assert run.restore(9, {"w": np.zeros((2,), np.int64)})[0]["w"].tolist() == [9, 9]


def test_a_kill_while_sealing_or_deleting_leaves_whole_steps_only(tmp_path, monkeypatch):
    """Every moment between two changes on disk, found by stopping at each of them in turn."""
    moments = 0
    for stop_at in range(1, 60):
        folder, left = tmp_path / str(stop_at), [stop_at]

        def counted(original, left=left):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            return call

        run = RunCheckpoints(folder, keep=1)
        run.save(1, {"w": np.ones(2)}, {})
        run.wait()
        run.save(2, {"w": np.ones(2)}, {})
        run._manager.wait_until_finished()
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "rmdir", "fsync"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                run.wait()
            except KeyboardInterrupt:
                moments += 1
        again = RunCheckpoints(folder, keep=1)
        assert 2 in again.steps()
        named = {int(p.name) for p in folder.iterdir() if p.name.isdigit()}
        assert named == set(again.steps())
        assert [p for step in again.steps() for p in again.check(step)] == []
        assert again.save(3, {"w": np.ones(2)}, {})
        again.close()
        assert again.steps() == [3]
        run._manager.close()
        run._pool.shutdown()
        if left[0] > 0:
            break
    assert moments >= 5


def test_nothing_old_is_deleted_before_the_new_step_is_complete(tmp_path, monkeypatch):
    with RunCheckpoints(tmp_path, keep=1) as run:
        run.save(1, {"w": np.ones(2)}, {})
        run.wait()
        monkeypatch.setattr(run_checkpoints, "hash_files", fail_with(OSError(28, "disk full")))
        run.save(2, {"w": np.ones(2)}, {})
        with pytest.raises(MachineError):
            run.wait()
        assert run.steps() == [1]


def fail_with(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


# Broken once by taking it for a disk that is full.
@pytest.mark.parametrize("reads", ["to_host", "placed.checksums"])
def test_a_device_that_fails_is_not_the_disks_fault(tmp_path, monkeypatch, reads):
    with RunCheckpoints(tmp_path) as run:
        with monkeypatch.context() as patch:
            fault = fail_with(RuntimeError("INTERNAL: device fault"))
            patch.setattr(f"flexolmo_jax.run_checkpoints.{reads}", fault)
            with pytest.raises(RuntimeError, match="device fault"):
                run.save(1, {"w": jnp.ones(2)}, {})
        assert run.save(1, {"w": jnp.ones(2)}, {})
    assert run.steps() == [1]


@pytest.mark.parametrize("raised_by", ["save", "wait", "close"])
def test_a_failed_save_is_raised_once_and_the_next_save_works(
    tmp_path, monkeypatch, caplog, raised_by
):
    run = RunCheckpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run_checkpoints, "hash_files", fail_with(OSError(28, "disk full")))
        run.save(1, {"w": np.ones(2)}, {})
        with pytest.raises(MachineError, match="disk full"):
            run.save(2, {"w": np.ones(2)}, {}) if raised_by == "save" else getattr(run, raised_by)()
    assert not caplog.records  # the error is raised, so it is not also logged with a traceback
    assert run.latest_step() is None
    assert run.save(2, {"w": np.ones(2)}, {})
    run.close()
    assert run.steps() == [2]
    assert run.check(2) == []


def test_what_the_caller_does_after_save_changes_nothing(tmp_path, monkeypatch):
    """Buffers that are donated or written over while the save is still under way."""
    describe = run_checkpoints._describe
    monkeypatch.setattr(run_checkpoints, "_describe", lambda *x: (time.sleep(0.2), describe(*x))[1])
    mine = np.zeros((512, 512), np.float32)
    device = jnp.full((512, 512), 3.0)
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    with RunCheckpoints(tmp_path) as run:
        run.save(1, {"mine": mine, "device": device}, {})
        mine[:] = 9
        for _ in range(5):
            device = advance(device)
        run.wait()
        state, _ = run.restore(1, {"mine": mine, "device": device})
    assert (state["mine"] == 0).all()
    assert (np.asarray(state["device"]) == 3).all()


def test_sharded_state_is_restored_onto_another_mesh(tmp_path):
    auto = jax.sharding.AxisType.Auto
    eight = jax.make_mesh((8,), ("x",), axis_types=(auto,))
    two = jax.make_mesh((4, 2), ("x", "y"), axis_types=(auto, auto))
    w = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    state = {"w": jax.device_put(w, jax.sharding.NamedSharding(eight, P("x")))}
    with RunCheckpoints(tmp_path) as run:
        run.save(1, state, {})
        run.wait()
        target = jax.sharding.NamedSharding(two, P("y", "x"))
        abstract_state = {"w": jax.ShapeDtypeStruct((16, 8), np.float32, sharding=target)}
        restored, _ = run.restore(1, abstract_state)
    assert restored["w"].sharding.is_equivalent_to(target, 2)
    assert same(restored, {"w": w})


def test_a_leaf_changed_together_with_its_files_is_still_found(saved, tmp_path):
    """The second digest: of the values in memory, not of the files."""
    folder, states = saved
    folder = copy_of(folder, tmp_path)
    digests = run_checkpoints._read_digests(folder / "3")
    digests["leaves"]["a/b"]["digest"] = "sha256:" + "0" * 64
    run_checkpoints._save_digests(folder / "3", digests)
    run = RunCheckpoints(folder)
    assert run.check(3) == []
    with pytest.raises(CheckpointError, match="a/b"):
        run.restore(3, abstract(states[3]))


def test_wrong_options_are_refused(tmp_path):
    for options in ({"every": 0}, {"keep": 0}, {"keep_period": -1}):
        with pytest.raises(ConfigError):
            RunCheckpoints(tmp_path, **options)


def test_kill_9_at_random_instants_loses_no_acknowledged_step(tmp_path):
    script = Path(__file__).with_name("kill_saves.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    trials = int(os.environ.get("FLEXOLMO_TEST_KILLS", "12"))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(trials), "0"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == trials
    for result in results:
        assert result["problems"] == [], done.stderr
        assert result["exact"], (result, done.stderr)
        assert result["step"] >= result["acknowledged"] > 0

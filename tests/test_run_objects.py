# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run in object storage: they come back exactly, or it is said what is wrong."""

import jax
import numpy as np
import object_store
import pytest
import tensorstore
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexolmo_jax import run_objects
from flexolmo_jax.errors import CheckpointError, MachineError
from flexolmo_jax.storage import cache, client, urls

BOTH = pytest.mark.parametrize("scheme", urls.SCHEMES)


@pytest.fixture(scope="module")
def server():
    with object_store.running("bucket") as variables:
        yield variables


@pytest.fixture
def at(server, tmp_path, monkeypatch):
    """A place in the bucket that is this test's own, and a cache that is too."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return f"bucket/{tmp_path.name}"


def flip(url):
    """Changes one bit of an object."""
    data = bytearray(client.read(url))
    data[len(data) // 2] ^= 1
    client.write(url, bytes(data))


def mesh(*shape):
    return Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))


def state(step):
    spread = NamedSharding(mesh(4, 2), P("a", "b"))
    return {
        "x": jax.device_put(np.arange(384, dtype=np.float32).reshape(64, 6) + step, spread),
        "half": jax.numpy.full((8, 4), step, jax.numpy.bfloat16),
        "step": jax.numpy.int32(step),
    }


def abstract():
    other = NamedSharding(mesh(2, 4), P("a", None))
    return {
        "x": jax.ShapeDtypeStruct((64, 6), np.float32, sharding=other),
        "half": jax.ShapeDtypeStruct((8, 4), jax.numpy.bfloat16),
        "step": jax.ShapeDtypeStruct((), np.int32),
    }


def saved(url, *steps, **options):
    with run_objects.ObjectCheckpoints(url, **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, state(step), {"iterator": {"at": step}})
    return checkpoints


@BOTH
def test_checkpoints_come_back_on_another_mesh(scheme, at):
    url = f"{scheme}://{at}/checkpoints"
    saved(url, 2, 4, 6, keep=2)
    with run_objects.ObjectCheckpoints(url) as checkpoints:
        assert checkpoints.steps() == [4, 6]
        found = checkpoints.restore_latest(abstract())
    assert (found.step, found.meta, found.skipped) == (6, {"iterator": {"at": 6}}, ())
    for name, leaf in state(6).items():
        np.testing.assert_array_equal(np.asarray(found.state[name]), np.asarray(leaf))
    assert found.state["x"].sharding == abstract()["x"].sharding
    # Deleted steps leave nothing.
    assert {n.split("/")[0].split("-")[0] for n in client.list_objects(url)} == {
        *("4", "6", "4.json", "6.json")
    }


# Broken once by not comparing digests: the damaged step came back.
@pytest.mark.parametrize("fault", ["flip", "missing", "marker"])
def test_a_damaged_checkpoint_is_passed_over_and_named(fault, at):
    url = f"s3://{at}/checkpoints"
    saved(url, 1, 2)
    (name,) = [n for n in client.list_objects(url) if n.startswith("2-") and "/x/3.1" in n]
    if fault == "missing":
        client.delete(url, [name])
    else:
        flip(f"{url}/{name if fault == 'flip' else '2.json'}")
    with run_objects.ObjectCheckpoints(url) as checkpoints:
        found = checkpoints.restore_latest(abstract())
        assert found.step == 1
        assert ("2.json" if fault == "marker" else name) in str(found.skipped[0])
        assert checkpoints.steps() == [1]
        assert checkpoints.save(2, state(2), {})
    # What was damaged stays as evidence, beside the new attempt.
    top, folders = client.list_top(url)
    assert {*top} == {"1.json", "2.json", "damaged-2.json"}
    assert len([f for f in folders if f.startswith("2-")]) == 2


def test_where_every_checkpoint_is_damaged_nothing_is_touched(at):
    url = f"s3://{at}/checkpoints"
    saved(url, 1)
    flip(f"{url}/1.json")
    with run_objects.ObjectCheckpoints(url) as checkpoints:
        with pytest.raises(CheckpointError, match="Every checkpoint"):
            checkpoints.restore_latest(abstract())
        assert checkpoints.steps() == [1]


# Broken once by leaving what the interrupted save had written.
def test_a_save_cut_off_is_no_step_and_is_cleaned_away(at, monkeypatch):
    url, original = f"s3://{at}/checkpoints", client.write
    saved(url, 1)

    def cut_off(where, data, **options):
        if "/x/3.1" in where:
            raise MachineError("cut off", where=where)
        return original(where, data, **options)

    monkeypatch.setattr(client, "write", cut_off)
    with pytest.raises(MachineError, match="cut off"):
        saved(url, 2)
    monkeypatch.setattr(client, "write", original)
    assert any(n.startswith("2-") for n in client.list_objects(url))
    with run_objects.ObjectCheckpoints(url) as checkpoints:
        assert checkpoints.restore_latest(abstract()).step == 1
    assert not any(n.startswith("2-") for n in client.list_objects(url))


def test_two_jobs_of_one_workdir_are_told(at):
    url = f"s3://{at}/checkpoints"
    with run_objects.ObjectCheckpoints(url) as one, run_objects.ObjectCheckpoints(url) as two:
        two._new_folder = lambda step: f"{step}-00000000"  # both look before either has written
        assert one.save(1, state(1), {})
        one.wait()
        assert two.save(1, state(9), {})
        with pytest.raises(MachineError, match="Another job"):
            two.wait()
        assert int(one.restore(1, abstract())[0]["step"]) == 1


def test_a_leaf_that_does_not_fit_is_an_error(at):
    url = f"s3://{at}/checkpoints"
    saved(url, 1)
    other = {**abstract(), "half": jax.ShapeDtypeStruct((8, 5), jax.numpy.bfloat16)}
    checkpoints = run_objects.ObjectCheckpoints(url)
    with checkpoints, pytest.raises(CheckpointError, match="half"):
        checkpoints.restore_latest(other)


def test_tensorstore_reads_a_checkpoint_as_it_lies_there(at, server, tmp_path):
    url = f"s3://{at}/checkpoints"
    saved(url, 1)
    (folder,) = client.list_top(url)[1]
    for name in client.list_objects(f"{url}/{folder}/x"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(client.read(f"{url}/{folder}/x/{name}"))
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/x/"}}
    found = tensorstore.open(spec).result().read().result()
    np.testing.assert_array_equal(found, np.asarray(state(1)["x"]))

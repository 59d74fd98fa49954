# SPDX-License-Identifier: Apache-2.0
"""How a process learns of the others, and arrays that are spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flexolmo_jax import distributed, mesh, placed
from flexolmo_jax.errors import ConfigError, MachineError

TOLD = {
    "JAX_COORDINATOR_ADDRESS": "localhost:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.fixture
def joined(monkeypatch):
    """What `start` tells JAX, instead of waiting for processes that do not exist."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


def test_a_process_is_told_where_the_others_are(joined):
    assert distributed.start(TOLD)
    (arguments,) = joined
    assert arguments["coordinator_address"] == "localhost:1234"
    assert (arguments["num_processes"], arguments["process_id"]) == (2, 1)
    assert arguments["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    "changes",
    [
        {"JAX_COORDINATOR_ADDRESS": ""},
        {"JAX_COORDINATOR_ADDRESS": "localhost"},
        {"JAX_COORDINATOR_ADDRESS": "localhost:99999"},
        {"JAX_NUM_PROCESSES": ""},
        {"JAX_NUM_PROCESSES": "two"},
        {"JAX_PROCESS_ID": ""},
        {"JAX_PROCESS_ID": "-1"},
        {"JAX_PROCESS_ID": "2"},
    ],
)
def test_half_given_or_wrong_settings_are_refused(joined, changes):
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID"):
        distributed.start({**TOLD, **changes})
    assert not joined


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"JAX_NUM_PROCESSES": "1"}, False),
        ({**SLURM, "SLURM_NTASKS": "2"}, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # a batch script, outside any step
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_NUM_PROCESSES": "1"}, False),
    ],
)
def test_a_pod_is_recognised_by_what_its_cluster_says(joined, environment, several):
    assert distributed.start({"JAX_PLATFORMS": "cpu", **environment})
    assert joined == ([{"shutdown_timeout_seconds": distributed.SHUTDOWN_S}] if several else [])


def test_processes_that_do_not_meet_are_a_fault_of_the_machine(monkeypatch):
    def fail(**_arguments):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(MachineError, match="localhost:1234"):
        distributed.start(TOLD)


def test_one_process_agrees_with_itself_and_keeps_its_errors():
    assert distributed.from_first(lambda: {"a": [1]}, "asking") == {"a": [1]}
    distributed.require_same({"a": 1}, "settings")
    with pytest.raises(ConfigError, match=r"^Mine"), distributed.together("reading"):
        raise ConfigError("Mine")


def spread(value, *axes, shape=(2, 2, 2)):
    return placed.put(value, NamedSharding(mesh.make_mesh(*shape), PartitionSpec(*axes)))


# Broken once by leaving out the position: two values that change places passed.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_a_checksum_depends_on_content_and_position_alone(dtype):
    value = np.arange(96).reshape(8, 12) % 7
    value = np.asarray(value, dtype)
    layouts = [(), ("data",), ("data", "model"), (("data", "expert"), "model")]
    sums = [placed.checksums({"w": spread(value, *axes)})["w"] for axes in layouts]
    assert {*sums, placed.checksums({"w": value})["w"]} == {sums[0]}
    other = value.copy()
    other[0, 0], other[0, 1] = value[0, 1], value[0, 0]
    assert placed.checksums({"w": other})["w"] != sums[0]
    for i in range(8):
        other = value.copy()
        other[i, i] = value[i, i] == 0
        assert placed.checksums({"w": other})["w"] != sums[0]


def test_a_batch_is_made_of_rows_wherever_they_lie():
    grid = mesh.make_mesh(2, 2, 2)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    held = placed.batch_rows(grid, 8)
    assert held == list(range(8))  # this process has all devices
    batch = placed.batch({"tokens": rows}, grid, 8, held)
    np.testing.assert_array_equal(batch["tokens"], rows)
    whole = placed.whole_batch({"tokens": rows}, grid)
    assert whole["tokens"].sharding == batch["tokens"].sharding
    odd = placed.whole_batch({"tokens": rows[:3]}, grid)
    np.testing.assert_array_equal(odd["tokens"], rows[:3])


def test_digests_of_parts_find_a_change():
    value = np.arange(16, dtype=np.float32).reshape(4, 4)
    one, same = (placed.part_digests({"w": spread(value, "data")}) for _ in range(2))
    assert one == same
    value[3, 3] = 0
    assert placed.part_digests({"w": spread(value, "data")}) != one

# SPDX-License-Identifier: Apache-2.0
"""Every configuration compiled for its pod: it fits, and moves what it should over which axis.

The digests of the compiled programs are kept, so that a refactor can be shown to be pure. After a
change that is meant to change programs, or a new compiler, write them again and look at the diff:

    FLEXOLMO_KEEP_PROGRAMS=1 make test-pods          (with PODS= for those of whole pods too)

FLEXOLMO_POD_ANSWERS=FOLDER leaves the plans there for `benchmarks/pod_table.py`.
"""

import contextlib
import json
import os
import re
import tempfile
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import pods
from flexolmo_jax.pods import chips, target
from flexolmo_jax.pods import compile as compiling

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "tests/golden/pods/programs.json"
# Before it chooses, the partitioner tries products on made-up parameters. What it says of those is
# about a way that it weighed; a way that it took says the name of the real operation.
REMATERIALIZATION = re.compile(
    r"Involuntary full rematerialization.*?for HLO operation (?!%fake_parameter)(%\S+)"
)
MARKS = {True: (), False: (pytest.mark.slow_pods,)}
CASES = [
    pytest.param(pod, marks=MARKS[pod.quick], id=f"{pod.name}, {pod.topology}") for pod in pods.PODS
]


def compiler() -> str:
    """What decides the text of a compiled program besides ours."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))


def name_of(pod: pods.Pod) -> str:
    return f"{pod.config} {pod.stage or 'train'} {pod.topology} x{pod.slices} {pod.rows} rows"


@contextlib.contextmanager
def screen():
    """A function that tells what native code wrote to the screen, once the block is left."""
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        found = []
        try:
            yield lambda: found[0]
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            found.append(file.read().decode(errors="replace"))


def measure(pod: pods.Pod):
    """The plan of a pod, and what the compiler said meanwhile."""
    with screen() as said:
        plan = target.read(pod.request(str(ROOT / "experiments"))).measure()
    return plan, said()


def kinds(plan) -> dict[str, list[str]]:
    """Mesh axis to the kinds of collectives over it."""
    return {axis: sorted(found) for axis, found in sorted(plan.collective_bytes.items())}


def test_a_rematerialization_is_seen():
    """A change of layout that the partitioner can only make by gathering everything."""
    devices = compiling.devices(chips.parse("v5e:4x4"))[:8]
    grid = Mesh(np.asarray(devices).reshape(2, 4), ("a", "b"))

    def place(*axes):
        return NamedSharding(grid, PartitionSpec(*axes))

    def change(x):
        return jnp.cos(jax.lax.with_sharding_constraint(jnp.sin(x), place(None, "a")))

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place(("a", "b"), None))
    with screen() as said:
        jax.jit(change).lower(x).compile()
    found = REMATERIALIZATION.findall(said())
    assert found
    assert not REMATERIALIZATION.search(said().replace(found[0], "%fake_parameter.2"))


@pytest.mark.parametrize("pod", CASES)
def test_a_configuration_compiles_for_its_pod(pod):
    plan, screen = measure(pod)
    if folder := os.environ.get("FLEXOLMO_POD_ANSWERS"):
        path = ROOT / folder / pod.answer
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan.to_json(), indent=1) + "\n")
    assert plan.fits, plan.to_json()["hbm_gib"]
    assert not REMATERIALIZATION.findall(screen)
    shape = plan.program.mesh.shape
    axes = {axis for axis, size in shape.items() if size > 1}
    assert {axis for span in plan.collective_bytes for axis in span.split("+")} <= axes
    assert not plan.work.unknown_loops and not plan.work.unknown_kernels
    facts = {"hash": plan.program_hash, "collectives": kinds(plan)}
    kept = json.loads(KEPT.read_text())
    if os.environ.get("FLEXOLMO_KEEP_PROGRAMS"):
        same = kept["compiler"] == compiler()
        programs = {**(kept["programs"] if same else {}), name_of(pod): facts}
        content = {"compiler": compiler(), "programs": dict(sorted(programs.items()))}
        KEPT.write_text(json.dumps(content, indent=1) + "\n")
        return
    expected = kept["programs"].get(name_of(pod))
    assert expected is not None, "not kept yet (see above)"
    assert facts["collectives"] == expected["collectives"]
    if kept["compiler"] == compiler():
        assert facts["hash"] == expected["hash"], "the program changed (see above)"

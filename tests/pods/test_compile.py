# SPDX-License-Identifier: Apache-2.0
"""The planner on programs that the real TPU compiler makes, small ones on small topologies."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flexolmo_jax.config import ExecConfig
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.pods import chips, search, target, work
from flexolmo_jax.pods import compile as compiling
from flexolmo_jax.pods.process import Request

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("anchor", "expert", "rows", "router", "joint")


def asked(config, topology, *, layers=0, **rest):
    """The target of a request, with fewer layers if asked."""
    overrides = tuple(f"--config.{o}" for o in rest.pop("overrides", ()))
    t = target.read(Request(f"{ROOT}/experiments/{config}", topology, overrides=overrides, **rest))
    return dataclasses.replace(t, model=t.model.replace(n_layers=layers)) if layers else t


@functools.cache
def planned(config, topology, **rest):
    """The plan of a request, compiled once for all tests that look at it."""
    return asked(config, topology, **rest).measure()


# ---- FLOPs -----------------------------------------------------------------------------------


def stacked_products(scan, topology="v5e:2x2"):
    """Gradients of six layers x @ w, in a loop or written out, on one device."""
    device = compiling.devices(chips.parse(topology))[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def loss(w_LDD, x_BD):
        if scan:
            x_BD, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)
        else:
            for layer in range(6):
                x_BD = jnp.tanh(x_BD @ w_LDD[layer])
        return jnp.sum(x_BD.astype(jnp.float32))

    shapes = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place) for s in ((6, 512, 512), (4096, 512))
    ]
    return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().as_text()


def test_a_loop_multiplied_out_is_the_program_written_out():
    loop, written = (work.read(stacked_products(scan)) for scan in (True, False))
    assert loop.flops == written.flops == 3 * 6 * 2 * 4096 * 512 * 512
    assert not loop.unknown_loops


@pytest.mark.parametrize(
    ("topology", "axes"), [("v5e:2x2", {}), ("v6e:2x2", {"mesh_data": 2, "mesh_model": 2})]
)
def test_flops_of_a_dense_forward_pass_are_the_closed_form(topology, axes):
    """All scores of a layer at once: 4·T·width per token and layer, the upper half included."""
    overrides = ("exec.attention=whole", *(f"exec.{k}={v}" for k, v in axes.items()))
    plan = planned(
        *("anchor.py:size=1b", topology),
        **{"layers": 2, "stage": "eval", "rows": 8, "seq_len": 1024, "overrides": overrides},
    )
    c, tokens = plan.program.config, 8 * 1024
    width = c.n_heads * c.d_head
    layer = 4 * c.d_model * width + 3 * c.d_model * c.d_ffn + 2 * 1024 * width
    closed = 2 * tokens * (c.n_layers * layer + c.d_model * c.vocab_size)
    assert plan.compiled_flops == pytest.approx(closed, rel=0.01)


# ---- Stages and meshes -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", target.STAGES)
def test_every_stage_of_the_smallest_model(stage):
    plan = planned("stitched.py:size=tiny", "v5e:2x2", stage=stage, rows=8)
    assert plan.fits and not plan.work.unknown_loops and not plan.work.unknown_kernels
    m = plan.memory
    parts = (m.parameters, m.optimizer, m.activations, m.temporaries)
    assert sum(parts) == pytest.approx(m.total) and min(parts) >= 0
    assert (m.optimizer > 0) == (stage in TRAINING)
    assert 0 < plan.times.low <= plan.times.high
    assert 0 < plan.mfu()["low"] <= plan.mfu()["high"] < 1
    json.dumps(plan.to_json())


def test_fsdp_moves_data_over_one_axis_only():
    bfloat16 = ("exec.compute_dtype=bfloat16",)
    plan = planned("expert.py:size=tiny", "v6e:2x2", rows=8, overrides=bfloat16)
    assert set(plan.collective_bytes) == {"data"}
    kinds = plan.collective_bytes["data"]
    # Every frozen matmul weight is gathered at least once, as bfloat16.
    c = plan.program.config
    frozen = c.n_layers * (4 * c.d_model**2 + 3 * c.d_model * c.d_ffn) * 2
    assert kinds["all-gather"] >= frozen
    # What trains is the owner's half of the FFN: its gradient comes back in parts.
    assert kinds.get("reduce-scatter", 0) + kinds.get("all-reduce", 0) > 0


def test_an_expert_axis_has_its_own_collectives():
    plan = planned(
        "stitched.py:size=tiny",
        "v5e:2x4",
        rows=8,
        seq_len=32,
        overrides=("exec.mesh_expert=8", "model.n_slots=8"),
    )
    assert "expert" in plan.collective_bytes
    # A slot lives on one device: of the experts nothing is gathered, and so few tokens weigh less.
    c = plan.program.config
    experts = 3 * c.d_model * c.d_ffn * 2 * c.n_slots * c.n_layers
    assert 0 < plan.collective_bytes["expert"].get("all-gather", 0) < experts / 2
    assert dict(plan.program.mesh.shape) == {"data": 1, "expert": 8, "model": 1}


@pytest.mark.parametrize("topology", ["v4:2x2x1", "tpu7x:2x2x1"])
def test_two_devices_of_a_chip_are_counted_together(topology):
    plan = planned("anchor.py:size=60m", topology, rows=8, seq_len=512)
    m, c = plan.memory, plan.program.config
    count = 2 * c.vocab_size * c.d_model + c.n_layers * (4 * c.d_model**2 + 3 * c.d_model * c.d_ffn)
    assert m.parameters == pytest.approx(count * 4 / 4, rel=0.02)
    assert plan.topology.chips == 4 and plan.program.mesh.shape["data"] == 8


def test_slices_are_the_outermost_part_of_the_mesh():
    plan = planned("expert.py:size=tiny", "v5e:2x2", slices=2, rows=16)
    over = compiling.layout(plan.topology, plan.program.mesh)
    assert plan.topology.chips == 8 and plan.program.mesh.shape["data"] == 8
    assert [p.part for p in over.places] == [0] * 4 + [1] * 4


def test_the_last_shape_of_a_mesh_is_laid_out_too():
    """A mesh of other shape than the torus, which JAX's own helper for topologies refuses."""
    grid = compiling.grid(chips.parse("v5e:4x4"), ExecConfig(mesh_data=2, mesh_expert=8))
    assert dict(grid.shape) == {"data": 2, "expert": 8, "model": 1}


# ---- Refusals --------------------------------------------------------------------------------


def test_what_does_not_fit_says_so_and_what_would():
    # A hundred layers of 1B: as quick to compile as one, since the body of a loop is compiled.
    t = asked("anchor.py:size=1b", "v5e:2x2", layers=100, rows=4, seq_len=512)
    plan = t.measure()
    assert not plan.fits and plan.times is None and plan.mfu() is None
    # Float32 weights and two moments of 7 billion parameters over four chips.
    assert plan.memory.total > 7e9 * 12 / 4 > plan.memory.limit
    found = search.advice(t, plan, lambda line: None)
    assert found is not None and found.plan.fits and "--topology v5e:" in found.change


def test_a_topology_that_does_not_exist():
    with pytest.raises(ConfigError, match="no such topology"):
        planned("anchor.py:size=tiny", "v5e:3x5", rows=15)


def test_a_batch_that_does_not_divide():
    with pytest.raises(ConfigError, match="does not divide"):
        planned("anchor.py:size=tiny", "v5e:2x2", rows=6)


# ---- The command -----------------------------------------------------------------------------


def test_the_command_is_quiet_and_writes_what_is_documented(tmp_path):
    out = tmp_path / "plan.json"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "TF_"))}
    kept.pop("ALLOW_MULTIPLE_LIBTPU_LOAD", None)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "flexolmo_jax", "plan", "--config"),
            *("experiments/expert.py:size=tiny", "--topology", "v5e:2x2", "--rows", "8"),
            *("--units", "3", "--json", str(out)),
        ],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "FITS" in done.stdout and "units that take longest" in done.stdout
    assert done.stderr.splitlines() == [
        "compiling stage expert for v5e:2x2 (4 chips): 8 rows of 256 tokens"
    ]
    found = json.loads(out.read_text())
    assert found["fits"] is True and found["command"] == "plan"
    assert set(found["hbm_gib"]) == {
        *("limit", "total", "parameters", "optimizer", "activations", "temporaries")
    }
    for key in ("step_s", "mfu", "tokens_per_s_per_chip"):
        assert found[key]["low"] <= found[key]["high"]
    assert found["flops"]["model"] > 0 and found["flops"]["compiled"] > 0
    assert found["collective_bytes"]["data"] and found["compile_s"] > 0


def test_a_search_finds_a_front():
    t = asked("expert.py:size=tiny", "v5e:2x2", rows=8)
    tried = list(search._growing("as it is", t, lambda line: None))
    assert [x.target.rows_at_once for x in tried] == [1, 2]
    front = search.pareto(tried)
    assert front and all(x.plan.fits for x in front)


# ---- The jobs of the paper, whole --------------------------------------------------------------


@pytest.mark.slow_pods
@pytest.mark.parametrize(
    ("topology", "rows", "most"), [("v5p:2x2x1", 4, 30), ("v6e:2x4", 8, 20), ("v5e:4x4", 16, 13)]
)
def test_an_expert_of_7b_fits_one_small_slice(topology, rows, most):
    plan = planned("expert.py:size=7b", topology, rows=rows)
    assert plan.fits and plan.memory.total < most * 2**30


@pytest.mark.slow_pods
def test_the_mixture_of_eight_fits_v5p_128():
    plan = planned(
        "stitched.py:size=8x7b", "v5p:4x4x8", rows=128, overrides=("exec.mesh_expert=8",)
    )
    assert plan.fits and {"data", "expert"} <= set(plan.collective_bytes)


def sharded(grid, shape, *spec):
    return jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(grid, PartitionSpec(*spec))
    )


def test_an_all_gather_is_timed_on_the_axis_it_runs_over():
    topology = chips.parse("v5e:2x4")
    grid = compiling.grid(topology, ExecConfig(mesh_data=2, mesh_expert=4))
    over = compiling.layout(topology, grid)
    whole = NamedSharding(grid, PartitionSpec())
    text = (
        jax.jit(lambda x: x * 2, out_shardings=whole)
        .lower(sharded(grid, (4096, 4096), "expert"))
        .compile()
        .as_text()
    )
    done = work.read(text)
    assert set(compiling.traffic(done, over)) == {"expert"}
    (exchange,) = [c for u in done.units for c in u.collectives]
    span = over.span(exchange.groups)
    assert (span.size, span.chips) == (4, 4)

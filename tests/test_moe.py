# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism in whole steps: choice of a strategy, capacity, checkpoints across meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from flexolmo_jax import (
    checkpoint,
    mesh,
    model,
    moe,
    moe_parallel,
    router,
    sharding,
    stages,
    step,
    tree,
)
from flexolmo_jax.config import ExecConfig, ModelConfig, OptimConfig, RunConfig
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.typed import from_dict

# Float32 sums in another order, as in tests/equality.
TOLERANCE = 1e-5
OPTIM = OptimConfig(load_balance=0.01)


def place(params, grid):
    """Parameters laid out over a mesh as training does."""
    axes = model.param_axes(toy.CONFIG)
    return jax.device_put(params, sharding.param_shardings(params, axes, grid))


@functools.cache
def one_step(strategy, shape, capacity=0.0):
    """Gradients and metrics of a joint step; None is one device and the dense mixture."""
    params, batch, run = toy.params(), toy.batch(rows=8, length=16), model.Runtime("dense")
    if strategy:
        grid = mesh.make_mesh(*shape)
        params = place(params, grid)
        batch = jax.device_put(batch, sharding.batch_sharding(grid))
        run = model.Runtime("blocked", expert_parallel=strategy, capacity=capacity, mesh=grid)
    trainable, frozen = stages.split("joint", params)
    # An optimizer that keeps the gradient instead of taking a step.
    tx = optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.zeros_like, p),
        lambda grads, _, p: (jax.tree.map(jnp.zeros_like, p), grads),
    )
    state = {"params": trainable, "opt": tx.init(trainable), "step": jnp.int32(0)}
    jitted = jax.jit(
        functools.partial(step.train_step, toy.CONFIG, run, "joint", OPTIM, tx),
        donate_argnums=(),
    )
    new, metrics = jitted(state, frozen, batch)
    return jax.device_get((new["opt"], metrics))


@pytest.mark.parametrize(
    ("strategy", "shape"), [("ring", (2, 2, 2)), ("all_to_all_twin", (1, 4, 2))], ids=str
)
def test_a_whole_step_equals_one_device(strategy, shape):
    (want, metrics), (got, others) = one_step(None, None), one_step(strategy, shape)
    assert set(metrics) == set(others) and "dropped" not in metrics
    for name in ("loss", "router_z", "load_balance", "grad_norm"):
        np.testing.assert_allclose(others[name], metrics[name], rtol=TOLERANCE, err_msg=name)
    for name, leaf in tree.flatten(want).items():
        scale = max(np.abs(leaf).max(), 1e-3)
        np.testing.assert_allclose(
            tree.flatten(got)[name] / scale, leaf / scale, atol=TOLERANCE, err_msg=name
        )


# Broken once by a step that does not say that it trains: no "dropped".
def test_a_step_with_a_capacity_counts_what_it_drops():
    _, metrics = one_step("ring", (2, 2, 2), 0.75)
    _, without = one_step("ring", (2, 2, 2))
    assert 0 < metrics["dropped"] < 0.5
    assert metrics["dropped"] <= metrics["dropped_worst_shard"] <= 1
    assert metrics["dropped"] <= metrics["dropped_worst_slot"] <= 1
    assert metrics["loss"] != without["loss"]


def test_only_training_drops():
    """The runtime of a run with a capacity scores held-out text without one."""
    params, batch = toy.params(), toy.batch(rows=2, length=16)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def forward(run, training):
        arguments = (params["shared"], (params["experts"],), batch["tokens"])
        out = model.forward(toy.CONFIG, run, *arguments, training=training)
        return out.hidden_BTD, out.drops

    tight = model.Runtime("blocked", capacity=0.5)
    want, _ = forward(model.Runtime("blocked"), False)
    held_out, nothing = forward(tight, False)
    np.testing.assert_array_equal(held_out, want)
    trained, drops = forward(tight, True)
    assert nothing is None and not np.array_equal(trained, want)
    assert drops.lost_S.shape == (2, 1) and drops.refused_E.shape == (2, 4)
    np.testing.assert_array_equal(drops.lost_S.sum(1), drops.refused_E.sum(1))


def test_a_capacity_is_refused_outside_training():
    with pytest.raises(ConfigError, match="training only"):
        model.Runtime.resolve(ExecConfig(capacity=1.25), 4, 2)
    run = model.Runtime.resolve(ExecConfig(capacity=1.25), 4, 2, training=True)
    assert run.capacity == 1.25
    with pytest.raises(ConfigError, match="capacity"):
        ExecConfig(capacity=-1.0)


@pytest.mark.parametrize(
    "stage",
    [
        {"stage": "anchor", "model": toy.config(n_slots=1, n_active=1), "tokenizer": "t"},
        {"stage": "expert", "anchor": "a", "expert_id": "e"},
    ],
    ids=lambda v: v["stage"],
)
def test_a_stage_without_dispatch_refuses_a_capacity(stage):
    with pytest.raises(ConfigError, match="every token uses every"):
        RunConfig(**stage, exec=ExecConfig(capacity=1.0))
    assert RunConfig(**stage).exec.capacity == 0


@pytest.mark.parametrize(
    ("asked", "dispatch", "shape", "platform", "expected"),
    [
        ("auto", "blocked", (8, 1, 1), "cpu", "fsdp"),
        ("auto", "blocked", (2, 4, 1), "cpu", "ring"),
        ("auto", "dense", (2, 4, 1), "cpu", "fsdp"),
        ("auto", "ragged", None, "tpu", "fsdp"),
        ("fsdp", "blocked", (2, 4, 1), "cpu", "fsdp"),
        ("all_to_all", "blocked", (2, 4, 1), "cpu", "all_to_all_twin"),
        ("all_to_all", "ragged", (2, 4, 1), "tpu", "all_to_all"),
    ],
)
def test_the_strategy_that_a_mesh_gets(asked, dispatch, shape, platform, expected):
    grid = shape and mesh.make_mesh(*shape)
    assert moe.resolve_parallel(asked, dispatch, grid, platform) == expected
    assert expected in moe_parallel.STRATEGIES


def test_experts_side_by_side_are_not_moved():
    """A frozen and a trainable group cannot be sorted together; it is said, not worked around."""
    x = jnp.zeros((2, 3, 4))
    group = {name: jnp.zeros((1, 4, 4)) for name in moe.WEIGHTS}
    routing = router.route(jnp.zeros((2, 3, 2)), 1)
    with pytest.raises(ConfigError, match="one group"):
        moe.mixture(x, [group, group], routing, dispatch="dense", parallel="ring")


# Broken once by restoring every leaf with the sharding and the values of slot 0: experts equal.
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2), (2, 4, 1)], ids=str)
def test_experts_differ_after_a_restore_on_another_mesh(tmp_path, shape):
    params = toy.params()
    checkpoint.save_tree(tmp_path / "saved", place(params, mesh.make_mesh(2, 2, 2)))
    axes = model.param_axes(toy.CONFIG)
    abstract = model.abstract_params(toy.CONFIG)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        sharding.param_shardings(abstract, axes, mesh.make_mesh(*shape)),
    )
    restored = tree.flatten(checkpoint.restore_tree(tmp_path / "saved", target))
    for name, leaf in tree.flatten(params).items():
        assert restored[name].sharding == tree.flatten(target)[name].sharding
        np.testing.assert_array_equal(restored[name], leaf, err_msg=name)
    for name in moe.WEIGHTS:
        leaf = np.asarray(restored[f"experts/{name}"])
        for a in range(4):
            for b in range(a):
                assert not np.any(leaf[:, a] == leaf[:, b]), name


def test_the_fields_are_read_strictly():
    config = from_dict(ExecConfig, {"expert_parallel": "ring", "capacity": 1})
    assert config.expert_parallel == "ring" and config.capacity == 1.0
    with pytest.raises(ConfigError, match="all_to_all"):
        from_dict(ExecConfig, {"expert_parallel": "all-to-all"})
    assert ModelConfig.__dataclass_fields__.keys().isdisjoint({"capacity", "expert_parallel"})

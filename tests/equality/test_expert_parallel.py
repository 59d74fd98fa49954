# SPDX-License-Identifier: Apache-2.0
"""Every strategy of expert parallelism against the dense mixture on one device.

Float32; values and gradients of all inputs. Sums in another order differ in the last bits:
TOLERANCE is ten times the largest difference seen here (relative to the largest entry).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax import mesh, model, moe, moe_kernels, moe_parallel, router
from flexolmo_jax.sharding import PARAM_RULES, spec_for

TOLERANCE = 2e-5
D, F, A = 16, 24, 2
MESHES = [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)]
STRATEGIES = ["fsdp", "ring", "all_to_all_twin"]


def draw(seed, slots=8, rows=8, length=6, allowed=None):
    """Tokens, experts and logits, with what the output is weighted by for a scalar."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "x": normal(rows, length, D),
        "logits": normal(rows, length, slots) if allowed is None else allowed,
        "w_gate": normal(slots, D, F),
        "w_up": normal(slots, D, F),
        "w_down": normal(slots, F, D),
        "probe": normal(rows, length, D),
    }


@functools.lru_cache(maxsize=64)
def compiled(grid, dispatch, strategy, capacity=0.0, shards=None, active=A):
    """Output, and gradients with regard to everything, of a mixture whose rows may be limited."""

    def scalar(inputs, allowed_BE):
        routing = router.route(inputs["logits"], active, allowed_BE=allowed_BE)
        if capacity:
            routing, _ = moe.limit(routing, capacity, shards or moe.n_shards(grid))
        y_BTD = moe.mixture(
            inputs["x"],
            [{name: inputs[name] for name in moe.WEIGHTS}],
            routing,
            dispatch=dispatch,
            parallel=strategy,
            capacity=capacity,
            mesh=grid,
        )
        return jnp.sum(y_BTD * inputs["probe"]), y_BTD

    return jax.jit(jax.grad(scalar, has_aux=True))


def run(inputs, allowed=None, *, shape=None, dispatch="dense", strategy="fsdp", **limits):
    grid = None if shape is None else mesh.make_mesh(*shape)
    if grid is not None:
        # As a checkpoint is laid out, so that gathering the matrices is part of the test.
        placed = {
            n: jax.NamedSharding(
                grid, spec_for(model.EXPERT_AXES[n][1:], inputs[n].shape, grid, PARAM_RULES)
            )
            for n in moe.WEIGHTS
        }
        inputs = {n: jax.device_put(x, placed[n]) if n in placed else x for n, x in inputs.items()}
    grads, y = compiled(grid, dispatch, strategy, **limits)(inputs, allowed)
    return jax.device_get({"y": y, **grads})


def assert_same(got, want):
    for name, value in want.items():
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(got[name] / scale, value / scale, atol=TOLERANCE, err_msg=name)


# Broken once each: no sum over the model axis; slots of another device taken for own ones (ring);
# pieces of two senders at one place, gradients sent the same way as values (all_to_all).
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_equals_dense(strategy, shape):
    inputs = draw(0)
    assert_same(run(inputs, shape=shape, dispatch="blocked", strategy=strategy), run(inputs))


# Broken once each: gradients of a token's first row alone, no gradient of the combine weights.
# `ragged_dot` off TPU and the dense kernel are slower to compile: one mesh with every axis.
@pytest.mark.parametrize("dispatch", ["dense", "ragged"])
@pytest.mark.parametrize("strategy", ["ring", "all_to_all_twin"])
def test_every_kernel_in_every_strategy(dispatch, strategy):
    inputs = draw(1)
    assert_same(run(inputs, shape=(2, 2, 2), dispatch=dispatch, strategy=strategy), run(inputs))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("slots", "rows", "length"),
    [
        pytest.param(5, 8, 4, id="slots that 4 does not divide"),
        pytest.param(8, 3, 7, id="rows and tokens that 8 does not divide"),
    ],
)
def test_shapes_that_the_mesh_does_not_divide(strategy, slots, rows, length):
    inputs = draw(2, slots=slots, rows=rows, length=length)
    got = run(inputs, shape=(2, 4, 1), dispatch="blocked", strategy=strategy)
    assert_same(got, run(inputs))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_absent_choices_beside_slots_that_fill_up_the_axis(strategy):
    """Three choices of tokens that have one slot, and one device of four that has none."""
    inputs = draw(7, slots=3, rows=3, length=7)
    allowed = jnp.arange(3) == jnp.arange(3)[:, None]
    options = {"active": 3}
    got = run(inputs, allowed, shape=(2, 4, 1), dispatch="blocked", strategy=strategy, **options)
    assert_same(got, run(inputs, allowed, **options))


# Broken once by an index for no slot that names the first empty one: 32 rows in a buffer of 16.
def test_absent_choices_take_no_room_in_the_buffers():
    grid, M, seen = mesh.make_mesh(1, 8, 1), 2, []
    index = jnp.full((8, M, 3), 5, jnp.int32).at[..., 0].set(1)  # five slots: 5 stands for none
    weights = [jnp.ones((5, D, F)), jnp.ones((5, D, F)), jnp.ones((5, F, D))]

    def rows(x_RD, weight_R1, sizes_E, *_):
        jax.debug.callback(lambda sizes: seen.append((int(sizes.sum()), len(x_RD))), sizes_E)
        return x_RD * weight_R1

    y = moe_parallel.sharded(
        jnp.ones((8, M, D)),
        index,
        jnp.where(index < 5, 1.0, 0.0),
        weights,
        kernels=moe_parallel.Kernels(rows, rows),
        strategy="all_to_all_twin",
        per_slot=M,
        mesh=grid,
    )
    np.testing.assert_array_equal(y, 1.0)
    jax.effects_barrier()
    assert all(used <= room for used, room in seen)
    assert sorted(used for used, _ in seen) == [0] * 7 + [8 * M]


# Broken once by buffers for the mean number of assignments.
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_tokens_on_one_slot_and_none_on_the_others(strategy):
    inputs = draw(3)
    for slot in (0, 7):
        allowed = jnp.zeros((8, 8), bool).at[:, slot].set(True)
        got = run(inputs, allowed, shape=(2, 4, 1), dispatch="blocked", strategy=strategy)
        assert_same(got, run(inputs, allowed))
        unused = np.delete(got["w_up"], slot, axis=0)
        np.testing.assert_array_equal(unused, 0.0)


# Broken once by a denied slot's index that keeps its place with weight 0.
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fill", [np.nan, np.inf, "random"], ids=str)
def test_a_denied_slot_may_hold_anything(strategy, fill):
    """Rows that may not use slot 0 keep every bit, while row 1 uses it; row 3 has one slot only."""
    inputs = draw(4)
    allowed = jnp.ones((8, 8), bool).at[:, 0].set(False).at[1, 0].set(True)
    allowed = allowed.at[3].set(jnp.arange(8) == 5)
    inputs["logits"] = inputs["logits"].at[1, :, 0].set(9.0)
    value = 7 * inputs["w_up"][3, 0, 0] if fill == "random" else fill
    spoilt = {n: x.at[0].set(value) if n in moe.WEIGHTS else x for n, x in inputs.items()}
    options = {"shape": (2, 4, 1), "dispatch": "blocked", "strategy": strategy}
    want, got = run(inputs, allowed, **options), run(spoilt, allowed, **options)
    others = np.delete(np.arange(8), 1)
    for name in ("y", "x", "logits"):
        np.testing.assert_array_equal(got[name][others], want[name][others], err_msg=name)
    for name in moe.WEIGHTS:
        np.testing.assert_array_equal(got[name][1:], want[name][1:], err_msg=name)
    assert not np.array_equal(got["y"][1], want["y"][1], equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1)], ids=str)
def test_the_twin_moves_rows_as_the_collective_is_documented(shape):
    """Against `jax.lax.ragged_all_to_all` written out in NumPy: on a TPU that does the moving."""
    grid, n = mesh.make_mesh(*shape), shape[1]
    mine, M = 8 // n, 6
    index = jnp.asarray(np.random.default_rng(6).integers(0, 9, (8, M, A)), jnp.int32)
    x = jnp.arange(1.0, 1 + 8 * M).reshape(8, M, 1)
    received = n * M * min(A, mine)

    def device(index_1MA, x_1MD):
        order = moe_kernels.sort(index_1MA[0], 8, M * A)
        plan = moe_parallel._plan(order.sizes_E, mine)
        rows = moe_kernels.spread(x_1MD[0], order)
        there = moe_parallel._move(True, received, M * A, rows, plan.out, plan.back)
        again = moe_parallel._move(True, M * A, received, there, plan.back, plan.out)
        return jax.tree.map(lambda a: a[None], (plan, rows, there, again))

    batch = jax.P(mesh.BATCH_AXES)
    moved = jax.shard_map(
        device, mesh=grid, in_specs=(batch, batch), out_specs=batch, check_vma=False
    )
    plan, rows, there, again = jax.device_get(jax.jit(moved)(index, x))
    for way, sent, arrived in ((plan.out, rows, there), (plan.back, there, again)):
        for first in range(0, 8, n):
            np.testing.assert_array_equal(
                arrived[first : first + n], collective(way, sent, arrived, first, n)
            )
    np.testing.assert_array_equal(again, rows)
    assert there.any() and not there.all()


def collective(way, sent, like, first, n):
    """The documented meaning of `ragged_all_to_all` for one group of n devices."""
    out = np.zeros_like(like[first : first + n])
    for sender in range(n):
        starts, sizes, targets = (
            a[first + sender] for a in (way.input_offsets, way.send_sizes, way.output_offsets)
        )
        for i, (start, size, at) in enumerate(zip(starts, sizes, targets, strict=True)):
            receiver, piece = divmod(i, len(sizes) // n)
            out[receiver, at : at + size] = sent[first + sender, start : start + size]
            assert way.recv_sizes[first + receiver].reshape(n, -1)[sender, piece] == size
    return out


# Broken once each: buffers of half the capacity, a limit that drops nothing.
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("capacity", [1.0, 0.4])
def test_capacity_drops_the_same_in_every_strategy(strategy, capacity):
    """Buffers shrink with it, and still nothing is lost but what `limit` drops."""
    inputs = draw(5)
    inputs["logits"] = inputs["logits"].at[..., 1].add(2.0)
    got = run(inputs, shape=(2, 4, 1), dispatch="blocked", strategy=strategy, capacity=capacity)
    want = run(inputs, capacity=capacity, shards=8)
    assert_same(got, want)
    assert np.abs(want["y"] - run(inputs)["y"]).max() > 0.1


# Broken once by keeping earlier tokens before first choices.
def test_a_limit_drops_later_tokens_and_lesser_choices_and_counts_both_sides():
    """Two shards of four tokens, three slots: one slot takes ceil(0.5 · 4 · 2 / 3) = 2."""
    index = jnp.array([[[0, 1], [0, 1], [1, 0], [0, 2]], [[2, 1], [1, 2], [0, 1], [2, 3]]])
    weight = jnp.where(index < 3, jnp.array([0.6, 0.4]), 0.0)
    routing = router.Routing(index, weight, jnp.zeros((2, 4, 3)))
    limited, drops = jax.jit(functools.partial(moe.limit, capacity=0.5, shards=2))(routing)
    np.testing.assert_array_equal(
        limited.index_BTA,
        [[[0, 1], [0, 3], [1, 3], [3, 2]], [[2, 1], [1, 3], [0, 3], [2, 3]]],
    )
    np.testing.assert_array_equal(limited.weight_BTA > 0, limited.index_BTA < 3)
    np.testing.assert_array_equal(drops.lost_S, [3, 2])
    np.testing.assert_array_equal(drops.refused_E, [2, 2, 1])
    np.testing.assert_array_equal(drops.asked_E, [5, 6, 4])
    everything, none = moe.limit(routing, 3.0, 2)
    np.testing.assert_array_equal(everything.index_BTA, index)
    assert not np.any(none.lost_S)

# SPDX-License-Identifier: Apache-2.0
"""Properties that hold for every model: causality, symmetry of slots, weights, and exact opt-out.

Each test names the mutation that it was seen to fail on.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp
from reference import cases
from reference import numpy_olmo2 as ref

from flexolmo_jax import adapters, layers, model, router, tree
from flexolmo_jax.config import AdapterConfig

# Off TPU, ragged_dot becomes one masked matmul per slot, and 0 * NaN of a slot that a row denies is
# NaN. Finite contents are multiplied away exactly.
RAGGED_LEAKS = pytest.param(
    "ragged",
    marks=pytest.mark.xfail(
        jax.default_backend() != "tpu",
        reason="ragged_dot multiplies the rows of other slots by zero: NaN and Inf come through",
        raises=AssertionError,
    ),
)
# Tests of denied contents compile as users do; the others as `conftest.py` says.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
SUM_GATE = 1e-5  # float32 sums of a few weights, or of the same terms in another order
few = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
many = hypothesis.settings(max_examples=100, deadline=None, derandomize=True)


def apply(config, dispatch, params, tokens, segments, allowed):
    """Logits [B,T,V] and combine weights [L,B,T,E]."""
    out = model.forward(
        config,
        model.Runtime(dispatch=dispatch),
        params["shared"],
        (params["experts"],),
        tokens,
        segments_BT=segments,
        allowed_BE=allowed,
    )
    groups = (params["experts"],)
    return model.unembed(config, params["shared"], out.hidden_BTD, groups), out.combine_LBTE


_compiled = jax.jit(apply, static_argnums=(0, 1))
_compiled_as_users = jax.jit(apply, static_argnums=(0, 1), compiler_options=AS_USERS)


def run(*args, compiled=_compiled):
    """`apply`, compiled, as NumPy arrays."""
    return jax.tree.map(np.asarray, compiled(*args))


def setup(seed=0, **changes):
    config = cases.config_with(**changes)
    batch = cases.random_batch(config)
    return config, cases.random_params(config, seed), batch["tokens"], batch["segments"]


def with_experts(params, change):
    """`params` with `change(name, leaf)` applied to a copy of every leaf of the experts."""
    return {**params, "experts": {n: change(n, v.copy()) for n, v in params["experts"].items()}}


def poison(params, slot, value, seed=9):
    """Every leaf of one slot set to `value`, or to random numbers."""
    rng = np.random.default_rng(seed)

    def change(_, leaf):
        part = leaf[:, slot]
        leaf[:, slot] = 50 * rng.standard_normal(part.shape) if value == "random" else value
        return leaf

    return with_experts(params, change)


# --- Causality --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "dispatch"),
    [("token", "dense"), ("document", "blocked"), ("document", "ragged"), ("evidence", "dense")],
)
def test_causality_by_gradient(context, dispatch):
    """Mutations: mask without `tril`; mask without `same`; `document_mean` without restarts."""
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0]], np.int32)
    asked = {"evidence": 3.0, "parts": 2, "context": "document"} if context == "evidence" else {}
    config = cases.config_with(**{"context": context, **asked}, norm_placement="pre", n_active=3)
    params = cases.random_params(config)
    tokens = np.arange(10, dtype=np.int32)[None]  # All different: one embedding row per position.
    probe = np.random.default_rng(3).standard_normal(config.vocab_size).astype(np.float32)

    @jax.jit
    def gradient(at):
        def score(embedding):
            shared = {**params["shared"], "embed": {"embedding": embedding}}
            changed = {**params, "shared": shared}
            return apply(config, dispatch, changed, tokens, segments, None)[0][0, at] @ probe

        return jax.grad(score)(params["shared"]["embed"]["embedding"])

    for t in range(9):
        moved = np.abs(np.asarray(gradient(t))[:10]).max(axis=1)
        reach = (segments[0] == segments[0, t]) & (np.arange(10) <= t)
        np.testing.assert_array_equal(moved[~reach], 0.0)
        assert (moved[reach] > 0).all()


def test_a_document_does_not_see_its_neighbours():
    """Mutation: mask without `same`."""
    config, params, tokens, segments = setup(context="document", norm_placement="pre")
    packed, _ = run(config, "blocked", params, tokens, segments, None)
    alone = np.full_like(tokens[:1], 5), np.zeros_like(segments[:1])
    for b, first, last in ((0, 4, 7), (0, 7, 10), (2, 1, 6)):
        row, marks = alone[0].copy(), alone[1].copy()
        row[0, : last - first] = tokens[b, first:last]
        marks[0, : last - first] = 1
        single, _ = run(config, "blocked", params, row, marks, None)
        np.testing.assert_allclose(single[0, : last - first], packed[b, first:last], atol=1e-5)


@many
@hypothesis.given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(0, 3))
def test_positions_restart_with_each_document(lengths, padding):
    """Mutation: positions counted through the row, which relative RoPE would not show."""
    marks = np.repeat(np.arange(len(lengths)) + 1, lengths).tolist() + [0] * padding
    marks = np.pad(marks, (0, 40 - len(marks)))[None].astype(np.int32)
    expected, _ = ref.positions_of(marks[0])
    np.testing.assert_array_equal(layers.document_positions(jnp.asarray(marks))[0], expected)


# --- Router -----------------------------------------------------------------------------------

SLOTS = 4
LOGITS = hnp.arrays(np.float32, (1, 3, SLOTS), elements=st.floats(-1e4, 1e4, width=32))
WHOLE_LOGITS = hnp.arrays(np.float32, (1, 3, SLOTS), elements=st.integers(-3, 3).map(float))
ALLOWED = hnp.arrays(bool, (1, SLOTS)).filter(np.any)


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def route(logits, k, allowed, renormalize, fallback):
    return router.route(logits, k, allowed_BE=allowed, renormalize=renormalize, fallback=fallback)


@many
@hypothesis.given(LOGITS, ALLOWED, st.integers(1, SLOTS), st.booleans(), st.booleans())
def test_combine_weights_are_a_part_of_a_distribution(logits, allowed, k, renormalize, fallback):
    """Mutations: no division when renormalising; `usable` always true."""
    routing = route(logits, k, allowed, renormalize, fallback)
    combine, index = np.asarray(routing.combine_BTE), np.asarray(routing.index_BTA)
    active = min(k, int(allowed.sum()))
    assert (combine >= 0).all() and (combine[:, :, ~allowed[0]] == 0).all()
    served = np.where(index < SLOTS, index, 0)
    assert ((index == SLOTS) | allowed[0][served]).all()
    assert ((index < SLOTS).sum(axis=-1) == active).all()
    assert all(len(set(row[:active])) == active for row in index[0].tolist())
    total = combine.sum(axis=-1)
    assert (total <= 1 + SUM_GATE).all()
    if renormalize or active == allowed.sum() or (fallback and allowed[0, 0]):
        np.testing.assert_allclose(total, 1.0, atol=SUM_GATE)


@many
@hypothesis.given(WHOLE_LOGITS, ALLOWED, st.integers(1, SLOTS), st.booleans(), st.booleans())
def test_selection_and_ties_equal_the_reference(logits, allowed, k, renormalize, fallback):
    """Mutations: ties to the upper slot (top-k of the reversed axis); public not always active;
    public keeps its own probability."""
    got = np.asarray(route(logits, k, allowed, renormalize, fallback).combine_BTE)[0]
    expected = ref.combine_weights(
        logits[0].astype(float),
        np.eye(SLOTS),
        np.full(SLOTS, -1e4),
        allowed[0],
        np.ones(3, int),
        k=k,
        context="token",
        renormalize=renormalize,
        fallback=fallback,
    )
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@many
@hypothesis.given(hnp.arrays(np.float32, (5,), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_effective_bias_is_never_above_zero(raw):
    """Mutations: the raw value itself; slot 0 not fixed."""
    bias = np.asarray(router.effective_bias(jnp.asarray(raw)))
    assert np.isfinite(bias).all() and (bias <= 0).all() and bias[0] == 0


def test_bias_can_always_learn_and_can_be_none():
    """Mutation: min(raw, 0), whose gradient is 0 above 0."""
    raw = jnp.linspace(-20.0, 20.0, 9)
    slope = jax.grad(lambda r: router.effective_bias(r).sum())(raw)
    assert slope[0] == 0 and (slope[1:] < 0).all()
    assert (router.effective_bias(jnp.full(3, model.NO_BIAS)) == 0).all()


# --- Symmetry of slots ------------------------------------------------------------------------


def permuted(params, order):
    return with_experts(params, lambda _, leaf: leaf[:, list(order)])


@few
@hypothesis.given(st.permutations([1, 2, 3]), st.sampled_from(["pre", "post"]))
def test_permuting_experts_with_their_rows_changes_nothing(order, placement):
    """Mutation: slot 1 weighted with the combine weight of slot 0."""
    # Slot 0 stays: the public expert alone has no bias.
    order = [0, *order]
    config, params, tokens, segments = setup(norm_placement=placement)
    logits, combine = run(config, "dense", params, tokens, segments, None)
    other, moved = run(config, "dense", permuted(params, order), tokens, segments, None)
    np.testing.assert_allclose(other, logits, atol=1e-5)
    np.testing.assert_allclose(moved, combine[..., order], atol=1e-5)


IDENTICAL = [
    {"norm_placement": "post", "n_active": 2},
    {"norm_placement": "post", "n_active": 1},
    {"norm_placement": "pre", "n_active": 2},
    {"norm_placement": "pre", "n_active": 1, "renormalize": True},
]


@pytest.mark.parametrize("changes", IDENTICAL, ids=str)
def test_two_identical_experts_equal_the_dense_anchor(changes):
    """Mutation: no division when renormalising."""
    config, params, tokens, segments = setup(n_slots=2, **changes)

    def same_ffn(name, leaf):
        if name.startswith("w_"):
            leaf[:, 1] = leaf[:, 0]
        return leaf

    params = with_experts(params, same_ffn)
    anchor = with_experts(params, lambda _, leaf: leaf[:, :1])
    dense = config.replace(n_slots=1, n_active=1)
    expected, _ = run(dense, "dense", anchor, tokens, segments, None)
    got, _ = run(config, "dense", params, tokens, segments, None)
    # Post-norm with one of two active scales the mixture by p; the norm divides it out but for eps.
    np.testing.assert_allclose(got, expected, atol=2e-5)


# --- Opt-out ----------------------------------------------------------------------------------

# Experts that hold more than FFNs.
MORE = {
    "adapters": AdapterConfig(attention=2, head=2, norms=True),
    "context": "document",
    "evidence": 3.0,
    "parts": 2,
}
NON_FINITE = [np.nan, np.inf, -np.inf]
MIXED = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 0, 0]], bool)  # Row 1 uses slot 2.
DENYING = np.array([0, 2])


def check_denial(dispatch, fills, **changes):
    """Rows that deny slot 2 keep every bit, whatever it holds; the row that uses it notices."""
    config, params, tokens, segments = setup(**changes)
    run_ = functools.partial(run, compiled=_compiled_as_users)
    filled, _ = run_(config, dispatch, params, tokens, segments, MIXED)
    assert np.isfinite(filled).all()
    for fill in fills:
        other, _ = run_(config, dispatch, poison(params, 2, fill), tokens, segments, MIXED)
        np.testing.assert_array_equal(other[DENYING], filled[DENYING], err_msg=str(fill))
        assert not np.array_equal(other[1], filled[1])


@pytest.mark.parametrize("dispatch", ["dense", "blocked", "used", "ragged"])
def test_a_denied_slot_is_an_empty_slot(dispatch):
    """An empty slot holds zeros. Mutation: softmax over all slots."""
    check_denial(dispatch, [0.0, "random"])


@pytest.mark.parametrize("dispatch", ["dense", "blocked", "used", RAGGED_LEAKS])
def test_a_denied_slot_may_hold_anything(dispatch):
    """Mutations: `logits + where(allowed, 0, -inf)` in place of selection; `_dense` multiplying by
    the weight without `where`, and so `_used`.
    """
    check_denial(dispatch, NON_FINITE)


@pytest.mark.parametrize("dispatch", ["dense", "blocked"])
def test_a_denied_slot_may_hold_anything_in_document_context(dispatch):
    """Mutation: `usable` always true; here k exceeds what the last row allows."""
    check_denial(dispatch, [np.nan, 0.0], norm_placement="pre", context="document", n_active=3)


@pytest.mark.parametrize("dispatch", ["dense", "blocked", "used"])
def test_a_denied_slot_may_hold_anything_where_public_takes_the_rest(dispatch):
    """Mutation: softmax over all slots, which leaves a denied one's weight to public."""
    check_denial(dispatch, [np.nan, 0.0], context="document", fallback=True)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_denied_slot_may_hold_anything_beyond_its_ffn(placement):
    """Mutations: `adapters.project` without its last selection; `adapters.scale` without any."""
    check_denial("dense", [*NON_FINITE, 0.0], **{**MORE, "norm_placement": placement})


@few
@hypothesis.given(
    hnp.arrays(bool, (3, SLOTS)).filter(lambda a: a.any(axis=1).all()), st.integers(0, SLOTS - 1)
)
def test_any_pattern_of_denial_is_exact(allowed, slot):
    """Mutation: `usable` always true."""
    config, params, tokens, segments = setup(n_active=3)
    denying = ~allowed[:, slot]
    for dispatch in ("dense", "blocked"):
        clean, _ = run(config, dispatch, params, tokens, segments, allowed)
        bad, _ = run(config, dispatch, poison(params, slot, np.nan), tokens, segments, allowed)
        np.testing.assert_array_equal(bad[denying], clean[denying])


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(config, dispatch, params, tokens, segments, allowed, rows):
    """Gradient of the summed log-probabilities of the tokens, over `rows` only."""

    def score(p):
        logits, _ = apply(config, dispatch, p, tokens, segments, allowed)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
        return jnp.sum(jnp.where(rows[:, None] & (segments > 0), picked[..., 0], 0.0))

    return jax.grad(score)(params)


def others(grads, slot):
    """Gradients without those of one slot."""
    kept = np.arange(grads["experts"]["bias"].shape[1]) != slot
    experts = {name: np.asarray(leaf)[:, kept] for name, leaf in grads["experts"].items()}
    return tree.flatten({"shared": grads["shared"], "experts": experts})


@pytest.mark.parametrize("more", [{}, MORE], ids=str)
@pytest.mark.parametrize("dispatch", ["dense", "blocked"])
def test_a_slot_that_all_rows_deny_changes_no_gradient(dispatch, more):
    """Mutations: `router_ED` of unused slots not cleared; `_dense` without the inner `where`."""
    config, params, tokens, segments = setup(norm_placement="pre", n_active=3, **more)
    allowed, rows = np.array([[1, 1, 0, 1]] * 3, bool), np.ones(3, bool)
    args = (tokens, segments, allowed, rows)
    clean = others(gradients(config, dispatch, params, *args), 2)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in clean.values())
    for fill in (np.nan, "random"):
        got = others(gradients(config, dispatch, poison(params, 2, fill), *args), 2)
        for name, leaf in clean.items():
            np.testing.assert_array_equal(got[name], leaf, err_msg=f"{name} {fill}")


def test_a_slot_that_all_rows_deny_enters_no_loss_of_the_router():
    """Losses read the logits of every slot. Mutation: evidence of unused slots not cleared."""
    config, params, tokens, segments = setup(n_active=3, **MORE)

    def logits(params):
        return model.forward(
            config,
            model.Runtime(dispatch="dense"),
            params["shared"],
            (params["experts"],),
            tokens,
            segments_BT=segments,
            allowed_BE=np.array([[1, 1, 0, 1]] * 3, bool),
        ).router_logits_LBTE

    clean, spoilt = logits(params), logits(poison(params, 2, np.nan))
    assert np.isfinite(clean).all()
    np.testing.assert_array_equal(spoilt, clean)


@pytest.mark.parametrize("dispatch", ["dense", "blocked"])
def test_denying_rows_of_a_mixed_batch_keep_their_gradient(dispatch):
    """A loss over the denying rows only, while another row of the batch uses the slot.

    Holds for finite contents only: a NaN router row meets the zero gradient of its logits in one
    product over all rows. Mutation: softmax over all slots.
    """
    config, params, tokens, segments = setup(norm_placement="pre", n_active=3)
    args = (tokens, segments, MIXED, ~MIXED[:, 2])
    clean = others(gradients(config, dispatch, params, *args), 2)
    got = others(gradients(config, dispatch, poison(params, 2, "random"), *args), 2)
    for name, leaf in clean.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)


@pytest.mark.parametrize("dispatch", ["dense", "blocked"])
def test_more_active_than_allowed_clamps(dispatch):
    """Mutation: `usable` always true."""
    allowed = np.array([[1, 0, 1, 0]] * 3, bool)
    config, params, tokens, segments = setup(norm_placement="pre", n_active=2)
    params = poison(poison(params, 1, np.nan), 3, np.nan)
    two, _ = run(config, dispatch, params, tokens, segments, allowed)
    four, combine = run(config.replace(n_active=4), dispatch, params, tokens, segments, allowed)
    np.testing.assert_allclose(four, two, atol=1e-6)
    assert ((combine > 0).sum(axis=-1) == 2).all()


@pytest.mark.parametrize("more", [{}, MORE], ids=str)
def test_only_the_public_expert_left_is_the_anchor(more):
    """Mutations: softmax over all slots (pre-norm: the sum of the weights shows); `adapters` that
    reads slot 0.
    """
    config, params, tokens, segments = setup(norm_placement="pre", n_active=2, **more)
    allowed = np.array([[1, 0, 0, 0]] * 3, bool)
    got, _ = run(config, "dense", params, tokens, segments, allowed)
    # The public expert adds nothing.
    anchor = with_experts(params, lambda name, x: x[:, :1] * (name not in adapters.LEAVES))
    dense = config.replace(n_slots=1, n_active=1)
    expected, _ = run(dense, "dense", anchor, tokens, segments, None)
    np.testing.assert_allclose(got, expected, atol=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""Bits per byte against hand arithmetic; one program for all allowed sets; half precision."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from flexolmo_jax import evaluate, loss, model, optim, stages, step, tree
from flexolmo_jax.config import OptimConfig, RouterConfig
from flexolmo_jax.errors import DataError

RUN = model.Runtime("blocked")
BYTES = np.arange(96) % 7


def numpy_batch(**kwargs):
    return {k: np.asarray(v) for k, v in toy.batch(**kwargs).items()}


def score(params, batch, allowed=None, n_active=None):
    return evaluate.score_text(
        toy.CONFIG,
        RUN,
        params["shared"],
        (params["experts"],),
        [batch],
        BYTES,
        allowed=allowed,
        n_active=n_active,
    )


# Broken once by counting the bytes of the inputs instead of the targets.
def test_bits_per_byte_by_hand():
    params, batch = toy.params(), numpy_batch()
    got = score(params, batch)
    out = model.forward(
        toy.CONFIG,
        RUN,
        params["shared"],
        (params["experts"],),
        batch["tokens"],
        segments_BT=jnp.asarray(batch["segments"]),
    )
    logits = np.asarray(model.unembed(toy.CONFIG, params["shared"], out.hidden_BTD), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    mask = batch["loss_mask"]
    want = -picked[mask].sum() / np.log(2) / BYTES[batch["targets"][mask]].sum()
    assert got.bits_per_byte == pytest.approx(want, rel=1e-5)
    assert got.tokens == mask.sum()
    # Each token is served by two of the four slots, and the mixture's weights sum to one.
    np.testing.assert_array_equal(got.load_LE.sum(1), 2 * mask.sum())
    np.testing.assert_allclose(got.weight_LE.sum(1), mask.sum(), rtol=1e-5)


def test_pieces_of_documents_carry_the_standard_error():
    params, batch = toy.params(), numpy_batch(rows=6)
    got = score(params, batch)
    nats, size = np.array(got.nats), np.array(got.bytes)
    assert len(nats) == 12  # two documents in each of six rows
    resampled = []
    rng = np.random.default_rng(0)
    for _ in range(2000):
        pick = rng.integers(0, len(nats), len(nats))
        resampled.append(nats[pick].sum() / np.log(2) / size[pick].sum())
    assert got.stderr == pytest.approx(np.std(resampled), rel=0.25)


# Broken once by deriving the static `n_active` from the allowed set: a program per number of slots.
def test_one_program_serves_every_allowed_set():
    params, batch = toy.params(), numpy_batch()
    before = evaluate.score_batch._cache_size()
    values = set()
    for rest in itertools.product([False, True], repeat=3):
        values.add(round(score(params, batch, allowed=[True, *rest]).bits_per_byte, 9))
    assert evaluate.score_batch._cache_size() <= before + 1
    assert len(values) > 4


@pytest.mark.parametrize(("placement", "same"), [("post", True), ("pre", False)])
def test_renormalising_matters_under_pre_norm_only(placement, same):
    """Post-norm divides the total weight out again, up to its epsilon, which is made small here."""
    c = toy.config(norm_placement=placement, n_active=2, norm_eps=1e-14)
    params, batch = toy.params(c), toy.batch()
    logits = []
    for renormalize in (False, True):
        switched = dataclasses.replace(c, router=RouterConfig("document", renormalize))
        out = model.forward(
            switched,
            RUN,
            params["shared"],
            (params["experts"],),
            batch["tokens"],
            segments_BT=batch["segments"],
        )
        logits.append(np.asarray(model.unembed(c, params["shared"], out.hidden_BTD)))
    difference = np.abs(logits[0] - logits[1])[np.asarray(batch["segments"]) > 0].max()
    assert (difference < 1e-3) == same


def test_half_precision_computes_and_float32_trains():
    """Activations in bfloat16; parameters, gradients, moments and the loss stay float32."""
    c = toy.config(n_slots=1, n_active=1)
    params, batch = toy.params(c), toy.batch()
    trainable, frozen = stages.split("anchor", params)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = model.Runtime("dense", compute_dtype=dtype)
        out = model.forward(c, run, params["shared"], (params["experts"],), batch["tokens"])
        assert out.hidden_BTD.dtype == dtype and out.router_logits_LBTE.dtype == jnp.float32
        nll, _ = loss.token_losses(c, run, params["shared"], out.hidden_BTD, batch["targets"])
        assert nll.dtype == jnp.float32
        losses[dtype] = float(nll.mean())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    config = OptimConfig(total_steps=4, warmup_steps=1)
    optimizer = optim.make_optimizer(config, trainable)
    state = {"params": trainable, "opt": optimizer.init(trainable), "step": jnp.int32(0)}
    train = jax.jit(functools.partial(step.train_step, c, run, "anchor", config, optimizer))
    state, _ = train(state, frozen, batch)
    state, metrics = train(state, frozen, batch)
    assert not metrics["skipped"]
    for name, leaf in tree.flatten(state["params"]).items():
        assert leaf.dtype == jnp.float32, name
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state["opt"]))


def test_one_piece_has_no_standard_error_and_none_no_figure():
    one = evaluate.Score(nats=[3.0], bytes=[4], tokens=2)
    assert one.stderr is None and one.bits_per_byte == pytest.approx(3 / np.log(2) / 4)
    with pytest.raises(DataError, match="nothing to predict"):
        evaluate.Score().bits_per_byte  # noqa: B018

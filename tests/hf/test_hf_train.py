# SPDX-License-Identifier: Apache-2.0
"""Ten steps of AdamW on both sides, and the most likely continuation of prompts.

Mutations seen to fail: weight decay of the embedding; no clipping; a schedule one step late; b2 as
b1; a step divided by another number of tokens (in the gradient's norm, which clipping hides).
"""

import functools
import math

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import ours
import pytest

from flexolmo_jax import optim, stages, step, tree
from flexolmo_jax.config import OptimConfig
from flexolmo_jax.interop import hf_names

pytest.importorskip("torch")
pytest.importorskip("transformers")

# Largest seen with transformers 5.23.0 and 4.57.6: losses 2.4e-6, logits 6.3e-5, weights 4.6e-6.
LOSSES, FINAL_LOGITS, WEIGHTS, NORMS = 1e-4, 5e-3, 5e-5, 1e-4
STEPS = 10
# Warmup, cosine, decay and clipping all take part: the gradient's norm is above 1 in every step.
OPTIM = OptimConfig(
    peak_lr=2e-3,
    total_steps=14,
    warmup_steps=3,
    final_lr_frac=0.1,
    weight_decay=0.5,
    clip_norm=0.5,
    z_loss=0.0,
)
# Least lead of a greedy token's logit over the next: a thousand times the difference of logits.
GREEDY_LEAD = 1e-2
CASES = list(hf_models.CASES)


def rate(done: int) -> float:
    """Learning rate of the step after `done` steps, as a share of the peak."""
    if done < OPTIM.warmup_steps:
        return done / OPTIM.warmup_steps
    share = (done - OPTIM.warmup_steps) / (OPTIM.total_steps - OPTIM.warmup_steps)
    floor = OPTIM.final_lr_frac
    return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2


def decays(name: str) -> bool:
    """Weight decay is for matrices, the router and the embedding left out."""
    return not name.endswith(("norm.weight", "embed_tokens.weight", ".gate.weight"))


def their_steps(pair, folder, *, router: bool):
    """(losses, norms) of ten steps, logits and leaves after them; the pair stays as it was."""
    torch, hf = hf_models.torch(), hf_models.load(pair.folder)
    trained = {True: [], False: []}
    for name, p in hf.named_parameters():
        # No model of ours has a bias in a projection.
        fixed = name.endswith(".bias") or (not router and name.endswith(".gate.weight"))
        p.requires_grad_(not fixed)
        if not fixed:
            trained[decays(name)].append(p)
    groups = [
        {"params": trained[True], "weight_decay": OPTIM.weight_decay},
        {"params": trained[False], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=OPTIM.peak_lr, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps
    )
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses, norms = [], []
    for tokens, mask in batches(pair):
        optimizer.zero_grad()
        loss = hf(**hf_models.inputs_of(tokens, mask), use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained[True] + trained[False], OPTIM.clip_norm)
        assert float(norm) > 2 * OPTIM.clip_norm
        norms.append(float(norm))
        optimizer.step()
        plan.step()
        losses.append(float(loss.detach()))
    final = hf_models.compute(hf, pair.tokens, hf_models.mask_of(False)).logits_BTV
    return (losses, norms), final, pair.leaves(hf_models.state_of(hf, folder))


def batches(pair):
    """Two batches in turn, the second one padded."""
    other = hf_models.tokens_of(pair.case, 2 * hf_models.ROWS)[hf_models.ROWS :]
    both = [(pair.tokens, hf_models.mask_of(False)), (other, hf_models.mask_of(True))]
    return [both[i % 2] for i in range(STEPS)]


def our_steps(pair):
    """Losses of ten steps over every leaf, and the parameters after them."""
    params = jax.tree.map(jnp.asarray, pair.params)
    optimizer = optim.make_optimizer(OPTIM, params)

    @jax.jit
    def apply(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    losses, state = [], optimizer.init(params)
    for tokens, mask in batches(pair):
        (loss, _), grads = ours.value_and_gradients(
            pair.config, ours.RUN, params, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
        )
        params, state = apply(params, state, grads)
        losses.append(float(loss))
    return losses, params


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_of_adamw(name, pair_of, close, tmp_path):
    pair = pair_of(name)
    (want, _), final, leaves = their_steps(pair, tmp_path, router=True)
    got, params = our_steps(pair)
    close("losses of ten steps", got, want, LOSSES)
    assert want[-2] < want[0] - 0.2  # The weights have moved far.
    flat = tree.flatten(params)
    for leaf in leaves:
        if leaf != hf_names.ROUTER_LEAF or pair.config.n_slots > 1:
            start = np.asarray(tree.flatten(pair.params)[leaf])
            assert np.abs(leaves[leaf] - start).max() > 1e-3, leaf
            close("weights after ten steps", flat[leaf], leaves[leaf], WEIGHTS)
    again = ours.compute(pair.config, params, pair.tokens, hf_models.mask_of(False))
    close("logits after ten steps", again.logits_BTV, final, FINAL_LOGITS)


@pytest.mark.parametrize("name", ["olmo2 tied, wide heads", "llama, one kv head, wide heads"])
def test_our_own_training_step(name, pair_of, close, tmp_path):
    # The same through `step.train_step`, which splits off what it does not train.
    pair = pair_of(name)
    (want, wanted_norms), _, _ = their_steps(pair, tmp_path, router=False)
    trainable, frozen = stages.split("anchor", jax.tree.map(jnp.asarray, pair.params))
    optimizer = optim.make_optimizer(OPTIM, trainable)
    state = {"params": trainable, "opt": optimizer.init(trainable), "step": jnp.int32(0)}
    one = jax.jit(
        functools.partial(step.train_step, pair.config, ours.RUN, "anchor", OPTIM, optimizer)
    )
    losses, norms = [], []
    for tokens, mask in batches(pair):
        labels = np.roll(hf_models.labels_of(tokens, mask), -1, axis=1)
        labels[:, -1] = -100
        batch = {
            "tokens": jnp.asarray(tokens, jnp.int32),
            "targets": jnp.asarray(np.maximum(labels, 0), jnp.int32),
            "segments": jnp.asarray(mask, jnp.int32),
            "loss_mask": jnp.asarray(labels >= 0),
            "own": jnp.asarray(mask, bool),
        }
        state, metrics = one(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    close("losses of train_step", losses, want, LOSSES)
    close("norms of train_step", norms, wanted_norms, NORMS)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(name, pair_of):
    pair = pair_of(name)
    prompts = hf_models.prompts_of(pair.tokens)
    want, lead = hf_models.greedy(pair.hf, prompts)
    assert lead > GREEDY_LEAD
    assert len(want[0]) == hf_models.NEW_TOKENS
    assert ours.greedy(pair.config, pair.params, prompts, hf_models.NEW_TOKENS) == want

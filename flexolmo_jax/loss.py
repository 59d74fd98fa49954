# SPDX-License-Identifier: Apache-2.0
"""Next-token loss in float32, a few positions at a time so that full logits never exist at once.

On a mesh every device takes its own rows: the unembedding is gathered once before the first chunk
and its gradient is summed over devices once after the last, however many chunks there are. The
compiler, left to itself, does both for each chunk.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from flexolmo_jax import model, tree
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.mesh import BATCH_AXES
from flexolmo_jax.sharding import PARAM_RULES, spec_for

# Tokens of a device whose logits exist at once where `Runtime.loss_chunk` leaves it open: enough
# for a product with the unembedding to be bound by arithmetic, not by reading it.
DEVICE_TOKENS = 2048


def token_losses(
    config: ModelConfig,
    run: model.Runtime,
    shared: tree.Tree,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    groups: Sequence[tree.Tree] = (),
) -> tuple[jax.Array, jax.Array]:
    """Per position: negative log-likelihood of the target in nats, and logsumexp(logits)^2.

    The backward pass recomputes each chunk's logits instead of keeping them; where a row is one
    chunk, all logits exist at once anyway and it uses them.

    Args:
      groups: the experts; they only matter where they add to the unembedding.

    Shapes:
      both [B, T], float32.
    """
    weights = model.unembedding(config, shared, groups)
    weights = tuple(w.astype(hidden_BTD.dtype) for w in weights)
    if run.mesh is None or run.mesh.size == 1:
        return _chunked(run.loss_chunk, None, hidden_BTD, weights, targets_BT)
    embed, vocab = spec_for(("embed", "vocab"), weights[0].shape, run.mesh, PARAM_RULES)

    def device(hidden_BTD, weights, targets_BT):
        if embed is not None:
            w_DV = jax.lax.all_gather(weights[0], embed, axis=0, tiled=True)
            weights = (w_DV, *weights[1:])
        return _chunked(run.loss_chunk, vocab, hidden_BTD, weights, targets_BT)

    specs = (PartitionSpec(embed, vocab), *(PartitionSpec(None, vocab) for _ in weights[1:]))
    rows = PartitionSpec(BATCH_AXES)
    nll_BT, z_BT = jax.shard_map(
        device,
        mesh=run.mesh,
        in_specs=(rows, specs, rows),
        out_specs=(rows, rows),
        check_vma=False,
    )(hidden_BTD, weights, targets_BT)
    return nll_BT, z_BT


def _chunked(chunk: int, vocab_axis, hidden_BTD, weights, targets_BT) -> Any:
    """`token_losses` of the rows of one device; 0 chooses the chunk."""
    B, T = targets_BT.shape
    most = chunk or max(1, DEVICE_TOKENS // B)
    chunk = max(c for c in range(1, min(most, T) + 1) if T % c == 0)
    if chunk == T:
        return _losses(vocab_axis, hidden_BTD, weights, targets_BT)

    def chunks(x):
        return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)

    def one(args):
        return _losses(vocab_axis, args[0], weights, args[1])

    nll, z = jax.lax.map(one, (chunks(hidden_BTD), chunks(targets_BT)))
    return jnp.moveaxis(nll, 0, 1).reshape(B, T), jnp.moveaxis(z, 0, 1).reshape(B, T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(vocab_axis, hidden_BCD, weights, target_BC) -> Any:
    """`token_losses` of one chunk; a mesh axis may hold the columns of the unembedding."""
    return _losses_forward(vocab_axis, hidden_BCD, weights, target_BC)[0]


def _losses_forward(vocab_axis, hidden_BCD, weights, target_BC):
    logits_BCV = model.logits(hidden_BCD, weights)
    if vocab_axis is None:
        logsumexp_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        picked_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
    else:
        top_BC = jax.lax.pmax(jnp.max(logits_BCV, axis=-1), vocab_axis)
        total_BC = jnp.sum(jnp.exp(logits_BCV - top_BC[..., None]), axis=-1)
        logsumexp_BC = top_BC + jnp.log(jax.lax.psum(total_BC, vocab_axis))
        hit_BCV = _hit(vocab_axis, logits_BCV, target_BC)
        picked_BC = jax.lax.psum(jnp.sum(jnp.where(hit_BCV, logits_BCV, 0), -1), vocab_axis)
    losses = logsumexp_BC - picked_BC, jnp.square(logsumexp_BC)
    return losses, (hidden_BCD, weights, target_BC, logsumexp_BC)


def _losses_backward(vocab_axis, saved, d_losses):
    """One pass over the logits, where autodiff would scatter into a tensor of their size."""
    hidden_BCD, weights, target_BC, logsumexp_BC = saved
    if vocab_axis is not None:  # Each device of the axis is handed an equal part of the gradient.
        d_losses = jax.lax.psum(d_losses, vocab_axis)
    d_nll_BC, d_z_BC = d_losses
    logits_BCV = model.logits(hidden_BCD, weights)
    probs_BCV = jnp.exp(logits_BCV - logsumexp_BC[..., None])
    scale_BC = d_nll_BC + 2 * d_z_BC * logsumexp_BC
    hit_BCV = _hit(vocab_axis, logits_BCV, target_BC)
    d_logits_BCV = probs_BCV * scale_BC[..., None] - jnp.where(hit_BCV, d_nll_BC[..., None], 0.0)
    d_logits_BCV = d_logits_BCV.astype(hidden_BCD.dtype)
    d_hidden_BCD = [jnp.einsum("BCV,DV->BCD", d_logits_BCV, w_DV) for w_DV in weights]
    ends = np.cumsum([len(w) for w in weights])[:-1]
    d_weights = tuple(
        jnp.einsum("BCD,BCV->DV", part_BCD, d_logits_BCV)
        for part_BCD in jnp.split(hidden_BCD, ends, axis=-1)
    )
    no_gradient = np.zeros(target_BC.shape, jax.dtypes.float0)
    return jnp.concatenate(d_hidden_BCD, axis=-1), d_weights, no_gradient


def _hit(vocab_axis, logits_BCV: jax.Array, target_BC: jax.Array) -> jax.Array:
    """[B, C, V]: the column is the target's."""
    n_columns = logits_BCV.shape[-1]
    columns = jnp.arange(n_columns)
    if vocab_axis is not None:
        columns += jax.lax.axis_index(vocab_axis) * n_columns
    return target_BC[..., None] == columns


_losses.defvjp(_losses_forward, _losses_backward)

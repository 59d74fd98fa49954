# SPDX-License-Identifier: Apache-2.0
"""Causal attention inside documents, tile by tile: the scores of a tile stay in a core's cache.

`layers.attention` makes all scores at once, which suits a machine with wide memory. On CPU those
tensors go through memory several times; here a tile of queries of one row and one kv head is
finished before the next begins, keys after the tile are never multiplied, and the backward pass
makes the weights again from their logarithmic sum instead of keeping them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from flexolmo_jax import layers
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.sharding import ACTIVATION_RULES, spec_for

# Queries of a tile: with a few heads and some hundred keys their scores fit a second-level cache.
TILE = 128
# Tiles are unrolled, so a long row has larger ones instead of more.
MAX_TILES = 8


def resolve(attention: str, platform: str) -> str:
    """What "auto" stands for: "tiled" on CPU, "splash" on TPU, else "whole".

    Raises:
      ConfigError: the TPU kernel on another platform.
    """
    if attention == "splash" and platform != "tpu":
        raise ConfigError(
            "The splash kernel runs on TPU only",
            got=f"exec.attention=splash on {platform}",
            fix="use exec.attention=auto, whole or tiled",
        )
    if attention != "auto":
        return attention
    return {"cpu": "tiled", "tpu": "splash"}.get(platform, "whole")


def tiled(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`layers.attention` under `layers.causal_document_mask`, S equal to T.

    Args:
      mesh: each device takes the rows and the kv heads that it holds.

    Shapes:
      returns [B, T, N, H].
    """
    if mesh is None or mesh.size == 1:
        return _tiled(q_BTNH, k_BSKH, v_BSKH, segments_BT)
    heads = spec_for(("batch", "seq", "kv_heads", "head_dim"), k_BSKH.shape, mesh, ACTIVATION_RULES)
    return jax.shard_map(
        _tiled,
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec(*heads[:2])),
        out_specs=heads,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, segments_BT)


@jax.custom_vjp
def _tiled(q_BTNH, k_BSKH, v_BSKH, segments_BT):
    return _forward(q_BTNH, k_BSKH, v_BSKH, segments_BT)[0]


def _forward(q_BTNH, k_BSKH, v_BSKH, segments_BT):
    T = q_BTNH.shape[1]
    K = k_BSKH.shape[2]
    heads = tuple(_by_head(x, K) for x in (q_BTNH, k_BSKH, v_BSKH))

    def row(args):
        mask_TS = layers.causal_document_mask(args[-1][None])[0]
        return jax.lax.map(functools.partial(_forward_head, mask_TS), args[:-1])

    out, logsum = jax.lax.map(row, (*heads, segments_BT))
    return _from_heads(out, T), (*heads, segments_BT, out, logsum)


def _backward(saved, d_out_BTNH):
    *heads, segments_BT, out, logsum = saved
    B, T = segments_BT.shape
    K = heads[0].shape[1]

    def row(args):
        mask_TS = layers.causal_document_mask(args[-1][None])[0]
        return jax.lax.map(functools.partial(_backward_head, mask_TS), args[:-1])

    args = (*heads, out, logsum, _by_head(d_out_BTNH, K), segments_BT)
    grads = (_from_heads(x, T) for x in jax.lax.map(row, args))
    return *grads, np.zeros((B, T), jax.dtypes.float0)


_tiled.defvjp(_forward, _backward)


def _by_head(x_BTNH: jax.Array, K: int) -> jax.Array:
    """[B, K, T·G, H]: the G query heads of a kv head side by side, a tile in one piece."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, T * N // K, H)


def _from_heads(x: jax.Array, T: int) -> jax.Array:
    """Exact inverse of `_by_head`."""
    B, K, _, H = x.shape
    return x.reshape(B, K, T, -1, H).swapaxes(1, 2).reshape(B, T, -1, H)


def _tiles(T: int, G: int):
    """(first query, past the last, their rows among the T·G)."""
    size = max(TILE, -(-T // MAX_TILES))
    for start in range(0, T, size):
        end = min(start + size, T)
        yield start, end, slice(start * G, end * G)


def _scores(q_RH: jax.Array, k_SH: jax.Array, mask_CS: jax.Array) -> jax.Array:
    """Scaled, masked scores [C, G, S] of the C·G rows of a tile."""
    scores_RS = jnp.matmul(q_RH, k_SH.T, preferred_element_type=jnp.float32)
    scores = scores_RS.reshape(mask_CS.shape[0], -1, mask_CS.shape[1])
    return jnp.where(mask_CS[:, None], scores * q_RH.shape[-1] ** -0.5, layers.NEG_INF)


def _forward_head(mask_TS, args):
    """Output [T·G, H] of one kv head of one row, and the log of each query's sum [T, G]."""
    q, k, v = args
    T = mask_TS.shape[0]
    outs, logsums = [], []
    for start, end, rows in _tiles(T, q.shape[0] // T):
        scores = _scores(q[rows], k[:end], mask_TS[start:end, :end])
        # A padding token sees nothing: give its row a finite softmax instead of NaN.
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), -1e30)
        weights = jnp.exp(scores - top)
        total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
        weights = weights.reshape(-1, end).astype(v.dtype)
        out = jnp.matmul(weights, v[:end], preferred_element_type=jnp.float32)
        outs.append((out / total.reshape(-1, 1)).astype(q.dtype))
        logsums.append((top + jnp.log(total))[..., 0])
    return jnp.concatenate(outs), jnp.concatenate(logsums)


def _backward_head(mask_TS, args):
    """Gradients of q, k and v of one kv head of one row."""
    q, k, v, out, logsum, d_out = args
    T = mask_TS.shape[0]
    dq = []
    # Transposed, so that the large factor of no product is: XLA multiplies those slowly on CPU.
    dk_HS, dv_HS = jnp.zeros(k.T.shape, jnp.float32), jnp.zeros(v.T.shape, jnp.float32)
    for start, end, rows in _tiles(T, q.shape[0] // T):
        scores = _scores(q[rows], k[:end], mask_TS[start:end, :end])
        weights = jnp.exp(scores - logsum[start:end, :, None]).reshape(-1, end)
        d_weights = jnp.matmul(d_out[rows], v[:end].T, preferred_element_type=jnp.float32)
        own = jnp.sum((d_out[rows] * out[rows]).astype(jnp.float32), axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - own) * q.shape[-1] ** -0.5).astype(q.dtype)
        weights = weights.astype(v.dtype)
        dv_tile = jnp.matmul(d_out[rows].T, weights, preferred_element_type=jnp.float32)
        dk_tile = jnp.matmul(q[rows].T, d_scores, preferred_element_type=jnp.float32)
        dv_HS, dk_HS = dv_HS.at[:, :end].add(dv_tile), dk_HS.at[:, :end].add(dk_tile)
        dq.append(d_scores @ k[:end])
    return jnp.concatenate(dq), dk_HS.T.astype(k.dtype), dv_HS.T.astype(v.dtype)

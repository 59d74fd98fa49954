# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the OLMo 2 block as pure functions of arrays.

Arrays end in their dimensions, and einsums use the same letters:
B batch, T query position, S key position, D embed, N heads, K kv heads, H head dim, F ffn,
E slots, A active experts, L layers, V vocab, M = B·T tokens, R rows of a block.
"""

import jax
import jax.numpy as jnp

from flexolmo_jax.remat import HIDDEN, OUTPUT, keep

NEG_INF = float("-inf")


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis; statistics and scale in float32, result in `x`'s dtype.

    Source: OLMo 2 (the weight multiplies before the cast back; OLMoE casts first).
    """
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(variance + eps) * scale.astype(jnp.float32)).astype(x.dtype)


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding with half-split pairing (dimension i turns with i + H/2).

    Angles and products are float32 whatever the dtype of `x_BTNH`.
    """
    half = x_BTNH.shape[-1] // 2
    inv_freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * inv_freq
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Grouped-query attention: query head n reads kv head n // (N / K). Softmax in float32.

    A masked position has weight exactly 0, whatever finite values it holds.

    Shapes:
      returns [B, T, N, H].
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores * H**-0.5, NEG_INF)
    # A padding token sees nothing: give its row a finite softmax instead of NaN.
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(top))
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH)
    return out.reshape(B, T, N, H)


def swiglu(
    x: jax.Array, w_gate_DF: jax.Array, w_up_DF: jax.Array, w_down_FD: jax.Array
) -> jax.Array:
    """silu(x · w_gate) * (x · w_up), then · w_down."""
    gate, up = keep(x @ w_gate_DF, HIDDEN), keep(x @ w_up_DF, HIDDEN)
    return keep((jax.nn.silu(gate) * up) @ w_down_FD, OUTPUT)


def document_positions(segments_BT: jax.Array) -> jax.Array:
    """Position of each token inside its document (a run of equal numbers in `segments_BT`)."""
    T = segments_BT.shape[1]
    index_T = jnp.arange(T, dtype=jnp.int32)
    new_BT = document_starts(segments_BT)
    start_BT = jax.lax.cummax(jnp.where(new_BT, index_T, 0), axis=1)
    return index_T - start_BT


def document_starts(segments_BT: jax.Array) -> jax.Array:
    """True where a token is the first of its document (or of the row)."""
    first_B1 = jnp.ones_like(segments_BT[:, :1], dtype=bool)
    return jnp.concatenate([first_B1, segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)


def causal_document_mask(segments_BT: jax.Array) -> jax.Array:
    """[B, T, S]: s is not after t, both are tokens (not padding), and of the same document."""
    T = segments_BT.shape[1]
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    causal = jnp.tril(jnp.ones((T, T), dtype=bool))
    return same & causal & (segments_BT > 0)[:, :, None]

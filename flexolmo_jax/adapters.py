# SPDX-License-Identifier: Apache-2.0
"""What an expert may hold beyond its FFN: additions to other weights, gated by the same router.

An expert may add (x · A) · B of a low rank to each projection of attention (LoRA, arXiv
2106.09685) and to the unembedding, and a vector to the scale of each norm. All are weighed by its
combine weight: the unembedding by that of the last layer; attention, and a norm that stands before
the mixture, by that of the layer *below*, since this layer's router reads what comes of them, so
that the first layer's attention is the anchor's. The public expert adds nothing: slot 0 of these
leaves is never read, and where only it is active the model is the anchor, bit for bit. As in the
mixture a slot that is not active is removed by selection, whatever it holds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flexolmo_jax import evidence
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.router import PUBLIC_SLOT

Group = Mapping[str, jax.Array]
MATRICES = tuple(f"{p}_{factor}" for p in ("q", "k", "v", "o", "head") for factor in "ab")
HEAD = ("head_a", "head_b")
# Leaves of a group that belong to no layer: their layer axis has one entry.
UNLAYERED = (*HEAD, evidence.LEAF)
SCALES = ("attention_scale", "ffn_scale")
LEAVES = (*MATRICES, *SCALES)


def shapes(c: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Leaf name to shape and logical axes of every slot's additions."""
    out = {}
    LE, layer_expert = (c.n_layers, c.n_slots), ("layer", "expert")
    D, H, R, R_head = c.d_model, c.d_head, c.adapters.attention, c.adapters.head
    if R:
        for name, heads, axis in (
            ("q", c.n_heads, "heads"),
            ("k", c.n_kv_heads, "kv_heads"),
            ("v", c.n_kv_heads, "kv_heads"),
        ):
            out[f"{name}_a"] = ((*LE, D, R), (*layer_expert, "expert_embed", "rank"))
            out[f"{name}_b"] = ((*LE, R, heads, H), (*layer_expert, "rank", axis, "head_dim"))
        out["o_a"] = ((*LE, c.n_heads, H, R), (*layer_expert, "heads", "head_dim", "rank"))
        out["o_b"] = ((*LE, R, D), (*layer_expert, "rank", "expert_embed"))
    if R_head:
        one = (1, c.n_slots)
        out["head_a"] = ((*one, D, R_head), (*layer_expert, "expert_embed", "rank"))
        out["head_b"] = ((*one, R_head, c.vocab_size), (*layer_expert, "rank", "vocab"))
    if c.adapters.norms:
        for name in SCALES:
            out[name] = ((*LE, D), (*layer_expert, "norm"))
    return out


def size(c: ModelConfig) -> int:
    """Parameters of what one expert adds."""
    return sum(math.prod(shape) for shape, _ in shapes(c.replace(n_slots=1, n_active=1)).values())


def first_gate(c: ModelConfig, shape: tuple[int, ...]) -> jax.Array | None:
    """Combine weights below the first layer: 0, as no router has judged yet; None if unused."""
    return jnp.zeros(shape, jnp.float32) if c.adapters.attention or c.adapters.norms else None


def drawn(group: Group, key: jax.Array) -> dict[str, jax.Array]:
    """A group whose additions are zero and can be trained: A is drawn, B stays zero."""
    out = dict(group)
    for i, name in enumerate(MATRICES):
        if name in group and name.endswith("_a"):
            leaf = group[name]
            fan_in = math.prod(leaf.shape[2:-1])
            noise = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
            out[name] = noise * fan_in**-0.5
    return out


def project(
    groups: Sequence[Group], name: str, x: jax.Array, gate_BTE: jax.Array, n_in: int = 1
) -> jax.Array | float:
    """What the active experts add to one projection of attention.

    Args:
      x: input of the projection, [B, T, ...] with `n_in` more axes.
      gate_BTE: combine weights.

    Returns:
      an array of the projection's shape, or 0.0 if experts hold no such addition.
    """
    total: jax.Array | float = 0.0
    for slot, (a, b) in _slots(groups, f"{name}_a", f"{name}_b"):
        gate_BT = gate_BTE[..., slot]
        # Selected before and after: neither a value nor a gradient may meet what the slot holds.
        inner = jnp.tensordot(_select(gate_BT > 0, x), a.astype(x.dtype), n_in)
        added = _select(gate_BT > 0, jnp.tensordot(inner, b.astype(x.dtype), 1))
        total += _expand(gate_BT, added).astype(x.dtype) * added
    return total


def widened(groups: Sequence[Any], hidden_BTD: jax.Array, gate_BTE: jax.Array) -> jax.Array:
    """Hidden states, and after them what each adding slot makes of them: its rows of `head`."""
    parts = [hidden_BTD]
    for slot, (a_DR, _) in _slots(_heads(groups), *HEAD):
        gate_BT1 = gate_BTE[..., slot, None]
        inner_BTR = _select(gate_BT1[..., 0] > 0, hidden_BTD) @ a_DR.astype(hidden_BTD.dtype)
        inner_BTR = jnp.where(gate_BT1 > 0, inner_BTR, 0)
        parts.append(gate_BT1.astype(hidden_BTD.dtype) * inner_BTR)
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else hidden_BTD


def head(groups: Sequence[Any]) -> jax.Array | None:
    """What adding slots add to the unembedding, [R · slots, V]; None if experts hold no such thing.

    One product serves all slots: what a token's inactive slots hold is multiplied by exactly 0.
    Values that are not finite would come through, so they are taken for 0 here; files with such
    values are refused when they are read.
    """
    parts = [b_RV for _, (_, b_RV) in _slots(_heads(groups), *HEAD)]
    if not parts:
        return None
    added_RV = jnp.concatenate(parts)
    return jnp.where(jnp.isfinite(added_RV), added_RV, 0)


def layered(groups: Sequence[Any]) -> tuple[Any, ...]:
    """The groups without the leaves that belong to no layer."""
    return tuple(
        {n: leaf for n, leaf in g.items() if n not in UNLAYERED} if isinstance(g, Mapping) else g
        for g in groups
    )


def _heads(groups: Sequence[Any]) -> list[Group]:
    """The leaves that belong to no layer, and the bias, which says how many slots there are."""
    firsts = [g if isinstance(g, Mapping) else g[0] for g in groups]
    return [
        {n: leaf[0] for n, leaf in g.items() if n in HEAD} | {"bias": g["bias"]} for g in firsts
    ]


def scale(
    groups: Sequence[Group], name: str, shared_D: jax.Array, gate_BTE: jax.Array
) -> jax.Array:
    """The scale of a norm with what the active experts add to it, [D] or [B, T, D]."""
    total = shared_D
    for slot, (added_D,) in _slots(groups, name):
        gate_BT1 = gate_BTE[..., slot, None]
        total += gate_BT1 * jnp.where(gate_BT1 > 0, added_D, 0.0)
    return total


def _slots(groups: Sequence[Group], *names: str):
    """(slot, leaves of it) for every slot that adds something, over all groups in order."""
    slot = 0
    for group in groups:
        for i in range(group["bias"].shape[-1]):
            if slot != PUBLIC_SLOT and names[0] in group:
                yield slot, tuple(group[name][i] for name in names)
            slot += 1


def _expand(gate_BT: jax.Array, like: jax.Array) -> jax.Array:
    return gate_BT.reshape(*gate_BT.shape, *(1,) * (like.ndim - gate_BT.ndim))


def _select(keep_BT: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(_expand(keep_BT, x), x, jnp.zeros((), x.dtype))

# SPDX-License-Identifier: Apache-2.0
"""The mixture of full-size SwiGLU experts: one signature, everything else chosen by config.

A *group* is a tree of stacked experts {"w_gate" [E,D,F], "w_up" [E,D,F], "w_down" [E,F,D]}. The
mixture takes a tuple of groups whose slots are numbered through, so that a frozen group and a
trainable one need not be joined. How one device computes it is its dispatch:

  dense    every slot on every token, kept by selection: the reference, and the fastest when all
           slots are active (the expert stage).
  blocked  tokens sorted by slot into blocks of rows; one small matmul chain per block (CPU).
  used     as dense, but a slot that no token uses is not even read: for the few tokens of a step
           of decoding, where reading weights takes the time (CPU).
  ragged   tokens sorted by slot; grouped products, a kernel of XLA on TPU. Elsewhere jax lowers it
           to a masked dense product, where a NaN in one slot reaches the rows of all others: exact
           denial needs another dispatch there, so `resolve` refuses it.

How several devices share the work is `moe_parallel`. Both are dropless; `limit` drops assignments
before either, for training that asks for it.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flexolmo_jax import moe_kernels, moe_parallel
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.layers import swiglu
from flexolmo_jax.remat import OUTPUT, keep
from flexolmo_jax.router import Routing

Group = Mapping[str, jax.Array]
WEIGHTS = ("w_gate", "w_up", "w_down")


def resolve(moe: str, n_slots: int, n_active: int, platform: str) -> str:
    """The dispatch that "auto" stands for: dense if every slot is active, else the platform's.

    Raises:
      ConfigError: "ragged" on a platform where it could not keep a denied slot out.
    """
    if moe == "ragged" and platform != "tpu":
        raise ConfigError(
            "The ragged dispatch is exact on TPU only",
            got=f"exec.moe=ragged on {platform}",
            fix="use exec.moe=auto, dense or blocked",
        )
    if moe != "auto":
        return moe
    if n_active >= n_slots:
        return "dense"
    # ragged_dot lowers densely on CPU and GPU in jax 0.10.
    return {"cpu": "blocked", "tpu": "ragged"}.get(platform, "dense")


def resolve_parallel(expert_parallel: str, dispatch: str, mesh: Mesh | None, platform: str) -> str:
    """The strategy of `moe_parallel` that a configured one stands for on this mesh."""
    if expert_parallel == "auto":
        spread = mesh is not None and mesh.shape["expert"] > 1 and dispatch != "dense"
        return "ring" if spread else "fsdp"
    if expert_parallel == "all_to_all" and platform != "tpu":
        return "all_to_all_twin"
    return expert_parallel


def mixture(
    x_BTD: jax.Array,
    groups: Sequence[Group],
    routing: Routing,
    *,
    dispatch: str,
    all_active: bool = False,
    parallel: str = "fsdp",
    capacity: float = 0.0,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Weighted sum of the active experts of each token.

    Args:
      groups: experts by slot, over all groups in order.
      dispatch: "dense", "blocked", "used" or "ragged" (see the module).
      all_active: every slot serves every token, so nothing needs to be selected away.
      parallel: one of `moe_parallel.STRATEGIES`, for a mesh of several devices.
      capacity: what `limit` was called with; smaller buffers do then. 0 is dropless.

    Returns:
      [B, T, D] in the dtype of `x_BTD`.
    """
    if dispatch == "dense" and parallel == "fsdp":
        return _dense(x_BTD, groups, routing, all_active)
    if dispatch == "used":
        return _used(x_BTD, groups, routing)
    if len(groups) != 1:
        raise ConfigError(
            "A sorted dispatch, and moving tokens to experts, take one group of experts",
            got=f"{len(groups)} groups with dispatch {dispatch!r} and {parallel!r}",
            fix="use exec.moe=dense and exec.expert_parallel=fsdp where frozen and trainable "
            "experts stand side by side",
        )
    weights = tuple(groups[0][name] for name in WEIGHTS)
    kernels = moe_parallel.KERNELS[dispatch]
    if mesh is None or mesh.size == 1:
        x, index, weight = (
            by_shard(x, 1)[0] for x in (x_BTD, routing.index_BTA, routing.weight_BTA)
        )
        bound = index.shape[0] * min(index.shape[1], len(weights[0]))
        y_MD = kernels.tokens(x, index, weight, *weights, bound=bound)
        return keep(y_MD.reshape(x_BTD.shape), OUTPUT)
    shards, n_slots = n_shards(mesh), len(weights[0])
    index_SMA = by_shard(routing.index_BTA, shards, n_slots)
    y_SMD = moe_parallel.sharded(
        by_shard(x_BTD, shards),
        index_SMA,
        by_shard(routing.weight_BTA, shards),
        weights,
        kernels=kernels,
        strategy=parallel,
        per_slot=slot_capacity(index_SMA, n_slots, capacity),
        mesh=mesh,
    )
    # Kept by name, so that a backward pass need not move rows and multiply again for the norm.
    return keep(from_shards(y_SMD, x_BTD.shape), OUTPUT)


def n_shards(mesh: Mesh | None) -> int:
    """Parts that the tokens of a batch are split into."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["expert"]


def by_shard(x_BTC: jax.Array, shards: int, fill: int = 0) -> jax.Array:
    """[B, T, C] as [shards, tokens, C]: whole rows where they divide, else tokens filled up."""
    if x_BTC.shape[0] % shards == 0:
        return x_BTC.reshape(shards, -1, x_BTC.shape[-1])
    x_MC = x_BTC.reshape(-1, x_BTC.shape[-1])
    x_MC = jnp.pad(x_MC, ((0, -len(x_MC) % shards), (0, 0)), constant_values=fill)
    return x_MC.reshape(shards, -1, x_MC.shape[-1])


def from_shards(x_SMC: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The inverse of `by_shard`."""
    n_tokens = shape[0] * shape[1]
    x_MC = x_SMC.reshape(-1, x_SMC.shape[-1])[:n_tokens]
    return x_MC.reshape(*shape[:2], -1)


def slot_capacity(index_SMA: jax.Array, n_slots: int, capacity: float) -> int:
    """The most assignments of one shard that one slot takes."""
    _, M, A = index_SMA.shape
    return min(M, math.ceil(capacity * M * A / n_slots)) if capacity else M


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drops:
    """Assignments of one layer that found no room, counted on both sides.

    Attributes:
      lost_S: by the shard of tokens that lost them.
      refused_E, asked_E: by the slot that refused them, of those that asked for it.
    """

    lost_S: jax.Array
    refused_E: jax.Array
    asked_E: jax.Array

    def shares(self) -> dict[str, jax.Array]:
        """Dropped shares: of all assignments, of the worst shard's, of the worst slot's."""
        asked = jnp.maximum(jnp.sum(self.asked_E), 1)
        return {
            "dropped": jnp.sum(self.lost_S) / asked,
            "dropped_worst_shard": jnp.max(self.lost_S) * len(self.lost_S) / asked,
            "dropped_worst_slot": jnp.max(self.refused_E / jnp.maximum(self.asked_E, 1)),
        }


def limit(routing: Routing, capacity: float, shards: int) -> tuple[Routing, Drops]:
    """Drops what a slot has no room for: more than `capacity` times the mean, per shard of tokens.

    A token's first choice is kept before any second one, and earlier tokens before later ones. It
    couples the tokens of a batch, so it is for training only. Whatever the strategy, the same
    assignments are dropped; a mesh with other shards drops others.
    """
    n_slots = routing.probs_BTE.shape[-1]
    index_SMA = by_shard(routing.index_BTA, shards, n_slots)
    room = slot_capacity(index_SMA, n_slots, capacity)
    choices_SAM = jnp.swapaxes(index_SMA, 1, 2)
    hit_SCE = choices_SAM.reshape(shards, -1)[..., None] == jnp.arange(n_slots)
    before_SCE = jnp.cumsum(hit_SCE, axis=1, dtype=jnp.int32) - hit_SCE
    full_SCE = hit_SCE & (before_SCE >= room)
    full_SAM = jnp.any(full_SCE, axis=-1).reshape(choices_SAM.shape)
    full_BTA = from_shards(jnp.swapaxes(full_SAM, 1, 2), routing.index_BTA.shape)
    limited = dataclasses.replace(
        routing,
        index_BTA=jnp.where(full_BTA, n_slots, routing.index_BTA),
        weight_BTA=jnp.where(full_BTA, 0.0, routing.weight_BTA),
    )
    drops = Drops(
        lost_S=jnp.sum(full_SAM, axis=(1, 2)),
        refused_E=jnp.sum(full_SCE, axis=(0, 1)),
        asked_E=jnp.sum(hit_SCE, axis=(0, 1)),
    )
    return limited, drops


def _dense(
    x_BTD: jax.Array, groups: Sequence[Group], routing: Routing, all_active: bool
) -> jax.Array:
    """Every slot on every token, selected before and after: other slots change nothing."""
    combine_BTE = routing.combine_BTE
    y_BTD = jnp.zeros(x_BTD.shape, jnp.float32)
    for slot, weights in enumerate(_slots(groups)):
        weight_BT1 = combine_BTE[..., slot, None]
        if all_active:
            y_BTD += weight_BT1 * swiglu(x_BTD, *weights)
        else:
            active_BT1 = jnp.any(routing.index_BTA == slot, axis=-1, keepdims=True)
            y_BTD += moe_kernels.selected(active_BT1, weight_BT1, x_BTD, *weights)
    return y_BTD.astype(x_BTD.dtype)


def _used(x_BTD: jax.Array, groups: Sequence[Group], routing: Routing) -> jax.Array:
    """Every slot that serves a token, on every token; selected as in `_dense`."""
    combine_BTE = routing.combine_BTE
    y_BTD = jnp.zeros(x_BTD.shape, jnp.float32)
    for slot, weights in enumerate(_slots(groups)):
        active_BT1 = jnp.any(routing.index_BTA == slot, axis=-1, keepdims=True)
        y_BTD += jax.lax.cond(
            jnp.any(active_BT1),
            moe_kernels.selected,
            lambda *_: jnp.zeros(x_BTD.shape, jnp.float32),
            *(active_BT1, combine_BTE[..., slot, None], x_BTD, *weights),
        )
    return y_BTD.astype(x_BTD.dtype)


def _slots(groups: Sequence[Group]) -> Iterator[list[jax.Array]]:
    """The three matrices of each slot, over all groups in order."""
    for group in groups:
        for i in range(len(group["w_gate"])):
            yield [group[name][i] for name in WEIGHTS]

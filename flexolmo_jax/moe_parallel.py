# SPDX-License-Identifier: Apache-2.0
"""A mixture over the devices of a mesh: what travels, the matrices or the tokens.

Everything happens in one `shard_map` over all three axes. Tokens lie over data x expert, slots
over `expert`, D of the matrices over `data`, F over `model`. In every strategy the matrices are
gathered over `data` (once per layer and pass, in compute dtype; the way back scatters the sum of
their gradients) and partial sums over F are added over `model`.

  fsdp            matrices are gathered over `expert` as well, tokens stay.
  ring            tokens of an expert group are gathered, every device computes its own slots, and
                  the sums are scattered back.
  all_to_all      each assignment goes to the device of its slot and comes back
                  (`ragged_all_to_all`, TPU).
  all_to_all_twin the same layout, moved by gathering every row: for other platforms, where XLA has
                  no such collective.

All are dropless with buffers that cannot overflow: a token's active slots differ, so a device of S
slots receives at most min(A, S) assignments of each token of its expert group. For top-4 of 8
that is twice the mean; grouped kernels compute only rows that hold an assignment.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from flexolmo_jax import moe_kernels
from flexolmo_jax.mesh import BATCH_AXES

STRATEGIES = ("fsdp", "ring", "all_to_all", "all_to_all_twin")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A mixture on one device: of tokens with assignments, and of rows already in slot order.

    Attributes:
      tokens: (x_MD, index_MA, weight_MA, w_gate, w_up, w_down, bound=) -> y_MD.
      rows: (x_RD, weight_R1, sizes_E, w_gate, w_up, w_down) -> y_RD.
    """

    tokens: Callable[..., Any]
    rows: Callable[..., Any]


def _rows_as_tokens(kernel: Callable[..., Any]) -> Kernels:
    """Rows are tokens with one assignment each."""

    def rows(x_RD, weight_R1, sizes_E, *weights):
        R = x_RD.shape[0]
        index_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(R), side="right")
        return kernel(x_RD, index_R.astype(jnp.int32)[:, None], weight_R1, *weights, bound=R)

    return Kernels(kernel, rows)


KERNELS = {
    "dense": _rows_as_tokens(moe_kernels.dense),
    "blocked": _rows_as_tokens(moe_kernels.blocked),
    "ragged": Kernels(moe_kernels.grouped_tokens, moe_kernels.grouped_rows),
}


def sharded(
    x_SMD: jax.Array,
    index_SMA: jax.Array,
    weight_SMA: jax.Array,
    weights: Sequence[jax.Array],
    *,
    kernels: Kernels,
    strategy: str,
    per_slot: int,
    mesh: Mesh,
) -> jax.Array:
    """The mixture of S shards of M tokens, one shard per device of data x expert.

    Args:
      weights: w_gate, w_up [E, D, F] and w_down [E, F, D], any layout.
      strategy: one of `STRATEGIES`.
      per_slot: the most assignments of one shard to one slot.
    """
    E, D, F = weights[0].shape
    if strategy != "fsdp":
        # Slots that the axis does not divide are filled up with empty ones.
        n_empty = -E % mesh.shape["expert"]
        weights = [jnp.pad(w, ((0, n_empty), (0, 0), (0, 0))) for w in weights]
        if n_empty:
            # An index past the end stands for no slot: it must not name the first empty one, which
            # a token could then ask for several times, and the buffers below would overflow.
            index_SMA = jnp.where(index_SMA < E, index_SMA, E + n_empty)
        E += n_empty
    expert, data, model = (
        axis if size % mesh.shape[axis] == 0 else None
        for axis, size in (("expert", E), ("data", D), ("model", F))
    )
    gathered = {"data": data, "expert": expert if strategy == "fsdp" else None}
    local = {
        "fsdp": _fsdp,
        "ring": _ring,
        "all_to_all": functools.partial(_all_to_all, twin=False),
        "all_to_all_twin": functools.partial(_all_to_all, twin=True),
    }[strategy]

    def device(x_1MD, index_1MA, weight_1MA, *w):
        w = [_gather_weights(a, axis, gathered) for a, axis in zip(w, (1, 1, 2), strict=True)]
        y_MD = local(
            *(x_1MD[0], index_1MA[0], weight_1MA[0], w), kernels=kernels, per_slot=per_slot
        )
        # Each device of the model axis holds a part of F: their partial sums make the whole.
        return (jax.lax.psum(y_MD, model) if model else y_MD)[None]

    batch = PartitionSpec(BATCH_AXES)
    columns, rows = PartitionSpec(expert, data, model), PartitionSpec(expert, model, data)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(batch, batch, batch, columns, columns, rows),
        out_specs=batch,
        check_vma=False,
    )(x_SMD, index_SMA, weight_SMA, *weights)


def _gather_weights(w: jax.Array, embed: int, axes: dict[str, str | None]) -> jax.Array:
    if axes["expert"]:
        w = jax.lax.all_gather(w, "expert", axis=0, tiled=True)
    if axes["data"]:
        w = jax.lax.all_gather(w, "data", axis=embed, tiled=True)
    return w


def _fsdp(x_MD, index_MA, weight_MA, weights, *, kernels: Kernels, per_slot: int):
    """Every slot is here; so are the tokens."""
    bound = min(index_MA.size, len(weights[0]) * per_slot)
    return kernels.tokens(x_MD, index_MA, weight_MA, *weights, bound=bound)


def _ring(x_MD, index_MA, weight_MA, weights, *, kernels: Kernels, per_slot: int):
    """Tokens of the whole expert group in, the sums of its devices out."""
    index_NA, mine = _of_the_group(index_MA), len(weights[0])
    # Assignments to the slots of another device get an index that stands for none.
    index_NA = index_NA - jax.lax.axis_index("expert") * mine
    index_NA = jnp.where((index_NA >= 0) & (index_NA < mine), index_NA, mine)
    index_NK, weight_NK = _own_first(index_NA, _of_the_group(weight_MA), mine)
    bound = min(_bound(index_MA, mine, per_slot), index_NK.size)
    y_ND = kernels.tokens(_of_the_group(x_MD), index_NK, weight_NK, *weights, bound=bound)
    return jax.lax.psum_scatter(y_ND, "expert", scatter_dimension=0, tiled=True)


def _own_first(index_NA: jax.Array, weight_NA: jax.Array, mine: int):
    """The at most `mine` assignments of each token that are this device's: fewer rows to gather."""
    order_NK = jnp.argsort(index_NA, axis=1)[:, : min(mine, index_NA.shape[1])]
    chosen_NKA = order_NK[..., None] == jnp.arange(index_NA.shape[1])
    return (
        jnp.sum(jnp.where(chosen_NKA, index_NA[:, None], 0), axis=-1),
        jnp.sum(jnp.where(chosen_NKA, weight_NA[:, None], 0.0), axis=-1),
    )


def _of_the_group(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, "expert", axis=0, tiled=True)


def _bound(index_MA: jax.Array, n_slots: int, per_slot: int) -> int:
    """The most assignments that a device of so many slots can get from its expert group."""
    M, A = index_MA.shape
    return jax.lax.axis_size("expert") * min(M * min(A, n_slots), n_slots * per_slot)


def _all_to_all(x_MD, index_MA, weight_MA, weights, *, kernels, per_slot: int, twin: bool):
    """Rows sorted by slot go to the device of their slot, where they stand in slot order."""
    mine, sent = len(weights[0]), index_MA.size
    order = moe_kernels.sort(index_MA, jax.lax.axis_size("expert") * mine, sent)
    plan, received = _plan(order.sizes_E, mine), _bound(index_MA, mine, per_slot)
    x_RD = moe_kernels.spread(x_MD, order)
    x_RD = _move(twin, received, sent, x_RD, plan.out, plan.back)
    # One number per row: gathering all of them costs less than a message for each.
    weight_R1 = moe_kernels.weight_of_rows(weight_MA, order)
    weight_R1 = _move(True, received, sent, weight_R1, plan.out, plan.back)
    y_RD = kernels.rows(x_RD, weight_R1, plan.sizes_E, *weights)
    y_RD = _move(twin, sent, received, y_RD, plan.back, plan.out)
    return moe_kernels.combine(y_RD, order)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Direction:
    """What one device tells `jax.lax.ragged_all_to_all`: see there for the four arrays."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The way out, the way back, and the rows of each own slot on arrival."""

    out: Direction
    back: Direction
    sizes_E: jax.Array


def _plan(sizes_E: jax.Array, mine: int) -> Plan:
    """Where every piece goes: one piece per sender and slot, so that slots arrive in order.

    Args:
      sizes_E: assignments of this device to every slot of the expert group.
      mine: slots of one device.
    """
    me, n = jax.lax.axis_index("expert"), jax.lax.axis_size("expert")
    counts_NE = jax.lax.all_gather(sizes_E, "expert")
    start_NE = jnp.cumsum(counts_NE, axis=1) - counts_NE
    # On arrival: own slots in order, and the senders of a slot in order.
    total_NS = jnp.sum(counts_NE, axis=0).reshape(n, mine)
    first_E = (jnp.cumsum(total_NS, axis=1) - total_NS).reshape(-1)
    arrival_NE = first_E + jnp.cumsum(counts_NE, axis=0) - counts_NE

    def own(x_NE):
        """The columns of this device's slots, sender after sender."""
        return jax.lax.dynamic_slice_in_dim(x_NE, me * mine, mine, axis=1).reshape(-1)

    out = Direction(start_NE[me], sizes_E, arrival_NE[me], own(counts_NE))
    back = Direction(own(arrival_NE), own(counts_NE), own(start_NE), sizes_E)
    return Plan(out, back, total_NS[me])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _move(twin: bool, rows: int, before: int, x_RD, way: Direction, reverse: Direction):
    """The rows where `way` sends them, in a buffer of `rows`; the rest of it is zero.

    Args:
      before: rows of the buffer that `reverse` would fill.
    """
    del before, reverse
    if twin:
        return _move_by_gather(x_RD, way, rows)
    return jax.lax.ragged_all_to_all(
        x_RD,
        jnp.zeros((rows, x_RD.shape[1]), x_RD.dtype),
        way.input_offsets,
        way.send_sizes,
        way.output_offsets,
        way.recv_sizes,
        axis_name="expert",
    )


def _move_forward(twin, rows, before, x_RD, way, reverse):
    return _move(twin, rows, before, x_RD, way, reverse), (way, reverse)


def _move_backward(twin, rows, before, saved, dy_RD):
    """Gradients take the other way."""
    way, reverse = saved
    dx_RD = _move(twin, before, rows, dy_RD, reverse, way)
    return dx_RD, *jax.tree.map(moe_kernels.no_gradient, (way, reverse))


_move.defvjp(_move_forward, _move_backward)


def _move_by_gather(x_RD: jax.Array, way: Direction, rows: int) -> jax.Array:
    """`ragged_all_to_all` where XLA has none: every device sees all rows and takes its own."""
    arrive = functools.partial(
        jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True
    )
    first_P, at_P = arrive(way.input_offsets), arrive(way.output_offsets)
    sender_P = jnp.arange(len(at_P)) // (len(at_P) // jax.lax.axis_size("expert"))
    offset_RP = jnp.arange(rows)[:, None] - at_P
    hit_RP = (offset_RP >= 0) & (offset_RP < way.recv_sizes)
    from_RP = sender_P * x_RD.shape[0] + first_P + offset_RP
    from_R = jnp.sum(jnp.where(hit_RP, from_RP, 0), axis=1)
    return jnp.where(jnp.any(hit_RP, axis=1)[:, None], _of_the_group(x_RD)[from_R], 0)

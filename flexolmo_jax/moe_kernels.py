# SPDX-License-Identifier: Apache-2.0
"""The experts of one device on the tokens that it sees: how a mixture is computed, not where.

A kernel takes M tokens with A assignments each to its own slots; an index past them is none of its
business. It returns the weighted sum of what its slots give, [M, D]. `bound` is the most
assignments that can be its business, for which its buffers are made.

  dense    every slot on every token, kept by selection.
  blocked  tokens sorted by slot into blocks of rows; one small matmul chain per block (CPU).
  grouped  tokens sorted by slot; grouped products (`grouped.grouped_matmul`), made for TPU.

Sorting has a backward pass of its own: rows are gathered in both directions, since the scatter-add
that autodiff makes of a gather runs row by row on an accelerator.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import grouped
from flexolmo_jax.layers import swiglu
from flexolmo_jax.remat import HIDDEN, keep

# Rows of a block: large enough for a matmul to reach speed, small enough to waste little padding.
BLOCK_ROWS = 128
# Blocks of one slot that are computed as one where it has so many.
SEVERAL = 4


def selected(active_BT1, weight_BT1, x_BTD, *weights):
    """One slot's part of the sum: 0 where it is not active, whatever it holds."""
    out_BTD = swiglu(jnp.where(active_BT1, x_BTD, 0), *weights)
    return jnp.where(active_BT1, weight_BT1 * out_BTD, 0)


def dense(x_MD, index_MA, weight_MA, w_gate, w_up, w_down, *, bound: int):
    """Every slot on every token, selected before and after."""
    del bound
    y_MD = jnp.zeros(x_MD.shape, jnp.float32)
    for slot, weights in enumerate(zip(w_gate, w_up, w_down, strict=True)):
        hit_MA = index_MA == slot
        weight_M1 = jnp.sum(jnp.where(hit_MA, weight_MA, 0.0), axis=-1, keepdims=True)
        y_MD += selected(jnp.any(hit_MA, axis=-1, keepdims=True), weight_M1, x_MD, *weights)
    return y_MD.astype(x_MD.dtype)


def _gather(x_MD: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of `x_MD`; an index past the end gives zeros."""
    return jnp.where((index < x_MD.shape[0])[..., None], x_MD.at[index].get(mode="clip"), 0)


def no_gradient(index: jax.Array) -> np.ndarray:
    """The cotangent of an array of integers."""
    return np.zeros(index.shape, jax.dtypes.float0)


# ---- Sorted rows, one slot after the other. ---------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Order:
    """Assignments sorted by slot: R rows, of which the first sum(sizes_E) hold one.

    Attributes:
      dest_MA: row of each assignment; past the end where it has none.
      token_R: token of each row; past the end where the row is empty.
      assignment_R: position of the row's assignment among the M·A; past the end likewise.
      sizes_E: rows of each slot.
    """

    dest_MA: jax.Array
    token_R: jax.Array
    assignment_R: jax.Array
    sizes_E: jax.Array


def sort(index_MA: jax.Array, n_slots: int, rows: int) -> Order:
    """Sorts the assignments to slots below `n_slots`, of which there are at most `rows`."""
    M, A = index_MA.shape
    flat = index_MA.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    # A comparison with each slot: counting by scattered additions runs one by one.
    sizes_E = jnp.sum(flat[:, None] == jnp.arange(n_slots), axis=0, dtype=jnp.int32)
    dest = jnp.argsort(order, stable=True).astype(jnp.int32)
    full_R = jnp.arange(rows) < jnp.sum(sizes_E)
    return Order(
        dest_MA=jnp.where(flat < n_slots, dest, rows).reshape(M, A),
        token_R=jnp.where(full_R, order[:rows] // A, M),
        assignment_R=jnp.where(full_R, order[:rows], M * A),
        sizes_E=sizes_E,
    )


@jax.custom_vjp
def spread(x_MD: jax.Array, order: Order) -> jax.Array:
    """The tokens in the order of their assignments, [R, D]; empty rows are zero."""
    return _gather(x_MD, order.token_R)


def _spread_forward(x_MD, order):
    return spread(x_MD, order), order


def _spread_backward(order, dx_RD):
    dx_MD = jnp.sum(_gather(dx_RD, order.dest_MA), axis=1)
    return dx_MD, jax.tree.map(no_gradient, order)


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def combine(y_RD: jax.Array, order: Order) -> jax.Array:
    """The sum of each token's rows, [M, D]: what `spread` is the gradient of."""
    y_MAD = _gather(y_RD, order.dest_MA).astype(jnp.float32)
    return jnp.sum(y_MAD, axis=1).astype(y_RD.dtype)


def _combine_forward(y_RD, order):
    return combine(y_RD, order), order


def _combine_backward(order, dy_MD):
    return _gather(dy_MD, order.token_R), jax.tree.map(no_gradient, order)


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def weight_of_rows(weight_MA: jax.Array, order: Order) -> jax.Array:
    """The combine weight of each row, [R, 1]; 0 where the row is empty."""
    return _gather(weight_MA.reshape(-1, 1), order.assignment_R)


def _weight_forward(weight_MA, order):
    return weight_of_rows(weight_MA, order), order


def _weight_backward(order, dweight_R1):
    return _gather(dweight_R1, order.dest_MA)[..., 0], jax.tree.map(no_gradient, order)


weight_of_rows.defvjp(_weight_forward, _weight_backward)


def grouped_rows(
    x_RD, weight_R1, sizes_E, w_gate, w_up, w_down, *, kernel: grouped.Kernel = "ragged_dot"
):
    """What each slot gives for its rows, times their weights; rows after the last slot's are zero.

    The weights are applied before the last product: their gradient then needs no result of it, and
    a backward pass that recomputes leaves it out.
    """
    product = functools.partial(grouped.grouped_matmul, sizes_E=sizes_E, kernel=kernel)
    gate_RF, up_RF = keep(product(x_RD, w_gate), HIDDEN), keep(product(x_RD, w_up), HIDDEN)
    hidden_RF = jax.nn.silu(gate_RF) * up_RF
    return product((hidden_RF * weight_R1).astype(x_RD.dtype), w_down)


def grouped_tokens(
    x_MD, index_MA, weight_MA, *weights, bound: int, kernel: grouped.Kernel = "ragged_dot"
):
    """Sorted rows through three grouped products."""
    order = sort(index_MA, weights[0].shape[0], bound)
    rows = spread(x_MD, order), weight_of_rows(weight_MA, order), order.sizes_E
    return combine(grouped_rows(*rows, *weights, kernel=kernel), order)


# ---- Blocks of rows. --------------------------------------------------------------------------


def _layout(index_MA: jax.Array, n_slots: int, rows: int, bound: int):
    """Where each assignment sits when every slot's rows are padded to whole blocks.

    Returns:
      dest_MA: row of each assignment; past the end where it has no slot.
      source: token of each row, M for padding.
      first_E, blocks_E: first block of each slot, and how many it has.
    """
    M, A = index_MA.shape
    flat = index_MA.reshape(-1)
    n_rows = (-(-bound // rows) + n_slots) * rows
    order = jnp.argsort(flat, stable=True)
    sizes_E = jnp.bincount(flat, length=n_slots)
    blocks_E = -(-sizes_E // rows)
    first_E = jnp.cumsum(blocks_E) - blocks_E
    start_E = jnp.cumsum(sizes_E) - sizes_E
    slot = flat[order]
    known = slot < n_slots
    slot = jnp.minimum(slot, n_slots - 1)
    dest_sorted = jnp.where(known, first_E[slot] * rows + jnp.arange(M * A) - start_E[slot], n_rows)
    source = jnp.full(n_rows, M, jnp.int32)
    source = source.at[dest_sorted].set((order // A).astype(jnp.int32), mode="drop")
    dest = jnp.zeros(M * A, jnp.int32).at[order].set(dest_sorted.astype(jnp.int32))
    return dest.reshape(M, A), source, first_E, blocks_E


def _block_rows(n_assignments: int, n_slots: int) -> int:
    """Rows of a block: `BLOCK_ROWS`, less for few tokens so that decoding does not pad to it."""
    return int(min(BLOCK_ROWS, max(8, 2 ** int(np.ceil(np.log2(max(1, n_assignments / n_slots)))))))


def _read(x: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, rows)


def _write(x: jax.Array, start: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, value.astype(x.dtype), start, 0)


def _each_block(rows: int, source, first: jax.Array, n_blocks: jax.Array, body, carry):
    """`carry = body(start row, rows, carry)` over the blocks of a slot, several at once if it can.

    A matmul reaches its speed with many rows; padding stays below one small block.
    """

    def large(i, carry):
        return body((first + i * SEVERAL) * rows, SEVERAL * rows, carry)

    def small(i, carry):
        return body((first + i) * rows, rows, carry)

    if source.size < SEVERAL * rows:
        return jax.lax.fori_loop(0, n_blocks, small, carry)
    several = n_blocks // SEVERAL
    carry = jax.lax.fori_loop(0, several, large, carry)
    return jax.lax.fori_loop(several * SEVERAL, n_blocks, small, carry)


def blocked(x_MD, index_MA, weight_MA, w_gate, w_up, w_down, *, bound: int):
    """Sorted rows in blocks of one slot each; only blocks that hold rows are computed."""
    rows = _block_rows(bound, w_gate.shape[0])
    return _blocked(rows, bound, x_MD, weight_MA, index_MA, w_gate, w_up, w_down)


def _combine(y_rows, dest_MA, weight_MA, dtype):
    """The weighted sum of each token's rows."""
    y_MAD = _gather(y_rows, dest_MA).astype(jnp.float32)
    return jnp.sum(weight_MA[..., None] * y_MAD, axis=1).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(rows, bound, x_MD, weight_MA, index_MA, w_gate, w_up, w_down):
    dest_MA, source, first_E, blocks_E = _layout(index_MA, w_gate.shape[0], rows, bound)
    x_rows = _gather(x_MD, source)

    def slot(y_rows, args):
        first, n_blocks, *weights = args

        def block(start, n, y_rows):
            return _write(y_rows, start, swiglu(_read(x_rows, start, n), *weights))

        return _each_block(rows, source, first, n_blocks, block, y_rows), None

    xs = (first_E, blocks_E, w_gate, w_up, w_down)
    y_rows = jax.lax.scan(slot, jnp.zeros_like(x_rows), xs)[0]
    return _combine(y_rows, dest_MA, weight_MA, x_MD.dtype)


def _blocked_fwd(rows, bound, x_MD, weight_MA, index_MA, w_gate, w_up, w_down):
    """As `_blocked`, and keeps the two hidden products for the way back."""
    layout = _layout(index_MA, w_gate.shape[0], rows, bound)
    dest_MA, source, first_E, blocks_E = layout
    x_rows = _gather(x_MD, source)

    def slot(carry, args):
        first, n_blocks, w_gate_DF, w_up_DF, w_down_FD = args

        def block(start, n, carry):
            y_rows, gate_rows, up_rows = carry
            x = _read(x_rows, start, n)
            gate, up = x @ w_gate_DF, x @ w_up_DF
            y = (jax.nn.silu(gate) * up) @ w_down_FD
            return (
                _write(y_rows, start, y),
                _write(gate_rows, start, gate),
                _write(up_rows, start, up),
            )

        return _each_block(rows, source, first, n_blocks, block, carry), None

    hidden_rows = jnp.zeros((source.size, w_gate.shape[2]), x_MD.dtype)
    xs = (first_E, blocks_E, w_gate, w_up, w_down)
    start = (jnp.zeros_like(x_rows), hidden_rows, hidden_rows)
    (y_rows, gate_rows, up_rows), _ = jax.lax.scan(slot, start, xs)
    y_MD = _combine(y_rows, dest_MA, weight_MA, x_MD.dtype)
    return y_MD, (x_MD, weight_MA, layout, gate_rows, up_rows, w_gate, w_up, w_down)


def _blocked_bwd(rows, bound, saved, dy_MD):
    """Gathers stand where autodiff would scatter; a slot's weight gradients grow in one place."""
    del bound
    x_MD, weight_MA, layout, gate_rows, up_rows, w_gate, w_up, w_down = saved
    dest_MA, source, first_E, blocks_E = layout
    x_rows, dy_rows = _gather(x_MD, source), _gather(dy_MD, source)
    # The combine weight of each row: the inverse of `dest_MA`, padding keeps 0.
    weight_rows = jnp.zeros(source.shape, weight_MA.dtype)
    weight_rows = weight_rows.at[dest_MA.reshape(-1)].set(weight_MA.reshape(-1), mode="drop")
    inputs = (x_rows, dy_rows, weight_rows[:, None], gate_rows, up_rows)

    def slot(carry, args):
        first, n_blocks, *weights = args

        def block(start, n, carry):
            (dx_rows, dweight_rows), sums = carry
            dx, dweight, dw = _block_gradients(weights, *(_read(a, start, n) for a in inputs))
            out = (_write(dx_rows, start, dx), _write(dweight_rows, start, dweight))
            return out, tuple(total + part for total, part in zip(sums, dw, strict=True))

        zeros = tuple(jnp.zeros_like(w) for w in weights)
        return _each_block(rows, source, first, n_blocks, block, (carry, zeros))

    start = (jnp.zeros_like(x_rows), jnp.zeros(source.shape, jnp.float32))
    xs = (first_E, blocks_E, w_gate, w_up, w_down)
    (dx_rows, dweight_rows), dweights = jax.lax.scan(slot, start, xs)
    dx_MD = jnp.sum(_gather(dx_rows, dest_MA), axis=1)
    dweight_MA = _gather(dweight_rows[:, None], dest_MA)[..., 0].astype(weight_MA.dtype)
    return dx_MD, dweight_MA, no_gradient(dest_MA), *dweights


def _block_gradients(weights, x, dy, weight, gate, up):
    """Gradients of the rows of a block: of x, of the combine weight, of the slot's matrices."""
    w_gate_DF, w_up_DF, w_down_FD = weights
    sigmoid = jax.nn.sigmoid(gate)
    hidden = gate * sigmoid * up
    dhidden_raw = dy @ w_down_FD.T
    dweight = jnp.sum((dhidden_raw * hidden).astype(jnp.float32), axis=-1)
    dy, dhidden = (dy * weight).astype(x.dtype), (dhidden_raw * weight).astype(x.dtype)
    dup = dhidden * gate * sigmoid
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    dx = dgate @ w_gate_DF.T + dup @ w_up_DF.T
    return dx, dweight, (x.T @ dgate, x.T @ dup, hidden.T @ dy)


_blocked.defvjp(_blocked_fwd, _blocked_bwd)

# SPDX-License-Identifier: Apache-2.0
"""The mixture of full-size SwiGLU experts: one signature, several dispatches chosen by config.

A *group* is a tree of stacked experts {"w_gate" [E,D,F], "w_up" [E,D,F], "w_down" [E,F,D]}. The
mixture takes a tuple of groups whose slots are numbered through, so that a frozen group and a
trainable one need not be joined. Routing is dropless in every dispatch.

  dense    every slot on every token, kept by selection: the reference, and the fastest when all
           slots are active (the expert stage).
  blocked  tokens sorted by slot into blocks of rows; one small matmul chain per block (CPU).
  ragged   tokens sorted by slot; `jax.lax.ragged_dot`, a Mosaic kernel on TPU. Elsewhere jax lowers
           it to a masked dense product, where a NaN in one slot reaches the rows of all others:
           exact denial needs another dispatch there, so `resolve` refuses it.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from flexolmo_jax.errors import ConfigError
from flexolmo_jax.layers import swiglu
from flexolmo_jax.mesh import BATCH_AXES
from flexolmo_jax.router import Routing

Group = Mapping[str, jax.Array]
WEIGHTS = ("w_gate", "w_up", "w_down")
# Rows of a block: large enough for a matmul to reach speed, small enough to waste little padding.
BLOCK_ROWS = 128


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


def mixture(
    x_BTD: jax.Array,
    groups: Sequence[Group],
    routing: Routing,
    *,
    dispatch: str,
    all_active: bool = False,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Weighted sum of the active experts of each token.

    Args:
      groups: experts by slot, over all groups in order.
      dispatch: "dense", "blocked" or "ragged" (see the module).
      all_active: every slot serves every token, so nothing needs to be selected away.
      mesh: shard the tokens of a sorted dispatch over the batch axes of this mesh.

    Returns:
      [B, T, D] in the dtype of `x_BTD`.
    """
    if dispatch == "dense":
        return _dense(x_BTD, groups, routing, all_active)
    if len(groups) != 1:
        raise ConfigError(
            "A sorted dispatch takes one group of experts",
            got=f"{len(groups)} groups with dispatch {dispatch!r}",
            fix="use exec.moe=dense where frozen and trainable experts stand side by side",
        )
    run = functools.partial(
        _sorted, kernel={"blocked": _blocked_ffn, "ragged": _ragged_ffn}[dispatch]
    )
    weights = tuple(groups[0][name] for name in WEIGHTS)
    if mesh is None or mesh.size == 1:
        return run(x_BTD, routing.index_BTA, routing.weight_BTA, *weights)
    batch = PartitionSpec(BATCH_AXES)
    columns, rows = PartitionSpec(None, None, "model"), PartitionSpec(None, "model", None)

    def local(*args):
        # Each device of the model axis holds a part of F: their partial sums make the whole.
        return jax.lax.psum(run(*args), "model")

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(batch, batch, batch, columns, columns, rows),
        out_specs=batch,
        check_vma=False,
    )(x_BTD, routing.index_BTA, routing.weight_BTA, *weights)


def _dense(
    x_BTD: jax.Array, groups: Sequence[Group], routing: Routing, all_active: bool
) -> jax.Array:
    """Every slot on every token, selected before and after: other slots change nothing."""
    combine_BTE = routing.combine_BTE
    y_BTD = jnp.zeros(x_BTD.shape, jnp.float32)
    slot = 0
    for group in groups:
        for i in range(group["w_gate"].shape[0]):
            weights = [group[name][i] for name in WEIGHTS]
            weight_BT1 = combine_BTE[..., slot, None]
            if all_active:
                y_BTD += weight_BT1 * swiglu(x_BTD, *weights)
            else:
                active_BT1 = jnp.any(routing.index_BTA == slot, axis=-1, keepdims=True)
                out_BTD = swiglu(jnp.where(active_BT1, x_BTD, 0), *weights)
                y_BTD += jnp.where(active_BT1, weight_BT1 * out_BTD, 0)
            slot += 1
    return y_BTD.astype(x_BTD.dtype)


def _sorted(
    x_BTD: jax.Array,
    index_BTA: jax.Array,
    weight_BTA: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    kernel,
) -> jax.Array:
    """Sorts the M·A assignments by slot, runs `kernel` on the sorted rows, and combines."""
    B, T, D = x_BTD.shape
    x_MD = x_BTD.reshape(-1, D)
    index_MA = index_BTA.reshape(B * T, -1)
    weight_MA = weight_BTA.reshape(B * T, -1)
    y_MD = kernel(x_MD, index_MA, weight_MA, w_gate, w_up, w_down)
    return y_MD.reshape(B, T, D)


def _ragged_ffn(x_MD, index_MA, weight_MA, w_gate, w_up, w_down):
    """Sorted rows through three `ragged_dot`s."""
    M, A = index_MA.shape
    n_slots = w_gate.shape[0]
    flat = index_MA.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes_E = jnp.bincount(flat, length=n_slots).astype(jnp.int32)
    x_sorted = x_MD[order // A]
    gate = jax.lax.ragged_dot(x_sorted, w_gate, sizes_E)
    up = jax.lax.ragged_dot(x_sorted, w_up, sizes_E)
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, w_down, sizes_E)
    # Rows past the last group belong to no slot and are never written by grouped kernels.
    used = jnp.arange(M * A) < jnp.sum(sizes_E)
    out = jnp.where(used[:, None], out, 0)
    back = jnp.argsort(order, stable=True)
    out_MAD = out[back].reshape(M, A, -1)
    y_MD = jnp.sum(weight_MA[..., None] * out_MAD.astype(jnp.float32), axis=1)
    return y_MD.astype(x_MD.dtype)


def _layout(index_MA: jax.Array, n_slots: int, rows: int):
    """Where each assignment sits when every slot's rows are padded to whole blocks.

    Returns:
      dest_MA: row of each assignment; past the end where it has no slot.
      source: [n_blocks * rows] token of each row, M for padding.
      block_slot: [n_blocks] slot of each block.
      n_used: number of blocks that hold rows.
    """
    M, A = index_MA.shape
    flat = index_MA.reshape(-1)
    n_blocks = -(-M * A // rows) + n_slots
    order = jnp.argsort(flat, stable=True)
    sizes_E = jnp.bincount(flat, length=n_slots)
    blocks_E = -(-sizes_E // rows)
    block_end_E = jnp.cumsum(blocks_E)
    pad_start_E = (block_end_E - blocks_E) * rows
    start_E = jnp.cumsum(sizes_E) - sizes_E
    slot = flat[order]
    known = slot < n_slots
    slot = jnp.minimum(slot, n_slots - 1)
    dest_sorted = jnp.where(
        known, pad_start_E[slot] + jnp.arange(M * A) - start_E[slot], n_blocks * rows
    )
    source = jnp.full(n_blocks * rows, M, jnp.int32)
    source = source.at[dest_sorted].set((order // A).astype(jnp.int32), mode="drop")
    dest = jnp.zeros(M * A, jnp.int32).at[order].set(dest_sorted.astype(jnp.int32))
    block_slot = jnp.searchsorted(block_end_E, jnp.arange(n_blocks), side="right")
    block_slot = jnp.minimum(block_slot, n_slots - 1).astype(jnp.int32)
    return dest.reshape(M, A), source, block_slot, block_end_E[-1].astype(jnp.int32)


def _block_rows(n_assignments: int, n_slots: int) -> int:
    """Rows of a block: `BLOCK_ROWS`, less for few tokens so that decoding does not pad to it."""
    return int(min(BLOCK_ROWS, max(8, 2 ** int(np.ceil(np.log2(max(1, n_assignments / n_slots)))))))


def _gather(x_MD: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of `x_MD`; an index past the end gives zeros."""
    return jnp.where((index < x_MD.shape[0])[..., None], x_MD.at[index].get(mode="clip"), 0)


def _blocked_ffn(x_MD, index_MA, weight_MA, w_gate, w_up, w_down):
    """Sorted rows in blocks of one slot each; only blocks that hold rows are computed."""
    rows = _block_rows(index_MA.size, w_gate.shape[0])
    return _blocked(rows, x_MD, weight_MA, index_MA, w_gate, w_up, w_down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(rows, x_MD, weight_MA, index_MA, w_gate, w_up, w_down):
    return _blocked_fwd(rows, x_MD, weight_MA, index_MA, w_gate, w_up, w_down)[0]


def _blocked_fwd(rows, x_MD, weight_MA, index_MA, w_gate, w_up, w_down):
    layout = _layout(index_MA, w_gate.shape[0], rows)
    dest_MA, source, block_slot, n_used = layout
    x_rows = _gather(x_MD, source)

    def block(i, out):
        e = block_slot[i]
        x = jax.lax.dynamic_slice_in_dim(x_rows, i * rows, rows)
        y = swiglu(x, w_gate[e], w_up[e], w_down[e])
        return jax.lax.dynamic_update_slice_in_dim(out, y, i * rows, 0)

    y_rows = jax.lax.fori_loop(0, n_used, block, jnp.zeros_like(x_rows))
    y_MAD = _gather(y_rows, dest_MA).astype(jnp.float32)
    y_MD = jnp.sum(weight_MA[..., None] * y_MAD, axis=1).astype(x_MD.dtype)
    return y_MD, (x_MD, weight_MA, layout, w_gate, w_up, w_down)


def _blocked_bwd(rows, saved, dy_MD):
    """Recomputes each block's hidden rows; gathers stand where autodiff would scatter."""
    x_MD, weight_MA, (dest_MA, source, block_slot, n_used), w_gate, w_up, w_down = saved
    x_rows = _gather(x_MD, source)
    dy_rows = _gather(dy_MD, source)
    # The combine weight of each row: the inverse of `dest_MA`, padding keeps 0.
    weight_rows = jnp.zeros(source.shape, weight_MA.dtype)
    weight_rows = weight_rows.at[dest_MA.reshape(-1)].set(weight_MA.reshape(-1), mode="drop")

    def block(i, carry):
        dx_rows, dweight_rows, dw_gate, dw_up, dw_down = carry
        e = block_slot[i]
        x = jax.lax.dynamic_slice_in_dim(x_rows, i * rows, rows)
        dy = jax.lax.dynamic_slice_in_dim(dy_rows, i * rows, rows)
        weight = jax.lax.dynamic_slice_in_dim(weight_rows, i * rows, rows)[:, None]
        gate, up = x @ w_gate[e], x @ w_up[e]
        sigmoid = jax.nn.sigmoid(gate)
        hidden = gate * sigmoid * up
        dhidden_raw = dy @ w_down[e].T
        dweight = jnp.sum((dhidden_raw * hidden).astype(jnp.float32), axis=-1)
        dy, dhidden = (dy * weight).astype(x.dtype), (dhidden_raw * weight).astype(x.dtype)
        dup = dhidden * gate * sigmoid
        dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        dx = dgate @ w_gate[e].T + dup @ w_up[e].T
        return (
            jax.lax.dynamic_update_slice_in_dim(dx_rows, dx, i * rows, 0),
            jax.lax.dynamic_update_slice_in_dim(dweight_rows, dweight, i * rows, 0),
            dw_gate.at[e].add(x.T @ dgate),
            dw_up.at[e].add(x.T @ dup),
            dw_down.at[e].add(hidden.T @ dy),
        )

    start = (
        jnp.zeros_like(x_rows),
        jnp.zeros(source.shape, jnp.float32),
        *(jnp.zeros_like(w) for w in (w_gate, w_up, w_down)),
    )
    dx_rows, dweight_rows, *dweights = jax.lax.fori_loop(0, n_used, block, start)
    dx_MD = jnp.sum(_gather(dx_rows, dest_MA), axis=1)
    dweight_MA = _gather(dweight_rows[:, None], dest_MA)[..., 0].astype(weight_MA.dtype)
    no_index = np.zeros(dest_MA.shape, jax.dtypes.float0)
    return dx_MD, dweight_MA, no_index, *dweights


_blocked.defvjp(_blocked_fwd, _blocked_bwd)

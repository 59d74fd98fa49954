# SPDX-License-Identifier: Apache-2.0
"""Products of sorted rows with the matrix of their slot, forward and backward by grouped kernels.

  ragged_dot  `jax.lax.ragged_dot_general`: XLA's own kernel on TPU, which keeps a slot's matrix in
              the core while 128 rows at a time pass by. XLA has none for the gradient of the
              matrices and multiplies every row for every slot: megablox makes that one. Off TPU
              all products are such masked ones, right and slow.
  megablox    the Pallas kernels that jax ships for TPU, with tiles chosen here.

Both leave rows past the last slot unwritten. Here they are zero, and nothing that such a row holds
(NaN included) reaches a gradient.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Kernel = Literal["ragged_dot", "megablox"]
# Rows of a tile: the largest that divides them; fewer than the last are filled up with zeros. A
# tile that two slots share is computed twice, so large ones waste more.
ROW_TILES = (256, 128)
# Columns of a tile, of what is summed over and of what is kept.
COLUMN_TILE = 1024


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    *,
    kernel: Kernel = "ragged_dot",
    interpret: bool = False,
) -> jax.Array:
    """Row r of slot e times `w_EDF[e]`; the first `sizes_E[0]` rows are slot 0's, and so on.

    Args:
      sizes_E: int32; their sum is at most R. The rows after it give zeros.
      interpret: run a Pallas kernel without a TPU (for tests; slow).

    Shapes:
      returns [R, F] in the dtype of `x_RD`.
    """
    return _grouped(kernel, interpret, x_RD, w_EDF, sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(kernel, interpret, x_RD, w_EDF, sizes_E):
    forward, _ = _KERNELS[kernel]
    return _without_rest(forward(x_RD, w_EDF, sizes_E, False, interpret), sizes_E)


def _grouped_forward(kernel, interpret, x_RD, w_EDF, sizes_E):
    return _grouped(kernel, interpret, x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _grouped_backward(kernel, interpret, saved, dy_RF):
    x_RD, w_EDF, sizes_E = saved
    forward, transposed = _KERNELS[kernel]
    dy_RF = _without_rest(dy_RF, sizes_E).astype(x_RD.dtype)
    dx_RD = _without_rest(forward(dy_RF, w_EDF, sizes_E, True, interpret), sizes_E)
    dw_EDF = transposed(_without_rest(x_RD, sizes_E), dy_RF, sizes_E, interpret)
    return dx_RD, dw_EDF.astype(w_EDF.dtype), np.zeros(sizes_E.shape, jax.dtypes.float0)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _without_rest(x_RC: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`x_RC` with zeros in the rows of no slot."""
    used_R = jnp.arange(x_RC.shape[0]) < jnp.sum(sizes_E)
    return jnp.where(used_R[:, None], x_RC, 0)


def _ragged(x_RC, w_EDF, sizes_E, transpose: bool, _):
    """Rows times matrices, or times their transposes."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return jax.lax.ragged_dot_general(x_RC, w_EDF, sizes_E, dims)


def _ragged_transposed(x_RD, dy_RF, sizes_E, interpret: bool):
    """The sum over a slot's rows of the outer products, for each slot."""
    return jax.lax.platform_dependent(
        *(x_RD, dy_RF, sizes_E),
        tpu=functools.partial(_megablox_transposed, interpret=interpret),
        default=_masked_transposed,
    )


def _masked_transposed(x_RD, dy_RF, sizes_E):
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(x_RD, dy_RF, sizes_E, dims)


def _megablox(x_RC, w_EDF, sizes_E, transpose: bool, interpret: bool):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    rows, columns = x_RC.shape[0], w_EDF.shape[1 if transpose else 2]
    x_RC, tile = _row_tiles(x_RC)
    tiling = (tile, _tile(x_RC.shape[1]), _tile(columns))
    y = gmm(x_RC, w_EDF, sizes_E, x_RC.dtype, tiling, transpose_rhs=transpose, interpret=interpret)
    return y[:rows]


def _megablox_transposed(x_RD, dy_RF, sizes_E, interpret: bool):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    (x_RD, tile), (dy_RF, _) = _row_tiles(x_RD), _row_tiles(dy_RF)
    tiling = (tile, _tile(x_RD.shape[1]), _tile(dy_RF.shape[1]))
    return tgmm(x_RD.T, dy_RF, sizes_E, x_RD.dtype, tiling, interpret=interpret)


_KERNELS = {
    "ragged_dot": (_ragged, _ragged_transposed),
    "megablox": (_megablox, _megablox_transposed),
}


def _row_tiles(x_RC: jax.Array) -> tuple[jax.Array, int]:
    """Rows that a tile divides, filled up if need be, and the tile."""
    tile = next((t for t in ROW_TILES if x_RC.shape[0] % t == 0), ROW_TILES[-1])
    return jnp.pad(x_RC, ((0, -x_RC.shape[0] % tile), (0, 0))), tile


def _tile(columns: int) -> int:
    return min(COLUMN_TILE, -(-columns // 128) * 128)

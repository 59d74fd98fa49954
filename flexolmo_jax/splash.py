# SPDX-License-Identifier: Apache-2.0
"""Causal attention inside documents by the splash kernel that jax ships for TPU.

Scores never leave the core's own memory, forward or backward, and tiles after a query's are not
computed. Tiles between two documents are: the kernel plans its tiles before it sees the row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from flexolmo_jax.remat import OUTPUT
from flexolmo_jax.sharding import ACTIVATION_RULES, spec_for

# A row is filled up to whole lanes; the kernel takes no other lengths.
LANES = 128
# Queries and keys that a core holds at once, and keys that it multiplies at once.
QUERIES, KEYS, KEYS_AT_ONCE = 1024, 1024, 512


def splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    mesh: Mesh | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`layers.attention` under `layers.causal_document_mask`, S equal to T.

    Args:
      mesh: each device takes the rows and the kv heads that it holds.
      interpret: run the kernel without a TPU (for tests; slow).

    Shapes:
      returns [B, T, N, H].
    """

    def local(*args):
        return _local(*args, interpret=interpret)

    if mesh is None or mesh.size == 1:
        return local(q_BTNH, k_BSKH, v_BSKH, segments_BT)
    heads = spec_for(("batch", "seq", "kv_heads", "head_dim"), k_BSKH.shape, mesh, ACTIVATION_RULES)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec(*heads[:2])),
        out_specs=heads,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _local(q_BTNH, k_BSKH, v_BSKH, segments_BT, *, interpret: bool):
    """The rows and heads of one device."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    _, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    scaled = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q, k, v = (_filled(x).swapaxes(1, 2) for x in (scaled, k_BSKH, v_BSKH))
    ids_BT = _filled(segments_BT)
    length = ids_BT.shape[1]
    attend = kernels.make_splash_mqa_single_device(
        kernels.MultiHeadMask([kernels.CausalMask((length, length))] * (N // K)),
        block_sizes=_blocks(length),
        residual_checkpoint_name=OUTPUT,
        interpret=interpret,
    )

    def row(q_KGTH, k_KSH, v_KSH, ids_T):
        ids = kernels.SegmentIds(ids_T, ids_T)
        # Mapped dimensions are the ones that both cores of a chip share out, backward too.
        return jax.vmap(lambda *heads: attend(*heads, segment_ids=ids))(q_KGTH, k_KSH, v_KSH)

    out_BKGTH: Any = jax.vmap(row)(q.reshape(-1, K, N // K, length, H), k, v, ids_BT)
    out_BTNH = out_BKGTH.reshape(-1, N, length, H).swapaxes(1, 2)[:, :T]
    # To the kernel the padding of a row is one more document; elsewhere it sees nothing.
    return jnp.where((segments_BT > 0)[:, :, None, None], out_BTNH, 0)


def _filled(x: jax.Array) -> jax.Array:
    """`x` [B, T, ...] with zeros up to whole lanes: tokens of segment 0, after all others."""
    rest = -x.shape[1] % LANES
    return jnp.pad(x, ((0, 0), (0, rest)) + ((0, 0),) * (x.ndim - 2)) if rest else x


def _blocks(T: int):
    """Tiles of a row of T tokens."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    def tile(most: int) -> int:
        return max(size for size in range(LANES, most + 1, LANES) if T % size == 0)

    queries, keys = tile(min(QUERIES, T)), tile(min(KEYS, T))
    at_once = max(s for s in range(LANES, min(KEYS_AT_ONCE, keys) + 1, LANES) if keys % s == 0)
    return kernels.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=at_once,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=at_once,
        use_fused_bwd_kernel=True,
    )

# SPDX-License-Identifier: Apache-2.0
"""Arrays that lie on devices of several hosts: made, fetched and compared without one host's all.

On one process each function does what its NumPy counterpart would.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexolmo_jax import sharding
from flexolmo_jax import tree as trees


def put(value: Any, where: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, placed by a sharding over all of them."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the leaves of a tree lie on, or None for arrays of one device or of NumPy."""
    where = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    grid = where.mesh if isinstance(where, NamedSharding) else None
    return grid if isinstance(grid, Mesh) else None


def pieces(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["expert"]


def batch_rows(mesh: Mesh, rows: int) -> list[int]:
    """Numbers of the rows of a batch that this process's devices hold, ascending.

    Processes that share a row (the model axis crosses hosts) each get it. On a pod they need not be
    neighbours: devices are counted along the torus, not host by host.
    """
    indices = sharding.batch_sharding(mesh).addressable_devices_indices_map((rows,))
    slices = [index[0] for index in indices.values() if index is not None]
    return np.unique(np.concatenate([np.arange(rows)[part] for part in slices])).tolist()


def batch(
    part: Mapping[str, Any], mesh: Mesh, rows: int, held: Sequence[int]
) -> dict[str, jax.Array]:
    """A global batch of `rows` rows from this process's part of it.

    Args:
      part: name to rows [len(held), ...].
      held: which rows they are, from `batch_rows`.
    """
    where = sharding.batch_sharding(mesh)

    def place(value: np.ndarray) -> jax.Array:
        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # a batch has rows
            start, stop, _ = index[0].indices(rows)
            first, last = np.searchsorted(held, (start, stop))
            return value[first:last]

        return jax.make_array_from_callback((rows, *value.shape[1:]), where, read)

    return {name: place(np.asarray(value)) for name, value in part.items()}


def whole_batch(value: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """A global batch that every process has whole; rows that do not divide are not spread."""
    rows = len(next(iter(value.values())))
    where = replicated(mesh) if rows % pieces(mesh) else sharding.batch_sharding(mesh)
    return {name: put(leaf, where) for name, leaf in value.items()}


def fetch(tree: Any) -> Any:
    """A pytree as NumPy arrays in every process; a collective for what no process holds whole."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def part_digests(tree: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each part of each leaf that this process holds; parts held twice count once.

    Two trees of one layout are equal if these are equal in every process.
    """
    out = {}
    for name, leaf in trees.flatten(tree).items():
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            out[name] = trees.leaf_digest(leaf)
            continue
        for shard in leaf.addressable_shards:
            key = (
                f"{name}{[s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]}"
            )
            if key not in out:
                out[key] = trees.leaf_digest(shard.data)
    return out


def checksums(leaves: Mapping[str, Any]) -> dict[str, str]:
    """64 bits of each leaf's content, the same however the leaf is spread over devices.

    Every value is mixed with its position and the results are added, so each device sums its own
    part and no order matters: it finds accidents. Against intent, files have SHA-256.
    """
    sums = jax.device_get(_checksums(dict(leaves))) if leaves else {}
    return {name: f"{int(high):08x}{int(low):08x}" for name, (high, low) in sums.items()}


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: _checksum(leaf) for name, leaf in leaves.items()}


def _checksum(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        step = math.prod(leaf.shape[axis + 1 :]) % (1 << 32)
        along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        position += along * np.uint32(step) if size > 1 else 0
    mixed = functools.partial(_mix, bits, position)
    return (
        jnp.sum(mixed(np.uint32(0x9E3779B9)), dtype=jnp.uint32),
        jnp.sum(mixed(np.uint32(0x85EBCA6B)), dtype=jnp.uint32),
    )


def _mix(bits: jax.Array, position: jax.Array, key: np.uint32) -> jax.Array:
    """Every bit of value and position reaches every bit of the result; one-to-one in the value.

    Source: the finalizer of MurmurHash3.
    """

    def spread(x: jax.Array) -> jax.Array:
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    return spread(bits ^ spread(position + key))

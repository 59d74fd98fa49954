# SPDX-License-Identifier: Apache-2.0
"""Leaves on disk in bounded memory: written while they are made, read by rows or by shard.

A saved tree is what `checkpoint.save_tree` writes, byte for byte: an ordinary Orbax directory with
one uncompressed file per leaf. Written here, each value passes through memory once, on its way to
the file and to both digests.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax import checkpoint
from flexolmo_jax import tree as trees
from flexolmo_jax.errors import CheckpointError, Problem, RefusedError
from flexolmo_jax.experts import regions

BLOCK = 8 << 20
ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16"}
TREE_FILE = "_METADATA"
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
Sink = Callable[[memoryview], Any]
# First and last (exclusive) index along each axis.
Region = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that need not exist as a whole.

    Attributes:
      blocks: yields the values as consecutive numpy arrays in C order, anew at each call; a block
        is still being read while the next one is made.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]

    @classmethod
    def of(cls, array: Any) -> "Leaf":
        """An array as a leaf; a leaf as itself."""
        if isinstance(array, Leaf):
            return array
        # A device's array comes to the host when it is asked for, not all of them at once.
        return cls(
            tuple(array.shape), np.dtype(array.dtype), lambda: pieces(checkpoint.to_host(array))
        )

    @property
    def nbytes(self) -> int:
        """Size of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


def pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array in C order, in pieces of at most `BLOCK` bytes; views where possible."""
    if array.ndim == 0 or array.nbytes <= BLOCK:
        yield array
        return
    if array.flags.c_contiguous:
        array = array.reshape(-1)
    row = array.nbytes // len(array)
    if row > BLOCK:
        for part in array:
            yield from pieces(part)
        return
    step = BLOCK // row
    for start in range(0, len(array), step):
        yield array[start : start + step]


def all_finite(array: np.ndarray) -> bool:
    """Whether an array holds no NaN or infinity."""
    if array.dtype.name == "bfloat16":
        # A full exponent, by its bits: five times as quick as np.isfinite.
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())


def scan(leaf: Leaf, *sinks: Sink) -> tuple[str, bool]:
    """Digest of a leaf (`tree.leaf_digest`) and whether it is finite, in one pass.

    Args:
      sinks: called with the bytes of each piece, in order.

    Raises:
      CheckpointError: the blocks are not as many values, or not of the dtype, as the leaf says.
    """
    digest = hashlib.sha256(trees.leaf_header(leaf.dtype, leaf.shape))
    left, finite = leaf.nbytes, True
    # hashlib and the system let other threads run while they work.
    with concurrent.futures.ThreadPoolExecutor(1 + len(sinks)) as pool:
        jobs: list[concurrent.futures.Future] = []
        for block in leaf.blocks():
            if block.dtype != leaf.dtype or block.nbytes > left:
                what = f"{block.dtype.name}{list(block.shape)}, with {left} bytes to go"
                raise CheckpointError("A block does not fit its leaf", got=what, expected=leaf)
            block = np.ascontiguousarray(block).reshape(-1)
            data = block.view(np.uint8).data
            left -= data.nbytes
            for job in jobs:
                job.result()
            jobs = [pool.submit(sink, data) for sink in (digest.update, *sinks)]
            finite = finite and all_finite(block)
        for job in jobs:
            job.result()
    if left:
        raise CheckpointError("A leaf ended too early", got=f"{left} bytes short", expected=leaf)
    return "sha256:" + digest.hexdigest(), finite


def leaves_of(tree: Mapping[str, Any]) -> dict[str, Leaf]:
    """Leaf name to leaf of a tree of arrays and leaves."""
    return {name: Leaf.of(leaf) for name, leaf in trees.flatten(tree).items()}


def write_tree(
    folder: Path, leaves: Mapping[str, Leaf], where: object = ""
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Writes a saved tree in one pass over its values.

    Args:
      folder: a new folder; the caller makes it appear atomically.
      where: what to call it in an error.

    Returns:
      leaf table (name to shape, dtype, digest) and file digests, by path in `folder`.

    Raises:
      RefusedError: dtypes that are never stored, and every leaf with NaN or infinity.
    """
    problems = [
        Problem("leaf-dtype", str(where), n, f"{x.dtype.name} is none of {', '.join(ZARR_DTYPES)}")
        for n, x in leaves.items()
        if x.dtype.name not in ZARR_DTYPES
    ]
    if problems:
        raise RefusedError("The weights cannot be written", problems)
    folder.mkdir(parents=True)
    table, files = {}, {}
    for name, leaf in leaves.items():
        own = folder / name.replace("/", ".")
        own.mkdir()
        file_digest = hashlib.sha256()
        with open(folder / leaf_file(name, leaf.shape), "wb") as file:
            digest, finite = scan(leaf, file_digest.update, file.write)
            file.flush()
            os.fsync(file.fileno())
        files[leaf_file(name, leaf.shape)] = "sha256:" + file_digest.hexdigest()
        files[f"{own.name}/.zarray"] = _write_small(own / ".zarray", _zarray(leaf))
        table[name] = {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "digest": digest}
        if not finite:
            problems.append(Problem("not-finite", str(where), name, "holds NaN or infinity"))
    if problems:
        raise RefusedError("The weights cannot be written", problems)
    for name, text in _tree_files(leaves).items():
        files[name] = _write_small(folder / name, text)
    return dict(sorted(table.items())), files


def _write_small(path: Path, text: str) -> str:
    # Not worth a wait for the disk each: without them, a digest says so.
    path.write_bytes(text.encode())
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _zarray(leaf: Leaf) -> str:
    return trees.canonical_json(
        {
            "chunks": list(leaf.shape),
            "compressor": None,
            "dimension_separator": ".",
            "dtype": ZARR_DTYPES[leaf.dtype.name],
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": list(leaf.shape),
            "zarr_format": 2,
        }
    )


def _tree_files(names: Mapping[str, Any]) -> dict[str, str]:
    """What Orbax 0.12 writes beside the leaves of a nested dict of numpy arrays."""
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    keys = sorted(tuple(name.split("/")) for name in names)
    tree = {
        "tree_metadata": {
            str(key): {
                "key_metadata": [{"key": part, "key_type": 2} for part in key],
                "value_metadata": value,
            }
            for key in keys
        },
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    item = {
        "item_handlers": _HANDLER,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": 0,
        "commit_timestamp_nsecs": 0,
        "custom_metadata": {},
    }
    return {
        TREE_FILE: json.dumps(tree),
        checkpoint.METADATA: json.dumps(item),
        checkpoint.MARKER: checkpoint.MARKER_TEXT,
    }


def leaf_file(name: str, shape: Sequence[int]) -> str:
    """The file of a leaf inside a saved tree, as Orbax names the only chunk of an array."""
    return f"{name.replace('/', '.')}/{'.'.join('0' * len(shape)) or '0'}"


def read_rows(
    folder: Path, name: str, entry: Mapping[str, Any], start: int, stop: int
) -> np.ndarray:
    """Rows start..stop of a leaf's first axis, read from the file of a tree of checked layout.

    Raises:
      CheckpointError: the file is too short.
    """
    shape = (stop - start, *entry["shape"][1:])
    row = math.prod(shape[1:])
    return _read(folder, name, entry, start * row, math.prod(shape)).reshape(shape)


def _read(folder: Path, name: str, entry: Mapping[str, Any], start: int, count: int) -> np.ndarray:
    """`count` values from number `start` on."""
    path = folder / leaf_file(name, entry["shape"])
    return regions.read_values(path, np.dtype(entry["dtype"]), start, count)


def read_leaf(folder: Path, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    """One whole leaf of a saved tree whose layout was checked, as the leaf table describes it.

    Straight from its file, which holds nothing else: Orbax would hold it three times on the way.

    Raises:
      CheckpointError: the file is too short.
    """
    shape = tuple(entry["shape"])
    return _read(folder, name, entry, 0, math.prod(shape)).reshape(shape)


def stored(folder: Path, name: str, entry: Mapping[str, Any]) -> Leaf:
    """A leaf on disk as a leaf in pieces."""
    dtype = np.dtype(entry["dtype"])
    count, step = math.prod(entry["shape"]), BLOCK // dtype.itemsize

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, count, step):
            yield _read(folder, name, entry, start, min(step, count - start))

    return Leaf(tuple(entry["shape"]), dtype, blocks)


def read_region(
    folder: Path,
    name: str,
    entry: Mapping[str, Any],
    region: Region,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """A box of a leaf, such as one device's shard; besides it, one block is all that exists.

    Args:
      out: where to put it; None is a new array.

    Raises:
      CheckpointError: the file is too short.
    """
    if out is None:
        out = np.empty([stop - start for start, stop in region], np.dtype(entry["dtype"]))
    read = functools.partial(_read, folder, name, entry)
    # An axis more, so that a leaf without axes needs no case of its own.
    _read_box(read, 0, (1, *entry["shape"]), ((0, 1), *region), out[None])
    return out


def _read_box(
    read: Callable[[int, int], np.ndarray],
    offset: int,
    shape: tuple[int, ...],
    region: Region,
    out: np.ndarray,
) -> None:
    """Whole rows of the first axis that are small enough to be blocks, cut in memory."""
    row = math.prod(shape[1:])
    (first, last), *inner = region
    step = BLOCK // (row * out.itemsize)
    if not step:
        for i in range(first, last):
            _read_box(read, offset + i * row, shape[1:], tuple(inner), out[i - first])
        return
    cut = (slice(None), *(slice(*bounds) for bounds in inner))
    for i in range(first, last, step):
        size = min(step, last - i)
        rows = read(offset + i * row, size * row).reshape(size, *shape[1:])
        out[i - first : i - first + size] = rows[cut]


def place(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding | None,
    read: Callable[[Region], np.ndarray],
) -> Any:
    """An array by its sharding, or a numpy array without one.

    Each distinct shard is read once, and no more than one of them is held on the host.

    Args:
      read: region to its values.
    """
    if sharding is None:
        return read(tuple((0, size) for size in shape))
    owners: dict[Region, list[Any]] = {}
    indices = sharding.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        bounds = [s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True)]
        owners.setdefault(tuple(bounds), []).append(device)
    shards = {}
    for region, devices in owners.items():
        part = read(region)
        for device in devices:
            shards[device] = jax.device_put(part, device)
        del part
    ordered = [shards[device] for device in indices]
    return jax.make_array_from_single_device_arrays(shape, sharding, ordered)

# SPDX-License-Identifier: Apache-2.0
"""Leaves on disk in bounded memory: written while they are made, read by rows or by shard.

A saved tree is what `checkpoint.save_tree` writes, byte for byte: an ordinary Orbax directory with
one uncompressed file per leaf. Written here, each value passes through memory once, on its way to
the file and to both digests.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from flexolmo_jax import checkpoint
from flexolmo_jax import tree as trees
from flexolmo_jax.errors import CheckpointError, Problem, RefusedError
from flexolmo_jax.experts import regions

BLOCK = 8 << 20
# What a disk and an object store give at about full speed.
RUN = 64 << 10
READ = 1 << 30  # Linux reads at most 2 GiB at once.
ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16"}
# Integers of the same size, and the bits of the two infinities.
INFINITE = {
    "float32": (np.int32, np.uint32, 0x7F80_0000, 0xFF80_0000),
    "bfloat16": (np.int16, np.uint16, 0x7F80, 0xFF80),
}
TREE_FILE = "_METADATA"
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
Sink = Callable[[memoryview], Any]
# Fills an array with values from number `start` on.
Reader = Callable[[int, np.ndarray], None]
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
    bits = INFINITE.get(array.dtype.name)
    if bits is None or not array.size:
        return bool(np.isfinite(array).all())
    # By their bits, ten times as quick: infinity and every NaN lie above all finite values, the
    # positive ones as signed and the negative ones as unsigned numbers.
    signed, unsigned, infinity, minus = bits
    return array.view(signed).max() < infinity and array.view(unsigned).max() < minus


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
    _, *inner = entry["shape"]
    return read_region(folder, name, entry, ((start, stop), *((0, n) for n in inner)))


def read_leaf(folder: Path, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    """One whole leaf of a saved tree whose layout was checked, as the leaf table describes it.

    Straight from its file, which holds nothing else: Orbax would hold it three times on the way.

    Raises:
      CheckpointError: the file is too short.
    """
    return read_region(folder, name, entry, tuple((0, n) for n in entry["shape"]))


def stored(folder: Path, name: str, entry: Mapping[str, Any]) -> Leaf:
    """A leaf on disk as a leaf in pieces."""
    dtype, path = np.dtype(entry["dtype"]), folder / leaf_file(name, entry["shape"])
    count, step = math.prod(entry["shape"]), BLOCK // dtype.itemsize

    def blocks() -> Iterator[np.ndarray]:
        with _opened(path) as read:
            for start in range(0, count, step):
                block = np.empty(min(step, count - start), dtype)
                read(start, block)
                yield block

    return Leaf(tuple(entry["shape"]), dtype, blocks)


def read_region(
    folder: Path,
    name: str,
    entry: Mapping[str, Any],
    region: Region,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """A box of a leaf, such as one device's shard; besides it, one block is all that exists.

    Runs of `RUN` bytes are read as they are; of shorter ones, whole rows that are cut in memory.

    Args:
      out: where to put it; None is a new array.

    Raises:
      CheckpointError: the file, or the leaf, is too short.
    """
    if any(stop > size for size, (_, stop) in zip(entry["shape"], region, strict=True)):
        where = folder / leaf_file(name, entry["shape"])
        raise CheckpointError(
            "A leaf is too short", got=entry["shape"], expected=region, where=where
        )
    if out is None:
        out = np.empty([stop - start for start, stop in region], np.dtype(entry["dtype"]))
    with _opened(folder / leaf_file(name, entry["shape"])) as read:
        # An axis more, so that a leaf without axes needs no case of its own.
        if out.size:
            _read_box(read, 0, (1, *entry["shape"]), ((0, 1), *region), out[None])
    return out


def _read_box(
    read: Reader, offset: int, shape: tuple[int, ...], region: Region, out: np.ndarray
) -> None:
    """A box of the part of a leaf that begins at value number `offset`."""
    row = math.prod(shape[1:])
    (first, last), *inner = region
    if out.flags.c_contiguous and math.prod(out.shape[1:]) == row:
        read(offset + first * row, out)
        return
    step = BLOCK // (row * out.itemsize)
    apart = last - first == 1 or not step or run_bytes(shape[1:], inner, out.itemsize) >= RUN
    if inner and apart:
        for i in range(first, last):
            _read_box(read, offset + i * row, shape[1:], tuple(inner), out[i - first])
        return
    cut = (slice(None), *(slice(*bounds) for bounds in inner))
    step = max(1, step)
    for i in range(first, last, step):
        rows = np.empty((min(step, last - i), *shape[1:]), out.dtype)
        read(offset + i * row, rows)
        out[i - first : i - first + len(rows)] = rows[cut]


def run_bytes(shape: Sequence[int], region: Sequence[tuple[int, int]], itemsize: int) -> int:
    """Bytes that lie together on disk in a box of an array in C order."""
    run = itemsize
    for size, (start, stop) in zip(reversed(shape), reversed(region), strict=True):
        run *= stop - start
        if stop - start < size:
            break
    return run


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Reader]:
    """A function that fills an array with values of a leaf's file, wherever its bytes lie."""
    if regions.source(path) is not None:

        def fetch(start: int, out: np.ndarray) -> None:
            flat = regions.read_values(path, out.dtype, start, out.size)
            out[...] = flat.reshape(out.shape)

        yield fetch
        return
    with open(path, "rb", buffering=0) as file:
        yield functools.partial(_read, file)


def _read(file: BinaryIO, start: int, out: np.ndarray) -> None:
    """Fills an array in C order; read and not mapped, as mapped files count as resident memory."""
    view, at = out.reshape(-1).view(np.uint8).data, start * out.itemsize
    while view:
        got = os.preadv(file.fileno(), [view[:READ]], at)
        if not got:
            raise CheckpointError(
                "The file of a leaf is too short",
                got=f"{at} bytes",
                expected=start * out.itemsize + out.nbytes,
                where=file.name,
            )
        view, at = view[got:], at + got


def owners(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> dict[Region, list[Any]]:
    """Each distinct shard of this process's devices, and the devices that hold it."""
    out: dict[Region, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = [s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True)]
        out.setdefault(tuple(bounds), []).append(device)
    return out

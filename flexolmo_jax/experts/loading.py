# SPDX-License-Identifier: Apache-2.0
"""Leaves on disk become arrays on a mesh: shard by shard, several at once, in bounded memory.

A process reads the bytes of its own devices' shards and no others. Where these would lie on disk
in runs too short to read (an inner dimension is sharded), it reads an equal share in long runs
and the devices exchange them.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from flexolmo_jax.errors import Problem
from flexolmo_jax.experts import leafio, onepass

# Host memory for shards on their way to a device.
BUDGET = 1 << 30
CHANGED = "changed-while-read"
# How often files are read that somebody touches meanwhile.
TRIES = 3
ShardingFn = Callable[[str, tuple[int, ...]], Sharding | None]


@dataclasses.dataclass(frozen=True)
class Part:
    """A leaf on disk.

    Attributes:
      slot: its index on the second axis of the array; None if it is the whole array.
    """

    folder: Path
    name: str
    entry: Mapping[str, Any]
    slot: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """An array and the leaves it is made from; slots that no part fills are zeros."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stacked(self) -> bool:
        """Whether the second axis is that of the slots."""
        return not self.parts or self.parts[0].slot is not None

    def read(self, region: leafio.Region) -> np.ndarray:
        """A box of the array."""
        sizes = [stop - start for start, stop in region]
        out = (np.zeros if self.stacked else np.empty)(sizes, self.dtype)
        for part in self.parts:
            if part.slot is None:
                leafio.read_region(part.folder, part.name, part.entry, region, out)
                continue
            layers, (first, last), *inner = region
            if first <= part.slot < last:
                box, into = (layers, *inner), out[:, part.slot - first]
                leafio.read_region(part.folder, part.name, part.entry, box, into)
        return out


class Budget:
    """Bytes that several threads may hold at a time; one thread always gets what it needs."""

    def __init__(self, size: int):
        self.size, self.free, self.changed = size, size, threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Waits until `size` bytes are free, and keeps them for the block."""
        size = min(size, self.size)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= size)
            self.free -= size
        try:
            yield
        finally:
            with self.changed:
                self.free += size
                self.changed.notify_all()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Arrays by name as they were read, for `spread`; or what is wrong with their files."""

    arrays: dict[str, Any]
    problems: list[Problem]


def load(
    sources: Mapping[str, Source],
    sharding_fn: ShardingFn | None,
    items: Sequence[onepass.Item],
    *,
    together: bool = False,
) -> Loaded:
    """Checks files, then makes the arrays; by their shardings, numpy arrays where there is none.

    All processes of a mesh must call this with the same sources, and then `spread`. Files of a
    linked model are not this model's alone, so they must still be the ones that were checked once
    they were read. Where only the time of their status is another (a new hard link, or bytes that
    were changed and a clock that was set back), all is checked and read again.

    Args:
      items: files to check first; none trusts them.
      together: each process checks a share of the items, and all refuse what one finds.
    """
    changed: list[Problem] = []
    unsure: list[Problem] = []
    for _ in range(TRIES):
        judged = _judged_together(items) if together else onepass.judge(items)
        if judged.problems:
            return Loaded({}, judged.problems)
        arrays = place(sources, sharding_fn)
        changed, unsure = _compared(judged.stamps)
        if together:
            found = multihost_utils.process_allgather(np.array([len(changed), len(unsure)]))
            elsewhere, again = found.reshape(-1, 2).sum(axis=0)
        else:
            elsewhere, again = len(changed), len(unsure)
        if not elsewhere and not again:
            return Loaded(arrays, [])
        del arrays
        if elsewhere:
            break
    return Loaded({}, changed or unsure or [Problem(CHANGED, "", "", "in another process")])


def _compared(stamps: Mapping[Path, onepass.Stamp]) -> tuple[list[Problem], list[Problem]]:
    """Files that are no longer what was checked, and those of which that is not known."""
    changed, unsure = [], []
    for path, seen in stamps.items():
        now = onepass.Stamp.of(path.lstat()) if path.exists() else None
        if now is None or now.file != seen.file:
            message = "it was checked, then changed or replaced"
            changed.append(Problem(CHANGED, str(path), "", message))
        elif now != seen:
            message = f"it was touched while it was read, {TRIES} times in a row"
            unsure.append(Problem(CHANGED, str(path), "", message))
    return changed, unsure


def _judged_together(items: Sequence[onepass.Item]) -> onepass.Judged:
    """A share of the items; a problem of another process is one of all."""
    index, count = jax.process_index(), jax.process_count()
    largest = sorted(items, key=lambda item: (-(item.nbytes or 0), str(item.path)))
    judged = onepass.judge(largest[index::count])
    found = multihost_utils.process_allgather(np.int32(len(judged.problems)))
    if found.sum() and not judged.problems:
        message = "another process found a file changed; its own message says which"
        judged.problems.append(Problem("file-digest", "", "", message))
    return judged


def place(sources: Mapping[str, Source], sharding_fn: ShardingFn | None) -> dict[str, Any]:
    """The arrays as they are read, for `spread`; waits for no other process.

    Several shards at a time, of `BUDGET` bytes together or one that is larger.
    """
    targets = {n: sharding_fn(n, s.shape) if sharding_fn else None for n, s in sources.items()}
    plans = {name: target and readable(sources[name], target) for name, target in targets.items()}
    held, jobs, out = Budget(BUDGET), {}, {}
    with concurrent.futures.ThreadPoolExecutor(onepass.workers()) as pool:
        for name, source in sources.items():
            jobs[name] = [
                pool.submit(_shard, source, region, devices, held)
                for region, devices in _regions(source, plans[name]).items()
            ]
        for name, source in sources.items():
            # Taken out, as a job would keep its shards beside the array that they became.
            shards = [job.result() for job in jobs.pop(name)]
            out[name] = _assemble(source, plans[name], shards)
    return out


def spread(arrays: dict[str, Any], sharding_fn: ShardingFn | None) -> dict[str, Any]:
    """The arrays where they belong: hosts exchange what they have read for one another.

    All processes of a mesh must call this with the same arrays, once none has failed to read:
    it waits for them. Takes the arrays out of `arrays`, and needs room for one of them twice.
    """
    out = {}
    for name in list(arrays):
        array = arrays.pop(name)
        target = sharding_fn(name, array.shape) if sharding_fn else None
        if target is not None and not array.sharding.is_equivalent_to(target, array.ndim):
            array = jax.block_until_ready(_spread(target)(array))
        out[name] = array
    return out


def _regions(source: Source, sharding: Sharding | None) -> dict[leafio.Region, list[Any]]:
    if sharding is None:
        return {tuple((0, size) for size in source.shape): []}
    return leafio.owners(source.shape, sharding)


def _shard(
    source: Source, region: leafio.Region, devices: Sequence[Any], held: Budget
) -> dict[Any, Any]:
    """One shard on each of its devices; the array itself under None without devices."""
    size = math.prod(stop - start for start, stop in region) * source.dtype.itemsize
    if not devices:
        return {None: source.read(region)}
    with held.hold(size):
        part = source.read(region)
        out = {device: jax.device_put(part, device) for device in devices}
        # Transfers run on by themselves, and would hold the host's copies beyond the budget.
        jax.block_until_ready(list(out.values()))
    return out


def _assemble(source: Source, plan: Sharding | None, shards: Sequence[dict[Any, Any]]) -> Any:
    found = {device: array for shard in shards for device, array in shard.items()}
    if plan is None:
        return found[None]
    ordered = [found[device] for device in plan.addressable_devices_indices_map(source.shape)]
    return jax.make_array_from_single_device_arrays(source.shape, plan, ordered)


@functools.cache
def _spread(target: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=target)


def readable(source: Source, target: Sharding) -> Sharding:
    """The sharding to read by: the target, or one of the same devices with longer runs on disk.

    The mesh axes of dimensions inside move to a dimension further out that they divide. Only where
    several hosts share the reading: the exchange needs room for the leaf twice on the devices.
    """
    shape, slots = source.shape, 1 if source.stacked else None
    one = source.nbytes // (shape[1] if source.stacked else 1)
    if not isinstance(target, NamedSharding) or not crosses_hosts(target) or one <= leafio.BLOCK:
        return target  # Or the whole leaf is no more than a block.
    spec = [_names(entry) for entry in target.spec] + [()] * (len(shape) - len(target.spec))
    order = [d for d in range(len(shape)) if d != slots]
    ways = {d: math.prod(target.mesh.shape[name] for name in spec[d]) for d in order}
    for inner in reversed(order):
        outer = [d for d in order if d < inner]
        run = source.dtype.itemsize * shape[inner] // ways[inner]
        run *= math.prod(shape[d] for d in order if d > inner)
        if ways[inner] == 1 or run >= leafio.RUN:
            continue
        fits = [d for d in reversed(outer) if shape[d] % (ways[d] * ways[inner]) == 0]
        if fits:
            spec[fits[0]] += spec[inner]
            ways[fits[0]] *= ways[inner]
            spec[inner], ways[inner] = (), 1
    moved = NamedSharding(target.mesh, PartitionSpec(*(names or None for names in spec)))
    return target if moved.is_equivalent_to(target, len(shape)) else moved


def crosses_hosts(target: Sharding) -> bool:
    """Whether other processes hold some of the shards."""
    return not target.is_fully_addressable


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())

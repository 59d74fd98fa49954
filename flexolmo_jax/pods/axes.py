# SPDX-License-Identifier: Apache-2.0
"""Which mesh axes, and which axes of the torus, a collective runs over."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from flexolmo_jax.pods.chips import Topology

# Marks the source-target pairs of a permutation where groups are expected.
PAIRS = "pairs:"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device sits.

    Attributes:
      chip: coordinates in the torus of its slice.
      core: its number on the chip.
      part: its slice.
    """

    chip: tuple[int, ...]
    core: int = 0
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Span:
    """What one group of devices that exchange data covers.

    Attributes:
      mesh: names of the mesh axes, joined by "+"; "none" for a group of one.
      size: devices of a group.
      torus: (length, closed to a ring) of each torus axis that a group runs over.
      chips: chips of a group inside one slice; cores devices on each of them.
      slices: slices that a group reaches into.
      load: messages that the busiest link carries in one direction (permutations).
    """

    mesh: str
    size: int
    torus: tuple[tuple[int, bool], ...]
    chips: int = 1
    cores: int = 1
    slices: int = 1
    load: int = 1


class Layout:
    """A mesh laid over a topology."""

    def __init__(self, topology: Topology, shape: dict[str, int], places: Sequence[Place]) -> None:
        """Takes the places of the devices in the order of the mesh."""
        self.topology, self.shape, self.places = topology, dict(shape), tuple(places)
        self.span = functools.cache(self._span)

    def _span(self, groups: str) -> Span:
        found = members(groups.removeprefix(PAIRS), len(self.places))
        if groups.startswith(PAIRS):
            return self._permutation(found)
        varying = np.unravel_index(np.asarray(found[0]), tuple(self.shape.values()))
        names = [
            name for name, at in zip(self.shape, varying, strict=True) if len(set(at.tolist())) > 1
        ]
        places = [self.places[m] for m in found[0]]
        return Span(
            mesh="+".join(names) or "none",
            size=len(found[0]),
            torus=self._torus(places),
            chips=len({p.chip for p in places if p.part == places[0].part}),
            cores=len({p.core for p in places}),
            slices=len({p.part for p in places}),
        )

    def _torus(self, places: Sequence[Place]) -> tuple[tuple[int, bool], ...]:
        found = []
        for axis, length in enumerate(self.topology.dims):
            used = len({p.chip[axis] for p in places})
            if used > 1:
                found.append((used, used == length and self.topology.ring(axis)))
        return tuple(found)

    def _permutation(self, pairs: Sequence[Sequence[int]]) -> Span:
        """The mesh axes that source and target differ in, and the load of the busiest link.

        Messages pass through chips on their way, so a long way costs no time by itself: what
        counts is how many of them share a link.
        """
        names: set[str] = set()
        slices = 1
        links: collections.Counter[tuple] = collections.Counter()
        for source, target in pairs:
            ends = [np.unravel_index(d, tuple(self.shape.values())) for d in (source, target)]
            names |= {n for n, a, b in zip(self.shape, *ends, strict=True) if a != b}
            a, b = self.places[source], self.places[target]
            if a.part != b.part:
                slices = 2
            else:
                links.update((a.part, *link) for link in self._route(a.chip, b.chip))
        return Span(
            mesh="+".join(n for n in self.shape if n in names) or "none",
            size=2,
            torus=(),
            slices=slices,
            load=max(links.values(), default=0),
        )

    def _route(self, a: Sequence[int], b: Sequence[int]) -> Iterator[tuple]:
        """The links from one chip to another, axis after axis, the shorter way on a ring."""
        at = list(a)
        for axis, length in enumerate(self.topology.dims):
            way = b[axis] - at[axis]
            if self.topology.ring(axis) and abs(way) > length / 2:
                way -= length if way > 0 else -length
            step = 1 if way > 0 else -1
            for _ in range(abs(way)):
                yield tuple(at), axis, step
                at[axis] = (at[axis] + step) % length


def members(text: str, devices: int) -> list[list[int]]:
    """The groups of a collective as lists of device numbers in mesh order.

    Reads `{{0,1},{2,3}}`, `[16,8]<=[8,16]T(1,0)` and `mesh['a'=4,'b'=2] {'a'}`, whose devices may
    be given as `device_ids=([…]T(…))`; an empty text is one group of all.
    """
    if text.startswith("{{"):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([0-9,]+)\}", text)]
    if text.startswith("mesh["):
        return _of_mesh(text)
    found = re.match(r"\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text)
    if found:
        return _iota(found[2], found[3]).reshape(_numbers(found[1])).tolist()
    return [list(range(devices))]


def _of_mesh(text: str) -> list[list[int]]:
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", text.split("]")[0]), strict=True)
    shape = tuple(int(n) for n in sizes)
    ids = re.search(r"device_ids=\(?\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text)
    grid = _iota(ids[1], ids[2]) if ids else np.arange(math.prod(shape))
    grid = grid.reshape(shape)
    wanted = re.findall(r"'(\w+)'", text[text.rindex("{") :])
    moved = [names.index(n) for n in wanted]
    kept = [k for k in range(len(names)) if k not in moved]
    size = math.prod(shape[k] for k in moved)
    return grid.transpose(*kept, *moved).reshape(-1, size).tolist()


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _numbers(dims)
    grid = np.arange(math.prod(shape)).reshape(shape)
    return (grid.transpose(_numbers(order)) if order else grid).reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))

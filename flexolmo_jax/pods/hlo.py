# SPDX-License-Identifier: Apache-2.0
"""Reads the text of a compiled TPU program into instructions.

Only what planning needs is kept: arrays with their layout and memory space, operands, the
computations that an instruction calls, and the attributes as text.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

from flexolmo_jax.errors import CheckpointError

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# The compiler's way to say that it has no estimate.
NO_CYCLES = 1 << 62

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"(?<=[\s)}\]])([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"([a-z]+\d\w*|pred)\[([0-9,]*)\](?:\{([0-9,]*)((?::[^}]*)?)\})?")
_NAME = re.compile(r"%([\w.-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result.

    Attributes:
      minor: dimensions from the one that lies closest together.
      tile: the block that the last dimensions are padded to.
      space: 0 is HBM; others are memories on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    minor: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes, padding to tiles included."""
        dims = [self.shape[d] for d in self.minor] if self.minor else list(self.shape[::-1])
        for i, block in enumerate(self.tile[::-1]):
            if i < len(dims):
                dims[i] = -(-dims[i] // block) * block
        return math.prod(dims) * _bits(self.dtype) // 8


@functools.cache
def _bits(dtype: str) -> int:
    """Bits of one number; a truth value takes a byte."""
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      arrays: every array of its result.
      operands: names of what it reads.
      text: its attributes; for a constant or a parameter what stands in its parentheses.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool = False

    @property
    def elements(self) -> int:
        """Numbers in the result."""
        return sum(a.elements for a in self.arrays)

    @property
    def size(self) -> int:
        """Bytes of the result wherever it lies."""
        return sum(a.size for a in self.arrays)

    @property
    def hbm(self) -> int:
        """Bytes of the result that lie in HBM."""
        return sum(a.size for a in self.arrays if a.space == 0)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate."""
        found = _CYCLES.search(self.text)
        return int(found[1]) if found and int(found[1]) < NO_CYCLES else None

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""

    def called(self, key: str) -> str:
        """The computation that an attribute names, or ""."""
        found = re.search(rf"\b{key}=%?([\w.-]+)", self.text)
        return found[1] if found else ""


class Module:
    """The computations of a compiled program, in the order in which they run."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in _joined(text.splitlines()):
            header = _COMPUTATION.match(line)
            if header:
                current = self.computations.setdefault(header[1], [])
                self.entry = header[1] if line.startswith("ENTRY") else self.entry
                continue
            found = _INSTRUCTION.match(line)
            if found:
                current.append(_instruction(found[2], found[3], bool(found[1])))
        if not self.entry:
            raise CheckpointError("Not the text of a compiled program", got=text[:80])
        self._types: dict[str, dict[str, Instruction]] = {}

    def types(self, name: str) -> dict[str, Instruction]:
        """The instructions of a computation by name."""
        if name not in self._types:
            self._types[name] = {i.name: i for i in self.computations[name]}
        return self._types[name]

    def trips(self, loop: Instruction) -> int | None:
        """How often a counted loop runs: the constant that its counter is compared with.

        A loop that the compiler unrolled counts in larger steps. None where the text does not
        tell.
        """
        found = set(self._constants(loop.called("condition")))
        if len(found) != 1:
            return None
        return -(-found.pop() // self._step(loop))

    def _step(self, loop: Instruction) -> int:
        """What one turn of a loop adds to its counter; 1 where the text does not tell."""
        counters = [
            int(re.findall(r"index=(\d+)", i.text)[0])
            for i in self.computations[loop.called("condition")]
            if i.opcode == "get-tuple-element" and i.arrays[0].shape == ()
        ]
        types = self.types(loop.called("body"))
        roots = [i for i in types.values() if i.root]
        if len(counters) != 1 or not roots or counters[0] >= len(roots[0].operands):
            return 1
        made = types.get(roots[0].operands[counters[0]])
        while made is not None and made.opcode in ("copy", "bitcast") and made.operands:
            made = types.get(made.operands[0])
        if made is None or made.opcode not in ("add", "fusion"):
            return 1
        added = [types[o] for o in made.operands if o in types]
        steps = {int(i.text) for i in added if i.opcode == "constant" and i.text.isdecimal()}
        steps |= set(self._constants(made.called("calls")))
        steps.discard(0)
        return steps.pop() if len(steps) == 1 else 1

    def _constants(self, name: str) -> Iterable[int]:
        for i in self.computations.get(name, ()):
            if i.opcode == "constant" and i.arrays and i.arrays[0].dtype in ("s32", "u32", "s64"):
                if re.fullmatch(r"-?\d+", i.text):
                    yield int(i.text)
            elif i.opcode == "fusion":
                yield from self._constants(i.called("calls"))


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Lines with those that kernels break inside their metadata put together again."""
    held = ""
    for line in lines:
        if line[:1] in (" ", "%", "E", "H", "") or line == "}":
            if held:
                yield held
            held = line
        else:
            held += line
    yield held


def arrays(text: str) -> tuple[Array, ...]:
    """Every array of a type as HLO writes it."""
    found = []
    for dtype, dims, minor, rest in _ARRAY.findall(text):
        tile = re.search(r"T\(([0-9,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        found.append(
            Array(
                dtype,
                _numbers(dims),
                _numbers(minor),
                _numbers(tile[1]) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    at = _OPCODE.search(rest)
    if at is None:
        return Instruction(name, "", (), (), rest, root)
    depth, end = 1, at.end()
    while end < len(rest) and depth:
        depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    inside = rest[at.end() : end - 1]
    plain = at[1] in ("constant", "parameter")
    return Instruction(
        name,
        at[1],
        arrays(rest[: at.start()]),
        () if plain else tuple(_NAME.findall(inside)),
        inside if plain else rest[end:],
        root,
    )

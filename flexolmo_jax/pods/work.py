# SPDX-License-Identifier: Apache-2.0
"""What a compiled program does in one call on one device, unit by unit, loops multiplied out.

A unit is an instruction that the device runs as one: a fusion, a product, a kernel, a collective,
a copy. `cost_analysis` of XLA counts the body of a loop once; here a unit carries how often it
runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from flexolmo_jax.pods import kernels
from flexolmo_jax.pods.axes import PAIRS
from flexolmo_jax.pods.hlo import COLLECTIVES, Instruction, Module

# They only rename or regroup what is there.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"),
)
SLICED = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Data exchanged between devices by one unit.

    Attributes:
      kind: all-gather, reduce-scatter, …
      groups: the replica groups (or source-target pairs) as the program's text has them.
      size: bytes on one device of the larger side.
      overlapped: it runs beside other units.
    """

    kind: str
    groups: str
    size: float
    overlapped: bool


@dataclasses.dataclass(frozen=True)
class Unit:
    """One instruction that runs `times` times per call.

    Attributes:
      loop: the computation that it stands in.
      flops: of matrix products, once.
      read, written: HBM bytes, once.
      cycles: the compiler's estimate, or None.
      kernel: name of a Mosaic kernel, or "".
      background: a copy between memories that runs beside other units.
    """

    name: str
    opcode: str
    loop: str
    times: int
    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0
    cycles: int | None = None
    collectives: tuple[Collective, ...] = ()
    kernel: str = ""
    op_name: str = ""
    background: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """Units of a program.

    Attributes:
      unknown_loops: loops whose number of turns the text does not tell; counted once.
      unknown_kernels: kernels without a formula for their FLOPs.
      saved: bytes of stacks that a loop of the forward pass writes for the backward pass.
    """

    units: tuple[Unit, ...]
    unknown_loops: tuple[str, ...]
    unknown_kernels: tuple[str, ...]
    saved: int

    @property
    def flops(self) -> float:
        """FLOPs of matrix products and kernels in one call."""
        return sum(u.flops * u.times for u in self.units)

    @property
    def hbm_bytes(self) -> float:
        """HBM traffic of one call."""
        return sum((u.read + u.written) * u.times for u in self.units)


def read(text: str, even_rows: float = 0.0) -> Work:
    """Reads the text of a compiled program.

    Args:
      even_rows: rows of grouped products that each device gets when all experts are used alike;
        buffers of dropless routing are larger, and kernels skip what no group holds. 0 counts
        whole buffers.
    """
    reader = _Reader(Module(text), even_rows)
    units = tuple(reader.walk(reader.module.entry, 1))
    return Work(
        units,
        tuple(sorted(reader.unknown_loops)),
        tuple(sorted({u.kernel for u in units if _unknown(u)})),
        reader.saved,
    )


class _Reader:
    def __init__(self, module: Module, even_rows: float):
        self.module, self.even_rows = module, even_rows
        self.unknown_loops: set[str] = set()
        self.saved = 0

    def walk(self, name: str, times: int) -> Iterator[Unit]:
        """Units of a computation that runs as such: the entry, or the body of a loop."""
        counted: set[str] = set()
        types = self.module.types(name)
        for i in self.module.computations[name]:
            if i.opcode == "while":
                trips = self.module.trips(i)
                if trips is None:
                    self.unknown_loops.add(i.name)
                body = i.called("body")
                self.saved += sum(_stacks(self.module, body, trips or 0))
                yield from self.walk(body, times * (1 if trips is None else trips))
            elif i.opcode == "conditional":
                yield from self._branch(i, times)
            elif i.opcode in ("call", "async-start"):
                yield from self.walk(i.called("to_apply") or i.called("calls"), times)
            elif i.opcode not in FREE and not i.opcode.endswith("-done"):
                yield self._unit(i, name, times, types, counted)

    def _branch(self, i: Instruction, times: int) -> Iterator[Unit]:
        """The branch with the most work."""
        listed = re.search(r"branch_computations=\{(.*?)\}", i.text)
        names = (
            [n.strip().lstrip("%") for n in listed[1].split(",")]
            if listed
            else [i.called("true_computation"), i.called("false_computation")]
        )
        branches = [list(self.walk(n, times)) for n in names if n]
        yield from max(branches, key=lambda units: sum(u.flops + u.read for u in units))

    def _unit(
        self, i: Instruction, loop: str, times: int, types: Mapping, counted: set[str]
    ) -> Unit:
        flops, collectives = self._inside(i, types, counted, False)
        read, written = self._traffic(i, types)
        kernel = kernels.name_of(i)
        if kernel:
            operands = [types[o] for o in i.operands if o in types]
            load = kernels.load(kernel, operands, self.even_rows)
            flops += load * kernels.flops(i, operands)
            read, written = max(read, (kernels.hbm_bytes(i) or 0.0) - written), load * written
            read *= load
        return Unit(
            name=i.name,
            opcode=i.opcode,
            loop=loop,
            times=times,
            flops=flops,
            read=read,
            written=written,
            cycles=i.cycles,
            collectives=tuple(collectives),
            kernel=kernel,
            op_name=i.op_name,
            background=i.opcode in ("copy-start", "slice-start", "dynamic-slice-start"),
        )

    def _inside(
        self, i: Instruction, types: Mapping, counted: set[str], overlapped: bool
    ) -> tuple[float, list[Collective]]:
        """FLOPs and collectives of an instruction and of what is fused into it."""
        kind = i.opcode.removesuffix("-start")
        if i.opcode in ("convolution", "dot"):
            return matmul_flops(i, types), []
        if kind in COLLECTIVES:
            late = overlapped or i.opcode.endswith("-start")
            return 0.0, list(self._exchange(i, kind, types, counted, late))
        inner = i.called("calls") if i.opcode in ("fusion", "custom-call") else ""
        inside = self.module.computations.get(inner, [])
        late = overlapped or inner.startswith("async_collective")
        late = late or any("AsyncCollectiveStart" in j.text for j in inside)
        flops, found = 0.0, []
        for j in inside:
            more, others = self._inside(j, self.module.types(inner), counted, late)
            flops += more
            found += others
        # One collective that sums and keeps a part is written as a sum and a slice.
        if "all-reduce-scatter" in inner:
            found = [dataclasses.replace(c, kind="reduce-scatter") for c in found]
        return flops, found

    def _exchange(
        self, i: Instruction, kind: str, types: Mapping, counted: set[str], late: bool
    ) -> Iterator[Collective]:
        """A collective, unless it is another step of one that was counted."""
        key = _channel(i)
        if key not in counted:
            counted.add(key)
            yield Collective(kind, groups_text(i.text), _moved(i, types), late)

    def _traffic(self, i: Instruction, types: Mapping) -> tuple[float, float]:
        """HBM bytes that a unit reads and writes."""
        operands = [types[o] for o in i.operands if o in types]
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return 0.0, 0.0
        if i.opcode == "fusion":
            inner = i.called("calls")
            used = [self._used(inner, k, o.hbm) for k, o in enumerate(operands)]
            return float(sum(used)), float(self._made(i, inner))
        if i.opcode in SLICED:
            return float(i.hbm), float(i.hbm)
        if i.opcode == "dynamic-update-slice":
            update = operands[1].hbm if len(operands) > 1 else i.hbm
            return float(update), float(update)
        if i.opcode in ("copy-start", "slice-start"):
            # (destination, source, context), and only one side of a prefetch lies in HBM.
            source = sum(o.hbm for o in operands)
            moved = min(a.size for a in i.arrays if a.size > 4) if i.arrays else 0
            return float(min(source, moved)), float(moved if not source else 0)
        return float(sum(o.hbm for o in operands)), float(i.hbm)

    def _used(self, inner: str, index: int, size: int) -> int:
        """Bytes of an operand that a fusion reads: slices of it, if it only slices it."""
        body = self.module.computations.get(inner, [])
        mine = [j.name for j in body if j.opcode == "parameter" and j.text == str(index)]
        if not size or not mine:
            return size
        names, total = set(mine), 0
        for j in body:
            at = [k for k, o in enumerate(j.operands) if o in names]
            if not at:
                continue
            if j.opcode == "bitcast":
                names.add(j.name)
            elif j.opcode in SLICED and at == [0]:
                total += j.size
            elif j.opcode == "fusion":
                total += sum(self._used(j.called("calls"), k, size) for k in at)
            elif j.opcode == "dynamic-update-slice" and at == [0]:
                continue
            elif j.opcode != "tuple" and j.opcode not in COLLECTIVES:
                total += 0 if "AsyncCollective" in j.text else size
        return min(total, size)

    def _made(self, i: Instruction, inner: str) -> int:
        """Bytes that a fusion writes: the part that it updates, if it updates in place."""
        body = self.module.types(inner) if inner in self.module.computations else {}
        roots = [j for j in body.values() if j.root]
        if not roots:
            return i.hbm
        root = roots[0]
        made = [body.get(o) for o in root.operands] if root.opcode == "tuple" else [root]
        if len(made) != len(i.arrays):
            return i.hbm
        total = 0
        for j, array in zip(made, i.arrays, strict=True):
            j = _behind_bitcasts(j, body)
            passed = j is not None and (j.opcode == "parameter" or j.opcode in COLLECTIVES)
            if array.space or passed:
                continue
            update = body.get(j.operands[1]) if j is not None and _is_update(j) else None
            total += update.size if update is not None else array.size
        return total


def _unknown(u: Unit) -> bool:
    return bool(u.kernel) and not u.flops and not kernels.harmless(u.kernel)


def _is_update(j: Instruction) -> bool:
    return j.opcode == "dynamic-update-slice"


def _behind_bitcasts(j: Instruction | None, body: Mapping[str, Instruction]) -> Instruction | None:
    while j is not None and j.opcode == "bitcast" and j.operands:
        j = body.get(j.operands[0])
    return j


def _stacks(module: Module, body: str, trips: int) -> Iterator[int]:
    """Bytes of each stack that a loop of the forward pass fills, one layer a turn."""
    for i in module.computations.get(body, ()):
        inner = i.called("calls") if i.opcode == "fusion" else ""
        for j in [*module.computations.get(inner, ()), i]:
            if not _is_update(j) or "transpose(" in j.op_name or "jvp(" not in j.op_name:
                continue
            array = j.arrays[0]
            if array.space == 0 and array.shape[:1] == (trips,):
                yield array.size


def matmul_flops(i: Instruction, types: Mapping[str, Instruction]) -> float:
    """2·b·M·N·K of a product from the sizes of its three arrays.

    On TPU a product is a convolution, whose batch may be a window that is strided and dilated.
    The sizes are bMK, bKN and bMN, so the root of their product is b^1.5·MNK.
    """
    sizes = [types[name].elements for name in i.operands[:2] if name in types]
    if len(sizes) < 2:
        return 0.0
    batch = 1
    window = re.search(r"window=\{([^}]*)\}", i.text)
    if window:
        fields = dict(part.split("=", 1) for part in window[1].split())
        length = [int(n) for n in fields.get("size", "1").split("x")]
        dilated = fields.get("lhs_dilate", "x".join("1" for _ in length)).split("x")
        batch = math.prod(n for n, d in zip(length, dilated, strict=True) if n == int(d))
    dims = re.search(r"lhs_batch_dims=\{([0-9,]+)\}", i.text)
    if dims:
        shape = types[i.operands[0]].arrays[0].shape
        batch *= math.prod(shape[int(d)] for d in dims[1].split(","))
    return 2.0 * math.sqrt(sizes[0] * sizes[1] * i.elements / batch)


def groups_text(attributes: str) -> str:
    """The replica groups of a collective, or its source-target pairs."""
    found = re.search(
        r"replica_groups=(mesh\[.*?\].*? \{.*?\}|\{\{.*?\}\}|"
        r"\[[0-9,]+\]<=\[[0-9,]+\](?:T\([0-9,]+\))?)",
        attributes,
    )
    if found:
        return found[1]
    pairs = re.search(r"source_target_pairs=(\{\{.*?\}\})", attributes)
    return PAIRS + pairs[1] if pairs else ""


def _channel(i: Instruction) -> str:
    """The start, the steps and the end of one overlapped collective share channel and chain.

    Channel 1 alone says nothing: every collective that the program itself asks for has it.
    """
    channel = re.search(r"channel_id=(\d+)", i.text)
    chain = re.search(r'chain_id="(\d+)"', i.text)
    if channel is None or (chain is None and channel[1] == "1"):
        return i.name
    return f"{channel[1]}/{chain[1] if chain else ''}"


def _moved(i: Instruction, types: Mapping[str, Instruction]) -> float:
    """Bytes of the larger side of a collective on one device."""
    inputs = sum(types[name].size for name in i.operands if name in types)
    # The result of a start holds its operands and its results.
    own = i.size - inputs if i.opcode.endswith("-start") else i.size
    return float(max(own, inputs))

# SPDX-License-Identifier: Apache-2.0
"""HBM of one chip by what it holds.

The total is the compiler's own figure. Parameters and optimizer state follow from the program's
arguments, activations are the stacks that the forward pass leaves for the backward pass plus the
batch and the cache of decoding, and temporaries are the rest.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from flexolmo_jax.pods.chips import GIB, Topology

# Arguments of programs by what they hold; the rest are weights.
OPTIMIZER = "opt"
DATA = ("batch", "tokens_BT", "segments_BT", "allowed_BE", "cache")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip; they add up to `total`."""

    limit: float
    total: float
    parameters: float
    optimizer: float
    activations: float
    temporaries: float

    @property
    def fits(self) -> bool:
        """Whether the program can run."""
        return self.total <= self.limit

    def gib(self) -> dict[str, float]:
        """The same in GiB, rounded."""
        return {k: round(v / GIB, 3) for k, v in dataclasses.asdict(self).items()}


def arguments(values: Mapping[str, Any]) -> dict[str, float]:
    """Bytes per device of a program's arguments: parameters, optimizer and data."""
    sums = {"parameters": 0.0, "optimizer": 0.0, "data": 0.0}
    for name, part in values.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            keys = [str(getattr(k, "key", "")) for k in path]
            kind = "optimizer" if keys[:1] == [OPTIMIZER] else "parameters"
            sums["data" if name in DATA else kind] += _shard_bytes(leaf)
    return sums


def _shard_bytes(leaf: Any) -> float:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return float(math.prod(shape) * leaf.dtype.itemsize)


def measured(compiled: Any, held: Mapping[str, float], saved: float, topology: Topology) -> Memory:
    """Memory of a compiled program.

    Args:
      held: what `arguments` returned.
      saved: bytes per device that the forward pass stacks for the backward pass.
    """
    m = compiled.memory_analysis()
    total = (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
        + m.generated_code_size_in_bytes
    )
    return split(total, held, saved, topology)


def split(total: float, held: Mapping[str, float], saved: float, topology: Topology) -> Memory:
    """Memory of a chip from bytes of one device."""
    per_chip = topology.chip.devices
    activations = min(held["data"] + saved, total - held["parameters"] - held["optimizer"])
    rest = total - held["parameters"] - held["optimizer"] - activations
    return Memory(
        limit=topology.chip.hbm,
        total=total * per_chip,
        parameters=held["parameters"] * per_chip,
        optimizer=held["optimizer"] * per_chip,
        activations=activations * per_chip,
        temporaries=rest * per_chip,
    )


def refused(message: str) -> float | None:
    """Bytes that a program would need, from the compiler's refusal; None if it is another fault.

    A refusal names what the whole program uses, or only its temporaries.
    """
    if "memory" not in message or "hbm" not in message.lower():
        return None
    for pattern in (
        r"Total hbm usage >= ([\d.]+)([KMGT])",
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
        r"HLO temporaries \(([\d.]+)([KMGT])\)",
    ):
        found = re.search(pattern, message)
        if found:
            return float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]
    return None

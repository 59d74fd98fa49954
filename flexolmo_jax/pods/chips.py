# SPDX-License-Identifier: Apache-2.0
"""What one chip of each TPU generation can do, and how the chips of a pod are wired.

Source: peak, memory bandwidth, links and network from the system architecture pages of Cloud TPU
(v4, v5e, v5p, v6e, tpu7x; read November 2026). A page gives the bandwidth of all links of a chip
in both directions; here it is per link and direction. `hbm` is what the compiler (libtpu 0.0.42)
lets a program use, read from its refusals. `clock` is peak / (FLOPs of all matrix units in one
cycle), the cycles that the compiler counts in.
"""

import dataclasses
import math
import re

from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.metrics import PEAK_FLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation.

    Attributes:
      kind: start of the name by which JAX calls its devices.
      hbm: bytes that a program may use; hbm_bytes_s their bandwidth.
      links: links of a chip inside a slice, two per dimension of the torus.
      link_bytes_s: bandwidth of one link in one direction.
      dcn_bytes_s: a chip's share of the network between slices, in one direction.
      mxu_flops: FLOPs of all matrix units of a chip in one cycle.
      devices: JAX devices of one chip; each has its share of everything above.
      wrap: an axis of the torus is closed to a ring when its length is a multiple of this.
    """

    name: str
    kind: str
    hbm: float
    hbm_bytes_s: float
    links: int
    link_bytes_s: float
    dcn_bytes_s: float
    mxu_flops: float
    wrap: int
    devices: int = 1

    @property
    def flops(self) -> float:
        """Peak bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.kind]

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.flops / self.mxu_flops


_SMALL, _LARGE = 2 * 128 * 128, 2 * 256 * 256
CHIPS = {
    c.name: c
    for c in (
        Chip("v4", "TPU v4", 30.5 * GIB, 1228e9, 6, 50e9, 6.25e9, 8 * _SMALL, 4, 2),
        Chip("v5e", "TPU v5 lite", 15.75 * GIB, 819e9, 4, 50e9, 3.125e9, 4 * _SMALL, 16),
        Chip("v5p", "TPU v5p", 95.74 * GIB, 2765e9, 6, 100e9, 6.25e9, 8 * _SMALL, 4),
        Chip("v6e", "TPU v6 lite", 31.25 * GIB, 1638e9, 4, 100e9, 12.5e9, 4 * _LARGE, 16),
        Chip("tpu7x", "TPU7x", 189.5 * GIB, 7380e9, 6, 100e9, 12.5e9, 8 * _LARGE, 4, 2),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A pod, or a part of one: chips in a grid, once or as several slices."""

    chip: Chip
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As users and libtpu write it, without the slices."""
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.dims) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    def ring(self, axis: int) -> bool:
        """Whether an axis of the torus is closed."""
        return self.dims[axis] % self.chip.wrap == 0


def parse(text: str, slices: int = 1) -> Topology:
    """Reads "v5p:4x4x8".

    Raises:
      ConfigError: an unknown generation, or a shape that is none.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise ConfigError(
            "Unknown TPU generation", got=name, where="--topology", fix=nearest(name, CHIPS)
        )
    chip = CHIPS[name]
    wanted = chip.links // 2
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", shape) or shape.count("x") + 1 != wanted:
        raise ConfigError(
            "Not the shape of a slice",
            got=text,
            expected=f"{name}:{'x'.join(['4'] * wanted)} or another {wanted} lengths",
            where="--topology",
        )
    if slices < 1:
        raise ConfigError("There is no pod without slices", got=slices, where="--slices")
    return Topology(chip, tuple(int(n) for n in shape.split("x")), slices)

# SPDX-License-Identifier: Apache-2.0
"""What a training job costs: tokens of its recipe, chips and a predicted speed, into chip-hours."""

import dataclasses

from flexolmo_jax.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one job; low and high are what a fast and a slow prediction give.

    Attributes:
      chip_hours, hours: (low, high).
    """

    tokens: int
    chips: int
    chip_hours: tuple[float, float]
    hours: tuple[float, float]


def training_tokens(config: RunConfig) -> int:
    """Tokens that a whole run of a recipe processes."""
    return config.data.batch_rows * config.data.seq_len * config.optim.last_step


def cost(tokens: int, chips: int, tokens_per_s_per_chip: tuple[float, float]) -> Cost:
    """Chip-hours and hours of `tokens` at a speed given as a range, in either order."""
    slow, fast = sorted(tokens_per_s_per_chip)
    low, high = tokens / fast / 3600, tokens / slow / 3600
    return Cost(tokens, chips, (low, high), (low / chips, high / chips))


def amount(number: float) -> str:
    """A large number for people: "1.0T", "50.0B", "38,100"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(hours: float) -> str:
    """Hours for people: "2.3 days", "5.1 h"."""
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h"

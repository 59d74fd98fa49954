# SPDX-License-Identifier: Apache-2.0
"""Which experts a request may use: names in, one boolean per slot out, decided in one place."""

import logging
from collections.abc import Iterable, Mapping

import numpy as np

from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.router import PUBLIC_SLOT

logger = logging.getLogger("flexolmo")
PUBLIC = "public"


def allowed_slots(
    slots: Mapping[str, int],
    n_slots: int,
    *,
    allow: Iterable[str] | None = None,
    deny: Iterable[str] | None = None,
) -> np.ndarray:
    """Boolean [n_slots]: the slots that may be used.

    The public expert is always allowed, since a row needs somewhere to fall back to; a slot that
    holds no expert never is.

    Args:
      slots: expert id to slot of the experts that the model holds.
      allow: only these experts; deny: all but these. At most one of the two.

    Raises:
      ConfigError: both given, a list without names, an unknown expert, or the public expert denied.
    """
    if allow is not None and deny is not None:
        raise ConfigError("Give the experts to allow or the experts to deny, not both")
    named = list(allow if allow is not None else deny or ())
    if not named and (allow is not None or deny is not None):
        # An empty variable of a script, perhaps: to deny nobody then would let everybody in.
        raise ConfigError(
            "A list of experts names none",
            where="deny" if allow is None else "allow",
            expected=f"one or more of {', '.join(slots)}",
            fix="leave it away to use all experts; allow public alone to use none of the others",
        )
    for name in named:
        if name not in slots:
            raise ConfigError("Unknown expert", got=name, fix=nearest(name, slots))
    if deny is not None and PUBLIC in named:
        raise ConfigError(
            "The public expert cannot be denied",
            fix="deny other experts; with all of them denied the model is the anchor",
        )
    chosen = {PUBLIC, *named} if allow is not None else set(slots) - set(named)
    mask = np.zeros(n_slots, bool)
    mask[[slots[name] for name in chosen if name in slots]] = True
    mask[PUBLIC_SLOT] = True
    return mask


def clamp_active(n_active: int, allowed: np.ndarray) -> int:
    """Active experts that the allowed set can supply; says so when it is fewer than asked for.

    Only for reporting: the model itself leaves missing choices out row by row.
    """
    available = int(np.min(np.sum(allowed, axis=-1)))
    if available < n_active:
        logger.info(
            "only %d expert(s) allowed: %d active instead of %d", available, available, n_active
        )
    return min(n_active, available)

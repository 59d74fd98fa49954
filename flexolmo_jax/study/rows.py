# SPDX-License-Identifier: Apache-2.0
"""Expert biases in closed form: from how often an expert is preferred on public text.

Each owner can set its own from public text and its finished expert alone, and ships it as the
expert's bias. Nothing of another owner enters, so opt-out stays exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import model, router, tree
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data import loader
from flexolmo_jax.study.jobs import Layout

RATES = (0.01, 0.03, 0.1, 0.2)
ACTIVE = 2
ROWS, BATCH = 32, 8


def public_logits(layout: Layout, shared: tree.Tree, group: tree.Tree, config: ModelConfig):
    """How much each expert is preferred to public on public training text, [E, L, N] in nats.

    Each expert is judged beside the anchor alone, as its owner would, and without its bias.
    """
    n_slots = group["bias"].shape[1]
    config = config.replace(n_slots=n_slots, n_active=2)
    placed = jax.device_put(
        (shared, ({**group, "bias": jnp.full_like(group["bias"], model.NO_BIAS)},))
    )
    found: list[list[np.ndarray]] = [[] for _ in range(n_slots - 1)]
    for domain in layout.study.public:
        for batch in loader.heldout_batches(
            layout.data(domain, "train"), BATCH, seq_len=layout.study.seq_len, n_rows=ROWS
        ):
            kept = batch["loss_mask"]
            for slot in range(1, n_slots):
                allowed = np.isin(np.arange(n_slots), (0, slot))
                rows = jnp.asarray(np.tile(allowed, (len(kept), 1)))
                logits_LBT = _preferred(config, placed, batch, rows, slot)
                found[slot - 1].append(np.asarray(logits_LBT)[:, kept])
    return np.stack([np.concatenate(parts, axis=1) for parts in found])


@functools.partial(jax.jit, static_argnums=(0,))
def _preferred(config, placed, batch, allowed_BE, slot):
    shared, groups = placed
    out = model.forward(
        config,
        model.Runtime(dispatch="dense"),
        shared,
        groups,
        batch["tokens"],
        segments_BT=batch["segments"],
        allowed_BE=allowed_BE,
    )
    logits = out.router_logits_LBTE
    return jnp.take(logits, slot, axis=-1) - logits[..., router.PUBLIC_SLOT]


def bias_at_rate(logits_ELN: np.ndarray, group: tree.Tree, rate: float) -> np.ndarray:
    """Raw biases [L, slots] with which each expert is preferred on `rate` of public tokens.

    An expert that is preferred less often without a bias keeps none: a bias is never above 0.
    """
    effective_EL = np.minimum(-np.quantile(logits_ELN, 1 - rate, axis=-1), -1e-6)
    # The raw value whose negative softplus is the effective one.
    lowered = -effective_EL.astype(np.float64)
    raw_EL = lowered + np.log(-np.expm1(-lowered))
    out = np.array(group["bias"])
    out[:, 1:] = raw_EL.T
    return out

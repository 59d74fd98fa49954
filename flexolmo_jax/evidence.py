# SPDX-License-Identifier: Apache-2.0
"""What the tokens of a document say about whose text it is, without reading a hidden state.

Every owner has a table: for each token of the vocabulary, how much more often its own text holds it
than public text, as a log ratio. A document's evidence for an owner is the sum of its tokens'
(naive Bayes), which the router adds to what its rows say. Where the anchor knows a domain badly its
hidden states tell little, and these are the documents where an expert helps most.

A table is made of one owner's text and public text alone, and belongs to the slice: denying an
owner leaves every other owner's evidence as it is, bit for bit. Seldom tokens hardly show in it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig

LEAF = "evidence"
# Added to every count: a token seen fewer times than this on both sides says next to nothing.
SMOOTHING = 10.0


def shapes(c: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Leaf name to shape and logical axes; the layer axis has one entry, as all layers share it."""
    if not c.router.evidence:
        return {}
    return {LEAF: ((1, c.n_slots, c.vocab_size), ("layer", "expert", "vocab"))}


def table(own_V: np.ndarray, public_V: np.ndarray) -> np.ndarray:
    """Log ratios [V] of how often each token occurs, own text against public text, in nats.

    Args:
      own_V, public_V: token counts.
    """

    def log_share(count_V: np.ndarray) -> np.ndarray:
        smooth_V = count_V.astype(np.float64) + SMOOTHING
        return np.log(smooth_V) - math.log(smooth_V.sum())

    return (log_share(own_V) - log_share(public_V)).astype(np.float32)


def of_tokens(groups: Sequence[Any], tokens_BT: jax.Array) -> jax.Array:
    """Each slot's evidence of each token, [B, T, E] float32; 0 for the public slot."""
    first = [g if isinstance(g, Mapping) else g[0] for g in groups]
    table_EV = jnp.concatenate([g[LEAF][0] for g in first]).astype(jnp.float32)
    return jnp.moveaxis(table_EV.at[:, tokens_BT].get(mode="clip"), 0, -1)

# SPDX-License-Identifier: Apache-2.0
"""What the tokens of a document say about whose text it is, without reading a hidden state.

Every owner has a table: for each token of the vocabulary, how much more often its own text holds it
than public text, as a log ratio. A document's evidence for an owner is the sum of its tokens'
(naive Bayes), which the router adds to what its rows say. Where the anchor knows a domain badly its
hidden states tell little, and these are the documents where an expert helps most.

Public text is not of one kind: an encyclopedia has more of the words of news than public text has
on average, and would be taken for news. So the anchor may say how often each token stands in each
of its corpora, and a document is as public as the mean of its odds under them. Owners are measured
against what the anchor says then, whatever public text they have themselves.

A table is made of one owner's text and public text alone, and belongs to the slice: denying an
owner leaves every other owner's evidence as it is, bit for bit. Seldom tokens hardly show in it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import router
from flexolmo_jax.config import ModelConfig

# Of a group, [1, slots, V]: `table` of each slot. Of the shared weights, [P, V]: `log_share` of
# each public corpus.
LEAF = "evidence"
# Added to every count: a token seen fewer times than this on both sides says next to nothing.
SMOOTHING = 10.0
# No token says more than this, in nats. Text of none of the owners, such as mathematics, has signs
# that one of them has far more often than public text: they alone would make it his (LOG.md).
LIMIT = 3.0


def shapes(c: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Leaf name to shape and logical axes; the layer axis has one entry, as all layers share it."""
    if not c.router.evidence:
        return {}
    return {LEAF: ((1, c.n_slots, c.vocab_size), ("layer", "expert", "vocab"))}


def shared_shapes(c: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """The same of the shared weights: each public corpus."""
    if not c.router.evidence_parts:
        return {}
    return {LEAF: ((c.router.evidence_parts, c.vocab_size), ("part", "vocab"))}


def log_share(count_V: np.ndarray) -> np.ndarray:
    """Log [V] of the share that each token has of a text, float64; every count is smoothed."""
    smooth_V = count_V.astype(np.float64) + SMOOTHING
    return np.log(smooth_V) - math.log(smooth_V.sum())


def table(own_V: np.ndarray, public_V: np.ndarray) -> np.ndarray:
    """Log ratios [V] of how often each token occurs, own text against public text, in nats.

    At most `LIMIT` to either side.

    Args:
      own_V, public_V: of `log_share`, or of `public`.
    """
    return np.clip(own_V - public_V, -LIMIT, LIMIT).astype(np.float32)


def public(parts_PV: jax.Array | np.ndarray) -> jax.Array:
    """`log_share` [V] of all public corpora together: each counts alike, however long it is."""
    return jax.nn.logsumexp(parts_PV, axis=0) - math.log(len(parts_PV))


def init_sum(c: ModelConfig, rows: int) -> jax.Array | None:
    """What `rows` documents without a token have gathered, [B, E + P]; None without evidence."""
    tables = c.n_slots + c.router.evidence_parts
    return jnp.zeros((rows, tables), jnp.float32) if c.router.evidence else None


def of_documents(
    c: ModelConfig,
    shared: Mapping[str, Any],
    groups: Sequence[Any],
    tokens_BT: jax.Array,
    sum_BX: jax.Array | None = None,
    *,
    allowed_BE: jax.Array | None = None,
    **documents: Any,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Evidence for each slot in each token's document so far, [B, T, E] float32, in nats.

    Args:
      sum_BX: what documents that began in earlier calls have gathered, for the X = E slots and P
        public corpora.
      documents: segments_BT, length_B and follows_BTS, as `router.gathered` takes them.

    Returns:
      the evidence, and what each row has gathered after its last token (unchanged for branches);
      None and None in an architecture without evidence.
    """
    if not c.router.evidence:
        return None, None
    slots_BTE = of_tokens(groups, tokens_BT)
    n_slots = slots_BTE.shape[-1]
    if allowed_BE is not None:  # What a slot holds that no row may use meets nothing.
        slots_BTE = jnp.where(jnp.any(allowed_BE, axis=0), slots_BTE, 0)
    says_BTX = slots_BTE
    if c.router.evidence_parts:
        ratio_PV = jnp.clip(shared[LEAF] - public(shared[LEAF]), -LIMIT, LIMIT)
        says_BTX = jnp.concatenate([slots_BTE, _looked_up(ratio_PV, tokens_BT)], axis=-1)
    judged_BTX, sum_BX = router.gathered(says_BTX, sum_BX, c.router.evidence, **documents)
    evidence_BTE, parts_BTP = judged_BTX[..., :n_slots], judged_BTX[..., n_slots:]
    if c.router.evidence_parts:
        public_BT = jax.nn.logsumexp(parts_BTP, axis=-1) - math.log(c.router.evidence_parts)
        evidence_BTE = evidence_BTE.at[..., router.PUBLIC_SLOT].add(public_BT)
    return evidence_BTE, sum_BX


def of_tokens(groups: Sequence[Any], tokens_BT: jax.Array) -> jax.Array:
    """Each slot's evidence of each token, [B, T, E] float32; 0 for the public slot."""
    first = [g if isinstance(g, Mapping) else g[0] for g in groups]
    return _looked_up(jnp.concatenate([g[LEAF][0] for g in first]), tokens_BT)


def _looked_up(table_XV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    found = jnp.asarray(table_XV, jnp.float32).at[:, tokens_BT].get(mode="clip")
    return jnp.moveaxis(found, 0, -1)

# SPDX-License-Identifier: Apache-2.0
"""What the tokens of a document say about whose text it is, without reading a hidden state.

Every owner has a table: for each pair of neighbouring tokens, how much more often its own text
holds it than public text, as a log ratio. A document's evidence for an owner is the sum of its
pairs' (naive Bayes), which the router adds to what its rows say. Where the anchor knows a domain
badly its hidden states tell little, and these are the documents where an expert helps most.

Pairs are hashed, since there are too many to list. Seldom ones then share an entry with others, and
public text has more of these: what an owner has never seen speaks against it. Single tokens cannot
do that. Mathematics has the brackets and equal signs of code, though not in the same company.

Public text is not of one kind: an encyclopedia has more of the words of news than public text has
on average, and would be taken for news. So the anchor may say how often each pair stands in each
of its corpora, and a document is as public as the mean of its odds under them. Owners are measured
against what the anchor says then, whatever public text they have themselves.

A table is made of one owner's text and public text alone, and belongs to the slice: denying an
owner leaves every other owner's evidence as it is, bit for bit. What stands once in the
owner's text moves its entry by 0.7 nats (log 2) at most.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import router
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.layers import document_starts

Array = TypeVar("Array", jax.Array, np.ndarray)
# Of a group, [1, slots, X]: `table` of each slot. Of the shared weights, [P, X]: `log_share` of
# each public corpus. X entries are tokens, or pairs of them.
LEAF = "evidence"
# Added to counts: an entry that is seen fewer times than this on both sides says next to nothing.
SMOOTHING = 1.0
# No entry says more than this, in nats. Text of none of the owners, such as mathematics, has signs
# that one of them has far more often than public text: they alone would make it his (LOG.md).
LIMIT = 3.0
# Odd multipliers of the hash, of golden ratio and of murmur3's mixing: any would do.
_BEFORE, _TOKEN, _MIX = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
    """State of documents that go on: their summed evidence, and the token that they end with.

    Shapes:
      sum_BX: [B, E + P], slots and public corpora, in nats.
      last_B: -1 where a document has no token yet.
    """

    sum_BX: jax.Array
    last_B: jax.Array


def entries(c: ModelConfig) -> int:
    """Entries of a table: X."""
    return c.router.evidence_pairs or c.vocab_size


def shapes(c: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Leaf name to shape and logical axes; the layer axis has one entry, as all layers share it."""
    if not c.router.evidence:
        return {}
    return {LEAF: ((1, c.n_slots, entries(c)), ("layer", "expert", "vocab"))}


def shared_shapes(c: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """The same of the shared weights: each public corpus."""
    if not c.router.evidence_parts:
        return {}
    return {LEAF: ((c.router.evidence_parts, entries(c)), ("part", "vocab"))}


def count(c: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """How often each entry stands in a text, [X] int64."""
    if c.router.evidence_pairs:
        tokens = hashed(tokens[:-1], tokens[1:], c.router.evidence_pairs)
    return np.bincount(tokens, minlength=entries(c))


def hashed(before: Array, tokens: Array, pairs: int) -> Array:
    """Entry of each pair of tokens, below `pairs`: the same number from NumPy and on any device."""
    key = before.astype(np.uint32) * _BEFORE + tokens.astype(np.uint32) * _TOKEN
    key = (key ^ (key >> np.uint32(15))) * _MIX
    return ((key ^ (key >> np.uint32(13))) % np.uint32(pairs)).astype(np.int32)


def log_share(count_X: np.ndarray) -> np.ndarray:
    """Log [X] of the share that each entry has of a text, float64; every count is smoothed."""
    smooth_X = count_X.astype(np.float64) + SMOOTHING
    return np.log(smooth_X) - math.log(smooth_X.sum())


def table(own_X: np.ndarray, public_X: np.ndarray) -> np.ndarray:
    """Log ratios [X] of how often each entry occurs, own text against public text, in nats.

    At most `LIMIT` to either side. Both sides are smoothed by as much, what one occurrence is in
    the shorter text: of an entry that neither has the longer one does not know more.

    Args:
      own_X: counts in the owner's text.
      public_X: log of the share of public text, of `log_share` or `public`.
    """
    share_X = np.exp(public_X, dtype=np.float64)
    n_own = max(own_X.sum(), 1)
    # The least share is what `log_share` makes of an entry that public text does not have.
    smoothing = max(SMOOTHING / n_own, share_X.min())
    ratio_X = np.log(own_X / n_own + smoothing) - np.log(share_X + smoothing)
    return np.clip(ratio_X, -LIMIT, LIMIT).astype(np.float32)


def public(parts: jax.Array | np.ndarray, axis: int = 0) -> jax.Array:
    """`log_share` of all public corpora together: each counts alike, however long it is.

    Args:
      parts: of each corpus.
      axis: the corpora; it is gone afterwards.
    """
    return jax.nn.logsumexp(parts, axis=axis) - math.log(parts.shape[axis])


def init(c: ModelConfig, rows: int) -> Gathered | None:
    """State of `rows` documents without a token; None without evidence."""
    if not c.router.evidence:
        return None
    tables = c.n_slots + c.router.evidence_parts
    return Gathered(jnp.zeros((rows, tables), jnp.float32), jnp.full(rows, -1, jnp.int32))


def of_documents(
    c: ModelConfig,
    shared: Mapping[str, Any],
    groups: Sequence[Any],
    tokens_BT: jax.Array,
    state: Gathered | None = None,
    *,
    allowed_BE: jax.Array | None = None,
    **documents: Any,
) -> tuple[jax.Array | None, Gathered | None]:
    """Evidence for each slot in each token's document so far, [B, T, E] float32, in nats.

    Args:
      state: of documents that began in earlier calls.
      documents: segments_BT, length_B and follows_BTS, as `router.gathered` takes them.

    Returns:
      the evidence, and the state after the last token (unchanged for branches); None and None in
      an architecture without evidence.
    """
    if not c.router.evidence:
        return None, None
    entry_BT = tokens_BT
    if c.router.evidence_pairs:
        before_BT = _before(tokens_BT, state and state.last_B, **documents)
        entry_BT = jnp.where(
            before_BT < 0, -1, hashed(before_BT, tokens_BT, c.router.evidence_pairs)
        )
    slots_BTE = of_entries(groups, entry_BT)
    n_slots = slots_BTE.shape[-1]
    if allowed_BE is not None:  # What a slot holds that no row may use meets nothing.
        slots_BTE = jnp.where(jnp.any(allowed_BE, axis=0), slots_BTE, 0)
    says_BTX = slots_BTE
    if c.router.evidence_parts:
        shares_BTP = _looked_up(shared[LEAF], entry_BT)
        ratio_BTP = shares_BTP - public(shares_BTP, axis=-1)[..., None]
        says_BTX = jnp.concatenate([slots_BTE, jnp.clip(ratio_BTP, -LIMIT, LIMIT)], axis=-1)
    judged_BTX, sum_BX = router.gathered(
        says_BTX, state and state.sum_BX, c.router.evidence, **documents
    )
    evidence_BTE, parts_BTP = judged_BTX[..., :n_slots], judged_BTX[..., n_slots:]
    if c.router.evidence_parts:
        evidence_BTE = evidence_BTE.at[..., router.PUBLIC_SLOT].add(public(parts_BTP, axis=-1))
    if state is not None and documents["follows_BTS"] is None:
        state = Gathered(sum_BX, _last(tokens_BT, state.last_B, documents["segments_BT"]))
    return evidence_BTE, state


def of_entries(groups: Sequence[Any], entry_BT: jax.Array) -> jax.Array:
    """What each entry says for each slot, [B, T, E] float32: 0 for the public slot, and at -1."""
    first = [g if isinstance(g, Mapping) else g[0] for g in groups]
    return _looked_up(jnp.concatenate([g[LEAF][0] for g in first]), entry_BT)


def _looked_up(table_YX: jax.Array, entry_BT: jax.Array) -> jax.Array:
    found = jnp.asarray(table_YX, jnp.float32).at[:, entry_BT].get(mode="clip")
    return jnp.moveaxis(jnp.where(entry_BT < 0, 0, found), 0, -1)


def _before(
    tokens_BT: jax.Array,
    last_B: jax.Array | None,
    *,
    segments_BT: jax.Array,
    length_B: jax.Array | None,
    follows_BTS: jax.Array | None,
) -> jax.Array:
    """The token before each token in its document, [B, T]; -1 where there is none."""
    del length_B  # `last_B` knows whether something was before.
    index_T = jnp.arange(tokens_BT.shape[1])
    last_B1 = -1 if last_B is None else last_B[:, None]
    if follows_BTS is None:
        first_BT = document_starts(segments_BT) if last_B is None else index_T == 0
        return jnp.where(first_BT, last_B1, jnp.roll(tokens_BT, 1, axis=1))
    # A path runs from left to right: of what a token follows, the nearest one stands before it.
    path_BTS = follows_BTS & (index_T < index_T[:, None])
    nearest_BT = jnp.max(jnp.where(path_BTS, index_T, -1), axis=-1)
    before_BT = jnp.take_along_axis(tokens_BT, jnp.maximum(nearest_BT, 0), axis=1)
    return jnp.where(nearest_BT < 0, last_B1, before_BT)


def _last(tokens_BT: jax.Array, last_B: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The token that each row's document ends with, [B]."""
    number_B1 = jnp.sum(segments_BT > 0, axis=1, keepdims=True)
    found_B1 = jnp.take_along_axis(tokens_BT, jnp.maximum(number_B1 - 1, 0), axis=1)
    return jnp.where(number_B1 > 0, found_B1, last_B[:, None])[:, 0].astype(jnp.int32)

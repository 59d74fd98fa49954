# SPDX-License-Identifier: Apache-2.0
"""From hidden states to combine weights: logits, bias, document context, selection, top-k.

Everything here is float32. Slots that a row denies are removed by selection, never by
multiplication, so that whatever a denied slot holds (NaN included) changes no bit of the row.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flexolmo_jax.layers import NEG_INF, document_starts

PUBLIC_SLOT = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Which slots serve each token, and how much.

    Attributes:
      index_BTA: slot of each active expert, best first; E (one past the end) where a row allows
        fewer slots than `n_active`.
      weight_BTA: combine weight, 0 where the index is E.
      probs_BTE: softmax over the allowed slots.
    """

    index_BTA: jax.Array
    weight_BTA: jax.Array
    probs_BTE: jax.Array

    @property
    def combine_BTE(self) -> jax.Array:
        """Combine weights by slot: 0 for slots that are not active."""
        n_slots = self.probs_BTE.shape[-1]
        hit_BTAE = self.index_BTA[..., None] == jnp.arange(n_slots)
        return jnp.sum(jnp.where(hit_BTAE, self.weight_BTA[..., None], 0.0), axis=-2)


def router_logits(x_BTD: jax.Array, router_ED: jax.Array) -> jax.Array:
    """Logit of every slot for every token, in float32 at full precision (paper section 3.2)."""
    return jnp.einsum(
        "BTD,ED->BTE",
        x_BTD.astype(jnp.float32),
        router_ED.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def effective_bias(bias_E: jax.Array) -> jax.Array:
    """The expert bias added to the logits: -softplus(raw) <= 0, and exactly 0 for the public slot.

    The reference clamps min(raw, 0), which has no gradient once raw > 0; this one always has.
    """
    slot_E = jnp.arange(bias_E.shape[-1])
    return jnp.where(slot_E == PUBLIC_SLOT, 0.0, -jax.nn.softplus(bias_E.astype(jnp.float32)))


def document_mean(
    logits_BTE: jax.Array,
    segments_BT: jax.Array,
    sum_BE: jax.Array | None = None,
    count_B: jax.Array | None = None,
    evidence: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Causal running mean of each slot's logit over its document so far, or its evidence.

    A segmented scan selects at document starts instead of subtracting prefix sums, so one
    document of a packed row cannot change a bit of the next. Padding (segment 0) adds nothing.

    Args:
      sum_BE, count_B: running state of a document that began in earlier calls (decoding).
      evidence: see `judged`.

    Returns:
      mean_BTE (or evidence), and the state after the last token: sum_BE, count_B.
    """
    valid_BT = segments_BT > 0
    value_BTE = jnp.where(valid_BT[..., None], logits_BTE, 0.0)
    number_BT = valid_BT.astype(jnp.float32)
    start_BT = document_starts(segments_BT)
    if sum_BE is not None and count_B is not None:
        # Decoding: one document per row, which goes on from the cached state.
        start_BT = jnp.zeros_like(start_BT)
        value_BTE = value_BTE.at[:, 0].add(sum_BE)
        number_BT = number_BT.at[:, 0].add(count_B)

    def combine(left, right):
        left_value, left_number, left_start = left
        value, number, start = right
        return (
            jnp.where(start[..., None], value, left_value + value),
            jnp.where(start, number, left_number + number),
            left_start | start,
        )

    total_BTE, number_BT, _ = jax.lax.associative_scan(
        combine, (value_BTE, number_BT, start_BT), axis=1
    )
    return judged(total_BTE, number_BT, evidence), total_BTE[:, -1], number_BT[:, -1]


def judged(total_BTE: jax.Array, number_BT: jax.Array, evidence: float) -> jax.Array:
    """What the summed logits of a document's `number_BT` tokens say about it.

    Args:
      evidence: 0 takes their mean. Else their sum, as if the tokens were independent, but worth at
        most so many tokens however long the document is, since they are not: n tokens count as
        n · evidence / (n + evidence).
    """
    number_BT1 = number_BT[..., None]
    if not evidence:
        return total_BTE / jnp.maximum(number_BT1, 1.0)
    return total_BTE * (evidence / (number_BT1 + evidence))


def path_mean(
    logits_BTE: jax.Array,
    follows_BTS: jax.Array,
    sum_BE: jax.Array,
    count_B: jax.Array,
    evidence: float = 0.0,
) -> jax.Array:
    """The same for documents that branch: over the tokens that each token follows.

    Args:
      follows_BTS: whether token s stands on the path to token t, or is it.
      sum_BE, count_B: running state before every path.
    """
    total_BTE = sum_BE[:, None] + jnp.einsum(
        "BTS,BSE->BTE",
        follows_BTS.astype(jnp.float32),
        logits_BTE,
        precision=jax.lax.Precision.HIGHEST,
    )
    number_BT = count_B[:, None] + jnp.sum(follows_BTS, axis=-1)
    return judged(total_BTE, number_BT, evidence)


def gathered(
    logits_BTE: jax.Array,
    sum_BE: jax.Array | None,
    evidence: float,
    *,
    segments_BT: jax.Array,
    length_B: jax.Array | None,
    follows_BTS: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """What every token's document so far says: `document_mean`, or `path_mean` where it branches.

    Returns:
      [B, T, E], and the running state after the last token, which branches leave as it was.
    """
    count_B = None if length_B is None else length_B.astype(jnp.float32)
    if follows_BTS is None:
        mean_BTE, sum_BE, _ = document_mean(logits_BTE, segments_BT, sum_BE, count_B, evidence)
        return mean_BTE, sum_BE
    assert sum_BE is not None and count_B is not None  # branches stand after a cached row
    return path_mean(logits_BTE, follows_BTS, sum_BE, count_B, evidence), sum_BE


def route(
    logits_BTE: jax.Array,
    n_active: int,
    *,
    allowed_BE: jax.Array | None = None,
    renormalize: bool = False,
    fallback: bool = False,
) -> Routing:
    """Softmax over the allowed slots, then the `n_active` largest (ties go to the lower slot).

    Every row must allow at least one slot; a row that allows fewer than `n_active` uses them all.

    Args:
      fallback: the public slot is always active, and its weight is what the probabilities of the
        other active slots leave of 1: y = public + sum of p_i (expert_i - public). What an expert
        that is not active, or not there, might have served then goes to public, not to strangers.
    """
    n_slots = logits_BTE.shape[-1]
    if allowed_BE is None:
        allowed_BE = jnp.ones((logits_BTE.shape[0], n_slots), dtype=bool)
    allowed_BTE = jnp.broadcast_to(allowed_BE[:, None, :], logits_BTE.shape)
    probs_BTE = jax.nn.softmax(jnp.where(allowed_BTE, logits_BTE, NEG_INF), axis=-1)
    # Denied slots rank below every allowed one, also below those whose probability underflowed.
    rank_BTE = jnp.where(allowed_BTE, jax.lax.stop_gradient(probs_BTE), -1.0)
    if fallback:
        first_E = jnp.arange(n_slots) == PUBLIC_SLOT
        rank_BTE = jnp.where(first_E & allowed_BTE, 2.0, rank_BTE)  # above any probability
    _, index_BTA = jax.lax.top_k(rank_BTE, min(n_active, n_slots))
    usable_BTA = jnp.take_along_axis(allowed_BTE, index_BTA, axis=-1)
    weight_BTA = jnp.where(usable_BTA, jnp.take_along_axis(probs_BTE, index_BTA, axis=-1), 0.0)
    if fallback:
        public_BTA = usable_BTA & (index_BTA == PUBLIC_SLOT)
        others_BT1 = jnp.sum(jnp.where(public_BTA, 0.0, weight_BTA), axis=-1, keepdims=True)
        weight_BTA = jnp.where(public_BTA, 1.0 - others_BT1, weight_BTA)
    if renormalize:
        weight_BTA = weight_BTA / jnp.sum(weight_BTA, axis=-1, keepdims=True)
    return Routing(jnp.where(usable_BTA, index_BTA, n_slots), weight_BTA, probs_BTE)


def label_loss(logits_LBTE: jax.Array, own_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Cross-entropy of "is this token the owner's?", own row (slot 1) against the public row.

    Minimised, a row's logit is a log density ratio between the owner's text and public text,
    so rows that never met compose: their softmax is a posterior over owners.

    Returns:
      nats per token, averaged over layers.
    """
    logit_LBT = logits_LBTE[..., 1] - logits_LBTE[..., PUBLIC_SLOT]
    signed = jnp.where(own_BT, logit_LBT, -logit_LBT)
    nll = jnp.where(mask_BT, jax.nn.softplus(-signed), 0.0)
    return jnp.sum(nll) / (logits_LBTE.shape[0] * jnp.maximum(jnp.sum(mask_BT), 1))


def load_balance(
    logits_LBTE: jax.Array,
    active_LBTE: jax.Array,
    mask_BT: jax.Array,
    n_slots: int | jax.Array,
) -> jax.Array:
    """E · sum over slots of (share of the assignments · mean probability); 1 when all are even.

    Averaged over layers. A product of two means over tokens: that of a whole batch is not the mean
    of its micro-batches, each of which is to be even where a step accumulates them. Source: Switch
    Transformer (arXiv 2101.03961), section 2.2, over all tokens of the batch.

    Args:
      logits_LBTE: minus infinity where a slot is empty.
      n_slots: E, of the slots that are not.
    """
    kept = mask_BT[None, ..., None]
    tokens = jnp.maximum(jnp.sum(mask_BT), 1)
    probs = jnp.where(kept, jax.nn.softmax(logits_LBTE, axis=-1), 0.0)
    mean_LE = jnp.sum(probs, axis=(1, 2)) / tokens
    served_LE = jnp.sum(kept & active_LBTE, axis=(1, 2)).astype(jnp.float32)
    share_LE = served_LE / jnp.maximum(jnp.sum(served_LE, axis=-1, keepdims=True), 1.0)
    return jnp.mean(jnp.sum(share_LE * mean_LE, axis=-1)) * n_slots

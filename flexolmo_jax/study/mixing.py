# SPDX-License-Identifier: Apache-2.0
"""Methods that mix whole models, from the losses of these models alone.

A probability that is averaged over models needs each model's probability of the token that came,
and nothing else. So every such method is a function of one table: negative log-likelihood of each
target under each model, `nll_MRT` [models, rows, positions], 0 where nothing is predicted.
"""

import dataclasses

import numpy as np

from flexolmo_jax import evaluate, evidence


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows of held-out text of one domain.

    Attributes:
      tokens, targets, segments: int [R, T] (see `data.packing`).
      mask: predicted positions. size: bytes of text that each target stands for.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    mask: np.ndarray
    size: np.ndarray

    @property
    def pieces(self) -> np.ndarray:
        """Number of the piece (part of a document in one row) of each predicted position, [R, T].

        Pieces count from 0; -1 where nothing is predicted.
        """
        key = self.segments + np.arange(len(self.segments))[:, None] * (self.segments.max() + 1)
        numbers = np.full(self.mask.shape, -1)
        numbers[self.mask] = np.unique(key[self.mask], return_inverse=True)[1]
        return numbers

    def score(self, nll_RT: np.ndarray) -> evaluate.Score:
        """The score of a table of losses, piece by piece."""
        pieces = self.pieces[self.mask]
        count = int(pieces.max()) + 1
        nats = np.bincount(pieces, nll_RT[self.mask].astype(np.float64), count)
        size = np.bincount(pieces, self.size[self.mask], count).astype(int)
        return evaluate.Score(nats.tolist(), size.tolist(), tokens=int(self.mask.sum()))


def posterior(nll_MRT: np.ndarray, text: Text, tau: float, *, causal: bool) -> np.ndarray:
    """Weight of each model at each position, [M, R, T]; equal priors.

    Args:
      tau: temperature; the larger, the more even.
      causal: weigh by the losses on the piece so far, summed (with tau 1 the Bayesian posterior);
        else by the mean loss on the whole piece, which includes the token to be predicted.

    Source: FlexOlmo paper, baselines (one weight per sequence, not causal); Branch-Train-Merge,
    arXiv 2208.03306, section 4.1 (posterior over experts given the prefix).
    """
    pieces = text.pieces
    nll = np.where(text.mask, nll_MRT, 0.0).astype(np.float64)
    if causal:
        loss_MRT = _before(nll, pieces)
    else:
        flat = pieces[text.mask]
        count = np.bincount(flat)
        mean_MP = np.stack([np.bincount(flat, row[text.mask]) / count for row in nll])
        loss_MRT = np.where(text.mask, mean_MP[:, np.maximum(pieces, 0)], 0.0)
    score = -loss_MRT / tau
    score -= score.max(axis=0)
    weights = np.exp(score)
    return weights / weights.sum(axis=0)


def _before(nll_MRT: np.ndarray, pieces_RT: np.ndarray) -> np.ndarray:
    """Sum of the losses on earlier positions of the same piece."""
    total = np.cumsum(nll_MRT, axis=-1) - nll_MRT
    new_RT = np.ones(pieces_RT.shape, bool)
    new_RT[:, 1:] = pieces_RT[:, 1:] != pieces_RT[:, :-1]
    first_RT = np.maximum.accumulate(np.where(new_RT, np.arange(new_RT.shape[1]), 0), axis=1)
    return total - np.take_along_axis(total, np.broadcast_to(first_RT, total.shape), axis=-1)


def keep_top(weights_MRT: np.ndarray, top: int) -> np.ndarray:
    """The `top` largest weights of each position, renormalised; 0 keeps all."""
    if not top or top >= len(weights_MRT):
        return weights_MRT
    rank = np.argsort(np.argsort(-weights_MRT, axis=0, kind="stable"), axis=0, kind="stable")
    kept = np.where(rank < top, weights_MRT, 0.0)
    return kept / kept.sum(axis=0)


def mixture(nll_MRT: np.ndarray, weights_MRT: np.ndarray) -> np.ndarray:
    """Losses [R, T] of the weighted average of the models' probabilities."""
    low = nll_MRT.min(axis=0)
    return low - np.log(np.sum(weights_MRT * np.exp(low - nll_MRT.astype(np.float64)), axis=0))


def branch_train_merge(
    nll_MRT: np.ndarray, text: Text, tau: float, *, top: int = 0, causal: bool = False
) -> np.ndarray:
    """Losses [R, T] of dense models whose probabilities are averaged by their fit to the text."""
    return mixture(nll_MRT, keep_top(posterior(nll_MRT, text, tau, causal=causal), top))


def chosen(nll_MRT: np.ndarray, index_RT: np.ndarray) -> np.ndarray:
    """Losses [R, T] of one model at each position."""
    return np.take_along_axis(nll_MRT, index_RT[None], axis=0)[0]


def best_per_position(nll_MRT: np.ndarray) -> np.ndarray:
    """Losses [R, T] of an oracle that knows the token: a bound that no router reaches."""
    return nll_MRT.min(axis=0)


@dataclasses.dataclass(frozen=True)
class PromptClassifier:
    """Names the domain of a piece by its first tokens: multinomial naive Bayes over them.

    It has seen the training text of every owner together, which no owner's expert has.

    Attributes:
      log_prob_CX: of each token id in each domain, or of each entry of pairs of tokens.
      length: tokens of a piece that are looked at.
      pairs: whether entries are pairs, hashed as tables of evidence are.
    """

    log_prob_CX: np.ndarray
    length: int
    pairs: bool = False

    @classmethod
    def fit(
        cls, counts_CX: np.ndarray, smoothing: float, length: int = 32, *, pairs: bool = False
    ) -> "PromptClassifier":
        """Learns from counts per domain, equal priors."""
        counts = counts_CX.astype(np.float64) + smoothing
        return cls(np.log(counts / counts.sum(axis=1, keepdims=True)), length, pairs)

    def classes(self, text: Text) -> np.ndarray:
        """Domain of each position, [R, T]; the same over a piece, its first tokens included."""
        pieces = text.pieces
        ahead = _before(np.ones((1, *pieces.shape)), pieces)[0]
        seen, entries = text.mask & (ahead < self.length), text.tokens
        if self.pairs:
            seen &= ahead > 0  # The first token of a piece has none before it.
            before = np.roll(entries, 1, axis=1)
            entries = evidence.hashed(before, entries, self.log_prob_CX.shape[1])
        count = int(pieces.max()) + 1
        score_CP = np.stack(
            [np.bincount(pieces[seen], row[entries[seen]], count) for row in self.log_prob_CX]
        )
        return np.where(text.mask, score_CP.argmax(axis=0)[np.maximum(pieces, 0)], 0)

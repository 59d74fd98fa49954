# SPDX-License-Identifier: Apache-2.0
"""Methods that use dense models of the owners, and mixtures that were trained together.

Each takes as many values to choose among as any other method, on the tuning split.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flexolmo_jax import tree
from flexolmo_jax.study import mixing
from flexolmo_jax.study.scorer import Losses, Scorer

# Four values each: temperatures of a posterior (nats), of a soup's weights, and smoothing.
TAUS = {False: (0.03, 0.1, 0.3, 1.0), True: (3.0, 10.0, 30.0, 100.0)}
SOUP_TAUS = (0.03, 0.1, 0.3, 1.0)
SMOOTHING = (0.1, 1.0, 10.0, 100.0)
# Classes of a classifier: the model that a class is sent to, and counts of its training text.
Classes = Sequence[tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with everything chosen.

    Attributes:
      losses: on held-out text.
      forward: dense models that a token passes through; a mixture gives its own count.
      chosen: what was chosen on the tuning split, and among what.
    """

    losses: Losses
    forward: int = 1
    chosen: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Split:
    """One split with the losses of the anchor and of every dense model on it, [M, R, T]."""

    scorer: Scorer
    nll: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, scorer: Scorer, models: Mapping[str, tree.Tree]) -> "Split":
        """Scores the models; the order of `models` is that of the table."""
        found = [scorer.losses(m["shared"], m["experts"]) for m in models.values()]
        return cls(scorer, {d: np.stack([f[d] for f in found]) for d in scorer.texts})


def choose(
    values: Sequence[Any], tuning: Callable[[Any], dict[str, float]]
) -> tuple[Any, dict[str, Any]]:
    """The value with the lowest mean bits per byte on the tuning split, and the record of it."""
    means = {str(value): float(np.mean(list(tuning(value).values()))) for value in values}
    best = min(values, key=lambda value: means[str(value)])
    return best, {"value": best, "tuning": means}


def branch_train_merge(tuning: Split, heldout: Split, top: int, causal: bool) -> Method:
    """BTM with a temperature chosen on the tuning split."""

    def merged(split: Split, tau: float) -> Losses:
        return {
            d: mixing.branch_train_merge(
                split.nll[d], split.scorer.texts[d], tau, top=top, causal=causal
            )
            for d in split.nll
        }

    tau, record = choose(TAUS[causal], lambda t: tuning.scorer.bits(merged(tuning, t)))
    models = len(next(iter(heldout.nll.values())))
    return Method(merged(heldout, tau), models, {"tau": record})


def weighted_soup(
    tuning: Split, heldout: Split, models: Mapping[str, tree.Tree], domains: Sequence[str]
) -> Method:
    """A soup for every row, weighed by each model's mean loss on that row."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *models.values())

    def shares(split: Split, tau: float) -> dict[str, np.ndarray]:
        out = {}
        for d, nll_MRT in split.nll.items():
            mean_MR = nll_MRT.sum(-1) / np.maximum(split.scorer.texts[d].mask.sum(-1), 1)
            score = -(mean_MR - mean_MR.min(0)) / tau
            out[d] = (np.exp(score) / np.exp(score).sum(0)).T
        return out

    def soup(split: Split, tau: float) -> Losses:
        return split.scorer.soup_losses(stacked, shares(split, tau), domains)

    tau, record = choose(SOUP_TAUS, lambda t: tuning.scorer.bits(soup(tuning, t)))
    # Every model is run once to weigh it, and the soup once.
    return Method(soup(heldout, tau), len(models) + 1, {"tau": record})


def prompt_routing(
    tuning: Split, heldout: Split, classes: Classes, models: Sequence[str], pairs: bool
) -> Method:
    """Every piece of text goes to one dense model, named by a classifier of its first tokens.

    Args:
      classes: what the classifier tells apart; several may belong to one model.
      models: names in the order of the splits' tables.
    """
    counts_CX = np.stack([counts for _, counts in classes])
    model_C = np.asarray([models.index(name) for name, _ in classes])

    def routed(split: Split, smoothing: float) -> Losses:
        classifier = mixing.PromptClassifier.fit(counts_CX, smoothing, pairs=pairs)
        return {
            d: mixing.chosen(nll, model_C[classifier.classes(split.scorer.texts[d])])
            for d, nll in split.nll.items()
        }

    best, record = choose(SMOOTHING, lambda s: tuning.scorer.bits(routed(tuning, s)))
    return Method(routed(heldout, best), 1, {"smoothing": record})


def of_dense_models(
    tuning: Split,
    heldout: Split,
    models: Mapping[str, tree.Tree],
    classes: Mapping[str, Classes],
) -> dict[str, Method]:
    """What needs the anchor and all of the owners' dense models at once, without training.

    Args:
      classes: of a classifier by "tokens", and by "pairs" if a recipe has evidence of pairs.
    """
    names, domains = list(models), list(heldout.nll)
    out = {"soup-weighted": weighted_soup(tuning, heldout, models, domains)}
    for kind, of in classes.items():
        routed = prompt_routing(tuning, heldout, of, names, kind == "pairs")
        out["prompt-routing-pairs" if kind == "pairs" else "prompt-routing"] = routed
    for causal in (False, True):
        for top in (1, 2, 0):
            name = f"btm-{'causal-' if causal else ''}{top or 'all'}"
            out[name] = branch_train_merge(tuning, heldout, top, causal)
    best = {
        d: int(np.argmin([_total(nll, m) for m in range(len(names))]))
        for d, nll in heldout.nll.items()
    }
    out["oracle-domain"] = Method({d: heldout.nll[d][best[d]] for d in domains})
    out["oracle-token"] = Method(
        {d: mixing.best_per_position(heldout.nll[d]) for d in domains}, len(names)
    )
    return out


def _total(nll_MRT: np.ndarray, m: int) -> float:
    return float(nll_MRT[m].sum(dtype=np.float64))

# SPDX-License-Identifier: Apache-2.0
"""Methods that mix models, against loops over documents written out one by one."""

import types

import numpy as np
import pytest
import toy

from flexolmo_jax import evidence
from flexolmo_jax.config import RouterConfig
from flexolmo_jax.study import mixing, rivals

M, R, T, V = 3, 4, 12, 7
PAIRS = toy.config(router=RouterConfig("document", evidence=1.0, evidence_pairs=500))


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    segments = np.array(
        [[1] * 5 + [2] * 7, [1] * 12, [1] * 2 + [2] * 3 + [3] * 7, [1] * 6 + [0] * 6]
    )
    following = np.roll(segments, -1, axis=1)
    mask = (segments == following) & (segments > 0)
    mask[:, -1] = False
    tokens = rng.integers(0, V, (R, T))
    size = rng.integers(1, 5, (R, T)) * mask
    return mixing.Text(tokens, np.roll(tokens, -1, 1), segments, mask, size)


@pytest.fixture(scope="module")
def nll(text):
    return np.random.default_rng(1).uniform(0.5, 3.0, (M, R, T)) * text.mask


def documents(text):
    """Row and predicted positions of each piece."""
    for row in range(R):
        for segment in np.unique(text.segments[row]):
            at = np.flatnonzero((text.segments[row] == segment) & text.mask[row])
            if len(at):
                yield row, at


def slowly(nll, text, tau, top, causal):
    out = np.zeros((R, T))
    for row, at in documents(text):
        for i, t in enumerate(at):
            if causal:
                losses = [sum(nll[m, row, s] for s in at[:i]) for m in range(M)]
            else:
                losses = [np.mean([nll[m, row, s] for s in at]) for m in range(M)]
            weights = np.exp([-x / tau for x in losses])
            weights /= weights.sum()
            if top:
                kept = np.argsort(-weights)[:top]
                weights = np.array([w if m in kept else 0.0 for m, w in enumerate(weights)])
                weights /= weights.sum()
            out[row, t] = -np.log(sum(w * np.exp(-nll[m, row, t]) for m, w in enumerate(weights)))
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("top", [0, 1, 2])
@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_branch_train_merge(nll, text, tau, top, causal):
    """Mutations: the token itself among those before it; sums that run over two documents."""
    got = mixing.branch_train_merge(nll, text, tau, top=top, causal=causal)
    expected = slowly(nll, text, tau, top, causal)
    # Before its first token a document speaks for no model: which of equals are kept is open.
    judged = text.mask & (mixing._before(text.mask[None].astype(float), text.pieces)[0] > 0)
    judged = judged if causal and top else text.mask
    np.testing.assert_allclose(got[judged], expected[judged], rtol=1e-12)


def test_a_causal_weight_does_not_know_what_comes(nll, text):
    before = mixing.posterior(nll, text, 1.0, causal=True)
    row, at = next(d for d in documents(text) if len(d[1]) > 6)
    changed = nll.copy()
    changed[:, row, at[4]] += np.array([0.0, 1.0, 2.0])
    after = mixing.posterior(changed, text, 1.0, causal=True)
    moved = np.unique(np.nonzero(np.abs(after - before).sum(0) > 1e-12)[1])
    assert moved.min() == at[5]


def test_scores_are_totals_over_pieces(nll, text):
    score = text.score(nll[0])
    assert score.tokens == text.mask.sum() and len(score.nats) == len(list(documents(text)))
    expected = nll[0][text.mask].sum() / np.log(2) / text.size[text.mask].sum()
    assert score.bits_per_byte == pytest.approx(expected, rel=1e-12)
    assert score.nats == pytest.approx([nll[0, r, at].sum() for r, at in documents(text)])


def test_an_oracle_is_never_worse(nll, text):
    best = mixing.best_per_position(nll)
    assert (best <= mixing.branch_train_merge(nll, text, 1.0)).all()
    index = np.argmin(nll, axis=0)
    np.testing.assert_array_equal(mixing.chosen(nll, index), best)


def test_a_prompt_is_known_by_its_first_tokens(text):
    """Mutation: `seen` without the limit of length."""
    counts = np.ones((2, V))
    counts[0, 0], counts[1, 1] = 50, 50
    tokens = np.full((R, T), 0)
    tokens[:, 2:] = 1  # Only the first two tokens of a row speak for class 0.
    whole = np.ones((R, T), bool)
    asked = mixing.Text(tokens, text.targets, np.ones((R, T), int), whole, text.size)
    two = mixing.PromptClassifier.fit(counts, 1.0, length=2).classes(asked)
    all_ = mixing.PromptClassifier.fit(counts, 1.0, length=T).classes(asked)
    assert (two == 0).all() and (all_ == 1).all()


# Broken once by a pair with the last token of the piece before.
def test_a_classifier_of_pairs_knows_the_order(text):
    """Two domains of the same tokens: 0 1 2 over and over, and 2 1 0."""
    domains = [np.resize(order, 60) for order in ([0, 1, 2], [2, 1, 0])]
    counts = np.stack([evidence.count(PAIRS, tokens) for tokens in domains])
    tokens = np.stack(
        [np.resize(order, T) for order in ([2, 0, 1], [2, 1, 0], [0, 1, 2], [1, 0, 2])]
    )
    segments, whole = np.ones((R, T), int), np.ones((R, T), bool)
    asked = mixing.Text(tokens, text.targets, segments, whole, text.size)
    classifier = mixing.PromptClassifier.fit(counts, 0.1, length=T, pairs=True)
    np.testing.assert_array_equal(classifier.classes(asked)[:, 0], [0, 1, 0, 1])
    # A piece of one token makes no pair, so nothing is known of it: the first domain.
    segments[:, 1:] = 2
    tokens[:, :2] = 2, 1
    alone = mixing.PromptClassifier.fit(counts, 0.1, length=1, pairs=True)
    apart = mixing.Text(tokens, text.targets, segments, whole, text.size)
    assert (alone.classes(apart) == 0).all()


def test_several_classes_of_a_classifier_may_belong_to_one_model(text):
    """Mutation: the number of the class taken for that of the model."""
    nll = np.stack([np.full((R, T), value, float) for value in (1.0, 2.0)])
    tokens = np.resize([[0], [1], [2]], (R, 1)) * np.ones((1, T), int)
    asked = mixing.Text(
        tokens, text.targets, np.ones((R, T), int), np.ones((R, T), bool), text.size
    )

    scorer = types.SimpleNamespace(
        texts={"all": asked}, bits=lambda found: {d: float(x.mean()) for d, x in found.items()}
    )
    split = rivals.Split(scorer, {"all": nll})
    counts = np.eye(V)[:3] * 50
    classes = [("public", counts[0]), ("public", counts[1]), ("code", counts[2])]
    found = rivals.prompt_routing(split, split, classes, ["public", "code"], pairs=False)
    expected = np.where(tokens == 2, 2.0, 1.0)
    np.testing.assert_array_equal(found.losses["all"], expected)

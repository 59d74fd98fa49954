# SPDX-License-Identifier: Apache-2.0
"""What tokens say of a document: tables made alone, sums that saturate, and the way to a model."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_router_init import run_config

from flexolmo_jax import evidence, model, router
from flexolmo_jax.config import DataConfig, ModelConfig, RouterConfig, RouterInitConfig
from flexolmo_jax.data import shards
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.experts import router_init
from flexolmo_jax.typed import from_dict


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return toy.texts(tmp_path_factory.mktemp("texts"))


def ratio(own_V, public_V):
    return evidence.table(evidence.log_share(own_V), evidence.log_share(public_V))


# Broken once by swapping the two sides, and by smoothing the own side only.
def test_a_table_is_a_smoothed_log_ratio():
    own, public = np.array([90, 0, 0, 10]), np.array([0, 0, 190, 10])
    want = np.log(np.array([100, 10, 10, 20]) / 140) - np.log(np.array([10, 10, 200, 20]) / 240)
    made = ratio(own, public)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, want, rtol=1e-6)
    np.testing.assert_array_equal(ratio(own, own), 0)
    # However often a token stands on one side alone, it says so much and no more.
    far = ratio(np.array([10**6, 0]), np.array([0, 10**6]))
    np.testing.assert_array_equal(far, [evidence.LIMIT, -evidence.LIMIT])
    # One occurrence in a long text hardly shows: it is a tenth of what smoothing adds.
    once = np.array([10**6, 1, 0, 0]), np.array([10**6, 0, 0, 0])
    np.testing.assert_allclose(ratio(*once)[1], np.log(1.1), atol=1e-4)


def test_tables_are_counted_from_both_texts_and_no_other(texts):
    c = toy.config(vocab_size=texts.vocab_size, router=RouterConfig("document", evidence=4.0))
    counts = []
    for path in (texts.own, texts.public):
        opened = shards.open_shards(path)
        counts.append(np.bincount(opened.tokens(0, opened.n_tokens), minlength=c.vocab_size))
    made = router_init.evidence_table(run_config(texts), c)
    np.testing.assert_array_equal(made, ratio(*counts)[None, None])
    # An anchor that tells public corpora apart is the ruler, whatever public text the owner has.
    parts = np.log(np.random.default_rng(0).dirichlet(np.ones(c.vocab_size), 2))
    made = router_init.evidence_table(run_config(texts), c, parts)
    want = evidence.table(evidence.log_share(counts[0]), np.log(np.exp(parts).mean(0)))
    np.testing.assert_allclose(made[0, 0], want, atol=1e-5)
    alone = DataConfig(sources=run_config(texts).data.sources[:1], seq_len=16)
    again = router_init.evidence_table(run_config(texts, data=alone), c, parts)
    np.testing.assert_array_equal(again, made)
    only = DataConfig(sources=run_config(texts).data.sources[:1], seq_len=16)
    with pytest.raises(ConfigError, match="evidence compares text of the owner with public text"):
        router_init.evidence_table(run_config(texts, data=only), c)


def test_a_long_text_is_counted_by_stretches_that_lie_evenly_over_it(texts, monkeypatch):
    opened = shards.open_shards(texts.own)
    n = opened.n_tokens
    monkeypatch.setattr(router_init, "COUNTED", 60)
    monkeypatch.setattr(router_init, "STRETCH", 20)
    own, public = run_config(texts).data.sources
    counts = router_init._counts([own], texts.vocab_size)
    # Beginning, middle and end.
    places = [*range(20), *range((n - 20) // 2, (n - 20) // 2 + 20), *range(n - 20, n)]
    want = np.bincount(opened.tokens(0, n)[places], minlength=texts.vocab_size)
    np.testing.assert_array_equal(counts, want)
    assert router_init._counts([own, public], texts.vocab_size).sum() == 60


def test_n_tokens_count_as_many_as_are_worth_it():
    total, number = jnp.array([[[12.0]]]), jnp.array([[6.0]])
    assert router.judged(total, number, 0.0) == 2.0
    # Worth 3 tokens at most: 6 count as 2.
    assert router.judged(total, number, 3.0) == pytest.approx(4.0)
    assert router.judged(total, number, 1e9) == pytest.approx(12.0)
    nothing = jnp.zeros((1, 1, 1)), jnp.zeros((1, 1))
    assert router.judged(*nothing, 0.0) == router.judged(*nothing, 3.0) == 0


def test_a_document_that_does_not_branch_says_the_same_either_way():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((2, 5, 3)), jnp.float32)
    start, count = jnp.asarray(rng.standard_normal((2, 3)), jnp.float32), jnp.array([4.0, 7.0])
    chain = jnp.asarray(np.broadcast_to(np.tril(np.ones((5, 5), bool)), (2, 5, 5)))
    branches = router.path_mean(logits, chain, start, count, 6.0)
    straight, *_ = router.document_mean(logits, jnp.ones((2, 5), jnp.int32), start, count, 6.0)
    np.testing.assert_allclose(branches, straight, atol=1e-5)


def test_each_slot_reads_its_own_table():
    c = toy.config(router=RouterConfig("document", evidence=4.0))
    table = toy.params(c)["experts"]["evidence"]
    assert table.shape == (1, c.n_slots, c.vocab_size)
    groups = tuple({"evidence": part} for part in np.split(np.asarray(table), [1, 3], axis=1))
    tokens = toy.batch()["tokens"]
    says = np.asarray(evidence.of_tokens(groups, tokens))
    for slot in range(c.n_slots):
        np.testing.assert_array_equal(says[..., slot], np.asarray(table)[0, slot][tokens])


# Broken once by the sum of the odds in place of their mean, and by the mean of the evidence.
def test_public_text_is_what_any_of_its_corpora_is():
    """Three documents: of one corpus, of the other, and of an owner; tables far apart."""
    c = toy.config(router=RouterConfig("document", evidence=1e9, evidence_parts=2), n_slots=2)
    V = c.vocab_size
    # Shares of each token in two corpora: one has more of token 0, the other of token 1.
    shares, own = np.full((2, V), 0.25), np.zeros((1, 2, V), np.float32)
    shares[:, :2], own[0, 1, 2] = [[0.35, 0.05], [0.15, 0.45]], 3.0
    parts = np.log(shares).astype(np.float32)
    where = {"length_B": None, "follows_BTS": None}
    made, gathered = evidence.of_documents(
        c, {"evidence": parts}, ({"evidence": own},), jnp.array([[0, 1, 2]]),
        segments_BT=jnp.array([[1, 2, 3]]), **where,
    )  # fmt: skip
    # Against both together the odds of one token are 1 on average: those of three are not.
    np.testing.assert_allclose(made[0], [[0, 0], [0, 0], [0, 3]], atol=1e-5)
    np.testing.assert_allclose(gathered, [[0, 3, 0, 0]], atol=1e-6)  # of the last document
    made, _ = evidence.of_documents(
        c, {"evidence": parts}, ({"evidence": own},), jnp.array([[0, 0, 0, 1]]),
        segments_BT=jnp.array([[1, 1, 1, 2]]), **where,
    )  # fmt: skip
    odds = shares[:, 0] / shares[:, 0].mean()
    np.testing.assert_allclose(made[0, 2, 0], np.log(np.mean(odds**3)), rtol=1e-5)
    # However seldom a token is in a corpus, it says `LIMIT` against it and no more.
    parts[0, 1] = -100.0
    made, _ = evidence.of_documents(
        c, {"evidence": parts}, ({"evidence": own},), jnp.array([[1]]),
        segments_BT=jnp.ones((1, 1), jnp.int32), **where,
    )  # fmt: skip
    least = np.mean([np.exp(-evidence.LIMIT), 2.0])
    np.testing.assert_allclose(made[0, 0, 0], np.log(least), rtol=1e-5)


def test_an_anchor_counts_each_of_its_corpora(texts):
    router_ = RouterConfig("document", evidence=4.0, evidence_parts=2)
    c = toy.config(vocab_size=texts.vocab_size, router=router_)
    own, public = run_config(texts).data.sources
    both = DataConfig(sources=(dataclasses.replace(own, public=True), public), seq_len=16)
    made = router_init.public_parts(run_config(texts, data=both), c)[evidence.LEAF]
    counts = [router_init._counts([s], texts.vocab_size) for s in both.sources]
    want = np.array([evidence.log_share(x) for x in counts], np.float32)
    np.testing.assert_array_equal(made, want)
    with pytest.raises(ConfigError, match=r"1 public source\(s\), evidence_parts=2"):
        router_init.public_parts(run_config(texts), c)
    plain = toy.config(router=RouterConfig("document", evidence=4.0))
    assert router_init.public_parts(run_config(texts), plain) == {}


@pytest.mark.parametrize("asked", [{"evidence_parts": 2}, {"evidence": 4.0, "evidence_parts": 1}])
def test_a_corpus_is_told_from_another(asked):
    with pytest.raises(ConfigError, match="told apart by evidence"):
        RouterConfig("document", **asked)


@pytest.mark.parametrize(
    "router_",
    [
        {"context": "token", "evidence": 3.0},
        {"context": "document", "evidence": -1.0},
        {"context": "document", "evidence": float("nan")},
        {"context": "document", "evidence": float("inf")},
    ],
)
def test_evidence_needs_documents(router_):
    with pytest.raises(ConfigError, match="gathered over documents"):
        RouterConfig(**router_)


def test_models_without_evidence_are_written_as_before_there_was_any():
    plain = toy.config()
    assert set(plain.to_json()["router"]) == {"context", "renormalize", "fallback"}
    assert "adapters" not in plain.to_json()
    assert "evidence" not in model.abstract_params(plain)["experts"]
    for c in (plain, toy.config(router=RouterConfig("document", evidence=4.0))):
        text = json.dumps(c.to_json())
        assert from_dict(ModelConfig, json.loads(text)) == c
    assert json.loads(text)["router"]["evidence"] == 4.0
    assert "evidence_parts" not in json.loads(text)["router"]
    assert "evidence" not in model.abstract_params(c)["shared"]


def test_auto_is_what_suits_the_anchor():
    auto = RouterInitConfig(method="auto")
    plain = router_init.resolve(auto, toy.config())
    assert plain == dataclasses.replace(auto, method="discriminant", recalibrate=True)
    c = toy.config(router=RouterConfig("document", evidence=4.0))
    beside = router_init.resolve(auto, c)
    assert (beside.method, beside.recalibrate) == ("zeros", True)
    effective = router.effective_bias(jnp.array([0.0, beside.bias]))
    assert effective[1] == pytest.approx(router_init.EVIDENCE_BIAS)
    given = RouterInitConfig(method="hidden_mean")
    assert router_init.resolve(given, c) is given


def test_recalibration_keeps_half_of_a_row_beside_evidence(texts):
    router_ = RouterConfig("document", evidence=4.0)
    c = toy.config(vocab_size=texts.vocab_size, n_slots=2, n_active=2, router=router_)
    params = toy.params(c)
    halves = [{n: x[:, i : i + 1] for n, x in params["experts"].items()} for i in range(2)]
    made = router_init.recalibrate(run_config(texts), c, params["shared"], *halves)
    np.testing.assert_array_equal(made["router"], 0.5 * np.asarray(halves[1]["router"]))
    lower = np.logaddexp(0, made["bias"]) - np.logaddexp(0, np.asarray(halves[1]["bias"]))
    np.testing.assert_allclose(lower, router_init.EVIDENCE_MARGIN, rtol=1e-5)
    assert made["evidence"] is halves[1]["evidence"]

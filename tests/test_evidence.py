# SPDX-License-Identifier: Apache-2.0
"""What tokens say of a document: tables made alone, sums that saturate, and the way to a model."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from reference import numpy_olmo2
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


def ratio(own_X, public_X):
    return evidence.table(own_X, evidence.log_share(public_X))


# Broken once by swapping the two sides, and by smoothing the own side only.
def test_a_table_is_a_smoothed_log_ratio():
    own, public = np.array([5, 1, 0, 4]), np.array([96, 0, 29, 71])
    # One of ten is added to shares.
    want = np.log(np.array([6, 2, 1, 5]) / (np.array([97, 1, 30, 72]) / 200 * 10 + 1))
    made = ratio(own, public)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, want, rtol=1e-6)
    # However often a token stands on one side alone, it says so much and no more.
    far = ratio(np.array([10**6, 0]), np.array([0, 10**6]))
    np.testing.assert_array_equal(far, [evidence.LIMIT, -evidence.LIMIT])
    # What neither side has says little, and nothing for the owner, however much longer one is.
    for sizes in ((10, 10**6), (10**6, 10)):
        assert -0.7 < ratio(*(np.array([size, 0]) for size in sizes))[1] <= 0


# The reference has it in arithmetic of whole numbers.
def test_pairs_have_the_same_entry_everywhere():
    rng = np.random.default_rng(0)
    before, tokens = (rng.integers(0, 200_000, 500) for _ in range(2))
    want = [
        numpy_olmo2.entry_of_pair(int(a), int(b), 1000) for a, b in zip(before, tokens, strict=True)
    ]
    np.testing.assert_array_equal(evidence.hashed(before, tokens, 1000), want)
    on_device = jax.jit(functools.partial(evidence.hashed, pairs=1000))
    np.testing.assert_array_equal(on_device(jnp.asarray(before), jnp.asarray(tokens)), want)
    # Neighbours, and the same two the other way round, are spread over the table.
    grid = np.stack(np.meshgrid(np.arange(300), np.arange(300)), -1).reshape(-1, 2)
    spread = np.bincount(evidence.hashed(*grid.T, 1000), minlength=1000)
    assert spread.min() > 50 and spread.max() < 140
    assert np.mean(evidence.hashed(*grid.T, 1000) == evidence.hashed(*grid.T[::-1], 1000)) < 0.01


# Broken once by pairs across documents, by the last token of a padded row as the state, and by
# pairs of neighbours in a row whose documents branch.
def test_a_pair_lies_inside_its_document():
    """Token by token after a beginning, branches and packed rows see the same pairs."""
    c = toy.config(router=RouterConfig("document", evidence=1e9, evidence_pairs=512))
    groups = ({"evidence": np.random.default_rng(0).standard_normal((1, 4, 512), np.float32)},)

    def says(tokens, segments, state=None, length=None, follows=None):
        made, state = evidence.of_documents(
            c, {}, groups, jnp.asarray(tokens, jnp.int32), state,
            segments_BT=jnp.asarray(segments), length_B=length, follows_BTS=follows,
        )  # fmt: skip
        return np.asarray(made), state

    def sum_of(*pairs):
        at = [numpy_olmo2.entry_of_pair(*pair, 512) for pair in pairs]
        return groups[0]["evidence"][0][:, at].sum(-1) if at else np.zeros(4)

    packed, _ = says([[5, 6, 7, 8, 9]], [[1, 1, 1, 2, 2]])
    want = [sum_of(), sum_of((5, 6)), sum_of((5, 6), (6, 7)), sum_of(), sum_of((8, 9))]
    np.testing.assert_allclose(packed[0], want, atol=1e-6)
    # A row that ends in padding, and one that has not begun.
    state = evidence.init(c, 2)
    _, state = says([[5, 6, 0], [0, 0, 0]], [[1, 1, 0], [0, 0, 0]], state, jnp.array([0, 0]))
    np.testing.assert_array_equal(state.last_B, [6, -1])
    after, state = says([[7], [7]], [[1], [1]], state, jnp.array([2, 0]))
    np.testing.assert_allclose(after[:, 0], [sum_of((5, 6), (6, 7)), sum_of()], atol=1e-6)
    np.testing.assert_array_equal(state.last_B, [7, 7])
    # Endings 8 9, 8 4 and 3 after the first row: 4 stands beside 9, but comes after 8.
    first = jax.tree.map(lambda leaf: leaf[:1], state)
    follows = jnp.asarray([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]], bool)
    branches, same = says([[8, 9, 4, 3]], [[1, 1, 1, 1]], first, jnp.array([3]), follows)
    before = sum_of((5, 6), (6, 7))
    ends = [sum_of((7, 8)), sum_of((7, 8), (8, 9)), sum_of((7, 8), (8, 4)), sum_of((7, 3))]
    np.testing.assert_allclose(branches[0], [before + end for end in ends], atol=1e-6)
    assert same is first


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
    want = evidence.table(counts[0], np.log(np.exp(parts).mean(0)))
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
    c = toy.config(vocab_size=texts.vocab_size)
    counts = router_init._counts([own], c)
    # Beginning, middle and end.
    places = [*range(20), *range((n - 20) // 2, (n - 20) // 2 + 20), *range(n - 20, n)]
    want = np.bincount(opened.tokens(0, n)[places], minlength=texts.vocab_size)
    np.testing.assert_array_equal(counts, want)
    assert router_init._counts([own, public], c).sum() == 60
    # Pairs are counted inside a stretch.
    pairs = c.replace(router=RouterConfig("document", evidence=4.0, evidence_pairs=50))
    counts = router_init._counts([own], pairs)
    assert counts.shape == (50,) and counts.sum() == 3 * 19
    tokens = [opened.tokens(0, n)[i : i + 20] for i in (0, (n - 20) // 2, n - 20)]
    want = [evidence.hashed(t[:-1], t[1:], 50) for t in tokens]
    np.testing.assert_array_equal(counts, np.bincount(np.concatenate(want), minlength=50))


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
    says = np.asarray(evidence.of_entries(groups, tokens))
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
    assert gathered is None  # Nothing goes on.
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
    counts = [router_init._counts([s], c) for s in both.sources]
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


@pytest.mark.parametrize("asked", [(0.0, 9), (4.0, -1), (4.0, 1), (4.0, 1 << 33)])
def test_pairs_are_evidence(asked):
    evidence_, pairs = asked
    with pytest.raises(ConfigError, match="Pairs of tokens are evidence"):
        RouterConfig("document", evidence=evidence_, evidence_pairs=pairs)


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
    assert not {"evidence_parts", "evidence_pairs"} & json.loads(text)["router"].keys()
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


def test_recalibration_keeps_a_quarter_of_a_row_beside_evidence(texts):
    router_ = RouterConfig("document", evidence=4.0)
    c = toy.config(vocab_size=texts.vocab_size, n_slots=2, n_active=2, router=router_)
    params = toy.params(c)
    halves = [{n: x[:, i : i + 1] for n, x in params["experts"].items()} for i in range(2)]
    made = router_init.recalibrate(run_config(texts), c, params["shared"], *halves)
    np.testing.assert_array_equal(made["router"], 0.25 * np.asarray(halves[1]["router"]))
    lower = np.logaddexp(0, made["bias"]) - np.logaddexp(0, np.asarray(halves[1]["bias"]))
    np.testing.assert_allclose(lower, 1.5, rtol=1e-5)
    assert made["evidence"] is halves[1]["evidence"]

# SPDX-License-Identifier: Apache-2.0
"""Public documents that stand for an owner's text where its router is tuned."""

import numpy as np
import toy

from flexolmo_jax.data import shards, tokenize
from flexolmo_jax.study import (
    proxies,
)


def test_proxies_are_the_public_documents_that_look_like_the_owners(tmp_path):
    rng = np.random.default_rng(0)
    own = rng.normal(size=(30, 8)) + 2.0
    public = rng.normal(size=(60, 8))
    public[:10] += 2.0
    score = proxies.relevance(own, public)
    assert set(np.argsort(-score)[:10]) == set(range(10))


def test_diversity_passes_over_a_copy():
    score = np.array([3.0, 2.9, 1.0, 0.0])
    vectors = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    tokens = np.full(4, 10)
    assert proxies.select(score, vectors, tokens, 20, 0.0) == [0, 1]
    assert proxies.select(score, vectors, tokens, 20, 5.0) == [0, 2]
    assert proxies.select(score, vectors, tokens, 5, 0.0) == [0]
    assert len(proxies.select(score, vectors, tokens, 10**6, 0.0)) == 4


def test_proxies_are_token_shards(tmp_path):
    texts = toy.texts(tmp_path)

    def letters(found):
        return np.array([[len(t), t.count("e"), 1.0] for t in found], np.float64)

    facts = proxies.write(
        texts.own,
        [texts.public],
        tmp_path / "proxies",
        tokenizer=texts.tokenizer,
        embedder=letters,
        budget=50,
    )
    opened = shards.open_shards(
        tmp_path / "proxies", tokenizer_digest=tokenize.digest(texts.tokenizer)
    )
    assert opened.n_documents == facts["documents"] and opened.n_tokens == facts["tokens"] >= 50
    public = shards.open_shards(texts.public)
    known = {public.document(i).tobytes() for i in range(public.n_documents)}
    assert all(opened.document(i).tobytes() in known for i in range(opened.n_documents))

# SPDX-License-Identifier: Apache-2.0
"""Directories that the trainings of a study start from."""

import dataclasses

import numpy as np
import toy
from expert_helpers import make_anchor, random_tree

from flexolmo_jax import evidence, model, moe, router, tree
from flexolmo_jax.config import AdapterConfig, RouterConfig
from flexolmo_jax.experts import model_dir
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.study import starts
from flexolmo_jax.study.design import Recipe


def test_the_papers_anchor_differs_in_the_router_alone(tmp_path):
    texts = toy.texts(tmp_path)
    config = toy.config(n_slots=1, n_active=1, vocab_size=texts.vocab_size)
    config = config.replace(router=RouterConfig("document"))
    params = random_tree(model.abstract_params(config), 0)
    piece = slices.take_slot(params["experts"], 0)
    # As imports leave it: how it was trained is not known.
    training = {"stage": "imported"}
    made = model_dir.write_model(
        tmp_path / "anchor", config, params["shared"], piece, texts.tokenizer, training
    )
    info = starts.agreed(made.path, tmp_path / "token", Recipe("token", 0.0), [texts.public])
    assert info.config.router == RouterConfig("token") and info.is_anchor
    _, other, _ = model_dir.load_model(info.path)
    _, whole, _ = model_dir.load_model(made.path)
    old, new = tree.digests(whole), tree.digests(other)
    assert {name for name in old if old[name] != new[name]} == {"experts/router"}
    row = other["experts"]["router"]
    assert np.abs(row).max() > 0 and (row == row[:1]).all()  # One vector for all layers.


def test_an_anchor_with_room_for_more_is_the_same_model(tmp_path):
    anchor = make_anchor(tmp_path / "anchor")
    more = Recipe("document", 0.0, adapters=AdapterConfig(3, 2, True))
    assert more.agreed == "document-attention3-head2-norms1"
    info = starts.agreed(anchor.path, tmp_path / "more", more, [])
    assert info.config.adapters == more.adapters
    assert info.anchor_digest != anchor.anchor_digest
    _, old, _ = model_dir.load_model(anchor.path)
    _, new, _ = model_dir.load_model(info.path)
    old, new = tree.flatten(old), tree.flatten(new)
    assert all(np.array_equal(new[name], old[name]) for name in old)
    assert not any(np.any(new[name]) for name in new.keys() - old.keys())
    # Without more it is the anchor itself, and mixtures of rivals hold FFNs alone.
    same = starts.agreed(anchor.path, tmp_path / "same", Recipe("document", 0.0), [])
    assert same.anchor_digest == anchor.anchor_digest
    mixed = starts.upcycled(info.path, tmp_path / "m", ("a",), n_active=2, seed=0)
    assert mixed.config.adapters == AdapterConfig()


def test_public_corpora_have_their_tables_where_a_recipe_says_so(tmp_path):
    """Mutation: shared weights handed on with the tables in them."""
    texts = toy.texts(tmp_path)
    config = toy.config(n_slots=1, n_active=1, vocab_size=texts.vocab_size)
    params = random_tree(model.abstract_params(config), 0)
    piece = slices.take_slot(params["experts"], 0)
    plain = model_dir.write_model(
        tmp_path / "anchor", config, params["shared"], piece, texts.tokenizer, {}
    )
    recipe = Recipe("document", 0.0, evidence=4.0, parts=True)
    assert recipe.agreed == "document-evidence4-parts1"
    public = [texts.public, texts.own]
    info = starts.agreed(plain.path, tmp_path / "parts", recipe, public)
    assert info.config.router == RouterConfig("document", evidence=4.0, evidence_parts=2)
    shared = model_dir.load_model(info.path)[1]["shared"]
    assert shared[evidence.LEAF].shape == (2, texts.vocab_size) and shared[evidence.LEAF].any()
    # Tables of pairs beside an anchor whose own are of tokens.
    pairs = dataclasses.replace(recipe, pairs=50)
    assert pairs.agreed == "document-evidence4-parts1-pairs50"
    info = starts.agreed(info.path, tmp_path / "pairs", pairs, public)
    params_of_pairs = model_dir.load_model(info.path)[1]
    assert params_of_pairs["shared"][evidence.LEAF].shape == (2, 50)
    assert params_of_pairs["experts"][evidence.LEAF].shape == (1, 1, 50)
    # Others make do without, wherever they start from.
    one = starts.agreed(info.path, tmp_path / "one", Recipe("document", 0.0, evidence=4.0), public)
    mixed = starts.upcycled(info.path, tmp_path / "m", ("a",), n_active=2, seed=0)
    for path in (one.path, mixed.path):
        found = model_dir.load_model(path)[1]["shared"]
        assert tree.digests(found) == tree.digests(params["shared"])


def test_an_upcycled_mixture_starts_as_its_anchor(tmp_path):
    anchor = make_anchor(tmp_path / "anchor")
    info = starts.upcycled(anchor.path, tmp_path / "m", ("a", "b"), n_active=2, seed=0)
    _, params, _ = model_dir.load_model(info.path)
    assert list(info.slots) == ["public", "a", "b"] and info.config.n_active == 2
    for name in moe.WEIGHTS:
        leaf = params["experts"][name]
        assert (leaf == leaf[:, :1]).all()
    rows_ = params["experts"]["router"]
    assert len(np.unique(rows_)) == rows_.size and np.abs(rows_).max() < 0.2
    assert (np.asarray(router.effective_bias(params["experts"]["bias"][0])) == 0).all()
    _, whole, _ = model_dir.load_model(anchor.path)
    assert tree.digests(params["shared"]) == tree.digests(whole["shared"])

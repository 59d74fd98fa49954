# SPDX-License-Identifier: Apache-2.0
"""Small models on disk, of every kind that another program has a class for."""

import functools
import tempfile
from pathlib import Path

import data_helpers
import numpy as np
import toy

from flexolmo_jax import model
from flexolmo_jax import tree as trees
from flexolmo_jax.config import RouterConfig
from flexolmo_jax.data import prepare
from flexolmo_jax.data.corpora import Document
from flexolmo_jax.experts import model_dir, model_info, stitch
from flexolmo_jax.experts import slice as slices

VOCAB = 300
EXPERTS = ("code", "math", "news")
TOKEN = RouterConfig(context="token")
# Class of transformers to the switches that lead to it; the names are tested one by one.
MIXTURES = {
    "FlexOlmoForCausalLM": {"norm_placement": "post", "qk_norm": "full"},
    "MixtralForCausalLM": {"norm_placement": "pre", "qk_norm": "none"},
    "OlmoeForCausalLM": {"norm_placement": "pre", "qk_norm": "full"},
    "Qwen3MoeForCausalLM": {"norm_placement": "pre", "qk_norm": "head"},
}
DENSE = {
    "Olmo2ForCausalLM": {"norm_placement": "post", "qk_norm": "full"},
    "LlamaForCausalLM": {"norm_placement": "pre", "qk_norm": "none"},
    "Qwen3ForCausalLM": {"norm_placement": "pre", "qk_norm": "head"},
}


@functools.cache
def tokenizer_file() -> Path:
    """A tokenizer of `VOCAB` tokens, trained once per process."""
    path = Path(tempfile.mkdtemp(prefix="tokenizer-")) / "tokenizer.json"
    documents = [Document(data_helpers.words(i), str(i)) for i in range(40)]
    prepare.train_tokenizer(documents, VOCAB, path)
    return path


def config(**changes):
    """A configuration that transformers has a class for."""
    fields = {"vocab_size": VOCAB, "d_head": 4, "router": TOKEN, "n_slots": 1, "n_active": 1}
    return toy.config(**{**fields, **changes})


def random_params(c, seed=0, dtype="float32", bias=model.NO_BIAS):
    """Parameters with norms that differ, a router that decides, and one raw bias everywhere."""
    rng = np.random.default_rng(seed)
    stds = {"router": 1.0, "w_gate": 0.3, "w_up": 0.3, "w_down": 0.3}

    def draw(name, leaf):
        last = name.split("/")[-1]
        values = stds.get(last, 0.15) * rng.standard_normal(leaf.shape)
        if last.endswith("norm"):
            values = 1 + values
        if last == "bias":
            values = np.full(leaf.shape, bias)
        return values.astype(np.dtype(dtype))

    return trees.map_named(draw, model.abstract_params(c))


def make_anchor(path, c, *, seed=0, dtype="float32", router=0.0, bias=model.NO_BIAS):
    """An anchor; its public router row is all `router`."""
    one = c.replace(n_slots=1, n_active=1)
    params = random_params(one, seed, dtype, bias)
    public = slices.take_slot(params["experts"], 0)
    public["router"] = np.full_like(public["router"], router)
    training = {"steps": 3, "tokens": 96, "seed": seed}
    return model_dir.write_model(path, one, params["shared"], public, tokenizer_file(), training)


def make_model(
    root,
    c,
    *,
    experts=EXPERTS,
    dtype="float32",
    bias=model.NO_BIAS,
    router=0.0,
    active=2,
    slots=None,
):
    """An anchor with experts, stitched in root/model; returns its info."""
    anchor = make_anchor(root / "anchor", c, dtype=dtype, router=router)
    paths = []
    for seed, expert in enumerate(experts, start=1):
        one = anchor.config
        tree = slices.take_slot(random_params(one, seed, dtype, bias)["experts"], 0)
        info = slices.write_slice(
            root / "slices" / expert,
            tree,
            expert=expert,
            config=one,
            anchor_digest=anchor.anchor_digest,
            tokenizer_digest=anchor.tokenizer_digest,
            training={"steps": 5, "tokens": 160, "seed": seed},
            recipe={"router": recipe_router(c)},
            data_card={"text": f"text of {expert}", "opt_out": f"ask {expert}"},
        )
        paths.append(info.path)
    plan = stitch.plan(anchor.path, paths, active=active, slots=slots)
    stitch.execute(plan, root / "model")
    return model_info.read_info(root / "model")


def recipe_router(c):
    """The router of a configuration as a recipe names it."""
    return c.to_json()["router"]

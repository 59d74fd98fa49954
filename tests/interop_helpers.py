# SPDX-License-Identifier: Apache-2.0
"""Small models on disk, of every kind that another program has a class for."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import data_helpers
import numpy as np
import pytest
import toy
from safetensors.numpy import save_file

from flexolmo_jax import model
from flexolmo_jax import tree as trees
from flexolmo_jax.config import RouterConfig
from flexolmo_jax.data import prepare
from flexolmo_jax.data.corpora import Document
from flexolmo_jax.errors import RefusedError
from flexolmo_jax.experts import model_dir, model_info, stitch
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.interop import hf_config, hf_names

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


def settings(kind, **changes):
    """A configuration that the class `kind` computes."""
    switches = {**MIXTURES, **DENSE}[kind]
    router = RouterConfig(renormalize=kind == "MixtralForCausalLM")
    return config(**{"router": router, **switches, **changes})


def stranger(folder, kind="FlexOlmoForCausalLM", *, seed=0, parts=1, change=None, **changes):
    """A directory as another program writes it, with its parameters as a tree of ours."""
    slots = {"n_slots": 3, "n_active": 2} if kind in MIXTURES else {}
    c = settings(kind, **{**slots, **changes})
    architecture = hf_config.architecture_for(c)
    params = trees.flatten(random_params(c, seed))
    state = {}
    for row in hf_names.rows(architecture, c):
        for name, layer, slot in hf_names.tensors(row, c):
            part = params[row.leaf][layer] if hf_names.LAYER in row.template else params[row.leaf]
            if row.leaf.startswith("experts/") and row.leaf != hf_names.ROUTER_LEAF:
                part = part[slot]
            part = part.reshape(row.shape[::-1]).T if row.transposed else part.reshape(row.shape)
            state[name] = np.ascontiguousarray(part)
    raw = hf_config.write(c, architecture, dtype="float32", eos_id=0, pad_id=None, extra={})
    del raw["flexolmo"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copyfile(tokenizer_file(), folder / "tokenizer.json")
    if change:
        change(state)
    names = sorted(state)
    if parts == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return params
    places = {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file({n: state[n] for n in names[i::parts]}, folder / file)
        places |= dict.fromkeys(names[i::parts], file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return params


def problems(call, *args, **kwargs):
    with pytest.raises(RefusedError) as error:
        call(*args, **kwargs)
    return {(p.code, p.leaf) for p in error.value.problems}

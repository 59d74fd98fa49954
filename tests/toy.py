# SPDX-License-Identifier: Apache-2.0
"""A model and batches small enough that a test costs a second."""

import dataclasses
from pathlib import Path

import data_helpers
import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import adapters, model, tree
from flexolmo_jax.config import ModelConfig, RouterConfig
from flexolmo_jax.data import prepare, tokenize
from flexolmo_jax.data.corpora import Document

CONFIG = ModelConfig(
    vocab_size=96,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ffn=24,
    max_len=64,
    n_slots=4,
    n_active=2,
    router=RouterConfig(context="document"),
)


def config(**changes) -> ModelConfig:
    """`CONFIG` with some fields changed."""
    return dataclasses.replace(CONFIG, **changes)


def params(c: ModelConfig = CONFIG, seed: int = 0) -> tree.Tree:
    """Random parameters with a router that decides and biases that count.

    Drawn with NumPy, since compiling `model.init_params` takes seconds at any size.
    """
    rng = np.random.default_rng(seed)
    # Larger experts than at initialisation, so that every part matters in the result.
    stds = {"router": 1.0, "bias": 1.0, "evidence": 1.0, "w_gate": 0.2, "w_up": 0.2, "w_down": 0.2}
    stds |= dict.fromkeys((*adapters.MATRICES, *adapters.SCALES), 0.3)

    def draw(name, leaf):
        last = name.split("/")[-1]
        if last.endswith("norm"):
            return jnp.ones(leaf.shape, leaf.dtype)
        std = stds.get(last, model.INIT_STD)
        return jnp.asarray(std * rng.standard_normal(leaf.shape), leaf.dtype)

    return tree.map_named(draw, model.abstract_params(c))


def batch(rows: int = 4, length: int = 32, seed: int = 0, vocab: int = 96) -> dict[str, jax.Array]:
    """Packed rows of two documents each, the last row with padding at its end."""
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, vocab, (rows, length + 1))
    cut = rng.integers(3, length - 3, rows)
    segments = 1 + (np.arange(length + 1) >= cut[:, None]).astype(np.int32)
    segments[-1, -5:] = 0
    own = np.broadcast_to(np.arange(rows)[:, None] % 2 == 0, (rows, length))
    mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return {
        "tokens": jnp.asarray(stream[:, :-1], jnp.int32),
        "targets": jnp.asarray(stream[:, 1:], jnp.int32),
        "segments": jnp.asarray(segments[:, :-1]),
        "loss_mask": jnp.asarray(mask),
        "own": jnp.asarray(own),
    }


@dataclasses.dataclass(frozen=True)
class Texts:
    """A tokenizer and the token shards of an owner's text and of public text."""

    tokenizer: Path
    own: Path
    public: Path
    vocab_size: int


def texts(root: Path) -> Texts:
    """Writes two small domains whose words differ."""
    domains = {
        name: [Document(data_helpers.words(base + i), f"{name}/{i}") for i in range(40)]
        for name, base in (("public", 0), ("own", 1000))
    }
    prepare.train_tokenizer(domains["public"], 300, root / "tokenizer.json")
    for name, documents in domains.items():
        prepare.prepare(documents, root / "tokenizer.json", root / name / "train")
    size = tokenize.vocab_size(tokenize.load(root / "tokenizer.json"))
    return Texts(root / "tokenizer.json", root / "own/train", root / "public/train", size)

# SPDX-License-Identifier: Apache-2.0
"""Tiny anchors and slices on disk for the tests of experts/."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from flexolmo_jax import model
from flexolmo_jax import tree as trees
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.experts import manifest, model_dir, model_info
from flexolmo_jax.experts import slice as slices

CONFIG = ModelConfig(
    vocab_size=16, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, d_head=4, d_ffn=12, max_len=32
)


def random_tree(abstract, seed):
    """Normal values for every leaf of an abstract tree."""
    rng = np.random.default_rng(seed)
    return trees.map_named(
        lambda _, x: rng.standard_normal(x.shape).astype(np.dtype(x.dtype)), abstract
    )


def leaf_table(tree):
    """Leaf name to shape, dtype and digest of arrays."""
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": leaf.dtype.name,
            "digest": trees.leaf_digest(leaf),
        }
        for name, leaf in trees.flatten(tree).items()
    }


def slice_tree(seed, config=CONFIG):
    return random_tree(trees.unflatten(slices.expected_slice(config)), seed)


def make_anchor(path: Path, seed=0, config=CONFIG):
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = path.parent / f"{path.name}-tokenizer-source.json"
    tokenizer.write_text(json.dumps({"seed": seed}))
    params = random_tree(model.abstract_params(config.replace(n_slots=1, n_active=1)), seed)
    public = slices.take_slot(params["experts"], 0)
    training = {"steps": 3, "tokens": 96, "seed": seed}
    return model_dir.write_model(path, config, params["shared"], public, tokenizer, training)


def make_slice(path: Path, anchor, expert, seed=1, tree=None, **changes):
    fields = {
        "expert": expert,
        "config": anchor.config,
        "anchor_digest": anchor.anchor_digest,
        "tokenizer_digest": anchor.tokenizer_digest,
        "training": {"steps": 5, "tokens": 160, "seed": seed},
        "recipe": {"router": {"context": "token", "renormalize": False}},
        "data_card": {"text": f"text of {expert}"},
    }
    tree = slice_tree(seed, anchor.config) if tree is None else tree
    return slices.write_slice(path, tree, **{**fields, **changes})


@dataclasses.dataclass
class World:
    """An anchor and three owners' slices."""

    root: Path
    anchor: model_info.ModelInfo
    slices: dict[str, slices.SliceInfo]

    @property
    def paths(self):
        return [info.path for info in self.slices.values()]


def make_world(root: Path) -> World:
    anchor = make_anchor(root / "anchor")
    names = ("code", "math", "news")
    made = {n: make_slice(root / "slices" / n, anchor, n, i + 1) for i, n in enumerate(names)}
    return World(root, anchor, made)


def rewrite(folder: Path, change) -> None:
    """Changes a flexolmo.json as an attacker would: with a matching digest of its own."""
    value = json.loads((folder / manifest.NAME).read_text())
    value = change(value) or value
    value = manifest.seal(value)
    (folder / manifest.NAME).write_text(manifest.render(value))


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Relative path to content of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leaf_equal(a, b) -> bool:
    """Same names, dtypes, shapes and bits."""
    return trees.digests(jax.tree.map(np.asarray, a)) == trees.digests(jax.tree.map(np.asarray, b))


def _status(field):
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if field in x]
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def peak_memory():
    """Yields a list that afterwards holds the bytes by which resident memory grew at its peak.

    Arrays read by tensorstore are allocated outside Python, so only the system sees them.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory can only be reset on Linux")
    Path("/proc/self/clear_refs").write_text("5")
    before, grown = _status("VmRSS"), []
    yield grown
    grown.append(_status("VmHWM") - before)

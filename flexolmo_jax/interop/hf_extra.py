# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face directory has no place for, so that a model comes back as the same model.

Under our own key of config.json: identities, the router, and per expert what its owner wrote (the
data card with any terms of opting out, recipe, training). In flexolmo/kept.safetensors, a folder
that other programs do not look into: values without a tensor of their own, which are raw biases
whose effective value is 0 and, in a dense model, the public router row. The file is left out if
these are what a model without them gets (`DEFAULTS`).
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import flexolmo_jax
from flexolmo_jax import model
from flexolmo_jax.experts import model_info
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.interop import safetensors_writer as writer

SCHEMA = 1
KEPT = "flexolmo/kept.safetensors"
# What an expert of a file without our additions gets.
DEFAULTS = {"bias": model.NO_BIAS, "router": 0.0}


def describe(
    info: model_info.ModelInfo,
    pieces: Sequence[slices.SliceInfo],
    *,
    complete: bool,
    dropped_bias: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The value of our key in config.json.

    Args:
      pieces: the experts in the file, in the order of their slots there.
      complete: the file holds the whole model, unchanged: importing it gives `model_digest`.
      dropped_bias: what leaving biases out cost, if they were.
    """
    experts = []
    for piece in pieces:
        own = {key: piece.manifest[key] for key in ("training", "data_card", "recipe")}
        experts.append({"id": piece.expert, "manifest_digest": piece.digest, **own})
    out = {
        "schema": SCHEMA,
        "anchor_digest": info.anchor_digest,
        "model_digest": info.model_digest,
        "complete": complete,
        "router": info.config.to_json()["router"],
        "experts": experts,
        "training": info.training,
        "versions": {"flexolmo_jax": flexolmo_jax.__version__},
    }
    return out if dropped_bias is None else {**out, "dropped_bias": dict(dropped_bias)}


def kept_name(expert: str, leaf: str) -> str:
    """The name in the kept file of one leaf of one expert."""
    return f"experts/{expert}/{leaf}"


def write_kept(folder: Path, leaves: Mapping[tuple[str, str], np.ndarray]) -> None:
    """Writes (expert, leaf) to values, all of one dtype; those at their default are left out."""
    tensors = []
    for (expert, leaf), values in sorted(leaves.items()):
        if (values != np.asarray(DEFAULTS[leaf], values.dtype)).any():
            name = kept_name(expert, leaf)
            blocks = functools.partial(iter, [values])
            tensors.append(writer.Tensor(name, values.dtype.name, values.shape, blocks))
    if tensors:
        (folder / KEPT).parent.mkdir()
        writer.write_file(folder / KEPT, tensors)

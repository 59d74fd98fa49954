# SPDX-License-Identifier: Apache-2.0
"""A model whose router rows were tuned together: the same experts, rows that know each other.

Owners ship slices whose rows never met; after tuning (paper section 3.3.2) each row depends on who
else was there, the public one included. So the result is a model of its own, with its own anchor
digest: no slice of the anchor fits it, and it says of itself that leaving is no longer exact.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax import tree as trees
from flexolmo_jax.errors import Problem, RefusedError
from flexolmo_jax.experts import leafio, model_dir, model_info, remote, verify
from flexolmo_jax.experts import slice as slices


def write_tuned(
    out: str | Path,
    model: str | Path,
    rows: Mapping[str, np.ndarray],
    *,
    model_digest: str,
    training: Mapping[str, int],
    recipe: Mapping[str, Any],
    data_card: Mapping[str, Any],
) -> model_info.ModelInfo:
    """Writes the stitched model with other router rows and biases; its experts are copied.

    Args:
      model: the stitched model that was tuned.
      rows: "router" [L, E, D] and "bias" [L, E] by slot; those of empty slots are left out.
      model_digest: of the model that the tuning began with.
      training: steps, tokens and seed of the tuning.

    Raises:
      RefusedError: another model than the one that was tuned, or a damaged one.
    """
    folder = remote.local_dir(model)
    info = model_info.read_info(folder)
    problems = verify.verify(model)
    if info.model_digest != model_digest:
        message = f"model_digest is {info.model_digest}, the tuning began with {model_digest}"
        problems.append(Problem("wrong-model", str(model), "", message))
    if problems:
        raise RefusedError("These rows cannot be put into this model", problems)
    members = [_member(info, expert, rows, training) for expert in info.slots]
    public, *experts = members
    return model_dir.write_model(
        out,
        info.config,
        trees.unflatten(_stored(info.shared_path, info.content["shared"])),
        public.leaves,
        info.tokenizer_path,
        {
            **training,
            "stage": "router",
            "tuned_from": model_digest,
            "recipe": dict(recipe),
            "data_card": dict(data_card),
        },
        experts=experts,
        companions=info.companions,
    )


def _member(
    info: model_info.ModelInfo,
    expert: str,
    rows: Mapping[str, np.ndarray],
    training: Mapping[str, int],
) -> model_dir.Member:
    """One expert with its own FFN and the tuned rows of its slot, in the dtypes it had."""
    piece, problems = model_info.member_info(info, expert)
    if piece is None or problems:
        raise RefusedError("An expert of the model cannot be used", problems)
    table, slot = piece.manifest["leaves"], info.slots[expert]
    leaves: dict[str, Any] = _stored(piece.path / slices.PARAMS, table)
    for name, value in rows.items():
        leaves[name] = np.asarray(value[:, slot]).astype(np.dtype(table[name]["dtype"]))
    earlier = {"training": piece.manifest["training"], "recipe": piece.manifest["recipe"]}
    return model_dir.Member(
        expert,
        leaves,
        training,
        {"slice": info.manifest_digests[expert], **earlier},
        piece.manifest["data_card"],
    )


def _stored(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> dict[str, leafio.Leaf]:
    return {name: leafio.stored(folder, name, entry) for name, entry in table.items()}

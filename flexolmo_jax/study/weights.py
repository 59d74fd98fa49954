# SPDX-License-Identifier: Apache-2.0
"""Weights of finished runs in memory, and what can be made of them without training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax import moe, tree
from flexolmo_jax.experts import package
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.model import NO_BIAS

RouterRows = Mapping[str, np.ndarray]


def final(run: Path) -> tree.Tree:
    """The weights that a run ended with, every file checked: a model, a slice or router rows."""
    return package.read_params(package.read_final(run))


def average(models: Sequence[tree.Tree], weights: Sequence[float] | None = None) -> tree.Tree:
    """A soup: the weighted mean of each leaf, summed in float64; equal weights by default."""
    share = np.full(len(models), 1 / len(models)) if weights is None else np.asarray(weights)

    def mean(_: str, *leaves: np.ndarray) -> np.ndarray:
        total = sum(w * leaf.astype(np.float64) for w, leaf in zip(share, leaves, strict=True))
        return np.asarray(total, leaves[0].dtype)

    return tree.map_named(mean, models[0], *models[1:])


def stacked(pieces: Sequence[tree.Tree | None]) -> tree.Tree:
    """A group of every slot, public first; None leaves a slot empty (`slices.stack_slices`)."""
    return slices.stack_slices(pieces, len(pieces))


def with_rows(group: tree.Tree, rows: RouterRows) -> tree.Tree:
    """The group with other router rows and biases."""
    return {**group, **{name: np.asarray(rows[name]) for name in ("router", "bias")}}


def without_bias(group: tree.Tree) -> tree.Tree:
    """The group as a format without expert biases keeps it, such as the reference's own merge."""
    return {**group, "bias": np.full_like(group["bias"], NO_BIAS)}


def low_rank(expert: tree.Tree, public: tree.Tree, ranks: Sequence[int]) -> dict[int, tree.Tree]:
    """The experts whose matrices differ from the public ones by their best change of each rank.

    Source: FlexMoRE, arXiv 2602.08818: the largest singular values of the difference. Its singular
    vectors on the shorter side are the eigenvectors of a small square matrix, which a large model
    has a hundred of, and finding them takes a tenth of the time of a decomposition.
    """
    out = {rank: dict(expert) for rank in ranks}
    for name in moe.WEIGHTS:
        change = expert[name].astype(np.float64) - public[name]
        tall = change.shape[-2] > change.shape[-1]
        short = np.swapaxes(change, -1, -2) if tall else change
        _, vectors = np.linalg.eigh(short @ np.swapaxes(short, -1, -2))
        for rank in ranks:
            largest = vectors[..., -rank:]
            kept = largest @ (np.swapaxes(largest, -1, -2) @ short)
            kept = np.swapaxes(kept, -1, -2) if tall else kept
            out[rank][name] = (public[name] + kept).astype(expert[name].dtype)
    return out


def low_rank_size(expert: tree.Tree, rank: int) -> int:
    """Numbers that such an expert ships: both factors of each FFN matrix, all else as it is."""
    total = sum(leaf.size for name, leaf in expert.items() if name not in moe.WEIGHTS)
    for name in moe.WEIGHTS:
        layers, rows, columns = expert[name].shape
        total += layers * min(rank * (rows + columns), rows * columns)
    return int(total)

# SPDX-License-Identifier: Apache-2.0
"""Model directories that the rivals' trainings start from."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax import stages, tree
from flexolmo_jax.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    RouterInitConfig,
    RunConfig,
    SourceConfig,
)
from flexolmo_jax.experts import model_dir, model_info, router_init
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.model import INIT_STD, NO_BIAS
from flexolmo_jax.study import weights
from flexolmo_jax.study.design import Recipe

NOTHING_TRAINED = {"steps": 0, "tokens": 0, "seed": 0}


def agreed(anchor: Path, out: Path, recipe: Recipe, public: Sequence[Path]) -> model_info.ModelInfo:
    """The same anchor with the router, and the room for what experts hold, of a recipe.

    Where tokens are judged alone, as in the paper, the public row comes from embeddings.

    Source: paper section 3.3.1; the row is that of `router_init.public_row`.

    Args:
      public: token-shard directories.
    """
    info, params, _ = model_dir.load_model(anchor)
    router = dataclasses.replace(
        info.config.router,
        context=recipe.context,
        evidence=recipe.evidence,
        evidence_parts=len(public) if recipe.parts and len(public) > 1 else 0,
        evidence_pairs=recipe.pairs,
    )
    config = info.config.replace(router=router, adapters=recipe.adapters)
    run = RunConfig(
        stage="anchor",
        anchor=str(anchor),
        data=DataConfig(sources=tuple(SourceConfig(str(p), public=True) for p in public)),
        router_init=RouterInitConfig(method="embedding"),
    )
    piece = _holding(slices.take_slot(params["experts"], 0), config)
    if recipe.context == "token":
        piece["router"] = router_init.public_row(run, config)
    shared = _learnt(params["shared"]) | router_init.public_parts(run, config)
    # An anchor of another format does not say how it was trained.
    training = {key: info.training[key] for key in NOTHING_TRAINED if key in info.training}
    return model_dir.write_model(out, config, shared, piece, info.tokenizer_path, training)


def _learnt(weights: tree.Tree) -> tree.Tree:
    """Weights without tables of evidence, which one recipe has and another has not."""
    return {name: weights[name] for name in stages.learnt(weights)}


def mixture(
    anchor: Path,
    out: Path,
    shared: tree.Tree,
    experts: Mapping[str, tree.Tree],
    *,
    n_active: int,
    seed: int,
) -> model_info.ModelInfo:
    """A mixture of given FFNs whose router rows are drawn: there is nothing to copy them from.

    Args:
      shared: weights without a slot axis.
      experts: id to slice, the public one included; router rows and biases in them are ignored.
    """
    info = model_info.read_info(anchor)
    router = dataclasses.replace(info.config.router.without_evidence(), context="token")
    config = info.config.replace(
        n_slots=len(experts), n_active=n_active, router=router, adapters=AdapterConfig()
    )
    rng = np.random.default_rng(seed)

    def drawn(piece: tree.Tree) -> tree.Tree:
        rows = rng.standard_normal(piece["router"].shape) * INIT_STD
        row = rows.astype(piece["router"].dtype)
        bias = np.full_like(piece["bias"], NO_BIAS)
        return {**_holding(piece, config), "router": row, "bias": bias}

    public, *others = experts
    members = [model_dir.Member(name, drawn(experts[name]), NOTHING_TRAINED) for name in others]
    return model_dir.write_model(
        out,
        config,
        _learnt(shared),
        drawn(experts[public]),
        info.tokenizer_path,
        experts=members,
    )


def _holding(piece: tree.Tree, config: ModelConfig) -> tree.Tree:
    """A slice with the leaves of this architecture: what it does not have is 0."""
    kept = _learnt(piece)
    return {
        name: kept[name] if name in kept else np.zeros(like.shape, like.dtype)
        for name, like in slices.expected_slice(config).items()
    }


def upcycled(
    anchor: Path, out: Path, names: Sequence[str], *, n_active: int, seed: int
) -> model_info.ModelInfo:
    """The start of the unrestricted mixture: the anchor's FFN in every slot.

    Source: paper, baselines ("upcycled from the public model, trained on the union").
    """
    _, params, _ = model_dir.load_model(anchor)
    public = slices.take_slot(params["experts"], 0)
    experts = dict.fromkeys(("public", *names), public)
    return mixture(anchor, out, params["shared"], experts, n_active=n_active, seed=seed)


def branch_train_mix(
    anchor: Path, out: Path, dense: Mapping[str, Path], *, n_active: int, seed: int
) -> model_info.ModelInfo:
    """The start of BTX: FFNs of the anchor and of dense models, all other weights averaged.

    Source: Branch-Train-MiX, arXiv 2403.07816, section 3.

    Args:
      dense: owner to the workdir of its dense model's run.
    """
    _, params, _ = model_dir.load_model(anchor)
    models = {"public": params} | {name: weights.final(run) for name, run in dense.items()}
    shared = weights.average([m["shared"] for m in models.values()])
    experts = {name: slices.take_slot(m["experts"], 0) for name, m in models.items()}
    return mixture(anchor, out, shared, experts, n_active=n_active, seed=seed)

# SPDX-License-Identifier: Apache-2.0
"""One table from logical axes to mesh axes, for parameters and for activations."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexolmo_jax import tree
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.mesh import BATCH_AXES

MeshAxes = str | tuple[str, ...] | None

# Parameters: FSDP over `data` on the embed dimension. Over `expert` as well it would be cut into
# pieces of less than 128, which the TPU compiler gathers by adding up whole arrays of zeros (8x7b
# on 128 chips: all-reduces of the full size). Tensor parallel over `model`.
PARAM_RULES: dict[str, MeshAxes] = {
    "layer": None,
    "expert": "expert",
    "embed": "data",
    "expert_embed": "data",
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "ffn": "model",
    "vocab": "model",
    "norm": None,
    "rank": None,
    "part": None,
}
# Activations: the batch takes the axes that hold different data, features stay whole.
ACTIVATION_RULES: dict[str, MeshAxes] = {
    "batch": BATCH_AXES,
    "seq": None,
    "embed": None,
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "vocab": "model",
    "expert": None,
}


def spec_for(
    axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, MeshAxes]
) -> PartitionSpec:
    """Partition of one array; a dimension that its mesh axes do not divide stays whole.

    Raises:
      ConfigError: an unknown logical axis, or one mesh axis used for two dimensions.
    """
    entries: list[MeshAxes] = []
    used: list[str] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis not in rules:
            raise ConfigError("Unknown logical axis", got=axis, expected=", ".join(rules))
        target = rules[axis]
        names = (target,) if isinstance(target, str) else (target or ())
        if names and size % int(np.prod([mesh.shape[n] for n in names])) == 0:
            used += names
            entries.append(target)
        else:
            entries.append(None)
    if len(used) != len(set(used)):
        raise ConfigError("One mesh axis shards two dimensions", got=f"{axes} -> {entries}")
    return PartitionSpec(*entries)


def param_shardings(abstract: tree.Tree, axes: tree.Tree, mesh: Mesh) -> tree.Tree:
    """The sharding of every leaf of a parameter tree."""
    return tree.map_named(
        lambda _, leaf, leaf_axes: NamedSharding(
            mesh, spec_for(leaf_axes, leaf.shape, mesh, PARAM_RULES)
        ),
        abstract,
        axes,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `BATCH_AXES`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain(x: Any, mesh: Mesh | None, *axes: str) -> Any:
    """Pins the layout of an activation inside jit; without a mesh it does nothing."""
    if mesh is None or mesh.size == 1:
        return x
    spec = spec_for(axes, x.shape, mesh, ACTIVATION_RULES)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

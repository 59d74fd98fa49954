# SPDX-License-Identifier: Apache-2.0
"""How one machine computes a model, with everything automatic decided."""

import dataclasses

import jax
from jax.sharding import Mesh

from flexolmo_jax import attention, moe
from flexolmo_jax.config import ExecConfig


@dataclasses.dataclass(frozen=True)
class Runtime:
    """`ExecConfig` with everything automatic resolved; hashable, a static argument of jit."""

    dispatch: str
    attention: str = "whole"
    compute_dtype: str = "float32"
    remat: str = "none"
    loss_chunk: int = 256
    decode: str = "stacked"
    mesh: Mesh | None = None

    @classmethod
    def resolve(
        cls, config: ExecConfig, n_slots: int, n_active: int, mesh: Mesh | None = None
    ) -> "Runtime":
        """Resolves "auto" for the platform that jax runs on."""
        platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
        return cls(
            dispatch=moe.resolve(config.moe, n_slots, n_active, platform),
            attention=attention.resolve(config.attention, platform),
            compute_dtype=config.compute_dtype,
            remat=config.remat,
            loss_chunk=config.loss_chunk,
            decode=_resolve_decode(config.decode, platform, mesh),
            mesh=mesh,
        )


def _resolve_decode(decode: str, platform: str, mesh: Mesh | None) -> str:
    """What "auto" stands for: open on one CPU device (see `sample.splits`), else "stacked"."""
    if decode != "auto" or (platform == "cpu" and (mesh is None or mesh.size == 1)):
        return decode
    return "stacked"

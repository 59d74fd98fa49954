# SPDX-License-Identifier: Apache-2.0
"""How one machine computes a model, with everything automatic decided."""

import dataclasses

import jax
from jax.sharding import Mesh

from flexolmo_jax import attention, moe
from flexolmo_jax.config import ExecConfig
from flexolmo_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Runtime:
    """`ExecConfig` with everything automatic resolved; hashable, a static argument of jit."""

    dispatch: str
    expert_parallel: str = "fsdp"
    capacity: float = 0.0
    attention: str = "whole"
    compute_dtype: str = "float32"
    remat: str = "none"
    loss_chunk: int = 256
    decode: str = "stacked"
    mesh: Mesh | None = None

    @classmethod
    def resolve(
        cls,
        config: ExecConfig,
        n_slots: int,
        n_active: int,
        mesh: Mesh | None = None,
        *,
        training: bool = False,
    ) -> "Runtime":
        """Resolves "auto" for the platform that jax runs on.

        Raises:
          ConfigError: a capacity outside training, where other rows would change a row's result.
        """
        if config.capacity and not training:
            raise ConfigError(
                "A capacity makes a row's result depend on the rows beside it: it is for training "
                "only",
                got=f"exec.capacity={config.capacity:g}",
                expected="0 for evaluation, generation and serving",
                where="exec.capacity",
            )
        platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
        dispatch = moe.resolve(config.moe, n_slots, n_active, platform)
        return cls(
            dispatch=dispatch,
            expert_parallel=moe.resolve_parallel(config.expert_parallel, dispatch, mesh, platform),
            capacity=config.capacity,
            attention=attention.resolve(config.attention, platform),
            compute_dtype=config.compute_dtype,
            remat=config.remat,
            loss_chunk=config.loss_chunk or (256 if platform == "cpu" else 0),
            decode=_resolve_decode(config.decode, platform, mesh),
            mesh=mesh,
        )


def _resolve_decode(decode: str, platform: str, mesh: Mesh | None) -> str:
    """What "auto" stands for: open on one CPU device (see `sample.splits`), else "stacked"."""
    if decode != "auto" or (platform == "cpu" and (mesh is None or mesh.size == 1)):
        return decode
    return "stacked"

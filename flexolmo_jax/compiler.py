# SPDX-License-Identifier: Apache-2.0
"""What XLA is told about a training step: options that its defaults leave off.

On TPU the defaults run every gather of weights before the product that needs it, and give a fused
product a tile of 16 MiB at most. The options travel with the program, so a pod and a plan of it
compile the same; nothing depends on the environment.
"""

from typing import Any

# Weights of the next product travel while this one is computed.
OVERLAP = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # On v6e a product would be cut into the steps of a ring of permutations instead, in the order
    # of device ids, whose neighbours are not neighbours on the torus.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_tpu_decompose_all_gather_einsum": "false",
    "xla_tpu_decompose_einsum_reduce_scatter": "false",
}
# KiB of a core's vector memory that one fusion may use, by the start of the device's kind. With
# the default the products of a 7B layer take a fifth longer (compiler's cycles, v5p).
FUSION_KIB = {"TPU v5 lite": 65536, "TPU v5": 65536, "TPU v6": 98304}


def options(device: Any) -> dict[str, str] | None:
    """Options of `jax.jit` for a training step on such devices; None leaves the defaults."""
    if device.platform != "tpu":
        return None
    kib = next((n for kind, n in FUSION_KIB.items() if device.device_kind.startswith(kind)), 0)
    return {**OVERLAP, **({"xla_tpu_scoped_vmem_limit_kib": str(kib)} if kib else {})}

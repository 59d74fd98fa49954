# SPDX-License-Identifier: Apache-2.0
"""What clouds and clusters call the machines that a job asks for: chips, hosts, types."""

import dataclasses
import math
import re

from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.jobs.plan import Job


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One family of TPUs.

    Attributes:
      label: its name on GKE nodes.
      dimensions: of a topology.
      vm_type: first part of the name of a TPU VM's type; "" where such VMs are not offered.
      counted: what the second part counts per chip: cores (2) or chips (1).
      runtime: system image of a TPU VM.
      machine: type of a GKE node with four chips.
    """

    label: str
    dimensions: int
    vm_type: str
    counted: int
    runtime: str
    machine: str


# Source: Google's pages "Plan TPUs in GKE" and "TPU VM images", November 2026.
TPUS = {
    "v4": Tpu("tpu-v4-podslice", 3, "v4", 2, "tpu-ubuntu2204-base", "ct4p-hightpu-4t"),
    "v5e": Tpu(
        "tpu-v5-lite-podslice", 2, "v5litepod", 1, "v2-alpha-tpuv5-lite", "ct5lp-hightpu-4t"
    ),
    "v5p": Tpu("tpu-v5p-slice", 3, "v5p", 2, "v2-alpha-tpuv5", "ct5p-hightpu-4t"),
    "v6e": Tpu("tpu-v6e-slice", 2, "v6e", 1, "v2-alpha-tpuv6e", "ct6e-standard-4t"),
    "tpu7x": Tpu("tpu7x", 3, "", 2, "", "tpu7x-standard-4t"),
}
# Chips of one node as Slurm's sites build them; a site with other nodes says so (gpus_per_node).
GPUS = {"a100": 8, "h100": 8, "h200": 8, "b200": 8}
CHIPS_PER_HOST = 4


def is_tpu(job: Job) -> bool:
    """Whether a job asks for TPUs."""
    return job.resources.accelerator in TPUS


def family(job: Job) -> Tpu:
    """The TPU family of a job.

    Raises:
      ConfigError: not a family that is known here; the error names the nearest.
    """
    name = job.resources.accelerator
    if name not in TPUS:
        raise ConfigError("Not a family of TPUs", got=name, where=job.name, fix=nearest(name, TPUS))
    return TPUS[name]


def chips(job: Job) -> int:
    """Chips of one slice of a TPU job.

    Raises:
      ConfigError: the topology does not fit the family.
    """
    text, tpu = job.resources.topology, family(job)
    parts = text.split("x")
    if len(parts) != tpu.dimensions or not all(re.fullmatch(r"[1-9][0-9]{0,3}", p) for p in parts):
        example = "4x4x4" if tpu.dimensions == 3 else "4x4"
        raise ConfigError(
            f"Not a topology of {job.resources.accelerator}",
            got=text or "none",
            expected=f"{tpu.dimensions} numbers such as {example}",
            where=job.name,
        )
    return math.prod(int(p) for p in parts)


def chips_per_host(job: Job) -> int:
    """Chips that each process of a TPU job drives; hosts of larger slices have four."""
    return min(CHIPS_PER_HOST, chips(job))


def hosts(job: Job) -> int:
    """Hosts of one slice, which are its processes.

    Raises:
      ConfigError: the chips do not fill whole hosts.
    """
    count = chips(job)
    if count > CHIPS_PER_HOST and count % CHIPS_PER_HOST:
        raise ConfigError(
            "The topology does not fill its hosts",
            got=f"{count} chips",
            expected=f"a multiple of {CHIPS_PER_HOST}",
            where=job.name,
        )
    return max(1, count // CHIPS_PER_HOST)


def processes(job: Job) -> int:
    """All processes of a job."""
    if is_tpu(job):
        return hosts(job) * job.resources.slices
    return job.resources.processes


def vm_type(job: Job) -> str:
    """The type of the TPU VM of one slice, such as v5p-8 for four chips.

    Raises:
      ConfigError: a family that TPU VMs do not offer.
    """
    tpu = family(job)
    if not tpu.vm_type:
        raise ConfigError(
            "This family is not offered as TPU VMs",
            got=job.resources.accelerator,
            where=job.name,
            fix="use --backend gke",
        )
    return f"{tpu.vm_type}-{chips(job) * tpu.counted}"


def describe(job: Job) -> str:
    """The machines of a job in words."""
    res = job.resources
    if is_tpu(job):
        count, parts = res.slices, []
        parts.append(f"{count} x " if count > 1 else "")
        parts.append(f"{res.accelerator} {res.topology} ({chips(job)} chips, ")
        parts.append(f"{hosts(job)} host{'s' if hosts(job) > 1 else ''})")
        return "".join(parts)
    if res.accelerator:
        return f"{res.processes} node{'s' if res.processes > 1 else ''} of {res.accelerator}"
    cpus = f"{res.cpus} cores" if res.cpus else "CPU"
    return cpus + (f", {res.memory_gib} GiB" if res.memory_gib else "")

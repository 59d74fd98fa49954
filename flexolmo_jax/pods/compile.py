# SPDX-License-Identifier: Apache-2.0
"""Compiles a program for a pod that is not there, and says what it would need and do.

libtpu holds the real compiler and knows the devices of every pod, so neither a TPU nor data is
needed. The process needs the environment of `flexolmo_jax.pods.process` before it imports
JAX.
"""

import dataclasses
import os
import time
from typing import Any

import jax
from jax.experimental import topologies

from flexolmo_jax import mesh, programs
from flexolmo_jax.config import ExecConfig
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.pods import digest, memory, predict, work
from flexolmo_jax.pods.axes import Layout, Place
from flexolmo_jax.pods.chips import Topology
from flexolmo_jax.pods.memory import Memory
from flexolmo_jax.pods.predict import Times
from flexolmo_jax.pods.work import Work

# Units that a plan lists.
HEAVIEST = 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one program would need and do on a topology.

    Attributes:
      memory: HBM per chip; without a compiled program the total may be all that is known.
      work, times: None when the compiler refused the program for want of memory.
      model_flops: of one call over all chips that the stage needs.
      compiled_flops: of one call over all chips that the program does.
      collective_bytes: mesh axis to kind to bytes per chip and call.
      program_hash: of what the compiled program is (`pods.digest`).
    """

    topology: Topology
    program: programs.Program
    memory: Memory
    compile_s: float
    work: Work | None = None
    times: Times | None = None
    model_flops: float = 0.0
    compiled_flops: float = 0.0
    collective_bytes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    program_hash: str = ""
    refusal: str = ""

    @property
    def fits(self) -> bool:
        """Whether the program can run."""
        return self.work is not None and self.memory.fits

    def mfu(self) -> dict[str, float] | None:
        """Model FLOPs per second over peak, low (no overlap) and high (perfect overlap)."""
        if self.times is None:
            return None
        peak = self.topology.chip.flops * self.topology.chips
        slow, fast = (self.model_flops / peak / s for s in (self.times.high, self.times.low))
        return {"low": round(slow, 4), "high": round(fast, 4)}

    def tokens_per_s_per_chip(self) -> dict[str, float] | None:
        """Tokens per second and chip, low and high."""
        if self.times is None:
            return None
        each = self.program.tokens / self.topology.chips
        return {"low": round(each / self.times.high, 1), "high": round(each / self.times.low, 1)}

    def to_json(self) -> dict[str, Any]:
        """The keys of the result file (docs: `flexolmo plan --json`)."""
        t = self.times
        return {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "chips": self.topology.chips,
            "mesh": dict(self.program.mesh.shape),
            "stage": self.program.stage,
            "rows": self.program.tokens // max(1, _new_tokens(self.program)),
            "seq_len": self.program.seq_len,
            "remat": self.program.runtime.remat,
            "fits": self.fits,
            "hbm_gib": self.memory.gib(),
            "flops": {
                "model": self.model_flops,
                "compiled": self.compiled_flops or None,
                "recomputed_share": self.recomputed_share(),
            },
            "collective_bytes": self.collective_bytes,
            "step_s": t and {"low": t.low, "high": t.high},
            "step_parts_s": t and _parts(t),
            "mfu": self.mfu(),
            "tokens_per_s_per_chip": self.tokens_per_s_per_chip(),
            "compile_s": round(self.compile_s, 1),
            "program_hash": self.program_hash,
            "compiler_flags": os.environ.get("LIBTPU_INIT_ARGS", ""),
            "heaviest": self.heaviest(),
            "unknown": {
                "loops": list(self.work.unknown_loops) if self.work else [],
                "kernels": list(self.work.unknown_kernels) if self.work else [],
            },
            "refusal": self.refusal,
        }

    def heaviest(self, count: int = HEAVIEST) -> list[dict[str, Any]]:
        """The units that take longest, slowest case first: where time would have to be saved."""
        if self.work is None:
            return []
        over = layout(self.topology, self.program.mesh)
        found = []
        for u in self.work.units:
            low, high = predict.unit_seconds(u, self.topology)
            moved = sum(
                predict.collective_seconds(c, over.span(c.groups), self.topology)
                for c in u.collectives
            )
            found.append(
                {
                    "unit": u.name,
                    "what": u.kernel or ", ".join(c.kind for c in u.collectives) or u.opcode,
                    "times": u.times,
                    "low_s": u.times * (low + moved),
                    "high_s": u.times * (high + moved),
                    "gflop": u.flops / 1e9,
                    "hbm_mib": (u.read + u.written) / 2**20,
                    "from": u.op_name,
                }
            )
        return sorted(found, key=lambda f: -f["high_s"])[:count]

    def recomputed_share(self) -> float | None:
        """Share of the compiled FLOPs beyond those that the stage needs."""
        if not self.compiled_flops:
            return None
        return round(1 - self.model_flops / self.compiled_flops, 4)


def _new_tokens(program: programs.Program) -> int:
    return 1 if program.stage == "decode" else program.seq_len


def _parts(t: Times) -> dict[str, Any]:
    return {
        "products": t.products,
        "kernels": {"low": t.kernels[0], "high": t.kernels[1]},
        "other_units": {"low": t.others[0], "high": t.others[1]},
        "hbm_traffic": t.hbm,
        "collectives_early": t.early,
        "collectives_waited": t.waited,
        "collectives_by_axis": dict(t.by_axis),
    }


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology, slice after slice.

    Raises:
      ConfigError: libtpu is not installed, or knows no such topology.
    """
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **slices
        ).devices
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if "libtpu" in text.lower() and "not" in text.lower():
            raise ConfigError(
                "The TPU compiler is not installed",
                got=text.splitlines()[0],
                fix="pip install 'flexolmo-jax[tpu]'",
            ) from error
        raise ConfigError(
            "The TPU compiler knows no such topology",
            got=f"{topology.name}, {topology.slices} slice(s): {text.splitlines()[0]}",
            where="--topology",
        ) from error
    return sorted(found, key=lambda d: getattr(d, "slice_index", 0) or 0)


def grid(topology: Topology, run: ExecConfig) -> jax.sharding.Mesh:
    """The mesh of an execution over a topology, as training makes it.

    Raises:
      ConfigError: the mesh does not fit the devices.
    """
    return mesh.make_mesh(run.mesh_data, run.mesh_expert, run.mesh_model, devices=devices(topology))


def layout(topology: Topology, over: jax.sharding.Mesh) -> Layout:
    """Where each device of a mesh sits in the torus."""
    places = [
        Place(
            tuple(d.coords)[: len(topology.dims)],
            int(getattr(d, "core_on_chip", 0) or 0),
            int(getattr(d, "slice_index", 0) or 0),
        )
        for d in over.devices.flat
    ]
    return Layout(topology, dict(over.shape), places)


def measure(program: programs.Program, topology: Topology, accumulate: int = 1) -> Plan:
    """Compiles a program for the topology that its mesh lies on, and counts.

    Args:
      accumulate: micro-batches of a training step.

    Raises:
      ConfigError: the compiler refuses the program for another reason than memory.
    """
    held = memory.arguments(program.arguments)
    started = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = memory.refused(str(error))
        if needed is None:
            raise ConfigError(
                "The TPU compiler refuses this program", got=str(error)[:2000]
            ) from error
        return Plan(
            topology,
            program,
            memory.split(needed, held, 0.0, topology),
            time.perf_counter() - started,
            model_flops=program.model_flops,
            refusal=" ".join(str(error).split())[:600],
        )
    seconds = time.perf_counter() - started
    text = compiled.as_text() or ""
    shape = program.mesh.shape
    rows = program.tokens / accumulate / shape["data"] / shape["expert"] * program.config.n_active
    done = work.read(text, even_rows=rows)
    over = layout(topology, program.mesh)
    return Plan(
        topology=topology,
        program=program,
        memory=memory.measured(compiled, held, done.saved, topology),
        compile_s=seconds,
        work=done,
        times=predict.predict(done, over),
        model_flops=program.model_flops,
        compiled_flops=done.flops * topology.devices,
        collective_bytes=traffic(done, over),
        program_hash=digest.of_text(text),
    )


def traffic(done: Work, over: Layout) -> dict[str, dict[str, float]]:
    """Mesh axis to kind of collective to bytes per chip and call."""
    found: dict[str, dict[str, float]] = {}
    for u in done.units:
        for c in u.collectives:
            kinds = found.setdefault(over.span(c.groups).mesh, {})
            size = u.times * c.size * over.topology.chip.devices
            kinds[c.kind] = kinds.get(c.kind, 0.0) + size
    return {axis: dict(sorted(kinds.items())) for axis, kinds in sorted(found.items())}

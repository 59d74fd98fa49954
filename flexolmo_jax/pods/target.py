# SPDX-License-Identifier: Apache-2.0
"""From what a user asks for to the program that is compiled."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from flexolmo_jax import configfile, programs, stages
from flexolmo_jax.config import ExecConfig, ModelConfig, RunConfig
from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.pods import chips
from flexolmo_jax.pods import compile as compiling
from flexolmo_jax.pods.chips import Topology
from flexolmo_jax.pods.process import Request
from flexolmo_jax.typed import from_dict

SERVING = {"eval": programs.evaluation, "prefill": programs.prefill, "decode": programs.decode}
STAGES = (*stages.STAGES, *SERVING)
# `ExecConfig` lists them from what keeps most to what keeps least.
REMAT: tuple[str, ...] = typing.get_args(typing.get_type_hints(ExecConfig)["remat"])


@dataclasses.dataclass(frozen=True)
class Target:
    """One program on one topology.

    Attributes:
      model: of the anchor (stage "expert"), the stitched model or the mixture.
      stage: a training stage, or eval, prefill or decode.
    """

    run: RunConfig
    model: ModelConfig
    topology: Topology
    stage: str

    @property
    def trains(self) -> bool:
        """Whether the program is a training step."""
        return self.stage not in SERVING

    @property
    def groups(self) -> int:
        """Groups of devices that have rows of their own."""
        e = self.run.exec
        data = e.mesh_data or max(1, self.topology.devices // (e.mesh_expert * e.mesh_model))
        return data * e.mesh_expert

    @property
    def rows_at_once(self) -> float:
        """Rows that each of those groups computes at a time."""
        return self.run.data.batch_rows / self.run.optim.accumulate / self.groups

    def with_exec(self, **changes: Any) -> "Target":
        """The same with another execution."""
        run = dataclasses.replace(self.run, exec=dataclasses.replace(self.run.exec, **changes))
        return dataclasses.replace(self, run=run)

    def with_rows(self, rows: int, accumulate: int = 1) -> "Target":
        """The same with other rows per step and micro-batches."""
        run = dataclasses.replace(
            self.run,
            data=dataclasses.replace(self.run.data, batch_rows=rows),
            optim=dataclasses.replace(self.run.optim, accumulate=accumulate),
        )
        return dataclasses.replace(self, run=run)

    def program(self) -> programs.Program:
        """The program with abstract arguments.

        Raises:
          ConfigError: mesh, batch and topology do not fit each other.
        """
        grid = compiling.grid(self.topology, self.run.exec)
        if self.trains:
            return programs.training(self.run, self.model, grid)
        data = self.run.data
        make = SERVING[self.stage]
        return make(self.model, self.run.exec, grid, rows=data.batch_rows, seq_len=data.seq_len)

    def measure(self) -> compiling.Plan:
        """Compiles the program and counts.

        Raises:
          ConfigError: it cannot be laid out, or the compiler refuses it.
        """
        pieces = self.run.optim.accumulate if self.trains else 1
        return compiling.measure(self.program(), self.topology, pieces)


def read(request: Request) -> Target:
    """Reads the configuration and finds the model.

    Raises:
      ConfigError: an unknown stage, topology or file, or no way to know the architecture.
    """
    if request.stage and request.stage not in STAGES:
        raise ConfigError(
            "Unknown stage",
            got=request.stage,
            where="--stage",
            fix=nearest(request.stage, STAGES),
        )
    topology = chips.parse(request.topology, request.slices)
    run = configfile.load_run_config(request.config, request.overrides)
    model = _model(request, run)
    stage = request.stage or run.stage
    data = dataclasses.replace(
        run.data,
        batch_rows=request.rows or run.data.batch_rows,
        seq_len=request.seq_len or run.data.seq_len,
    )
    # A few rows in one go, unless the user says how they are divided.
    accumulate = run.optim.accumulate if not request.rows else 1
    if any(o.startswith("--config.optim.accumulate") for o in request.overrides):
        accumulate = run.optim.accumulate
    if stage in SERVING:
        model, accumulate = stages.stage_model(run.stage, model), 1
    run = _as_stage(run, stage, model, data, accumulate)
    return Target(run, model, topology, stage)


def _as_stage(
    run: RunConfig, stage: str, model: ModelConfig, data: Any, accumulate: int
) -> RunConfig:
    """The configuration for a training stage; names that only a real job needs are filled in."""
    if stage in SERVING:
        stage = run.stage
    later = stage in (*stages.OWN_STAGES, "router")
    return dataclasses.replace(
        run,
        stage=stage,
        model=None if later else model,
        anchor=(run.anchor or "anchor") if later else "",
        expert_id=(run.expert_id or "expert") if stage in stages.OWN_STAGES else "",
        expert=(run.expert or "expert") if stage == "rows" else "",
        tokenizer=run.tokenizer or "tokenizer.json",
        data=data,
        optim=dataclasses.replace(run.optim, accumulate=accumulate),
    )


def _model(request: Request, run: RunConfig) -> ModelConfig:
    """The architecture: as asked, of the configuration, of its file, or of the anchor on disk."""
    if request.model:
        return _named_model(request.model)
    if run.model is not None:
        return run.model
    path = Path(request.config.partition(":")[0])
    if "def get_model(" in path.read_text(encoding="utf-8"):
        return from_dict(ModelConfig, configfile.load_function(request.config, "get_model")())
    if (Path(run.anchor) / "flexolmo.json").is_file():
        return _model_on_disk(run.anchor)
    raise ConfigError(
        "The architecture of this job is that of its anchor, which is not here",
        got=run.anchor,
        fix="name it with --model: a model directory, or an experiment file such as "
        "experiments/anchor.py:size=7b",
    )


def _named_model(reference: str) -> ModelConfig:
    if (Path(reference) / "flexolmo.json").is_file():
        return _model_on_disk(reference)
    model = configfile.load_run_config(reference).model
    if model is None:
        raise ConfigError("This experiment file has no model", got=reference, where="--model")
    return model


def _model_on_disk(path: str) -> ModelConfig:
    # Most plans need no model directory, and none of what reads one.
    from flexolmo_jax.experts import model_info

    return model_info.read_info(path).config

# SPDX-License-Identifier: Apache-2.0
"""From a configuration to everything that a training run needs besides its state."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax import (
    adapters,
    distributed,
    evidence,
    mesh,
    model,
    optim,
    placed,
    programs,
    stages,
    tree,
)
from flexolmo_jax.config import ModelConfig, RunConfig
from flexolmo_jax.data import tokenize
from flexolmo_jax.errors import ConfigError, RefusedError
from flexolmo_jax.experts import loading, model_dir, model_info, router_init
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.runtime import Runtime

logger = logging.getLogger("flexolmo")


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """One training job, ready to run.

    Attributes:
      program: the step, with the shapes and shardings of everything that it takes.
      frozen: leaves that are only read, placed on the mesh in the dtype they are used in.
      initial: makes the initial trainable leaves, placed on the mesh.
      tokenizer: path of tokenizer.json.
      anchor: what the directory that the stage starts from says of itself, if it starts from one.
      slice_dtypes: leaf name to dtype of the anchor's public slice (stages of one owner).
      rows_of: digest of the manifest of the finished expert (stage "rows").
    """

    config: RunConfig
    program: programs.Program
    frozen: tree.Tree
    initial: Callable[[], tree.Tree]
    tokenizer: Path
    tokenizer_digest: str
    anchor: model_info.ModelInfo | None = None
    slice_dtypes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows_of: str = ""

    @property
    def model(self) -> ModelConfig:
        """The architecture that the stage runs."""
        return self.program.config

    @property
    def runtime(self) -> Runtime:
        """How the step computes."""
        return self.program.runtime

    @property
    def mesh(self) -> Mesh:
        """The mesh that everything lies on."""
        return self.program.mesh

    @property
    def abstract_state(self) -> tree.Tree:
        """Shapes, dtypes and shardings of {"params", "opt", "step"}."""
        return self.program.arguments["state"]

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text of each token id; ids that only pad the vocabulary have none."""
        known = tokenize.token_byte_lengths(tokenize.load(self.tokenizer))
        return np.pad(known, (0, self.model.vocab_size - len(known)))

    def initial_state(self) -> tree.Tree:
        """A state at step 0, placed on the mesh."""
        places = programs.shardings(self.abstract_state)
        params = self.initial()
        optimizer = optim.make_optimizer(self.config.optim, params)
        make = jax.jit(optimizer.init, out_shardings=places["opt"])
        return {
            "params": params,
            "opt": make(params),
            "step": placed.put(np.int32(0), places["step"]),
        }


def build(config: RunConfig) -> TrainingJob:
    """Loads what the stage starts from and lays everything out on the mesh.

    Raises:
      ConfigError: batch, mesh, tokenizer and model do not fit each other.
      CheckpointError, RefusedError: an anchor that cannot be read or trusted.
    """
    e = config.exec
    with distributed.together("laying out the mesh"):
        grid = mesh.make_mesh(e.mesh_data, e.mesh_expert, e.mesh_model)
    if config.stage in stages.OWN_STAGES:
        return _own_job(config, grid)
    return _continued_job(config, grid) if config.anchor else _new_model_job(config, grid)


def _new_model_job(config: RunConfig, grid: Mesh) -> TrainingJob:
    """Stages "anchor" and "joint": everything starts from drawn parameters."""
    with distributed.together("planning the step"):
        program, tokenizer = _new_program(config, grid), tokenize.locate(config.tokenizer)
    key = jax.random.key(config.seed)

    def part(index: int, places: tree.Tree) -> Callable[[], tree.Tree]:
        def draw() -> tree.Tree:
            return stages.split(config.stage, _drawn(program.config, config.stage, key))[index]

        return jax.jit(draw, out_shardings=programs.shardings(places))

    # Router row and bias start as constants, so any key gives the same frozen leaves.
    frozen = part(1, program.arguments["frozen"])()
    initial = part(0, program.arguments["state"]["params"])
    return _job(config, program, frozen=frozen, initial=initial, tokenizer=tokenizer)


def _new_program(config: RunConfig, grid: Mesh) -> programs.Program:
    assert config.model is not None  # RunConfig refuses these stages without one
    if (config.model.n_slots == 1) != (config.stage == "anchor"):
        raise ConfigError(
            "An anchor is dense: experts come by stitching, not by training together"
            if config.stage == "anchor"
            else "A joint mixture needs more slots than one",
            got=f"n_slots={config.model.n_slots}, stage={config.stage}",
            where="RunConfig.model",
            fix='use stage "anchor" for one slot and "joint" for a mixture',
        )
    router_init.check_parts(config, config.model)
    program = programs.training(config, config.model, grid)
    router_init.check_sources(config, config.model)
    return program


def _drawn(config: ModelConfig, stage: str, key: jax.Array) -> tree.Tree:
    """Initial parameters; rows of a joint router that were all zero would route every token alike.

    Source: rows of the reference's mixtures start as other weights do (OLMo-core `init_moe`).
    """
    params = model.init_params(config, key)
    if stage == "joint":
        shape = params["experts"]["router"].shape
        rows = jax.random.truncated_normal(jax.random.fold_in(key, 1), -3.0, 3.0, shape)
        params["experts"]["router"] = model.INIT_STD * rows
        params["experts"] = adapters.drawn(params["experts"], jax.random.fold_in(key, 2))
    return params


def _own_job(config: RunConfig, grid: Mesh) -> TrainingJob:
    """Stages of one owner beside the frozen anchor: a new expert, or the rows of a finished one."""
    info, program = _start(config, grid)
    if config.stage == "expert":
        init = router_init.resolve(config.router_init, info.config)
        config = dataclasses.replace(config, router_init=init)
    with distributed.together("looking for what rows are made of"):
        router_init.check_sources(config, info.config)
    anchor, digest = _load(config, program), ""
    dtypes = {name: leaf.dtype for name, leaf in anchor["experts"].items()}
    if config.stage == "rows":
        with distributed.together("loading the expert"):
            digest, group = _finished_expert(config, info)
        rows, kept = stages.split("rows", {**anchor, "experts": group})
        places = programs.shardings(program.arguments)
        own = jax.tree.map(placed.put, kept["expert"], places["frozen"]["expert"])
        frozen = {**kept, "public": anchor["experts"], "expert": own}

        def initial() -> tree.Tree:
            float32 = jax.tree.map(np.float32, rows)
            return jax.tree.map(placed.put, float32, places["state"]["params"])

    else:
        frozen, initial = stages.split("expert", anchor)[1], _new_expert(config, info, program)
        if info.config.router.evidence:
            parts = anchor["shared"].get(evidence.LEAF)
            parts_PX = None if parts is None else placed.fetch(parts)
            counted = router_init.evidence_table(config, info.config, parts_PX)
            places = programs.shardings(program.arguments["frozen"]["expert"])
            frozen["expert"] = {evidence.LEAF: placed.put(counted, places[evidence.LEAF])}
    return _job(
        config,
        program,
        frozen=_cast(frozen, program.arguments["frozen"]),
        initial=initial,
        tokenizer=info.tokenizer_path,
        anchor=info,
        slice_dtypes=dtypes,
        rows_of=digest,
    )


def _finished_expert(config: RunConfig, info: model_info.ModelInfo) -> tuple[str, tree.Tree]:
    """The slice that `config.expert` names: its digest, and a group of one slot in NumPy arrays.

    Raises:
      RefusedError: damaged, or made for another anchor.
      ConfigError: the expert of another id.
    """
    piece, leaves = slices.read_slice(config.expert)
    problems = model_info.belongs_problems(info, piece)
    if problems:
        raise RefusedError(f"{config.expert} does not belong to {info.path}", problems)
    if piece.expert != config.expert_id:
        raise ConfigError(
            "The slice is that of another expert",
            got=config.expert_id,
            expected=piece.expert,
            where="RunConfig.expert_id",
        )
    return piece.digest, tree.map_named(lambda _, leaf: leaf[:, None], leaves)


def _new_expert(
    config: RunConfig, info: model_info.ModelInfo, program: programs.Program
) -> Callable[[], tree.Tree]:
    """Makes the expert that training starts from, when it is asked for."""

    def initial() -> tree.Tree:
        # Read once more, or a run that resumes would hold weights that it does not need.
        anchor = _load(config, program)
        router_LD = router_init.expert_row(config, info.config, anchor)
        places = programs.shardings(program.arguments["state"]["params"])
        key = jax.random.key(config.seed)

        def copy(group: tree.Tree, row_LD: jax.Array) -> tree.Tree:
            start = {"experts": group}
            return {"expert": stages.upcycle(start, row_LD, config.router_init.bias, key)}

        return jax.jit(copy, out_shardings=places)(anchor["experts"], router_LD)

    return initial


def _continued_job(config: RunConfig, grid: Mesh) -> TrainingJob:
    """A stage that goes on with weights of a finished model: rows of a router, or everything."""
    info, program = _start(config, grid)
    trained, kept = stages.split(config.stage, _load(config, program))
    frozen = _cast(kept, program.arguments["frozen"])
    if len(info.slots) < info.config.n_slots:
        filled = np.isin(np.arange(info.config.n_slots), list(info.slots.values()))
        frozen["filled"] = placed.put(filled, placed.replicated(grid))
    # Rows of a router are kept: reading them again would read all experts again.
    held = trained if config.stage == "router" else None

    def initial() -> tree.Tree:
        # Anything else is read once more, or it would lie on the devices twice during the run.
        start = held or stages.split(config.stage, _load(config, program))[0]
        # Copies also where nothing is cast: the first step takes their memory.
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=held is not None), start)

    return _job(
        config,
        program,
        frozen=frozen,
        initial=initial,
        tokenizer=info.tokenizer_path,
        anchor=info,
    )


def _start(config: RunConfig, grid: Mesh) -> tuple[model_info.ModelInfo, programs.Program]:
    """What the model that a stage starts from says of itself, and the program for it."""
    with distributed.together("reading the model that the stage starts from"):
        info = model_info.read_info(config.anchor)
        _check_start(config, info)
        return info, programs.training(config, info.config, grid)


def _check_start(config: RunConfig, info: model_info.ModelInfo) -> None:
    """Refuses a model that a stage cannot start from."""
    if config.stage in ("router", "joint") and info.is_anchor:
        raise ConfigError(
            f"Stage {config.stage!r} needs a model with experts",
            got="an anchor",
            where=config.anchor,
            fix="stitch one with flexolmo stitch",
        )
    if config.stage in ("anchor", *stages.OWN_STAGES) and not info.is_anchor:
        raise ConfigError(
            f"Stage {config.stage!r} starts from an anchor",
            got=f"a model with {', '.join(info.slots)}",
            where=config.anchor,
            fix="name the anchor that it was stitched from",
        )
    init = config.router_init
    measured = init.method in ("discriminant", "hidden_mean")
    if config.stage == "expert" and info.config.router.evidence and measured:
        raise ConfigError(
            "Rows that are added to evidence start at zero, and training finds what is missing",
            got=f"router_init.method={init.method}",
            where=config.anchor,
            fix="set router_init.method=auto",
        )
    if config.stage == "joint" and len(info.slots) < info.config.n_slots:
        raise ConfigError(
            "A joint mixture has no empty slots",
            got=f"{len(info.slots)} of {info.config.n_slots} filled",
            where=config.anchor,
            fix="stitch it with --slots of the number of experts and the public one",
        )


def _load(config: RunConfig, program: programs.Program) -> tree.Tree:
    """That model with each leaf read straight to its place, in the dtype that it is stored in."""
    state, frozen = program.arguments["state"]["params"], program.arguments["frozen"]
    if config.stage in stages.OWN_STAGES:  # Both experts have the leaves of one group.
        places = {"shared": frozen["shared"], "experts": frozen["public"]}
    else:
        places = stages.join(state, frozen)
    found = {name: leaf.sharding for name, leaf in tree.flatten(places).items()}

    def place(name: str, _shape: tuple[int, ...]) -> Any:
        return found[name]

    with distributed.together("loading the model that the stage starts from"):
        arrays = model_dir.read_model(config.anchor, sharding_fn=place)[1]
    # Hosts that exchange what they have read wait for one another: only once none has failed.
    return tree.unflatten(loading.spread(arrays, place))


def _cast(leaves: tree.Tree, like: tree.Tree) -> tree.Tree:
    """Placed leaves in the dtypes of abstract ones; the place stays."""
    return jax.tree.map(lambda leaf, x: leaf.astype(x.dtype), leaves, like)


def _job(
    config: RunConfig, program: programs.Program, *, tokenizer: Path, **rest: Any
) -> TrainingJob:
    """The part of a job that does not depend on the stage."""
    with distributed.together("reading the tokenizer"):
        digest = tree.file_digest(tokenizer)
        known = tokenize.vocab_size(tokenize.load(tokenizer))
        if known > program.config.vocab_size:
            raise ConfigError(
                "The tokenizer has more ids than the model has embeddings",
                got=f"{known} ids, vocab_size={program.config.vocab_size}",
                where=tokenizer,
            )
    logger.info(
        "stage %s: dispatch %s, experts over devices %s, compute %s, mesh %s, %d trainable "
        "parameters",
        config.stage,
        program.runtime.dispatch,
        program.runtime.expert_parallel,
        program.runtime.compute_dtype,
        "x".join(f"{axis}={size}" for axis, size in program.mesh.shape.items()),
        tree.count(program.arguments["state"]["params"]),
    )
    return TrainingJob(
        config=config,
        program=program,
        tokenizer=tokenizer,
        tokenizer_digest=digest,
        **rest,
    )

# SPDX-License-Identifier: Apache-2.0
"""Every program that a pod runs, with abstract arguments: to be traced, compiled and measured.

A training job runs the program that `training` describes, so what is planned is what runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexolmo_jax import (
    adapters,
    compiler,
    evaluate,
    model,
    optim,
    sample,
    sharding,
    stages,
    step,
    tree,
)
from flexolmo_jax.config import DataConfig, ExecConfig, ModelConfig, RunConfig
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.mesh import BATCH_AXES

BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "segments": jnp.int32,
    "loss_mask": bool,
    "own": bool,
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A pure function and the shapes, dtypes and shardings of its arguments.

    Attributes:
      stage: a training stage, or "eval", "prefill" or "decode".
      config: the architecture that it runs.
      arguments: trees of ShapeDtypeStruct, by the parameter's name.
      donated: parameters whose memory the result may take.
      tokens: tokens that one call processes, over all devices.
      seq_len: tokens that the last one attends to, at most.
    """

    stage: str
    config: ModelConfig
    runtime: model.Runtime
    mesh: Mesh
    function: Callable[..., Any]
    arguments: dict[str, Any]
    donated: tuple[str, ...]
    tokens: int
    seq_len: int

    @property
    def model_flops(self) -> float:
        """FLOPs of one call that the stage needs, recomputation not counted."""
        stage = self.stage if self.stage in stages.STAGES else "eval"
        return self.tokens * stages.flops_per_token(self.config, stage, self.seq_len)

    def jitted(self) -> Any:
        """The function, compiled at its first call with positional arguments."""
        names = list(self.arguments)
        training = self.stage in stages.STAGES
        return jax.jit(
            self.function,
            donate_argnums=[names.index(name) for name in self.donated],
            compiler_options=compiler.options(self.mesh.devices.flat[0]) if training else None,
        )

    def lower(self) -> jax.stages.Lowered:
        """Traces the function for the devices of its mesh; makes no arrays."""
        return self.jitted().lower(*self.arguments.values())


def training(run: RunConfig, config: ModelConfig, grid: Mesh) -> Program:
    """The optimizer step of a stage.

    Args:
      config: of the model that the stage trains (stages "anchor", "joint") or starts from.

    Raises:
      ConfigError: a batch that does not divide over devices and micro-batches.
    """
    _check_rows(run.data, grid, run.optim.accumulate)
    c = stages.stage_model(run.stage, config)
    trainable, frozen = weights(run.stage, c, grid, run.exec.compute_dtype)
    optimizer = optim.make_optimizer(run.optim, trainable)
    runtime = model.Runtime.resolve(run.exec, c.n_slots, c.n_active, grid, training=True)
    return Program(
        stage=run.stage,
        config=c,
        runtime=runtime,
        mesh=grid,
        function=functools.partial(step.train_step, c, runtime, run.stage, run.optim, optimizer),
        arguments={
            "state": training_state(optimizer, trainable, grid),
            "frozen": frozen,
            "batch": batch(run.data.batch_rows, run.data.seq_len, grid),
        },
        donated=("state",),
        tokens=run.data.batch_rows * run.data.seq_len,
        seq_len=run.data.seq_len,
    )


def evaluation(
    config: ModelConfig, exec_config: ExecConfig, grid: Mesh, *, rows: int, seq_len: int
) -> Program:
    """Scoring of one batch of text under an allowed set of each row."""
    _check_rows(DataConfig(batch_rows=rows), grid)
    runtime = model.Runtime.resolve(exec_config, config.n_slots, config.n_active, grid)
    arguments = {
        **_model_arguments(config, exec_config, grid),
        "batch": batch(rows, seq_len, grid),
        "allowed_BE": _rows_of(grid, (rows, config.n_slots), bool),
    }
    return Program(
        stage="eval",
        config=config,
        runtime=runtime,
        mesh=grid,
        function=functools.partial(evaluate.score_batch, config, runtime),
        arguments=arguments,
        donated=(),
        tokens=rows * seq_len,
        seq_len=seq_len,
    )


def prefill(
    config: ModelConfig, exec_config: ExecConfig, grid: Mesh, *, rows: int, seq_len: int
) -> Program:
    """The first call of generation: whole prompts of `seq_len` tokens into an empty cache."""
    return _generation("prefill", config, exec_config, grid, rows, seq_len, seq_len)


def decode(
    config: ModelConfig, exec_config: ExecConfig, grid: Mesh, *, rows: int, seq_len: int
) -> Program:
    """One more token of every row, beside a cache of `seq_len` tokens."""
    return _generation("decode", config, exec_config, grid, rows, seq_len, 1)


def _generation(
    stage: str,
    config: ModelConfig,
    exec_config: ExecConfig,
    grid: Mesh,
    rows: int,
    seq_len: int,
    new: int,
) -> Program:
    _check_rows(DataConfig(batch_rows=rows), grid)
    runtime = model.Runtime.resolve(exec_config, config.n_slots, config.n_active, grid)
    empty = functools.partial(model.init_cache, config, rows, seq_len, exec_config.compute_dtype)
    cache = jax.eval_shape(empty)
    return Program(
        stage=stage,
        config=config,
        runtime=runtime,
        mesh=grid,
        function=functools.partial(sample.advance, config, runtime, None),
        arguments={
            **_model_arguments(config, exec_config, grid),
            "tokens_BT": _rows_of(grid, (rows, new), jnp.int32),
            "segments_BT": _rows_of(grid, (rows, new), jnp.int32),
            "allowed_BE": _rows_of(grid, (rows, config.n_slots), bool),
            "cache": abstract(cache, _cache_shardings(cache, grid)),
        },
        donated=("cache",),
        tokens=rows * new,
        seq_len=seq_len,
    )


def weights(
    stage: str, config: ModelConfig, grid: Mesh, compute_dtype: str
) -> tuple[tree.Tree, tree.Tree]:
    """Abstract (trainable, frozen) leaves of a stage: float32, and the dtypes they are used in."""
    one = config.replace(n_slots=1, n_active=1) if stage in stages.OWN_STAGES else config
    shapes, axes = model.abstract_params(one), model.param_axes(one)
    (trainable, frozen), (trained_axes, frozen_axes) = (
        stages.split(stage, part) for part in (shapes, axes)
    )
    frozen = tree.map_named(
        lambda name, x: jax.ShapeDtypeStruct(x.shape, frozen_dtype(name, compute_dtype)), frozen
    )
    return (
        abstract(trainable, sharding.param_shardings(trainable, trained_axes, grid)),
        abstract(frozen, sharding.param_shardings(frozen, frozen_axes, grid)),
    )


def frozen_dtype(name: str, compute_dtype: str) -> Any:
    """Matmul weights in compute dtype; norms, router and bias stay float32, as they are used."""
    leaf = name.split("/")[-1]
    matmul = leaf.startswith(("w_", "unembed", "embedding")) or leaf in adapters.MATRICES
    return jnp.dtype(compute_dtype if matmul else "float32")


def training_state(
    optimizer: optax.GradientTransformation, trainable: tree.Tree, grid: Mesh
) -> tree.Tree:
    """Abstract state at any step: the moments lie where their parameters lie."""
    whole = NamedSharding(grid, PartitionSpec())
    opt = jax.eval_shape(optimizer.init, trainable)
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, s: s,
        opt,
        shardings(trainable),
        transform_non_params=lambda _: whole,
    )
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return {"params": trainable, "opt": abstract(opt, opt_shardings), "step": count}


def batch(rows: int, seq_len: int, grid: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract batch of packed rows."""
    return {name: _rows_of(grid, (rows, seq_len), dtype) for name, dtype in BATCH_DTYPES.items()}


def abstract(leaves: Any, places: Any) -> Any:
    """Shapes and dtypes of a tree with the shardings of another."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), leaves, places
    )


def shardings(leaves: Any) -> Any:
    """The shardings of a tree."""
    return jax.tree.map(lambda x: x.sharding, leaves)


def _model_arguments(config: ModelConfig, exec_config: ExecConfig, grid: Mesh) -> dict[str, Any]:
    """A model that nothing trains: its weights as they are used."""
    params = stages.join(*weights("router", config, grid, exec_config.compute_dtype))
    return {"shared": params["shared"], "groups": (params["experts"],)}


def _rows_of(grid: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(grid))


def _cache_shardings(cache: model.Cache, grid: Mesh) -> model.Cache:
    """Rows over the batch axes, kv heads over `model`."""

    def place(*axes: str | tuple[str, ...] | None) -> NamedSharding:
        return NamedSharding(grid, PartitionSpec(*axes))

    heads = "model" if cache.k.shape[3] % grid.shape["model"] == 0 else None
    kv = place(None, BATCH_AXES, None, heads)
    rows = place(BATCH_AXES)
    gathered = jax.tree.map(lambda _: rows, cache.gathered)
    return model.Cache(kv, kv, place(None, BATCH_AXES), gathered, rows)


def _check_rows(data: DataConfig, grid: Mesh, accumulate: int = 1) -> None:
    pieces = grid.shape["data"] * grid.shape["expert"] * accumulate
    if data.batch_rows % pieces:
        raise ConfigError(
            "The batch does not divide over devices and micro-batches",
            got=f"batch_rows={data.batch_rows}",
            expected=f"a multiple of data x expert x accumulate = {pieces}",
            where="data.batch_rows",
        )

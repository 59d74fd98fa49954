# SPDX-License-Identifier: Apache-2.0
"""One optimizer step as a pure function of (state, frozen, batch)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flexolmo_jax import loss, model, stages, tree
from flexolmo_jax.config import ModelConfig, OptimConfig

Batch = Mapping[str, jax.Array]


def loss_sums(
    config: ModelConfig,
    run: model.Runtime,
    stage: str,
    trainable: tree.Tree,
    frozen: tree.Tree,
    batch: Batch,
) -> dict[str, Any]:
    """Sums over predicted tokens of everything that the objective and the metrics are made of."""
    shared, groups = stages.assemble(stage, trainable, frozen)
    out = model.forward(
        config,
        run,
        shared,
        groups,
        batch["tokens"],
        segments_BT=batch["segments"],
        allowed_BE=stages.allowed(frozen, len(batch["tokens"])),
        training=True,
    )
    nll_BT, z_BT = loss.token_losses(config, run, shared, out.hidden_BTD, batch["targets"], groups)
    mask_BT = batch["loss_mask"]
    sums = {
        "nll": jnp.sum(jnp.where(mask_BT, nll_BT, 0.0)),
        "z": jnp.sum(jnp.where(mask_BT, z_BT, 0.0)),
    }
    if stage != "anchor":
        filled_E = frozen.get("filled")
        sums |= stages.router_metrics(stage, out, batch["own"], mask_BT, filled_E)
    if out.drops is not None:
        sums["drops"] = jax.tree.map(functools.partial(jnp.sum, axis=0), out.drops)
    return sums


def objective(optim: OptimConfig, sums: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """Mean loss per predicted token, in nats, with the auxiliary terms of the stage."""
    total = sums["nll"] + optim.z_loss * sums["z"]
    if "router_z" in sums:
        total += optim.router_z_loss * sums["router_z"]
    if "label" in sums:
        total += optim.router_label_loss * sums["label"]
    if "load_balance" in sums:
        total += optim.load_balance * sums["load_balance"]
    return total / tokens


def gradients(
    config: ModelConfig,
    run: model.Runtime,
    stage: str,
    optim: OptimConfig,
    trainable: tree.Tree,
    frozen: tree.Tree,
    batch: Batch,
) -> tuple[tree.Tree, dict[str, Any]]:
    """Gradient of `objective` over the whole batch, micro-batch by micro-batch if asked.

    Every micro-batch is divided by the token count of the *whole* batch, so accumulation gives the
    same mean as one large batch even where rows hold different numbers of tokens. Load balance is
    the exception: a product of two means, taken of each micro-batch and then averaged.
    """
    tokens = jnp.maximum(jnp.sum(batch["loss_mask"]), 1)

    def micro(trainable, part):
        sums = loss_sums(config, run, stage, trainable, frozen, part)
        return objective(optim, sums, tokens), sums

    grad = jax.grad(micro, has_aux=True)
    if optim.accumulate == 1:
        return grad(trainable, batch)
    # Strided, so that each micro-batch stays spread over all devices of the batch axes.
    parts = {
        k: jnp.moveaxis(v.reshape(-1, optim.accumulate, *v.shape[1:]), 1, 0)
        for k, v in batch.items()
    }

    def add(total, part):
        return jax.tree.map(jnp.add, total, grad(trainable, part)), None

    zero = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(grad, trainable, {k: v[0] for k, v in parts.items()}),
    )
    return jax.lax.scan(add, zero, parts)[0]


def train_step(
    config: ModelConfig,
    run: model.Runtime,
    stage: str,
    optim: OptimConfig,
    optimizer: optax.GradientTransformation,
    state: Mapping[str, Any],
    frozen: tree.Tree,
    batch: Batch,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """One step; a step whose gradient is not finite changes no bit of parameters or optimizer.

    Args:
      state: {"params": trainable leaves, "opt": optimizer state, "step": int32}.

    Returns:
      the next state, and metrics (means per predicted token).
    """
    grads, sums = gradients(config, run, stage, optim, state["params"], frozen, batch)
    norm = optax.tree.norm(grads)
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    finite = jnp.isfinite(norm)

    def select(new, old):
        return jax.tree.map(functools.partial(jnp.where, finite), new, old)

    new_state = {
        "params": select(params, state["params"]),
        "opt": select(opt, state["opt"]),
        "step": state["step"] + 1,
    }
    tokens = jnp.maximum(jnp.sum(batch["loss_mask"]), 1)
    own = jnp.sum(batch["loss_mask"] & batch["own"])
    drops = sums.pop("drops", None)
    metrics = {name: value / tokens for name, value in sums.items()}
    metrics["loss"] = metrics.pop("nll")
    if "own_weight_on_own" in sums:
        metrics["own_weight_on_own"] = sums["own_weight_on_own"] / jnp.maximum(own, 1)
        metrics["own_weight_on_public"] = sums["own_weight_on_public"] / jnp.maximum(
            tokens - own, 1
        )
    if drops is not None:
        metrics |= drops.shares()
    metrics |= {"grad_norm": norm, "skipped": ~finite, "tokens": tokens}
    return new_state, metrics

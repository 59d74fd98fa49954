# SPDX-License-Identifier: Apache-2.0
"""What each stage trains and what it only reads.

Freezing is structural: the trainable and the frozen leaves are two trees, the gradient is taken
of the first only, and the second has no optimizer state and no float32 copy.

  anchor   trains every weight of a dense model; its router row and bias are not used yet.
  expert   trains one expert (FFN stack, router rows, biases) beside the frozen anchor.
"""

import jax
import jax.numpy as jnp

from flexolmo_jax import model, router, tree
from flexolmo_jax.config import ModelConfig

ROUTER_LEAVES = ("router", "bias")


def split_anchor(params: tree.Tree) -> tuple[tree.Tree, tree.Tree]:
    """(trainable, frozen) of the anchor stage; with one slot the router has no gradient."""
    group = params["experts"]
    trained = {name: leaf for name, leaf in group.items() if name not in ROUTER_LEAVES}
    kept = {name: group[name] for name in ROUTER_LEAVES}
    return {"shared": params["shared"], "experts": trained}, {"experts": kept}


def join_anchor(trainable: tree.Tree, frozen: tree.Tree) -> tree.Tree:
    """Exact inverse of `split_anchor`."""
    experts = {**trainable["experts"], **frozen["experts"]}
    return {"shared": trainable["shared"], "experts": experts}


def upcycle(anchor: tree.Tree, router_LD: jax.Array, bias: float) -> tree.Tree:
    """The expert that training starts from: a float32 copy of the public FFN with its own row.

    Args:
      router_LD: where the router rows start (see `experts.router_init`).
      bias: raw bias of every layer; the effective bias is -softplus of it.
    """
    public = anchor["experts"]
    expert = {name: jnp.asarray(public[name], jnp.float32) for name in public}
    expert["router"] = jnp.asarray(router_LD, jnp.float32)[:, None, :]
    expert["bias"] = jnp.full_like(expert["bias"], bias)
    return expert


def assemble(stage: str, trainable: tree.Tree, frozen: tree.Tree) -> tuple[tree.Tree, tuple]:
    """(shared weights, expert groups) that `model.forward` takes, public expert first."""
    if stage == "anchor":
        params = join_anchor(trainable, frozen)
        return params["shared"], (params["experts"],)
    return frozen["shared"], (frozen["public"], trainable["expert"])


def stage_model(stage: str, config: ModelConfig) -> ModelConfig:
    """The architecture that a stage runs: two slots, both active, while an expert trains."""
    slots = {"anchor": 1, "expert": 2}[stage]
    return config.replace(n_slots=slots, n_active=slots)


def flops_per_token(config: ModelConfig, stage: str, seq_len: int) -> float:
    """Model FLOPs per trained token, counting only what the stage needs.

    Forward 2P, input gradients 2P, weight gradients 2P of the trained part; attention adds
    2·2·(T/2)·width per layer forward (causal, averaged over positions) and twice that backward.
    Embedding lookups are free; recomputation is not counted.
    """
    abstract = model.abstract_params(config.replace(n_slots=1, n_active=1))
    ffn = 3 * config.n_layers * config.d_model * config.d_ffn
    unembed = config.d_model * config.vocab_size
    attention = tree.count(
        {k: v for k, v in tree.flatten(abstract["shared"]["layers"]).items() if "w_" in k}
    )
    score = 2 * config.n_layers * seq_len * config.n_heads * config.d_head
    if stage == "anchor":
        return 6.0 * (ffn + attention + unembed) + 3.0 * score
    return 4.0 * (2 * ffn + attention + unembed) + 2.0 * ffn + 3.0 * score


def router_metrics(
    out: model.Output, own_BT: jax.Array, mask_BT: jax.Array
) -> dict[str, jax.Array]:
    """Sums over tokens of router quantities: z-loss, label loss, weight of the own expert."""
    logits = out.router_logits_LBTE
    n_slots = logits.shape[-1]
    share_LBT = out.combine_LBTE[..., n_slots - 1]
    total_BT = jnp.mean(share_LBT / jnp.maximum(jnp.sum(out.combine_LBTE, -1), 1e-9), axis=0)
    own, public = mask_BT & own_BT, mask_BT & ~own_BT
    z_LBT = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return {
        "router_z": jnp.sum(jnp.where(mask_BT, jnp.mean(z_LBT, axis=0), 0.0)),
        "label": router.label_loss(logits, own_BT, mask_BT) * jnp.sum(mask_BT),
        "own_weight_on_own": jnp.sum(jnp.where(own, total_BT, 0.0)),
        "own_weight_on_public": jnp.sum(jnp.where(public, total_BT, 0.0)),
    }

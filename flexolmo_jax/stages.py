# SPDX-License-Identifier: Apache-2.0
"""What each stage trains and what it only reads.

Freezing is structural: the trainable and the frozen leaves are two trees, the gradient is taken
of the first only, and the second has no optimizer state and no float32 copy.

  anchor   trains every weight of a dense model; its router row and bias are not used yet, and
           its tables of evidence are counted.
  expert   trains one expert (FFN stack, router rows, biases) beside the frozen anchor; its table
           of evidence is counted, not trained.
  rows     trains the router rows and biases of one finished expert beside the frozen anchor: no
           other owner's row has a say in it, so that leaving stays exact.
  router   trains the router rows and biases of a stitched model, all of them together.
  joint    trains every weight of a mixture but its biases: the unrestricted mixture, which sees
           everybody's text and so is what independent experts are compared with.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from flexolmo_jax import adapters, evidence, model, moe, router, tree
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.layers import NEG_INF

STAGES = ("anchor", "expert", "rows", "router", "joint")
# Stages of one owner alone: two slots, both always active.
OWN_STAGES = ("expert", "rows")
ROUTER_LEAVES = ("router", "bias")
# What of a group trains, in the stages that hold one; a bias that does not keeps its constant.
TRAINED = {
    "anchor": moe.WEIGHTS,
    "joint": (*moe.WEIGHTS, "router", *adapters.LEAVES),
    "rows": ROUTER_LEAVES,
    "router": ROUTER_LEAVES,
}


def split(stage: str, params: tree.Tree) -> tuple[tree.Tree, tree.Tree]:
    """(trainable, frozen) leaves; in stage "anchor" the router has no gradient.

    Stages "expert" and "rows" take the anchor's parameters, whose slot stands for the expert's too.
    """
    group, shared = params["experts"], params["shared"]
    if stage == "expert":
        trained = {name: group[name] for name in learnt(group)}
        counted = {name: leaf for name, leaf in group.items() if name not in trained}
        kept = {"expert": counted} if counted else {}
        return {"expert": trained}, {"shared": shared, "public": group, **kept}
    trained = {name: leaf for name, leaf in group.items() if name in TRAINED[stage]}
    kept = {name: leaf for name, leaf in group.items() if name not in TRAINED[stage]}
    if stage == "rows":
        return {"expert": trained}, {"shared": shared, "public": group, "expert": kept}
    if stage == "router":
        return {"experts": trained}, {"shared": shared, "experts": kept}
    counted = {name: leaf for name, leaf in shared.items() if name == evidence.LEAF}
    shared = {name: shared[name] for name in learnt(shared)}
    kept = {"experts": kept, **({"shared": counted} if counted else {})}
    return {"shared": shared, "experts": trained}, kept


def learnt(leaves: Iterable[str]) -> list[str]:
    """Leaves that training finds: tables of evidence are counted instead."""
    return [name for name in leaves if name != evidence.LEAF]


def join(trainable: tree.Tree, frozen: tree.Tree) -> tree.Tree:
    """Exact inverse of `split`, but for the stages of one owner."""
    parts = ({**trainable.get(p, {}), **frozen.get(p, {})} for p in ("shared", "experts"))
    return dict(zip(("shared", "experts"), parts, strict=True))


def upcycle(anchor: tree.Tree, router_LD: jax.Array, bias: float, key: jax.Array) -> tree.Tree:
    """The expert that training starts from: a float32 copy of the public FFN with its own row.

    Args:
      router_LD: where the router rows start (see `experts.router_init`).
      bias: raw bias of every layer; the effective bias is -softplus of it.
      key: draws what adapters start from.
    """
    public = anchor["experts"]
    expert = {name: jnp.asarray(public[name], jnp.float32) for name in learnt(public)}
    expert = adapters.drawn(expert, key)
    expert["router"] = jnp.asarray(router_LD, jnp.float32)[:, None, :]
    expert["bias"] = jnp.full_like(expert["bias"], bias)
    return expert


def assemble(stage: str, trainable: tree.Tree, frozen: tree.Tree) -> tuple[tree.Tree, tuple]:
    """(shared weights, expert groups) that `model.forward` takes, public expert first."""
    if stage in OWN_STAGES:
        return frozen["shared"], (frozen["public"], own_expert(trainable, frozen))
    params = join(trainable, frozen)
    return params["shared"], (params["experts"],)


def own_expert(trainable: tree.Tree, frozen: tree.Tree) -> tree.Tree:
    """The whole expert of an owner, trained and frozen leaves together."""
    return {**frozen.get("expert", {}), **trainable["expert"]}


def allowed(frozen: tree.Tree, rows: int) -> jax.Array | None:
    """Slots that training may use, [rows, E], or None for all: an empty slot serves nothing."""
    filled_E = frozen.get("filled")
    return None if filled_E is None else jnp.broadcast_to(filled_E, (rows, len(filled_E)))


def stage_model(stage: str, config: ModelConfig) -> ModelConfig:
    """The architecture that a stage runs: two slots, both active, while an expert trains."""
    slots = {"anchor": 1, "expert": 2, "rows": 2}.get(stage)
    return config.replace(n_slots=slots, n_active=slots) if slots else config


def flops_per_token(config: ModelConfig, stage: str, seq_len: int) -> float:
    """Model FLOPs per token, counting only what the stage needs.

    Forward 2P, input gradients 2P, weight gradients 2P of the trained part, with P the parameters
    that a token uses; attention adds 2·2·(T/2)·width per layer forward (causal, averaged over
    positions) and twice that backward. Embedding lookups and router rows are free; recomputation
    is not counted.

    Args:
      stage: a training stage, or "eval" for a forward pass.
    """
    abstract = model.abstract_params(config.replace(n_slots=1, n_active=1))
    ffn = 3 * config.n_layers * config.d_model * config.d_ffn
    unembed = config.d_model * config.vocab_size
    attention = tree.count(
        {k: v for k, v in tree.flatten(abstract["shared"]["layers"]).items() if "w_" in k}
    )
    added = adapters.size(config)
    score = 2.0 * config.n_layers * seq_len * config.n_heads * config.d_head
    if stage in OWN_STAGES:
        whole, trained = 2 * ffn + attention + unembed + added, ffn + added
        return 4.0 * whole + (2.0 * trained if stage == "expert" else 0.0) + 3.0 * score
    n_active = stage_model(stage, config).n_active
    used = n_active * ffn + (n_active - 1) * added + attention + unembed
    if stage == "eval":
        return 2.0 * used + score
    return (4.0 if stage == "router" else 6.0) * used + 3.0 * score


def router_metrics(
    stage: str,
    out: model.Output,
    own_BT: jax.Array,
    mask_BT: jax.Array,
    filled_E: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Sums over tokens of what the router's losses and metrics are made of.

    Every stage with a router has its z-loss; those of one owner add the label loss and the weight
    of the own expert, the stages of many experts their load balance.

    Args:
      filled_E: slots that hold an expert; None for all. An empty one changes no sum.
    """
    logits = out.router_logits_LBTE
    if filled_E is not None:
        logits = jnp.where(filled_E, logits, NEG_INF)
    z_LBT = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    sums = {"router_z": jnp.sum(jnp.where(mask_BT, jnp.mean(z_LBT, axis=0), 0.0))}
    tokens = jnp.sum(mask_BT)
    if stage not in OWN_STAGES:
        n_slots = logits.shape[-1] if filled_E is None else jnp.sum(filled_E)
        balance = router.load_balance(logits, out.combine_LBTE > 0, mask_BT, n_slots)
        return sums | {"load_balance": balance * tokens}
    share_LBT = out.combine_LBTE[..., logits.shape[-1] - 1]
    total_BT = jnp.mean(share_LBT / jnp.maximum(jnp.sum(out.combine_LBTE, -1), 1e-9), axis=0)
    own, public = mask_BT & own_BT, mask_BT & ~own_BT
    return sums | {
        "label": router.label_loss(logits, own_BT, mask_BT) * tokens,
        "own_weight_on_own": jnp.sum(jnp.where(own, total_BT, 0.0)),
        "own_weight_on_public": jnp.sum(jnp.where(public, total_BT, 0.0)),
    }

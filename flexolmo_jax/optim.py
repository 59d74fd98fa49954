# SPDX-License-Identifier: Apache-2.0
"""Schedule and AdamW, with weight decay and the router's learning rate chosen by leaf name."""

from typing import Any

import jax
import optax

from flexolmo_jax import tree
from flexolmo_jax.config import OptimConfig

# Leaf name -> (weight decay applies, learning rate is the router's). Every leaf must be covered.
RULES: list[tuple[str, tuple[bool, bool]]] = [
    (r"(.*/)?(router|bias)", (False, True)),
    (r"(.*/)?embedding", (False, False)),
    (r"(.*/)?\w*norm", (False, False)),
    (r"(.*/)?\w*_scale", (False, False)),
    (r"(.*/)?(w_\w+|unembed|[qkvo]_[ab]|head_[ab])", (True, False)),
]


def schedule(config: OptimConfig) -> optax.Schedule:
    """Linear warmup, then a cosine to `final_lr_frac` of the peak at `total_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=config.total_steps,
        end_value=config.peak_lr * config.final_lr_frac,
    )


def make_optimizer(config: OptimConfig, params: tree.Tree) -> optax.GradientTransformation:
    """AdamW with global-norm clipping for a (possibly abstract) tree of trainable leaves."""
    rules = tree.match_rules(tree.flatten(params), RULES, what="optimizer")
    decays = tree.unflatten({name: rule[0] for name, rule in rules.items()})
    mults = tree.unflatten(
        {name: config.router_lr_mult if rule[1] else 1.0 for name, rule in rules.items()}
    )

    def scale_router(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda u, m: u if m == 1.0 else u * m, updates, mults)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.stateless(scale_router),
        optax.scale_by_learning_rate(schedule(config)),
    )

# SPDX-License-Identifier: Apache-2.0
"""What the backward pass of a layer keeps and what it makes again.

A layer names its large values with `keep`. Each policy keeps what the one before it keeps and
more; a layer's input is kept by all.

  full         nothing else: one more forward pass, the attention kernel included.
  outputs      results of the attention kernel, of attention and of each expert: per value kept,
               these save the most work.
  projections  also queries, keys and values before norm and rotation.
  dots         also the hidden products of the experts: nothing but elementwise work is repeated.
  none         everything that autodiff wants to have.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

# Names of values, from those that are worth the most per byte to the least.
OUTPUT, PROJECTION, HIDDEN = "output", "projection", "hidden"
NAMES = {
    "full": (),
    "outputs": (OUTPUT,),
    "projections": (OUTPUT, PROJECTION),
    "dots": (OUTPUT, PROJECTION, HIDDEN),
}


def keep(x: jax.Array, name: str) -> jax.Array:
    """`x` under a name that a policy may keep; without a policy it is `x` itself."""
    return checkpoint_name(x, name)


def remat(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """`function` with what its backward pass recomputes, as `ExecConfig.remat` says."""
    if what == "none":
        return function
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(*NAMES[what])
    if what == "dots":
        policy = policies.save_from_both_policies(policy, policies.dots_with_no_batch_dims_saveable)
    return jax.checkpoint(function, policy=policy, prevent_cse=False)

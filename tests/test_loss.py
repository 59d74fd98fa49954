# SPDX-License-Identifier: Apache-2.0
"""The loss over a mesh beside the loss of whole logits on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import NamedSharding

from flexolmo_jax import loss, mesh, model
from flexolmo_jax.sharding import PARAM_RULES, batch_sharding, spec_for

B, T, D = 8, 12, 16


def by_definition(hidden, w, targets):
    """Sum over positions of the negative log-likelihood and a tenth of logsumexp squared."""
    logits = jnp.einsum("BTD,DV->BTV", hidden, w)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return jnp.sum(nll) + 0.1 * jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)))


def ours(grid, chunk, tied, hidden, w, targets):
    """The same by `loss.token_losses`."""
    config = toy.config(tied_embeddings=tied)
    run = model.Runtime("dense", loss_chunk=chunk, mesh=grid)
    shared = {"embed": {"embedding": w.T}} if tied else {"unembed": w}
    nll, z = loss.token_losses(config, run, shared, hidden, targets)
    return jnp.sum(nll) + 0.1 * jnp.sum(z)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("shape", "vocab", "chunk"),
    [
        ((8, 1, 1), 32, 3),
        ((2, 2, 2), 32, 0),
        ((2, 2, 2), 32, 5),
        ((1, 1, 8), 32, 4),
        ((2, 1, 4), 30, 12),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(shape, vocab, chunk, tied):
    """Rows, embed dimension and vocabulary over the mesh; 4 does not divide a vocabulary of 30."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((D, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (B, T)), jnp.int32)
    want = jax.value_and_grad(by_definition, argnums=(0, 1))(hidden, w, targets)
    grid = mesh.make_mesh(*shape)
    place = spec_for(("embed", "vocab"), w.shape, grid, PARAM_RULES)
    args = (
        jax.device_put(hidden, batch_sharding(grid)),
        jax.device_put(w, NamedSharding(grid, place)),
        jax.device_put(targets, batch_sharding(grid)),
    )
    function = functools.partial(ours, grid, chunk, tied)
    got = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_unembedding_is_gathered_once():
    """Not once per chunk: no collective of its size stands inside the loop over chunks."""
    grid = mesh.make_mesh(8, 1, 1)
    place = NamedSharding(grid, spec_for(("embed", "vocab"), (D, 32), grid, PARAM_RULES))
    args = (
        jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=batch_sharding(grid)),
        jax.ShapeDtypeStruct((D, 32), jnp.float32, sharding=place),
        jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=batch_sharding(grid)),
    )
    gradient = jax.jit(jax.grad(functools.partial(ours, grid, 3, False), argnums=(0, 1)))
    text = gradient.lower(*args).compile().as_text() or ""
    entry = text[text.index("ENTRY") :]
    assert text.count("all-gather(") == entry.count("all-gather(") == 1

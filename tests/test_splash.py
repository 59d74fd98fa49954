# SPDX-License-Identifier: Apache-2.0
"""The TPU attention kernel, interpreted on CPU, beside `layers.attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax import layers, mesh, splash

# B, T, N, K, H: documents and padding in every row.
CASES = {
    "one kv head for two queries, head 64": (2, 256, 4, 2, 64),
    "all heads their own, odd length": (1, 200, 4, 4, 32),
    "one kv head, tiles of three lanes": (2, 384, 2, 1, 128),
    "shorter than a tile": (1, 9, 2, 2, 16),
}


def rows(case):
    """q, k, v, gradient of the result, segments: three documents and padding at the end."""
    B, T, N, K, H = CASES[case]
    keys = jax.random.split(jax.random.key(3), 4)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    segments = np.ones((B, T), np.int32)
    segments[:, T // 3 :], segments[0, T // 2 :] = 2, 3
    segments[-1, -(T // 5) :] = 0
    return *arrays, jnp.asarray(segments)


@pytest.mark.parametrize(
    ("case", "on_mesh"), [*((case, False) for case in CASES), (next(iter(CASES)), True)]
)
def test_equals_whole_attention(case, on_mesh):
    """Forward and gradient; padding gives zeros and gets no gradient, as there."""
    *qkv, d_out, segments = rows(case)
    grid = mesh.make_mesh(2, 1, 2, devices=jax.devices()[:4]) if on_mesh else None

    def expected(q, k, v):
        return layers.attention(q, k, v, layers.causal_document_mask(segments))

    def kernel(q, k, v):
        return splash.splash(q, k, v, segments, grid, interpret=True)

    whole, whole_back = jax.vjp(expected, *qkv)
    ours, ours_back = jax.vjp(jax.jit(kernel), *qkv)
    np.testing.assert_allclose(ours, whole, atol=2e-6)
    for got, want in zip(ours_back(d_out), whole_back(d_out), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    assert not np.any(np.asarray(ours)[np.asarray(segments) == 0])


def test_tiles_divide_every_length():
    """The kernel wants tiles that divide the row; a row of odd lanes gets small ones."""
    for lanes in (1, 3, 8, 13, 32):
        blocks = splash._blocks(128 * lanes)
        at_once = blocks.block_kv_compute or 0
        assert (128 * lanes) % blocks.block_q == 0 == blocks.block_kv % at_once
    assert splash._blocks(4096).block_q == splash.QUERIES

# SPDX-License-Identifier: Apache-2.0
"""Grouped products beside one numpy product per slot, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax import grouped

CASES = {
    "rest and an empty slot": (160, 96, 130, (50, 0, 61, 7)),
    "all of one slot": (128, 64, 32, (0, 128, 0, 0)),
    "nothing at all": (40, 16, 24, (0, 0, 0, 0)),
    "two tiles of every side": (256, 1152, 1100, (100, 30, 120, 6)),
}


def numpy_products(x_RD, w_EDF, sizes, dy_RF):
    """Rows, gradient of x and gradient of w by the definition."""
    x_RD, w_EDF, dy_RF = (np.asarray(a, np.float64) for a in (x_RD, w_EDF, dy_RF))
    y, dx, dw = np.zeros(dy_RF.shape), np.zeros(x_RD.shape), np.zeros(w_EDF.shape)
    start = 0
    for slot, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows] = x_RD[rows] @ w_EDF[slot]
        dx[rows] = dy_RF[rows] @ w_EDF[slot].T
        dw[slot] = x_RD[rows].T @ dy_RF[rows]
        start += size
    return y, dx, dw


@pytest.mark.parametrize("kernel", ["ragged_dot", "megablox"])
@pytest.mark.parametrize("case", CASES)
def test_products_and_gradients(kernel, case):
    """The rows of no slot hold NaN on both ways: they give zeros and reach nothing."""
    R, D, F, sizes = CASES[case]
    keys = jax.random.split(jax.random.key(1), 3)
    w_EDF = jax.random.normal(keys[1], (len(sizes), D, F)) / D**0.5
    x_RD = jax.random.normal(keys[0], (R, D)).at[sum(sizes) :].set(jnp.nan)
    dy_RF = jax.random.normal(keys[2], (R, F)).at[sum(sizes) :].set(jnp.nan)
    sizes_E = jnp.array(sizes, jnp.int32)

    def product(x, w):
        return grouped.grouped_matmul(x, w, sizes_E, kernel=kernel, interpret=True)

    y_RF, back = jax.vjp(product, x_RD, w_EDF)
    for got, expected in zip(
        (y_RF, *back(dy_RF)), numpy_products(x_RD, w_EDF, sizes, dy_RF), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
    assert not np.any(y_RF[sum(sizes) :])

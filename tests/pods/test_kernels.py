# SPDX-License-Identifier: Apache-2.0
"""Kernels and options of a training step, as the real TPU compiler takes them."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from test_compile import asked

from flexolmo_jax import grouped, splash
from flexolmo_jax.pods import chips
from flexolmo_jax.pods import compile as compiling


@functools.cache
def place(topology):
    """One device of a topology, the same for all arrays of a program."""
    return jax.sharding.SingleDeviceSharding(compiling.devices(chips.parse(topology))[0])


def shape(topology, *dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=place(topology))


@pytest.mark.parametrize(
    ("topology", "T", "kv_heads", "width"),
    [
        ("v5p:2x2x1", 1024, 2, 128),
        ("v5e:2x2", 1024, 1, 128),
        ("v6e:2x2", 1000, 2, 128),
        ("v6e:2x2", 384, 2, 64),
    ],
)
def test_attention_never_makes_all_scores(topology, T, kv_heads, width):
    """Forward and gradient; a length of no whole lanes, grouped heads and narrow heads too."""
    q = shape(topology, 2, T, 2, width)
    kv = shape(topology, 2, T, kv_heads, width)
    segments = shape(topology, 2, T, dtype=jnp.int32)

    def total(q, k, v, segments):
        return jnp.sum(splash.splash(q, k, v, segments).astype(jnp.float32))

    text = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, kv, kv, segments).compile().as_text()
    assert len(re.findall(r"%splash_mqa\S+ = .*tpu_custom_call", text)) == 2
    T += -T % 128
    assert not re.search(rf"\[\d+,\d+,{T},{T}\]|\[\d+,{T},{T}\]", text)


@pytest.mark.parametrize("kernel", ["ragged_dot", "megablox"])
def test_every_grouped_product_is_a_kernel(kernel):
    """Forward, gradient of rows, gradient of matrices: nothing multiplies a row for every slot."""
    x, w = shape("v5e:2x2", 1024, 256), shape("v5e:2x2", 8, 256, 512)
    sizes = shape("v5e:2x2", 8, dtype=jnp.int32)

    def total(x, w, sizes):
        y = grouped.grouped_matmul(x, w, sizes, kernel=kernel)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    text = jax.jit(jax.grad(total, (0, 1))).lower(x, w, sizes).compile().as_text()
    kernels = re.findall(r"%(?!ragged-dot-metadata)\S+ = .*tpu_custom_call", text)
    assert len(kernels) == 3
    assert "convolution(" not in text


@functools.cache
def step(remat):
    """Text of an expert's step over four chips."""
    t = asked(
        *("expert.py:size=60m", "v6e:2x2"),
        **{"rows": 8, "seq_len": 512, "overrides": (f"exec.remat={remat}",)},
    )
    return t.program().lower().compile().as_text()


@pytest.mark.parametrize(("remat", "forward"), [("full", 2), ("outputs", 1)])
def test_the_attention_kernel_runs_again_only_if_asked(remat, forward):
    found = re.findall(r"%splash_mqa_(fwd|dkv)\S* = .*tpu_custom_call", step(remat))
    assert (found.count("fwd"), found.count("dkv")) == (forward, 1)


def test_weights_travel_while_products_run():
    """The options that ask for it travel with the program, not in the environment."""
    assert "async-collective-start" in step("outputs")

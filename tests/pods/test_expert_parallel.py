# SPDX-License-Identifier: Apache-2.0
"""What each strategy of expert parallelism moves, by the TPU compiler.

One mixture with its backward pass on eight v5p, of which data is 2 and expert 4; widths are small,
so that the compiler is quick.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from flexolmo_jax import model, moe, router, sharding
from flexolmo_jax.config import ExecConfig
from flexolmo_jax.pods import chips, work
from flexolmo_jax.pods import compile as compiling

D, F, E, A, ROWS, TOKENS = 512, 1024, 8, 2, 8, 512


@functools.cache
def compiled(strategy, capacity=0.0):
    """The text of the program, its temporary memory, and its traffic by mesh axis and kind."""
    topology = chips.parse("v5p:2x2x2")
    grid = compiling.grid(topology, ExecConfig(mesh_expert=4))
    rows = sharding.batch_sharding(grid)

    def matrix(name, *shape):
        spec = sharding.spec_for(model.EXPERT_AXES[name][1:], shape, grid, sharding.PARAM_RULES)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(grid, spec))

    def tokens(width, dtype):
        return jax.ShapeDtypeStruct((ROWS, TOKENS, width), dtype, sharding=rows)

    def mixture(x, logits, weights):
        routing = router.route(logits, A)
        if capacity:
            routing, _ = moe.limit(routing, capacity, moe.n_shards(grid))
        return moe.mixture(
            x,
            [jax.tree.map(lambda w: w.astype(x.dtype), weights)],
            routing,
            dispatch="ragged",
            parallel=strategy,
            capacity=capacity,
            mesh=grid,
        )

    def both_ways(x, logits, weights, dy):
        y, back = jax.vjp(mixture, x, logits, weights)
        return y, back(dy)

    weights = {
        "w_gate": matrix("w_gate", E, D, F),
        "w_up": matrix("w_up", E, D, F),
        "w_down": matrix("w_down", E, F, D),
    }
    bf16 = tokens(D, jnp.bfloat16)
    program = jax.jit(both_ways).lower(bf16, tokens(E, jnp.float32), weights, bf16).compile()
    text = program.as_text()
    moved = compiling.traffic(work.read(text), compiling.layout(topology, grid))
    return text, program.memory_analysis().temp_size_in_bytes, moved


def shapes(text, kind):
    """Dtype and shape of every collective of a kind, most frequent facts of a layout."""
    found = re.findall(rf" = (\w+)\[([0-9,]+)\]\S* {kind}\(", text)
    return sorted((dtype, tuple(map(int, dims.split(",")))) for dtype, dims in found)


def matrices(slots, embed=D):
    """w_gate, w_up and w_down as `shapes` reports them."""
    return sorted([("bf16", (slots, embed, F))] * 2 + [("bf16", (slots, F, embed))])


def test_matrices_are_gathered_once_and_their_gradients_scattered_in_half_precision():
    text, moved = compiled("fsdp")[::2]
    # Over expert, then over data; the way back the other way round.
    assert shapes(text, "all-gather") == sorted(matrices(E, D // 2) + matrices(E))
    assert shapes(text, "reduce-scatter") == sorted(matrices(E, D // 2) + matrices(E // 4, D // 2))
    assert "ragged-all-to-all" not in text and set(moved) <= {"data", "expert", "data+expert"}


def test_a_ring_gathers_tokens_and_scatters_their_sums():
    text = compiled("ring")[0]
    # The tokens of four devices, x and dy, beside the matrices of the device's own slots.
    tokens = [s for s in shapes(text, "all-gather") if s[1][-1] == D and s[1][-2] == 4 * TOKENS]
    assert [dtype for dtype, _ in tokens] == ["bf16", "bf16"]
    assert set(matrices(E // 4)) <= set(shapes(text, "all-gather"))
    assert shapes(text, "reduce-scatter").count(("bf16", (TOKENS, D))) == 2  # y and dx
    assert set(matrices(E // 4, D // 2)) <= set(shapes(text, "reduce-scatter"))


def test_all_to_all_is_one_message_each_way():
    text = compiled("all_to_all")[0]
    assert text.count(" ragged-all-to-all(") == 4  # x and y, dy and dx
    gathered = shapes(text, "all-gather")
    assert set(matrices(E // 4)) <= set(gathered)
    assert all(len(shape) == 1 for dtype, shape in gathered if dtype != "bf16")


@pytest.mark.parametrize("strategy", ["ring", "all_to_all"])
def test_a_capacity_takes_less_memory(strategy):
    assert compiled(strategy, 1.0)[1] < 0.8 * compiled(strategy)[1]

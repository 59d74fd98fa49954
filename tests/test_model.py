# SPDX-License-Identifier: Apache-2.0
"""Shapes and counts of every size without making an array, and what resolves automatically."""

import jax
import numpy as np
import pytest
import toy
from flax import nnx

from experiments import common
from flexolmo_jax import attention, model, moe, stages, tree
from flexolmo_jax.config import AdapterConfig, ExecConfig, ModelConfig
from flexolmo_jax.errors import ConfigError

SIZES = {
    **{name: ModelConfig(**fields) for name, fields in common.sizes().items()},
    **{f"stitched {n}": ModelConfig(**fields) for n, fields in common.stitched_sizes().items()},
    "toy": toy.CONFIG,
    "tied": toy.config(tied_embeddings=True),
    "no QK norm": toy.config(qk_norm="none"),
    "QK norm per head": toy.config(qk_norm="head"),
    "experts of more than FFNs": toy.config(adapters=AdapterConfig(4, 2, True)),
}
BILLION = 1e9


def counts(c):
    """Scalars of (shared weights, one expert's FFN, one expert's router rows and biases)."""
    query, key = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    attention = 2 * c.d_model * (query + key)
    norms = 2 * c.d_model + {"full": query + key, "head": 2 * c.d_head, "none": 0}[c.qk_norm]
    tables = (1 if c.tied_embeddings else 2) * c.vocab_size * c.d_model
    shared = c.n_layers * (attention + norms) + tables + c.d_model
    added = (
        c.adapters.attention * (4 * c.d_model + 2 * (query + key))
        + 2 * c.d_model * c.adapters.norms
    )
    added += c.adapters.head * (c.d_model + c.vocab_size) / c.n_layers
    ffn = 3 * c.d_model * c.d_ffn
    return shared, c.n_layers * (ffn + added), c.n_layers * (c.d_model + 1)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_count_is_the_closed_form(size):
    c = SIZES[size]
    abstract = model.abstract_params(c)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    shared, ffn, row = counts(c)
    assert tree.count(abstract["shared"]) == shared
    assert tree.count(abstract["experts"]) == c.n_slots * (ffn + row)


@pytest.mark.parametrize("size", SIZES)
def test_every_leaf_is_float32_and_names_its_axes(size):
    c = SIZES[size]
    leaves, axes = tree.flatten(model.abstract_params(c)), tree.flatten(model.param_axes(c))
    assert leaves.keys() == axes.keys()
    for name, leaf in leaves.items():
        assert leaf.dtype == np.float32 and len(axes[name]) == leaf.ndim, name
        assert ("expert" in axes[name]) == name.startswith("experts/"), name


def test_counts_of_the_paper():
    """Its 7B block: 2.970B beside the FFN, 4.329B an expert; router rows are not in its numbers."""
    c = SIZES["7b"]
    shared, ffn, row = counts(c)
    assert round(shared / BILLION, 3) == 2.970 and round(ffn / BILLION, 3) == 4.329
    assert round((shared + ffn) / BILLION, 3) == 7.299
    for slots, total in ((2, 11.63), (3, 15.96), (4, 20.28), (7, 33.27), (8, 37.60)):
        found = tree.count(model.abstract_params(c.replace(n_slots=slots)))
        assert abs((found - slots * row) / BILLION - total) < 0.01
        # Rows and biases are 0.003 % of an expert: they move no figure of the paper.
        assert found == shared + slots * (ffn + row) and row < 4e-5 * ffn
    active = SIZES["stitched 8x7b"]
    assert active.n_active == 4 and active.n_slots == 8
    assert abs((shared + active.n_active * ffn) / BILLION - 20.28) < 0.01


def test_expert_slice_is_what_its_owner_ships():
    c = SIZES["stitched 8x7b"]
    group = model.abstract_params(c)["experts"]
    assert group["w_gate"].shape == (32, 8, 4096, 11_008)
    assert group["w_down"].shape == (32, 8, 11_008, 4096)
    assert group["router"].shape == (32, 8, 4096) and group["bias"].shape == (32, 8)


def test_flops_per_token_by_hand():
    c = toy.config(d_ffn=32)
    # 2 layers of 3 x 16 x 32; of 16 x (32 + 16 + 16 + 32); 16 x 96.
    ffn, attention, unembed = 3072, 3072, 1536
    # A token of 32 sees 16 on average: 4 heads of 8, scores and sums, 2 FLOPs each, 2 layers.
    score = 2 * 2 * 2 * 16 * 4 * 8
    anchor = 6 * (ffn + attention + unembed) + 3 * score
    assert stages.flops_per_token(c, "anchor", 32) == anchor == 58_368
    # Both FFNs forward and through their inputs, weight gradients of the owner's alone.
    expert = 4 * (2 * ffn + attention + unembed) + 2 * ffn + 3 * score
    assert stages.flops_per_token(c, "expert", 32) == expert == 61_440


def test_flops_of_an_anchor_are_those_that_xla_counts():
    """Forward only: every matmul of the declared model, its attention and its unembedding.

    XLA counts the full attention square and the elementwise work, 2 % here.
    """
    c = toy.config(n_slots=1, n_active=1, n_layers=1, d_model=64, d_ffn=256, vocab_size=512)
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)

    def logits(params, tokens_BT):
        run = model.Runtime("dense")
        out = model.forward(c, run, params["shared"], (params["experts"],), tokens_BT)
        return model.unembed(c, params["shared"], out.hidden_BTD)

    counted = jax.jit(logits).lower(model.abstract_params(c), tokens).cost_analysis()["flops"]
    assert stages.flops_per_token(c, "anchor", 8) / 3 * 8 == pytest.approx(counted, rel=0.05)


def test_calling_the_declared_model_equals_forward():
    """Mutation: keyword arguments not passed on."""
    c, batch, params = toy.CONFIG, toy.batch(), toy.params()
    allowed = np.array([[1, 1, 0, 1]] * 4, bool)
    arguments = {"segments_BT": batch["segments"], "allowed_BE": allowed, "n_active": 3}
    graph, state = nnx.split(nnx.eval_shape(lambda: model.FlexOlmo(c, rngs=nnx.Rngs(0))))

    @jax.jit
    def both(params):
        nnx.replace_by_pure_dict(state, params)
        declared = nnx.merge(graph, state)
        run, groups = model.Runtime("dense"), (params["experts"],)
        out = model.forward(c, run, params["shared"], groups, batch["tokens"], **arguments)
        want = model.unembed(c, params["shared"], out.hidden_BTD)
        return declared(batch["tokens"], **arguments), want

    got, want = both(params)
    assert got.shape == (4, 32, 96) and got.dtype == np.float32 and np.std(got) > 0
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("asked", "slots", "active", "platform", "expected"),
    [
        ("auto", 2, 2, "cpu", "dense"),
        ("auto", 8, 4, "cpu", "blocked"),
        ("auto", 8, 4, "tpu", "ragged"),
        ("auto", 1, 1, "tpu", "dense"),
        ("dense", 8, 4, "tpu", "dense"),
        ("blocked", 8, 4, "tpu", "blocked"),
        ("ragged", 8, 4, "tpu", "ragged"),
    ],
)
def test_the_dispatch_that_a_platform_gets(asked, slots, active, platform, expected):
    assert moe.resolve(asked, slots, active, platform) == expected


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_ragged_is_refused_where_it_lets_a_denied_slot_through(platform):
    """Mutation: no such check."""
    with pytest.raises(ConfigError, match="blocked"):
        moe.resolve("ragged", 8, 4, platform)
    assert moe.resolve("auto", 8, 4, platform) != "ragged"


def test_a_runtime_resolves_for_the_platform_of_its_mesh():
    run = model.Runtime.resolve(ExecConfig(loss_chunk=7, remat="dots"), 4, 2)
    assert run.dispatch == moe.resolve("auto", 4, 2, jax.default_backend())
    assert (run.loss_chunk, run.remat, run.mesh) == (7, "dots", None)


def test_forms_for_a_cpu_are_chosen_by_name():
    """One CPU device gets the CPU's forms, others those of wide memory; a name is kept."""
    run = model.Runtime.resolve(ExecConfig(), 4, 2)
    on_cpu = jax.default_backend() == "cpu"
    assert run.attention == ("tiled" if on_cpu else "whole")
    assert run.decode == ("auto" if on_cpu else "stacked")
    assert attention.resolve("auto", "tpu") == "splash"
    assert attention.resolve("auto", "gpu") == "whole"
    assert attention.resolve("whole", "cpu") == "whole"
    kept = model.Runtime.resolve(ExecConfig(attention="whole", decode="stacked"), 4, 2)
    assert (kept.attention, kept.decode) == ("whole", "stacked")

# SPDX-License-Identifier: Apache-2.0
"""Stages of many experts, and the programs of every stage with abstract arguments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from flexolmo_jax import (
    adapters,
    evidence,
    mesh,
    model,
    moe,
    optim,
    programs,
    router,
    stages,
    step,
    tree,
)
from flexolmo_jax.config import (
    AdapterConfig,
    DataConfig,
    ExecConfig,
    OptimConfig,
    RouterConfig,
    RunConfig,
)
from flexolmo_jax.errors import ConfigError

KEY = jax.random.key(0)
OPTIM = OptimConfig(peak_lr=3e-3, total_steps=8, warmup_steps=2, load_balance=0.01)
CONFIGS = {
    "anchor": toy.config(
        n_slots=1,
        n_active=1,
        router=RouterConfig("document", evidence=4.0, evidence_parts=2),
    ),
    "expert": toy.config(
        n_slots=1,
        n_active=1,
        adapters=AdapterConfig(2, 2, True),
        router=RouterConfig("document", evidence=4.0, evidence_parts=2),
    ),
    "rows": toy.config(n_slots=1, n_active=1),
    "router": toy.CONFIG,
    "joint": toy.CONFIG,
}


def job(stage, **changes):
    """A configuration of a stage that needs no file."""
    own = {"model": CONFIGS[stage], "tokenizer": "t"}
    fields = own if stage in ("anchor", "joint") else {"anchor": "a", "expert_id": "code"}
    fields |= {"expert": "e"} if stage == "rows" else {}
    fields |= {
        "stage": stage,
        "data": DataConfig(batch_rows=8, seq_len=32),
        "optim": OPTIM,
        "exec": ExecConfig(compute_dtype="float32"),
    }
    return RunConfig(**{**fields, **changes})


@pytest.mark.parametrize("stage", ["anchor", "router", "joint"])
def test_join_is_the_inverse_of_split(stage):
    params = toy.params(CONFIGS[stage])
    trainable, frozen = stages.split(stage, params)
    together = {**tree.flatten(trainable), **tree.flatten(frozen)}
    assert len(together) == len(tree.flatten(trainable)) + len(tree.flatten(frozen))
    assert tree.digests(stages.join(trainable, frozen)) == tree.digests(params)


def steps(stage, params, times=3, filled=None):
    """State and metrics after some steps, and what the state began with."""
    trainable, frozen = stages.split(stage, params)
    if filled is not None:
        frozen["filled"] = jnp.asarray(filled)
    tx = optim.make_optimizer(OPTIM, trainable)
    run = jax.jit(
        functools.partial(step.train_step, CONFIGS[stage], model.Runtime("dense"), stage, OPTIM, tx)
    )
    state = {"params": trainable, "opt": tx.init(trainable), "step": jnp.int32(0)}
    losses = []
    for _ in range(times):
        state, metrics = run(state, frozen, toy.batch())
        losses.append(float(metrics["loss"]))
    return tree.flatten(state["params"]), tree.flatten(trainable), losses


def test_router_tuning_moves_rows_and_biases_and_nothing_else():
    params = toy.params()
    params["experts"]["bias"] = params["experts"]["bias"].at[:, 0].set(model.NO_BIAS)
    after, before, losses = steps("router", params)
    assert set(after) == {"experts/router", "experts/bias"}
    moved = {name: np.any(after[name] != before[name], axis=0) for name in after}
    assert moved["experts/router"].any(axis=-1).all()
    # The public bias has an effective value of exactly 0, and no gradient that could move it.
    assert moved["experts/bias"].tolist() == [False, True, True, True]
    assert losses[-1] < losses[0]


# Broken once by leaving `filled` out of the step: the loss is then not finite.
def test_an_empty_slot_takes_no_part_in_router_tuning():
    params = toy.params()
    held = {n: leaf.at[:, 2].set(jnp.nan) for n, leaf in params["experts"].items()}
    filled = [True, True, False, True]
    after, before, losses = steps("router", {**params, "experts": held}, filled=filled)
    zeros = {n: leaf.at[:, 2].set(0.0) for n, leaf in params["experts"].items()}
    want, _, want_losses = steps("router", {**params, "experts": zeros}, filled=filled)
    assert losses == want_losses and np.isfinite(losses).all()
    rest = [0, 1, 3]
    for name in after:
        assert np.array_equal(after[name][:, rest], want[name][:, rest])
        assert np.any(after[name][:, 1] != before[name][:, 1])


# Broken once each: logits of all slots, E of all slots.
def test_sums_over_a_batch_know_nothing_of_an_empty_slot():
    params, c = toy.params(), toy.config(n_slots=3)
    rest = np.array([0, 1, 3])
    fewer = {name: leaf[:, rest] for name, leaf in params["experts"].items()}

    def sums(c, experts, **filled):
        trainable, frozen = stages.split("router", {**params, "experts": experts})
        run = model.Runtime("dense")
        return step.loss_sums(c, run, "router", trainable, frozen | filled, toy.batch())

    want = sums(c, fewer)
    got = sums(toy.CONFIG, params["experts"], filled=jnp.array([True, True, False, True]))
    assert {"router_z", "load_balance"} <= set(want) == set(got)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_joint_training_moves_everything_but_the_biases():
    after, before, losses = steps("joint", toy.params())
    assert "experts/bias" not in after
    assert all(np.any(after[name] != before[name]) for name in after)
    assert losses[-1] < losses[0]


def test_load_balance_is_one_when_even_and_the_number_of_slots_when_not():
    mask = jnp.ones((2, 8), bool).at[1, 4:].set(False)
    even = jnp.eye(4, dtype=bool)[jnp.arange(8) % 4][None, None].repeat(2, axis=1)
    flat = jnp.zeros((1, 2, 8, 4))
    assert router.load_balance(flat, even, mask, 4) == pytest.approx(1.0)
    one = jnp.zeros((1, 2, 8, 4), bool).at[..., 2].set(True)
    sure = jnp.where(one, 30.0, -30.0)
    assert router.load_balance(sure, one, mask, 4) == pytest.approx(4.0)
    # Padding counts for nothing.
    noise = jnp.where(mask[None, ..., None], sure, 99.0 * (1 - one))
    assert router.load_balance(noise, one | ~mask[None, ..., None], mask, 4) == pytest.approx(4.0)


@pytest.mark.parametrize("stage", stages.STAGES)
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_the_program_of_a_stage_is_what_a_job_runs(stage, shape):
    """Abstract arguments describe real ones: the compiled program takes them as they are."""
    grid = mesh.make_mesh(*shape)
    program = programs.training(job(stage), CONFIGS[stage], grid)
    compiled = program.lower().compile()

    def zeros(x):
        return jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)

    values = [jax.tree.map(zeros, argument) for argument in program.arguments.values()]
    state, metrics = compiled(*values)
    assert int(state["step"]) == 1 and int(metrics["tokens"]) == 1  # of an empty batch
    for got, want in zip(
        jax.tree.leaves(state), jax.tree.leaves(program.arguments["state"]), strict=True
    ):
        assert got.shape == want.shape and got.dtype == want.dtype
    trained = tree.flatten(program.arguments["state"]["params"])
    assert all(leaf.dtype == jnp.float32 for leaf in trained.values())


def test_frozen_leaves_have_the_dtype_they_are_used_in():
    c = dataclasses.replace(job("expert"), exec=ExecConfig(compute_dtype="bfloat16"))
    frozen = programs.training(c, CONFIGS["expert"], mesh.make_mesh()).arguments["frozen"]
    for name, leaf in tree.flatten(frozen).items():
        last = name.split("/")[-1]
        matmul = last in (*moe.WEIGHTS, *adapters.MATRICES, "unembed", "embedding")
        matmul |= last in ("w_q", "w_k", "w_v", "w_o")
        assert leaf.dtype == (jnp.bfloat16 if matmul else jnp.float32), name


@pytest.mark.parametrize("make", [programs.evaluation, programs.prefill, programs.decode])
def test_programs_of_a_finished_model_compile_on_a_mesh(make):
    grid = mesh.make_mesh(2, 2, 2)
    c = toy.config(router=RouterConfig("document", evidence=4.0, evidence_parts=2))
    program = make(c, ExecConfig(compute_dtype="float32"), grid, rows=8, seq_len=32)
    assert program.lower().compile().memory_analysis() is not None
    assert program.tokens == (8 if program.stage == "decode" else 8 * 32)
    assert program.model_flops == program.tokens * stages.flops_per_token(c, "eval", 32)


def test_rows_that_do_not_divide_are_refused():
    grid = mesh.make_mesh()
    with pytest.raises(ConfigError, match="multiple of data x expert x accumulate = 8"):
        programs.training(job("joint", data=DataConfig(batch_rows=12)), toy.CONFIG, grid)
    with pytest.raises(ConfigError, match="divide"):
        programs.evaluation(toy.CONFIG, ExecConfig(), grid, rows=3, seq_len=32)


def test_what_each_stage_costs_per_token():
    """By hand: two experts, attention and the unembedding, and the scores of 32 tokens."""
    c = toy.config(n_active=2)
    ffn, attention, unembed = 3 * 2 * 16 * 24, 2 * (2 * 16 * 32 + 2 * 16 * 16), 16 * 96
    score = 2 * 2 * 32 * 32
    used = 2 * ffn + attention + unembed
    assert stages.flops_per_token(c, "joint", 32) == 6 * used + 3 * score
    assert stages.flops_per_token(c, "router", 32) == 4 * used + 3 * score
    assert stages.flops_per_token(c, "eval", 32) == 2 * used + score
    # Two of two experts of rank 2, of which one adds to attention, and is trained.
    c = toy.config(n_slots=1, n_active=1, adapters=AdapterConfig(attention=2))
    added = 2 * 2 * (3 * 16 + 32 + 16 + 16 + 32 + 16)
    used = 2 * ffn + attention + unembed + added
    assert stages.flops_per_token(c, "rows", 32) == 4 * used + 3 * score
    assert stages.flops_per_token(c, "expert", 32) == 4 * used + 2 * (ffn + added) + 3 * score


def test_rows_of_a_finished_expert_train_and_nothing_else():
    params = toy.params(CONFIGS["rows"])
    trainable, frozen = stages.split("rows", params)
    assert set(tree.flatten(trainable)) == {"expert/router", "expert/bias"}
    whole = stages.own_expert(trainable, frozen)
    assert tree.digests(whole) == tree.digests(params["experts"])
    shared, groups = stages.assemble("rows", trainable, frozen)
    assert shared is params["shared"] and groups[0] is params["experts"]
    after, before, _ = steps("rows", params)
    assert all(np.any(after[name] != before[name]) for name in after)


def test_an_expert_starts_from_the_anchor_and_adds_nothing_yet():
    """What it adds is zero, and has a gradient."""
    c = CONFIGS["expert"]
    params = toy.params(c)
    public = params["experts"] | {n: jnp.zeros_like(params["experts"][n]) for n in adapters.LEAVES}
    expert = stages.upcycle({"experts": public}, jnp.zeros((c.n_layers, c.d_model)), 0.0, KEY)
    assert all(np.any(expert[n]) == (n[-2:] == "_a") for n in adapters.MATRICES)
    again = stages.upcycle({"experts": public}, jnp.zeros((c.n_layers, c.d_model)), 0.0, KEY)
    assert tree.digests(again) == tree.digests(expert)
    trainable = {"expert": expert}
    frozen = stages.split("expert", {**params, "experts": public})[1]
    assert set(frozen["expert"]) == {evidence.LEAF}
    grads, _ = step.gradients(
        stages.stage_model("expert", c),
        model.Runtime("dense"),
        "expert",
        OPTIM,
        trainable,
        frozen,
        toy.batch(),
    )
    moved = [
        [bool(np.any(layer)) for layer in np.asarray(leaf)]
        for name, leaf in grads["expert"].items()
        if name.endswith("_b")
    ]
    # Nothing is added below the first mixture.
    assert sorted(moved) == [[False, True]] * 4 + [[True]]

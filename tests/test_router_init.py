# SPDX-License-Identifier: Apache-2.0
"""Router rows from hidden states: log density ratios that compose across owners who never met."""

import numpy as np
import pytest
import toy

from flexolmo_jax.config import DataConfig, RouterInitConfig, RunConfig, SourceConfig
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.experts import router_init

RNG = np.random.default_rng(0)
D = 8
MIX = RNG.normal(size=(D, D))
MEANS = {name: 2.0 * RNG.normal(size=D) for name in ("public", "a", "b", "c")}


def inputs(name, n=4000):
    """Gaussian inputs with one covariance and a large constant part, as hidden states have."""
    rng = np.random.default_rng([ord(c) for c in name])
    return np.append(MEANS[name] + rng.normal(size=(n, D)) @ MIX, np.full((n, 1), 30.0), axis=1)


def log_ratio(x, name):
    """log N(x; own mean) - log N(x; public mean), in closed form."""
    inverse = np.linalg.inv(MIX.T @ MIX)
    distance = [
        np.einsum("nd,de,ne->n", d, inverse, d) for d in (x - MEANS["public"], x - MEANS[name])
    ]
    return (distance[0] - distance[1]) / 2


# Broken once by leaving out the intercept, and by taking the owner's covariance: both failed.
def test_the_logit_is_the_log_density_ratio(monkeypatch):
    monkeypatch.setattr(router_init, "SHRINKAGE", 1e-6)
    for name in ("a", "b", "c"):
        row = router_init.discriminant(inputs(name), inputs("public"))
        for text in ("public", "a", "b", "c"):
            x = inputs(text, 200)
            want = log_ratio(x[:, :D], name)
            np.testing.assert_allclose(x @ row, want, atol=0.1 * np.abs(want).mean() + 1.0)


# Broken once by swapping the two sides of the difference, and by leaving out the intercept.
def test_rows_made_alone_find_the_owner_together():
    rows = [router_init.discriminant(inputs(n), inputs("public")) for n in ("a", "b", "c")]
    logits = {
        text: np.stack([np.zeros(500), *(inputs(text, 500) @ row for row in rows)])
        for text in ("public", "a", "b", "c")
    }
    for slot, text in enumerate(("public", "a", "b", "c")):
        assert (logits[text].argmax(0) == slot).mean() > 0.9, text


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return toy.texts(tmp_path_factory.mktemp("texts"))


def run_config(texts, **changes):
    sources = (SourceConfig(str(texts.own)), SourceConfig(str(texts.public), public=True))
    fields = {
        "stage": "expert",
        "anchor": "anchor",
        "expert_id": "own",
        "data": DataConfig(sources=sources, seq_len=16),
        "router_init": RouterInitConfig(method="discriminant", documents=16),
    }
    return RunConfig(**{**fields, **changes})


# Broken once by leaving out the margin.
def test_recalibration_moves_rows_and_lowers_biases_by_the_margin(texts):
    c = toy.config(vocab_size=texts.vocab_size, n_slots=2, n_active=2)
    params = toy.params(c)
    halves = [{n: x[:, i : i + 1] for n, x in params["experts"].items()} for i in range(2)]
    made = router_init.recalibrate(run_config(texts), c, params["shared"], *halves)
    for name in ("w_gate", "w_up", "w_down"):
        assert made[name] is halves[1][name]
    assert (made["router"] != np.asarray(halves[1]["router"])).any()
    lower = np.logaddexp(0, made["bias"]) - np.logaddexp(0, np.asarray(halves[1]["bias"]))
    np.testing.assert_allclose(lower, router_init.MARGIN, rtol=1e-5)


def test_hidden_states_need_both_texts(texts):
    c = toy.config(vocab_size=texts.vocab_size, n_slots=1, n_active=1)
    params = toy.params(c)
    for sources in (
        (SourceConfig(str(texts.own)),),
        (SourceConfig(str(texts.public), public=True),),
    ):
        config = run_config(texts, data=DataConfig(sources=sources, seq_len=16))
        with pytest.raises(ConfigError, match="text of the owner with public text"):
            router_init.expert_row(config, c, params)

# SPDX-License-Identifier: Apache-2.0
"""Settings that no run can have are refused by name, before any work."""

import pytest
import toy

from flexolmo_jax.config import OptimConfig, RunConfig
from flexolmo_jax.errors import ConfigError


# Broken once each by leaving its check out: a bare error of another library, or an untrained model.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 8}, "leaves no step for the cosine.*warmup_steps=8, total_steps=8"),
        ({"warmup_steps": 9}, "leaves no step for the cosine"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"stop_step": -5}, "stop_step must not be negative"),
        ({"total_steps": 0}, "total_steps must be positive"),
    ],
)
def test_steps_of_the_optimizer(changes, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        OptimConfig(**{"total_steps": 8, "warmup_steps": 2, **changes})
    assert OptimConfig(total_steps=8, warmup_steps=7).last_step == 8
    assert OptimConfig(total_steps=1, warmup_steps=0).last_step == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_every": 0}, "log_every must be positive"),
        ({"log_every": -1}, "log_every must be positive"),
        ({"eval_every": -1}, "eval_every must not be negative"),
        ({"eval_rows": -1}, "eval_rows must not be negative"),
    ],
)
def test_steps_between_records(changes, message):
    fields = {"model": toy.config(n_slots=1, n_active=1), "tokenizer": "t"}
    with pytest.raises(ConfigError, match=message):
        RunConfig(**fields, **changes)
    assert RunConfig(**fields, eval_every=0, eval_rows=0, log_every=1).eval_every == 0

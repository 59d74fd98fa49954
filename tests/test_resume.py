# SPDX-License-Identifier: Apache-2.0
"""What a run that goes on is compared with: its settings, and what it started from."""

import dataclasses
import json
import types

import pytest

from flexolmo_jax import run_checkpoints, train
from flexolmo_jax.config import ExecConfig, RunConfig
from flexolmo_jax.errors import CheckpointError, ConfigError

STARTED_FROM = {"anchor_digest": "a", "model_digest": "m", "rows_of": "s"}


def go_on(meta):
    """The state that a run goes on with, whose checkpoint says this."""
    started = types.SimpleNamespace(anchor_digest="a", model_digest="m", is_anchor=False)
    j = types.SimpleNamespace(anchor=started, rows_of="s", abstract_state=None)
    restored = run_checkpoints.Restored(3, "state", {"iterator": {}, **meta})
    saved = types.SimpleNamespace(restore_latest=lambda _: restored, directory="w")
    return train._restore(j, saved, types.SimpleNamespace(set_state=lambda _: None))


# Broken once by a look at the anchor alone.
@pytest.mark.parametrize(("key", "what"), train.STARTS.items())
def test_a_checkpoint_is_of_what_the_run_starts_from(key, what):
    with pytest.raises(CheckpointError, match=f"another {what}"):
        go_on({**STARTED_FROM, key: "other"})
    assert go_on(STARTED_FROM) == "state"
    assert go_on({"anchor_digest": "a"}) == "state"  # as it was written before


# Broken once by comparing how the folder of the expert was spelt.
def test_a_path_is_compared_by_what_it_leads_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = {"stage": "rows", "expert_id": "own"}
    near = RunConfig(**fields, anchor="anchor", expert="slices/../slices/own", tokenizer="t")
    place = types.SimpleNamespace(path=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(near)))
    far = {name: str(tmp_path / name) for name in ("anchor", "slices/own", "t")}
    config = RunConfig(**fields, anchor=far["anchor"], expert=far["slices/own"], tokenizer=far["t"])
    train._refuse_other(place, config)
    with pytest.raises(ConfigError, match="expert was"):
        train._refuse_other(place, dataclasses.replace(config, expert="slices/other"))


# Broken once by leaving all of `exec` free.
def test_a_capacity_is_not_changed_on_the_way(tmp_path):
    config = RunConfig(stage="router", anchor="a", exec=ExecConfig(capacity=1.5))
    place = types.SimpleNamespace(path=tmp_path)

    def started(**changes):
        text = json.dumps({**dataclasses.asdict(config), **changes})
        (tmp_path / "config.json").write_text(text)

    started()
    train._refuse_other(place, config)
    with pytest.raises(ConfigError, match=r"capacity was 1\.5, is 0\.0"):
        train._refuse_other(place, dataclasses.replace(config, exec=ExecConfig()))
    started(exec={"compute_dtype": "bfloat16"})  # as it was written before there was one
    train._refuse_other(place, dataclasses.replace(config, exec=ExecConfig()))
    with pytest.raises(ConfigError, match=r"capacity was 0\.0, is 1\.5"):
        train._refuse_other(place, config)

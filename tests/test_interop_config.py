# SPDX-License-Identifier: Apache-2.0
"""What a config.json, or our own key in it, may not say."""

import json
import os

import numpy as np
import pytest
from interop_helpers import (
    make_model,
    problems,
    settings,
    stranger,
)
from safetensors.numpy import save_file

from flexolmo_jax.errors import RefusedError
from flexolmo_jax.interop import hf_export, hf_import
from flexolmo_jax.interop import safetensors_files as st


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Dozens of small files per test; that they reach the disk is not what is tested here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_a_kept_bias_that_counts_is_refused(tmp_path):
    """Other programs load the model without it, so it would be another model here."""
    info = make_model(tmp_path, settings("FlexOlmoForCausalLM"), bias=-200.0)
    hf_export.execute(hf_export.plan(info.path), tmp_path / "hf")
    file = tmp_path / "hf/flexolmo/kept.safetensors"
    kept = {name: st.read(entry) for name, entry in st.read_file(file).items()}
    changes = {
        "bias": {"experts/code/bias": np.full(2, -3, np.float32)},
        "tensor-extra": {"experts/other/bias": np.full(2, -300, np.float32)},
    }
    for code, change in changes.items():
        save_file({**kept, **change}, file)
        found = problems(hf_import.import_hf, tmp_path / "hf", tmp_path / "x")
        assert found == {(code, next(iter(change)))}
    save_file({**kept, "experts/public/bias": np.full(2, -3, np.float32)}, file)
    hf_import.import_hf(tmp_path / "hf", tmp_path / "m")  # slot 0 has none, whatever is stored


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own.update(schema=2),
        lambda own: own.update(experts=own["experts"][:2]),
        lambda own: own.update(experts={}),
        lambda own: own["experts"][1].pop("recipe"),
        lambda own: own["experts"][1].update(id=3),
        lambda own: own["experts"][1].update(id="../x"),
        lambda own: own["experts"][1].update(id="public"),
        lambda own: own["experts"][1].update(training={"steps": -1, "tokens": 1, "seed": 1}),
        lambda own: own.update(training=[]),
        lambda own: own.pop("training"),
        lambda own: own["training"].update(note=json.loads('{"a":' * 700 + "1" + "}" * 700)),
        lambda own: own["training"].update(note=[1] * (3 << 20)),
    ],
)
def test_our_own_key_is_judged_like_any_input(tmp_path, change):
    info = make_model(tmp_path, settings("FlexOlmoForCausalLM"))
    hf_export.execute(hf_export.plan(info.path), tmp_path / "hf")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    change(raw["flexolmo"])
    (tmp_path / "hf/config.json").write_text(json.dumps(raw))
    with pytest.raises(RefusedError):
        hf_import.import_hf(tmp_path / "hf", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(num_attention_heads=0),
        lambda raw: raw["rope_parameters"].update(
            rope_theta=raw.update(rope_theta=10**400) or 10**400
        ),
        lambda raw: raw.update(layer_types=5),
        lambda raw: raw.update(rope_scaling="linear"),
        lambda raw: raw.update(
            architectures=["MistralForCausalLM"], sliding_window=4, use_sliding_window=False
        ),
        lambda raw: raw.update(note=float("nan")),
        lambda raw: raw.update(note="\ud800"),
        lambda raw: raw.update(flexolmo={"schema": 1, "experts": [{}]}),
    ],
)
def test_a_config_that_makes_no_model_is_refused(tmp_path, change):
    stranger(tmp_path / "hf", "LlamaForCausalLM")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    change(raw)
    (tmp_path / "hf/config.json").write_text(json.dumps(raw))
    with pytest.raises(RefusedError):
        hf_import.import_hf(tmp_path / "hf", tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_sizes_beyond_the_file_are_refused_before_names_are_listed(tmp_path):
    for i, sizes in enumerate(
        (
            {"num_hidden_layers": 1 << 40},
            {"num_experts": 1 << 40},
            {"num_hidden_layers": 20, "num_experts": 20},  # Each is less than there are tensors.
        )
    ):
        folder = tmp_path / str(i)
        stranger(folder)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, **sizes}))
        found = problems(hf_import.import_hf, folder, tmp_path / "x")
        assert found == {("tensor-missing", "")}

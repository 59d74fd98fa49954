# SPDX-License-Identifier: Apache-2.0
import errno
import gc
import json
import os
import types

import jax.numpy as jnp
import numpy as np
import pytest
from expert_helpers import file_bytes, leaf_equal, peak_memory
from interop_helpers import (
    DENSE,
    MIXTURES,
    make_anchor,
    make_model,
    problems,
    settings,
    stranger,
    tokenizer_file,
)

from flexolmo_jax import files, model
from flexolmo_jax import tree as trees
from flexolmo_jax.cli import main
from flexolmo_jax.data import tokenize
from flexolmo_jax.errors import ConfigError, DataError, MachineError, Problem, RefusedError
from flexolmo_jax.experts import leafio, model_dir, model_info, verify
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.interop import assemble, hf_config, hf_export, hf_import, hf_names
from flexolmo_jax.interop import safetensors_files as st

FLEX = MIXTURES["FlexOlmoForCausalLM"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Dozens of small files per test; that they reach the disk is not what is tested here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def loaded(path):
    return trees.flatten(model_dir.load_model(path)[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*MIXTURES, *DENSE])
def test_an_exported_model_comes_back_bit_for_bit(tmp_path, kind, dtype):
    """Weights, names, manifests and digests; the slots' folders byte for byte."""
    c = settings(kind, tied_embeddings=dtype == "bfloat16")
    if kind in MIXTURES:
        info = make_model(tmp_path, c, dtype=dtype, bias=-200.0)
    else:
        info = make_anchor(tmp_path / "model", c, dtype=dtype, router=0.5, bias=-1.0)
    hf_export.execute(hf_export.plan(info.path, shard_size="20KB"), tmp_path / "hf")
    result = hf_import.import_hf(tmp_path / "hf", tmp_path / "back")
    assert result["restored"] is True and result["dtypes"] == [dtype]
    back = model_info.read_info(tmp_path / "back")
    for name in ("config", "slots", "manifest_digests", "model_digest", "training"):
        assert getattr(back, name) == getattr(info, name)
    for folder in ("shared", "experts"):
        assert file_bytes(back.path / folder) == file_bytes(info.path / folder)
    assert verify.verify(back.path) == []


def test_what_was_changed_after_the_export_is_not_called_the_same(tmp_path):
    info = make_model(tmp_path, settings("FlexOlmoForCausalLM"))
    hf_export.execute(hf_export.plan(info.path), tmp_path / "hf")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    raw["num_experts_per_tok"] = 3
    (tmp_path / "hf/config.json").write_text(json.dumps(raw))
    assert hf_import.import_hf(tmp_path / "hf", tmp_path / "back")["restored"] is False


def test_a_subset_comes_back_under_its_names(tmp_path):
    info = make_model(tmp_path, settings("FlexOlmoForCausalLM"))
    hf_export.execute(hf_export.plan(info.path, deny=["math"]), tmp_path / "hf")
    result = hf_import.import_hf(tmp_path / "hf", tmp_path / "back")
    assert result["restored"] is None and result["experts"] == ["public", "code", "news"]
    back = model_info.read_info(tmp_path / "back")
    assert back.anchor_digest == info.anchor_digest
    assert {e: back.manifest_digests[e] for e in back.slots} == {
        e: d for e, d in info.manifest_digests.items() if e != "math"
    }


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", [*MIXTURES, *DENSE])
def test_files_of_others_become_our_leaves(tmp_path, kind, parts):
    params = stranger(tmp_path / "hf", kind, parts=parts)
    result = hf_import.import_hf(tmp_path / "hf", tmp_path / "m")
    expected = {**params, "experts/bias": np.full_like(params["experts/bias"], model.NO_BIAS)}
    if kind in DENSE:
        expected["experts/router"] = np.zeros_like(params["experts/router"])
    assert leaf_equal(trees.unflatten(expected), trees.unflatten(loaded(tmp_path / "m")))
    names = ["public", "expert1", "expert2"] if kind in MIXTURES else ["public"]
    assert result["experts"] == names and result["restored"] is None
    assert verify.verify(tmp_path / "m") == []
    facts = model_info.read_info(tmp_path / "m").training["imported"]
    assert (facts["format"], facts["architecture"]) == ("hf", kind)


@pytest.mark.parametrize("block", [64, 1 << 12, leafio.BLOCK])
def test_blocks_of_any_size_give_what_whole_tensors_give(tmp_path, monkeypatch, block):
    monkeypatch.setattr(leafio, "BLOCK", block)
    monkeypatch.setattr(assemble, "STRIP_BYTES", block)
    stranger(tmp_path / "hf", vocab_size=301)
    found, entries = hf_config.read(tmp_path / "hf"), st.read_folder(tmp_path / "hf")
    state = {name: st.read(entry) for name, entry in entries.items()}
    whole = hf_names.params_from(found.architecture, found.config, state)
    hf_import.import_hf(tmp_path / "hf", tmp_path / "m")
    assert leaf_equal(whole, trees.unflatten(loaded(tmp_path / "m")))


def test_every_value_is_read_once(tmp_path, monkeypatch):
    stranger(tmp_path / "hf", parts=2)
    seen, read = [], st.read_rows

    def spy(entry, start, stop):
        seen.extend((entry.name, row) for row in range(start, stop))
        return read(entry, start, stop)

    monkeypatch.setattr(st, "read_rows", spy)
    hf_import.import_hf(tmp_path / "hf", tmp_path / "m")
    entries = st.read_folder(tmp_path / "hf")
    assert sorted(seen) == sorted((n, row) for n, e in entries.items() for row in range(e.shape[0]))


def test_dtypes(tmp_path):
    def half(state):
        for name in state:
            state[name] = state[name].astype(np.float16)

    params = stranger(tmp_path / "f16", "LlamaForCausalLM", change=half)
    hf_import.import_hf(tmp_path / "f16", tmp_path / "m")
    for name, leaf in loaded(tmp_path / "m").items():
        assert leaf.dtype == np.float32
        if not name.startswith(("experts/bias", "experts/router")):
            assert np.array_equal(leaf, params[name].astype(np.float16).astype(np.float32))
    params = stranger(tmp_path / "f32", "LlamaForCausalLM")
    hf_import.import_hf(tmp_path / "f32", tmp_path / "b", dtype="bfloat16")
    for name, leaf in loaded(tmp_path / "b").items():
        assert leaf.dtype == jnp.bfloat16
        if not name.startswith(("experts/bias", "experts/router")):
            assert np.array_equal(leaf, params[name].astype(jnp.bfloat16))
    with pytest.raises(ConfigError, match="Unknown dtype"):
        hf_import.import_hf(tmp_path / "f32", tmp_path / "x", dtype="float64")


def test_leaves_of_mixed_tensors_lose_nothing(tmp_path):
    """One layer in bfloat16, one in float32: the leaf is float32 in every slot."""

    def mix(state):
        for name in state:
            if name.startswith("model.layers.1.mlp.experts.2") or "norm" in name:
                state[name] = state[name].astype(jnp.bfloat16)

    params = stranger(tmp_path / "hf", change=mix)
    result = hf_import.import_hf(tmp_path / "hf", tmp_path / "m")
    assert result["dtypes"] == ["bfloat16", "float32"]
    got = loaded(tmp_path / "m")
    assert got["shared/final_norm"].dtype == jnp.bfloat16
    want = params["experts/w_up"].copy()
    want[1, 2] = want[1, 2].astype(jnp.bfloat16)
    assert got["experts/w_up"].dtype == np.float32 and np.array_equal(got["experts/w_up"], want)


def test_a_tied_head_may_be_left_out_or_repeated_but_not_differ(tmp_path):
    def repeat(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()

    def differ(state):
        repeat(state)
        state["lm_head.weight"][200, 1] += 1

    def half(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].astype(np.float16)

    made = []
    for name, change in {"absent": None, "repeat": repeat}.items():
        stranger(tmp_path / name, "LlamaForCausalLM", tied_embeddings=True, change=change)
        made.append(hf_import.import_hf(tmp_path / name, tmp_path / f"{name}-m")["digests"])
    assert made[0] == made[1]
    for name, change in {"differ": differ, "half": half}.items():
        stranger(tmp_path / name, "LlamaForCausalLM", tied_embeddings=True, change=change)
        found = problems(hf_import.import_hf, tmp_path / name, tmp_path / "x")
        assert found == {("not-tied", "lm_head.weight")}
        assert not (tmp_path / "x").exists()


def test_buffers_and_biases_of_zeros_are_passed_over(tmp_path):
    bias = "model.layers.1.self_attn.q_proj.bias"

    def add(state):
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        state[bias] = np.zeros(4 * 4, np.float32)

    def refused(state):
        add(state)
        state[bias][7] = 1e-30
        state["model.layers.0.self_attn.q_proj.bias"] = np.zeros(5, np.float32)
        state["model.layers.0.mlp.gate_proj.bias"] = np.full(24, np.nan, np.float32)

    stranger(tmp_path / "plain", "LlamaForCausalLM")
    plain = hf_import.import_hf(tmp_path / "plain", tmp_path / "a")
    stranger(tmp_path / "more", "LlamaForCausalLM", change=add)
    more = hf_import.import_hf(tmp_path / "more", tmp_path / "b")
    assert plain["digests"] == more["digests"]
    stranger(tmp_path / "biased", "LlamaForCausalLM", change=refused)
    assert problems(hf_import.import_hf, tmp_path / "biased", tmp_path / "x") == {
        ("bias", bias),
        ("bias", "model.layers.0.mlp.gate_proj.bias"),
        ("tensor-extra", "model.layers.0.self_attn.q_proj.bias"),
    }


def test_every_wrong_tensor_is_named_at_once(tmp_path):
    gone, short = "model.layers.1.mlp.experts.2.up_proj.weight", "model.norm.weight"

    def spoil(state):
        del state[gone]
        state[short] = state[short][:3]
        state["model.layers.2.mlp.gate.weight"] = np.ones((3, 16), np.float32)
        state["model.layers.0.mlp.experts.gate_up_proj"] = np.ones((3, 48, 16), np.float32)

    stranger(tmp_path / "hf", change=spoil)
    with pytest.raises(RefusedError, match="all experts in one tensor") as error:
        hf_import.import_hf(tmp_path / "hf", tmp_path / "m")
    assert {(p.code, p.leaf) for p in error.value.problems} == {
        ("tensor-missing", gone),
        ("tensor-shape", short),
        ("tensor-extra", "model.layers.2.mlp.gate.weight"),
        ("tensor-extra", "model.layers.0.mlp.experts.gate_up_proj"),
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_values_that_are_not_finite_leave_nothing_behind(tmp_path):
    def spoil(state):
        state["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = np.inf
        state["model.layers.0.mlp.experts.2.down_proj.weight"][0, 0] = np.nan

    stranger(tmp_path / "hf", change=spoil)
    found = problems(hf_import.import_hf, tmp_path / "hf", tmp_path / "m")
    assert found == {("not-finite", "w_down"), ("not-finite", "w_up")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    stranger(tmp_path / "hf")
    left = iter(range(9))

    def full(_):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    args = ["import", "--from", "hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]
    assert main.main(args) == 4
    assert "The disk is full" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_disk_with_too_little_room_is_not_written_to(tmp_path, monkeypatch):
    stranger(tmp_path / "hf")
    usage = types.SimpleNamespace(free=files.SPARE + 20_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(MachineError, match="too little room"):
        hf_import.import_hf(tmp_path / "hf", tmp_path / "new" / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_large_leaves_are_told_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(assemble, "NOTEWORTHY", 4000)
    stranger(tmp_path / "hf", d_ffn=48)
    with caplog.at_level("INFO", "flexolmo"):
        hf_import.import_hf(tmp_path / "hf", tmp_path / "m")
    names = {line.rsplit(maxsplit=2)[0].strip() for line in caplog.messages}
    expected = {f"experts/{w} of slot {s}" for w in ("w_down", "w_gate", "w_up") for s in range(3)}
    assert names == expected | {"shared/embed/embedding", "shared/unembed"}


def test_experts_are_named(tmp_path):
    stranger(tmp_path / "hf")
    names = ["public", "math", "code"]
    result = hf_import.import_hf(tmp_path / "hf", tmp_path / "m", experts=names)
    assert result["experts"] == names
    for wrong in (["public", "math"], ["math", "public", "code"]):
        with pytest.raises(ConfigError, match="3 names, the first one public"):
            hf_import.import_hf(tmp_path / "hf", tmp_path / "x", experts=wrong)
    for wrong, code in (
        (["public", "a", "a"], "duplicate-expert"),
        (["public", "A", "b"], "bad-id"),
    ):
        found = problems(hf_import.import_hf, tmp_path / "hf", tmp_path / "x", experts=wrong)
        assert found == {(code, "")}
    stranger(tmp_path / "dense", "LlamaForCausalLM")
    with pytest.raises(ConfigError, match="1 names"):
        hf_import.import_hf(tmp_path / "dense", tmp_path / "x", experts=["public", "code"])
    hf_export.execute(hf_export.plan(tmp_path / "m"), tmp_path / "again")
    with pytest.raises(ConfigError, match="names its experts itself"):
        hf_import.import_hf(tmp_path / "again", tmp_path / "x", experts=["public", "a", "b"])
    assert not (tmp_path / "x").exists()


def test_the_tokenizer_and_the_files_beside_it(tmp_path):
    folder = tmp_path / "hf"
    stranger(folder, "LlamaForCausalLM")
    texts = {
        "tokenizer_config.json": "{}",
        "special_tokens_map.json": "{} ",
        "chat_template.jinja": "{{ x }}",
        "generation_config.json": "{}",
    }
    others = {"notes.txt": "mine", "optimizer.bin": "x", "chat_template.jinja.bak": "y"}
    for name, text in {**texts, **others}.items():
        (folder / name).write_text(text)
    hf_import.import_hf(folder, tmp_path / "m")
    info = model_info.read_info(tmp_path / "m")
    assert {name: path.read_text() for name, path in info.companions.items()} == texts
    assert info.tokenizer_path.read_bytes() == tokenizer_file().read_bytes()
    assert verify.verify(info.path) == []
    hf_export.execute(hf_export.plan(info.path), tmp_path / "again")
    for name, text in texts.items():
        assert (tmp_path / "again" / name).read_text() == text

    (folder / "tokenizer.json").unlink()
    with pytest.raises(RefusedError, match="--tokenizer PATH"):
        hf_import.import_hf(folder, tmp_path / "x")
    hf_import.import_hf(folder, tmp_path / "given", tokenizer=tokenizer_file())
    given = model_info.read_info(tmp_path / "given")
    assert given.anchor_digest == info.anchor_digest and given.companions == {}
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="Not a tokenizer file"):
        hf_import.import_hf(folder, tmp_path / "x")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.json", "config.json"])
def test_no_file_of_this_machine_comes_along_through_a_link(tmp_path, name):
    stranger(tmp_path / "hf", "LlamaForCausalLM")
    private = tmp_path / "private.json"
    private.write_bytes(
        (tmp_path / "hf" / name).read_bytes() if (tmp_path / "hf" / name).exists() else b"{}"
    )
    (tmp_path / "hf" / name).unlink(missing_ok=True)
    (tmp_path / "hf" / name).symlink_to(private)
    assert problems(hf_import.import_hf, tmp_path / "hf", tmp_path / "m") == {("symlink", "")}


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    size = tokenize.vocab_size(tokenize.load(tokenizer_file()))
    stranger(tmp_path / "equal", "LlamaForCausalLM", vocab_size=size)
    hf_import.import_hf(tmp_path / "equal", tmp_path / "m")
    stranger(tmp_path / "small", "LlamaForCausalLM", vocab_size=size - 1)
    assert problems(hf_import.import_hf, tmp_path / "small", tmp_path / "x") == {("vocab-size", "")}


def test_memory_is_one_tensor_and_a_few_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "STRIP_BYTES", 1 << 20)
    monkeypatch.setattr(leafio, "BLOCK", 1 << 20)
    stranger(tmp_path / "hf", "LlamaForCausalLM", d_model=256, d_ffn=8192, n_layers=8)
    hf_import.import_hf(tmp_path / "hf", tmp_path / "warm")
    gc.collect()
    with peak_memory() as grown:
        result = hf_import.import_hf(tmp_path / "hf", tmp_path / "m")
    assert result["bytes"] > 190 << 20
    assert grown[0] < (8 << 20) + (16 << 20)  # the largest tensor, and blocks of 1 MiB


def test_command(tmp_path, capsys):
    info = make_model(tmp_path, settings("FlexOlmoForCausalLM"))
    hf_export.execute(hf_export.plan(info.path), tmp_path / "hf")
    args = ["import", "--from", "hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]
    assert main.main([*args, "--json", str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr().out
    assert "exactly the model that was exported" in shown and info.model_digest in shown
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["digests"]["model_digest"] == info.model_digest
    assert result["experts"] == ["public", "code", "math", "news"]
    stranger(tmp_path / "other")
    args = ["import", "--from", "hf", str(tmp_path / "other"), "--out", str(tmp_path / "n")]
    names = ["--experts", "public, math,code", "--dtype", "bfloat16"]
    assert main.main([*args, *names]) == 0
    assert list(model_info.read_info(tmp_path / "n").slots) == ["public", "math", "code"]
    for wrong, message in (
        (["--from", "hff"], "did you mean 'hf'"),
        (["--dtype", "float8"], "Unknown dtype"),
        (["--out", str(tmp_path / "n")], "exists already"),
        (["--from", "gguf", "--experts", "public"], "leave the option out"),
    ):
        base = ["import", "--from", "hf", str(tmp_path / "other"), "--out", str(tmp_path / "x")]
        assert main.main([*base, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_slices_of_an_imported_mixture_are_slices(tmp_path):
    stranger(tmp_path / "hf")
    hf_import.import_hf(tmp_path / "hf", tmp_path / "m")
    out = str(tmp_path / "piece")
    assert (
        main.main(["unstitch", "--model", str(tmp_path / "m"), "--expert", "expert2", "--out", out])
        == 0
    )
    piece, _ = slices.read_slice(tmp_path / "piece")
    router = {"context": "token", "renormalize": False, "fallback": False}
    assert piece.manifest["recipe"] == {"router": router}


def test_a_refusal_shows_some_problems_and_keeps_all():
    problems = [Problem("tensor-extra", "f", str(i), "m") for i in range(1000)]
    error = RefusedError("Refused", problems)
    assert len(error.problems) == 1000
    assert "and 960 more" in str(error) and len(str(error)) < 3000
    assert "more" not in str(RefusedError("Refused", problems[:40]))

# SPDX-License-Identifier: Apache-2.0
"""Exports that must not happen: each is refused with its reason and leaves nothing behind."""

import errno
import shutil
import types

import numpy as np
import pytest
from expert_helpers import rewrite
from interop_helpers import MIXTURES, TOKEN, config, make_anchor, make_model

from flexolmo_jax import files
from flexolmo_jax import tree as trees
from flexolmo_jax.cli import main as cli
from flexolmo_jax.config import ModelConfig, RouterConfig
from flexolmo_jax.errors import ConfigError, MachineError, RefusedError
from flexolmo_jax.experts import manifest, model_info
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.interop import hf_export
from flexolmo_jax.interop import safetensors_writer as writer
from flexolmo_jax.typed import from_dict


@pytest.fixture(scope="module")
def flex(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("flex"), config(router=TOKEN))


@pytest.fixture
def out(tmp_path):
    """A path for the export, whose folder must hold nothing but `m` afterwards."""
    folder = tmp_path / "exports"
    folder.mkdir()
    yield folder / "hf"
    assert list(folder.iterdir()) == []


def refused(path, out, **options):
    with pytest.raises(RefusedError) as error:
        hf_export.execute(hf_export.plan(path, **options), out)
    return error.value


def codes(error):
    return [p.code for p in error.problems]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"router": RouterConfig("document")}, "judges a document"),
        ({"router": RouterConfig(fallback=True)}, "always active"),
        ({"norm_placement": "post", "qk_norm": "none"}, "no class for a mixture with post-norm"),
        ({"norm_placement": "post", "qk_norm": "head"}, "no class for a mixture with post-norm"),
        ({"norm_placement": "pre", "qk_norm": "none"}, "divides the combine weights"),
        ({**MIXTURES["OlmoeForCausalLM"], "d_head": 8}, r"n_heads \* d_head"),
    ],
)
def test_a_model_without_a_class(changes, reason, tmp_path, out):
    info = make_model(tmp_path, config(**changes))
    error = refused(info.path, out)
    assert codes(error) == ["no-hf-class"]
    with pytest.raises(RefusedError, match=reason):
        hf_export.plan(info.path)


def test_an_anchor_without_a_class(tmp_path, out):
    info = make_anchor(tmp_path / "a", config(norm_placement="post", qk_norm="none"))
    with pytest.raises(RefusedError, match="no class for a dense model"):
        hf_export.execute(hf_export.plan(info.path), out)


def test_what_one_model_has_no_class_for_a_part_of_it_may_have(tmp_path):
    document = make_model(tmp_path / "a", config(router=RouterConfig("document")))
    assert hf_export.plan(document.path, allow=["public"]).architecture.name == "Olmo2ForCausalLM"
    # With every expert active there is nothing to divide by.
    plain = config(norm_placement="pre", qk_norm="none")
    mixtral = make_model(tmp_path / "b", plain)
    plan = hf_export.plan(mixtral.path, allow=["code"])
    assert (plan.architecture.name, plan.config.n_active) == ("MixtralForCausalLM", 2)


def test_biases_are_refused_by_name_and_size(tmp_path, out):
    info = make_model(tmp_path, config(router=RouterConfig("document")), bias=0.5)
    error = refused(info.path, out)
    assert codes(error) == ["no-hf-class"] + ["expert-bias"] * 3
    for expert, problem in zip(("code", "math", "news"), error.problems[1:], strict=True):
        assert repr(expert) in problem.message
        assert f"-{np.log1p(np.exp(0.5)):.6g} " in problem.message
    # Slot 0 has no bias, whatever its raw value is, and who is not exported has no say.
    assert not hf_export.plan(info.path, allow=["public"]).biases


def test_the_smallest_bias_counts(tmp_path, out):
    info = make_model(tmp_path, config(router=TOKEN), bias=-100.0)
    assert codes(refused(info.path, out)) == ["expert-bias"] * 3
    info = make_model(tmp_path / "none", config(router=TOKEN), bias=-200.0)
    assert not hf_export.plan(info.path).biases


def test_dropping_biases_needs_a_text(tmp_path, out, capsys):
    info = make_model(tmp_path, config(router=TOKEN), bias=0.0)
    with pytest.raises(ConfigError, match="record"):
        hf_export.execute(hf_export.plan(info.path, drop_bias=True), out)
    args = ["export", "--to", "hf", "--model", str(info.path), "--out", str(out)]
    assert cli.main(args) == 3
    assert "--drop-bias and --data DIR or --text FILE" in capsys.readouterr().err
    assert cli.main([*args, "--drop-bias"]) == 2
    assert "give --data DIR (token shards) or --text FILE" in capsys.readouterr().err
    assert cli.main([*args, "--text", "x.txt"]) == 2
    assert "add --drop-bias" in capsys.readouterr().err
    assert cli.main([*args, "--drop-bias", "--text", str(tmp_path / "no.txt")]) != 0


# File to what the refusal calls it.
FILES = {
    "shared/embed.embedding/0.0": "embed/embedding",
    "shared/unembed/0.0": "unembed",
    "shared/final_norm/0": "final_norm",
    "shared/layers.attention.w_q/0.0.0.0": "layers/attention/w_q",
    "experts/public/params/w_down/0.0.0": "public/params:w_down",
    "experts/math/params/w_gate/0.0.0": "math/params:w_gate",
    "experts/news/params/router/0.0": "news/params:router",
    "experts/code/params/bias/0": "code/params:bias",
    "tokenizer.json": "tokenizer.json",
}


@pytest.mark.parametrize("name", FILES)
def test_a_changed_value_is_found_while_it_is_read(flex, name, tmp_path, out):
    shutil.copytree(flex.path, tmp_path / "m")
    data = bytearray((tmp_path / "m" / name).read_bytes())
    data[-5] ^= 1
    (tmp_path / "m" / name).write_bytes(data)
    error = refused(tmp_path / "m", out)
    assert codes(error) == ["file-digest" if name == "tokenizer.json" else "leaf-digest"]
    assert FILES[name] in str(error)


def test_the_row_that_a_dense_model_keeps_is_checked_too(flex, tmp_path, out):
    shutil.copytree(flex.path, tmp_path / "m")
    path = tmp_path / "m/experts/public/params/router/0.0"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    assert codes(refused(tmp_path / "m", out, allow=["public"])) == ["leaf-digest"]


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin", "chat_template.py"])
def test_a_tokenizer_file_that_is_something_else(flex, name, tmp_path, out):
    shutil.copytree(flex.path, tmp_path / "m")
    (tmp_path / "m/tokenizer").mkdir()
    (tmp_path / "m/tokenizer" / name).write_text("x")
    digest = trees.file_digest(tmp_path / "m/tokenizer" / name)
    rewrite(tmp_path / "m", lambda v: v["files"].update({f"tokenizer/{name}": digest}))
    assert codes(refused(tmp_path / "m", out)) == ["file-extra"]


def test_missing_files_and_leftovers(flex, tmp_path, out):
    shutil.copytree(flex.path, tmp_path / "m")
    (tmp_path / "m/experts/math/params/w_up/0.0.0").unlink()
    (tmp_path / "m/experts/code/params/mu").mkdir()
    (tmp_path / "m/experts/code/params/mu/0").write_bytes(b"x")
    assert set(codes(refused(tmp_path / "m", out))) == {"file-missing", "leftover-state"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(flex, value, tmp_path, out):
    """Even where the manifest lists them with their right digests."""
    shutil.copytree(flex.path, tmp_path / "m")
    name, path = "final_norm", tmp_path / "m/shared/final_norm/0"
    values = np.fromfile(path, np.float32)
    values[3] = value
    values.tofile(path)
    poison_model(tmp_path / "m", name, values)
    assert codes(refused(tmp_path / "m", out)) == ["not-finite"]


def poison_model(folder, name, values):
    """Makes a model's manifest say what its shared leaf now holds."""

    def change(value):
        value["shared"][name]["digest"] = trees.leaf_digest(values)
        value["files"][f"shared/{name}/0"] = trees.file_digest(folder / f"shared/{name}/0")
        c = from_dict(ModelConfig, value["model"])
        public, _ = slices.read_slice_info(folder / "experts/public")
        value["anchor_digest"] = manifest.anchor_digest(
            c, value["tokenizer_digest"], value["shared"], public.manifest["leaves"]
        )
        for row in value["slots"][1:]:
            piece = folder / "experts" / row["expert"]
            rewrite(piece, lambda v: {**v, "anchor_digest": value["anchor_digest"]})
            row["manifest_digest"] = slices.read_slice_info(piece)[0].digest
        value["model_digest"] = manifest.model_digest(value["anchor_digest"], c, value["slots"])

    rewrite(folder, change)
    model_info.read_info(folder)


def test_float32_values_beyond_bfloat16(flex, tmp_path, out):
    shutil.copytree(flex.path, tmp_path / "m")
    path = tmp_path / "m/shared/final_norm/0"
    values = np.fromfile(path, np.float32)
    values[3] = np.finfo(np.float32).max
    values.tofile(path)
    poison_model(tmp_path / "m", "final_norm", values)
    error = refused(tmp_path / "m", out, dtype="bfloat16")
    assert codes(error) == ["not-finite"]
    assert "bfloat16" in str(error)
    hf_export.execute(hf_export.plan(tmp_path / "m"), tmp_path / "fine")


def test_an_existing_output_is_not_touched(flex, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        hf_export.execute(hf_export.plan(flex.path), tmp_path / "hf")
    args = ["export", "--to", "hf", "--model", str(flex.path), "--out", str(tmp_path / "hf")]
    assert cli.main(args) == 2
    assert [p.name for p in tmp_path.rglob("*")] == ["hf", "mine.txt"]
    (tmp_path / "hf/mine.txt").unlink()
    assert cli.main(args) == 2  # Before anything is read or measured.


def test_a_disk_that_is_full_or_becomes_full(flex, out, monkeypatch, capsys):
    usage = types.SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(MachineError, match="too little room"):
            hf_export.execute(hf_export.plan(flex.path), out)

    original = writer._values

    def full(tensor):
        if "norm" in tensor.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(tensor)

    monkeypatch.setattr(writer, "_values", full)
    args = ["export", "--to", "hf", "--model", str(flex.path), "--out", str(out)]
    assert cli.main([*args, "--shard-size", "20KB"]) == 4
    assert "disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "hff"], "did you mean 'hf'"),
        (["--dtype", "float31"], "did you mean 'float32'"),
        (["--shard-size", "5XB"], "Not a size"),
        (["--allow", "cod"], "did you mean 'code'"),
        (["--deny", "public"], "cannot be denied"),
        (["--deny", ","], "names none"),
        (["--active", "5"], "1..4"),
        (["--active", "0"], "1..4"),
        (["--allow", "code", "--deny", "math"], "not allowed with"),
        (["--data", "a", "--text", "b"], "not allowed with"),
    ],
)
def test_options(flex, out, options, message, capsys):
    args = ["export", "--to", "hf", "--model", str(flex.path), "--out", str(out), *options]
    assert cli.main(args) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_model(tmp_path, out, capsys):
    (tmp_path / "x").mkdir()
    args = ["export", "--to", "hf", "--out", str(out), "--model"]
    assert cli.main([*args, str(tmp_path / "x")]) == 3
    assert "not a model" in capsys.readouterr().err
    assert cli.main([*args, str(tmp_path / "nowhere")]) == 3

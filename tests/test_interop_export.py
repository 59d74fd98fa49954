# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import numpy as np
import pytest
from expert_helpers import file_bytes
from interop_helpers import (
    DENSE,
    MIXTURES,
    TOKEN,
    VOCAB,
    config,
    make_anchor,
    make_model,
    random_params,
    tokenizer_file,
)
from safetensors.numpy import load_file

from flexolmo_jax import tree as trees
from flexolmo_jax.cli import main as cli
from flexolmo_jax.config import AdapterConfig, RouterConfig
from flexolmo_jax.data import tokenize
from flexolmo_jax.errors import RefusedError
from flexolmo_jax.experts import leafio, model_dir
from flexolmo_jax.interop import assemble, hf_export, hf_extra, hf_import
from flexolmo_jax.interop import safetensors_writer as writer

# D 16, heads 4 x 4, kv heads 2 x 4, FFN 24, 2 layers.
ATTENTION = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
}
FULL_NORM = {"self_attn.q_norm": (16,), "self_attn.k_norm": (8,)}
HEAD_NORM = {"self_attn.q_norm": (4,), "self_attn.k_norm": (4,)}
POST = {"post_attention_layernorm": (16,), "post_feedforward_layernorm": (16,)}
PRE = {"input_layernorm": (16,), "post_attention_layernorm": (16,)}
MLP = {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
EXPERT = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
MIXTRAL = {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}


def experts(folder, names, n):
    gate = {f"{folder}.gate": (n, 16)}
    return gate | {f"{folder}.experts.{e}.{k}": s for e in range(n) for k, s in names.items()}


def layer_names(kind, n=4):
    """Tensors of a layer without "model.layers.N." and ".weight", as each class has them."""
    return {
        "FlexOlmoForCausalLM": ATTENTION | FULL_NORM | POST | experts("mlp", EXPERT, n),
        "MixtralForCausalLM": ATTENTION | PRE | experts("block_sparse_moe", MIXTRAL, n),
        "OlmoeForCausalLM": ATTENTION | FULL_NORM | PRE | experts("mlp", EXPERT, n),
        "Qwen3MoeForCausalLM": ATTENTION | HEAD_NORM | PRE | experts("mlp", EXPERT, n),
        "Olmo2ForCausalLM": ATTENTION | FULL_NORM | POST | MLP,
        "LlamaForCausalLM": ATTENTION | PRE | MLP,
        "Qwen3ForCausalLM": ATTENTION | HEAD_NORM | PRE | MLP,
    }[kind]


def all_names(kind, n=4):
    ends = {"model.embed_tokens": (VOCAB, 16), "lm_head": (VOCAB, 16), "model.norm": (16,)}
    names = layer_names(kind, n)
    ends |= {f"model.layers.{i}.{k}": shape for i in range(2) for k, shape in names.items()}
    return {f"{k}.weight": shape for k, shape in ends.items()}


def export(path, out, dropped_bias=None, **options):
    plan = hf_export.plan(path, **options)
    return hf_export.execute(plan, out, dropped_bias=dropped_bias)


def tensors(folder):
    """Name to values over all files of a directory."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        assert not out.keys() & found.keys()
        out |= found
    return out


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def class_config(kind, **changes):
    router = RouterConfig("token", kind == "MixtralForCausalLM")
    return config(**{"router": router, **(MIXTURES | DENSE)[kind], **changes})


@pytest.fixture(scope="module")
def flex(tmp_path_factory):
    """A FlexOlmo model of four experts and its export."""
    root = tmp_path_factory.mktemp("flex")
    info = make_model(root, class_config("FlexOlmoForCausalLM"))
    export(info.path, root / "hf")
    return info, root / "hf"


@pytest.mark.parametrize("kind", [*MIXTURES, *DENSE])
def test_names_and_shapes_of_each_class(kind, tmp_path):
    c = class_config(kind)
    make = make_anchor if kind in DENSE else make_model
    info = make(tmp_path / "m", c)
    result = export(info.path, tmp_path / "hf")
    found = tensors(tmp_path / "hf")
    assert {name: t.shape for name, t in found.items()} == all_names(kind)
    assert result["architecture"] == kind
    assert read_config(tmp_path / "hf")["architectures"] == [kind]
    assert result["tensors"] == len(found)
    assert result["bytes"] == sum(t.nbytes for t in found.values())


def test_values_are_the_leaves_turned_around(flex):
    info, hf = flex
    _, params, _ = model_dir.load_model(info.path)
    found, layers = tensors(hf), params["shared"]["layers"]
    group = params["experts"]
    for i in range(2):
        at = f"model.layers.{i}."
        for name in ("q", "k", "v"):
            leaf = layers["attention"][f"w_{name}"][i]
            assert (found[f"{at}self_attn.{name}_proj.weight"] == leaf.reshape(16, -1).T).all()
        leaf = layers["attention"]["w_o"][i]
        assert (found[at + "self_attn.o_proj.weight"] == leaf.reshape(-1, 16).T).all()
        assert (found[at + "self_attn.q_norm.weight"] == layers["attention"]["q_norm"][i]).all()
        norm = found[at + "post_attention_layernorm.weight"]
        assert (norm == layers["attention_norm"][i]).all()
        norm = found[at + "post_feedforward_layernorm.weight"]
        assert (norm == layers["ffn_norm"][i]).all()
        assert (found[at + "mlp.gate.weight"] == group["router"][i]).all()
        for e in range(4):
            for name in ("gate", "up", "down"):
                tensor = found[f"{at}mlp.experts.{e}.{name}_proj.weight"]
                assert (tensor == group[f"w_{name}"][i, e].T).all()
    assert (found["model.embed_tokens.weight"] == params["shared"]["embed"]["embedding"]).all()
    assert (found["lm_head.weight"] == params["shared"]["unembed"].T).all()
    assert (found["model.norm.weight"] == params["shared"]["final_norm"]).all()


def test_config_is_for_old_and_new_transformers(flex):
    info, hf = flex
    raw = read_config(hf)
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == info.config.rope_theta
    assert raw["rope_scaling"] is None
    assert raw["rope_parameters"]["rope_type"] == "default"
    assert raw["dtype"] == raw["torch_dtype"] == "float32"
    eos = tokenize.load(tokenizer_file()).token_to_id(tokenize.EOS)
    assert (raw["eos_token_id"], raw["pad_token_id"]) == (eos, eos + 1)
    assert (raw["num_experts"], raw["num_experts_per_tok"]) == (4, 2)
    assert raw["norm_topk_prob"] is False
    generation = json.loads((hf / "generation_config.json").read_text())
    assert generation == {"eos_token_id": eos, "pad_token_id": eos + 1}
    words = json.loads((hf / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (words["eos_token"], words["pad_token"]) == (tokenize.EOS, tokenize.PAD)
    assert words["model_max_length"] == info.config.max_len
    assert (hf / "tokenizer.json").read_bytes() == tokenizer_file().read_bytes()


def test_what_the_flexolmo_model_of_vllm_needs(flex):
    """Facts of its loader, which was read and not run: names that it maps, keys that it ignores."""
    _, hf = flex
    raw, names = read_config(hf), set(tensors(hf))
    stacked = {f"self_attn.{x}_proj.weight" for x in "qkv"}
    fused = {f"mlp.experts.{e}.{w}_proj.weight" for e in range(4) for w in ("gate", "up", "down")}
    own = {"self_attn.o_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    own |= {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight"}
    own |= {"mlp.gate.weight"}
    layers = {f"model.layers.{i}.{n}" for i in range(2) for n in stacked | fused | own}
    assert names == layers | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert not [n for n in names if n.endswith("bias") or "gate_up" in n]
    assert raw["norm_topk_prob"] is False
    assert raw["attention_bias"] is False
    assert "head_dim" not in raw
    assert raw["model_type"] == "flex_olmo"
    # It reads every *.safetensors at the top, so nothing else may lie there.
    assert [p.name for p in hf.glob("*.safetensors")] == ["model.safetensors"]


def test_what_vllm_would_compute_otherwise_is_said(tmp_path):
    c = config(norm_eps=1e-5, router=RouterConfig("token", True), d_head=8)
    info = make_model(tmp_path, c)
    notes = hf_export.plan(info.path).notes
    assert [n for n in notes if "norm_topk_prob" in n]
    assert [n for n in notes if "head_dim" in n]
    assert not [n for n in notes if "1e-5" in n]
    # All experts active: their weights sum to 1 as they are.
    assert not [n for n in hf_export.plan(info.path, active=4).notes if "norm_topk_prob" in n]


@pytest.mark.parametrize("kind", ["FlexOlmoForCausalLM", "LlamaForCausalLM"])
def test_a_tied_model_repeats_its_embedding_as_the_head(kind, tmp_path):
    make = make_anchor if kind in DENSE else make_model
    info = make(tmp_path / "m", class_config(kind, tied_embeddings=True))
    export(info.path, tmp_path / "hf")
    found = tensors(tmp_path / "hf")
    assert {name: t.shape for name, t in found.items()} == all_names(kind)
    assert (found["lm_head.weight"] == found["model.embed_tokens.weight"]).all()
    assert read_config(tmp_path / "hf")["tie_word_embeddings"] is True


def test_a_subset_is_a_smaller_model_with_new_numbers(flex, tmp_path, caplog):
    info, whole = flex
    result = export(info.path, tmp_path / "hf", allow=["news", "math"], active=3)
    assert result["experts"] == ["public", "math", "news"]
    found, before = tensors(tmp_path / "hf"), tensors(whole)
    assert {n: t.shape for n, t in found.items()} == all_names("FlexOlmoForCausalLM", 3)
    kept = [0, 2, 3]
    for name, values in found.items():
        if name.endswith("mlp.gate.weight"):
            assert (values == before[name][kept]).all()
        elif ".experts." in name:
            head, rest = name.split(".experts.")
            number, rest = rest.split(".", 1)
            assert (values == before[f"{head}.experts.{kept[int(number)]}.{rest}"]).all()
        else:
            assert (values == before[name]).all()
    raw = read_config(tmp_path / "hf")
    assert (raw["num_experts"], raw["num_experts_per_tok"]) == (3, 3)
    assert not raw["flexolmo"]["complete"]
    # Not even the names of the others are in it.
    assert not [p for p, data in file_bytes(tmp_path / "hf").items() if b"text of code" in data]
    with caplog.at_level("INFO", logger="flexolmo"):
        plan = hf_export.plan(info.path, deny=["code", "math"], active=3)
    assert plan.config.n_active == 2
    assert "2 active instead of 3" in caplog.text


def test_the_public_expert_alone_is_the_anchor(flex, tmp_path):
    info, _ = flex
    result = export(info.path, tmp_path / "hf", allow=["public"])
    assert result["architecture"] == "Olmo2ForCausalLM"
    export(info.path.parent / "anchor", tmp_path / "anchor")
    alone, anchor = tensors(tmp_path / "hf"), tensors(tmp_path / "anchor")
    assert {n: t.shape for n, t in alone.items()} == all_names("Olmo2ForCausalLM")
    assert all((alone[n] == anchor[n]).all() for n in alone)
    raw = read_config(tmp_path / "hf")
    assert "num_experts" not in raw


def test_nothing_of_an_expert_that_is_not_chosen_is_read(flex, tmp_path):
    info, _ = flex
    export(info.path, tmp_path / "before", deny=["math"])
    shutil.copytree(info.path, tmp_path / "m")
    for path in (tmp_path / "m/experts/math").rglob("*"):
        if path.is_file():
            noise = np.full(path.stat().st_size // 4 + 1, np.nan, np.float32)
            path.write_bytes(noise.tobytes())
    export(tmp_path / "m", tmp_path / "after", deny=["math"])
    assert file_bytes(tmp_path / "before") == file_bytes(tmp_path / "after")


def test_empty_slots_are_left_out(tmp_path):
    info = make_model(tmp_path, class_config("FlexOlmoForCausalLM"), slots=7)
    assert info.config.n_slots == 7
    result = export(info.path, tmp_path / "hf")
    assert read_config(tmp_path / "hf")["num_experts"] == 4
    assert not result["complete"]
    shapes = {name: t.shape for name, t in tensors(tmp_path / "hf").items()}
    assert shapes == all_names("FlexOlmoForCausalLM")


def test_equal_models_give_equal_bytes(flex, tmp_path):
    info, hf = flex
    export(info.path, tmp_path / "again")
    assert file_bytes(hf) == file_bytes(tmp_path / "again")


def test_shards_hold_the_same_tensors(flex, tmp_path):
    info, hf = flex
    result = export(info.path, tmp_path / "hf", shard_size="20KB")
    assert len(result["files"]) > 4
    assert result["files"][-1] == writer.INDEX
    one, many = tensors(hf), tensors(tmp_path / "hf")
    assert list(one) != []
    assert {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in many.items()}
    index = json.loads((tmp_path / "hf" / writer.INDEX).read_text())["weight_map"]
    for name, file in index.items():
        assert name in load_file(tmp_path / "hf" / file)


def test_large_leaves_pass_in_blocks(flex, tmp_path, monkeypatch):
    info, hf = flex
    monkeypatch.setattr(leafio, "BLOCK", 100)  # Smaller than a row of some.
    monkeypatch.setattr(assemble, "STRIP_BYTES", 100)
    export(info.path, tmp_path / "hf")
    assert file_bytes(hf) == file_bytes(tmp_path / "hf")


def test_a_bfloat16_model_stays_bfloat16(tmp_path):
    info = make_model(tmp_path, class_config("FlexOlmoForCausalLM"), dtype="bfloat16")
    result = export(info.path, tmp_path / "hf")
    assert result["dtype"] == read_config(tmp_path / "hf")["dtype"] == "bfloat16"
    found = tensors(tmp_path / "hf")
    _, params, _ = model_dir.load_model(info.path)
    leaf = params["experts"]["w_up"][1, 2].T
    tensor = found["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert tensor.dtype == leaf.dtype
    assert tensor.tobytes() == np.ascontiguousarray(leaf).tobytes()
    export(info.path, tmp_path / "wide", dtype="float32")
    wide = tensors(tmp_path / "wide")
    assert all((wide[n] == t.astype(np.float32)).all() for n, t in found.items())


def test_float32_is_rounded_to_the_nearest_bfloat16(flex, tmp_path):
    info, hf = flex
    result = export(info.path, tmp_path / "hf", dtype="bfloat16")
    assert not result["complete"]
    half = tensors(tmp_path / "hf")
    for name, values in tensors(hf).items():
        error = np.abs(half[name].astype(np.float32) - values)
        assert (error <= np.abs(values) * 2.0**-8).all()
        assert half[name].tobytes() == values.astype(half[name].dtype).tobytes()


def test_a_model_of_both_dtypes_is_written_in_float32_exactly(tmp_path):
    c = class_config("Olmo2ForCausalLM")
    params = random_params(c)
    public = trees.map_named(lambda _, x: x[:, 0].astype(np.dtype("bfloat16")), params["experts"])
    made = model_dir.write_model(tmp_path / "m", c, params["shared"], public, tokenizer_file())
    result = export(made.path, tmp_path / "hf")
    assert (result["dtype"], result["complete"]) == ("float32", False)
    up = tensors(tmp_path / "hf")["model.layers.1.mlp.up_proj.weight"]
    assert up.dtype == np.float32
    assert (up == public["w_up"][1].T.astype(np.float32)).all()


def test_a_dense_model_is_exported_without_what_its_experts_would_need(tmp_path):
    """Mutation: evidence left in the router of the file, which then has no table for it."""
    router = RouterConfig("document", evidence=4.0, evidence_parts=2)
    c = class_config("Olmo2ForCausalLM").replace(router=router, adapters=AdapterConfig(head=2))
    info = make_anchor(tmp_path / "anchor", c)
    result = export(info.path, tmp_path / "hf")
    assert not result["complete"] and "tables of evidence" in " ".join(result["notes"])
    hf_import.import_hf(tmp_path / "hf", tmp_path / "back")
    back, params, _ = model_dir.load_model(tmp_path / "back")
    assert back.config == c.replace(router=RouterConfig("document"), adapters=AdapterConfig())
    _, whole, _ = model_dir.load_model(info.path)
    shared = {n: leaf for n, leaf in whole["shared"].items() if n != "evidence"}
    assert trees.digests(params["shared"]) == trees.digests(shared)


def test_our_key_says_where_the_model_comes_from(flex):
    info, hf = flex
    extra = read_config(hf)["flexolmo"]
    assert extra["complete"] is True
    assert (extra["anchor_digest"], extra["model_digest"]) == (
        info.anchor_digest,
        info.model_digest,
    )
    assert extra["router"] == {"context": "token", "renormalize": False, "fallback": False}
    assert [row["id"] for row in extra["experts"]] == ["public", "code", "math", "news"]
    row = extra["experts"][2]
    assert row["manifest_digest"] == info.manifest_digests["math"]
    assert row["data_card"] == {"text": "text of math", "opt_out": "ask math"}
    assert row["training"] == {"steps": 5, "tokens": 160, "seed": 2}
    assert row["recipe"] == {
        "router": {"context": "token", "renormalize": False, "fallback": False}
    }
    assert extra["training"] == info.training
    assert "dropped_bias" not in extra


def test_values_without_a_tensor_are_kept_where_no_program_looks(tmp_path):
    c = class_config("Olmo2ForCausalLM")
    info = make_anchor(tmp_path / "a", c, router=0.5, bias=0.25)
    export(info.path, tmp_path / "hf")
    kept = load_file(tmp_path / "hf" / hf_extra.KEPT)
    assert (kept["experts/public/bias"] == np.full(2, 0.25, np.float32)).all()
    assert (kept["experts/public/router"] == np.full((2, 16), 0.5, np.float32)).all()
    # A raw bias of another expert whose effective value is 0.
    info = make_model(tmp_path, config(router=TOKEN), bias=-500.0)
    export(info.path, tmp_path / "mixture")
    kept = load_file(tmp_path / "mixture" / hf_extra.KEPT)
    assert set(kept) == {f"experts/{e}/bias" for e in ("code", "math", "news")}
    assert (kept["experts/code/bias"] == -500.0).all()


def test_nothing_is_kept_of_a_model_without(flex):
    _, hf = flex
    assert not (hf / hf_extra.KEPT).parent.exists()


@pytest.mark.parametrize("kind", ["FlexOlmoForCausalLM", "LlamaForCausalLM"])
def test_what_comes_back_is_exported_to_the_same_bytes(kind, tmp_path):
    make, options = (make_anchor, {"router": 0.5}) if kind in DENSE else (make_model, {})
    info = make(tmp_path / "m", class_config(kind, tied_embeddings=True), bias=-200.0, **options)
    export(info.path, tmp_path / "hf")
    hf_import.import_hf(tmp_path / "hf", tmp_path / "back")
    export(tmp_path / "back", tmp_path / "again")
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "hf")
    assert (tmp_path / "hf" / hf_extra.KEPT).is_file()


def test_tokenizer_files_of_others_are_given_back_as_they_were(flex, tmp_path):
    _, hf = flex
    shutil.copytree(hf, tmp_path / "hf")
    words = {"tokenizer_class": "GPT2Tokenizer", "chat_template": "{{ messages }}"}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(words))
    (tmp_path / "hf/generation_config.json").write_text('{"temperature": 0.5}')
    (tmp_path / "hf/merges.txt").write_text("a b")
    hf_import.import_hf(tmp_path / "hf", tmp_path / "back")
    export(tmp_path / "back", tmp_path / "again")
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "hf")
    (tmp_path / "back/tokenizer/merges.txt").write_text("b a")
    with pytest.raises(RefusedError, match=r"merges\.txt"):
        export(tmp_path / "back", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_command(flex, tmp_path, capsys):
    info, hf = flex
    args = ["export", "--to", "hf", "--model", str(info.path), "--shard-size", "1GB"]
    assert cli.main([*args, "--out", str(tmp_path / "hf"), "--json", str(tmp_path / "r")]) == 0
    assert file_bytes(tmp_path / "hf") == file_bytes(hf)
    result = json.loads((tmp_path / "r").read_text())
    assert result["command"] == "export"
    assert result["architecture"] == "FlexOlmoForCausalLM"
    assert result["experts"] == ["public", "code", "math", "news"]
    assert result["digests"] == {"anchor": info.anchor_digest, "model": info.model_digest}
    text = capsys.readouterr().out
    assert "FlexOlmoForCausalLM of public, code, math, news" in text
    assert "note: vLLM" in text
    out = str(tmp_path / "sub")
    assert cli.main([*args, "--out", out, "--allow", "public+math", "--dtype", "bfloat16"]) == 0
    assert "FlexOlmoForCausalLM of public, math" in capsys.readouterr().out

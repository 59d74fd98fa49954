# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of the Llama architecture as an anchor.

Names and matrices follow the Hugging Face model that such a file is made from, with two
differences: the rows of the query and key projections are ordered for a rotation of neighbouring
dimensions, and weights may be quantised.

Source: the format's description in ggml's docs/gguf.md, and the files that llama.cpp's converter
writes.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexolmo_jax import assets, model
from flexolmo_jax import tree as trees
from flexolmo_jax.config import ModelConfig, RouterConfig
from flexolmo_jax.data import tokenize
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.experts import model_dir, model_info
from flexolmo_jax.interop import assemble, gguf_file, gguf_tokenizer, hf_config, hf_names

ARCHITECTURE = "llama"
ASSET = "smollm2"
# Of any one setting; a model directory holds no larger ones either.
MAX_LAYERS, MAX_NUMBER = 1024, 1 << 24
# Tensor names of Hugging Face to those of GGUF; a layer's "model.layers.N." is "blk.N.".
NAMES = {
    hf_names.EMBED: "token_embd.weight",
    hf_names.UNEMBED: "output.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Metadata of the architecture, by what follows "llama.": fields of `ModelConfig`.
FIELDS = {
    "n_layers": "block_count",
    "d_model": "embedding_length",
    "d_ffn": "feed_forward_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "d_head": "attention.key_length",
    "max_len": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
# Settings that change the computation, and the values under which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
}


def import_gguf(src: str | Path, out: str | Path, *, dtype: str = "float32") -> dict[str, Any]:
    """Writes a Llama model from a GGUF file as an anchor.

    Args:
      src: the file, or `smollm2` for the one of the assets.
      dtype: "float32" or "bfloat16" of all leaves; quantised weights have none of their own.

    Returns:
      kind, path, digests, and in "imported" what the file says of itself and its ids.

    Raises:
      RefusedError: a file that cannot be read, or a model that cannot be expressed here, with
        every reason.
      AssetError: `smollm2` is not installed.
      ConfigError: an unknown dtype, or the package `gguf` is not installed.
    """
    path = assets.asset_path(ASSET) if str(src) == ASSET else Path(src)
    file = gguf_file.read(path)
    config = read_config(file)
    words = _tokenizer(file, config)
    check_tensors(file, config)
    architecture = hf_config.architecture_for(config)
    shared, (public,) = assemble.leaves(architecture, config, _source(file, config), dtype)
    facts = _facts(file, words)
    with tempfile.TemporaryDirectory() as tmp:
        tokenizer = Path(tmp) / model_info.TOKENIZER
        tokenize.save(words.tokenizer, tokenizer)
        tokenize.load(tokenizer)
        info = model_dir.write_model(
            out,
            config,
            trees.unflatten(shared),
            {**public, **_router(config, dtype)},
            tokenizer,
            {"imported": facts},
        )
    digests = {"anchor_digest": info.anchor_digest, "model_digest": info.model_digest}
    return {"kind": "model", "path": str(out), "digests": digests, "imported": facts}


def _router(config: ModelConfig, dtype: str) -> dict[str, np.ndarray]:
    """The leaves of a slice for which a dense model has no tensors."""
    router_LD = np.zeros((config.n_layers, config.d_model), jnp.dtype(dtype))
    return {"router": router_LD, "bias": np.full(config.n_layers, model.NO_BIAS, router_LD.dtype)}


def _facts(file: gguf_file.GgufFile, words: gguf_tokenizer.FileTokenizer) -> dict[str, Any]:
    """What the model directory keeps of where it comes from."""
    out: dict[str, Any] = {
        "format": "gguf",
        "file": file.path.name,
        "digest": trees.file_digest(file.path),
    }
    for key in ("name", "organization", "license"):
        value = file.metadata.get(f"general.{key}")
        if isinstance(value, str):
            out[key] = value
    out["quantisations"] = file.quantisations()
    out["end_of_document"] = words.end_of_document
    out["end_of_turn"] = words.end_of_turn
    out["unknown_bytes"] = list(words.unknown_bytes)
    return out


def read_config(file: gguf_file.GgufFile) -> ModelConfig:
    """The architecture, or a RefusedError with everything that our switches cannot express."""
    found = file.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        reason = f"{found!r} is not supported, only {ARCHITECTURE!r}"
        file.refuse([("general.architecture", reason)])
    prefix = ARCHITECTURE + "."
    given = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    file.refuse(list(_reasons(given)) + _split_reasons(file.metadata))
    tokens = file.metadata.get(gguf_tokenizer.PREFIX + "tokens")
    heads = given["attention.head_count"]
    defaults = {
        "attention.head_count_kv": heads,
        "attention.key_length": given["embedding_length"] // heads,
        "rope.freq_base": 10_000.0,
        "vocab_size": len(tokens) if isinstance(tokens, list) else 0,
    }
    fields = {field: {**defaults, **given}[key] for field, key in FIELDS.items()}
    for name in ("norm_eps", "rope_theta"):
        # The decimal that was meant: 1e-5 is 9.999999747378752e-06 as a float32.
        fields[name] = float(str(np.float32(fields[name])))
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, fields["d_head"]) != fields["d_head"]:
            reason = f"{given[key]}, but the heads of queries are {fields['d_head']} wide"
            file.refuse([(prefix + key, reason)])
    try:
        return ModelConfig(
            **fields,
            norm_placement="pre",
            qk_norm="none",
            tied_embeddings=NAMES[hf_names.UNEMBED] not in file.tensors,
            # Without the norm after a pre-norm block, weights that do not sum to 1 would shrink
            # its output.
            router=RouterConfig(context="token", renormalize=True),
        )
    except ConfigError as e:
        file.refuse([("", str(e))])
        raise


def _reasons(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, reason) of settings that are missing, of a wrong type, or not computed here."""
    numbers = {*FIELDS.values(), "attention.value_length", "rope.dimension_count"}
    optional = {"attention.head_count_kv", "attention.key_length", "attention.value_length"}
    limits = {FIELDS["n_layers"]: MAX_LAYERS, FIELDS["rope_theta"]: 1e12}
    optional |= {"rope.freq_base", "vocab_size", "rope.dimension_count"}
    for key in sorted(numbers):
        real = key in (FIELDS["norm_eps"], FIELDS["rope_theta"])
        value = given.get(key)
        if value is None and key not in optional:
            yield f"{ARCHITECTURE}.{key}", "the key is missing"
        elif value is not None and type(value) is not (float if real else int):
            yield f"{ARCHITECTURE}.{key}", f"{value!r} is no {'real' if real else 'whole'} number"
        elif value is not None and not 0 < value <= limits.get(key, MAX_NUMBER):
            yield f"{ARCHITECTURE}.{key}", f"{value} is out of range"
    for key in sorted(set(given) - numbers):
        if given[key] not in NEUTRAL.get(key, ()):
            yield f"{ARCHITECTURE}.{key}", f"{str(given[key])[:60]} is not supported"


def _split_reasons(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    if metadata.get("split.count", 1) in (0, 1):
        return []
    return [("split.count", "a model in several files: join them first (llama-gguf-split --merge)")]


def _tokenizer(file: gguf_file.GgufFile, config: ModelConfig) -> gguf_tokenizer.FileTokenizer:
    words = gguf_tokenizer.build(file)
    known = tokenize.vocab_size(words.tokenizer)
    if known > config.vocab_size:
        file.refuse([("vocab_size", f"{known} tokens, but {config.vocab_size} embeddings")])
    return words


def check_tensors(file: gguf_file.GgufFile, config: ModelConfig) -> None:
    """Refuses a file whose tensors are not exactly those of the architecture."""
    wanted = {
        gguf_name(name): row.shape
        for row in hf_names.rows(hf_config.architecture_for(config), config)
        for name, _, _ in hf_names.tensors(row, config)
    }
    reasons = [(name, "the tensor is missing") for name in wanted if name not in file.tensors]
    for name, info in file.tensors.items():
        if name not in wanted:
            reasons.append((name, "this architecture has no such tensor here"))
        elif info.shape != wanted[name]:
            reasons.append((name, f"shape {list(info.shape)}, expected {list(wanted[name])}"))
    file.refuse(reasons)


def gguf_name(name: str) -> str:
    """The name in GGUF of a tensor with a name of Hugging Face."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _source(file: gguf_file.GgufFile, config: ModelConfig) -> assemble.Source:
    """Tensors under the names of Hugging Face, in its order of rows, dequantised when asked for."""
    heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}
    names = [
        name
        for row in hf_names.rows(hf_config.architecture_for(config), config)
        for name, _, _ in hf_names.tensors(row, config)
    ]

    def read(name: str, start: int, stop: int) -> np.ndarray:
        own = next((n for part, n in heads.items() if part in name), 0)
        if own:
            return half_rotation(file.tensor(gguf_name(name)), own)[start:stop]
        return file.rows(gguf_name(name), start, stop)

    return assemble.Source(dict.fromkeys(names, "float32"), read)


def half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection for a rotation of dimensions i and i + H/2, from those of 2i and 2i + 1.

    Shapes: [heads * H, D] to the same.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)

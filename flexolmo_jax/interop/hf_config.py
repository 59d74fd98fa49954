# SPDX-License-Identifier: Apache-2.0
"""config.json of Hugging Face models: which classes our switches can express, and both directions.

Source: the configuration classes of transformers 4.57 and 5.23. The two disagree about the rope
settings (4.57 reads `rope_theta` only, in silence), so a reader takes both spellings and a writer
gives both.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from flexolmo_jax import tree as trees
from flexolmo_jax.config import AdapterConfig, ModelConfig, RouterConfig
from flexolmo_jax.errors import ConfigError, Problem, RefusedError, nearest
from flexolmo_jax.typed import from_dict

NAME = "config.json"
EXTRA = "flexolmo"  # Our own key: transformers keeps unknown keys, others do not read them.
MAX_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model class of transformers, in terms of our switches.

    Attributes:
      renormalize: whether combine weights are divided by their sum: "always", or as the key
        norm_topk_prob says; None for a dense model.
      keys: our name to the name in config.json, of what not every class spells alike.
      defaults: values of keys that a file may leave out (older files do).
    """

    name: str
    model_type: str
    norm_placement: Literal["post", "pre"]
    qk_norm: Literal["full", "head", "none"]
    renormalize: Literal["always", "config"] | None = None
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def mixture(self) -> bool:
        """Whether the FFN is a mixture of experts."""
        return self.renormalize is not None

    def key(self, field: str) -> str:
        """The spelling of one of `KEYS` in this class."""
        return self.keys.get(field, KEYS[field])


KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_ffn": "intermediate_size",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "n_slots": "num_experts",
    "n_active": "num_experts_per_tok",
}
# Where the key is absent or null: as many kv heads as heads.
_MHA = {"num_key_value_heads": None}
ARCHITECTURES = (
    Architecture(
        "FlexOlmoForCausalLM",
        "flex_olmo",
        "post",
        "full",
        "config",
        defaults={"rope_theta": 500_000.0, **_MHA},
    ),
    Architecture(
        "Olmo2ForCausalLM", "olmo2", "post", "full", defaults={"rope_theta": 10_000.0, **_MHA}
    ),
    Architecture(
        "LlamaForCausalLM", "llama", "pre", "none", defaults={"rope_theta": 10_000.0, **_MHA}
    ),
    Architecture("Qwen3ForCausalLM", "qwen3", "pre", "head", defaults={"rope_theta": 10_000.0}),
    Architecture(
        "MixtralForCausalLM",
        "mixtral",
        "pre",
        "none",
        "always",
        keys={"n_slots": "num_local_experts"},
        defaults={"rope_theta": 1e6},
    ),
    Architecture(
        "OlmoeForCausalLM",
        "olmoe",
        "pre",
        "full",
        "config",
        defaults={"rope_theta": 10_000.0, **_MHA},
    ),
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        "pre",
        "head",
        "config",
        keys={"d_ffn": "moe_intermediate_size"},
        defaults={"rope_theta": 10_000.0},
    ),
    # Read only: we write the same model as Llama.
    Architecture(
        "MistralForCausalLM",
        "mistral",
        "pre",
        "none",
        defaults={"rope_theta": 1e4, "sliding_window": 4096},
    ),
    Architecture("Qwen2ForCausalLM", "qwen2", "pre", "none", defaults={"rope_theta": 1e4}),
)
# Keys that change the computation, and the values under which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "clip_qkv": (None,),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "decoder_sparse_step": (None, 1),
    "mlp_only_layers": (None, []),
    "use_sliding_window": (None, False),
}


@dataclasses.dataclass(frozen=True)
class HfModel:
    """What a config.json says.

    Attributes:
      extra: our own key, {} if another program wrote the file.
      raw: the whole file.
    """

    architecture: Architecture
    config: ModelConfig
    extra: dict[str, Any]
    raw: dict[str, Any]


def read(folder: Path | str) -> HfModel:
    """The model that folder/config.json describes.

    Raises:
      RefusedError: not a config.json, or a model that our switches cannot express, with every
        reason.
    """
    path = Path(folder) / NAME
    raw = load(path, "Not a Hugging Face model directory")
    architecture = _architecture(raw, path)
    problems = [_problem(path, key, reason) for key, reason in _reasons(architecture, raw)]
    if problems:
        raise RefusedError(f"This {architecture.name} cannot be expressed here", problems)
    try:
        config = from_dict(ModelConfig, _fields(architecture, raw), NAME)
    except (ConfigError, ArithmeticError, TypeError, ValueError) as e:
        raise RefusedError("config.json makes no model", [_problem(path, "", str(e))]) from e
    extra = raw.get(EXTRA, {})
    if not isinstance(extra, dict):
        raise RefusedError("config.json was changed", [_problem(path, EXTRA, "not an object")])
    return HfModel(architecture, config, extra, raw)


def _problem(path: Path, key: str, message: str) -> Problem:
    return Problem("hf-config", str(path), key, message)


def load(path: Path, missing: str) -> dict[str, Any]:
    """A config.json as it stands; `missing` is what its absence means.

    Raises:
      RefusedError: there is none, or it is no JSON object.
    """
    if not path.is_file():
        raise RefusedError(
            missing,
            [Problem("file-missing", str(path), "", "no config.json in this directory")],
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        value = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        # NaN, infinity and half a surrogate pair parse, but nothing could be written of them.
        trees.json_digest(value)
    except (ValueError, RecursionError) as e:
        raise RefusedError("Not a config.json", [_problem(path, "", str(e)[:200])]) from e
    return value


def _architecture(raw: Mapping[str, Any], path: Path) -> Architecture:
    names = raw.get("architectures") or []
    given = names[0] if isinstance(names, list) and names else None
    for known in ARCHITECTURES:
        if given == known.name or (given is None and raw.get("model_type") == known.model_type):
            return known
    message = f"this package has no switches for {given or raw.get('model_type')!r}"
    hint = nearest(str(given), [a.name for a in ARCHITECTURES])
    raise RefusedError(
        "An unknown model class", [_problem(path, "architectures", message)], fix=hint
    )


def _rope(architecture: Architecture, raw: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """(rope settings besides theta, theta) from either spelling."""
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    settings = {**(old if isinstance(old, dict) else {}), **(new if isinstance(new, dict) else {})}
    theta = settings.pop("rope_theta", None)
    if theta is None:
        theta = raw.get("rope_theta")
    return settings, architecture.defaults["rope_theta"] if theta is None else theta


def _value(architecture: Architecture, raw: Mapping[str, Any], field: str) -> Any:
    """What the file says about one of `KEYS`."""
    value = raw.get(architecture.key(field))
    if value is None and field == "n_slots":  # As transformers 5 writes it for Qwen3-MoE.
        value = raw.get("num_local_experts")
    return value


def _reasons(architecture: Architecture, raw: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """(key, reason) of everything in the file that our model does not compute."""
    for key, values in NEUTRAL.items():
        if raw.get(key) not in values:
            allowed = " or ".join(json.dumps(v) for v in values if v is not None) or "null"
            yield key, f"{json.dumps(raw[key])[:100]} is not supported, only {allowed}"
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key), dict | None):
            yield key, "not an object"
    settings, theta = _rope(architecture, raw)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind != "default":
        yield "rope_parameters", f"rope type {kind!r} is not supported, only 'default'"
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        yield "rope_parameters", "a rotation of some dimensions only is not supported"
    old = raw.get("rope_theta")
    if old is not None and old != theta:
        yield "rope_theta", f"{old} here, {theta} in rope_parameters"
    window = raw.get("sliding_window", architecture.defaults.get("sliding_window"))
    length = _value(architecture, raw, "max_len")
    # Qwen files name a window that use_sliding_window turns off; Mistral does not know that key.
    mistral = architecture.model_type in ("mistral", "mixtral")
    switch = None if mistral else raw.get("use_sliding_window")
    whole = isinstance(window, int) and isinstance(length, int) and window >= length
    if window is not None and switch is None and not whole:
        yield "sliding_window", f"{window} is not supported; attention here sees everything"
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        yield "layer_types", "layers other than 'full_attention' are not supported"
    for field in KEYS:
        key = architecture.key(field)
        # Qwen 3 alone has heads whose size does not follow from others.
        optional = field == "d_head" and architecture.model_type != "qwen3"
        optional |= field in ("n_slots", "n_active") and not architecture.mixture
        value = _value(architecture, raw, field)
        if value is None and not optional and key not in architecture.defaults:
            yield key, "the key is missing"


def _fields(architecture: Architecture, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig`, of types that are checked later."""

    def get(field: str) -> Any:
        return _value(architecture, raw, field)

    out = {f: get(f) for f in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ffn", "norm_eps")}
    out["n_kv_heads"] = out["n_heads"] if get("n_kv_heads") is None else get("n_kv_heads")
    out["d_head"] = get("d_head")
    if out["d_head"] is None:
        if out["d_model"] % out["n_heads"]:
            raise ValueError("hidden_size is no multiple of num_attention_heads")
        out["d_head"] = out["d_model"] // out["n_heads"]
    out["rope_theta"] = _rope(architecture, raw)[1]
    if get("max_len") > 0:  # OLMo-core writes -1: no limit is known, ours stays at its default.
        out["max_len"] = get("max_len")
    out |= {"norm_placement": architecture.norm_placement, "qk_norm": architecture.qk_norm}
    out["tied_embeddings"] = bool(raw.get("tie_word_embeddings", False))
    if architecture.mixture:
        out |= {"n_slots": get("n_slots"), "n_active": get("n_active")}
    return out | {"router": _router(architecture, raw)}


def _router(architecture: Architecture, raw: Mapping[str, Any]) -> RouterConfig:
    """The router that the file computes with, in our own words for it where these fit."""
    extra = raw.get(EXTRA)
    own = extra.get("router") if isinstance(extra, dict) else None
    given = None if own is None else from_dict(RouterConfig, own, f"{NAME}: {EXTRA}.router")
    if not architecture.mixture:
        # What experts of this anchor will be trained with. Without the norm after a pre-norm
        # block, weights that do not sum to 1 would shrink its output.
        if given:  # A file of this kind has no room for tables of evidence.
            return given.without_evidence()
        return RouterConfig(renormalize=architecture.norm_placement == "pre")
    found = RouterConfig(
        renormalize=architecture.renormalize == "always" or bool(raw.get("norm_topk_prob", False))
    )
    # With all experts active, dividing by the sum of all weights changes nothing.
    every = _value(architecture, raw, "n_slots") == _value(architecture, raw, "n_active")
    return given if given and given.context == "token" and every else found


def architecture_for(config: ModelConfig, where: str = "") -> Architecture:
    """The class that computes what a model of this configuration computes.

    Raises:
      RefusedError: there is none, with every reason.
    """
    dense = config.n_slots == 1
    switches = (config.norm_placement, config.qk_norm)
    found = [
        a
        for a in ARCHITECTURES
        if (a.norm_placement, a.qk_norm) == switches and a.mixture == (not dense)
    ]
    reasons = []
    if not found:
        kind = "a dense model" if dense else "a mixture"
        reasons.append(
            f"transformers has no class for {kind} with {switches[0]}-norm and QK norm "
            f"{switches[1]!r}"
        )
    if not dense and config.router.context != "token":
        reasons.append(
            "the router judges a document (router.context is 'document'); every class of "
            "transformers judges each token alone: train the experts with context=token"
        )
    if not dense and config.adapters != AdapterConfig():
        reasons.append(
            "its experts hold more than FFNs (model.adapters); in every "
            "class of transformers an expert is an FFN: train them beside an anchor without"
        )
    every = config.n_active == config.n_slots
    if config.router.fallback and not every:
        reasons.append(
            "the public expert is always active (router.fallback is true); in every class of "
            "transformers it competes like any other: stitch with all experts active, or from "
            "experts whose router does not fall back"
        )
    if found and found[0].renormalize == "always" and not (config.router.renormalize or every):
        reasons.append(
            f"{found[0].name} divides the combine weights by their sum, this model does not "
            "(router.renormalize is false) and has fewer active experts than experts"
        )
    narrow = config.d_head * config.n_heads != config.d_model
    if found and found[0].model_type == "olmoe" and narrow:
        reasons.append(
            f"{found[0].name} needs n_heads * d_head = d_model, here "
            f"{config.n_heads} * {config.d_head} and {config.d_model}"
        )
    if reasons:
        problems = [Problem("no-hf-class", where, "", reason) for reason in reasons]
        raise RefusedError("This model cannot be written for transformers", problems)
    return found[0]


def write(
    config: ModelConfig,
    architecture: Architecture,
    *,
    dtype: str,
    eos_id: int,
    pad_id: int | None,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json of a model with `config.n_slots` experts, for transformers 4.57, 5.x and vLLM.

    Args:
      dtype: "float32" or "bfloat16", as the weights are stored.
      extra: what goes under our own key.
    """
    out: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "torch_dtype": dtype,
        "dtype": dtype,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        # Explicit: a class fills in an id of its own, which a smaller vocabulary does not have.
        "pad_token_id": pad_id,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        EXTRA: dict(extra),
    }
    for field in KEYS:
        if architecture.mixture or field not in ("n_slots", "n_active"):
            out[architecture.key(field)] = getattr(config, field)
    if config.d_head * config.n_heads == config.d_model and architecture.qk_norm != "head":
        del out["head_dim"]  # vLLM's FlexOlmo does not know the key.
    if architecture.mixture:
        out |= {"output_router_logits": False, "router_aux_loss_coef": 0.01}
    if architecture.renormalize == "config":
        out["norm_topk_prob"] = config.router.renormalize
    if architecture.model_type == "mixtral":
        out["sliding_window"] = None
    if architecture.model_type == "qwen3_moe":
        out |= {"intermediate_size": config.d_ffn, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if architecture.model_type.startswith("qwen3"):
        out |= {"use_sliding_window": False, "sliding_window": None}
    if architecture.model_type == "llama":
        out["mlp_bias"] = False
    return out

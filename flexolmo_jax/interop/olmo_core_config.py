# SPDX-License-Identifier: Apache-2.0
"""config.json of a run of OLMo-core: which models our switches can express.

Source: configuration classes of ai2-olmo-core 2.4.0 and what its modules do where a key is missing;
the router of allenai/FlexOlmo 17360c0. Keys that only later versions write are known where they
are easily wrong.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.config import ModelConfig, RouterConfig
from flexolmo_jax.errors import ConfigError, Problem, RefusedError
from flexolmo_jax.interop import hf_config
from flexolmo_jax.typed import from_dict

NAME = hf_config.NAME
# What a key may say: () is anything, since it is read below or changes no output. Keys that are
# not listed must be null. OLMo-core's layers have a bias unless it says false.
NORM = {"name": ("rms", "fused_rms"), "bias": (False,), "elementwise_affine": (None, True)}
NORM |= dict.fromkeys(("eps", "full_precision", "dtype"), ())
ATTENTION = {
    **{"name": ("default",), "bias": (False,), "qk_norm": NORM},
    "rope": {"name": ("default",), "theta": (), "full_precision": ()},
    **dict.fromkeys(("n_heads", "n_kv_heads", "head_dim", "use_head_qk_norm"), ()),
    **dict.fromkeys(("dropout", "use_flash", "backend", "dtype"), ()),
}
FFN = {"name": ("default",), "bias": (False,), "activation": (None, "silu")}
FFN |= dict.fromkeys(("hidden_size", "dtype"), ())
ROUTER = {"name": ("default", "with_expert_bias"), "gating_function": (None, "softmax")}
ROUTER |= {"normalize_expert_weights": (None, 1.0), "uniform_expert_assignment": (None, False)}
ROUTER |= dict.fromkeys(("top_k", "jitter_eps", "dtype"), ())
LAYOUTS = {"default": "capacity", "dropless": "dropless"}
MIXTURE = {
    **{"name": tuple(LAYOUTS), "router": ROUTER},
    **dict.fromkeys(("num_experts", "hidden_size", "dtype"), ()),
    "capacity_factor": (),  # Beyond it tokens lose an expert there; here none does.
    **dict.fromkeys(("lb_loss_weight", "lb_loss_granularity", "z_loss_weight"), ()),
    "scale_loss_by_num_layers": (),
}
PLACEMENTS = {"default": "pre", "reordered_norm": "post"}
PLACEMENTS |= {"moe": "pre", "moe_reordered_norm": "post"}
BLOCK = {"name": tuple(PLACEMENTS), "attention": ATTENTION, "layer_norm": NORM, "dropout": ()}
HEAD = {"name": ("default",), "bias": (False,), "layer_norm": NORM}
HEAD |= dict.fromkeys(("dtype", "loss_implementation"), ())
MODEL = {
    **{"name": ("default", "moe"), "block": BLOCK, "lm_head": HEAD},
    **{"tie_word_embeddings": (None, False), "embed_scale": (None, 1.0)},
    **dict.fromkeys(("d_model", "vocab_size", "n_layers", "dtype", "freeze_params"), ()),
    **dict.fromkeys(("init_method", "init_seed", "init_std", "embedding_init_std"), ()),
    # How older versions ran it.
    **dict.fromkeys(("compile", "dp_config", "tp_config", "ac_config", "float8_config"), ()),
}
EPS = 1e-5  # Of a norm that names none.


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What the config.json of a run says.

    Attributes:
      layout: "dense"; or how the tensors of a mixture lie, "capacity" or "dropless".
      biased: the router has an expert bias.
    """

    found: hf_config.HfModel
    layout: str
    biased: bool


def read(src: Path) -> Checkpoint:
    """The model that a run's config.json describes.

    Raises:
      RefusedError: not such a file, or a model that our switches cannot express, with every
        reason.
    """
    path = src / NAME
    raw = hf_config.load(path, "Not the directory of a run of OLMo-core")
    given = raw.get("model")
    if not isinstance(given, dict):
        raise _refused(path, [("model", "no object with this key: not the config of a run")])
    block = given.get("block")
    block = dict(block) if isinstance(block, dict) else {}
    if "sequence_mixer" in block:  # As later versions spell it.
        block["attention"] = block.pop("sequence_mixer")
    mixture = str(block.get("name")).startswith("moe")
    ffn = {"feed_forward_moe": MIXTURE} if mixture else {"feed_forward": FFN}
    reasons = list(_reasons("model", {**given, "block": block}, {**MODEL, "block": BLOCK | ffn}))
    if reasons:
        raise _refused(path, reasons)
    try:
        config = from_dict(ModelConfig, _fields(given, block, raw.get("dataset")), NAME)
    except (ConfigError, ArithmeticError, TypeError, ValueError) as e:
        raise _refused(path, [("", str(e))]) from e
    architecture = hf_config.Architecture(
        "OLMo-core",
        "olmo_core",
        config.norm_placement,
        config.qk_norm,
        "config" if mixture else None,
    )
    found = hf_config.HfModel(architecture, config, {}, raw)
    if not mixture:
        return Checkpoint(found, "dense", False)
    moe = block["feed_forward_moe"]
    return Checkpoint(found, LAYOUTS[moe["name"]], moe["router"]["name"] == "with_expert_bias")


def _refused(path: Path, reasons: Sequence[tuple[str, str]]) -> RefusedError:
    problems = [Problem("olmo-core-config", str(path), key, reason) for key, reason in reasons]
    return RefusedError("This run of OLMo-core cannot be expressed here", problems)


def _reasons(
    path: str, given: Mapping[str, Any], table: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """(key, reason) of everything in the file that our model does not compute."""
    for key in [*table, *(key for key in given if key not in table and key != "_CLASS_")]:
        accepted, value, where = table.get(key, (None,)), given.get(key), f"{path}.{key}"[:200]
        if not isinstance(accepted, dict):
            if accepted and value not in accepted:
                allowed = " or ".join(json.dumps(v) for v in accepted)
                yield where, f"{json.dumps(value)[:100]} is not supported, only {allowed}"
        elif isinstance(value, dict):
            yield from _reasons(where, value, accepted)
        elif value is not None or key != "qk_norm":
            yield where, "no object with this key"


def _fields(given: Mapping[str, Any], block: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """The fields of `ModelConfig`, of types that are checked later."""
    attention, norm = block["attention"], block["attention"].get("qk_norm")
    out = {key: given.get(key) for key in ("d_model", "vocab_size", "n_layers")}
    out["n_heads"] = heads = attention.get("n_heads")
    out["n_kv_heads"] = heads if attention.get("n_kv_heads") is None else attention["n_kv_heads"]
    out["d_head"] = attention.get("head_dim")
    if out["d_head"] is None:
        if out["d_model"] % heads:
            raise ValueError("d_model is no multiple of n_heads")
        out["d_head"] = out["d_model"] // heads
    whole = "head" if attention.get("use_head_qk_norm") else "full"
    out |= {"norm_placement": PLACEMENTS[block["name"]], "qk_norm": whole if norm else "none"}
    out["rope_theta"] = attention["rope"].get("theta")
    norms = [block["layer_norm"], given["lm_head"]["layer_norm"], *([norm] if norm else [])]
    epsilons = {EPS if n.get("eps") is None else n["eps"] for n in norms}
    if len(epsilons) > 1:
        raise ValueError(f"norms with different eps: {sorted(epsilons)}")
    (out["norm_eps"],) = epsilons
    if isinstance(data, dict) and data.get("sequence_length") is not None:
        out["max_len"] = data["sequence_length"]
    moe = block.get("feed_forward_moe")
    if moe is None:
        router = RouterConfig(renormalize=out["norm_placement"] == "pre")
        return out | {"d_ffn": block["feed_forward"].get("hidden_size"), "router": router}
    router = RouterConfig(renormalize=moe["router"].get("normalize_expert_weights") is not None)
    out |= {"d_ffn": moe.get("hidden_size"), "n_slots": moe.get("num_experts")}
    return out | {"n_active": moe["router"].get("top_k"), "router": router}

# SPDX-License-Identifier: Apache-2.0
"""What the experiment files share: argument strings, model sizes and training recipes."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from flexolmo_jax.config import DataConfig, ExecConfig, OptimConfig, RouterInitConfig, RunConfig
from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.model import NO_BIAS

# The domains of the demo: anyone may train on the public ones, each closed one has its owner.
PUBLIC = ("howto", "wiki", "techdocs")
CLOSED = ("code", "news", "legal", "academic")

# ---- The numbers of the tiny recipes, all of them (how they were found: LOG.md). --------------
TINY_STEPS = {"anchor": 1200, "expert": 250, "router": 100, "joint": 1200, "dense": 250}
TINY_BATCH = {"batch_rows": 8, "seq_len": 256}
TINY_OPTIM = {
    "anchor": {"peak_lr": 4e-3, "warmup_steps": 100, "weight_decay": 0.1},
    "expert": {
        "peak_lr": 2e-3,
        "warmup_steps": 25,
        "weight_decay": 0.0,
        "router_z_loss": 0.0,
        "router_label_loss": 1.0,
    },
    "dense": {"peak_lr": 2e-3, "warmup_steps": 25, "weight_decay": 0.1},
    "router": {"peak_lr": 2e-3, "warmup_steps": 10},
    "joint": {
        "peak_lr": 4e-3,
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "load_balance": 0.01,
    },
}
# Public text in an expert's batches is what teaches its router row where to be quiet. Beside tables
# of evidence, which know that already, a little will do; rows that judge alone had a quarter when
# they were tuned (LOG.md).
TINY_PUBLIC_SHARE = 1 / 16
TINY_ROUTER = {
    "context": "document",
    "renormalize": False,
    "evidence": 8.0,
    "evidence_parts": len(PUBLIC),
    "evidence_pairs": 1 << 16,
}
NO_EVIDENCE = {"evidence": 0.0, "evidence_parts": 0, "evidence_pairs": 0}
TINY_ADAPTERS = {"head": 64}
TINY_ROUTER_INIT = {"method": "auto", "documents": 192}

# ---- Tuning an expert of SmolLM2-135M on a CPU: the paper's recipe, scaled down. ---------------
# A thousand tokens per step, a learning rate for weights that are finished rather than new, and no
# expert bias: Hugging Face files, where such a model is to be exported to, have none.
TUNE_BATCH = {"batch_rows": 4, "seq_len": 256}
_TUNE = {"peak_lr": 3e-4, "warmup_steps": 5, "total_steps": 200, "weight_decay": 0.0}
TUNE_OPTIM = {
    "expert": _TUNE,
    "dense": _TUNE,
    "router": {**_TUNE, "peak_lr": 2e-3},
    "joint": {**_TUNE, "load_balance": 0.01},
}
TUNE_ROUTER_INIT = {"bias": NO_BIAS}

# ---- The paper's recipe (its section 4 and the reference scripts), for every other size. ------
# 4.19M tokens per step. The anchor's cosine is laid out for 5T tokens and stopped at 1T.
PAPER_BATCH = {"batch_rows": 1024, "seq_len": 4096}
PAPER_OPTIM = {
    "anchor": {
        "peak_lr": 9e-4,
        "warmup_steps": 2000,
        "total_steps": 1_192_093,
        "stop_step": 238_419,
        "weight_decay": 0.1,
    },
    "expert": {
        "peak_lr": 9e-4,
        "warmup_steps": 2000,
        "total_steps": 11_921,
        "weight_decay": 0.0,
    },
    "dense": {
        "peak_lr": 9e-4,
        "warmup_steps": 2000,
        "total_steps": 11_921,
        "weight_decay": 0.1,
    },
    # 5B tokens of proxies and public text in batches of 0.52M; the mixture keeps the anchor's.
    "router": {
        "peak_lr": 2e-3,
        "warmup_steps": 100,
        "total_steps": 9537,
        "weight_decay": 0.1,
    },
    "joint": {
        "peak_lr": 9e-4,
        "warmup_steps": 2000,
        "total_steps": 11_921,
        "weight_decay": 0.1,
        "load_balance": 0.01,
    },
}
PAPER_ROUTER_ROWS = 128


def parse_arg(arg: str, **defaults: bool | int | float | str) -> ConfigDict:
    """Reads "size=tiny,expert=code"; each value gets the type of its default.

    Raises:
      ConfigError: an unknown or repeated key, or a value of another type.
    """
    values: dict[str, Any] = dict(defaults)
    seen = set()
    for item in filter(None, arg.split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise ConfigError(
                "Unknown key in the argument of an experiment file",
                got=key,
                where=arg,
                fix=nearest(key, defaults),
            )
        if not equals or key in seen:
            fault = "is given twice" if key in seen else "has no value"
            raise ConfigError(f"The key {key!r} {fault}", where=arg)
        seen.add(key)
        values[key] = _typed(text, defaults[key], key)
    return ConfigDict(values)


def _typed(text: str, default: bool | int | float | str, key: str) -> Any:
    """`text` as a value of the type of `default`."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            "Wrong type in the argument of an experiment file",
            got=f"{key}={text}",
            expected=kind.__name__,
        ) from error


def _dense(d_model: int, n_layers: int, n_heads: int, d_ffn: int, **other: Any) -> dict[str, Any]:
    """Fields of a dense OLMo 2 model with full multi-head attention."""
    fields = {
        "vocab_size": 100_352,
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "d_head": d_model // n_heads,
        "d_ffn": d_ffn,
        "max_len": 4096,
    }
    return {**fields, **other}


def sizes() -> dict[str, dict[str, Any]]:
    """Fields of `ModelConfig` by size; 1b and 7b are OLMo 2 1B and 7B, 135m is SmolLM2-135M."""
    return {
        "tiny": _dense(128, 4, 4, 352, vocab_size=4096, max_len=256),
        "135m": _dense(
            *(576, 30, 9, 1536),
            n_kv_heads=3,
            vocab_size=49_152,
            max_len=8192,
            rope_theta=100_000.0,
            norm_eps=1e-5,
            norm_placement="pre",
            qk_norm="none",
            tied_embeddings=True,
        ),
        "60m": _dense(384, 8, 6, 1536),
        "190m": _dense(768, 12, 12, 3072),
        "1b": _dense(2048, 16, 16, 8192),
        "7b": _dense(4096, 32, 32, 11_008),
    }


def stitched_sizes() -> dict[str, dict[str, Any]]:
    """Fields of stitched models: the dense size, slots (public expert included), active experts."""
    shapes = {
        "tiny": ("tiny", 5, 2),
        "2x7b": ("7b", 2, 2),
        "8x7b": ("7b", 8, 4),
        "8x1b": ("1b", 8, 4),
    }
    dense = sizes()
    return {
        name: {**dense[size], "n_slots": slots, "n_active": active}
        for name, (size, slots, active) in shapes.items()
    }


def finished_sizes() -> dict[str, dict[str, Any]]:
    """Sizes whose recipes a mixture that exists already may go on with."""
    return {**sizes(), **stitched_sizes()}


def pick(table: dict[str, dict[str, Any]], size: str) -> dict[str, Any]:
    """Looks a size up.

    Raises:
      ConfigError: names the nearest valid size.
    """
    if size not in table:
        raise ConfigError("Unknown size", got=size, fix=nearest(size, table))
    return table[size]


def planned_model(table: dict[str, dict[str, Any]], arg: str) -> dict[str, Any]:
    """Fields of `ModelConfig` of the size in an argument whose other keys do not matter here."""
    given = dict(item.split("=", 1) for item in arg.split(",") if "=" in item)
    size = given.get("size", "tiny")
    return {**pick(table, size), "router": router(size), "adapters": adapters(size)}


def router(size: str) -> dict[str, Any]:
    """Fields of `RouterConfig` of a size, dense or stitched."""
    if size == "tiny":
        return dict(TINY_ROUTER)
    fields = finished_sizes()[size]
    # Without the norm after a pre-norm block, weights that do not sum to 1 shrink its output.
    return {"context": "token", "renormalize": fields.get("norm_placement") == "pre"}


def adapters(size: str) -> dict[str, Any]:
    """Fields of `AdapterConfig` of a size: what experts hold beyond FFNs."""
    return dict(TINY_ADAPTERS) if size == "tiny" else {}


def base(stage: str, size: str, recipe: str = "") -> ConfigDict:
    """A configuration with every key of `RunConfig` and the recipe of this stage and size.

    Args:
      recipe: whose numbers to take, where a stage serves two purposes; "" is the stage's own.
    """
    recipe = recipe or stage
    fields = {f.name: f.default for f in dataclasses.fields(RunConfig)}
    fields["stage"] = stage
    for name, cls in (("data", DataConfig), ("exec", ExecConfig)):
        fields[name] = dataclasses.asdict(cls())
    fields["router_init"] = dataclasses.asdict(RouterInitConfig())
    tiny, tune = size == "tiny", size == "135m" and recipe in TUNE_OPTIM
    optim = (TINY_OPTIM if tiny else TUNE_OPTIM if tune else PAPER_OPTIM)[recipe]
    steps = {"total_steps": TINY_STEPS[recipe]} if tiny else {}
    fields["optim"] = dataclasses.asdict(OptimConfig(**{**optim, **steps}))
    fields["data"].update(TINY_BATCH if tiny else TUNE_BATCH if tune else PAPER_BATCH)
    if stage == "router" and not (tiny or tune):
        fields["data"]["batch_rows"] = PAPER_ROUTER_ROWS
    if tiny:
        fields["exec"].update(compute_dtype="float32")
        fields["router_init"].update(TINY_ROUTER_INIT)
        fields.update(log_every=10, eval_every=250, eval_rows=16, checkpoint_every=200)
    elif tune:
        fields["exec"].update(compute_dtype="float32")
        fields["router_init"].update(TUNE_ROUTER_INIT)
        fields.update(log_every=5, eval_every=20, eval_rows=16, checkpoint_every=50)
    else:
        fields["exec"].update(remat="outputs" if size.endswith(("1b", "7b")) else "dots")
        fields.update(log_every=10, eval_every=1000, checkpoint_every=1000)
    return ConfigDict(fields)


def source(path: str, *, weight: float = 1.0, public: bool = False) -> dict[str, Any]:
    """One token-shard directory of a mixture."""
    return {"path": path, "weight": weight, "public": public}

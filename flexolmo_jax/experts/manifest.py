# SPDX-License-Identifier: Apache-2.0
"""flexolmo.json: what a slice or a model says about itself, read strictly and written canonically.

The file carries the digest of its own other keys and must be, byte for byte, our rendering of what
it says: no changed bit, twice-written key or unknown field goes through. (A signature says who
wrote it; the digest only says that it is whole.)
"""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax import tree as trees
from flexolmo_jax.config import EXPERT_ID, ModelConfig
from flexolmo_jax.errors import ConfigError, Problem, RefusedError
from flexolmo_jax.files import PART, write_text
from flexolmo_jax.typed import from_dict

NAME = "flexolmo.json"
SCHEMA = 1
# Of a model with links; a program that knows none must not take it for a whole one.
LINKED_SCHEMA = 2
MAX_BYTES = 16 << 20
MAX_DEPTH = 16
DTYPES = {"float32": 4, "bfloat16": 2}
PUBLIC = "public"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
LEAF = re.compile(r"[a-z0-9_]{1,63}(/[a-z0-9_]{1,63}){0,7}")
# Names under which training state travels; none of it may leave its owner.
LEFTOVER = re.compile(
    r"opt|optim|optimizer|opt_state|adam|adamw|mu|nu|moments?|ema|rng|prng|key|seed_state"
    r"|iter|iterator|data_iter|data_iterator|loader|train_state|checkpoints?"
)
SLICE_KEYS = ("kind", "schema", "digest", "expert", "anchor_digest", "architecture_digest")
SLICE_KEYS += ("tokenizer_digest", "leaves", "files", "data_card", "training", "recipe")
MODEL_KEYS = ("kind", "schema", "digest", "model", "tokenizer_digest", "slots", "shared", "files")
MODEL_KEYS += ("training", "anchor_digest", "model_digest")
# Names in the links of a model: its shared weights, and the slice of an expert.
SHARED_LINK, EXPERT_LINK = "shared", "experts/"
MAX_LINK = 4096


def is_leftover(name: str) -> bool:
    """Whether a path or leaf name looks like optimizer, random-number or iterator state."""
    parts = re.split(r"[/.]", name.lower())
    return any(LEFTOVER.fullmatch(part) for part in parts)


def render(value: Mapping[str, Any]) -> str:
    """The one way in which a flexolmo.json is written."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with the digest of its other keys."""
    content = {k: v for k, v in value.items() if k != "digest"}
    return {**content, "digest": trees.json_digest(content)}


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The digest by which a model's slot table names a manifest."""
    return trees.json_digest(manifest)


def write(folder: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Seals and writes folder/flexolmo.json; returns the sealed value.

    Raises:
      RefusedError: it would be larger than `read` takes.
    """
    sealed = seal(value)
    text = render(sealed)
    if len(text.encode()) > MAX_BYTES:
        problem = _bad(folder / NAME, f"larger than {MAX_BYTES} bytes")
        raise RefusedError("What the manifest should say is too long", [problem])
    write_text(folder / NAME, text)
    return sealed


def architecture(config: ModelConfig) -> dict[str, Any]:
    """What every model of one anchor shares: the config without slots and router."""
    drop = ("n_slots", "n_active", "router")
    return {k: v for k, v in config.to_json().items() if k not in drop}


def architecture_digest(config: ModelConfig) -> str:
    """Digest of `architecture`."""
    return trees.json_digest(architecture(config))


def leaf_digests(table: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Leaf name to digest alone."""
    return {name: entry["digest"] for name, entry in table.items()}


def read(folder: Path, kind: str | None = None) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Parses and validates folder/flexolmo.json; None with problems if it must not be used.

    Args:
      kind: "slice" or "model"; None accepts both.
    """
    path = folder / NAME
    if folder.is_symlink() or path.is_symlink():
        return None, [Problem("symlink", str(path), "", "symbolic links are not followed")]
    if not path.is_file():
        return None, [Problem("file-missing", str(path), "", "no flexolmo.json in this directory")]
    if path.stat().st_size > MAX_BYTES:
        return None, [_bad(path, f"larger than {MAX_BYTES} bytes")]
    return parse(path.read_bytes(), str(path), kind)


def parse(
    data: bytes, where: str, kind: str | None = None
) -> tuple[dict[str, Any] | None, list[Problem]]:
    """`read` of bytes that came from `where`."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
        problems = check(value, where, kind)
        if not problems and text != render(value):
            problems = [_bad(where, "not written as this package writes it; the file was changed")]
    except (ValueError, RecursionError) as e:
        # Not only from the parser: 1e999 and half a surrogate pair parse, but have no rendering.
        return None, [_bad(where, f"not JSON: {str(e)[:200]}")]
    return (None, problems) if problems else (value, [])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _bad(path: object, message: str) -> Problem:
    return Problem("manifest-schema", str(path), "", message)


def check(value: Any, path: str, kind: str | None = None) -> list[Problem]:
    """Every way in which a parsed flexolmo.json breaks its schema."""
    if not isinstance(value, dict) or value.get("kind") not in ("slice", "model"):
        return [_bad(path, 'not an object with "kind" "slice" or "model"')]
    if kind and value["kind"] != kind:
        return [_bad(path, f"a {value['kind']}, where a {kind} is needed")]
    schemas = (SCHEMA,) if value["kind"] == "slice" else (SCHEMA, LINKED_SCHEMA)
    if value.get("schema") not in schemas or isinstance(value.get("schema"), bool):
        known = " and ".join(map(str, schemas))
        return [_bad(path, f"schema {value.get('schema')!r}; this version reads {known}")]
    keys = SLICE_KEYS if value["kind"] == "slice" else MODEL_KEYS
    if value["schema"] == LINKED_SCHEMA:
        keys += ("links",)
    wrong = [f"no key {k!r}" for k in keys if k not in value]
    wrong += [f"unknown key {k!r}" for k in sorted(set(value) - set(keys))]
    if wrong:
        return [_bad(path, message) for message in wrong]
    if _depth(value) > MAX_DEPTH:
        return [_bad(path, f"nested deeper than {MAX_DEPTH}")]
    check_kind = _check_slice if value["kind"] == "slice" else _check_model
    problems = check_kind(value, path)
    if not problems and value != seal(value):
        problems = [_bad(path, "its digest does not match its content")]
    return problems


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:  # No recursion: what is too deep for Python must be named too.
        inner = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [item for items in inner for item in items]
        depth += 1
    return depth


def _digest_problems(value: Mapping[str, Any], keys: str, path: str) -> list[Problem]:
    out = []
    for key in keys.split():
        if not (isinstance(value[key], str) and DIGEST.fullmatch(value[key])):
            out.append(_bad(path, f"{key} is not a SHA-256 digest"))
    return out


def _check_slice(value: dict[str, Any], path: str) -> list[Problem]:
    out = _digest_problems(value, "digest architecture_digest tokenizer_digest", path)
    if not is_slug(value["expert"]):
        out.append(Problem("bad-id", path, "", f"expert id {value['expert']!r} is not a slug"))
    if value["anchor_digest"] is None:
        if value["expert"] != PUBLIC:
            out.append(_bad(path, "only the public expert comes without an anchor digest"))
    else:
        out += _digest_problems(value, "anchor_digest", path)
    out += _check_leaves(value["leaves"], path)
    out += _check_files(value["files"], path, ("params/",))
    for key in ("data_card", "training", "recipe"):
        if not isinstance(value[key], dict):
            out.append(_bad(path, f"{key} is not an object"))
    if not out:
        out += _check_training(value["training"], path)
    return out


def _check_training(training: dict[str, Any], path: str) -> list[Problem]:
    if set(training) != {"steps", "tokens", "seed"}:
        return [_bad(path, "training must hold exactly steps, tokens and seed")]
    return [
        _bad(path, f"training.{key} is not a whole number from 0")
        for key, number in training.items()
        if not is_count(number)
    ]


def is_count(value: Any) -> bool:
    """A whole number from 0 that other languages can read too."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def is_slug(value: Any) -> bool:
    """Whether a value may be an expert id."""
    return isinstance(value, str) and bool(EXPERT_ID.fullmatch(value))


def _check_leaves(leaves: Any, path: str) -> list[Problem]:
    if not isinstance(leaves, dict) or not leaves:
        return [_bad(path, "the table of leaves is not a filled object")]
    out = []
    for name, entry in leaves.items():
        if not LEAF.fullmatch(name):
            out.append(_bad(path, f"leaf name {name!r} is outside the grammar"))
        elif not isinstance(entry, dict) or set(entry) != {"shape", "dtype", "digest"}:
            out.append(_bad(path, f"leaf {name} needs exactly shape, dtype and digest"))
        else:
            out += _check_leaf(name, entry, path)
    return out


def _check_leaf(name: str, entry: dict[str, Any], path: str) -> list[Problem]:
    shape, dtype, digest = entry["shape"], entry["dtype"], entry["digest"]
    out = []
    if not (isinstance(shape, list) and len(shape) <= 8 and all(map(is_count, shape))):
        out.append(Problem("leaf-shape", path, name, f"{shape!r} is not a shape"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        out.append(Problem("leaf-dtype", path, name, f"{dtype!r} is none of {', '.join(DTYPES)}"))
    if not (isinstance(digest, str) and DIGEST.fullmatch(digest)):
        out.append(_bad(path, f"the digest of leaf {name} is not a SHA-256 digest"))
    return out


def _check_files(files: Any, path: str, roots: tuple[str, ...]) -> list[Problem]:
    if not isinstance(files, dict) or not files:
        return [_bad(path, "the table of files is not a filled object")]
    out = []
    folded: dict[str, str] = {}
    for name, digest in files.items():
        if not is_safe_path(name):
            out.append(Problem("bad-path", path, "", f"file path {name!r} is outside the grammar"))
        elif not any(name == r or (r[-1] == "/" and name.startswith(r)) for r in roots):
            code = "leftover-state" if is_leftover(name) else "file-extra"
            out.append(Problem(code, path, "", f"lists {name!r}, which does not belong here"))
        if name.casefold() in folded:
            message = f"{name!r} and {folded[name.casefold()]!r} are one file on some systems"
            out.append(Problem("bad-path", path, "", message))
        folded[name.casefold()] = name
        if not (isinstance(digest, str) and DIGEST.fullmatch(digest)):
            out.append(_bad(path, f"the digest of {name!r} is not a SHA-256 digest"))
    return out


def is_safe_path(name: str) -> bool:
    """Relative, forward slashes, ASCII, no "..": cannot point outside its directory."""
    parts = name.split("/")
    return len(parts) <= 8 and all(PART.fullmatch(part) for part in parts)


def _check_model(value: dict[str, Any], path: str) -> list[Problem]:
    out = _digest_problems(value, "digest tokenizer_digest anchor_digest model_digest", path)
    out += _check_leaves(value["shared"], path)
    out += _check_files(value["files"], path, ("shared/", "tokenizer/", "tokenizer.json"))
    if not isinstance(value["training"], dict):
        out.append(_bad(path, "training is not an object"))
    config = parse_config(value["model"])
    if isinstance(config, str):
        return [*out, _bad(path, config)]
    out += _check_slots(value["slots"], config, path)
    if not out:
        out += _check_links(value, path)
    if not out:
        expected = model_digest(value["anchor_digest"], config, value["slots"])
        if expected != value["model_digest"]:
            out.append(_bad(path, "model_digest does not match anchor, config and slots"))
    return out


def parse_config(value: Any) -> ModelConfig | str:
    """The ModelConfig of a flexolmo.json, or what is wrong with it."""
    if not isinstance(value, dict):
        return "model is not an object"
    try:
        config = from_dict(ModelConfig, value, "model")
    except ConfigError as e:
        return str(e)
    if config.to_json() != value:
        return "model does not list exactly the keys of this version's ModelConfig"
    sizes = [v for v in config.to_json().values() if isinstance(v, int)]
    sizes += [config.adapters.attention, config.adapters.head]
    if max(sizes) > 1 << 24 or max(config.n_slots, config.router.evidence_parts) > 1 << 12:
        return "model has sizes beyond any machine"
    return config


def _check_slots(slots: Any, config: ModelConfig, path: str) -> list[Problem]:
    if not isinstance(slots, list) or not slots:
        return [_bad(path, "slots is not a filled list")]
    out = []
    for row in slots:
        if not isinstance(row, dict) or set(row) != {"slot", "expert", "manifest_digest"}:
            return [_bad(path, "a slot needs exactly slot, expert and manifest_digest")]
        if not is_count(row["slot"]) or row["slot"] >= config.n_slots:
            out.append(_bad(path, f"slot {row['slot']!r} is outside 0..{config.n_slots - 1}"))
        if not is_slug(row["expert"]):
            out.append(Problem("bad-id", path, "", f"expert id {row['expert']!r} is not a slug"))
        out += _digest_problems(row, "manifest_digest", path)
    if out:
        return out
    numbers, ids = [r["slot"] for r in slots], [r["expert"] for r in slots]
    if numbers != sorted(set(numbers)) or len(set(ids)) != len(ids):
        out.append(_bad(path, "slots must be sorted, each slot and each expert once"))
    if slots[0] != {**slots[0], "slot": 0, "expert": PUBLIC} or PUBLIC in ids[1:]:
        out.append(_bad(path, "slot 0, and only it, must hold the public expert"))
    return out


def _check_links(value: Mapping[str, Any], path: str) -> list[Problem]:
    """Parts of a model that lie elsewhere: a relative path each."""
    links = value.get("links")
    if value["schema"] == SCHEMA:
        return []
    if not isinstance(links, dict) or not links:
        return [_bad(path, "links is not a filled object")]
    parts = {SHARED_LINK, *(EXPERT_LINK + row["expert"] for row in value["slots"])}
    out = []
    for name, target in links.items():
        if name not in parts:
            out.append(_bad(path, f"links {name!r}, which is no part of the model"))
        if not (isinstance(target, str) and is_link(target)):
            message = f"the link of {name!r} is no relative path that leads out of the model"
            out.append(Problem("bad-path", path, "", message))
    return out


def is_link(target: str) -> bool:
    """A relative path with forward slashes: first up by "..", then down by plain names."""
    parts = target.split("/")
    down = list(itertools.dropwhile(lambda part: part == "..", parts))
    plain = all(part.strip(". ") and part.isprintable() and "\\" not in part for part in down)
    return len(target) <= MAX_LINK and parts[0] == ".." and bool(down) and plain


def anchor_digest(
    config: ModelConfig,
    tokenizer_digest: str,
    shared: Mapping[str, Mapping[str, Any]],
    public: Mapping[str, Mapping[str, Any]],
) -> str:
    """Identity of an anchor: equal for it and for every model stitched from it.

    Args:
      shared, public: leaf tables of the shared weights and of the public slice.
    """
    return trees.json_digest(
        {
            "architecture": architecture(config),
            "tokenizer_digest": tokenizer_digest,
            "shared": leaf_digests(shared),
            "public": leaf_digests(public),
        }
    )


def model_digest(anchor: str, config: ModelConfig, slots: list[dict[str, Any]]) -> str:
    """Identity of a model: anchor, config and slot table."""
    return trees.json_digest({"anchor_digest": anchor, "model": config.to_json(), "slots": slots})

# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as an anchor (dense models) or a model (mixtures).

Names, shapes and the tokenizer are checked before anything is written, and everything wrong is
reported at once. Then each tensor is read once, turned and written; one of them and a few blocks
are all that is in memory. A directory that `hf_export` wrote gives back the model it was made from.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexolmo_jax import tree as trees
from flexolmo_jax.data import tokenize
from flexolmo_jax.errors import ConfigError, Problem, RefusedError
from flexolmo_jax.experts import leafio, model_dir, model_info
from flexolmo_jax.experts import manifest as manifests
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.interop import assemble, hf_config, hf_extra, hf_names
from flexolmo_jax.interop import safetensors_files as files
from flexolmo_jax.interop.hf_config import HfModel

MAX_COMPANION = 64 << 20
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
COMPANIONS += ("generation_config.json",)
CHAT_TEMPLATE = re.compile(r"chat_template[A-Za-z0-9_-]{0,64}\.(jinja|json|txt)")
# Frequencies that every program computes itself; some old files hold them.
KNOWN_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
NO_TRAINING = {"steps": 0, "tokens": 0, "seed": 0}
Entries = Mapping[str, files.Entry]


def import_hf(
    src: str | Path,
    out: str | Path,
    *,
    dtype: str = "keep",
    experts: Sequence[str] | None = None,
    tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """Writes the model in a Hugging Face directory as a model directory.

    Args:
      dtype: "float32", "bfloat16", or "keep": as stored, float16 as float32.
      experts: ids in the order of the file, the first one "public"; None takes those that the file
        names itself, else expert1, expert2, ...
      tokenizer: a tokenizer.json or a folder with one; None takes the one of the directory.

    Returns:
      kind, path, architecture, experts, dtypes, tensors, bytes, restored (whether this is exactly
      the model that was exported; None if the file does not say), digests.

    Raises:
      RefusedError: a model that cannot be expressed, files that cannot be read, tensors that are
        missing, too many or misshapen: everything at once.
      DataError: a tokenizer that cannot be used.
    """
    src = Path(src)
    files.own_file(src, hf_config.NAME)  # Refuses a link out of the directory.
    found = hf_config.read(src)
    entries = files.read_folder(src)
    require_tensors(_tensor_problems(found, entries, src))
    return write(
        found,
        entries,
        _source(found, entries),
        src,
        out,
        _training(found),
        dtype=dtype,
        experts=experts,
        tokenizer=tokenizer,
    )


def write(
    found: HfModel,
    entries: Entries,
    source: assemble.Source,
    src: Path,
    out: str | Path,
    training: Mapping[str, Any],
    *,
    dtype: str,
    experts: Sequence[str] | None,
    tokenizer: str | Path | None,
    small: Sequence[Mapping[str, np.ndarray]] = (),
) -> dict[str, Any]:
    """The half of `import_hf` after all checks of tensors.

    Args:
      source: what `assemble.leaves` reads, in the end from `entries`.
      training: the free facts of the model.
      small: per slot, leaves that `source` has no tensor for; kept in their dtype by "keep".
    """
    members = _members(found, src, experts)
    tokenizer_path, companions = _tokenizer(src, found, tokenizer)
    shared, slots = assemble.leaves(found.architecture, found.config, source, dtype)
    common = _common(source, dtype)
    for leaves, more in zip(slots, small, strict=False):
        kept = {n: x if dtype == "keep" else x.astype(common) for n, x in more.items()}
        leaves |= {name: leafio.Leaf.of(x) for name, x in kept.items()}
    trees_of_slots = _with_small_leaves(src, found, members, slots, common)
    public, *others = zip(members, trees_of_slots, strict=True)
    info = model_dir.write_model(
        out,
        found.config,
        trees.unflatten(shared),
        public[1],
        tokenizer_path,
        training,
        experts=[dataclasses.replace(member, leaves=leaves) for member, leaves in others],
        companions=companions,
    )
    said = found.extra.get("model_digest") if found.extra.get("complete") is True else None
    return {
        "kind": "model",
        "path": str(out),
        "architecture": found.architecture.name,
        "experts": list(info.slots),
        "dtypes": sorted({e["dtype"] for e in _tables(info)}),
        "tensors": len(entries),
        "bytes": sum(entry.nbytes for entry in entries.values()),
        "restored": None if said is None else said == info.model_digest,
        "digests": {"anchor_digest": info.anchor_digest, "model_digest": info.model_digest},
    }


def require_tensors(found: Iterable[Problem]) -> None:
    """Raises a RefusedError with what is wrong with the tensors, if anything is."""
    problems = list(found)
    if problems:
        raise RefusedError("The tensors are not those of the model in config.json", problems)


def _tables(info: model_info.ModelInfo) -> Iterator[Mapping[str, Any]]:
    yield from info.content["shared"].values()
    piece, _ = model_info.member_info(info, manifests.PUBLIC)
    yield from piece.manifest["leaves"].values() if piece else ()


def _members(found: HfModel, src: Path, given: Sequence[str] | None) -> list[model_dir.Member]:
    """The experts of the file in its order, still without leaves."""
    count = found.config.n_slots
    listed = _listed(found, src)
    names = [row["id"] for row in listed]
    if given is not None and names and list(given) != names:
        raise ConfigError(
            "The file names its experts itself",
            got=",".join(given),
            expected=",".join(names),
            where="--experts",
        )
    names = names or list(given or [manifests.PUBLIC, *(f"expert{i}" for i in range(1, count))])
    if len(names) != count or names[0] != manifests.PUBLIC:
        raise ConfigError(
            "The names do not fit the experts of the file",
            got=",".join(names),
            expected=f"{count} names, the first one {manifests.PUBLIC}",
            where="--experts",
        )
    recipe = {"router": found.config.to_json()["router"]}
    rows = listed or [{"training": NO_TRAINING, "recipe": recipe, "data_card": {}}] * count
    return [
        model_dir.Member(name, {}, row["training"], row["recipe"], row["data_card"])
        for name, row in zip(names, rows, strict=True)
    ]


def _listed(found: HfModel, src: Path) -> list[dict[str, Any]]:
    """What our own key of config.json says of each expert; [] if another program wrote the file.

    Field by field it is judged where it is used: `slice.write_slice` writes no bad manifest.
    """
    if not found.extra:
        return []

    def refused(message: str) -> RefusedError:
        problem = Problem("hf-config", str(src / hf_config.NAME), hf_config.EXTRA, message)
        return RefusedError("config.json was changed", [problem])

    if found.extra.get("schema") != hf_extra.SCHEMA:
        raise refused(f"schema {found.extra.get('schema')!r}; only {hf_extra.SCHEMA} is read")
    rows = found.extra.get("experts")
    if not isinstance(rows, list) or len(rows) != found.config.n_slots:
        raise refused(f"it does not list the {found.config.n_slots} experts of the file")
    for row in rows:
        kinds = {"id": str, "training": dict, "recipe": dict, "data_card": dict}
        if not isinstance(row, dict) or not all(
            isinstance(row.get(k), t) for k, t in kinds.items()
        ):
            raise refused("an expert needs id, training, recipe and data_card")
    if not isinstance(found.extra.get("training"), dict):
        raise refused("training is not an object")
    return rows


def _training(found: HfModel) -> dict[str, Any]:
    """The free facts of the model: as they were, or where it comes from."""
    if found.extra:
        return found.extra.get("training", {})  # Without any, `_listed` refuses the file.
    facts = {"format": "hf", "architecture": found.architecture.name}
    version = found.raw.get("transformers_version")
    if isinstance(version, str):
        facts["transformers_version"] = version
    return {"imported": {**facts, "config_digest": trees.json_digest(found.raw)}}


def _tensor_problems(found: HfModel, entries: Entries, src: Path) -> Iterator[Problem]:
    """Everything by which the tensors are not those of the architecture."""
    config, where = found.config, str(src)
    if config.n_layers * config.n_slots > len(entries):  # Each slot has tensors in each layer.
        message = f"{config.n_layers} layers of {config.n_slots} experts, {len(entries)} tensors"
        yield Problem("tensor-missing", where, "", message)
        return
    wanted, biases = {}, {}
    for row in hf_names.rows(found.architecture, config):
        for name, _, _ in hf_names.tensors(row, config):
            wanted[name] = row.shape
            biases[name.removesuffix("weight") + "bias"] = row.shape[:1]
    head, embedding = entries.get(hf_names.UNEMBED), entries.get(hf_names.EMBED)
    if config.tied_embeddings and head:
        wanted[hf_names.UNEMBED] = wanted[hf_names.EMBED]
        if embedding and head.dtype != embedding.dtype:
            yield _not_tied(entries)
    for name, shape in wanted.items():
        if name not in entries:
            yield Problem("tensor-missing", where, name, "the model needs it")
        elif entries[name].shape != shape:
            message = f"shape {list(entries[name].shape)}, expected {list(shape)}"
            yield Problem("tensor-shape", str(entries[name].path), name, message)
    for name, entry in entries.items():
        if name in wanted or KNOWN_BUFFERS.fullmatch(name):
            continue
        if entry.shape == biases.get(name):
            yield from _bias_problems(entry)
        else:
            fused = ".experts.gate_up_proj" in name or ".experts.down_proj" in name
            message = f"{found.architecture.name} has no such tensor here"
            if fused:
                message = "all experts in one tensor; save_pretrained of transformers splits them"
            yield Problem("tensor-extra", str(entry.path), name, message)


def _bias_problems(entry: files.Entry) -> Iterator[Problem]:
    """A bias of zeros is no bias; our layers have no other."""
    if (files.read(entry) != 0).any():
        message = "the layers here have no biases, and this one is not zero"
        yield Problem("bias", str(entry.path), entry.name, message)


def _not_tied(entries: Entries) -> Problem:
    message = f"config.json ties it to {hf_names.EMBED}, but it differs"
    return Problem("not-tied", str(entries[hf_names.UNEMBED].path), hf_names.UNEMBED, message)


def _source(found: HfModel, entries: Entries) -> assemble.Source:
    """The tensors; a head that repeats the embedding is compared with it on the way."""
    repeated = found.config.tied_embeddings and hf_names.UNEMBED in entries

    def read(name: str, start: int, stop: int) -> np.ndarray:
        rows = files.read_rows(entries[name], start, stop)
        if repeated and name == hf_names.EMBED:
            again = files.read_rows(entries[hf_names.UNEMBED], start, stop)
            if not np.array_equal(rows.view(np.uint8), again.view(np.uint8)):
                raise RefusedError("The model is not what it says", [_not_tied(entries)])
        return rows

    return assemble.Source({name: entry.dtype for name, entry in entries.items()}, read)


def _common(source: assemble.Source, dtype: str) -> np.dtype:
    """The dtype of leaves that no tensor of the file gives."""
    return jnp.dtype(assemble.kept_dtype(source, source.dtypes) if dtype == "keep" else dtype)


def _with_small_leaves(
    src: Path,
    found: HfModel,
    members: Sequence[model_dir.Member],
    slots: Sequence[Mapping[str, Any]],
    dtype: np.dtype,
) -> list[trees.Tree]:
    """Slices with the leaves for which a Hugging Face model has no tensor."""
    kept = _kept(src, found, [member.expert for member in members]) if found.extra else {}
    expected = slices.expected_slice(found.config)
    out = []
    for member, leaves in zip(members, slots, strict=True):
        own = dict(leaves)
        for name in sorted(set(expected) - set(leaves)):
            default = np.full(expected[name].shape, hf_extra.DEFAULTS[name], np.float32)
            values = kept.get(hf_extra.kept_name(member.expert, name), default)
            own[name] = values.astype(dtype)
        out.append(trees.unflatten(own))
    return out


def _kept(src: Path, found: HfModel, experts: Collection[str]) -> dict[str, np.ndarray]:
    """The values that `hf_extra.write_kept` put beside the model."""
    path = files.own_file(src, hf_extra.KEPT)
    if path is None:
        return {}
    c = found.config
    wanted: dict[str, tuple[int, ...]] = {
        hf_extra.kept_name(expert, "bias"): (c.n_layers,) for expert in experts
    }
    if not found.architecture.mixture:
        wanted[hf_extra.kept_name(manifests.PUBLIC, "router")] = (c.n_layers, c.d_model)
    out, problems = {}, []
    for name, entry in files.read_file(path).items():
        if entry.shape != wanted.get(name):
            message = f"{list(entry.shape)} has no place in this model"
            problems.append(Problem("tensor-extra", str(path), name, message))
            continue
        out[name] = files.read(entry)
        public = name.startswith(hf_extra.kept_name(manifests.PUBLIC, ""))
        # The model that others load has no biases: one that counts would make this another model.
        if not public and np.logaddexp(np.float32(0), out[name].astype(np.float32)).any():
            message = "a bias that changes what the model computes; others load it without"
            problems.append(Problem("bias", str(path), name, message))
    if problems:
        raise RefusedError("The additions to the model were changed", problems)
    return out


def is_companion(name: str) -> bool:
    """Whether a file beside a tokenizer.json comes in and goes out with it."""
    return name in COMPANIONS or CHAT_TEMPLATE.fullmatch(name) is not None


def _tokenizer(src: Path, found: HfModel, given: str | Path | None) -> tuple[Path, dict[str, Path]]:
    """The tokenizer.json to take, and the files beside it that other programs want."""
    path = files.own_file(src, model_info.TOKENIZER) if given is None else tokenize.locate(given)
    if path is None:
        problem = Problem("file-missing", str(src / model_info.TOKENIZER), "", "no tokenizer.json")
        raise RefusedError(
            "The directory has no tokenizer that can be used",
            [problem],
            fix="give one with --tokenizer PATH",
        )
    size = tokenize.vocab_size(tokenize.load(path))
    if size > found.config.vocab_size:
        message = f"{size} tokens, but the embedding has {found.config.vocab_size} rows"
        problem = Problem("vocab-size", str(path), "", message)
        raise RefusedError("The tokenizer does not fit the model", [problem])
    if given is not None:
        return path, {}
    names = sorted(p.name for p in src.iterdir() if is_companion(p.name))
    companions = {name: file for name in names if (file := files.own_file(src, name))}
    for file in companions.values():
        if file.stat().st_size > MAX_COMPANION:
            message = f"larger than {MAX_COMPANION >> 20} MiB"
            raise RefusedError(
                "A tokenizer file cannot be kept", [Problem("file-size", str(file), "", message)]
            )
    return path, companions

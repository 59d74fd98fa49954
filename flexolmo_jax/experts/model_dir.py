# SPDX-License-Identifier: Apache-2.0
"""A model directory: shared weights, a tokenizer and one slice directory per filled slot.

An anchor is a model of which only slot 0, the public expert, is filled.
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax import checkpoint
from flexolmo_jax import tree as trees
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import Problem, RefusedError
from flexolmo_jax.experts import leafio, loading, model_info
from flexolmo_jax.experts import manifest as manifests
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.files import atomic_directory, hash_files, require_space


@dataclasses.dataclass(frozen=True)
class Member:
    """An expert besides the public one, for `write_model`.

    Attributes:
      leaves: slice tree of arrays or of `leafio.Leaf`.
      training, recipe, data_card: as `slice.write_slice` takes them.
    """

    expert: str
    leaves: Mapping[str, Any]
    training: Mapping[str, int]
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data_card: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_model(
    path: str | Path,
    config: ModelConfig,
    shared: Mapping[str, Any],
    public_slice: Mapping[str, Any],
    tokenizer_path: str | Path,
    training: Mapping[str, Any] | None = None,
    *,
    experts: Sequence[Member] = (),
    companions: Mapping[str, Path] | None = None,
) -> model_info.ModelInfo:
    """Writes an anchor (or a whole mixture): a directory that appears complete or not at all.

    Args:
      shared, public_slice: trees of arrays or of `leafio.Leaf`, which are never whole in memory;
        the public slice is slot 0.
      training: free facts; steps, tokens and seed also go into the public slice.
      experts: of slots 1, 2, ...; none makes an anchor.
      companions: name to source of tokenizer files that other programs want.

    Raises:
      RefusedError: a leaf that does not fit the config, or is not finite.
      MachineError: the disk has too little room.
    """
    path, training = Path(path), dict(training or {})
    leaves = leafio.leaves_of(shared)
    problems = checkpoint.leaf_problems(model_info.expected_shared(config), leaves, str(path))
    problems = [p for p in problems if p.code != "leaf-dtype"]
    problems += _member_problems(path, config, experts)
    if problems:
        raise RefusedError("The model cannot be written", problems)
    parts = (shared, public_slice, *(member.leaves for member in experts))
    sizes = (leaf.nbytes for part in parts for leaf in leafio.leaves_of(part).values())
    require_space(path, sum(sizes))
    with atomic_directory(path) as work:
        copied = _copy_tokenizer(work, tokenizer_path, companions or {})
        table, files = leafio.write_tree(work / model_info.SHARED, leaves, path)
        files = {f"{model_info.SHARED}/{name}": digest for name, digest in files.items()} | copied
        public = Member(
            manifests.PUBLIC,
            public_slice,
            {key: training.get(key, 0) for key in ("steps", "tokens", "seed")},
        )
        tokenizer = files[model_info.TOKENIZER]
        pieces = [_write_member(work, config, tokenizer, public, None)]
        anchor = manifests.anchor_digest(config, tokenizer, table, pieces[0].manifest["leaves"])
        pieces += [_write_member(work, config, tokenizer, m, anchor) for m in experts]
        write_info(
            work,
            config=config,
            slots=[
                {"slot": slot, "expert": piece.expert, "manifest_digest": piece.digest}
                for slot, piece in enumerate(pieces)
            ],
            shared=table,
            files=files,
            training=training,
            anchor_digest=anchor,
        )
    return model_info.read_info(path)


def _write_member(
    work: Path, config: ModelConfig, tokenizer_digest: str, member: Member, anchor: str | None
) -> slices.SliceInfo:
    return slices.write_slice(
        work / model_info.EXPERTS / member.expert,
        member.leaves,
        expert=member.expert,
        config=config,
        anchor_digest=anchor,
        tokenizer_digest=tokenizer_digest,
        training=member.training,
        recipe=member.recipe,
        data_card=member.data_card,
    )


def _member_problems(path: Path, config: ModelConfig, experts: Sequence[Member]) -> list[Problem]:
    """Names and number of experts, before anything is written."""
    out = []
    for name, times in Counter([manifests.PUBLIC, *(m.expert for m in experts)]).items():
        if not manifests.is_slug(name):
            out.append(Problem("bad-id", str(path), "", f"expert id {name!r} is not a slug"))
        elif times > 1:
            out.append(Problem("duplicate-expert", str(path), "", f"{times} experts are {name!r}"))
    if len(experts) >= config.n_slots and experts:
        message = f"{len(experts) + 1} experts for {config.n_slots} slots"
        out.append(Problem("too-many-experts", str(path), "", message))
    return out


def _copy_tokenizer(
    work: Path, tokenizer_path: str | Path, companions: Mapping[str, Path]
) -> dict[str, str]:
    """Copies tokenizer.json and its companions; path in the model to digest."""
    sources = {model_info.TOKENIZER: Path(tokenizer_path)}
    sources |= {f"{model_info.COMPANIONS}/{name}": source for name, source in companions.items()}
    for name, source in sources.items():
        (work / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, work / name)
    return hash_files(work, sources)


def write_info(
    folder: Path,
    *,
    config: ModelConfig,
    slots: list[dict[str, Any]],
    shared: Mapping[str, Any],
    files: Mapping[str, str],
    training: Mapping[str, Any],
    anchor_digest: str,
    links: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Checks and writes a model's flexolmo.json, the last file of a model directory.

    Args:
      links: parts that lie elsewhere, relative to `folder`; they change no other digest than the
        file's own.

    Raises:
      RefusedError: a field that `model_info.read_info` would refuse.
    """
    content = {
        "kind": "model",
        "schema": manifests.LINKED_SCHEMA if links else manifests.SCHEMA,
        "model": config.to_json(),
        "tokenizer_digest": files[model_info.TOKENIZER],
        "slots": slots,
        "shared": dict(shared),
        "files": dict(files),
        "training": dict(training),
        "anchor_digest": anchor_digest,
        "model_digest": manifests.model_digest(anchor_digest, config, slots),
    }
    if links:
        content["links"] = dict(links)
    problems = manifests.check(manifests.seal(content), str(folder), "model")
    if problems:
        raise RefusedError("The model cannot be written", problems)
    return manifests.write(folder, content)


def load_model(
    path: str | Path,
    *,
    experts: Collection[str] | None = None,
    verify: bool = True,
    sharding_fn: loading.ShardingFn | None = None,
    together: bool = False,
) -> tuple[model_info.ModelInfo, trees.Tree, tuple[str, ...]]:
    """Loads shared weights and some experts; opens no file of any other expert.

    Args:
      experts: ids to open; None opens all. Slots of the others stay zero.
      verify: check every byte and every value that is loaded against its digest.
      sharding_fn: (leaf name such as "experts/w_gate", shape) to the sharding of the array that is
        made; None, as an argument or a result, leaves a numpy array.
      together: every process of the run makes this call; each checks a part of the bytes instead
        of all of them, and all refuse what one of them finds.

    Returns:
      info, {"shared", "experts" [L, E, ...]}, and the ids that were opened, in slot order.

    Raises:
      RefusedError: anything damaged or out of place, with every problem found.
      ConfigError: an id that the model does not have.
    """
    info, arrays, opened = read_model(
        path, experts=experts, verify=verify, sharding_fn=sharding_fn, together=together
    )
    return info, trees.unflatten(loading.spread(arrays, sharding_fn)), opened


def read_model(
    path: str | Path,
    *,
    experts: Collection[str] | None = None,
    verify: bool = True,
    sharding_fn: loading.ShardingFn | None = None,
    together: bool = False,
) -> tuple[model_info.ModelInfo, dict[str, Any], tuple[str, ...]]:
    """The part of `load_model` that waits for no other process, unless they check `together`.

    Returns:
      info, arrays by leaf name for `loading.spread`, and the ids that were opened.
    """
    info = model_info.read_info(path)
    for expert in experts or ():
        info.expert_path(expert)
    opened = tuple(e for e in info.slots if experts is None or e in experts)
    pieces, problems = [], model_info.shared_file_problems(info)
    for expert in opened:
        piece, found = model_info.member_info(info, expert)
        problems += found
        if piece is not None:
            pieces.append(piece)
            problems += slices.listing_problems(piece)
    if not problems and pieces:
        problems += slices.dtype_problems(pieces)
        if pieces[0].expert == manifests.PUBLIC:
            problems += model_info.anchor_problems(info, pieces[0])
    if problems:
        raise RefusedError(f"{path} cannot be loaded", problems)
    items = model_info.text_items(info) + model_info.shared_items(info) if verify else []
    for piece in pieces if verify else ():
        items += slices.items(piece)
    found = loading.load(_sources(info, pieces), sharding_fn, items, together=together)
    if found.problems:
        raise RefusedError(f"{path} cannot be loaded", found.problems)
    return info, found.arrays, opened


def _sources(
    info: model_info.ModelInfo, pieces: list[slices.SliceInfo]
) -> dict[str, loading.Source]:
    """Leaf name in a model's parameters to the leaves on disk that it is made from."""
    out = {}
    for name, entry in info.content["shared"].items():
        shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
        part = loading.Part(info.shared_path, name, entry)
        out[f"shared/{name}"] = loading.Source(shape, dtype, (part,))
    for name, like in slices.expected_slice(info.config).items():
        table = {piece.expert: piece.manifest["leaves"][name] for piece in pieces}
        parts = tuple(
            loading.Part(p.path / slices.PARAMS, name, table[p.expert], info.slots[p.expert])
            for p in pieces
        )
        dtype = np.dtype(parts[0].entry["dtype"] if parts else "float32")
        shape = (like.shape[0], info.config.n_slots, *like.shape[1:])
        out[f"experts/{name}"] = loading.Source(shape, dtype, parts)
    return out

# SPDX-License-Identifier: Apache-2.0
"""A model directory: shared weights, a tokenizer and one slice directory per filled slot.

An anchor is a model of which only slot 0, the public expert, is filled.
"""

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax import checkpoint, model
from flexolmo_jax import tree as trees
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import ConfigError, Problem, RefusedError, nearest
from flexolmo_jax.experts import leafio, loading, onepass, remote
from flexolmo_jax.experts import manifest as manifests
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.files import atomic_directory, check_files, hash_files, require_space

EXPERTS, SHARED, TOKENIZER = "experts", "shared", "tokenizer.json"
# What other programs want beside tokenizer.json; kept and digested, read by none of ours.
COMPANIONS = "tokenizer"


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A validated flexolmo.json of kind "model".

    Attributes:
      slots: expert id to slot, filled slots only, in slot order.
      manifest_digests: expert id to the digest of its manifest.
      content: the whole parsed file.
    """

    path: Path
    config: ModelConfig
    slots: dict[str, int]
    manifest_digests: dict[str, str]
    tokenizer_digest: str
    anchor_digest: str
    model_digest: str
    training: dict[str, Any]
    content: dict[str, Any]

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json of this model."""
        return self.path / TOKENIZER

    @property
    def links(self) -> dict[str, str]:
        """Part ("shared" or "experts/<id>") to where it lies from here; empty for a whole model."""
        return self.content.get("links", {})

    @property
    def shared_path(self) -> Path:
        """The saved tree of the shared weights."""
        return self.part_path(manifests.SHARED_LINK)

    def part_path(self, name: str) -> Path:
        """Where a part ("shared" or "experts/<id>") lies."""
        if name not in self.links:
            return self.path / name
        # Only leading ".." can be there: without links above, they are what the text says.
        return Path(os.path.normpath(self.path.resolve() / self.links[name]))

    @property
    def companions(self) -> dict[str, Path]:
        """Name to path of the tokenizer files for other programs."""
        return {name: self.path / COMPANIONS / name for name in _inside(self, COMPANIONS)}

    @property
    def trained_together(self) -> str:
        """The stage that let experts see each other, after which leaving is not exact; or ""."""
        return str(self.training.get("stage", ""))

    @property
    def is_anchor(self) -> bool:
        """Whether only the public expert is there."""
        return list(self.slots) == [manifests.PUBLIC]

    def expert_path(self, expert: str) -> Path:
        """The slice directory of an expert.

        Raises:
          ConfigError: no such expert in this model.
        """
        if expert not in self.slots:
            raise ConfigError(
                "The model has no such expert",
                got=expert,
                where=self.path,
                fix=nearest(expert, self.slots),
            )
        return self.part_path(manifests.EXPERT_LINK + expert)


def expected_shared(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaf name to shape of the shared weights of this architecture."""
    one = config.replace(n_slots=1, n_active=1)
    return trees.flatten(model.abstract_params(one)["shared"])


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
) -> ModelInfo:
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
    problems = checkpoint.leaf_problems(expected_shared(config), leaves, str(path))
    problems = [p for p in problems if p.code != "leaf-dtype"]
    problems += _member_problems(path, config, experts)
    if problems:
        raise RefusedError("The model cannot be written", problems)
    parts = (shared, public_slice, *(member.leaves for member in experts))
    sizes = (leaf.nbytes for part in parts for leaf in leafio.leaves_of(part).values())
    require_space(path, sum(sizes))
    with atomic_directory(path) as work:
        copied = _copy_tokenizer(work, tokenizer_path, companions or {})
        table, files = leafio.write_tree(work / SHARED, leaves, path)
        files = {f"{SHARED}/{name}": digest for name, digest in files.items()} | copied
        public = Member(
            manifests.PUBLIC,
            public_slice,
            {key: training.get(key, 0) for key in ("steps", "tokens", "seed")},
        )
        pieces = [_write_member(work, config, files[TOKENIZER], public, None)]
        own = pieces[0].manifest["leaves"]
        anchor = manifests.anchor_digest(config, files[TOKENIZER], table, own)
        pieces += [_write_member(work, config, files[TOKENIZER], m, anchor) for m in experts]
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
    return read_info(path)


def _write_member(
    work: Path, config: ModelConfig, tokenizer_digest: str, member: Member, anchor: str | None
) -> slices.SliceInfo:
    return slices.write_slice(
        work / EXPERTS / member.expert,
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
    sources = {TOKENIZER: Path(tokenizer_path)}
    sources |= {f"{COMPANIONS}/{name}": source for name, source in companions.items()}
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
      RefusedError: a field that `read_info` would refuse.
    """
    content = {
        "kind": "model",
        "schema": manifests.LINKED_SCHEMA if links else manifests.SCHEMA,
        "model": config.to_json(),
        "tokenizer_digest": files[TOKENIZER],
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


def parse_info(path: str | Path) -> tuple[ModelInfo | None, list[Problem]]:
    """`read_info` that returns the problems instead of raising them."""
    path = remote.local_dir(path)
    value, problems = manifests.read(path, "model")
    if value is None:
        return None, problems
    where = str(path / manifests.NAME)
    config = manifests.parse_config(value["model"])
    assert isinstance(config, ModelConfig)
    found = slices.abstract_leaves(value["shared"])
    problems = checkpoint.leaf_problems(expected_shared(config), found, where)
    problems = [p for p in problems if p.code != "leaf-dtype"]
    if value["files"].get(TOKENIZER) != value["tokenizer_digest"]:
        message = "tokenizer_digest is not the digest listed for tokenizer.json"
        problems.append(Problem("wrong-tokenizer", where, "", message))
    if problems:
        return None, problems
    info = ModelInfo(
        path=path,
        config=config,
        slots={row["expert"]: row["slot"] for row in value["slots"]},
        manifest_digests={row["expert"]: row["manifest_digest"] for row in value["slots"]},
        tokenizer_digest=value["tokenizer_digest"],
        anchor_digest=value["anchor_digest"],
        model_digest=value["model_digest"],
        training=value["training"],
        content=value,
    )
    return info, []


def read_info(path: str | Path) -> ModelInfo:
    """The parsed and validated flexolmo.json of a model or anchor; reads that one file.

    Raises:
      RefusedError: with every problem found.
    """
    info, problems = parse_info(path)
    if info is None:
        raise RefusedError(f"{path} is not a model that can be used", problems)
    return info


def member_info(info: ModelInfo, expert: str) -> tuple[slices.SliceInfo | None, list[Problem]]:
    """The manifest of one expert of a model, checked against the model's slot table."""
    problems = link_problems(info, manifests.EXPERT_LINK + expert)
    if problems:
        return None, problems
    piece, problems = slices.read_slice_info(info.expert_path(expert))
    if piece is None:
        return None, problems
    where = str(piece.path / manifests.NAME)
    if piece.digest != info.manifest_digests[expert]:
        message = "the manifest is not the one that the model's slot table names"
        problems.append(Problem("manifest-digest", where, "", message))
    if piece.expert != expert:
        message = f"the manifest is of expert {piece.expert!r}, its folder is {expert!r}"
        problems.append(Problem("bad-id", where, "", message))
    return piece, problems + belongs_problems(info, piece)


def link_problems(info: ModelInfo, part: str) -> list[Problem]:
    """Whether a part that lies elsewhere is still there."""
    path = info.part_path(part)
    if part not in info.links or path.is_dir():
        return []
    message = f"{info.path} links its {part} to {info.links[part]}, and nothing is there any more"
    return [Problem("link-broken", str(path), "", message)]


def belongs_problems(info: ModelInfo, piece: slices.SliceInfo) -> list[Problem]:
    """Whether a slice was made for this anchor: digests, names, shapes."""
    where, manifest = str(piece.path / manifests.NAME), piece.manifest
    wanted = (
        ("anchor_digest", "wrong-anchor", info.anchor_digest),
        ("architecture_digest", "wrong-architecture", manifests.architecture_digest(info.config)),
        ("tokenizer_digest", "wrong-tokenizer", info.tokenizer_digest),
    )
    out = []
    for key, code, expected in wanted:
        own = key == "anchor_digest" and piece.expert == manifests.PUBLIC
        if manifest[key] != (None if own else expected):
            message = f"{key} is {manifest[key]}, expected {None if own else expected}"
            out.append(Problem(code, where, "", message))
    expected_leaves = slices.expected_slice(info.config)
    found = slices.abstract_leaves(manifest["leaves"])
    for p in checkpoint.leaf_problems(expected_leaves, found, where):
        leftover = p.code == "leaf-extra" and manifests.is_leftover(p.leaf)
        if p.code != "leaf-dtype":
            out.append(dataclasses.replace(p, code="leftover-state") if leftover else p)
    return out


def shared_file_problems(info: ModelInfo) -> list[Problem]:
    """Names of the model's files outside experts/ against their list; enters no expert's folder."""
    out = []
    here = {SHARED} - set(info.links)
    known = {EXPERTS, TOKENIZER, manifests.NAME, *here}
    companions = _inside(info, COMPANIONS)
    known |= {COMPANIONS} if companions else set()
    for entry in sorted(info.path.iterdir()):
        if entry.is_symlink():
            out.append(Problem("symlink", str(entry), "", "symbolic links are not followed"))
        elif entry.name not in known:
            leftover = manifests.is_leftover(entry.name)
            code = "leftover-state" if leftover else "file-extra"
            out.append(Problem(code, str(entry), "", "there, but not listed"))
    folder = info.path / EXPERTS
    mine = {expert for expert in info.slots if manifests.EXPERT_LINK + expert not in info.links}
    for name in sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ():
        if name not in mine:
            message = (
                "its slot is linked elsewhere" if name in info.slots else "not in the slot table"
            )
            out.append(Problem("file-extra", str(folder / name), "", message))
    out += link_problems(info, manifests.SHARED_LINK)
    if out:
        return out
    out = slices.tree_problems(info.shared_path, info.content["shared"], _inside(info, SHARED))
    if companions:
        folder = info.path / COMPANIONS
        found = check_files(folder, companions, content=False)
        out += [dataclasses.replace(p, path=f"{folder}/{p.path}") for p in found]
    if not info.tokenizer_path.is_file():
        out.append(Problem("file-missing", str(info.tokenizer_path), "", "listed, but not there"))
    return out


def text_items(info: ModelInfo, target: Path | None = None) -> list[onepass.Item]:
    """The tokenizer and its companions, for a pass.

    Args:
      target: folder of the model to copy them to; None only reads.
    """
    files = {n: d for n, d in info.content["files"].items() if not n.startswith(SHARED + "/")}
    return slices.tree_items(info.path, files, "", {}, "", target)


def shared_items(info: ModelInfo, target: Path | None = None) -> list[onepass.Item]:
    """The shared weights, for a pass; `target` as in `text_items`."""
    folder, to = info.shared_path, None if target is None else target / SHARED
    table = info.content["shared"]
    return slices.tree_items(folder, _inside(info, SHARED), "", table, str(folder), to)


def _inside(info: ModelInfo, folder: str) -> dict[str, str]:
    """Listed files below a folder of the model: path there to digest."""
    files = info.content["files"].items()
    return {n.removeprefix(folder + "/"): d for n, d in files if n.startswith(folder + "/")}


def anchor_problems(info: ModelInfo, public: slices.SliceInfo) -> list[Problem]:
    """Whether shared weights and public slice are those that the anchor digest names."""
    got = manifests.anchor_digest(
        info.config, info.tokenizer_digest, info.content["shared"], public.manifest["leaves"]
    )
    if got == info.anchor_digest:
        return []
    message = f"anchor_digest is {info.anchor_digest}, its parts give {got}"
    return [Problem("wrong-anchor", str(info.path / manifests.NAME), "", message)]


def load_model(
    path: str | Path,
    *,
    experts: Collection[str] | None = None,
    verify: bool = True,
    sharding_fn: loading.ShardingFn | None = None,
    together: bool = False,
) -> tuple[ModelInfo, trees.Tree, tuple[str, ...]]:
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
    info = read_info(path)
    for expert in experts or ():
        info.expert_path(expert)
    opened = tuple(e for e in info.slots if experts is None or e in experts)
    pieces, problems = [], shared_file_problems(info)
    for expert in opened:
        piece, found = member_info(info, expert)
        problems += found
        if piece is not None:
            pieces.append(piece)
            problems += slices.listing_problems(piece)
    if not problems and pieces:
        problems += slices.dtype_problems(pieces)
        if pieces[0].expert == manifests.PUBLIC:
            problems += anchor_problems(info, pieces[0])
    if problems:
        raise RefusedError(f"{path} cannot be loaded", problems)
    items = text_items(info) + shared_items(info) if verify else []
    for piece in pieces if verify else ():
        items += slices.items(piece)
    found = loading.load(_sources(info, pieces), sharding_fn, items, together=together)
    if found.problems:
        raise RefusedError(f"{path} cannot be loaded", found.problems)
    return info, trees.unflatten(found.arrays), opened


def _sources(info: ModelInfo, pieces: list[slices.SliceInfo]) -> dict[str, loading.Source]:
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

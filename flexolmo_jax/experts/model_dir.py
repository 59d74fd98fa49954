# SPDX-License-Identifier: Apache-2.0
"""A model directory: shared weights, a tokenizer and one slice directory per filled slot.

An anchor is a model of which only slot 0, the public expert, is filled.
"""

import dataclasses
import functools
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax import checkpoint, model
from flexolmo_jax import tree as trees
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import ConfigError, Problem, RefusedError, nearest
from flexolmo_jax.experts import leafio, remote
from flexolmo_jax.experts import manifest as manifests
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.files import atomic_directory, check_files, hash_files, require_space

EXPERTS, SHARED, TOKENIZER = "experts", "shared", "tokenizer.json"
# What other programs want beside tokenizer.json; kept and digested, read by none of ours.
COMPANIONS = "tokenizer"
ShardingFn = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


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
    def companions(self) -> dict[str, Path]:
        """Name to path of the tokenizer files for other programs."""
        names = [n for n in self.content["files"] if n.startswith(COMPANIONS + "/")]
        return {n.removeprefix(COMPANIONS + "/"): self.path / n for n in names}

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
        return self.path / EXPERTS / expert


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
) -> dict[str, Any]:
    """Checks and writes a model's flexolmo.json, the last file of a model directory.

    Raises:
      RefusedError: a field that `read_info` would refuse.
    """
    content = {
        "kind": "model",
        "schema": manifests.SCHEMA,
        "model": config.to_json(),
        "tokenizer_digest": files[TOKENIZER],
        "slots": slots,
        "shared": dict(shared),
        "files": dict(files),
        "training": dict(training),
        "anchor_digest": anchor_digest,
        "model_digest": manifests.model_digest(anchor_digest, config, slots),
    }
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


def dtype_problems(pieces: Collection[slices.SliceInfo]) -> list[Problem]:
    """Slices of one model are stacked without a cast, so each must have the first one's dtypes."""
    first, *rest = pieces
    out = []
    for piece in rest:
        for name, entry in piece.manifest["leaves"].items():
            want = first.manifest["leaves"].get(name, entry)["dtype"]
            if entry["dtype"] != want:
                message = f"dtype {entry['dtype']}, but {first.expert!r} has {want}"
                where = str(piece.path / manifests.NAME)
                out.append(Problem("leaf-dtype", where, name, message))
    return out


def shared_file_problems(info: ModelInfo, *, content: bool) -> list[Problem]:
    """Files of the model outside experts/ against their list; enters no expert's folder."""
    out = []
    known = {EXPERTS, SHARED, TOKENIZER, manifests.NAME}
    companions = {name: info.content["files"][f"{COMPANIONS}/{name}"] for name in info.companions}
    if companions:
        known.add(COMPANIONS)
    for entry in sorted(info.path.iterdir()):
        if entry.is_symlink():
            out.append(Problem("symlink", str(entry), "", "symbolic links are not followed"))
        elif entry.name not in known:
            leftover = manifests.is_leftover(entry.name)
            code = "leftover-state" if leftover else "file-extra"
            out.append(Problem(code, str(entry), "", "there, but not listed"))
    folder = info.path / EXPERTS
    for name in sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ():
        if name not in info.slots:
            out.append(Problem("file-extra", str(folder / name), "", "not in the slot table"))
    if out:
        return out
    files = info.content["files"].items()
    inside = {n.removeprefix(SHARED + "/"): d for n, d in files if n.startswith(SHARED + "/")}
    out = slices.tree_problems(info.path / SHARED, info.content["shared"], inside, content)
    if companions:
        folder = info.path / COMPANIONS
        found = check_files(folder, companions, content=content)
        out += [dataclasses.replace(p, path=f"{folder}/{p.path}") for p in found]
    if not info.tokenizer_path.is_file():
        out.append(Problem("file-missing", str(info.tokenizer_path), "", "listed, but not there"))
    elif content and trees.file_digest(info.tokenizer_path) != info.tokenizer_digest:
        message = "content is not what the model lists"
        out.append(Problem("file-digest", str(info.tokenizer_path), "", message))
    return out


def shared_content_problems(info: ModelInfo, folder: Path) -> list[Problem]:
    """Digest and finiteness of the shared leaves in `folder`, one leaf at a time."""
    return slices.table_problems(folder, info.content["shared"], str(info.path / SHARED))


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
    sharding_fn: ShardingFn | None = None,
) -> tuple[ModelInfo, trees.Tree, tuple[str, ...]]:
    """Loads shared weights and some experts; opens no file of any other expert.

    Args:
      experts: ids to open; None opens all. Slots of the others stay zero.
      verify: check every byte and every value that is loaded against its digest.
      sharding_fn: (leaf name such as "experts/w_gate", shape) to the sharding of the array that is
        made; None, as an argument or a result, leaves a numpy array.

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
    pieces, problems = [], shared_file_problems(info, content=verify)
    for expert in opened:
        piece, found = member_info(info, expert)
        problems += found
        if piece is not None:
            pieces.append(piece)
            problems += slices.listing_problems(piece, content=verify)
    if not problems and pieces:
        problems += dtype_problems(pieces)
        if pieces[0].expert == manifests.PUBLIC:
            problems += anchor_problems(info, pieces[0])
    if problems:
        raise RefusedError(f"{path} cannot be loaded", problems)
    place = sharding_fn or (lambda _name, _shape: None)
    params = {
        "shared": _load_shared(info, verify, place),
        "experts": _load_group(info, pieces, verify, place),
    }
    return info, params, opened


def _load_shared(info: ModelInfo, verify: bool, place: ShardingFn) -> trees.Tree:
    out, folder = {}, info.path / SHARED
    for name, entry in info.content["shared"].items():
        if verify:
            _require(str(folder), name, leafio.stored(folder, name, entry), entry["digest"])
        read = functools.partial(leafio.read_region, folder, name, entry)
        shape = tuple(entry["shape"])
        out[name] = leafio.place(shape, place(f"shared/{name}", shape), read)
    return trees.unflatten(out)


def _load_group(
    info: ModelInfo, pieces: list[slices.SliceInfo], verify: bool, place: ShardingFn
) -> trees.Tree:
    out = {}
    for name, like in slices.expected_slice(info.config).items():
        for piece in pieces if verify else ():
            entry = piece.manifest["leaves"][name]
            leaf = leafio.stored(piece.path / slices.PARAMS, name, entry)
            _require(str(piece.path), name, leaf, entry["digest"])
        shape = (like.shape[0], info.config.n_slots, *like.shape[1:])
        read = functools.partial(_read_stacked, info, pieces, name)
        out[name] = leafio.place(shape, place(f"experts/{name}", shape), read)
    return trees.unflatten(out)


def _read_stacked(
    info: ModelInfo, pieces: list[slices.SliceInfo], name: str, region: leafio.Region
) -> np.ndarray:
    """A box of a leaf of the group; slots that were not opened are zeros."""
    (top, bottom), (first, last), *inner = region
    dtype = pieces[0].manifest["leaves"][name]["dtype"] if pieces else "float32"
    inside = [stop - start for start, stop in inner]
    out = np.zeros((bottom - top, last - first, *inside), np.dtype(dtype))
    for piece in pieces:
        slot = info.slots[piece.expert]
        if first <= slot < last:
            folder, entry = piece.path / slices.PARAMS, piece.manifest["leaves"][name]
            box = ((top, bottom), *inner)
            leafio.read_region(folder, name, entry, box, out=out[:, slot - first])
    return out


def _require(path: str, name: str, leaf: leafio.Leaf, digest: str) -> None:
    problems = slices.content_problems(path, name, leaf, digest)
    if problems:
        raise RefusedError("A leaf cannot be loaded", problems)

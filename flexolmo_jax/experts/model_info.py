# SPDX-License-Identifier: Apache-2.0
"""What a model directory says of itself, and whether what lies there is what it says.

Reads flexolmo.json, manifests and folder listings; `model_dir` writes and loads the weights.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from flexolmo_jax import checkpoint, model
from flexolmo_jax import tree as trees
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import ConfigError, Problem, RefusedError, nearest
from flexolmo_jax.experts import manifest as manifests
from flexolmo_jax.experts import onepass, remote
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.files import check_files

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

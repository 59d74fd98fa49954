# SPDX-License-Identifier: Apache-2.0
"""The leaves of one expert: taken out of a group, put into one, written to and read from disk."""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax import checkpoint, model
from flexolmo_jax import tree as trees
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import CheckpointError, Problem, RefusedError
from flexolmo_jax.experts import leafio, onepass, remote
from flexolmo_jax.experts import manifest as manifests
from flexolmo_jax.files import atomic_directory, check_files, list_files

PARAMS = "params"
SLOT_AXIS = 1
ORBAX_FILES = (leafio.TREE_FILE, checkpoint.METADATA, checkpoint.MARKER)
MAX_METADATA = 1 << 20


@dataclasses.dataclass(frozen=True)
class SliceInfo:
    """A validated slice manifest and where it lies."""

    path: Path
    manifest: Mapping[str, Any]
    digest: str

    @property
    def expert(self) -> str:
        """The expert's id."""
        return self.manifest["expert"]


def take_slot(group: Mapping[str, Any], slot: int) -> trees.Tree:
    """One slot of a group as a slice: [L, E, ...] leaves become [L, ...]."""
    return trees.map_named(lambda _, leaf: leaf[:, slot], group)


def put_slot(group: Mapping[str, Any], slot: int, piece: Mapping[str, Any]) -> trees.Tree:
    """A copy of the group with one slot replaced; the exact inverse of `take_slot`.

    Raises:
      CheckpointError: a leaf of another name, shape or dtype.
    """
    _require_equal(abstract_of(take_slot(group, slot)), abstract_of(piece))

    def put(_: str, leaf: Any, new: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf.at[:, slot].set(new)
        out = np.array(leaf)
        out[:, slot] = new
        return out

    return trees.map_named(put, group, piece)


def stack_slices(pieces: Sequence[Mapping[str, Any] | None], n_slots: int) -> trees.Tree:
    """A group from slices in slot order; None, and every slot past the last, is all zeros.

    Raises:
      CheckpointError: no slice at all, more than `n_slots`, or slices that differ in shape.
    """
    filled = [piece for piece in pieces if piece is not None]
    if not filled or len(pieces) > n_slots:
        raise CheckpointError(
            "The slices do not fit the slots", got=len(pieces), expected=f"1 to {n_slots}"
        )
    for piece in filled[1:]:
        _require_equal(abstract_of(filled[0]), abstract_of(piece))
    flat = [None if piece is None else trees.flatten(piece) for piece in pieces]

    def stack(name: str, like: Any) -> np.ndarray:
        out = np.zeros((like.shape[0], n_slots, *like.shape[1:]), like.dtype)
        for slot, leaves in enumerate(flat):
            if leaves is not None:
                out[:, slot] = leaves[name]
        return out

    return trees.map_named(stack, filled[0])


def abstract_of(tree: Mapping[str, Any]) -> trees.Tree:
    """Shapes and dtypes of a tree of arrays."""
    return trees.map_named(lambda _, x: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype)), tree)


def _require_equal(expected: trees.Tree, found: trees.Tree) -> None:
    problems = checkpoint.leaf_problems(trees.flatten(expected), trees.flatten(found))
    if problems:
        raise CheckpointError("The slices do not fit", got="; ".join(map(str, problems)))


def expected_slice(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaf name to shape of a slice of this architecture."""
    one = model.abstract_params(config.replace(n_slots=1, n_active=1))["experts"]
    return {
        name: jax.ShapeDtypeStruct(leaf.shape[:SLOT_AXIS] + leaf.shape[SLOT_AXIS + 1 :], leaf.dtype)
        for name, leaf in trees.flatten(one).items()
    }


def abstract_leaves(table: Mapping[str, Mapping[str, Any]]) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaf table of a manifest as abstract arrays."""
    return {
        name: jax.ShapeDtypeStruct(tuple(entry["shape"]), np.dtype(entry["dtype"]))
        for name, entry in table.items()
    }


def write_slice(
    path: str | Path,
    tree: Mapping[str, Any],
    *,
    expert: str,
    config: ModelConfig,
    anchor_digest: str | None,
    tokenizer_digest: str,
    training: Mapping[str, int],
    recipe: Mapping[str, Any] | None = None,
    data_card: Mapping[str, Any] | None = None,
) -> SliceInfo:
    """Writes a slice directory, completely or not at all.

    Args:
      tree: of arrays, or of `leafio.Leaf`, which are never whole in memory.
      anchor_digest: None only for the public slice of an anchor.
      training: exactly steps, tokens and seed.

    Raises:
      RefusedError: the tree or a field breaks the rules by which it would be refused later.
    """
    path, leaves = Path(path), leafio.leaves_of(tree)
    problems = checkpoint.leaf_problems(expected_slice(config), leaves, str(path))
    problems = [p for p in problems if p.code != "leaf-dtype"]
    if problems:
        raise RefusedError("The slice cannot be shipped", problems)
    with atomic_directory(path) as work:
        table, files = leafio.write_tree(work / PARAMS, leaves, path)
        content = {
            "kind": "slice",
            "schema": manifests.SCHEMA,
            "expert": expert,
            "anchor_digest": anchor_digest,
            "architecture_digest": manifests.architecture_digest(config),
            "tokenizer_digest": tokenizer_digest,
            "leaves": table,
            "files": {f"{PARAMS}/{name}": digest for name, digest in files.items()},
            "data_card": dict(data_card or {}),
            "training": dict(training),
            "recipe": dict(recipe or {}),
        }
        problems = manifests.check(manifests.seal(content), str(path), "slice")
        if problems:
            raise RefusedError("The slice cannot be shipped", problems)
        sealed = manifests.write(work, content)
    return SliceInfo(path, sealed, manifests.manifest_digest(sealed))


def read_slice_info(path: str | Path) -> tuple[SliceInfo | None, list[Problem]]:
    """The manifest of a slice directory; reads that one file (of a URL, all: see `remote`)."""
    path = remote.local_dir(path)
    value, problems = manifests.read(path, "slice")
    if value is None:
        return None, problems
    return SliceInfo(path, value, manifests.manifest_digest(value)), []


def dtype_problems(pieces: Collection[SliceInfo]) -> list[Problem]:
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


def listing_problems(info: SliceInfo) -> list[Problem]:
    """Files of a slice against its manifest, then their layout; reads no array."""
    out = []
    for p in check_files(info.path, info.manifest["files"], ignore=[manifests.NAME], content=False):
        leftover = p.code == "file-extra" and manifests.is_leftover(p.path)
        code = "leftover-state" if leftover else p.code
        out.append(dataclasses.replace(p, code=code, path=f"{info.path}/{p.path}"))
    listed = {
        name.removeprefix(PARAMS + "/"): digest for name, digest in info.manifest["files"].items()
    }
    return out or tree_problems(info.path / PARAMS, info.manifest["leaves"], listed)


def tree_problems(
    folder: Path, table: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]
) -> list[Problem]:
    """A saved tree: names and sizes, then what the metadata says; reads no array."""
    out = layout_problems(folder, table)
    if not out:
        out = check_files(folder, files, content=False)
        out = [dataclasses.replace(p, path=f"{folder}/{p.path}") for p in out]
    return out or _metadata_problems(folder, table)


def layout_problems(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Whether a saved tree is laid out exactly as `checkpoint.save_tree` does it from host arrays.

    One folder per leaf with one uncompressed file of exactly the array's size: nothing in it can
    send a reader elsewhere or make it allocate more than the table of leaves says.
    """
    found, out = list_files(folder)
    wanted: dict[str, int | None] = dict.fromkeys(ORBAX_FILES)
    for name, entry in table.items():
        shape, own = entry["shape"], name.replace("/", ".")
        wanted[f"{own}/.zarray"] = None
        size = math.prod(shape) * manifests.DTYPES[entry["dtype"]]
        wanted[leafio.leaf_file(name, shape)] = size
    for file in sorted(set(wanted) - set(found)):
        out.append(Problem("file-missing", str(folder / file), "", "a saved tree needs it"))
    for file in sorted(set(found) - set(wanted)):
        code = "leftover-state" if manifests.is_leftover(file) else "file-extra"
        out.append(Problem(code, str(folder / file), "", "it has no place in a saved tree"))
    for file in sorted(set(wanted) & set(found)):
        size = wanted[file]
        if (size is None and found[file] > MAX_METADATA) or size not in (None, found[file]):
            message = f"{found[file]} bytes, expected {size or f'at most {MAX_METADATA}'}"
            out.append(Problem("file-size", str(folder / file), "", message))
    return out


def _metadata_problems(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    """Whether Orbax will read plain, uncompressed, whole arrays and nothing else."""
    wanted: dict[str, dict[str, Any]] = {leafio.TREE_FILE: {"use_ocdbt": False, "use_zarr3": False}}
    for name, entry in table.items():
        wanted[name.replace("/", ".") + "/.zarray"] = {
            "zarr_format": 2,
            "shape": entry["shape"],
            "chunks": entry["shape"],
            "dtype": leafio.ZARR_DTYPES[entry["dtype"]],
            "order": "C",
            "compressor": None,
            "filters": None,
        }
    out = []
    for file, fields in wanted.items():
        try:
            value = json.loads((folder / file).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or {**value, **fields} != value:
            message = f"does not say {fields}"
            out.append(Problem("bad-layout", str(folder / file), "", message))
    return out


def items(info: SliceInfo, target: Path | None = None) -> list[onepass.Item]:
    """Every file of a slice but its manifest, for a pass.

    Args:
      target: folder to copy the slice to; None only reads.
    """
    return tree_items(
        info.path,
        info.manifest["files"],
        f"{PARAMS}/",
        info.manifest["leaves"],
        str(info.path),
        target,
    )


def tree_items(
    folder: Path,
    files: Mapping[str, str],
    tree: str,
    table: Mapping[str, Mapping[str, Any]],
    where: str,
    target: Path | None = None,
) -> list[onepass.Item]:
    """Files for a pass, those that hold leaves named as such.

    Args:
      files: path in `folder` to digest.
      tree: how the paths of those files begin that are a saved tree of the leaves in `table`.
    """
    leaves = {f"{tree}{leafio.leaf_file(n, e['shape'])}": (n, e) for n, e in table.items()}
    out = []
    for name, digest in files.items():
        leaf, entry = leaves.get(name, ("", {}))
        to = None if target is None else target / name
        out.append(onepass.Item(folder / name, digest, leaf, entry, where, to))
    return out


def read_slice(path: str | Path, *, verify: bool = True) -> tuple[SliceInfo, trees.Tree]:
    """Manifest and leaves of a slice directory.

    Raises:
      RefusedError: with every problem found.
    """
    info, problems = read_slice_info(path)
    if info is not None:
        problems = listing_problems(info)
    if info is not None and verify and not problems:
        problems = onepass.judge(items(info)).problems
    if info is None or problems:
        raise RefusedError("The slice cannot be used", problems)
    table = info.manifest["leaves"]
    leaves = {n: leafio.read_leaf(info.path / PARAMS, n, entry) for n, entry in table.items()}
    return info, trees.unflatten(leaves)

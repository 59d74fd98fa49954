# SPDX-License-Identifier: Apache-2.0
"""Named trees on disk through Orbax, and file listings whose every byte is covered by a digest.

Orbax checksums no array payload, casts to another dtype in silence and follows symlinks,
so every directory of this package is listed, hashed and compared before Orbax opens it.
"""

import contextlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flexolmo_jax import distributed
from flexolmo_jax import tree as trees
from flexolmo_jax.errors import CheckpointError, Problem
from flexolmo_jax.files import list_files

LEAF_PART = re.compile(r"[A-Za-z0-9_-]{1,63}")
MARKER, METADATA = "commit_success.txt", "_CHECKPOINT_METADATA"
MARKER_TEXT = "Checkpoint commit was successful\n"
# What Orbax and tensorstore raise on damaged files; nothing else is expected of them.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError)
# What Orbax logs needlessly: what is as we asked for, and tracebacks of errors that it also raises.
NOISE = ("Skipping merge of OCDBT", "Metadata file does not exist", "in background save thread")
NOISE += ("Save Finalize thread",)


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaf name ("a/b/c") to leaf of any pytree, in its own order, and its treedef.

    Raises:
      CheckpointError: a name that is taken twice or does not fit a file name.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    out: dict[str, Any] = {}
    for path, leaf in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in out or not all(LEAF_PART.fullmatch(part) for part in name.split("/")):
            raise CheckpointError(
                "A leaf needs a unique name of letters, digits, '_' and '-'", got=repr(name)
            )
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.extended):
            raise CheckpointError(
                "A typed key cannot be saved", where=name, fix="save jax.random.key_data(key)"
            )
        out[name] = leaf
    return out, treedef


def to_host(leaf: Any) -> Any:
    """The leaf as a numpy array if this process holds all of it, else the leaf itself."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return leaf
    return np.asarray(leaf)


def wanted_record(record: logging.LogRecord) -> bool:
    """A filter of Orbax's log: False for what is as we asked for."""
    return not any(text in str(record.msg) for text in NOISE)


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    # One folder per leaf, not one database: a damaged file names its leaf, equal trees give equal
    # bytes, one leaf is read alone. Uncompressed: a file as long as its array cannot blow up.
    log = logging.getLogger("absl")
    log.addFilter(wanted_record)
    try:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            yield checkpointer
    finally:
        log.removeFilter(wanted_record)


def save_tree(path: str | Path, tree: Any) -> None:
    """Saves a pytree of arrays as a new Orbax directory, completely or not at all.

    Equal trees give equal files: sharding, time and place of the save leave no trace. A leaf that
    no process holds whole is written by all of them, in a file per part.

    Raises:
      CheckpointError: `path` exists, or a leaf cannot be saved.
    """
    path = Path(path).absolute()
    with distributed.together("saving"):
        if path.exists() or path.is_symlink():
            raise CheckpointError("The checkpoint exists already", where=path)
        leaves = {name: to_host(leaf) for name, leaf in named_leaves(tree)[0].items()}
        path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(path.name + ".saving")
    with _checkpointer() as checkpointer:
        checkpointer.save(work, args=ocp.args.PyTreeSave(trees.unflatten(leaves)), force=True)
    with distributed.together("saving"):
        if distributed.first():
            _remove_traces(work)
            os.replace(work, path)


def _remove_traces(folder: Path) -> None:
    """Takes this machine's path and clock out of what Orbax writes beside the arrays."""
    (folder / MARKER).write_text(MARKER_TEXT)
    path = folder / METADATA
    path.write_text(re.sub(r'(_timestamp_nsecs": )\d+', r"\g<1>0", path.read_text()))


def read_metadata(path: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaf name to shape and dtype of a saved tree, from its metadata alone.

    Raises:
      CheckpointError: no checkpoint there, a link inside, or unreadable metadata.
    """
    path = Path(path).absolute()
    _, problems = list_files(path)
    if problems:
        raise CheckpointError(
            "Not a checkpoint that can be read", got="; ".join(map(str, problems)), where=path
        )
    try:
        with _checkpointer() as checkpointer:
            metadata: Any = checkpointer.metadata(path).item_metadata
        leaves, _ = named_leaves(metadata.tree)  # Without any, AttributeError says so.
        return {
            name: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype))
            for name, leaf in leaves.items()
        }
    except READ_ERRORS as e:
        raise CheckpointError("The checkpoint's metadata cannot be read", got=e, where=path) from e


def leaf_problems(
    expected: Mapping[str, Any], found: Mapping[str, Any], where: str = ""
) -> list[Problem]:
    """Names, shapes and dtypes of two flat trees (leaf name to anything with both), compared."""
    out = []
    for name in sorted(set(expected) - set(found)):
        out.append(Problem("leaf-missing", where, name, "expected, but not there"))
    for name in sorted(set(found) - set(expected)):
        out.append(Problem("leaf-extra", where, name, "there, but not expected"))
    for name in sorted(set(found) & set(expected)):
        want, got = expected[name], found[name]
        if tuple(want.shape) != tuple(got.shape):
            message = f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
            out.append(Problem("leaf-shape", where, name, message))
        if np.dtype(want.dtype) != np.dtype(got.dtype):
            message = f"dtype {np.dtype(got.dtype).name}, expected {np.dtype(want.dtype).name}"
            out.append(Problem("leaf-dtype", where, name, message))
    return out


def _restore_arguments(leaf: Any) -> ocp.RestoreArgs:
    """How Orbax should place one leaf: by its sharding if it has one, else as a numpy array."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.dtype(leaf.dtype))
    return ocp.ArrayRestoreArgs(
        sharding=sharding, global_shape=tuple(leaf.shape), dtype=np.dtype(leaf.dtype)
    )


def restore_tree(
    path: str | Path, abstract_tree: Any, *, only: Collection[str] | None = None
) -> Any:
    """Restores exactly the tree that `abstract_tree` describes; never casts, pads or skips.

    Args:
      abstract_tree: pytree of arrays or ShapeDtypeStruct; a leaf with a sharding becomes a
        jax.Array placed by it, any other a numpy array.
      only: read just these leaves and return {name: array}.

    Raises:
      CheckpointError: lists every leaf that is missing, extra, or of another shape or dtype.
    """
    path = Path(path).absolute()
    leaves, treedef = named_leaves(abstract_tree)
    problems = leaf_problems(leaves, read_metadata(path))
    if problems:
        raise CheckpointError(
            "The checkpoint does not hold the tree that was asked for",
            got="; ".join(map(str, problems)),
            where=path,
        )
    wanted = set(leaves if only is None else only)
    item = {
        name: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype))
        if name in wanted
        else ocp.PLACEHOLDER
        for name, leaf in leaves.items()
    }
    how = {
        name: _restore_arguments(leaf) if name in wanted else ocp.RestoreArgs()
        for name, leaf in leaves.items()
    }
    arguments = ocp.args.PyTreeRestore(
        item=trees.unflatten(item), restore_args=trees.unflatten(how)
    )
    try:
        with _checkpointer() as checkpointer:
            restored = trees.flatten(checkpointer.restore(path, args=arguments))
    except READ_ERRORS as e:
        raise CheckpointError("The checkpoint cannot be read", got=e, where=path) from e
    if only is not None:
        return {name: restored[name] for name in sorted(wanted)}
    return jax.tree.unflatten(treedef, [restored[name] for name in leaves])

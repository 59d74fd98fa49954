# SPDX-License-Identifier: Apache-2.0
"""Verify: everything that can be wrong with an anchor, a model or a slice on disk."""

from pathlib import Path
from typing import Any

from flexolmo_jax.errors import Problem, RefusedError
from flexolmo_jax.experts import manifest as manifests
from flexolmo_jax.experts import model_info, onepass, remote
from flexolmo_jax.experts import slice as slices


def verify(path: str | Path, note: onepass.Note | None = None) -> list[Problem]:
    """Schema, names, sizes and layout; then, in one pass, every digest and every value.

    Arrays are only read once names, sizes and layout are right. Empty means nothing was found.
    Of a URL, every object is read again, whatever the cache of this machine holds.

    Args:
      note: called now and then with the bytes that were read and the bytes there are.
    """
    try:
        with remote.fresh():
            return _verify(remote.local_dir(path), note)
    except RefusedError as e:
        return list(e.problems)


def _verify(path: Path, note: onepass.Note | None) -> list[Problem]:
    value, problems = manifests.read(path)
    if value is None:
        return problems
    check = _verify_slice if value["kind"] == "slice" else _verify_model
    return check(path, note)


def _verify_slice(path: Path, note: onepass.Note | None) -> list[Problem]:
    info, problems = slices.read_slice_info(path)
    if info is None:
        return problems
    problems = slices.listing_problems(info)
    return problems or onepass.judge(slices.items(info), note).problems


def _verify_model(path: Path, note: onepass.Note | None) -> list[Problem]:
    info, problems = model_info.parse_info(path)
    if info is None:
        return problems
    problems = model_info.shared_file_problems(info)
    pieces = []
    for expert in info.slots:
        piece, found = model_info.member_info(info, expert)
        problems += found
        if piece is not None:
            pieces.append(piece)
            problems += slices.listing_problems(piece)
    if problems:
        return problems
    problems = model_info.anchor_problems(info, pieces[0]) + slices.dtype_problems(pieces)
    items = model_info.text_items(info) + model_info.shared_items(info)
    for piece in pieces:
        items += slices.items(piece)
    return problems + onepass.judge(items, note).problems


def identity(path: str | Path) -> dict[str, str]:
    """The digests by which a slice or a model is known.

    Raises:
      RefusedError: its flexolmo.json cannot be used.
    """
    value = _content(path)
    if value["kind"] == "slice":
        own = {"manifest_digest": manifests.manifest_digest(value)}
    else:
        own = {"model_digest": value["model_digest"]}
    return {"anchor_digest": value["anchor_digest"], **own}


def links(path: str | Path) -> dict[str, str]:
    """Parts of a model that lie elsewhere; empty for a whole model and for a slice.

    Raises:
      RefusedError: its flexolmo.json cannot be used.
    """
    return _content(path).get("links", {})


def trained_together(path: str | Path) -> str:
    """`ModelInfo.trained_together`; "" for a slice.

    Raises:
      RefusedError: its flexolmo.json cannot be used.
    """
    value = _content(path)
    return "" if value["kind"] == "slice" else str(value["training"].get("stage", ""))


def _content(path: str | Path) -> dict[str, Any]:
    value, problems = manifests.read(remote.local_dir(path))
    if value is None:
        raise RefusedError(f"{path} cannot be used", problems)
    return value

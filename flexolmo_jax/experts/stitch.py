# SPDX-License-Identifier: Apache-2.0
"""Stitch: one model from an anchor and slices, without training and without rewriting a byte.

`plan` reads JSON and lists folders; `execute` checks every byte on its only way through memory,
copies it or links to it, and writes the model's flexolmo.json last. The order in which slices are
given has no effect, and neither have links on the model's digest.
"""

import dataclasses
import os
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.config import ModelConfig, RouterConfig
from flexolmo_jax.errors import ConfigError, Problem, RefusedError
from flexolmo_jax.experts import manifest as manifests
from flexolmo_jax.experts import model_dir, model_info, onepass
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.files import atomic_directory, list_files, require_space
from flexolmo_jax.storage import cache
from flexolmo_jax.typed import from_dict

DEFAULT_ACTIVE = 2


@dataclasses.dataclass(frozen=True)
class StitchPlan:
    """A stitch that has passed every check which needs no array.

    Attributes:
      pieces: slot to slice, in slot order; slot 0 is the anchor's public slice.
    """

    anchor: model_info.ModelInfo
    config: ModelConfig
    pieces: dict[int, slices.SliceInfo]

    @property
    def slots(self) -> list[dict[str, Any]]:
        """The slot table of the model to be."""
        return [
            {"slot": slot, "expert": piece.expert, "manifest_digest": piece.digest}
            for slot, piece in self.pieces.items()
        ]

    @property
    def model_digest(self) -> str:
        """The identity of the model to be."""
        return manifests.model_digest(self.anchor.anchor_digest, self.config, self.slots)

    def table(self) -> str:
        """The plan as aligned text, one line per slot."""
        rows = [("slot", "expert", "MiB", "manifest", "from")]
        for slot in range(self.config.n_slots):
            piece = self.pieces.get(slot)
            if piece is None:
                rows.append((str(slot), "(empty)", "", "", ""))
                continue
            size = sum(list_files(piece.path)[0].values()) / 2**20
            cells = (piece.expert, f"{size:.2f}", piece.digest[7:19], str(piece.path))
            rows.append((str(slot), *cells))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        c = self.config
        lines.append(f"{c.n_active} active of {c.n_slots} slots; model {self.model_digest[7:19]}")
        return "\n".join(line.rstrip() for line in lines)


def plan(
    anchor: str | Path,
    experts: Sequence[str | Path],
    *,
    slots: int | None = None,
    like: str | Path | None = None,
    active: int | None = None,
) -> StitchPlan:
    """Checks an anchor and slices against each other and gives every expert its slot.

    Args:
      slots: capacity, the public expert included; None is as many as needed.
      like: a model whose capacity, positions and active experts to take; an expert that is not
        given leaves its slot empty, a new one takes the first free slot.
      active: experts per token; None is two (or one), or those of `like`.

    Raises:
      RefusedError: every problem of every slice.
      ConfigError: options that contradict each other.
    """
    if slots is not None and (like is not None or slots < 1):
        raise ConfigError(
            "Give --slots of 1 or more, or --like, which sets the capacity itself",
            got=f"slots={slots}, like={like}",
        )
    base, public = _read_anchor(anchor)
    like_info = None if like is None else model_info.read_info(like)
    pieces, problems = [], []
    for path in experts:
        piece, found = slices.read_slice_info(path)
        if piece is not None:
            found = _slice_problems(base, piece)
            pieces.append(piece)
        problems += found
    problems += _together_problems(base, pieces, like_info)
    problems += slices.dtype_problems([public, *pieces])
    capacity = like_info.config.n_slots if like_info else slots or len(pieces) + 1
    taken, found = _assign(pieces, capacity, like_info.slots if like_info else {})
    problems += found
    if problems:
        raise RefusedError("The slices cannot be stitched", problems)
    if active is None:
        active = like_info.config.n_active if like_info else min(len(taken) + 1, DEFAULT_ACTIVE)
    router = _router_of(base, pieces[0]) if pieces else base.config.router
    config = base.config.replace(n_slots=capacity, n_active=active, router=router)
    return StitchPlan(base, config, {0: public, **dict(sorted(taken.items()))})


def _read_anchor(path: str | Path) -> tuple[model_info.ModelInfo, slices.SliceInfo]:
    """The anchor and its public slice, or a RefusedError."""
    base, problems = model_info.parse_info(path)
    if base is None:
        raise RefusedError(f"{path} is not an anchor that can be used", problems)
    if not base.is_anchor:
        message = f"a stitched model with {', '.join(base.slots)}; only an anchor can be stitched"
        raise RefusedError(
            "The slices cannot be stitched",
            [Problem("not-an-anchor", str(path), "", message)],
            fix=f"name the anchor, and the slices in {base.path / model_info.EXPERTS} one by one",
        )
    public, problems = model_info.member_info(base, manifests.PUBLIC)
    problems = problems + model_info.shared_file_problems(base)
    if public is not None:
        problems += slices.listing_problems(public)
        problems += model_info.anchor_problems(base, public)
    if public is None or problems:
        raise RefusedError(f"{path} is not an anchor that can be used", problems)
    return base, public


def _slice_problems(base: model_info.ModelInfo, piece: slices.SliceInfo) -> list[Problem]:
    out = model_info.belongs_problems(base, piece)
    out += slices.listing_problems(piece)
    if piece.expert == manifests.PUBLIC:
        message = "the public expert comes with the anchor and cannot be given as a slice"
        out.append(Problem("bad-id", str(piece.path), "", message))
    return out


def _together_problems(
    base: model_info.ModelInfo,
    pieces: Sequence[slices.SliceInfo],
    like: model_info.ModelInfo | None,
) -> list[Problem]:
    out, seen = [], {}
    for piece in pieces:
        if piece.expert in seen:
            message = f"expert {piece.expert!r} is also given by {seen[piece.expert]}"
            out.append(Problem("duplicate-expert", str(piece.path), "", message))
        seen[piece.expert] = piece.path
    out += _router_problems(base, pieces)
    if like is not None and like.anchor_digest != base.anchor_digest:
        message = f"anchor_digest is {like.anchor_digest}, the anchor has {base.anchor_digest}"
        out.append(Problem("wrong-anchor", str(like.path), "", message))
    return out


def _router_problems(
    base: model_info.ModelInfo, pieces: Sequence[slices.SliceInfo]
) -> list[Problem]:
    """Slices that do not say which router, or not that of the others, or one of other leaves."""
    out, whose = [], {}
    for piece in sorted(pieces, key=lambda p: str(p.path)):
        router = _router_of(base, piece)
        if isinstance(router, str):
            out.append(Problem("router-mismatch", str(piece.path), "", router))
        elif _leaves(base.config.replace(router=router)) != _leaves(base.config):
            message = f"was trained with {router}, whose leaves are not those of the anchor's "
            message += f"{base.config.router}"
            out.append(Problem("router-mismatch", str(piece.path), "", message))
        else:
            whose.setdefault(router, []).append(str(piece.path))
    # Right is what the anchor says, if any slice does, else the first one.
    right = base.config.router if base.config.router in whose else next(iter(whose), None)
    for router, paths in whose.items():
        for path in paths if router != right else ():
            message = f"was trained with {router}, the slice {whose[right][0]} with {right}"
            out.append(Problem("router-mismatch", path, "", message))
    return out


def _leaves(config: ModelConfig) -> dict[str, Any]:
    """Shape and dtype of every leaf that a model of this configuration has."""
    return {**model_info.expected_shared(config), **slices.expected_slice(config)}


def _router_of(base: model_info.ModelInfo, piece: slices.SliceInfo) -> RouterConfig | str:
    """The router a slice was trained with, the anchor's if it does not say, or what is wrong."""
    recorded = piece.manifest["recipe"].get("router")
    if recorded is None:
        return base.config.router
    if not isinstance(recorded, Mapping):
        return "recipe.router is not an object"
    try:
        return from_dict(RouterConfig, recorded, "recipe.router")
    except ConfigError as e:
        return str(e)


def _assign(
    pieces: Iterable[slices.SliceInfo], capacity: int, known: Mapping[str, int]
) -> tuple[dict[int, slices.SliceInfo], list[Problem]]:
    """Slot to slice: the position in `known`, else the first free one in order of ids."""
    by_id = {piece.expert: piece for piece in sorted(pieces, key=lambda p: p.expert)}
    by_id.pop(manifests.PUBLIC, None)
    taken = {known[expert]: piece for expert, piece in by_id.items() if expert in known}
    # A slot that is known stays empty when its expert is not given.
    free = [s for s in range(1, capacity) if s not in known.values()]
    new = [piece for expert, piece in by_id.items() if expert not in known]
    out = []
    for piece in new[len(free) :]:
        message = f"no slot is left: capacity {capacity}, the public expert included"
        out.append(Problem("too-many-experts", str(piece.path), "", message))
    return {**taken, **dict(zip(free, new, strict=False))}, out


def execute(
    stitch_plan: StitchPlan,
    out: str | Path,
    *,
    link: bool = False,
    note: onepass.Note | None = None,
) -> dict[str, Any]:
    """Checks every byte and value of anchor and slices, once, and writes a new model directory.

    Args:
      link: copy no weights: the model names where they lie, relative to `out`.
      note: called now and then with the bytes that are done and the bytes there are.

    Returns:
      slots, model_digest, anchor_digest, links, bytes_copied, bytes_checked and peak_host_gib.

    Raises:
      RefusedError: every file and leaf that is not what its manifest says; nothing is left behind.
      ConfigError: links to what does not lie in a directory of its own on this machine.
      MachineError: the disk has too little room.
    """
    out, anchor = Path(out), stitch_plan.anchor
    links = _links(stitch_plan, out) if link else {}
    with atomic_directory(out) as work:
        items = model_info.text_items(anchor, work)
        items += model_info.shared_items(anchor, None if link else work)
        for piece in stitch_plan.pieces.values():
            folder = work / model_info.EXPERTS / piece.expert
            items += slices.items(piece, None if link else folder)
        size = sum(item.nbytes or 0 for item in items)
        if not link:
            require_space(out, size)
        judged = onepass.judge(items, note)
        if judged.problems:
            raise RefusedError("The slices cannot be stitched", judged.problems)
        copied = sum(item.target.stat().st_size for item in items if item.target is not None)
        for piece in () if link else stitch_plan.pieces.values():
            copied += _write_manifest(piece, work / model_info.EXPERTS / piece.expert)
        model_dir.write_info(
            work,
            config=stitch_plan.config,
            slots=stitch_plan.slots,
            shared=anchor.content["shared"],
            files=anchor.content["files"],
            training=anchor.training,
            anchor_digest=anchor.anchor_digest,
            links=links,
        )
    return {
        "slots": stitch_plan.slots,
        "model_digest": stitch_plan.model_digest,
        "anchor_digest": anchor.anchor_digest,
        "links": links,
        "bytes_copied": copied,
        "bytes_checked": judged.size,
        "peak_host_gib": peak_host_gib(),
    }


def _links(stitch_plan: StitchPlan, out: Path) -> dict[str, str]:
    """Part of the model to where it lies, as a path relative to the model's directory."""
    # Physical paths, as a relative path goes up through directories and not through links.
    home = out.parent.resolve() / out.name
    parts = {manifests.SHARED_LINK: stitch_plan.anchor.shared_path}
    for piece in stitch_plan.pieces.values():
        parts[manifests.EXPERT_LINK + piece.expert] = piece.path
    links = {}
    for name, path in parts.items():
        link = os.path.relpath(path.resolve(), home)
        if path.resolve().is_relative_to(cache.root().resolve()):
            raise ConfigError(
                "A model can link only to what lies on this machine, not to copies in the cache",
                got=path,
                fix="stitch without --link",
            )
        if not manifests.is_link(link):
            raise ConfigError(
                "A model cannot link to this path",
                got=link,
                expected="a directory outside the model, with a plain name",
                fix="move it, or stitch without --link",
            )
        links[name] = link
    return links


def _write_manifest(piece: slices.SliceInfo, folder: Path) -> int:
    """Writes from what was validated: equal bytes, as only one rendering is valid."""
    text = manifests.render(piece.manifest).encode()
    (folder / manifests.NAME).write_bytes(text)
    return len(text)


def peak_host_gib() -> float:
    """The most memory this process has held, GiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not what the system's usage says: that begins with the parent's memory.
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def unstitch(
    model: str | Path, expert: str, out: str | Path, note: onepass.Note | None = None
) -> dict[str, Any]:
    """Copies one expert out of a model: the slice directory exactly as its owner shipped it.

    Args:
      note: called now and then with the bytes that are done and the bytes there are.

    Raises:
      RefusedError: the slice is not what the model's slot table and its manifest say.
      ConfigError: no such expert, or the public one, which is part of the anchor.
      MachineError: the disk has too little room.
    """
    info, out = model_info.read_info(model), Path(out)
    info.expert_path(expert)
    if expert == manifests.PUBLIC:
        raise ConfigError("The public expert is part of the anchor, it is no slice", got=expert)
    piece, problems = model_info.member_info(info, expert)
    if piece is not None:
        problems += slices.listing_problems(piece)
    if piece is None or problems:
        raise RefusedError(f"Expert {expert!r} cannot be taken out", problems)
    with atomic_directory(out) as work:
        items = slices.items(piece, work)
        require_space(out, sum(item.nbytes or 0 for item in items))
        judged = onepass.judge(items, note)
        if judged.problems:
            raise RefusedError(f"Expert {expert!r} cannot be taken out", judged.problems)
        copied = judged.size + _write_manifest(piece, work)
    return {
        "expert": expert,
        "manifest_digest": piece.digest,
        "bytes_copied": copied,
        "peak_host_gib": peak_host_gib(),
    }

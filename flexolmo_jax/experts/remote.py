# SPDX-License-Identifier: Apache-2.0
"""Model and slice directories of a URL, on this machine: verified copies, or regions read there.

A directory is copied into the cache when it is opened, an expert of a model when that expert is;
every file is checked against the manifest on its way. In a run of several processes large files
stay where they are: each process checks its share of them and then reads only the regions it needs.
"""

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from flexolmo_jax.errors import CheckpointError, Problem, RefusedError
from flexolmo_jax.experts import leafio, regions
from flexolmo_jax.experts import manifest as manifests
from flexolmo_jax.storage import cache, client, output, urls

EXPERTS = "experts"
# Files that describe arrays or tokens; what is larger is not ours.
MAX_SMALL = 64 << 20
LARGE = 8 << 20
_ORIGIN = ".origin"
# What this process has checked where it lies; a version of an object does not change.
_checked: set[cache.Wanted] = set()


@dataclasses.dataclass(frozen=True)
class _Share:
    """Which process of how many checks which files; None reads copies."""

    index: int
    count: int


_share: contextvars.ContextVar[_Share | None] = contextvars.ContextVar("share", default=None)
_fresh: contextvars.ContextVar[bool] = contextvars.ContextVar("fresh", default=False)


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Within it, every object is read again, whatever the cache holds."""
    token = _fresh.set(True)
    try:
        yield
    finally:
        _fresh.reset(token)


@contextlib.contextmanager
def by_region(index: int, count: int) -> Iterator[None]:
    """Within it, large files are not copied; this process checks one share in `count` of them.

    What the processes of a run do by themselves.
    """
    token = _share.set(_Share(index, count))
    try:
        yield
    finally:
        _share.reset(token)


def local_dir(path: str | Path) -> Path:
    """A model or slice directory on this machine; a local path is returned as it is.

    Raises:
      RefusedError: objects that are missing, too many, or not what the manifest says.
      ConfigError, MachineError: see `storage.client`.
    """
    url = urls.as_url(path)
    if url is not None:
        return _view(url)
    path = Path(path)
    if path.parent.name != EXPERTS or not path.is_relative_to(cache.root()):
        return path
    origin = path.parent.parent.with_name(path.parent.parent.name + _ORIGIN)
    if not origin.is_file() or (path.exists() and not _fresh.get()):
        return path
    return _view(f"{origin.read_text(encoding='utf-8')}/{EXPERTS}/{path.name}", path)


def _view(url: str, target: Path | None = None) -> Path:
    """Fetches what a manifest at `url` lists, and lays it out."""
    data = client.read(f"{url}/{manifests.NAME}", manifests.MAX_BYTES)
    listing = client.list_objects(url)
    value, problems = _parsed(url, data, listing)
    if value is None:
        raise RefusedError(f"{url} is no model or slice that can be used", problems)
    assert data is not None
    wanted, problems = _wanted(url, value, listing)
    if problems:
        raise RefusedError(f"{url} cannot be used", problems)
    share = _share.get() or _share_of_run()
    view = target or cache.view_path(url, hashlib.sha256(data).hexdigest())
    if share is not None and target is None:
        view = view.with_name(view.name + regions.MARK)
    there: dict[str, cache.Wanted] = {}
    if share is not None:
        there = {name: w for name, w in wanted.items() if w.size >= LARGE}
        problems += _check_share(there, share)
    here = {name: w for name, w in wanted.items() if name not in there}
    blobs, found = cache.fetch(url, here, again=_fresh.get())
    if problems + found:
        raise RefusedError(f"{url} is not what its manifest says", problems + found)
    blobs[manifests.NAME] = cache.keep(data)
    if value["kind"] == "model":
        cache.note(view.with_name(view.name + _ORIGIN), url)
    if there:
        regions.note(view, {name: (w.url, w.etag) for name, w in there.items()})
    return cache.lay_out(view, blobs, {name: w.size for name, w in there.items()})


def _parsed(
    url: str, data: bytes | None, listing: Mapping[str, client.Entry]
) -> tuple[dict[str, Any] | None, list[Problem]]:
    where = f"{url}/{manifests.NAME}"
    if data is not None:
        return manifests.parse(data, where)
    message = "no flexolmo.json under this URL"
    if output.CLAIM in listing:
        message += "; an upload to it was not finished"
    elif not listing:
        message = "there is nothing under this URL"
    return None, [Problem("file-missing", where, "", message)]


def _wanted(
    url: str, value: Mapping[str, Any], listing: Mapping[str, client.Entry]
) -> tuple[dict[str, cache.Wanted], list[Problem]]:
    """Files that the manifest lists, as the store has them; names and sizes that do not fit."""
    files: Mapping[str, str] = value["files"]
    slots = {row["expert"] for row in value["slots"]} if value["kind"] == "model" else set()
    out, problems = {}, []
    for name in sorted(set(listing) - set(files) - {manifests.NAME, output.CLAIM}):
        parts = name.split("/")
        if parts[0] == EXPERTS and len(parts) > 2 and parts[1] in slots:
            continue
        code = "leftover-state" if manifests.is_leftover(name) else "file-extra"
        problems.append(Problem(code, f"{url}/{name}", "", "there, but not listed"))
    sizes = _sizes(value)
    for name, digest in sorted(files.items()):
        where, entry = f"{url}/{name}", listing.get(name)
        if entry is None:
            problems.append(Problem("file-missing", where, "", "listed, but not there"))
        elif (entry.size > MAX_SMALL and name not in sizes) or entry.size != sizes.get(
            name, entry.size
        ):
            message = f"{entry.size} bytes, expected {sizes.get(name, f'at most {MAX_SMALL}')}"
            problems.append(Problem("file-size", where, "", message))
        else:
            out[name] = cache.Wanted(where, digest, entry.size, entry.etag)
    return out, problems


def _sizes(value: Mapping[str, Any]) -> dict[str, int]:
    """Path to size of the files that hold leaves, which alone may be large."""
    model = value["kind"] == "model"
    folder, table = ("shared", value["shared"]) if model else ("params", value["leaves"])
    return {
        f"{folder}/{leafio.leaf_file(name, entry['shape'])}": math.prod(entry["shape"])
        * manifests.DTYPES[entry["dtype"]]
        for name, entry in table.items()
    }


def _check_share(there: Mapping[str, cache.Wanted], share: _Share) -> list[Problem]:
    """Problems in this process's share; no run goes on when one of its processes refuses."""
    problems: list[Problem] = []
    for i, w in enumerate(there.values()):
        if i % share.count == share.index and w not in _checked:
            found = cache.check(w)
            problems += found
            _checked.update(() if found else (w,))
    return problems


def _share_of_run() -> _Share | None:
    """The share of this process in a run of several; asked without starting a device."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    return _Share(jax.process_index(), jax.process_count())


def final_dir(run: str | Path, folder: str, name: str) -> Path:
    """The final weights of a run on this machine; of a URL, a copy checked against their list.

    Args:
      folder, name: where below the run they lie, and the file there that lists them.

    Raises:
      CheckpointError: a URL of a run that has not ended.
      RefusedError: files that are missing or not what the list says.
    """
    url = urls.as_url(run)
    if url is None:
        return Path(run) / folder
    url = f"{url}/{folder}"
    data = client.read(f"{url}/{name}", manifests.MAX_BYTES)
    if data is None:
        raise CheckpointError(
            "The run has no final weights",
            where=url,
            fix="finish it with the same `flexolmo train` command, or name its workdir",
        )
    files = _listed_files(data)
    listing = client.list_objects(url)
    problems = [
        Problem("file-missing", f"{url}/{n}", "", "listed, but not there")
        for n in sorted(set(files) - set(listing))
    ]
    wanted = {
        n: cache.Wanted(f"{url}/{n}", digest, listing[n].size, listing[n].etag)
        for n, digest in files.items()
        if n in listing
    }
    blobs, found = cache.fetch(url, {} if problems else wanted)
    if problems + found:
        raise RefusedError(f"{url} is not what its list says", problems + found)
    blobs[name] = cache.keep(data)
    return cache.lay_out(cache.view_path(url, hashlib.sha256(data).hexdigest()), blobs)


def _listed_files(data: bytes) -> dict[str, str]:
    """Path to digest; nothing where they could not be files of a directory.

    Whether the list is genuine is for its reader to say, who sees the same bytes.
    """
    try:
        files = json.loads(data)["files"]
        safe = all(
            manifests.is_safe_path(n) and manifests.DIGEST.fullmatch(files[n]) for n in files
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return dict(files) if safe else {}

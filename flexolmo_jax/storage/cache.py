# SPDX-License-Identifier: Apache-2.0
"""Verified copies of objects on this machine, kept by the digest of their content.

A file is in the cache once it has been read whole and its SHA-256 was the expected one. Equal
content is kept once, whatever its URLs; several processes may fill and read one cache.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from flexolmo_jax.errors import Problem
from flexolmo_jax.files import require_space, write_text
from flexolmo_jax.storage import client, urls

logger = logging.getLogger("flexolmo")
VARIABLE = "FLEXOLMO_CACHE"
_TICK_S = 10.0
# Objects without a digest are read whole into memory first.
MAX_UNLISTED = 1 << 30


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An object and what it must be; `digest` is "sha256:" and 64 hex digits."""

    url: str
    digest: str
    size: int
    etag: str | None = None


def root() -> Path:
    """The folder of the cache: $FLEXOLMO_CACHE, else ~/.cache/flexolmo."""
    named = os.environ.get(VARIABLE)
    return Path(named).absolute() if named else Path.home() / ".cache" / "flexolmo"


def view_path(url: str, digest: str) -> Path:
    """Where a directory of objects is laid out; its name tells where it came from."""
    scheme, bucket, key = urls.split(url)
    return root() / "views" / scheme / bucket / f"{key}@{digest.removeprefix('sha256:')[:16]}"


def work_folder() -> Path:
    """A new folder on the disk of the cache, for its maker to remove."""
    folder = root() / "work"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder))


def _blob(digest: str) -> Path:
    name = digest.removeprefix("sha256:")
    return root() / "blobs" / name[:2] / name


def fetch(
    origin: str, wanted: Mapping[str, Wanted], *, again: bool = False
) -> tuple[dict[str, Path], list[Problem]]:
    """Local files of the objects, all of them checked; objects of other content are problems.

    Args:
      origin: what to say that the objects come from.
      again: read them also where the cache has them, as their store may have changed.

    Raises:
      MachineError: too little room, or no answer from the store.
    """
    missing = [w for w in wanted.values() if again or not _holds(_blob(w.digest), w.size)]
    if not again:  # Equal files travel once.
        missing = list({w.digest: w for w in missing}.values())
    total = sum(w.size for w in missing)
    problems: list[Problem] = []
    if missing:
        require_space(_blob("0" * 64), total)
        what = f"{len(missing)} files, {total / 1e6:.1f} MB, from {origin}"
        logger.info("fetching %s", what)
        progress = _Progress(what, total)
        with concurrent.futures.ThreadPoolExecutor(client.THREADS) as pool:
            for found in pool.map(lambda w: _fetch_one(w, progress, again), missing):
                problems += found
    return {name: _blob(w.digest) for name, w in wanted.items()}, problems


def _holds(blob: Path, size: int) -> bool:
    return blob.is_file() and blob.stat().st_size == size


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; a killed process's lock is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_one(w: Wanted, progress: "_Progress", again: bool) -> list[Problem]:
    blob = _blob(w.digest)
    with _lock(blob.with_name(blob.name + ".lock")):
        if _holds(blob, w.size) and not again:
            return []
        part = blob.with_name(blob.name + ".part")
        try:
            with open(part, "wb") as file:
                problems = check(w, file.write, progress)
                file.flush()
                os.fsync(file.fileno())
            if not problems:
                part.chmod(0o444)
                os.replace(part, blob)
        finally:
            part.unlink(missing_ok=True)
    return problems


def check(
    w: Wanted, sink: Callable[[bytes], object] | None = None, progress: "_Progress | None" = None
) -> list[Problem]:
    """Reads an object where it lies and compares it with its digest.

    Args:
      sink: is given the bytes, in order.
    """
    digest = hashlib.sha256()
    for part in client.stream(w.url, w.size, w.etag):
        digest.update(part)
        if sink is not None:
            sink(part)
        if progress is not None:
            progress.add(len(part))
    got = "sha256:" + digest.hexdigest()
    if got == w.digest:
        return []
    return [Problem("file-digest", w.url, "", f"content has {got}, listed {w.digest}")]


class _Progress:
    """A line every ten seconds while much is fetched."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._shown, self._lock = time.monotonic(), threading.Lock()

    def add(self, size: int) -> None:
        """Counts bytes that have arrived."""
        with self._lock:
            self._done += size
            now = time.monotonic()
            if now - self._shown < _TICK_S:
                return
            self._shown = now
            logger.info("fetching %s: %d %%", self._what, 100 * self._done // self._total)


def keep(data: bytes) -> Path:
    """The file of the cache that holds these bytes."""
    blob = _blob(hashlib.sha256(data).hexdigest())
    if not _holds(blob, len(data)):
        blob.parent.mkdir(parents=True, exist_ok=True)
        part = _own(blob)
        part.write_bytes(data)
        part.chmod(0o444)
        os.replace(part, blob)
    return blob


def single(url: str) -> Path | None:
    """A copy of one object whose digest no one has listed; None where there is no such object."""
    data = client.read(url, MAX_UNLISTED)
    if data is None:
        return None
    blob = keep(data)
    return (
        lay_out(view_path(url, blob.name), {url.rpartition("/")[2]: blob}) / url.rpartition("/")[2]
    )


def mirror(url: str, listing: Mapping[str, client.Entry]) -> Path:
    """A copy of objects below a URL whose digests no one has listed; new where one has changed."""
    version = json.dumps({name: [e.size, e.etag] for name, e in sorted(listing.items())})
    view = view_path(url, hashlib.sha256(version.encode()).hexdigest())
    if view.is_dir():
        return view
    files = {}
    for name in listing:
        data = client.read(f"{url}/{name}", MAX_UNLISTED)
        if data is not None:
            files[name] = keep(data)
    return lay_out(view, files)


def note(path: Path, text: str) -> None:
    """Writes a small file of the cache, which another process may be writing too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text, _own(path))


def _own(path: Path) -> Path:
    """A name beside `path` that no other thread or process uses."""
    return path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")


def lay_out(view: Path, files: Mapping[str, Path], hollow: Mapping[str, int] | None = None) -> Path:
    """A directory of files from the cache; appears whole, and an existing one is kept.

    Hard links, as a directory of links to elsewhere is refused by every reader of this package.

    Args:
      hollow: path to size of files without content, whose bytes are read elsewhere.
    """
    if view.is_dir():
        return view
    work = work_folder()
    try:
        for name, blob in files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            link(blob, work / name)
        for name, size in (hollow or {}).items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            with open(work / name, "wb") as file:
                file.truncate(size)
        view.parent.mkdir(parents=True, exist_ok=True)
        work.chmod(0o755)
        with contextlib.suppress(OSError):  # Another process was first, with the same content.
            os.rename(work, view)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return view


def link(blob: Path, target: Path) -> None:
    """The file under another name; a copy where the disk knows no links."""
    try:
        os.link(blob, target)
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(blob, target)

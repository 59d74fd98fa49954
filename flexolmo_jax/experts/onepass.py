# SPDX-License-Identifier: Apache-2.0
"""One pass over many files: digests, finiteness and, where asked, the copy.

Every byte is read once. A worker holds one block, small enough to stay in its core's cache while
it is hashed for the file, hashed for the leaf, looked through and written; workers share nothing,
so that speed grows with cores as long as there are files. Hashing, reading, writing and numpy all
let the other workers run.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import io
import math
import os
import stat
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax import tree as trees
from flexolmo_jax.errors import Problem
from flexolmo_jax.experts import leafio, regions

BLOCK = 1 << 20
MAX_WORKERS = 32
# Bytes that are done and bytes there are in all.
Note = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Item:
    """A file and what is said of it.

    Attributes:
      digest: of its bytes, as listed.
      leaf: name of the leaf whose values it holds; "" for a file that holds none.
      entry: shape, dtype and digest of that leaf.
      where: what to call the tree of that leaf in an error.
      target: where to copy it; None only reads.
    """

    path: Path
    digest: str
    leaf: str = ""
    entry: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""
    target: Path | None = None

    @property
    def nbytes(self) -> int | None:
        """The size that a leaf's file must have; None for other files."""
        if not self.leaf:
            return None
        return math.prod(self.entry["shape"]) * np.dtype(self.entry["dtype"]).itemsize


@dataclasses.dataclass(frozen=True)
class Stamp:
    """What the system says of a file.

    Attributes:
      file: which one it is, its size and when its bytes were last written; a writer can set that
        time back.
      status: when anything about it changed; nobody can set it, but a new hard link to the file
        changes it too.
    """

    file: tuple[int, ...]
    status: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Stamp":
        """The stamp of a file that was opened or looked up."""
        return cls(
            (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns), found.st_ctime_ns
        )


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a pass found.

    Attributes:
      size: bytes that were read.
      stamps: path to what the system says of each file; it differs once a file was changed.
    """

    problems: list[Problem]
    size: int
    stamps: dict[Path, Stamp]


def workers() -> int:
    """Threads for a pass: the cores that this process may use."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)) if _LINUX else os.cpu_count() or 1)


_LINUX = hasattr(os, "sched_getaffinity")


def judge(items: Collection[Item], note: Note | None = None) -> Judged:
    """Reads every file once, copies those with a target, and names all that is not as listed.

    A file with other bytes than listed is named as such; its leaf is judged only if they agree.

    Args:
      note: called now and then from the threads, one at a time.
    """
    run = _Pass(sum(_size(item.path) for item in items), note)
    for folder in {item.target.parent for item in items if item.target is not None}:
        folder.mkdir(parents=True, exist_ok=True)
    # The largest first, so that no core waits long for the last file.
    todo = sorted(items, key=lambda item: -_size(item.path))
    with concurrent.futures.ThreadPoolExecutor(workers()) as pool:
        jobs = {item.path: pool.submit(run.one, item) for item in todo}
        try:
            found = {path: job.result() for path, job in jobs.items()}
        finally:
            # An interrupt or a fault would otherwise wait for every file of a model.
            run.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    problems = [problem for item in items for problem in found[item.path]]
    return Judged(problems, run.done, run.stamps)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


class _Pass:
    """What the workers of one pass share."""

    def __init__(self, total: int, note: Note | None):
        self.total, self.note = total, note
        self.done, self.stamps = 0, {}
        self.stop, self.lock, self.own = threading.Event(), threading.Lock(), threading.local()

    def one(self, item: Item) -> list[Problem]:
        """Reads one file to its end."""
        where = str(item.path)
        if regions.source(item.path) is not None:
            return []  # Its bytes lie in object storage, and were checked there when it was opened.
        try:
            with open(item.path, "rb", buffering=0, opener=_open) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    return [Problem("not-a-file", where, "", "neither a file nor a folder")]
                if item.nbytes not in (None, status.st_size):
                    message = f"{status.st_size} bytes, expected {item.nbytes}"
                    return [Problem("file-size", where, "", message)]
                self.stamps[item.path] = Stamp.of(status)
                return self._through(item, file)
        except FileNotFoundError:
            return [Problem("file-missing", where, "", "listed, but not there")]
        except OSError as e:
            if e.errno != errno.ELOOP:
                raise
            return [Problem("symlink", where, "", "symbolic links are not followed")]

    def _through(self, item: Item, file: io.FileIO) -> list[Problem]:
        if item.target is None:
            return self._blocks(item, file, lambda block: None)
        with open(item.target, "xb", buffering=0) as out:
            problems = self._blocks(item, file, lambda block: _write(out, block))
            if item.leaf:
                # What was verified is what stays after a power cut.
                os.fsync(out.fileno())
        return problems

    def _blocks(
        self, item: Item, file: io.FileIO, write: Callable[[memoryview], None]
    ) -> list[Problem]:
        whole, entry, finite = hashlib.sha256(), item.entry, True
        leaf, dtype = hashlib.sha256(), np.dtype(entry.get("dtype", "uint8"))
        if item.leaf:
            leaf.update(trees.leaf_header(dtype, entry["shape"]))
        while block := self._fill(file):
            whole.update(block)
            if item.leaf:
                leaf.update(block)
                finite = finite and leafio.all_finite(np.frombuffer(block, dtype))
            write(block)
        got = "sha256:" + whole.hexdigest()
        if got != item.digest:
            message = f"content has {got}, listed {item.digest}"
            return [Problem("file-digest", str(item.path), "", message)]
        if not item.leaf:
            return []
        return leaf_problems(item.where, item.leaf, entry, "sha256:" + leaf.hexdigest(), finite)

    def _fill(self, file: io.FileIO) -> memoryview:
        """The next block, a whole one unless the file ends; empty at its end."""
        if not hasattr(self.own, "buffer"):
            self.own.buffer = memoryview(bytearray(BLOCK))
        buffer, filled = self.own.buffer, 0
        while filled < BLOCK and (got := file.readinto(buffer[filled:])):
            filled += got
        with self.lock:
            self.done += filled
            if self.note is not None:
                self.note(self.done, self.total)
        if self.stop.is_set():
            raise concurrent.futures.CancelledError
        return buffer[:filled]


def _open(path: str, flags: int) -> int:
    # Neither a link nor a pipe that was put there after the listing can lead elsewhere or wait.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _write(out: io.FileIO, block: memoryview) -> None:
    while block:
        block = block[out.write(block) :]


def leaf_problems(
    where: str, name: str, entry: Mapping[str, Any], got: str, finite: bool
) -> list[Problem]:
    """Whether a leaf's digest is the one in its table, and its values are finite."""
    out = []
    if got != entry["digest"]:
        message = f"values have {got}, listed {entry['digest']}"
        out.append(Problem("leaf-digest", where, name, message))
    if not finite:
        out.append(Problem("not-finite", where, name, "holds NaN or infinity"))
    return out

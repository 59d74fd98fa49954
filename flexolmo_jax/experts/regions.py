# SPDX-License-Identifier: Apache-2.0
"""Files of the cache whose bytes lie in object storage: read there, region by region.

In the directory they stand as files of the right size without content; what is read of one goes
through `read_values`, which asks the store for exactly the version whose bytes were checked.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flexolmo_jax.errors import CheckpointError
from flexolmo_jax.storage import cache, client

# Part of the name of a directory that holds such files.
MARK = "-regions"


def _note_of(view: Path) -> Path:
    name = hashlib.sha256(str(view).encode()).hexdigest()[:32]
    return cache.root() / "regions" / f"{name}.json"


def note(view: Path, files: Mapping[str, tuple[str, str | None]]) -> None:
    """Writes down which files of a directory lie elsewhere: path to URL and version."""
    cache.note(_note_of(view), json.dumps(files))


def source(path: Path) -> tuple[str, str | None] | None:
    """URL and version of a file whose bytes lie elsewhere; None for an ordinary file."""
    if MARK not in str(path) or not path.is_relative_to(cache.root()):
        return None
    for view in path.parents:
        if _note_of(view).is_file():
            found = json.loads(_note_of(view).read_text(encoding="utf-8"))
            url, etag = found.get(path.relative_to(view).as_posix(), (None, None))
            return (url, etag) if url else None
    return None


def read_values(path: Path, dtype: np.dtype, start: int, count: int) -> np.ndarray:
    """`count` values of a leaf's file from number `start` on, wherever its bytes lie.

    Raises:
      CheckpointError: the file is too short.
    """
    there, first = source(path), start * dtype.itemsize
    if there is None:  # Copied, as mapped files count as resident memory.
        flat = np.fromfile(path, dtype, count=count, offset=first)
    else:
        flat = np.empty(count, dtype)
        client.read_into(there[0], first, flat.view(np.uint8).data, there[1])
    if flat.size != count:
        raise CheckpointError(
            "The file of a leaf is too short",
            got=start + flat.size,
            expected=start + count,
            where=path,
        )
    return flat

# SPDX-License-Identifier: Apache-2.0
"""Files of a preparation under way: on a disk that all its processes see, or in object storage.

A place is a text: a path, or a URL as `storage.urls` spells it. A file appears whole.
"""

import os
import shutil
import uuid
from pathlib import Path

from flexolmo_jax.storage import client, urls


def is_url(place: str) -> bool:
    """Whether the place is in object storage."""
    return urls.as_url(place) is not None


def read(place: str, start: int = 0, stop: int | None = None) -> bytes | None:
    """Bytes of a file, of a part of it, or None where there is no such file."""
    if is_url(place):
        return client.read(place) if stop is None else client.read_range(place, start, stop)
    try:
        with open(place, "rb") as f:
            f.seek(start)
            return f.read() if stop is None else f.read(stop - start)
    except FileNotFoundError:
        return None


def write(place: str, data: bytes) -> None:
    """Writes a file; processes that write the same content do not disturb each other."""
    if is_url(place):
        client.write(place, data)
        return
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sizes(place: str) -> dict[str, int]:
    """Path below the place to bytes, of every file there."""
    if is_url(place):
        return {name: entry.size for name, entry in client.list_objects(place).items()}
    base = Path(place)
    files = (p for p in base.rglob("*") if p.is_file())
    return {p.relative_to(base).as_posix(): p.stat().st_size for p in files}


def put(source: Path, place: str) -> None:
    """Moves a finished local file to its place."""
    if is_url(place):
        client.write(place, source)
        return
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    partial = f"{place}.{uuid.uuid4().hex}.tmp"
    try:
        shutil.move(source, partial)
        os.replace(partial, place)
    finally:
        Path(partial).unlink(missing_ok=True)


def fetch(place: str, target: Path) -> None:
    """A local file with the content of a file of a place; a link where that is the same disk."""
    if is_url(place):
        size = client.list_objects(place.rpartition("/")[0])[place.rpartition("/")[2]].size
        with open(target, "wb") as f:
            for part in client.stream(place, size):
                f.write(part)
        return
    try:
        os.link(place, target)
    except OSError:
        shutil.copyfile(place, target)


def remove(place: str) -> None:
    """Removes all files of a place."""
    if is_url(place):
        names = list(client.list_objects(place))
        for start in range(0, len(names), 1000):
            client.delete(place, names[start : start + 1000])
    else:
        shutil.rmtree(place, ignore_errors=True)

# SPDX-License-Identifier: Apache-2.0
"""Directories written to object storage: complete, or not there.

Object stores have no rename, so what makes a directory valid is one object that is written last
and only where there is none. A claim, written first in the same way, keeps two writers of
different content from mixing their files; the same content may be sent again after an interruption.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from flexolmo_jax import tree as trees
from flexolmo_jax.errors import ConfigError, MachineError
from flexolmo_jax.files import hash_files, list_files
from flexolmo_jax.storage import cache, client, urls

logger = logging.getLogger("flexolmo")
CLAIM = ".flexolmo-upload.json"


@contextlib.contextmanager
def directory(out: str | Path, marker: str) -> Iterator[Path]:
    """Yields where to build a new directory: `out` itself, or a local one that is then uploaded.

    Args:
      marker: the file without which the directory is none; the last to be written.

    Raises:
      ConfigError: a URL where something lies already, or another writer is faster.
    """
    url = urls.as_url(out)
    if url is None:
        yield Path(out)
        return
    require_free(url, marker)
    work = cache.work_folder()
    try:
        folder = work / url.rpartition("/")[2]
        yield folder
        upload(folder, url, marker)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def require_free(url: str, marker: str) -> None:
    """Refuses a URL under which something lies, before hours of work; an upload may be resumed.

    Raises:
      ConfigError: see above.
    """
    found = client.list_objects(url)
    if marker in found:
        raise ConfigError("The output exists already", where=url, fix="name another one")
    if found and CLAIM not in found:
        raise ConfigError(
            "There are other objects under the output",
            got=f"{len(found)} objects, {sorted(found)[0]} among them",
            where=url,
            fix="name another one, or remove them",
        )


def upload(folder: Path, url: str, marker: str) -> None:
    """Uploads a local directory as a new one; it counts once its marker is there.

    Raises:
      ConfigError: another writer's files are there.
      MachineError: what arrived is not what was sent.
    """
    files, problems = list_files(folder)
    if problems or marker not in files:
        raise MachineError("The directory cannot be uploaded", got=problems or marker, where=folder)
    digests = hash_files(folder, files)
    _claim(url, digests)
    if marker in client.list_objects(url):  # Finished before the claim: nothing was touched yet.
        client.delete(url, [CLAIM])
        raise _taken(url)
    logger.info("sending %d files, %.1f MB, to %s", len(files), sum(files.values()) / 1e6, url)
    client.write_files(folder, url, sorted(set(files) - {marker}))
    arrived = {name: e.size for name, e in client.list_objects(url).items()}
    sent = {name: size for name, size in files.items() if name != marker}
    arrived.pop(CLAIM, None)
    if marker in arrived:
        raise _taken(url)
    if arrived != sent:
        odd = sorted(n for n in {*arrived, *sent} if arrived.get(n) != sent.get(n))
        raise MachineError("What arrived is not what was sent", got=", ".join(odd[:5]), where=url)
    if not client.write(f"{url}/{marker}", (folder / marker).read_bytes(), create=True):
        raise _taken(url)
    client.delete(url, [CLAIM])


def _taken(url: str) -> ConfigError:
    return ConfigError(
        "Another writer finished this output first",
        where=url,
        fix="use what is there (flexolmo verify), or name another output",
    )


def _claim(url: str, digests: Mapping[str, str]) -> None:
    """Makes the place this content's own, or says who has it."""
    text = json.dumps({"kind": "upload", "digest": trees.json_digest(dict(digests))})
    if client.write(f"{url}/{CLAIM}", text.encode(), create=True):
        return
    if client.read(f"{url}/{CLAIM}", limit=1 << 16) == text.encode():
        logger.info("going on with an interrupted upload to %s", url)
        return
    raise ConfigError(
        "Another writer is filling this output, or was interrupted",
        where=url,
        fix="name another output; or, if no one is writing it, remove all objects under it",
    )

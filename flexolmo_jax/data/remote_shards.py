# SPDX-License-Identifier: Apache-2.0
"""Token shards of a URL: each host fetches a file when it first reads from it, and checks it then.

Sidecar and document lengths are fetched when the set is opened, and the names and sizes of all
files compared with one listing. A file is read at random afterwards, so it is copied whole; the
copy is kept by its digest, and every record of it is checked once in each process.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.data import verify_shards
from flexolmo_jax.data.verify_shards import LENGTHS, SIDECAR
from flexolmo_jax.errors import DataError
from flexolmo_jax.storage import cache, client, urls

_MAX_SIDECAR = 256 << 20
_SUFFIX = ".array_record"


@dataclasses.dataclass
class RemoteShards:
    """The record files of a set that lies in object storage.

    Attributes:
      folder: where files of this set are once they were fetched.
      verify: also check every record of a file when it arrives.
      checked: names of the files that this process has checked.
    """

    url: str
    folder: Path
    info: Mapping[str, Any]
    lengths: np.ndarray
    etags: Mapping[str, str | None]
    verify: bool
    checked: set[str] = dataclasses.field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "checked": set()}

    def ensure(self, names: Collection[str]) -> None:
        """Makes files readable in `folder`.

        Raises:
          DataError: content that the sidecar does not name.
          MachineError: no room, or no answer from the store.
        """
        files = self.info["files"]
        wanted = {
            name: cache.Wanted(
                f"{self.url}/{name}", files[name]["digest"], files[name]["bytes"], self.etags[name]
            )
            for name in names
            if name not in self.checked
        }
        if not wanted:
            return
        blobs, problems = cache.fetch(self.url, wanted)
        for problem in problems:
            raise DataError("A shard was altered", got=problem.message, where=problem.path)
        for name, blob in blobs.items():
            cache.link(blob, self.folder / name)
            if self.verify:
                self._check(name)
            self.checked.add(name)

    def _check(self, name: str) -> None:
        first = 0
        for other, item in self.info["files"].items():
            last = first + item["documents"]
            if other == name:
                lengths = self.lengths[first:last]
                verify_shards.check_records(self.folder / name, self.info, item, lengths)
            first = last


def open_remote(url: str, verify: bool) -> RemoteShards:
    """Fetches what describes the set, and compares the listing with it.

    Raises:
      DataError: no sidecar, or files that do not fit it.
      ConfigError, MachineError: see `storage.client`.
    """
    data = client.read(f"{url}/{SIDECAR}", _MAX_SIDECAR)
    if data is None:
        raise DataError(
            "Not a token-shard directory: there is no sidecar",
            expected=SIDECAR,
            where=url,
            fix="prepare the data first (flexolmo prepare)",
        )
    view = cache.view_path(url, hashlib.sha256(data).hexdigest())
    cache.lay_out(view, {SIDECAR: cache.keep(data)})
    info = verify_shards.read_sidecar(view)
    listing = client.list_objects(url)
    _check_listing(url, info, listing)
    entry, digest = listing[LENGTHS], info["document_lengths_digest"]
    wanted = cache.Wanted(f"{url}/{LENGTHS}", digest, entry.size, entry.etag)
    blobs, problems = cache.fetch(url, {LENGTHS: wanted})
    for problem in problems:
        what = "The document lengths were altered"
        raise DataError(what, got=problem.message, where=problem.path)
    cache.link(blobs[LENGTHS], view / LENGTHS)
    lengths = verify_shards.read_lengths(view, info)
    etags = {name: listing[name].etag for name in info["files"]}
    return RemoteShards(url, view, info, lengths, etags, verify)


def _check_listing(url: str, info: Mapping[str, Any], listing: Mapping[str, client.Entry]) -> None:
    present = {name for name in listing if name.endswith(_SUFFIX) and "/" not in name}
    for name in sorted(present - set(info["files"])):
        raise DataError("A shard that the sidecar does not know", where=f"{url}/{name}")
    for name in sorted({*info["files"], LENGTHS} - set(listing)):
        raise DataError("A file of the shards is missing", where=f"{url}/{name}")
    for name, item in info["files"].items():
        if listing[name].size != item["bytes"]:
            raise DataError(
                "A shard has another size",
                got=f"{listing[name].size} bytes",
                expected=f"{item['bytes']} bytes",
                where=f"{url}/{name}",
            )


def find(url: str, split: str) -> dict[str, str]:
    """Domain to URL of the sets below a URL: itself, <domain>/<split> or <domain>."""
    names = client.list_objects(url)
    if SIDECAR in names:
        parts = urls.split(url)[2].split("/")
        return {parts[-2] if parts[-1] == split and len(parts) > 1 else parts[-1]: url}
    found = {}
    for domain in sorted({name.split("/")[0] for name in names if "/" in name}):
        for below in (f"{domain}/{split}", domain):
            if f"{below}/{SIDECAR}" in names:
                found[domain] = f"{url}/{below}"
                break
    return found


def other_files(url: str) -> Path:
    """A local copy of the files below a URL that are no token shards, such as tasks' questions."""
    listing = client.list_objects(url)
    sets = [name.removesuffix(SIDECAR) for name in listing if name.endswith(SIDECAR)]
    names = [n for n in sorted(listing) if not any(n.startswith(s) for s in sets)]
    return cache.mirror(url, {name: listing[name] for name in names})

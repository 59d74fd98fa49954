# SPDX-License-Identifier: Apache-2.0
"""Token shards: ArrayRecord files of token ids with a sidecar by which every fault shows.

One record is one document: its ids as little-endian uint16 or uint32, ended by the tokenizer's
end-of-document id, which stands nowhere else. `tokens.json` counts, bounds and digests all of it;
`document_lengths.npy` makes any token of the stream addressable without reading the records.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from flexolmo_jax.data import remote_shards, verify_shards
from flexolmo_jax.data.remote_shards import RemoteShards
from flexolmo_jax.data.verify_shards import LENGTHS, SCHEMA, SIDECAR
from flexolmo_jax.errors import ConfigError, DataError, MachineError
from flexolmo_jax.storage import urls
from flexolmo_jax.tree import canonical_json, file_digest, json_digest

_SHARD_TOKENS = 16 * 1024 * 1024
# Sets up to this many bytes are held in memory; larger ones are read document by document.
_MEMORY_BYTES = 1 << 30
_CACHE_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class ShardSet:
    """An opened token-shard directory.

    Attributes:
      path: the directory.
      info: the sidecar.
      lengths: tokens per document, end-of-document included, int64[documents].
      starts: first stream position of each document, and the total, int64[documents + 1].
      reader: fetches stream tokens.
    """

    path: Path
    info: Mapping[str, Any]
    lengths: np.ndarray
    starts: np.ndarray
    reader: "StreamReader"

    @property
    def n_tokens(self) -> int:
        """Tokens in the stream."""
        return int(self.starts[-1])

    @property
    def n_documents(self) -> int:
        """Documents in the stream."""
        return len(self.lengths)

    def document(self, index: int) -> np.ndarray:
        """Ids of one document, end-of-document included, int32."""
        return self.tokens(int(self.starts[index]), int(self.starts[index + 1]))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Stream tokens `start` to `stop`, int32[stop - start]."""
        return self.reader.read(self.starts, start, stop)


class StreamReader:
    """Reads spans of the token stream; whole in memory when small, else by document with a cache.

    Can be pickled by a process pool: files are opened again where they are used.
    """

    def __init__(
        self,
        path: Path,
        counts: Mapping[str, int],
        width: int,
        n_tokens: int,
        source: RemoteShards | None = None,
    ):
        self._source = source
        self._files = [str(path / name) for name in counts]
        self._first = np.concatenate([[0], np.cumsum(list(counts.values()))]).astype(np.int64)
        self._dtype = np.dtype(f"<u{width}")
        self._whole = n_tokens * width <= _MEMORY_BYTES
        self._reset()

    def _reset(self) -> None:
        self._stream: np.ndarray | None = None
        self._open: dict[int, Any] = {}
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        keep = ("_files", "_first", "_dtype", "_whole", "_source")
        return {name: self.__dict__[name] for name in keep}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def read(self, starts: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Stream tokens `start` to `stop`, int32."""
        if self._whole:
            if self._stream is None:
                with self._lock:
                    if self._stream is None:
                        self._stream = self._load_all()
            return self._stream[start:stop].astype(np.int32)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        parts, position = [], start
        while position < stop:
            document = self._document(first)
            offset = position - int(starts[first])
            parts.append(document[offset : offset + stop - position])
            position += len(parts[-1])
            first += 1
        return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)

    def _fetch(self, *files: str) -> None:
        if self._source is not None:
            self._source.ensure([os.path.basename(file) for file in files])

    def _load_all(self) -> np.ndarray:
        self._fetch(*self._files)
        records: list[bytes] = []
        for name in self._files:
            reader = array_record_module.ArrayRecordReader(name)
            records += reader.read_all()
            reader.close()
        return np.frombuffer(b"".join(records), self._dtype)

    def _document(self, index: int) -> np.ndarray:
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
            shard = int(np.searchsorted(self._first, index, side="right")) - 1
            if shard not in self._open:
                self._fetch(self._files[shard])
                self._open[shard] = array_record_module.ArrayRecordReader(
                    self._files[shard], options="readahead_buffer_size:0,max_parallelism:0"
                )
            (record,) = self._open[shard].read([index - int(self._first[shard])])
            document = np.frombuffer(record, self._dtype)
            self._cache[index] = document
            self._cached += document.nbytes
            while self._cached > _CACHE_BYTES and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
            return document


def open_shards(
    path: Path | str,
    *,
    tokenizer_digest: str | None = None,
    vocab_size: int | None = None,
    verify: bool = True,
) -> ShardSet:
    """Opens a token-shard directory after checking it.

    Args:
      path: directory written by `write_shards`, or the URL of one; of a URL, a file is fetched
        and checked when it is first read from.
      tokenizer_digest: the tokenizer that the ids must come from.
      vocab_size: rows of the embedding that will look the ids up.
      verify: also read every byte (digests, every record, every id); without it the sidecar,
        the set of files, their sizes and the document lengths are checked.

    Raises:
      DataError: the first fault found, with file and record.
    """
    url = urls.as_url(path)
    source = None if url is None else remote_shards.open_remote(url, verify)
    path = Path(path) if source is None else source.folder
    info = verify_shards.read_sidecar(path)
    verify_shards.check_identity(path, info, tokenizer_digest, vocab_size)
    lengths = verify_shards.read_lengths(path, info)
    if source is None:
        verify_shards.check_files(path, info)
    if source is None and verify:
        verify_shards.check_contents(path, info, lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    counts = {name: item["documents"] for name, item in info["files"].items()}
    reader = StreamReader(path, counts, info["width"], int(starts[-1]), source)
    return ShardSet(path, info, lengths, starts, reader)


def write_shards(
    path: Path | str,
    documents: Iterable[np.ndarray],
    *,
    vocab_size: int,
    tokenizer_digest: str,
    eos_id: int,
    text_bytes: int,
    source: str = "",
    split: str = "",
    recipe: Mapping[str, Any] | None = None,
    shard_tokens: int = _SHARD_TOKENS,
) -> dict[str, Any]:
    """Writes documents (ids ended by `eos_id`) in the order given and returns the sidecar.

    The directory appears whole or not at all.

    Args:
      path: must not exist.
      text_bytes: UTF-8 bytes of the text behind the ids.
      recipe: how the text was chosen; kept in the sidecar.
      shard_tokens: tokens after which a new file is begun.

    Raises:
      ConfigError: `path` exists.
      DataError: no documents, or one that is empty, not ended by `eos_id`, or out of range.
      MachineError: the disk is full or not writable.
    """
    path = Path(path)
    if path.exists():
        raise ConfigError("The output exists", where=path, fix="remove it or choose another path")
    facts = {
        "text_bytes": text_bytes,
        "vocab_size": vocab_size,
        "tokenizer_digest": tokenizer_digest,
        "eos_id": eos_id,
        "source": source,
        "split": split,
        "recipe": dict(recipe or {}),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as e:
        raise MachineError("The output cannot be written", got=e, where=path.parent) from e
    try:
        info = _fill(partial, documents, facts, shard_tokens)
        partial.chmod(0o755)
        os.rename(partial, path)
    except (OSError, RuntimeError) as e:  # the record writer raises RuntimeError on a full disk
        raise MachineError(
            "The shards could not be written", got=e, where=path, fix="free some disk space"
        ) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return info


def _fill(
    folder: Path, documents: Iterable[np.ndarray], facts: Mapping[str, Any], shard_tokens: int
) -> dict[str, Any]:
    """Writes records, lengths and sidecar into an empty folder and returns the sidecar."""
    vocab_size = facts["vocab_size"]
    width = id_width(vocab_size)
    proved = checked(documents, vocab_size, facts["eos_id"])
    return write_sidecar(folder, facts, _write_files(folder, proved, width, shard_tokens))


def write_sidecar(
    folder: Path, facts: Mapping[str, Any], files: Mapping[str, "FileFacts"]
) -> dict[str, Any]:
    """Completes a folder of record files by lengths and sidecar, and returns the sidecar.

    Args:
      facts: the keys of the sidecar that do not follow from the files.
      files: name to facts, in the order of the stream.
    """
    lengths = np.concatenate([f.lengths for f in files.values()])
    np.save(folder / LENGTHS, lengths, allow_pickle=False)
    info = {
        **facts,
        "schema": SCHEMA,
        "kind": "tokens",
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "width": id_width(facts["vocab_size"]),
        "min_id": min(f.low for f in files.values()),
        "max_id": max(f.high for f in files.values()),
        "document_lengths_file": LENGTHS,
        "document_lengths_digest": file_digest(folder / LENGTHS),
        "files": {name: f.entry for name, f in files.items()},
    }
    info["sidecar_digest"] = json_digest(info)
    (folder / SIDECAR).write_text(canonical_json(info) + "\n", encoding="utf-8")
    return json.loads(canonical_json(info))


def checked(documents: Iterable[np.ndarray], vocab_size: int, eos_id: int) -> Iterator[np.ndarray]:
    """The documents, each proved to be one that `open_shards` will accept."""
    number = -1
    for number, ids in enumerate(documents):
        fault = verify_shards.document_fault(ids, vocab_size, eos_id)
        if fault:
            raise DataError("A document that cannot be stored", got=fault, where=f"no. {number}")
        yield ids
    if number < 0:
        raise DataError("There are no documents to write")


def id_width(vocab_size: int) -> int:
    """Bytes per stored id."""
    return 2 if vocab_size <= 1 << 16 else 4


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """What the sidecar needs to know of one record file.

    Attributes:
      entry: its line in the table of files.
      lengths: tokens per document, int64.
      low, high: least and greatest id.
    """

    entry: dict[str, Any]
    lengths: np.ndarray
    low: int
    high: int


class RecordFile:
    """One record file being written; the same documents give the same bytes."""

    def __init__(self, file: Path, width: int):
        # One record per chunk: any document can be read without its neighbours.
        self._writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        self._file, self._dtype = file, np.dtype(f"<u{width}")
        self._lengths: list[int] = []
        self._low, self._high = 1 << 62, -1
        self.tokens = 0

    def add(self, ids: np.ndarray) -> None:
        """Writes one document."""
        self._writer.write(ids.astype(self._dtype).tobytes())
        self._lengths.append(len(ids))
        self.tokens += len(ids)
        self._low, self._high = min(self._low, int(ids.min())), max(self._high, int(ids.max()))

    def close(self) -> FileFacts:
        """Ends the file."""
        self._writer.close()
        entry = {
            "documents": len(self._lengths),
            "tokens": self.tokens,
            "digest": file_digest(self._file),
            "bytes": self._file.stat().st_size,
        }
        return FileFacts(entry, np.asarray(self._lengths, np.int64), self._low, self._high)


def _write_files(
    folder: Path, documents: Iterable[np.ndarray], width: int, shard_tokens: int
) -> dict[str, FileFacts]:
    """Writes the record files, a new one whenever one is full."""
    files: dict[str, FileFacts] = {}
    file: RecordFile | None = None
    for ids in documents:
        if file is not None and file.tokens >= shard_tokens:
            files[file_name(len(files))] = file.close()
            file = None
        if file is None:
            file = RecordFile(folder / file_name(len(files)), width)
        file.add(ids)
    if file is not None:
        files[file_name(len(files))] = file.close()
    return files


def file_name(number: int) -> str:
    """Name of the record file with this number."""
    return f"tokens-{number:05}.array_record"


def is_shard_dir(path: Path | str) -> bool:
    """Whether a directory holds a sidecar."""
    return (Path(path) / SIDECAR).is_file()

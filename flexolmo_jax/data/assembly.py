# SPDX-License-Identifier: Apache-2.0
"""Second half of a corpus preparation: staged pieces -> losers -> token shards.

A shard holds the documents of one of `n` equal ranges of ids, in the order of the ids. So the
stream of tokens over all shards depends on the set of documents and the seed alone.
"""

import bisect
import collections
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from flexolmo_jax.data import dedup, places, shards, tokenize
from flexolmo_jax.data.staging import ROW, Options
from flexolmo_jax.errors import DataError, MachineError
from flexolmo_jax.tree import canonical_json

_BATCH_BYTES = 1 << 20
MAX_SHARDS = 99_999


@dataclasses.dataclass(frozen=True)
class Job:
    """What every process of the second half knows.

    Attributes:
      stage: the place of the staged pieces, the tokenizer and the stamps of shards.
      finished: the place of the shards that are done.
      n_shards: ranges that the ids are cut into.
      basis: digest of all that the shards follow from.
    """

    stage: str
    finished: str
    options: Options
    n_shards: int
    basis: str


def _staged(place: str, dtype: np.dtype) -> np.ndarray:
    """A staged array; on a disk only what is looked at is read."""
    if not places.is_url(place):
        try:
            return np.memmap(place, dtype, "r")
        except (OSError, ValueError) as e:
            raise _missing(place) from e
    data = places.read(place)
    if data is None:
        raise _missing(place)
    return np.frombuffer(data, dtype)


def _missing(place: str) -> DataError:
    return DataError(
        "A staged file is missing or damaged",
        where=place,
        fix="remove the folder of staged files and start again",
    )


def exact_parts(job: Job, piece: str) -> Iterator[tuple[int, bytes]]:
    """Keys of the documents of one piece, cut for `dedup.exact_losers`."""
    rows = _staged(f"{job.stage}/{piece}.rows", ROW)
    keys = np.empty(len(rows), dedup.EXACT)
    for field in dedup.EXACT.names or ():
        keys[field] = rows[field]
    yield from dedup.cut(keys, "key", job.n_shards)


def near_parts(job: Job, piece: str) -> Iterator[tuple[int, bytes]]:
    """Sketches of the documents of one piece, cut for `dedup.near_losers`."""
    rows = _staged(f"{job.stage}/{piece}.rows", ROW)
    bands = _staged(f"{job.stage}/{piece}.bands", np.dtype("<u8"))
    values = _staged(f"{job.stage}/{piece}.values", np.dtype("u1"))
    table = dedup.near_rows(rows, bands.reshape(len(rows), -1), values.reshape(len(rows), -1))
    yield from dedup.cut(table, "key", job.n_shards)


def exact_losers(job: Job, packed: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Losers of one cut, by the shard that they would be in."""
    lost = dedup.exact_losers(dedup.unpacked(packed, dedup.EXACT))
    yield from dedup.cut(lost, "hi", job.n_shards)


def near_losers(job: Job, packed: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Losers of one cut, by the shard that they would be in."""
    lost = dedup.near_losers(dedup.unpacked(packed, dedup.NEAR))
    yield from dedup.cut(lost, "hi", job.n_shards)


def chunk(job: Job, piece: str, shard: int) -> bytes:
    """Rows and texts of one piece that belong in one shard."""
    rows = _staged(f"{job.stage}/{piece}.rows", ROW)
    # By bisection, as the whole column would be read for each of the shards.
    start, stop = (bisect.bisect_left(rows["hi"], _least_id(job, k)) for k in (shard, shard + 1))
    return _packed(job, piece, rows[start:stop])


def _least_id(job: Job, shard: int) -> int:
    """Where the range of a shard begins, by `dedup.share_of`."""
    return -(-(shard << 32) // job.n_shards) << 32


def chunks(job: Job, piece: str) -> Iterator[tuple[int, bytes]]:
    """All of a piece, by shard."""
    rows = _staged(f"{job.stage}/{piece}.rows", ROW)
    shares = dedup.share_of(rows["hi"], job.n_shards)
    for shard in np.unique(shares).tolist():
        yield shard, _packed(job, piece, rows[shares == shard])


def _packed(job: Job, piece: str, rows: np.ndarray) -> bytes:
    if not len(rows):
        return b""
    start = int(rows["offset"][0])
    stop = int(rows["offset"][-1] + rows["size"][-1])
    texts = places.read(f"{job.stage}/{piece}.text", start, stop)
    if texts is None or len(texts) != stop - start:
        raise _missing(f"{job.stage}/{piece}.text")
    return len(rows).to_bytes(8, "little") + rows.tobytes() + texts


def _unpacked(packed: bytes) -> tuple[np.ndarray, list[bytes]]:
    count = int.from_bytes(packed[:8], "little")
    end = 8 + count * ROW.itemsize
    rows = np.frombuffer(packed[8:end], ROW)
    starts = (rows["offset"] - rows["offset"][0]).tolist()
    sizes = rows["size"].tolist()
    return rows, [packed[end + a : end + a + n] for a, n in zip(starts, sizes, strict=True)]


def _survivors(
    job: Job, packed: Iterable[bytes], losers: Iterable[bytes]
) -> tuple[list[bytes], dict[str, int]]:
    """Texts of one shard in the order of their ids, and how many went for which reason."""
    lost = dedup.merged(dedup.unpacked(losers, dedup.LOSER))
    found: list[tuple[int, int, int, bytes]] = []
    for rows, texts in map(_unpacked, filter(None, packed)):
        ids = zip(*(rows[f].tolist() for f in ("hi", "lo", "part")), texts, strict=True)
        found += [item for item in ids if job.options.wanted(item[2])]
    found.sort(key=lambda item: item[:3])
    dropped: collections.Counter[str] = collections.Counter()
    kept, last = [], None
    for *number, text in found:
        reason = lost.get((number[0], number[1], number[2]))
        if reason is None and number == last and job.options.dedup != "none":
            reason = dedup.COPY  # equal to the letter, so next to each other
        last = number
        if reason is None:
            kept.append(text)
        else:
            dropped[dedup.REASONS[reason]] += 1
    return kept, dict(dropped)


def write_shard(job: Job, shard: int, packed: Iterable[bytes], losers: Iterable[bytes]) -> None:
    """Writes one shard and its stamp; a shard without documents is a stamp alone.

    Raises:
      MachineError: the disk is full.
    """
    texts, dropped = _survivors(job, packed, losers)
    stamp: dict[str, Any] = {"basis": job.basis, "dropped": dropped}
    place = shard_place(job.stage, shard)
    if texts:
        # On the disk of the stage, so that the finished file need not be copied.
        work = None if places.is_url(job.stage) else job.stage
        with tempfile.TemporaryDirectory(dir=work) as folder:
            file = Path(folder) / shards.file_name(shard)
            try:
                facts = _tokenized(job, file, texts)
            except RuntimeError as e:  # what the record writer raises on a full disk
                raise MachineError("A shard could not be written", got=e, where=place) from e
            places.put(file, f"{job.finished}/{file.name}")
        places.write(f"{place}.lengths", facts.lengths.tobytes())
        stamp["file"] = {"entry": facts.entry, "low": facts.low, "high": facts.high}
        stamp["text_bytes"] = sum(map(len, texts))
    places.write(f"{place}.json", canonical_json(stamp).encode())


def _tokenized(job: Job, file: Path, texts: Sequence[bytes]) -> shards.FileFacts:
    tokenizer = _tokenizer(job.stage, job.basis)
    size, eos = tokenize.vocab_size(tokenizer), tokenize.eos_id(tokenizer)
    records = shards.RecordFile(file, shards.id_width(size))
    for batch in _batches(texts):
        ids = tokenize.encode_batch(tokenizer, [t.decode() for t in batch])
        for document in shards.checked(ids, size, eos):
            records.add(document)
    return records.close()


@functools.lru_cache(maxsize=1)
def _tokenizer(stage: str, basis: str) -> tokenizers.Tokenizer:
    """Read once per process and job; the basis tells jobs in one folder apart."""
    del basis
    place = tokenizer_place(stage)
    data = places.read(place)
    if data is None:
        raise _missing(place)
    return tokenize.parse(data, place)


def _batches(texts: Sequence[bytes]) -> Iterator[list[bytes]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenizer_place(stage: str) -> str:
    """Where every process finds the tokenizer."""
    return f"{stage}/tokenizer.json"


def shard_place(stage: str, shard: int) -> str:
    """Where the stamp of a finished shard lies, and the lengths of its documents."""
    return f"{stage}/shards/{shard:05}"


def load_shard(job: Job, shard: int) -> dict[str, Any] | None:
    """The stamp of a shard that is done and follows from the same inputs and options."""
    data = places.read(f"{shard_place(job.stage, shard)}.json")
    try:
        stamp = json.loads(data or b"null")
    except ValueError:
        return None
    return stamp if isinstance(stamp, dict) and stamp.get("basis") == job.basis else None


def file_facts(job: Job, shard: int, stamp: dict[str, Any]) -> shards.FileFacts | None:
    """What the sidecar needs of a finished shard; None if it holds no documents."""
    if "file" not in stamp:
        return None
    data = places.read(f"{shard_place(job.stage, shard)}.lengths")
    if data is None:
        raise _missing(f"{shard_place(job.stage, shard)}.lengths")
    file = stamp["file"]
    return shards.FileFacts(file["entry"], np.frombuffer(data, np.int64), file["low"], file["high"])

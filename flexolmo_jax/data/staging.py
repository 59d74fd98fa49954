# SPDX-License-Identifier: Apache-2.0
"""First half of a corpus preparation: each input file -> staged documents, once.

A file's documents are cleaned, filtered, given their split and sketched, and kept sorted by id in
pieces. A stamp, written last, says that a file is done, from which content and by which options;
it also keeps the counts of what went, or the fault for which the file is refused.
"""

import collections
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.data import corpora, dedup, places, sketch, textfiles
from flexolmo_jax.data.filters import Filter
from flexolmo_jax.data.filters import load as load_filters
from flexolmo_jax.errors import AssetError, ConfigError, DataError, FlexOlmoError
from flexolmo_jax.tree import canonical_json, json_digest

# In order of rank: a document goes when one before it says the same.
PARTS = ("heldout", "tuning", "train")
DEDUP = ("none", "exact", "near")
ROW = np.dtype([*dedup.ID, ("key", "<u8"), ("key_lo", "<u8"), ("offset", "<u8"), ("size", "<u8")])
SCHEMA = 1

_PIECE_BYTES = 64 << 20
_PIECE_DOCUMENTS = 1 << 18
_SHOWN = 5
_REASONS = 100
_FAULTS = {c.__name__: c for c in (ConfigError, DataError, AssetError)}


@dataclasses.dataclass(frozen=True)
class Work:
    """One input: a file, an object in storage, or a corpus by name.

    Attributes:
      kind: "file", "object" or "corpus".
      place: path, URL or name.
      name: by which its documents are called.
      digest: of its content, or the store's mark of it.
      size: bytes; 0 for a corpus.
    """

    kind: str
    place: str
    name: str
    digest: str
    size: int

    @property
    def folder(self) -> str:
        """Where its pieces lie below the stage; never made of what the user's files are called."""
        text = f"{self.kind}:{self.place}".encode("utf-8", "surrogatepass")
        return f"inputs/{hashlib.sha256(text).hexdigest()[:24]}"


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides which documents are kept, and their order.

    Attributes:
      split: train, tuning, heldout or all.
      dedup: none, exact or near.
      max_bad_frac: share of rows that may be unusable; at 0 the first one is refused.
      root: folder of the installed corpora; None is the usual one.
    """

    split: str = "train"
    seed: int = 0
    dedup: str = "near"
    filters: tuple[Filter, ...] = ()
    max_bad_frac: float = 0.0
    root: str | None = None

    def facts(self) -> dict[str, Any]:
        """What a rerun must agree in; how many bad rows are borne changes no document."""
        near = {"run": sketch.RUN, "hashes": sketch.HASHES, "bands": sketch.BANDS}
        return {
            "schema": SCHEMA,
            "split": self.split,
            "seed": self.seed,
            "dedup": {"kind": self.dedup, **({} if self.dedup != "near" else near)},
            "filters": [f.facts() for f in self.filters],
        }

    def wanted(self, part: int) -> bool:
        """Whether documents of this split are written."""
        return self.split in (PARTS[part], "all")

    def compared(self, part: int) -> bool:
        """Whether documents of this split can cost another its place."""
        last = len(PARTS) - 1 if self.split == "all" else PARTS.index(self.split)
        return self.wanted(part) or (self.dedup != "none" and part <= last)


def load_stamp(work: Work, options: Options, stage: str) -> dict[str, Any] | None:
    """The stamp of an input that is done, from this content and by these options."""
    data = places.read(f"{stage}/{work.folder}/stamp.json")
    try:
        stamp = json.loads(data or b"null")
    except ValueError:
        return None
    made = json_digest([work.digest, options.facts()])
    return stamp if isinstance(stamp, dict) and stamp.get("made") == made else None


def fault_of(stamp: Mapping[str, Any]) -> FlexOlmoError | None:
    """The fault for which an input was refused."""
    fault = dict(stamp.get("fault") or {})
    return _FAULTS[fault.pop("kind")](fault.pop("what"), **fault) if fault else None


def stage_input(work: Work, options: Options, stage: str) -> None:
    """Reads one input and leaves its pieces and its stamp, or a stamp with its fault."""
    stamp: dict[str, Any] = {"made": json_digest([work.digest, options.facts()])}
    stager = _Stager(work, options, f"{stage}/{work.folder}")
    try:
        stamp |= stager.run()
    except (ConfigError, DataError, AssetError) as fault:
        fields = {k: _shown(getattr(fault, k)) for k in ("what", "got", "expected", "where", "fix")}
        stamp["fault"] = {"kind": type(fault).__name__, **fields}
    places.write(f"{stage}/{work.folder}/stamp.json", canonical_json(stamp).encode())


def _shown(value: object) -> str | None:
    """A text that can be written anywhere, whatever a file is called or holds."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()


class _Stager:
    """Takes the documents of one input and flushes a piece whenever there are enough."""

    def __init__(self, work: Work, options: Options, folder: str):
        self._work, self._options, self._folder = work, options, folder
        self._check = load_filters(options.filters)
        self._counts: collections.Counter[str] = collections.Counter()
        self._bad: list[str] = []
        self._pieces: list[dict[str, int]] = []
        self._start_piece()

    def _start_piece(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._texts: list[bytes] = []
        self._sketches: list[tuple[np.ndarray, np.ndarray]] = []
        self._held = 0

    def run(self) -> dict[str, Any]:
        """Reads everything; returns what the stamp says of it."""
        for part, document in self._documents():
            self._counts["rows"] += 1
            self._take(part, document)
            if self._held >= _PIECE_BYTES or len(self._rows) >= _PIECE_DOCUMENTS:
                self._flush()
        self._flush()
        return {"pieces": self._pieces, "counts": dict(self._counts), "bad": self._bad}

    def _documents(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Split and content of each row; the content has "text" and "source_id"."""
        work = self._work
        if work.kind == "corpus":
            found = corpora.parts(work.place, self._options.root)
            for part, name in enumerate(PARTS):
                for entry in found[name]:
                    yield part, {"text": entry.text, "source_id": f"{work.name}/{entry.source_id}"}
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(work.place)
            if work.kind == "object":
                path = Path(folder) / work.place.rpartition("/")[2]
                places.fetch(work.place, path)
            elif path.stat().st_size != work.size:
                raise DataError("The file changed while it was being prepared", where=path)
            bad = self._note_bad if self._options.max_bad_frac else textfiles.refuse
            rows = textfiles.rows(path, bad=bad, every_column=bool(self._options.filters))
            for number, row in rows:
                part = PARTS.index(corpora.split_of("file", row["text"]))
                yield part, {**row, "source_id": f"{_shown(work.name)}:{number}"}

    def _note_bad(self, fault: DataError) -> None:
        self._counts["rows"] += 1
        self._counts["bad rows"] += 1
        if len(self._bad) < _SHOWN:
            self._bad.append(_shown(fault) or "")

    def _take(self, part: int, document: Mapping[str, Any]) -> None:
        text: str = document["text"]
        if not text.strip():
            self._counts["empty"] += 1
        elif not self._options.compared(part):
            self._counts["other splits"] += 1
        elif len(text) < corpora.MIN_CHARS:
            self._counts[f"under {corpora.MIN_CHARS} characters"] += 1
        elif reason := self._check(document):
            self._drop(part, reason)
        else:
            self._keep(part, text)

    def _drop(self, part: int, reason: str) -> None:
        if not self._options.wanted(part):
            self._counts["other splits"] += 1
            return
        label = f"filter {_shown(reason)}"
        # A function that gives each document a reason of its own must not fill the report.
        if label not in self._counts and len(self._counts) >= _REASONS:
            label = "filter (other reasons)"
        self._counts[label] += 1

    def _keep(self, part: int, text: str) -> None:
        data = b""
        if self._options.wanted(part):
            data = text.encode()
            self._counts["kept so far"] += 1
        else:
            self._counts["other splits"] += 1
        key = corpora.text_key(text)
        numbers = (int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big"))
        self._rows.append((*sketch.text_id(text, self._options.seed), part, *numbers, 0, len(data)))
        self._texts.append(data)
        self._held += len(data)
        if self._options.dedup == "near":
            self._sketches.append(sketch.minhash(text))

    def _flush(self) -> None:
        """Writes what is held as one piece, sorted by id."""
        if not self._rows:
            return
        rows = np.array(self._rows, ROW)
        order = np.lexsort((rows["part"], rows["lo"], rows["hi"]))
        rows = rows[order]
        rows["offset"] = np.cumsum(rows["size"]) - rows["size"]
        place = f"{self._folder}/{len(self._pieces):05}"
        places.write(f"{place}.text", b"".join(self._texts[i] for i in order))
        if self._sketches:
            bands = np.stack([self._sketches[i][0] for i in order])
            values = np.stack([self._sketches[i][1] for i in order])
            places.write(f"{place}.bands", bands.tobytes())
            places.write(f"{place}.values", values.tobytes())
        places.write(f"{place}.rows", rows.tobytes())
        self._pieces.append({"documents": len(rows), "bytes": self._held})
        self._start_piece()

# SPDX-License-Identifier: Apache-2.0
"""The checks behind `open_shards`: each finds one kind of fault, and says where it is."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from flexolmo_jax.errors import DataError
from flexolmo_jax.tree import file_digest, json_digest

SCHEMA = 1
SIDECAR = "tokens.json"
LENGTHS = "document_lengths.npy"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.array_record"
_REDO = "prepare the data again (flexolmo prepare)"

_COUNTS = ("documents", "tokens", "text_bytes", "vocab_size", "eos_id", "min_id", "max_id")
_STRINGS = ("tokenizer_digest", "source", "split", "document_lengths_digest", "sidecar_digest")
_KEYS = frozenset(
    ("schema", "kind", "width", "files", "recipe", "document_lengths_file", *_COUNTS, *_STRINGS)
)


def read_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar, proved complete, well-typed, unaltered and free of contradictions.

    Raises:
      DataError: otherwise.
    """
    file = path / SIDECAR
    if not file.is_file():
        raise DataError(
            "Not a token-shard directory: there is no sidecar",
            expected=SIDECAR,
            where=path,
            fix="prepare the data first (flexolmo prepare)",
        )
    try:
        info = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise DataError("The sidecar is not JSON", got=e, where=file, fix=_REDO) from e
    fault = _sidecar_fault(info)
    if fault:
        raise DataError("The sidecar is faulty", got=fault, where=file, fix=_REDO)
    return info


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _sidecar_fault(info: Any) -> str:
    """What is wrong with a sidecar, or nothing."""
    if not isinstance(info, dict) or info.get("kind") != "tokens":
        return "it does not say that it is of kind 'tokens'"
    if info.get("schema") != SCHEMA:
        return f"schema {info.get('schema')!r} instead of {SCHEMA}"
    if set(info) != _KEYS:
        return f"missing or unknown keys: {', '.join(sorted(set(info) ^ _KEYS))}"
    wrong = [k for k in _COUNTS if not _is_count(info[k])]
    wrong += [k for k in _STRINGS if not isinstance(info[k], str)]
    if wrong or info["width"] not in (2, 4) or not isinstance(info["files"], dict):
        return f"a value of the wrong type or range: {', '.join(wrong) or 'width or files'}"
    body = {k: v for k, v in info.items() if k != "sidecar_digest"}
    try:
        digest = json_digest(body)
    except ValueError:
        digest = "none (a number that is not finite)"
    if digest != info["sidecar_digest"]:
        return "its content does not match its digest: it was edited or damaged"
    return _contradiction(info)


def _contradiction(info: Mapping[str, Any]) -> str:
    """What in a well-typed sidecar cannot be true, or nothing."""
    files = info["files"]
    for name, item in files.items():
        if not re.fullmatch(NAME, name):
            return f"a file name that is not allowed: {name!r}"
        counts = isinstance(item, dict) and set(item) == {"documents", "tokens", "digest", "bytes"}
        if not counts or not all(_is_count(item[k]) for k in ("documents", "tokens", "bytes")):
            return f"a faulty entry for {name}"
    if info["documents"] == 0 or info["tokens"] == 0 or not files:
        return "it holds no documents"
    for key in ("documents", "tokens"):
        if sum(item[key] for item in files.values()) != info[key]:
            return f"{key} of the files do not add up to {info[key]}"
    if len({item["digest"] for item in files.values()}) != len(files):
        return "two shards have the same digest: one is a duplicate"
    if info["document_lengths_file"] != LENGTHS:
        return f"document_lengths_file is not {LENGTHS}"
    expected = 2 if info["vocab_size"] <= 1 << 16 else 4
    if info["width"] != expected:
        return f"width {info['width']}, but a vocabulary of {info['vocab_size']} needs {expected}"
    if not info["min_id"] <= info["eos_id"] <= info["max_id"] < info["vocab_size"]:
        return "min_id, eos_id, max_id and vocab_size are out of order"
    return ""


def check_identity(
    path: Path, info: Mapping[str, Any], tokenizer_digest: str | None, vocab_size: int | None
) -> None:
    """Refuses shards of another tokenizer, or with more ids than the embedding has rows.

    Raises:
      DataError: on either.
    """
    if tokenizer_digest is not None and info["tokenizer_digest"] != tokenizer_digest:
        raise DataError(
            "The shards were made with another tokenizer",
            got=info["tokenizer_digest"],
            expected=tokenizer_digest,
            where=path / SIDECAR,
            fix="prepare the text with the tokenizer of the model",
        )
    if vocab_size is not None and info["vocab_size"] > vocab_size:
        raise DataError(
            "The shards hold a larger vocabulary than the model",
            got=info["vocab_size"],
            expected=f"at most {vocab_size}",
            where=path / SIDECAR,
            fix="prepare the text with the tokenizer of the model",
        )


def read_lengths(path: Path, info: Mapping[str, Any]) -> np.ndarray:
    """Tokens per document, proved to agree with the sidecar, int64.

    Raises:
      DataError: the file is missing, altered or contradicts the sidecar.
    """
    file = path / LENGTHS
    if not file.is_file() or file.is_symlink():
        raise DataError("The document lengths are missing", where=file, fix=_REDO)
    digest = file_digest(file)
    if digest != info["document_lengths_digest"]:
        raise DataError(
            "The document lengths were altered",
            got=digest,
            expected=info["document_lengths_digest"],
            where=file,
            fix=_REDO,
        )
    try:
        lengths = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise DataError("The document lengths cannot be read", got=e, where=file, fix=_REDO) from e
    good = lengths.dtype == np.int64 and lengths.shape == (info["documents"],)
    if not good or lengths.min() < 2 or int(lengths.sum()) != info["tokens"]:
        raise DataError(
            "The document lengths contradict the sidecar",
            got=f"{lengths.dtype}{list(lengths.shape)}",
            expected=f"{info['documents']} documents with {info['tokens']} tokens",
            where=file,
            fix=_REDO,
        )
    return lengths


def check_files(path: Path, info: Mapping[str, Any]) -> None:
    """Refuses missing, extra, linked, truncated and padded shard files.

    Raises:
      DataError: the first such file; for a wrong size, the offset at which it departs.
    """
    present = {p.name for p in path.glob("*.array_record")}
    extra = sorted(present - set(info["files"]))
    if extra:
        raise DataError(
            "A shard that the sidecar does not know", where=path / extra[0], fix="remove it"
        )
    for name, item in info["files"].items():
        file = path / name
        if not file.is_file() or file.is_symlink():
            raise DataError("A shard is missing or not a plain file", where=file, fix=_REDO)
        size = file.stat().st_size
        if size != item["bytes"]:
            kind = "truncated" if size < item["bytes"] else "padded"
            raise DataError(
                f"A shard is {kind}",
                got=f"{size} bytes",
                expected=f"{item['bytes']} bytes",
                where=f"{file}, offset {min(size, item['bytes'])}",
                fix=_REDO,
            )


def check_contents(path: Path, info: Mapping[str, Any], lengths: np.ndarray) -> None:
    """Reads every byte: records against lengths, ids against bounds, files against digests.

    Records come first, as they can say where the fault is; a digest only says that there is one.

    Raises:
      DataError: the first fault, with file and record.
    """
    low, high, first = 1 << 62, -1, 0
    for name, item in info["files"].items():
        last = first + item["documents"]
        ids = check_records(path / name, info, item, lengths[first:last])
        low, high, first = min(low, int(ids.min())), max(high, int(ids.max())), last
        digest = file_digest(path / name)
        if digest != item["digest"]:
            raise DataError(
                "A shard was altered",
                got=digest,
                expected=item["digest"],
                where=path / name,
                fix=_REDO,
            )
    if (low, high) != (info["min_id"], info["max_id"]):
        raise DataError(
            "The range of the ids contradicts the sidecar",
            got=f"{low} to {high}",
            expected=f"{info['min_id']} to {info['max_id']}",
            where=path / SIDECAR,
            fix=_REDO,
        )


def check_records(
    file: Path, info: Mapping[str, Any], item: Mapping[str, Any], lengths: np.ndarray
) -> np.ndarray:
    """All ids of one file, each record checked on its own.

    Raises:
      DataError: the first record that is not what the lengths and the vocabulary allow.
    """
    records = _read_records(file)
    if len(records) != item["documents"]:
        raise DataError(
            "A shard has another number of records",
            got=len(records),
            expected=item["documents"],
            where=file,
            fix=_REDO,
        )
    sizes = np.fromiter((len(r) for r in records), np.int64, len(records))
    wrong = np.flatnonzero(sizes != lengths * info["width"])
    if len(wrong):
        n = int(wrong[0])
        raise DataError(
            "A record has another length",
            got=f"{sizes[n]} bytes",
            expected=f"{lengths[n]} ids of {info['width']} bytes",
            where=f"{file}, record {n}",
            fix=_REDO,
        )
    ids = np.frombuffer(b"".join(records), f"<u{info['width']}")
    ends = np.cumsum(lengths) - 1
    is_end = np.zeros(len(ids), bool)
    is_end[ends] = True
    # Out of range, or the end-of-document id absent at an end or present elsewhere.
    bad = np.flatnonzero((ids >= info["vocab_size"]) | ((ids == info["eos_id"]) != is_end))
    if len(bad):
        n = int(np.searchsorted(ends, bad[0]))
        start = int(ends[n] + 1 - lengths[n])
        fault = document_fault(ids[start : ends[n] + 1], info["vocab_size"], info["eos_id"])
        raise DataError(
            "A record that is not a document of this vocabulary",
            got=fault,
            where=f"{file}, record {n}",
            fix=_REDO,
        )
    return ids


def _read_records(file: Path) -> list[bytes]:
    try:
        reader = array_record_module.ArrayRecordReader(str(file))
        try:
            return reader.read_all() if reader.num_records() else []
        finally:
            reader.close()
    except (RuntimeError, ValueError, IndexError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DataError("A shard cannot be read", got=reason, where=file, fix=_REDO) from e


def document_fault(ids: np.ndarray, vocab_size: int, eos_id: int) -> str:
    """What makes an array of ids no document of this vocabulary, or nothing."""
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        return f"{ids.dtype}{list(ids.shape)} is not a row of ids"
    if len(ids) < 2:
        return "no tokens before the end of the document"
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(outside):
        n = int(outside[0])
        return f"id {int(ids[n])} at position {n} is not in 0..{vocab_size - 1}"
    if ids[-1] != eos_id:
        return f"it ends with id {int(ids[-1])}, not with the end-of-document id {eos_id}"
    inside = np.flatnonzero(ids[:-1] == eos_id)
    return f"an end-of-document id inside, at position {int(inside[0])}" if len(inside) else ""

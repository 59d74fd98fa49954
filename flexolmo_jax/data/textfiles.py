# SPDX-License-Identifier: Apache-2.0
"""The user's own text: .txt, .jsonl(.gz, .zst) with key "text", .parquet with column "text"."""

import gzip
import importlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flexolmo_jax.data.readers import Entry
from flexolmo_jax.errors import ConfigError, DataError

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def read(path: Path) -> Iterator[Entry]:
    """Documents of a file, or of every known file in a folder; group = the document itself.

    Raises:
      ConfigError: a kind of file that is not known, or a folder without any.
      DataError: a file that does not hold what its name says, with line or row.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
        if not files:
            raise ConfigError("No text files in this folder", where=path, expected=_names())
        for file in files:
            yield from _read_file(file, file.relative_to(path).as_posix())
    elif _kind(path):
        yield from _read_file(path, path.name)
    else:
        raise ConfigError("Unknown kind of text file", got=path.name, expected=_names())


def _names() -> str:
    return "one of " + ", ".join(KINDS)


def _kind(path: Path) -> str:
    return max((k for k in KINDS if path.name.lower().endswith(k)), key=len, default="")


def _read_file(path: Path, name: str) -> Iterator[Entry]:
    kind = _kind(path)
    try:
        if kind == ".txt":
            rows: Iterator[tuple[int, str]] = iter([(1, path.read_text(encoding="utf-8"))])
        elif kind == ".parquet":
            rows = _parquet(path)
        else:
            rows = _jsonl(path, kind)
        for number, text in rows:
            if not _encodable(text):
                raise DataError(
                    "Text with half a surrogate pair, which no encoding can write",
                    where=f"{path}, line or row {number}",
                )
            if text.strip():
                # The text is its own group: copies of it land in one split.
                yield Entry(f"{name}:{number}", text, text)
    except (UnicodeDecodeError, EOFError, OSError) as e:
        raise DataError("The file cannot be read as text", got=str(e), where=path) from e


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _lines(path: Path, kind: str) -> Iterator[IO[str]]:
    if kind == ".jsonl.gz":
        with gzip.open(path, "rt", encoding="utf-8") as f:
            yield f
    elif kind == ".jsonl.zst":
        zstandard = _optional("zstandard")
        with path.open("rb") as raw:
            stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            try:
                with io.TextIOWrapper(stream, encoding="utf-8") as f:
                    yield f
            except zstandard.ZstdError as e:
                raise DataError("Not zstandard data", got=str(e), where=path) from e
    else:
        with path.open(encoding="utf-8") as f:
            yield f


def _jsonl(path: Path, kind: str) -> Iterator[tuple[int, str]]:
    with _lines(path, kind) as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise DataError("Not JSON", got=str(e), where=f"{path}, line {number}") from e
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise DataError(
                    'A line without a string under "text"',
                    got=f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__,
                    where=f"{path}, line {number}",
                )
            yield number, row["text"]


def _parquet(path: Path) -> Iterator[tuple[int, str]]:
    pyarrow, parquet = _optional("pyarrow"), _optional("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise DataError(
                    'No column "text"', got=", ".join(table.schema_arrow.names), where=path
                )
            number = 0
            for batch in table.iter_batches(columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise DataError(
                            "A row without text", got=text, where=f"{path}, row {number}"
                        )
                    yield number, text
    except pyarrow.ArrowException as e:
        raise DataError("Not a parquet file", got=str(e), where=path) from e


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise ConfigError(
            "This kind of file needs a package that is not installed",
            got=name.split(".")[0],
            fix='pip install "flexolmo-jax[demo]"',
        ) from e

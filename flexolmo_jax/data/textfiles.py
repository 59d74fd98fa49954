# SPDX-License-Identifier: Apache-2.0
"""The user's own text: .txt, .jsonl(.gz, .zst) with key "text", .parquet with column "text"."""

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flexolmo_jax.data.readers import Entry
from flexolmo_jax.errors import ConfigError, DataError

# What is done with a row that cannot be used.
Bad = Callable[[DataError], None]
Rows = Iterator[tuple[int, dict[str, Any]]]

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def listing(path: Path) -> list[tuple[Path, str]]:
    """The file, or every known file in a folder, each with its name inside of what was given.

    Raises:
      ConfigError: a kind of file that is not known, or a folder without any.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
        if not files:
            raise ConfigError("No text files in this folder", where=path, expected=_names())
        return [(file, file.relative_to(path).as_posix()) for file in files]
    if not _kind(path):
        raise ConfigError("Unknown kind of text file", got=path.name, expected=_names())
    return [(path, path.name)]


def read(path: Path) -> Iterator[Entry]:
    """Documents of a file, or of every known file in a folder; group = the document itself.

    Raises:
      ConfigError: a kind of file that is not known, or a folder without any.
      DataError: a file that does not hold what its name says, with line or row.
    """
    for file, name in listing(path):
        for number, row in rows(file):
            if row["text"].strip():
                # The text is its own group: copies of it land in one split.
                yield Entry(f"{name}:{number}", row["text"], row["text"])


def is_text_file(name: str) -> bool:
    """Whether the name ends as that of a file that can be read."""
    return bool(_kind(Path(name)))


def _names() -> str:
    return "one of " + ", ".join(KINDS)


def _kind(path: Path) -> str:
    return max((k for k in KINDS if path.name.lower().endswith(k)), key=len, default="")


def refuse(fault: DataError) -> None:
    """Refuses a file for its first bad row."""
    raise fault


def rows(
    path: Path, *, bad: Bad = refuse, every_column: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line or row number and content of each row of a file; "text" holds a string, maybe blank.

    Args:
      bad: called for each row that cannot be used; raises by default. Without a `bad` that
        returns, a file with one byte that is not UTF-8 is refused whole.
      every_column: also the other columns of a .parquet.

    Raises:
      DataError: a file that does not hold what its name says.
    """
    kind = _kind(path)
    # Bytes that are not UTF-8 become half surrogates, which make a bad row, not a bad file.
    errors = "strict" if bad is refuse else "surrogateescape"
    try:
        if kind == ".txt":
            found: Rows = iter([(1, {"text": path.read_text(encoding="utf-8", errors=errors)})])
        elif kind == ".parquet":
            found = _parquet(path, bad, every_column)
        else:
            found = _jsonl(path, kind, bad, errors)
        for number, row in found:
            if _encodable(row["text"]):
                yield number, row
                continue
            what = "Text with half a surrogate pair, which no encoding can write"
            bad(DataError(what, where=f"{path}, line or row {number}"))
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as e:
        raise DataError("The file cannot be read as text", got=str(e), where=path) from e


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _lines(path: Path, kind: str, errors: str) -> Iterator[IO[str]]:
    if kind == ".jsonl.gz":
        with gzip.open(path, "rt", encoding="utf-8", errors=errors) as f:
            yield f
    elif kind == ".jsonl.zst":
        zstandard = _optional("zstandard")
        with path.open("rb") as raw:
            stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            try:
                with io.TextIOWrapper(stream, encoding="utf-8", errors=errors) as f:
                    yield f
            except zstandard.ZstdError as e:
                raise DataError("Not zstandard data", got=str(e), where=path) from e
    else:
        with path.open(encoding="utf-8", errors=errors) as f:
            yield f


def _jsonl(path: Path, kind: str, bad: Bad, errors: str) -> Rows:
    with _lines(path, kind, errors) as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue
            try:
                row = _parsed(line, f"{path}, line {number}")
            except DataError as fault:
                bad(fault)
                continue
            yield number, row


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError("Not JSON", got=str(e), where=where) from e
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(
            'A line without a string under "text"',
            got=f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__,
            where=where,
        )
    return row


def _parquet(path: Path, bad: Bad, every_column: bool) -> Rows:
    pyarrow, parquet = _optional("pyarrow"), _optional("pyarrow.parquet")
    columns = None if every_column else ["text"]
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise DataError(
                    'No column "text"', got=", ".join(table.schema_arrow.names), where=path
                )
            for batch in table.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    if isinstance(row["text"], str):
                        yield number, row
                        continue
                    where = f"{path}, row {number}"
                    bad(DataError("A row without text", got=row["text"], where=where))
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

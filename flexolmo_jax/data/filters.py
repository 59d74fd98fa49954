# SPDX-License-Identifier: Apache-2.0
"""Which documents are good enough: simple measures by name, or a function of the user's own.

A filter is written as `length=200:100000`, `letters=0.6`, `repetition=0.3`, `language=en,de` or
`FILE.py:NAME`. The function is called as `keep(document)` with a dict that holds "text",
"source_id" and all else that the row of a .jsonl or .parquet file holds; it returns whether to
keep the document, or why not as a string.
"""

import dataclasses
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flexolmo_jax.data.sketch import words
from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.tree import json_digest

# Tells why a document goes; nothing if it stays.
Check = Callable[[Mapping[str, Any]], str]
_RUN = 5
# Language shows in the beginning; the whole of a long text would take most of the time.
_LANGUAGE_CHARS = 2000
_REASON_CHARS = 60


@dataclasses.dataclass(frozen=True)
class Filter:
    """A filter as it travels to the processes that apply it.

    Attributes:
      spec: as the user wrote it.
      code: content of the user's file, which other machines do not have; else empty.
    """

    spec: str
    code: str = ""

    def facts(self) -> dict[str, str]:
        """What a rerun must agree in: a function counts by its file's content."""
        if not self.code:
            return {"filter": self.spec}
        name = self.spec.rpartition(":")[2]
        return {"filter": name, "code": json_digest(self.code)}


def parse(specs: Iterable[str]) -> tuple[Filter, ...]:
    """Filters, each built once so that a mistake shows before any work.

    Raises:
      ConfigError: an unknown name, a value of the wrong kind, or a file without that function.
    """
    out = []
    for spec in specs:
        path, colon, _ = spec.rpartition(":")
        code = ""
        if colon and path.endswith(".py"):
            if not Path(path).is_file():
                raise ConfigError("There is no such filter file", got=path)
            code = Path(path).read_text(encoding="utf-8")
        out.append(Filter(spec, code))
    load(out)
    return tuple(out)


def load(filters: Sequence[Filter]) -> Check:
    """One check that gives the reason of the first filter that does not keep a document."""
    checks = [_user_check(f) if f.code else _named_check(f.spec) for f in filters]

    def check(document: Mapping[str, Any]) -> str:
        return next((reason for c in checks if (reason := c(document))), "")

    return check


def _named_check(spec: str) -> Check:
    name, equals, value = spec.partition("=")
    if name not in _BUILDERS or not equals:
        raise ConfigError(
            "Unknown filter",
            got=spec,
            expected="NAME=VALUE or FILE.py:FUNCTION",
            fix=nearest(name, _BUILDERS),
        )
    try:
        keep = _BUILDERS[name](value)
    except ValueError as e:
        raise ConfigError(
            "A filter with a value that it cannot use", got=spec, expected=_EXPECTED[name]
        ) from e
    return lambda document: "" if keep(document["text"]) else name


def _length(value: str) -> Callable[[str], bool]:
    low, colon, high = value.partition(":")
    least, most = int(low), int(high) if colon else sys.maxsize
    if not 0 <= least <= most:
        raise ValueError
    return lambda text: least <= len(text) <= most


def _share(value: str) -> float:
    share = float(value)
    if not 0 <= share <= 1:
        raise ValueError
    return share


def _letters(value: str) -> Callable[[str], bool]:
    least = _share(value)

    def keep(text: str) -> bool:
        marks = "".join(text.split())
        return sum(map(str.isalpha, marks)) >= least * len(marks)

    return keep


def _repetition(value: str) -> Callable[[str], bool]:
    most = _share(value)

    def keep(text: str) -> bool:
        found = words(text)
        runs = [tuple(found[i : i + _RUN]) for i in range(len(found) - _RUN + 1)]
        return len(runs) - len(set(runs)) <= most * len(runs)

    return keep


def _language(value: str) -> Callable[[str], bool]:
    wanted = frozenset(value.split(","))
    if not all(re.fullmatch("[a-z]{2,3}", code) for code in wanted):
        raise ValueError
    try:
        package = importlib.import_module("py3langid")
    except ModuleNotFoundError as e:
        raise ConfigError(
            "The language filter needs a package that is not installed",
            got="py3langid",
            fix='pip install "flexolmo-jax[language]"',
        ) from e
    return lambda text: package.classify(text[:_LANGUAGE_CHARS])[0] in wanted


_BUILDERS = MappingProxyType(
    {
        "length": _length,
        "letters": _letters,
        "repetition": _repetition,
        "language": _language,
    }
)
_EXPECTED = MappingProxyType(
    {
        "length": "MIN or MIN:MAX characters, as 200:100000",
        "letters": "the least share of letters among what is not blank, 0 to 1",
        "repetition": "the greatest share of runs of five words that are repeats, 0 to 1",
        "language": "codes of two or three letters, as en,de",
    }
)


def _user_check(item: Filter) -> Check:
    path, _, name = item.spec.rpartition(":")
    keep = getattr(_module(Path(path), item.code), name, None)
    if not callable(keep):
        raise ConfigError("The filter file has no such function", got=name, where=path)

    def check(document: Mapping[str, Any]) -> str:
        try:
            answer = keep(dict(document))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            raise ConfigError(
                "The filter failed",
                got=f"{type(e).__name__}: {e}",
                where=f"{item.spec}, document {document['source_id']}",
            ) from e
        if isinstance(answer, str):
            return f"{name}: {answer[:_REASON_CHARS]}"
        if isinstance(answer, bool):
            return "" if answer else name
        raise ConfigError(
            "A filter must return true, false or a reason",
            got=type(answer).__name__,
            where=f"{item.spec}, document {document['source_id']}",
        )

    return check


def _module(path: Path, code: str) -> Any:
    """The user's file as a module; where the file is not, as on other machines, its content."""
    try:
        if path.read_text(encoding="utf-8") == code:
            return _imported(path)
    except OSError:
        pass
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(code, encoding="utf-8")
        return _imported(copy)


def _imported(path: Path) -> Any:
    name = f"_filter_{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError("Not a Python file", got=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the file runs
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError, AttributeError) as e:
        del sys.modules[name]
        raise ConfigError("The filter file does not import", got=e, where=path) from e
    return module

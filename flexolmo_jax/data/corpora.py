# SPDX-License-Identifier: Apache-2.0
"""Text to train and to test on: real corpora by name, or the user's files by path.

Every corpus is split by source (module, licence family, day, book, …), so that held-out text is
not a neighbour of trained text, and no document or repeated paragraph is in both splits.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from flexolmo_jax.data import readers, textfiles
from flexolmo_jax.data.readers import Entry
from flexolmo_jax.errors import ConfigError, nearest

Split = Literal["train", "tuning", "heldout", "all"]
SPLITS = ("train", "tuning", "heldout", "all")

PUBLIC = ("howto", "wiki", "techdocs")
CLOSED = ("code", "news", "legal", "government", "academic", "religious")
UNSEEN = ("math", "biomed")  # nobody trains on these

# Shares of the groups, unless the domain has a rule of its own below. A recipe is chosen on the
# tuning split and reported on held-out text, which nothing was ever chosen on.
_HELDOUT_FRAC, _TUNING_FRAC = 0.1, 0.05
_NEWS_CUT = "2017-03-17"  # the last two weeks: later news than any that was trained on
# Corpora in which paragraphs repeat from document to document.
_DROP_REPEATS = ("legal", "techdocs")
# Corpora with near copies across families (a licence text under another name).
_DROP_NEAR_COPIES = ("legal",)
_NEAR_WORDS = 13
_NEAR_FRAC = 0.2
MIN_CHARS = 40


@dataclasses.dataclass(frozen=True)
class Document:
    """One document of a split; `source_id` names it inside its corpus."""

    text: str
    source_id: str


def is_domain(source: str) -> bool:
    """Whether `source` names a corpus rather than a path."""
    return source in readers.READERS


def read(
    source: str,
    split: Split = "train",
    *,
    max_bytes: int | None = None,
    seed: int = 0,
    root: Path | str | None = None,
) -> list[Document]:
    """Documents of one split of a corpus or of text files, in a seeded order.

    The order and the choice depend on `seed` and the documents' ids alone, and a larger
    `max_bytes` (UTF-8 bytes of text) only adds documents at the end.

    Raises:
      ConfigError: an unknown domain or split, or a budget below one byte.
      AssetError: the corpus is not installed.
      DataError: a file that cannot be read as text.
    """
    if split not in SPLITS:
        raise ConfigError("Unknown split", got=split, fix=nearest(split, SPLITS))
    if max_bytes is not None and max_bytes <= 0:
        raise ConfigError("max_bytes must be positive", got=max_bytes)
    found = parts(source, root)
    chosen = [e for name in SPLITS[:3] if split in (name, "all") for e in found[name]]
    return _budget(chosen, max_bytes, seed)


def parts(source: str, root: Path | str | None = None) -> Mapping[str, tuple[Entry, ...]]:
    """Split to its cleaned documents, of a corpus or of text files."""
    if is_domain(source):
        return _domain_parts(source, None if root is None else str(root))
    path = Path(source)
    if not path.exists():
        raise ConfigError(
            "Neither a corpus nor a file or folder",
            got=source,
            fix=nearest(source, readers.READERS),
        )
    return split_entries(source, textfiles.read(path))


@functools.lru_cache(maxsize=4)
def _domain_parts(domain: str, root: str | None) -> Mapping[str, tuple[Entry, ...]]:
    entries = readers.read_all(domain, None if root is None else Path(root))
    return MappingProxyType(split_entries(domain, entries))


def split_entries(domain: str, entries: Iterable[Entry]) -> dict[str, tuple[Entry, ...]]:
    """Splits by group, then drops from the later split whatever the earlier one holds.

    In a corpus training text goes first: what is left to test on was then never trained on. In the
    user's files held-out text does: files added later never change what is tested on.
    """
    parts: dict[str, list[Entry]] = {name: [] for name in SPLITS[:3]}
    for entry in entries:
        parts[split_of(domain, entry.group)].append(entry)
    paragraphs: set[bytes] = set()
    documents: set[bytes] = set()
    out = {}
    for name in SPLITS[:3] if is_domain(domain) else ("heldout", "tuning", "train"):
        members, kept = parts[name], []
        for entry in members:
            if domain in _DROP_REPEATS:
                entry = dataclasses.replace(entry, text=_drop_repeats(entry.text, paragraphs))
            key = text_key(entry.text)
            if len(entry.text) >= MIN_CHARS and key not in documents:
                documents.add(key)
                kept.append(entry)
        out[name] = tuple(kept)
    if domain in _DROP_NEAR_COPIES:
        for name in ("tuning", "heldout"):
            out[name] = tuple(_without_near_copies(out[name], out["train"]))
    return out


def text_key(text: str) -> bytes:
    """Key of a text's letters and digits: equal for texts that differ in case, blanks or marks."""
    letters = re.sub(r"[\W_]+", "", text.casefold())
    # Text of marks alone has no letters to compare by.
    return hashlib.sha256((letters or text).encode()).digest()[:16]


def _drop_repeats(text: str, seen: set[bytes]) -> str:
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = text_key(paragraph)
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept).strip("\n")


def _runs(text: str) -> set[int]:
    """Hashes of all runs of `_NEAR_WORDS` words; of the whole text if it is shorter."""
    words = re.findall(r"\w+", text.casefold())
    last = max(len(words) - _NEAR_WORDS, 0)
    return {hash(tuple(words[i : i + _NEAR_WORDS])) for i in range(last + 1)}


def _without_near_copies(entries: Iterable[Entry], trained: Iterable[Entry]) -> Iterator[Entry]:
    """The entries of which at most `_NEAR_FRAC` of the runs of words are in the trained text."""
    wanted = [(entry, _runs(entry.text)) for entry in entries]
    everything: set[int] = set().union(*(runs for _, runs in wanted))
    seen: set[int] = set()
    for entry in trained:
        seen |= _runs(entry.text) & everything
    for entry, runs in wanted:
        if len(runs & seen) <= _NEAR_FRAC * len(runs):
            yield entry


def split_of(domain: str, group: str) -> str:
    """The split of a group: "train", "tuning" or "heldout"."""
    label = domain if is_domain(domain) else "file"
    unit = _unit(f"split:{label}:{group}")
    if domain == "news":
        if group < _NEWS_CUT:
            return "train"
        return "tuning" if unit < 1 / 3 else "heldout"
    if domain == "government":
        # Every tenth year each: spread over 230 years of changing language.
        return {"7": "heldout", "3": "tuning"}.get(group[-1], "train")
    if unit < _HELDOUT_FRAC:
        return "heldout"
    return "tuning" if unit < _HELDOUT_FRAC + _TUNING_FRAC else "train"


def _unit(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2.0**48


def _budget(entries: list[Entry], max_bytes: int | None, seed: int) -> list[Document]:
    ordered = sorted(entries, key=lambda e: (_unit(f"{seed}:{e.source_id}"), e.source_id))
    out, used = [], 0
    for entry in ordered:
        used += len(entry.text.encode())
        if max_bytes is not None and out and used > max_bytes:
            break
        out.append(Document(entry.text, entry.source_id))
    return out

# SPDX-License-Identifier: Apache-2.0
"""One reader per corpus: files of a pinned asset -> cleaned documents and where they are from.

A reader yields `Entry(source_id, group, text)`. `group` is what a split must not cut through: a
module, a licence family, a day, a book. Readers neither split nor drop duplicates.
"""

import csv
import dataclasses
import gzip
import html
import io
import itertools
import json
import re
import sysconfig
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flexolmo_jax import assets
from flexolmo_jax.errors import DataError

# Rows from here on ask for unconditional likelihoods; they are not documents.
_UNCONDITIONAL = 1_000_000


@dataclasses.dataclass(frozen=True)
class Entry:
    """One cleaned document before splitting."""

    source_id: str
    group: str
    text: str


def read_requests(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a requests.jsonl.gz, the first of each doc_id, without the unconditional ones."""
    seen: set[int] = set()
    with gzip.open(path, "rt", encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            if row["doc_id"] >= _UNCONDITIONAL or row["doc_id"] in seen:
                continue
            seen.add(row["doc_id"])
            yield row


def code(root: Path | None) -> Iterator[Entry]:
    """The Python standard library of this interpreter; group = top-level module."""
    del root  # needs no asset
    base = Path(sysconfig.get_paths()["stdlib"])
    skip = re.compile(r"site-packages|dist-packages|test.*|idle_test|__pycache__|pydoc_data")
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).parts
        if any(skip.fullmatch(part) for part in parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files show off other encodings
        if len(text) >= 400:
            yield Entry("/".join(parts), parts[0].removesuffix(".py"), text)


def news(root: Path | None) -> Iterator[Entry]:
    """News articles of 2016/12 to 2017/3; group = date as yyyy-mm-dd."""
    csv.field_size_limit(10**9)
    with zipfile.ZipFile(assets.asset_path("news", root)) as archive:
        raw = archive.open("NewsArticles.csv")
        for row in csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline="")):
            year, month, day = (int(x) for x in row["publish_date"].split()[0].split("/"))
            parts = [(row[k] or "").strip() for k in ("title", "subtitle", "text")]
            if parts[-1]:
                date = f"{year:04}-{month:02}-{day:02}"
                yield Entry(row["article_id"], date, "\n\n".join(p for p in parts if p))


def legal(root: Path | None) -> Iterator[Entry]:
    """Licence texts in English; group = family, the file name up to its first hyphen."""
    for path in sorted(assets.asset_path("legal", root).glob("*.LICENSE")):
        text = path.read_text(encoding="utf-8")
        head, text = _strip_yaml_head(text)
        language = re.search(r"^language:\s*(\S+)", head, re.MULTILINE)
        if language is None or language[1] == "en":
            family = re.split(r"[-.]", path.stem)[0]
            yield Entry(path.stem, family, text.strip())


def _strip_yaml_head(text: str) -> tuple[str, str]:
    if text.startswith("---\n"):
        end = text.find("\n---", 4)
        if end >= 0:
            return text[4:end], text[end + 4 :]
    return "", text


def government(root: Path | None) -> Iterator[Entry]:
    """State of the Union messages since 1790; group = year."""
    base = assets.asset_path("government", root)
    for path in sorted((base / "speeches").glob("*.txt")):
        lines = path.read_text(encoding="utf-8").strip().splitlines()
        if lines and re.fullmatch(r"\[.*\]", lines[0].strip()):
            lines = lines[1:]  # a stage direction, not speech
        yield Entry(path.stem, path.stem.split("-")[0], "\n".join(lines).strip())


_MARKERS = re.compile(r"\s*\b(?:BIBREF|SECREF|FIGREF|TABREF|INLINEFORM|DISPLAYFORM)\d+\b")


def academic(root: Path | None) -> Iterator[Entry]:
    """Papers on language processing, in full; group = paper."""
    base = assets.asset_path("academic", root)
    seen = set()
    for row in read_requests(base / "rc_5shot" / "requests.jsonl.gz"):
        doc = row["doc"]
        paper = doc["id"].split("_")[0]
        if paper in seen:
            continue  # several questions are asked about one paper
        seen.add(paper)
        full = doc["full_text"]
        parts = [doc["title"], doc["abstract"]]
        for name, paragraphs in zip(full["section_name"], full["paragraphs"], strict=True):
            parts += [name or "", *paragraphs]
        text = "\n\n".join(p.strip() for p in parts if p.strip())
        yield Entry(paper, paper, _MARKERS.sub("", text))


def religious(root: Path | None) -> Iterator[Entry]:
    """The King James Bible, one document per chapter; group = book."""
    source = assets.asset_path("religious", root).read_text(encoding="utf-8")
    _, body, tables = source.split('"""', 2)
    # Verse ids are BBCCCVVV, in order; only the first table, of starts, is wanted.
    starts = re.findall(r"(\d{7,8}): (\d+)", tables.split("}", 1)[0])
    chapters: dict[int, int] = {}
    for verse, offset in starts:
        chapters.setdefault(int(verse) // 1000, int(offset))
    ends = [*list(chapters.values())[1:], len(body)]
    for (chapter, start), end in zip(chapters.items(), ends, strict=True):
        text = body[start:end].replace("[", "").replace("]", "").strip()
        yield Entry(f"{chapter // 1000:02}-{chapter % 1000:03}", str(chapter // 1000), text)


def howto(root: Path | None) -> Iterator[Entry]:
    """WikiHow steps and descriptions of filmed activities; group = article or activity."""
    base = assets.asset_path("howto", root)
    for row in read_requests(base / "train_rc_5shot" / "requests.jsonl.gz"):
        doc = row["doc"]
        query, ending = doc["query"].strip(), doc["choices"][doc["gold"]].strip()
        space = "" if ending[:1] in ",.;:!?'" else " "
        topic, _, rest = query.partition(": ")
        # Steps of one article share its title, so a split by row would leak them.
        title = rest.partition(".")[0] if rest.startswith("How to") else topic
        yield Entry(str(row["doc_id"]), title.casefold(), f"{query}{space}{ending}")


def wiki(root: Path | None) -> Iterator[Entry]:
    """Wikipedia passages, without those that BoolQ's validation set asks about; group = title."""
    base = assets.asset_path("wiki", root)
    scored = {_passage(r) for r in read_requests(base / "val_mc_5shot" / "requests.jsonl.gz")}
    for row in read_requests(base / "train_mc_5shot" / "requests.jsonl.gz"):
        passage = _passage(row)
        if passage not in scored:
            yield Entry(str(row["doc_id"]), passage.partition(" -- ")[0], passage)


def _passage(row: Mapping[str, Any]) -> str:
    return row["doc"]["query"].partition("\nQuestion:")[0].strip()


# A service's manual is cut into documents of about this many characters.
_MANUAL_CHARS = 16_000


def techdocs(root: Path | None) -> Iterator[Entry]:
    """Manuals of web services, newest edition of each; group = service."""
    for service in sorted(p for p in assets.asset_path("techdocs", root).iterdir() if p.is_dir()):
        editions = sorted(service.glob("*/service-2.json.gz"))
        if not editions:
            continue
        with gzip.open(editions[-1], "rt", encoding="utf-8") as f:
            paragraphs = list(dict.fromkeys(_documentation(json.load(f))))
        sizes = itertools.accumulate(len(p) for p in paragraphs)
        pieces = itertools.groupby(
            zip(sizes, paragraphs, strict=True), key=lambda pair: pair[0] // _MANUAL_CHARS
        )
        for number, pair_group in pieces:
            text = "\n\n".join(paragraph for _, paragraph in pair_group)
            yield Entry(f"{service.name}/{number:04}", service.name, text)


def _documentation(node: Any) -> Iterator[str]:
    """Cleaned values of key `documentation`, depth first."""
    if isinstance(node, list):
        for item in node:
            yield from _documentation(item)
        return
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key != "documentation" or not isinstance(value, str):
            yield from _documentation(value)
            continue
        plain = html.unescape(re.sub(r"<[^>]+>", " ", value))
        plain = re.sub(r"\s+([.,;:)])", r"\1", re.sub(r"\s+", " ", plain)).strip()
        if len(plain) >= 120:
            yield plain


def math(root: Path | None) -> Iterator[Entry]:
    """Competition problems with solutions, without MATH-500; group = problem."""
    base = assets.asset_path("math", root)
    name = "gold_bpb_0shot/requests.jsonl.gz"
    scored = {r["doc"]["problem"] for r in read_requests(base / "minerva_math_500" / name)}
    for folder in sorted(base.glob("minerva_math_*")):
        if folder.name == "minerva_math_500":
            continue
        for row in read_requests(folder / name):
            doc, row_id = row["doc"], f"{folder.name}/{row['doc_id']}"
            if doc["problem"] not in scored:
                yield Entry(row_id, row_id, f"{doc['problem']}\n\n{doc['solution']}")


def biomed(root: Path | None) -> Iterator[Entry]:
    """Abstracts and explained medical exam answers; group = document."""
    base = assets.asset_path("biomed", root)
    for row in read_requests(base / "sciriff_yesno" / "rc_5shot" / "requests.jsonl.gz"):
        yield Entry(row["doc"]["id"], row["doc"]["id"], row["doc"]["context"].strip())
    for row in read_requests(base / "medmcqa" / "rc_5shot" / "requests.jsonl.gz"):
        doc = row["doc"]
        if doc["exp"]:
            text = f"{doc['question'].strip()}\n{doc['choices'][doc['gold']]}\n\n{doc['exp']}"
            yield Entry(f"medmcqa/{row['doc_id']}", doc["id"], text.strip())


READERS: Mapping[str, Callable[[Path | None], Iterator[Entry]]] = MappingProxyType(
    {
        "code": code,
        "news": news,
        "legal": legal,
        "government": government,
        "academic": academic,
        "religious": religious,
        "howto": howto,
        "wiki": wiki,
        "techdocs": techdocs,
        "math": math,
        "biomed": biomed,
    }
)


def read_all(domain: str, root: Path | None) -> list[Entry]:
    """All cleaned documents of a domain, in a fixed order.

    Raises:
      AssetError: the asset is not installed.
      DataError: the asset is there but cannot be read.
    """
    try:
        return list(READERS[domain](root))
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as e:
        raise DataError(
            f"The asset of {domain!r} cannot be read",
            got=f"{type(e).__name__}: {e}",
            fix=f"remove the asset folder and run: flexolmo assets --only {domain}",
        ) from e

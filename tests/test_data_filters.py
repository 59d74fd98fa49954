# SPDX-License-Identifier: Apache-2.0
"""Filters of the user and by name: which documents are kept, and what is refused."""

import corpus_helpers
import pytest
from corpus_helpers import in_split, prepared, texts_of, write

from flexolmo_jax.data import corpora, filters
from flexolmo_jax.errors import ConfigError

tokenizer = corpus_helpers.tokenizer


HOOK = """
import dataclasses


@dataclasses.dataclass
class Seen:
    text: str


def keep(document):
    if document.get("score", 1) < 0:
        return "low score"
    return "bake" not in Seen(document["text"]).text


def wrong(document):
    return 3


def broken(document):
    return document["nothing"]
"""


def test_filters_of_the_user_and_by_name(tokenizer, tmp_path):
    (tmp_path / "hook.py").write_text(HOOK)
    texts = in_split("train")[:6]
    train = [
        next(t for n in range(99) if corpora.split_of("file", t := f"{x} {n}") == "train")
        for x in ("1234567890 " * 9, "bake " + texts[0], "the same again " * 30)
    ]
    rows = [{"text": t, "score": 1} for t in [*texts, *train]]
    rows[0]["score"] = -1
    write(tmp_path / "a.jsonl", rows)
    specs = [f"{tmp_path / 'hook.py'}:keep", "letters=0.5", "repetition=0.5", "length=40:9000"]
    info = prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set", filters=specs)
    assert sorted(texts_of(tmp_path / "set", tokenizer)) == sorted(texts[1:])
    assert info["recipe"]["counts"]["dropped"] == {
        **{"filter keep: low score": 1, "filter keep": 1},
        **{"filter letters": 1, "filter repetition": 1},
    }
    # Another content of the hook is another recipe; another place of it is not.
    (tmp_path / "sub").mkdir()
    (tmp_path / "hook.py").rename(tmp_path / "sub" / "hook.py")
    specs[0] = f"{tmp_path / 'sub' / 'hook.py'}:keep"
    assert prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set", filters=specs) == info
    (tmp_path / "sub" / "hook.py").write_text(HOOK.replace("bake", "cake"))
    with pytest.raises(ConfigError, match="made from something else"):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set", filters=specs)


def test_a_hook_is_known_where_its_file_is_not(tmp_path):
    (tmp_path / "hook.py").write_text(HOOK)
    (parsed,) = filters.parse([f"{tmp_path / 'hook.py'}:keep"])
    (tmp_path / "hook.py").unlink()
    check = filters.load([parsed])
    assert check({"text": "x", "source_id": "a", "score": -1}) == "keep: low score"
    assert check({"text": "x", "source_id": "a"}) == ""


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenght=3", "did you mean 'length'"),
        ("length", "Unknown filter"),
        ("length=9:3", "cannot use"),
        ("letters=2", "cannot use"),
        ("language=English", "cannot use"),
        ("nowhere.py:keep", "no such filter file"),
        ("HOOK:none", "no such function"),
        ("HOOK:wrong", "true, false or a reason.*a.jsonl:1"),
        ("HOOK:broken", r"KeyError: 'nothing'.*a.jsonl:1"),
        ("BROKEN:keep", "does not import"),
    ],
)
def test_filters_that_cannot_be_used(tokenizer, tmp_path, spec, message):
    (tmp_path / "hook.py").write_text(HOOK)
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    write(tmp_path / "a.jsonl", in_split("train")[:2])
    spec = spec.replace("HOOK", f"{tmp_path / 'hook.py'}").replace("BROKEN", f"{tmp_path}/bad.py")
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set", filters=[spec])
    assert not (tmp_path / "set").exists()


def test_language():
    pytest.importorskip("py3langid")
    check = filters.load(filters.parse(["language=en,fr"]))
    english = "This is a sentence about a harbour and the ships that lie in it at night."
    german = "Dies ist ein Satz über einen Hafen und die Schiffe, die nachts darin liegen."
    assert check({"text": english, "source_id": ""}) == ""
    assert check({"text": german, "source_id": ""}) == "language"

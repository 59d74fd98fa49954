# SPDX-License-Identifier: Apache-2.0
"""Text to shards: exact bytes, seeded order, one making per directory; and the command."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_assets, words

from flexolmo_jax.cli import prepare as command
from flexolmo_jax.data import corpora, tokenize
from flexolmo_jax.data.corpora import Document
from flexolmo_jax.data.prepare import collect, prepare, train_tokenizer
from flexolmo_jax.data.shards import open_shards
from flexolmo_jax.errors import ConfigError, DataError

DOCUMENTS = [Document(f"{words(i)} é <|endoftext|>", f"d{i}") for i in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DOCUMENTS, 300, path)
    return path / "tokenizer.json"


def decoded(path, tokenizer):
    loaded = tokenize.load(tokenizer)
    shards = open_shards(path)
    ids = [shards.document(i).tolist() for i in range(shards.n_documents)]
    return [loaded.decode(i, skip_special_tokens=True) for i in ids]


def test_text_comes_back_and_bytes_are_exact(tokenizer, tmp_path):
    info = prepare(DOCUMENTS, tokenizer, tmp_path / "set")
    back = decoded(tmp_path / "set", tokenizer)
    assert sorted(back) == sorted(d.text for d in DOCUMENTS)
    assert back != [d.text for d in DOCUMENTS]  # shuffled
    shards = open_shards(tmp_path / "set", tokenizer_digest=tokenize.digest(tokenizer))
    lengths = tokenize.token_byte_lengths(tokenize.load(tokenizer))
    total = int(lengths[shards.tokens(0, shards.n_tokens)].sum())
    assert total == info["text_bytes"] == sum(len(d.text.encode()) for d in DOCUMENTS)
    assert info["tokenizer_digest"] == tokenize.digest(tokenizer)


def test_the_seed_decides_the_order(tokenizer, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(DOCUMENTS, tokenizer, tmp_path / name, seed=seed)
    a, b, c = (decoded(tmp_path / name, tokenizer) for name in "abc")
    assert a == b != c
    assert sorted(a) == sorted(c)


def test_small_batches_change_nothing(tokenizer, tmp_path, monkeypatch):
    whole = prepare(DOCUMENTS, tokenizer, tmp_path / "a")
    monkeypatch.setattr("flexolmo_jax.data.prepare._BATCH_BYTES", 300)
    assert prepare(DOCUMENTS, tokenizer, tmp_path / "b") == whole


def test_a_second_call_keeps_what_is_there(tokenizer, tmp_path):
    lines = []
    info = prepare(DOCUMENTS, tokenizer, tmp_path / "set")
    before = (tmp_path / "set" / "tokens.json").stat().st_mtime_ns
    assert prepare(DOCUMENTS, tokenizer, tmp_path / "set", progress=lines.append) == info
    assert (tmp_path / "set" / "tokens.json").stat().st_mtime_ns == before
    assert lines[-1].startswith("kept")


@pytest.mark.parametrize("change", ["text", "seed", "split", "max_bytes"])
def test_another_making_never_passes_for_this_one(tokenizer, tmp_path, change):
    prepare(DOCUMENTS, tokenizer, tmp_path / "set")
    documents, options = DOCUMENTS, {"seed": 5, "split": "heldout", "max_bytes": 9}
    options = {change: options[change]} if change in options else {}
    if change == "text":
        documents = [*DOCUMENTS[:-1], Document("changed", "d29")]
    with pytest.raises(ConfigError, match="made from something else"):
        prepare(documents, tokenizer, tmp_path / "set", **options)


def test_another_tokenizer_never_passes_for_this_one(tokenizer, tmp_path):
    prepare(DOCUMENTS, tokenizer, tmp_path / "set")
    train_tokenizer(DOCUMENTS, 301, tmp_path / "other")
    with pytest.raises(ConfigError, match="made from something else"):
        prepare(DOCUMENTS, tmp_path / "other", tmp_path / "set")


def test_damaged_shards_are_not_kept(tokenizer, tmp_path):
    prepare(DOCUMENTS, tokenizer, tmp_path / "set")
    with (tmp_path / "set" / "tokens-00000.array_record").open("ab") as f:
        f.write(b"x")
    with pytest.raises(DataError, match="padded"):
        prepare(DOCUMENTS, tokenizer, tmp_path / "set")


def test_a_changed_file_is_noticed(tokenizer, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text(words(1))
    prepare(str(source), tokenizer, tmp_path / "set", split="all")
    prepare(str(source), tokenizer, tmp_path / "set", split="all")
    source.write_text(words(2))
    with pytest.raises(ConfigError, match="made from something else"):
        prepare(str(source), tokenizer, tmp_path / "set", split="all")


def test_corpora_by_name(tokenizer, tmp_path):
    root = make_assets(tmp_path / "assets")
    info = prepare(["wiki", "howto"], tokenizer, tmp_path / "set", max_bytes=2000, root=root)
    assert (info["source"], info["split"]) == ("wiki,howto", "train")
    assert 3000 < info["text_bytes"] <= 4000
    names = [d.source_id for d in collect(["wiki", "howto"], root=root)]
    assert len(set(names)) == len(names)
    held = {d.text for d in corpora.read("wiki", "heldout", root=root)}
    assert not held & set(decoded(tmp_path / "set", tokenizer))


def test_refusals(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no text in this split"):
        prepare([Document("", "empty")], tokenizer, tmp_path / "set")
    with pytest.raises(ConfigError, match="not both"):
        prepare([DOCUMENTS[0], "wiki"], tokenizer, tmp_path / "set")
    for sources in ([], ["code", "code"]):
        with pytest.raises(ConfigError, match="each source once"):
            prepare(sources, tokenizer, tmp_path / "set")
    with pytest.raises(ConfigError, match="tokenizer exists"):
        train_tokenizer(DOCUMENTS, 300, tokenizer)
    assert list(tmp_path.iterdir()) == []


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in arguments]))


def test_the_command(tmp_path, capsys):
    harbour = Path(__file__).parent / "fixtures" / "harbour.txt"
    result = run_command(
        *("--source", harbour, "--split", "all", "--tokenizer", tmp_path / "tok"),
        *("--train-tokenizer", 280, "--out", tmp_path / "set"),
    )
    assert json.loads(json.dumps(result)) == result
    assert result["shards"]["text_bytes"] == len(harbour.read_bytes())
    assert result["digests"]["tokenizer"] == tokenize.digest(tmp_path / "tok")
    shown = capsys.readouterr().out
    assert "tokenizing 100 %" in shown
    assert "trained 280 tokens" in shown
    assert np.all(open_shards(tmp_path / "set", vocab_size=280).lengths > 1)


def test_the_command_with_nothing_to_do(tokenizer):
    with pytest.raises(ConfigError, match="Nothing to do"):
        run_command("--source", "code", "--tokenizer", tokenizer)

# SPDX-License-Identifier: Apache-2.0
"""Texts, near copies of them, files, and runs that stop half way, to prepare corpora with."""

import argparse
import gzip
import json

import pytest
from data_helpers import words

from flexolmo_jax.cli import prepare as command
from flexolmo_jax.data import corpora, tokenize
from flexolmo_jax.data.corpora import Document
from flexolmo_jax.data.prepare import prepare_large, train_tokenizer
from flexolmo_jax.data.shards import open_shards


class Stopped(BaseException):
    """The process was killed; nothing may catch it."""


def documents(count, words_each=60):
    """Texts that have nothing in common."""
    return [words(number, words_each) for number in range(count)]


OTHER = [words(number, 60) for number in range(1000, 1020)]


def in_split(split, count=200):
    """Texts that fall into a split."""
    return [t for t in documents(count) if corpora.split_of("file", t) == split]


def edited(text, number, changed):
    """A copy with some other words, chosen by `number`."""
    found = text.split()
    for i in range(changed):
        found[(number * 7 + i * len(found) // changed) % len(found)] = f"new{number}"
    return " ".join(found)


def write(path, texts):
    """Texts or rows as a .jsonl or .jsonl.gz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [t if isinstance(t, dict) else {"text": t} for t in texts]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Document(t, str(i)) for i, t in enumerate(documents(30))], 300, path)
    return path / "tokenizer.json"


def prepared(source, tokenizer, out, **options):
    """The sidecar, after every byte of the shards was checked."""
    info = prepare_large([str(source)], tokenizer, out, **options)
    assert open_shards(out, tokenizer_digest=tokenize.digest(tokenizer)).info == info
    assert not out.with_name(out.name + ".staged").exists()
    return info


def digests(info):
    return {name: item["digest"] for name, item in info["files"].items()}


def texts_of(path, tokenizer):
    """Texts in the order of the stream."""
    loaded, shards = tokenize.load(tokenizer), open_shards(path)
    ids = [shards.document(i).tolist() for i in range(shards.n_documents)]
    return [loaded.decode(i, skip_special_tokens=True) for i in ids]


def stop_at(monkeypatch, name, number):
    """Kills the run at call `number` of a function; the calls so far are in the list returned."""
    calls = []
    module_name, _, attribute = name.rpartition(".")
    module = __import__(module_name, fromlist=["x"])
    original = getattr(module, attribute)

    def wrapped(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            raise Stopped
        return original(*arguments, **options)

    monkeypatch.setattr(module, attribute, wrapped)
    return calls


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in arguments]))

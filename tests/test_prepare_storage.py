# SPDX-License-Identifier: Apache-2.0
"""Text, unfinished work and shards in object storage: the same bytes as on a disk."""

import json

import corpus_helpers
import object_store
import pytest
from corpus_helpers import OTHER, Stopped, digests, documents, prepared, write

from flexolmo_jax.cli import main as cli
from flexolmo_jax.data import beam, places
from flexolmo_jax.data.prepare import prepare_large
from flexolmo_jax.data.shards import open_shards
from flexolmo_jax.errors import ConfigError, DataError, MachineError
from flexolmo_jax.storage import cache, client

tokenizer = corpus_helpers.tokenizer


@pytest.fixture(scope="module")
def server():
    with object_store.running("bucket") as variables:
        yield variables


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """A folder of this test's own in the bucket."""
    for name, value in {**server, cache.VARIABLE: str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


def send(folder, url):
    for file in folder.iterdir():
        client.write(f"{url}/{file.name}", file)


def test_a_run_that_was_stopped_goes_on_in_the_bucket(tokenizer, tmp_path, bucket):
    write(tmp_path / "in" / "a.jsonl", documents(40))
    write(tmp_path / "in" / "b.jsonl.gz", [*OTHER, documents(40)[0]])
    local = prepared(tmp_path / "in", tokenizer, tmp_path / "local", n_shards=3)
    send(tmp_path / "in", f"{bucket}/in")
    text, out = [f"{bucket}/in"], f"{bucket}/out"
    with pytest.MonkeyPatch.context() as patch:
        corpus_helpers.stop_at(patch, "flexolmo_jax.data.assembly.write_shard", 2)
        with pytest.raises(Stopped):
            prepare_large(text, tokenizer, out, n_shards=3)
    assert "tokens.json" not in places.sizes(out)
    with pytest.raises(ConfigError, match=r"other options.*other seed"):
        prepare_large(text, tokenizer, out, n_shards=3, seed=1)
    lines = []
    info = prepare_large(text, tokenizer, out, n_shards=3, progress=lines.append)
    assert any("reading 0 of 2" in line for line in lines)
    assert any("writing 2 of 3" in line for line in lines)
    assert digests(info) == digests(local)
    assert info["recipe"]["counts"] == local["recipe"]["counts"]
    assert set(places.sizes(out)) == {p.name for p in (tmp_path / "local").iterdir()}
    assert places.sizes(f"{out}.staged") == {}
    assert open_shards(out).info == info
    # Kept when asked for again; nothing else passes for it.
    assert prepare_large(text, tokenizer, out, n_shards=3, progress=lines.append) == info
    assert lines[-1].startswith("kept")
    client.write(f"{bucket}/in/a.jsonl", tmp_path / "in" / "b.jsonl.gz")
    with pytest.raises(ConfigError, match="made from something else"):
        prepare_large(text, tokenizer, out, n_shards=3)


def test_from_a_bucket_to_a_disk_and_one_object(tokenizer, tmp_path, bucket):
    write(tmp_path / "in" / "a.jsonl", documents(40))
    send(tmp_path / "in", f"{bucket}/in")
    local = prepared(tmp_path / "in", tokenizer, tmp_path / "local")
    info = prepared(f"{bucket}/in/a.jsonl", tokenizer, tmp_path / "set")
    assert digests(info) == digests(local)
    with pytest.raises(ConfigError, match="No text files under this URL"):
        prepare_large([f"{bucket}/nothing"], tokenizer, tmp_path / "none")
    client.write(f"{bucket}/in/a.jsonl", b'{"text": 3}')
    with pytest.raises(DataError, match=r"a.jsonl, line 1"):
        prepare_large([f"{bucket}/in"], tokenizer, tmp_path / "none")


def test_only_shards_of_a_stopped_run_are_removed(tokenizer, tmp_path, bucket):
    """Text that changes while a run is stopped must not leave shards behind that no one lists."""
    write(tmp_path / "in" / "a.jsonl", documents(40))
    text, out = [str(tmp_path / "in")], f"{bucket}/out"
    other = f"{out}/sub/tokens-00000.array_record"
    client.write(other, b"of another set")
    with pytest.raises(ConfigError, match="other objects under the output"):
        prepare_large(text, tokenizer, out)
    client.delete(out, ["sub/tokens-00000.array_record"])
    with pytest.MonkeyPatch.context() as patch:
        corpus_helpers.stop_at(patch, "flexolmo_jax.data.assembly.write_shard", 1)
        with pytest.raises(Stopped):
            prepare_large(text, tokenizer, out)
    client.write(f"{out}/tokens-00077.array_record", b"of the stopped run")
    client.write(other, b"of another set")
    info = prepare_large(text, tokenizer, out)
    listed = {"tokens.json", "document_lengths.npy", *info["files"]}
    assert set(places.sizes(out)) == {*listed, "sub/tokens-00000.array_record"}
    client.delete(out, ["sub/tokens-00000.array_record"])
    open_shards(out)


# Broken once by a local folder in place of the URL, which then was uploaded.
@pytest.mark.parametrize("source", ["text of this machine", "text of the bucket"])
def test_the_command_works_in_the_bucket(source, tokenizer, tmp_path, bucket, capsys):
    write(tmp_path / "in" / "a.jsonl", documents(40))
    send(tmp_path / "in", f"{bucket}/in")
    text, out = str(tmp_path / "in"), f"{bucket}/out"
    command = ["prepare", "--source", text, "--shards", "3"]
    if source == "text of the bucket":
        command = ["prepare", "--source", f"{bucket}/in"]
    command += ["--tokenizer", str(tokenizer), "--out", f"{out}/"]
    with pytest.MonkeyPatch.context() as patch:
        corpus_helpers.stop_at(patch, "flexolmo_jax.data.assembly.write_shard", 1)
        with pytest.raises(Stopped):
            cli.main(command)
    assert places.sizes(f"{out}.staged")
    result = tmp_path / "result.json"
    assert cli.main([*command, "--json", str(result)]) == 0
    assert "reading 0 of 1" in capsys.readouterr().out
    assert json.loads(result.read_text())["out"] == out
    assert places.sizes(f"{out}.staged") == {}
    assert cli.main(command) == 0
    assert f"kept {out}" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.array_record"))


def test_a_runner_of_a_cluster_is_given_the_urls(tokenizer, tmp_path, bucket, monkeypatch):
    """All of them: the output must not have become a folder of this machine on the way."""
    write(tmp_path / "in" / "a.jsonl", documents(40))
    send(tmp_path / "in", f"{bucket}/in")
    seen = []

    def here(engine, works, options, stage):
        engine._refuse_local([stage, *(w.place for w in works)])
        seen.append(stage)
        raise MachineError("There is no cluster")

    monkeypatch.setattr(beam, "_beam", lambda: None)
    monkeypatch.setattr(beam.BeamEngine, "read", here)
    command = ["prepare", "--source", f"{bucket}/in", "--tokenizer", str(tokenizer)]
    command += ["--out", f"{bucket}/out", "--runner", "DataflowRunner"]
    assert cli.main(command) == 4
    assert seen == [f"{bucket}/out.staged"]

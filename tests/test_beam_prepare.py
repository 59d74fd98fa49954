# SPDX-License-Identifier: Apache-2.0
"""Apache Beam spreads the work and changes nothing: the same bytes as one process writes.

`make test-beam` runs these in an environment of their own (.venv-beam), as Beam asks for older
versions of other packages than the rest.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpus_helpers
import pytest
from corpus_helpers import Stopped, digests, documents, edited, prepared, texts_of, write

from flexolmo_jax.cli import main as cli
from flexolmo_jax.data import beam, corpora
from flexolmo_jax.data.prepare import prepare_large
from flexolmo_jax.data.shards import open_shards
from flexolmo_jax.errors import ConfigError, DataError, MachineError

try:
    import apache_beam
except ModuleNotFoundError:
    apache_beam = None

pytestmark = [
    pytest.mark.skipif(apache_beam is None, reason="apache_beam is absent: make test-beam has it"),
    # Of Beam's own modules and what they import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
tokenizer = corpus_helpers.tokenizer


def leaky(count=40):
    """Texts with copies and near copies, also across the splits."""
    texts = documents(count, 120)
    held = [t for t in texts if corpora.split_of("file", t) == "heldout"]
    copies = [t.upper() for t in texts[:9]] + [edited(t, 1, 1) for t in texts[9:18]]
    leaks = [v for t in held for n in range(9) if (v := edited(t, n, 1)) not in texts]
    return [*leaks, *texts, *copies, *texts[:5], "short", ""]


def spread(folder, texts, files=5):
    for i in range(files):
        write(folder / f"{i}.jsonl", texts[i::files])
    return folder


@pytest.mark.parametrize("dedup", ["none", "exact", "near"])
@pytest.mark.parametrize("shards", [1, 4])
def test_the_bytes_are_those_of_one_process(tokenizer, tmp_path, dedup, shards):
    texts = leaky()
    one = write(tmp_path / "one.jsonl", texts) or tmp_path / "one.jsonl"
    many = spread(tmp_path / "many", texts[::-1])
    local = prepared(one, tokenizer, tmp_path / "local", dedup=dedup, n_shards=shards)
    options = {"dedup": dedup, "n_shards": shards, "runner": "direct"}
    by_beam = prepared(many, tokenizer, tmp_path / "beam", **options)
    assert digests(by_beam) == digests(local)
    assert by_beam["recipe"]["counts"] == local["recipe"]["counts"]
    dropped = by_beam["recipe"]["counts"]["dropped"]
    assert ("near held-out text" in dropped) == (dedup == "near")
    assert ("copy" in dropped) == (dedup != "none")


def test_several_processes_write_the_same(tokenizer, tmp_path):
    (tmp_path / "hook.py").write_text("def keep(document):\n    return 'ba' in document['text']\n")
    options = {"filters": [f"{tmp_path / 'hook.py'}:keep", "letters=0.5"], "n_shards": 3}
    many = spread(tmp_path / "many", leaky())
    os.replace(many / "0.jsonl", os.fsencode(many) + b"/-\xff\n %.jsonl")
    local = prepared(many, tokenizer, tmp_path / "local", **options)
    by_beam = prepared(many, tokenizer, tmp_path / "beam", runner="direct", workers=2, **options)
    assert by_beam == local
    assert by_beam["recipe"]["counts"]["dropped"]["filter keep"] > 0


def test_texts_in_the_shuffle_of_a_cluster_write_the_same(tokenizer, tmp_path, monkeypatch):
    many = spread(tmp_path / "many", leaky())
    local = prepared(many, tokenizer, tmp_path / "local", n_shards=3)

    def cluster(self, *arguments):
        start(self, *arguments)
        self.shuffles_files = False

    start = beam.BeamEngine.__init__
    monkeypatch.setattr(beam.BeamEngine, "__init__", cluster)
    monkeypatch.setattr("flexolmo_jax.data.assembly.chunk", None)
    assert prepared(many, tokenizer, tmp_path / "beam", n_shards=3, runner="direct") == local


def test_small_pieces_change_no_byte(tokenizer, tmp_path, monkeypatch):
    many = spread(tmp_path / "many", leaky())
    local = prepared(many, tokenizer, tmp_path / "local", n_shards=3)
    monkeypatch.setattr("flexolmo_jax.data.staging._PIECE_BYTES", 900)
    assert prepared(many, tokenizer, tmp_path / "beam", n_shards=3, runner="direct") == local


def test_held_out_text_is_not_trained_on(tokenizer, tmp_path):
    texts = leaky()
    many = spread(tmp_path / "many", texts)
    held = {t for t in texts if corpora.split_of("file", t) == "heldout" and len(t) > 40}
    kept = {}
    for dedup in ("none", "near"):
        out = tmp_path / dedup
        prepared(many, tokenizer, out, runner="direct", dedup=dedup)
        kept[dedup] = [set(t.split()) for t in texts_of(out, tokenizer)]
    near = {
        dedup: sum(any(len(set(t.split()) & found) > 80 for t in held) for found in sets)
        for dedup, sets in kept.items()
    }
    assert near["none"] > 5
    assert near["near"] == 0


def test_bad_input_is_named_once(tokenizer, tmp_path):
    many = spread(tmp_path / "many", leaky())
    with (many / "3.jsonl").open("ab") as f:
        f.write(b'{"text": 3}\n')
    with pytest.raises(DataError, match=r'string under "text".*3.jsonl, line \d+'):
        prepared(many, tokenizer, tmp_path / "set", runner="direct")
    lines = []
    options = {"runner": "direct", "max_bad_frac": 0.1, "progress": lines.append}
    info = prepared(many, tokenizer, tmp_path / "set", **options)
    assert info["recipe"]["counts"]["dropped"]["bad rows"] == 1
    assert "reading 1 of 5 inputs" in lines[1]  # the others were done


def test_a_failing_worker_is_told_and_its_work_done_again(tokenizer, tmp_path, monkeypatch):
    many = spread(tmp_path / "many", leaky())
    whole = prepared(many, tokenizer, tmp_path / "whole", n_shards=3)
    calls = []

    def fails(job, shard, *rest):
        calls.append(shard)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        return write_shard(job, shard, *rest)

    from flexolmo_jax.data import assembly

    write_shard = assembly.write_shard
    monkeypatch.setattr(assembly, "write_shard", fails)
    with pytest.raises(MachineError, match="disk is gone"):
        prepared(many, tokenizer, tmp_path / "set", n_shards=3, runner="direct")
    assert not (tmp_path / "set").exists()
    lines = []
    options = {"n_shards": 3, "runner": "direct", "progress": lines.append}
    assert prepared(many, tokenizer, tmp_path / "set", **options) == whole
    assert any("writing 2 of 3 shards" in line for line in lines)


def test_a_run_may_change_its_engine(tokenizer, tmp_path, monkeypatch):
    many = spread(tmp_path / "many", leaky())
    whole = prepared(many, tokenizer, tmp_path / "whole", n_shards=3)
    corpus_helpers.stop_at(monkeypatch, "flexolmo_jax.data.assembly.write_shard", 2)
    with pytest.raises(Stopped):
        prepared(many, tokenizer, tmp_path / "set", n_shards=3)
    monkeypatch.undo()
    assert prepared(many, tokenizer, tmp_path / "set", n_shards=3, runner="direct") == whole


def test_a_killed_program_goes_on(tokenizer, tmp_path):
    many = spread(tmp_path / "many", leaky())
    whole = prepared(many, tokenizer, tmp_path / "whole", n_shards=3)
    # The hook is slow, so that the program is killed while it reads.
    slow = tmp_path / "slow.py"
    slow.write_text("import time\n\n\ndef keep(document):\n    time.sleep(0.02)\n    return True\n")
    arguments = ["--source", many, "--tokenizer", tokenizer, "--runner", "direct", "--shards", 3]
    arguments += ["--filter", f"{slow}:keep", "--out", tmp_path / "set"]
    command = [sys.executable, "-m", "flexolmo_jax", "prepare", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    process = subprocess.Popen(command, env=environment)
    stage = tmp_path / "set.staged" / "inputs"
    deadline = time.monotonic() + 300
    while not list(stage.glob("*/stamp.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list(stage.glob("*/stamp.json")))
    assert 1 <= done < 5
    assert not (tmp_path / "set").exists()
    lines = []
    options = {"filters": [f"{slow}:keep"], "n_shards": 3, "runner": "direct"}
    info = prepared(many, tokenizer, tmp_path / "set", progress=lines.append, **options)
    assert f"reading {5 - done} of 5 inputs" in lines[1]
    assert digests(info) == digests(whole)


def test_a_finished_run_is_kept(tokenizer, tmp_path):
    many = spread(tmp_path / "many", leaky())
    info = prepared(many, tokenizer, tmp_path / "set")
    before = (tmp_path / "set" / "tokens.json").stat().st_mtime_ns
    assert prepared(many, tokenizer, tmp_path / "set", runner="direct") == info
    assert (tmp_path / "set" / "tokens.json").stat().st_mtime_ns == before


def test_runners_and_their_options(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", documents(5))
    for options, message in (
        ({"runner": "DataflowRuner"}, "did you mean 'DataflowRunner'"),
        ({"runner": "direct", "workers": 0}, "number of workers"),
        ({"runner": "FlinkRunner", "workers": 2}, "number of workers"),
        ({"runner": "direct", "runner_options": ["--a=b"]}, "KEY=VALUE"),
        ({"runner": "direct", "runner_options": ["a"]}, "KEY=VALUE"),
        ({"runner": "DataflowRunner"}, "do not see files of this machine"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_large([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_the_command_and_its_quiet_screen(tokenizer, tmp_path, capfd):
    many = spread(tmp_path / "many", leaky())
    arguments = ["prepare", "--source", many, "--tokenizer", tokenizer, "--out", tmp_path / "set"]
    arguments += ["--runner", "direct", "--json", tmp_path / "result.json"]
    assert cli.main(list(map(str, arguments))) == 0
    shown = capfd.readouterr()
    assert "near held-out text" in shown.out
    assert shown.err == ""
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["shards"]["documents"] == open_shards(tmp_path / "set").n_documents

# SPDX-License-Identifier: Apache-2.0
"""Text of any size: the same bytes however it lies, no copies across splits, runs that go on."""

import json
import os

import corpus_helpers
import numpy as np
import pytest
from corpus_helpers import (
    OTHER,
    Stopped,
    digests,
    documents,
    edited,
    in_split,
    prepared,
    texts_of,
    write,
)

from flexolmo_jax.data import assembly, corpora, dedup, places, sketch, staging
from flexolmo_jax.data.prepare import prepare, prepare_large
from flexolmo_jax.data.shards import open_shards
from flexolmo_jax.errors import ConfigError, DataError, MachineError

tokenizer = corpus_helpers.tokenizer


# --- the same bytes


def test_files_names_and_order_change_no_byte(tokenizer, tmp_path):
    texts = documents(60)
    write(tmp_path / "one" / "a.jsonl", texts)
    for i in range(4):
        write(tmp_path / "four" / f"{9 - i}.jsonl", texts[::-1][i::4])
    one = prepared(tmp_path / "one", tokenizer, tmp_path / "x", n_shards=3)
    four = prepared(tmp_path / "four", tokenizer, tmp_path / "y", n_shards=3)
    assert digests(one) == digests(four)
    assert len(digests(one)) == 3
    assert one["recipe"]["counts"] == four["recipe"]["counts"]


def test_small_pieces_and_batches_change_no_byte(tokenizer, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", documents(60))
    whole = prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "x", n_shards=2)
    monkeypatch.setattr("flexolmo_jax.data.staging._PIECE_BYTES", 700)
    monkeypatch.setattr("flexolmo_jax.data.assembly._BATCH_BYTES", 300)
    assert prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "y", n_shards=2) == whole


def test_the_stream_does_not_depend_on_the_number_of_shards(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", documents(60))
    streams = []
    for n in (1, 4, 200):
        info = prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / str(n), n_shards=n)
        shards = open_shards(tmp_path / str(n))
        streams.append(shards.tokens(0, shards.n_tokens).tolist())
        assert len(info["files"]) <= n  # a shard without documents has no file
    assert streams[0] == streams[1] == streams[2]


def test_the_seed_decides_the_order_alone(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", documents(60))
    for seed in (0, 1):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / str(seed), seed=seed)
    zero, one = (texts_of(tmp_path / str(seed), tokenizer) for seed in (0, 1))
    assert zero != one
    assert sorted(zero) == sorted(one)


@pytest.mark.parametrize("split", corpora.SPLITS)
def test_documents_are_those_of_the_path_in_memory(tokenizer, tmp_path, split):
    texts = [*documents(80), documents(80)[3], documents(80)[4].upper(), "short", " "]
    write(tmp_path / "a.jsonl", texts)
    prepare(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "memory", split=split)
    prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "large", split=split, dedup="exact")
    one, other = (
        sorted(map(corpora.text_key, texts_of(tmp_path / name, tokenizer)))
        for name in ("memory", "large")
    )
    assert one == other
    assert one


def test_a_corpus_by_name(tokenizer, tmp_path):
    from data_helpers import make_assets

    root = make_assets(tmp_path / "assets")
    for dedup_, exact in (("none", True), ("near", False)):
        out = tmp_path / dedup_
        prepare_large(["wiki", "howto"], tokenizer, out, root=root, dedup=dedup_)
        expected = [
            e.text for name in ("wiki", "howto") for e in corpora.parts(name, root)["train"]
        ]
        found = texts_of(out, tokenizer)
        assert sorted(found) == sorted(expected) if exact else set(found) <= set(expected)


# --- deduplication


def near(text, split, changed=1):
    """A text with few other words that falls into a split."""
    return next(
        t for n in range(500) if corpora.split_of("file", t := edited(text, n, changed)) == split
    )


def recased(text, split):
    """A text that differs in case and marks alone, in a split."""
    variants = (text[:i].upper() + text[i:] + " !" for i in range(len(text)))
    return next(t for t in variants if corpora.split_of("file", t) == split)


def test_held_out_text_is_not_trained_on(tokenizer, tmp_path):
    """Copies in another form and near copies of held-out documents, and of nothing else, go."""
    train, held = in_split("train")[:10], in_split("heldout")[:10]
    leaks = [*(recased(t, "train") for t in held[:3]), *(near(t, "train") for t in held[3:6])]
    write(tmp_path / "a.jsonl", [*leaks, *train, *held])
    counts = {}
    for kind in staging.DEDUP:
        info = prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / kind, dedup=kind)
        counts[kind] = info["recipe"]["counts"]["dropped"]
        kept = {"none": train + leaks, "exact": train + leaks[3:], "near": train}[kind]
        assert sorted(texts_of(tmp_path / kind, tokenizer)) == sorted(kept)
    assert counts["none"] == {}
    assert counts["exact"] == {"copy of held-out text": 3}
    assert counts["near"] == {"copy of held-out text": 3, "near held-out text": 3}
    # What is held out does not depend on the training text.
    prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "held", split="heldout")
    assert sorted(texts_of(tmp_path / "held", tokenizer)) == sorted(held)


def test_what_is_near_a_lost_held_out_document_goes_too(tokenizer, tmp_path):
    text = in_split("heldout")[0]
    first, second = sorted([text, near(text, "heldout")], key=lambda t: sketch.text_id(t, 0))
    leak = near(second, "train", changed=2)
    write(tmp_path / "a.jsonl", [first, second, leak, *in_split("train")[:3]])
    prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")
    assert sorted(texts_of(tmp_path / "set", tokenizer)) == sorted(in_split("train")[:3])


def test_one_of_several_copies_stays(tokenizer, tmp_path):
    train = in_split("train")[:8]
    copies = [train[0], train[0], recased(train[1], "train"), near(train[2], "train")]
    write(tmp_path / "a.jsonl", [*train, *copies])
    info = prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")
    assert info["documents"] == 8
    assert info["recipe"]["counts"]["dropped"] == {"copy": 3, "near copy": 1}
    kept = texts_of(tmp_path / "set", tokenizer)
    assert len({corpora.text_key(t) for t in kept} & {corpora.text_key(t) for t in train}) >= 7


def test_copies_in_other_sources_go(tokenizer, tmp_path):
    texts = in_split("train")[:5]
    write(tmp_path / "a.jsonl", texts)
    write(tmp_path / "b.jsonl.gz", texts)
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]
    info = prepare_large(sources, tokenizer, tmp_path / "set")
    assert info["documents"] == 5
    assert info["recipe"]["counts"]["dropped"] == {"copy": 5}


def test_sketches_estimate_the_overlap():
    text = documents(1, words_each=600)[0]
    for changed in (0, 6, 12, 30, 100):
        other = edited(text, 1, changed)
        runs = [
            {tuple(found[i : i + sketch.RUN]) for i in range(len(found) - sketch.RUN + 1)}
            for found in map(sketch.words, (text, other))
        ]
        exact = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        (bands, values), (bands2, values2) = sketch.minhash(text), sketch.minhash(other)
        assert (values == values2).mean() == pytest.approx(exact, abs=0.13)
        if exact > 0.9:
            assert (bands == bands2).any()
        if exact < 0.2:
            assert not (bands == bands2).any()
    assert all(
        (a == b).all() for a, b in zip(sketch.minhash("a,  B"), sketch.minhash("A b"), strict=True)
    )
    assert sketch.words("日本語 text, x_y") == ["日", "本", "語", "text", "x", "y"]


def test_losers_do_not_depend_on_order_or_cuts():
    rng = np.random.default_rng(0)
    rows = np.zeros(400, dedup.NEAR)
    rows["key"] = rng.integers(0, 8, 400)
    rows["hi"], rows["part"] = rng.permutation(400), rng.integers(0, 3, 400)
    rows["values"] = rng.integers(0, 2, (400, 1))  # two kinds of sketch
    whole = dedup.near_losers(rows)
    again = dedup.near_losers(rows[rng.permutation(400)])
    assert dedup.merged(whole) == dedup.merged(again)
    # Of each bucket and kind of sketch one document stays, of the first split that there is.
    kinds = {(r["key"], r["values"][0]) for r in rows}
    assert len(whole) == 400 - len(kinds)
    lost = {tuple(r)[:3] for r in whole.tolist()}
    for key, kind in kinds:
        group = [r for r in rows if (r["key"], r["values"][0]) == (key, kind)]
        kept = [r for r in group if (int(r["hi"]), 0, int(r["part"])) not in lost]
        assert [int(r["part"]) for r in kept] == [min(int(r["part"]) for r in group)]


def test_a_crowded_bucket_is_compared_with_its_first(monkeypatch):
    rows = np.zeros(50, dedup.NEAR)
    rows["hi"] = np.arange(50)
    rows["values"] = np.arange(50)[:, None]
    rows["values"][40:] = rows["values"][:10]
    monkeypatch.setattr(dedup, "_HEADS", 5)
    assert len(dedup.near_losers(rows)) == 5
    monkeypatch.setattr(dedup, "_HEADS", 50)
    assert len(dedup.near_losers(rows)) == 10


def test_cuts_cover_everything_in_equal_ranges():
    rows = np.zeros(1000, dedup.LOSER)
    rows["hi"] = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    rows["hi"][:2] = 0, 2**64 - 1
    job = assembly.Job("", "", staging.Options(), 7, "")
    found = {}
    for number, packed in dedup.cut(rows, "hi", 7):
        part = dedup.unpacked([packed], dedup.LOSER)["hi"]
        least, end = (assembly._least_id(job, k) for k in (number, number + 1))
        assert all(least <= int(hi) < end for hi in part)
        found[number] = len(part)
    assert sorted(found) == list(range(7))
    assert sum(found.values()) == 1000
    assert list(dedup.cut(rows[:0], "hi", 7)) == []


# --- bad input


def test_bad_rows_are_refused_or_counted(tokenizer, tmp_path):
    good = in_split("train")[:20]
    lines = [json.dumps({"text": t}).encode() for t in good]
    lines[3:3] = [b'{"text": 3}', b"{", b'{"text": "\xff ' + b"x" * 50 + b'"}', b"[" * 9999, b""]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": " "}']))
    with pytest.raises(DataError, match=r"cannot be read|line 4"):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")
    with pytest.raises(DataError, match=r"4 of 25.*at most 10.*a.jsonl, line 4"):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set", max_bad_frac=0.1)
    assert not (tmp_path / "set").exists()
    # A greater share may be borne without starting over.
    info = prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set", max_bad_frac=0.2)
    counts = info["recipe"]["counts"]
    assert counts["dropped"] == {"bad rows": 4, "empty": 1}
    assert counts["rows"] == 25 == counts["documents"] + 5 + counts["other_splits"]
    assert sorted(texts_of(tmp_path / "set", tokenizer)) == sorted(good)


def test_rows_add_up(tokenizer, tmp_path):
    texts = [*documents(90), *documents(20), "short", ""]
    write(tmp_path / "a.jsonl", texts)
    for split in corpora.SPLITS:
        info = prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / split, split=split)
        counts = info["recipe"]["counts"]
        gone = sum(counts["dropped"].values()) + counts["other_splits"]
        assert counts["rows"] == len(texts) == info["documents"] + gone
        assert counts["documents"] == info["documents"]


def test_one_bad_file_names_itself_and_the_others_are_not_read_again(tokenizer, tmp_path):
    folder = tmp_path / "in"
    for name in "abc":
        write(folder / f"{name}.jsonl", [f"{name} {t}" for t in documents(8)])
    (folder / "b.jsonl").write_bytes(b'{"text": "x"}\n{"text"')
    lines = []
    with pytest.raises(DataError, match=r"Not JSON.*b.jsonl, line 2"):
        prepared(folder, tokenizer, tmp_path / "set", progress=lines.append)
    write(folder / "b.jsonl", documents(8))
    prepared(folder, tokenizer, tmp_path / "set", progress=lines.append)
    assert sum("reading 1 of 3 inputs" in line for line in lines) == 1


def test_hostile_names(tokenizer, tmp_path):
    folder = tmp_path / "in"
    names = ["a\nb.jsonl", "-x.jsonl", "%41 *?[z].jsonl", "..jsonl", "ü'\"$(id).jsonl", "é.jsonl"]
    for number, name in enumerate(names):
        write(folder / name, [f"{number} {t}" for t in documents(6)])
    os.replace(folder / names[-1], os.fsencode(folder) + b"/\xff\xfe.jsonl")
    info = prepared(folder, tokenizer, tmp_path / "set", split="all", dedup="exact")
    assert info["documents"] == 36
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "set"]
    (tmp_path / "bad\n.jsonl").write_text("{")
    with pytest.raises(DataError, match="Not JSON"):
        prepared(tmp_path / "bad\n.jsonl", tokenizer, tmp_path / "other")


# --- going on


@pytest.mark.parametrize(
    "place",
    ["staging.stage_input", "assembly.write_shard", "shards.write_sidecar", "places.remove"],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(tokenizer, tmp_path, monkeypatch, place):
    for i in range(3):
        write(tmp_path / "in" / f"{i}.jsonl", documents(60)[i::3])
    whole = prepared(tmp_path / "in", tokenizer, tmp_path / "whole", n_shards=3)
    calls = corpus_helpers.stop_at(monkeypatch, f"flexolmo_jax.data.{place}", 2)
    if place in ("shards.write_sidecar", "places.remove"):
        calls = corpus_helpers.stop_at(monkeypatch, f"flexolmo_jax.data.{place}", 1)
    with pytest.raises(Stopped):
        prepared(tmp_path / "in", tokenizer, tmp_path / "set", n_shards=3)
    assert (tmp_path / "set").exists() == (place == "places.remove")
    monkeypatch.undo()
    lines = []
    info = prepared(tmp_path / "in", tokenizer, tmp_path / "set", n_shards=3, progress=lines.append)
    assert info == whole
    assert calls
    expected = {
        "staging.stage_input": "reading 2 of 3 inputs",
        "assembly.write_shard": "writing 2 of 3 shards",
        "shards.write_sidecar": "writing 0 of 3 shards",
        "places.remove": "kept",
    }[place]
    assert any(expected in line for line in lines)
    open_shards(tmp_path / "set")


def test_other_options_are_refused_and_changed_files_read_again(tokenizer, tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.jsonl", documents(30))
    write(tmp_path / "in" / "b.jsonl", [f"more {t}" for t in documents(30)])
    corpus_helpers.stop_at(monkeypatch, "flexolmo_jax.data.assembly.write_shard", 1)
    with pytest.raises(Stopped):
        prepared(tmp_path / "in", tokenizer, tmp_path / "set")
    monkeypatch.undo()
    for change in ({"seed": 1}, {"dedup": "exact"}, {"n_shards": 2}, {"filters": ["letters=0.1"]}):
        key = {"n_shards": "shards"}.get(*change, *change)
        with pytest.raises(ConfigError, match=f"other options.*other {key}"):
            prepared(tmp_path / "in", tokenizer, tmp_path / "set", **change)
    write(tmp_path / "in" / "b.jsonl", OTHER)
    lines = []
    info = prepared(tmp_path / "in", tokenizer, tmp_path / "set", progress=lines.append)
    assert any("reading 1 of 2 inputs" in line for line in lines)
    assert info == prepared(tmp_path / "in", tokenizer, tmp_path / "fresh")


def test_a_finished_run_is_kept_and_nothing_else_passes_for_it(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", documents(30))
    info = prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")
    before = (tmp_path / "set" / "tokens.json").stat().st_mtime_ns
    lines = []
    again = prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set", progress=lines.append)
    assert again == info
    assert lines[-1].startswith("kept")
    assert (tmp_path / "set" / "tokens.json").stat().st_mtime_ns == before
    for change in ({"seed": 1}, {"split": "all"}, {"dedup": "none"}, {"n_shards": 7}):
        with pytest.raises(ConfigError, match="made from something else"):
            prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set", **change)
    write(tmp_path / "a.jsonl", OTHER)
    with pytest.raises(ConfigError, match="made from something else"):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="made from something else"):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "file")


def test_two_at_once_are_refused(tokenizer, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", documents(30))
    seen = []

    def meanwhile(*arguments):
        for _ in range(2):  # Broken once: the first to be refused removed the lock.
            with pytest.raises(ConfigError, match="Another process prepares"):
                prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")
        seen.append(1)
        return stage(*arguments)

    stage = staging.stage_input
    monkeypatch.setattr(staging, "stage_input", meanwhile)
    prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")
    assert seen == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "set"]


def test_only_its_own_stage_is_removed(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", documents(30))
    (tmp_path / "set.staged").mkdir()
    (tmp_path / "set.staged" / "thesis").write_text("x")
    with pytest.raises(ConfigError, match="in use"):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")
    stage = str(tmp_path / "set.staged")
    prepare_large([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "set", stage=stage)
    assert (tmp_path / "set.staged" / "thesis").read_text() == "x"
    assert [p.name for p in (tmp_path / "set.staged").iterdir()] == ["thesis"]


def test_a_staged_file_that_was_removed(tokenizer, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", documents(30))
    corpus_helpers.stop_at(monkeypatch, "flexolmo_jax.data.assembly.write_shard", 1)
    with pytest.raises(Stopped):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")
    monkeypatch.undo()
    for text in (tmp_path / "set.staged").rglob("*.text"):
        text.write_bytes(b"")
    with pytest.raises(DataError, match="staged file is missing or damaged"):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")


def test_a_full_disk_is_told(tokenizer, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", documents(30))

    def full(*arguments):
        raise RuntimeError("no space")

    monkeypatch.setattr("flexolmo_jax.data.shards.RecordFile.close", full)
    with pytest.raises(MachineError, match="no space"):
        prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")
    monkeypatch.undo()
    prepared(tmp_path / "a.jsonl", tokenizer, tmp_path / "set")


# --- refusals


def test_refusals(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", ["short"])
    source = tmp_path / "a.jsonl"
    for changes, message in (
        ({"split": "trian"}, "did you mean 'train'"),
        ({"dedup": "nera"}, "did you mean 'near'"),
        ({"n_shards": 0}, "number of shards"),
        ({"n_shards": 100_000}, "number of shards"),
        ({"max_bad_frac": 1.0}, "share of the rows"),
        ({"workers": 2}, "need one"),
        ({"runner_options": ["a=b"]}, "need one"),
        ({"runner": "Direct"}, "Unknown runner|not installed"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepared(source, tokenizer, tmp_path / "set", **changes)
    for sources in ([], [str(source), str(source)]):
        with pytest.raises(ConfigError, match="each source once"):
            prepare_large(sources, tokenizer, tmp_path / "set")
    with pytest.raises(ConfigError, match="named twice"):
        prepare_large([str(source), str(tmp_path)], tokenizer, tmp_path / "set")
    with pytest.raises(ConfigError, match="did you mean 'wiki'"):
        prepare_large(["wikj"], tokenizer, tmp_path / "set")
    with pytest.raises(DataError, match="no text in this split"):
        prepared(source, tokenizer, tmp_path / "set")
    with pytest.raises(DataError, match="no tokenizer here"):
        prepared(source, tmp_path / "none", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_command(tokenizer, tmp_path, capsys):
    write(tmp_path / "a.jsonl", [*documents(40), documents(40)[0]])
    arguments = ["--source", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--split", "all"]
    result = corpus_helpers.run_command(
        *arguments, "--out", tmp_path / "set", "--shards", 2, "--filter", "length=40"
    )
    assert json.loads(json.dumps(result)) == result
    assert result["shards"]["documents"] == 40
    assert "dropped 1: copy" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="held in memory"):
        corpus_helpers.run_command(
            *arguments, "--out", tmp_path / "b", "--dedup", "near", "--max-bytes", 9
        )


def test_places_on_a_disk(tmp_path):
    place = f"{tmp_path}/a/b"
    assert places.read(place) is None
    places.write(place, b"0123456789")
    assert places.read(place) == b"0123456789"
    assert places.read(place, 2, 5) == b"234"
    assert places.sizes(f"{tmp_path}/a") == {"b": 10}
    (tmp_path / "c").write_bytes(b"x")
    places.put(tmp_path / "c", place)
    assert places.read(place) == b"x"
    assert not (tmp_path / "c").exists()
    places.remove(f"{tmp_path}/a")
    assert places.sizes(f"{tmp_path}") == {}

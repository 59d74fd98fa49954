# SPDX-License-Identifier: Apache-2.0
"""Training batches: mixture, hosts, exact resumption; held-out batches: all rows, in order."""

import collections
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from data_helpers import EOS, VOCAB, write

from flexolmo_jax.config import DataConfig, SourceConfig
from flexolmo_jax.data.loader import heldout_batches, row_choice, train_loader
from flexolmo_jax.data.packing import PackedRows
from flexolmo_jax.data.shards import open_shards
from flexolmo_jax.errors import ConfigError, DataError

WEIGHTS = (0.5, 0.3, 0.2)
NEXT = """
import hashlib, json, sys
from flexolmo_jax.config import DataConfig
from flexolmo_jax.typed import from_dict
from flexolmo_jax.data.loader import train_loader
config, state, steps = json.loads(sys.argv[1])
data = from_dict(DataConfig, config)
batches = iter(train_loader(data, tokenizer_digest="sha256:tok", vocab_size=300, seed=7))
batches.set_state(state)
out = []
for _ in range(steps):
    batch = next(batches)
    out.append(hashlib.sha256(b"".join(batch[k].tobytes() for k in sorted(batch))).hexdigest())
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources whose ids do not overlap: source k holds ids 90k to 90k + 89."""
    base = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    for k in range(3):
        documents = [
            np.append(rng.integers(90 * k, 90 * k + 90, rng.integers(1, 40)), EOS)
            for _ in range(60)
        ]
        write(base / str(k), documents, shard_tokens=500)
    return base


def config(folder, **changes):
    sources = tuple(
        SourceConfig(str(folder / str(k)), w, public=k == 0) for k, w in enumerate(WEIGHTS)
    )
    return DataConfig(**{"sources": sources, "seq_len": 8, "batch_rows": 4, **changes})


def loader(data, **changes):
    return train_loader(
        data, **{"tokenizer_digest": "sha256:tok", "vocab_size": VOCAB, "seed": 7, **changes}
    )


def take(batches, steps):
    return [next(batches) for _ in range(steps)]


def fingerprint(batch):
    return hashlib.sha256(b"".join(batch[k].tobytes() for k in sorted(batch))).hexdigest()


def same(a, b):
    return fingerprint(a) == fingerprint(b)


def test_shapes_and_determinism(folder):
    one, two = (take(iter(loader(config(folder))), 5) for _ in range(2))
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert {v.shape for v in one[0].values()} == {(4, 8)}
    assert not same(one[0], next(iter(loader(config(folder), seed=8))))


def test_the_mixture_follows_the_weights(folder):
    batches = take(iter(loader(config(folder))), 500)
    source = np.concatenate([b["tokens"] // 90 for b in batches]).ravel()
    ordinary = source[np.concatenate([b["tokens"] for b in batches]).ravel() != EOS]
    shares = np.bincount(ordinary, minlength=3)[:3] / len(ordinary)
    np.testing.assert_allclose(shares, WEIGHTS, atol=0.02)


def test_own_marks_what_is_not_public(folder):
    for batch in take(iter(loader(config(folder))), 20):
        ordinary = (batch["tokens"] != EOS) & (batch["segments"] > 0)
        np.testing.assert_array_equal(batch["own"][ordinary], batch["tokens"][ordinary] >= 90)


def test_an_epoch_holds_every_row_once_and_the_next_is_shuffled_anew(folder):
    sources = (SourceConfig(str(folder / "1")),)
    data = config(folder, sources=sources, batch_rows=1)
    rows = len(PackedRows(open_shards(folder / "1"), 8))
    batches = iter(loader(data))
    epochs = [[fingerprint(b) for b in take(batches, rows)] for _ in range(2)]
    assert collections.Counter(epochs[0]) == collections.Counter(epochs[1])
    assert len(set(epochs[0])) == rows
    assert epochs[0] != epochs[1]


def test_equal_sources_are_shuffled_differently(folder):
    sources = (SourceConfig(str(folder / "1")), SourceConfig(str(folder / "1")))
    batches = iter(loader(config(folder, sources=sources, batch_rows=2)))
    assert any((b["tokens"][0] != b["tokens"][1]).any() for b in take(batches, 5))


# Broken once by reading row `step * len(held) + i` of the stream: hosts would share rows.
@pytest.mark.parametrize("held", [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0], [1], [2], [3])])
def test_the_global_batch_does_not_depend_on_the_hosts(folder, held):
    data = config(folder)
    whole = take(iter(loader(data)), 6)
    parts = [take(iter(loader(data, held=rows)), 6) for rows in held]
    order = np.argsort(np.concatenate(held))
    for step in range(6):
        for name, value in whole[step].items():
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined[order], value)


def test_the_state_of_one_host_is_that_of_many(folder):
    one = iter(loader(config(folder)))
    half = iter(loader(config(folder), held=[0, 1]))
    take(one, 3), take(half, 3)
    assert one.get_state() == half.get_state()


def test_state_is_small_json_and_exact_in_the_same_process(folder):
    batches = iter(loader(config(folder)))
    take(batches, 3)
    state = batches.get_state()
    assert len(json.dumps(state)) < 200
    expected = take(batches, 4)
    fresh = iter(loader(config(folder)))
    fresh.set_state(state)
    assert all(same(a, b) for a, b in zip(expected, take(fresh, 4), strict=True))


def test_resume_in_a_new_process_from_every_step(folder):
    """One new process per resumption point; the mixture passes the end of an epoch meanwhile."""
    data = config(folder)
    batches = iter(loader(data))
    states, prints = [], []
    for _ in range(140):
        states.append(batches.get_state())
        prints.append(fingerprint(next(batches)))
    smallest = len(PackedRows(open_shards(folder / "0"), 8))
    assert 140 * 4 * WEIGHTS[0] > smallest  # else no epoch would end
    sources = [{"path": s.path, "weight": s.weight, "public": s.public} for s in data.sources]
    plain = {"sources": sources, "seq_len": data.seq_len, "batch_rows": data.batch_rows}
    for step in (1, 64, 130):
        argument = json.dumps([plain, states[step], 10])
        command = [sys.executable, "-c", NEXT, argument]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        assert json.loads(done.stdout) == prints[step : step + 10]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"sources": ()}, {}, "nothing to train on"),
        ({}, {"held": [3, 4]}, "not rows of a batch"),
        ({}, {"held": [1, 1]}, "not rows of a batch"),
        ({}, {"held": []}, "not rows of a batch"),
    ],
)
def test_impossible_configs(folder, changes, arguments, message):
    with pytest.raises(ConfigError, match=message):
        loader(config(folder, **changes), **arguments)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_must_be_positive(folder, weight):
    sources = (SourceConfig(str(folder / "0"), weight),)
    with pytest.raises(ConfigError, match=r"sources\[0\]\.weight"):
        loader(config(folder, sources=sources))


def test_bad_shards_are_refused_before_the_first_step(folder):
    with pytest.raises(DataError, match="another tokenizer"):
        loader(config(folder), tokenizer_digest="sha256:other")


# --- held-out


def test_heldout_covers_everything_once(folder):
    shards = open_shards(folder / "0")
    batches = list(heldout_batches(folder / "0", 5, seq_len=8))
    again = list(heldout_batches(shards, 5, seq_len=8))
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    assert {b["tokens"].shape for b in batches} == {(5, 8)}
    joined = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    real = joined["segments"] > 0
    stream = shards.tokens(0, shards.n_tokens)
    read = joined["tokens"][real]
    np.testing.assert_array_equal(read, stream[: len(read)])
    assert len(stream) - len(read) <= 1  # the last token may be a target alone
    assert joined["loss_mask"].sum() == shards.n_tokens - shards.n_documents
    assert not joined["segments"][len(PackedRows(shards, 8)) :].any()


@pytest.mark.parametrize("spread", [True, False])
def test_a_subset_of_rows(folder, spread):
    every = np.concatenate([b["tokens"] for b in heldout_batches(folder / "0", 4, seq_len=8)])
    total = len(PackedRows(open_shards(folder / "0"), 8))
    batches = list(heldout_batches(folder / "0", 4, seq_len=8, n_rows=6, spread=spread))
    some = np.concatenate([b["tokens"] for b in batches])
    chosen = row_choice(total, 6, spread=spread)
    assert chosen.tolist() == ([i * total // 6 for i in range(6)] if spread else list(range(6)))
    np.testing.assert_array_equal(some[:6], every[chosen])
    assert len(batches) == 2
    assert not batches[1]["loss_mask"][2:].any()


def test_row_choice():
    assert row_choice(5, 0).tolist() == [0, 1, 2, 3, 4]
    assert row_choice(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert row_choice(10, 3).tolist() == [0, 3, 6]
    with pytest.raises(ConfigError):
        heldout_batches("anywhere", 0, seq_len=8)

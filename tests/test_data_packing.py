# SPDX-License-Identifier: Apache-2.0
"""Packed rows: each token but a first one predicted once, segments exact, nothing lost."""

import numpy as np
import pytest
from data_helpers import EOS, make_documents, write
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.packing import PackedRows, padding_row, stack
from flexolmo_jax.data.shards import ShardSet, open_shards
from flexolmo_jax.errors import ConfigError


class InMemory:
    """A stream reader over an array."""

    def __init__(self, stream):
        self.stream = stream

    def read(self, starts, start, stop):
        return self.stream[start:stop]


def shard_set(lengths, path):
    lengths = np.asarray(lengths, np.int64)
    # Every token is unlike every other, so that a row shows where it was cut.
    stream = np.arange(lengths.sum(), dtype=np.int32) + 1000
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return ShardSet(path, {"eos_id": EOS}, lengths, starts, InMemory(stream))


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(2, 25), min_size=1, max_size=12), seq_len=st.integers(1, 30))
def test_every_token_but_the_first_of_a_document_is_predicted_once(
    tmp_path_factory, lengths, seq_len
):
    shards = shard_set(lengths, tmp_path_factory.getbasetemp())
    rows = PackedRows(shards, seq_len)
    predicted = [rows[i]["targets"][rows[i]["loss_mask"]] for i in range(len(rows))]
    everything = set(range(1000, 1000 + shards.n_tokens))
    firsts = {1000 + int(s) for s in shards.starts[:-1]}
    found = np.concatenate(predicted).tolist()
    assert sorted(found) == sorted(everything - firsts)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(2, 25), min_size=1, max_size=12), seq_len=st.integers(1, 30))
def test_segments_against_a_loop(tmp_path_factory, lengths, seq_len):
    shards = shard_set(lengths, tmp_path_factory.getbasetemp())
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for number, row in enumerate(
        PackedRows(shards, seq_len)[i] for i in range(len(PackedRows(shards, seq_len)))
    ):
        begin = number * seq_len
        for t in range(seq_len):
            inside = begin + t < len(owner)
            expected = owner[begin + t] - owner[begin] + 1 if inside else 0
            assert row["segments"][t] == expected
            has_target = begin + t + 1 < len(owner)
            same = has_target and owner[begin + t] == owner[begin + t + 1]
            assert row["loss_mask"][t] == same
            assert row["tokens"][t] == (1000 + begin + t if inside else EOS)
            assert row["targets"][t] == (1001 + begin + t if has_target else EOS)


def test_a_row_by_hand(tmp_path):
    row = PackedRows(shard_set([3, 2, 4], tmp_path), 6)[0]
    assert row["tokens"].tolist() == [1000, 1001, 1002, 1003, 1004, 1005]
    assert row["targets"].tolist() == [1001, 1002, 1003, 1004, 1005, 1006]
    assert row["segments"].tolist() == [1, 1, 1, 2, 2, 3]
    assert row["loss_mask"].tolist() == [True, True, False, True, False, True]
    last = PackedRows(shard_set([3, 2, 4], tmp_path), 6)[1]
    assert last["segments"].tolist() == [1, 1, 1, 0, 0, 0]
    assert last["loss_mask"].tolist() == [True, True, False, False, False, False]
    assert last["own"].tolist() == [True, True, True, False, False, False]


def test_types_and_shapes(tmp_path):
    write(tmp_path / "set", make_documents())
    row = PackedRows(open_shards(tmp_path / "set"), 16)[3]
    kinds = {name: (value.dtype.name, value.shape) for name, value in row.items()}
    assert kinds == {
        "tokens": ("int32", (16,)),
        "targets": ("int32", (16,)),
        "segments": ("int32", (16,)),
        "loss_mask": ("bool", (16,)),
        "own": ("bool", (16,)),
    }


def test_without_document_mask_only_the_segments_change(tmp_path):
    shards = shard_set([3, 2, 4], tmp_path)
    for i in range(2):
        masked = PackedRows(shards, 6)[i]
        plain = PackedRows(shards, 6, document_mask=False)[i]
        assert plain.pop("segments").tolist() == (masked.pop("segments") > 0).tolist()
        for name in masked:
            np.testing.assert_array_equal(plain[name], masked[name])


def test_public_text_is_not_own(tmp_path):
    shards = shard_set([9], tmp_path)
    assert not PackedRows(shards, 4, public=True)[0]["own"].any()
    assert PackedRows(shards, 4, public=False)[0]["own"].all()


def test_limits(tmp_path):
    rows = PackedRows(shard_set([3, 2, 4], tmp_path), 4)
    assert len(rows) == 2  # eight predictions, boundaries included
    for index in (-1, 2):
        with pytest.raises(IndexError):
            rows[index]
    with pytest.raises(ConfigError):
        PackedRows(shard_set([3], tmp_path), 0)


def test_padding_row_and_stack(tmp_path):
    row = PackedRows(shard_set([9], tmp_path), 4)[0]
    batch = stack([row, padding_row(4, EOS)])
    assert {v.shape for v in batch.values()} == {(2, 4)}
    assert not batch["segments"][1].any()
    assert not batch["loss_mask"][1].any()
    assert {k: v.dtype for k, v in batch.items()} == {k: v.dtype for k, v in row.items()}

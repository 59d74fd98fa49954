# SPDX-License-Identifier: Apache-2.0
"""Batches: an endless seeded mixture to train on, and a fixed pass over text to test on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import SupportsIndex

import grain
import numpy as np

from flexolmo_jax.config import DataConfig
from flexolmo_jax.data.packing import PackedRows, Row, padding_row, stack
from flexolmo_jax.data.shards import ShardSet, open_shards
from flexolmo_jax.errors import ConfigError

_ENDLESS_ROWS = 1 << 40


def train_loader(
    data: DataConfig,
    *,
    tokenizer_digest: str,
    vocab_size: int,
    seed: int,
    held: Sequence[int] | None = None,
    verify: bool = True,
) -> grain.IterDataset[Row]:
    """Endless batches of rows, [len(held), T] each.

    Every source is reshuffled each epoch; sources are mixed by weight. Each row has its place in
    the global batch of its step whoever reads it, so the order of the data does not depend on the
    number of hosts. The iterator's `get_state` is a small JSON value that `set_state` takes up
    exactly, in any process with the same arguments, whatever rows that one holds.

    Args:
      held: which rows of each global batch this host reads, ascending; None is all.

    Raises:
      ConfigError: no sources, a weight that is not positive, or rows that no batch has.
      DataError: a source that must not be trained on (see `open_shards`).
    """
    held = list(range(data.batch_rows) if held is None else map(int, held))
    _check(data, held)
    datasets = []
    for number, source in enumerate(data.sources):
        shards = open_shards(
            source.path, tokenizer_digest=tokenizer_digest, vocab_size=vocab_size, verify=verify
        )
        rows = PackedRows(
            shards, data.seq_len, document_mask=data.document_mask, public=source.public
        )
        # Each source gets a seed of its own, or equally long sources would be shuffled alike.
        source_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        # Endless for all purposes; a literal "forever" overflows the length of the mixture.
        epochs = -(-_ENDLESS_ROWS // len(rows))
        datasets.append(grain.MapDataset.source(rows).seed(source_seed).shuffle().repeat(epochs))
    mixed = grain.MapDataset.mix(datasets, weights=[s.weight for s in data.sources])
    mine = grain.MapDataset.source(_HeldRows(mixed, data.batch_rows, held))
    return mine.batch(len(held)).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    )


class _HeldRows:
    """The rows of an endless stream that one host holds, step after step."""

    def __init__(self, stream: grain.MapDataset[Row], batch_rows: int, held: list[int]):
        self._stream, self._batch_rows, self._held = stream, batch_rows, held

    def __len__(self) -> int:
        return len(self._stream) // self._batch_rows * len(self._held)

    def __repr__(self) -> str:
        return f"_HeldRows({len(self._held)} of {self._batch_rows})"

    def __getitem__(self, index: SupportsIndex) -> Row:
        step, number = divmod(index.__index__(), len(self._held))
        row = self._stream[step * self._batch_rows + self._held[number]]
        assert row is not None  # nothing is filtered out of this stream
        return row


def _check(data: DataConfig, held: list[int]) -> None:
    if not data.sources:
        raise ConfigError("There is nothing to train on", where="DataConfig.sources")
    for number, source in enumerate(data.sources):
        if not 0 < source.weight < float("inf"):
            raise ConfigError(
                "A weight must be positive",
                got=source.weight,
                where=f"DataConfig.sources[{number}].weight",
            )
    if not held or held != sorted({i for i in held if 0 <= i < data.batch_rows}):
        raise ConfigError(
            "These are not rows of a batch",
            got=held,
            expected=f"some of 0..{data.batch_rows - 1}, each once and ascending",
            where="held",
        )


def heldout_batches(
    shards: ShardSet | Path | str,
    rows: int,
    *,
    seq_len: int,
    n_rows: int = 0,
    spread: bool = True,
    document_mask: bool = True,
    public: bool = False,
    tokenizer_digest: str | None = None,
    vocab_size: int | None = None,
    verify: bool = True,
) -> Iterator[Row]:
    """Batches [rows, T] over held-out text in stored order; the last is filled up with padding.

    Args:
      shards: an opened set, or a directory to open (the last three arguments are for this).
      rows: rows per batch.
      n_rows: take only this many rows; 0 takes all.
      spread: take them evenly spaced over the whole text instead of from its start.

    Raises:
      ConfigError: rows below one.
      DataError: text that must not be read (see `open_shards`).
    """
    if rows <= 0 or n_rows < 0:
        raise ConfigError("rows must be positive", got=f"rows={rows}, n_rows={n_rows}")
    if not isinstance(shards, ShardSet):
        shards = open_shards(
            shards, tokenizer_digest=tokenizer_digest, vocab_size=vocab_size, verify=verify
        )
    packed = PackedRows(shards, seq_len, document_mask=document_mask, public=public)
    chosen = row_choice(len(packed), n_rows, spread=spread)
    filler = padding_row(seq_len, int(shards.info["eos_id"]))
    return _in_order(packed, chosen, rows, filler)


def _in_order(packed: PackedRows, chosen: np.ndarray, rows: int, filler: Row) -> Iterator[Row]:
    for begin in range(0, len(chosen), rows):
        batch = [packed[int(i)] for i in chosen[begin : begin + rows]]
        yield stack(batch + [filler] * (rows - len(batch)))


def row_choice(available: int, n_rows: int, *, spread: bool = True) -> np.ndarray:
    """Numbers of the rows to take: all, the first `n_rows`, or `n_rows` evenly spaced ones."""
    if n_rows == 0 or n_rows >= available:
        return np.arange(available)
    if not spread:
        return np.arange(n_rows)
    return np.arange(n_rows) * available // n_rows

# SPDX-License-Identifier: Apache-2.0
"""Documents packed into rows of equal length, any row by its number."""

from typing import SupportsIndex

import numpy as np

from flexolmo_jax.data.shards import ShardSet
from flexolmo_jax.errors import ConfigError

Row = dict[str, np.ndarray]


class PackedRows:
    """Rows of a token stream, as a Grain random-access source.

    Row i reads stream tokens [i*T, i*T + T) and predicts [i*T + 1, i*T + T + 1), T = `seq_len`:
    rows share one token, so every token but the first of each document is predicted exactly once.
    The last row is padded with the end-of-document id in segment 0.

    Args:
      shards: the documents, in the order in which they were prepared.
      seq_len: tokens per row.
      document_mask: number the documents inside a row as segments 1, 2, …; otherwise the whole
        row is segment 1. The loss never crosses from one document into the next in either case.
      public: whether the text is public; `own` marks the tokens of text that is not.

    Shapes of a row: tokens, targets, segments int32[T]; loss_mask, own bool[T].
    """

    def __init__(
        self, shards: ShardSet, seq_len: int, *, document_mask: bool = True, public: bool = False
    ):
        if seq_len <= 0:
            raise ConfigError("seq_len must be positive", got=seq_len)
        self._shards, self._seq_len = shards, seq_len
        self._document_mask, self._own = document_mask, not public
        self._pad_id = int(shards.info["eos_id"])

    def __len__(self) -> int:
        return (self._shards.n_tokens - 2) // self._seq_len + 1

    def __repr__(self) -> str:
        # Grain puts this into messages and into the description of a pipeline.
        return f"PackedRows({self._shards.path.name}, rows={len(self)}, seq_len={self._seq_len})"

    def __getitem__(self, index: SupportsIndex) -> Row:
        row = index.__index__()
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        seq_len, starts = self._seq_len, self._shards.starts
        begin = row * seq_len
        end = min(begin + seq_len + 1, self._shards.n_tokens)
        stream = np.full(seq_len + 1, self._pad_id, np.int32)
        stream[: end - begin] = self._shards.tokens(begin, end)
        numbers = self._numbers(starts, begin, end)
        segments = numbers[:-1]
        loss_mask = (segments == numbers[1:]) & (segments > 0)
        if not self._document_mask:
            segments = np.minimum(segments, 1)
        return {
            "tokens": stream[:-1],
            "targets": stream[1:],
            "segments": segments,
            "loss_mask": loss_mask,
            "own": np.full(seq_len, self._own) & (segments > 0),
        }

    def _numbers(self, starts: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Which document of the row each of its T + 1 tokens is in, from 1; padding is 0."""
        first, last = np.searchsorted(starts[:-1], (begin + 1, end), side="left")
        steps = np.zeros(self._seq_len + 1, np.int32)
        steps[0] = 1
        steps[starts[first:last] - begin] = 1
        numbers = np.cumsum(steps, dtype=np.int32)
        numbers[end - begin :] = 0
        return numbers


def padding_row(seq_len: int, pad_id: int) -> Row:
    """A row of padding alone, which no metric counts."""
    return {
        "tokens": np.full(seq_len, pad_id, np.int32),
        "targets": np.full(seq_len, pad_id, np.int32),
        "segments": np.zeros(seq_len, np.int32),
        "loss_mask": np.zeros(seq_len, bool),
        "own": np.zeros(seq_len, bool),
    }


def stack(rows: list[Row]) -> Row:
    """Rows as one batch, [B, T]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

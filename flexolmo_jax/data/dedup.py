# SPDX-License-Identifier: Apache-2.0
"""Which documents go because another one says the same: equal letters, or a near sketch.

A document is lost to one that ranks before it: held-out text before tuning text before training
text, then the smaller id. Whether the one before it stays does not matter. So the outcome depends
on the set of documents alone, not on files, order, workers or bundles, and whatever is (near)
held-out text is not in training text, even when that held-out text was itself lost to another.

Rows are packed arrays cut by their leading hash, so that each cut can be judged by itself.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from flexolmo_jax.data.sketch import BANDS, HASHES, LEAST_EQUAL

# Why a document went, the reason that is reported first when several hold.
REASONS = ("copy of held-out text", "near held-out text", "copy", "near copy")
COPY_OF_HELDOUT, NEAR_HELDOUT, COPY, NEAR_COPY = range(4)

_U8 = "<u8"
ID = [("hi", _U8), ("lo", _U8), ("part", "u1")]
EXACT = np.dtype([("key", _U8), ("key_lo", _U8), *ID])
NEAR = np.dtype([("key", _U8), ("values", "u1", (HASHES,)), *ID])
LOSER = np.dtype([*ID, ("reason", "u1")])

# In a bucket of more distinct documents each is compared with the first so many, which are the
# held-out ones as far as there are any; boilerplate would otherwise cost the square of its number.
_HEADS = 1024
_BLOCK = 128


def share_of(values: np.ndarray, n: int) -> np.ndarray:
    """The one of `n` equal ranges of 64-bit hashes that each falls into, int64; never falling."""
    return (((values >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def cut(rows: np.ndarray, field: str, n: int) -> Iterator[tuple[int, bytes]]:
    """Packed rows of each of `n` ranges of a hash that has any."""
    if not len(rows):
        return
    shares = share_of(rows[field], n)
    order = np.argsort(shares, kind="stable")
    rows, shares = rows[order], shares[order]
    starts = np.flatnonzero(np.r_[True, shares[1:] != shares[:-1]])
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield int(shares[start]), rows[start:stop].tobytes()


def near_rows(ids: np.ndarray, bands: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One row per document and band."""
    rows = np.empty((len(ids), BANDS), NEAR)
    rows["key"], rows["values"] = bands, values[:, None, :]
    for field, _ in ID:
        rows[field] = ids[field][:, None]
    return rows.reshape(-1)


def unpacked(packed: Iterable[bytes], dtype: np.dtype) -> np.ndarray:
    """Rows of any number of pieces."""
    return np.frombuffer(b"".join(packed), dtype)


def _new(rows: np.ndarray, *fields: str) -> np.ndarray:
    """Whether each row differs from the one before it."""
    change = np.zeros(len(rows), bool)
    change[:1] = True
    for field in fields:
        change[1:] |= rows[field][1:] != rows[field][:-1]
    return change


def exact_losers(rows: np.ndarray) -> np.ndarray:
    """Documents with the key of one that ranks before them; copies to the letter are one."""
    order = np.lexsort((rows["lo"], rows["hi"], rows["part"], rows["key_lo"], rows["key"]))
    rows = rows[order]
    rows = rows[_new(rows, "key", "key_lo", "part", "hi", "lo")]
    first = _new(rows, "key", "key_lo")
    winner = np.flatnonzero(first)[np.cumsum(first) - 1]
    outside = rows["part"] > rows["part"][winner]
    return _losers(rows, ~first, np.where(outside, COPY_OF_HELDOUT, COPY))


def _losers(rows: np.ndarray, lost: np.ndarray, reasons: np.ndarray) -> np.ndarray:
    out = np.empty(int(lost.sum()), LOSER)
    for field, _ in ID:
        out[field] = rows[field][lost]
    out["reason"] = reasons[lost]
    return out


def near_losers(rows: np.ndarray) -> np.ndarray:
    """Documents near one of the same bucket that ranks before them."""
    order = np.lexsort((rows["lo"], rows["hi"], rows["part"], rows["key"]))
    rows = rows[order]
    rows = rows[_new(rows, "key", "part", "hi", "lo")]
    starts = np.flatnonzero(_new(rows, "key"))
    stops = np.append(starts[1:], len(rows))
    found = [
        _lost_in_bucket(rows[a:b])
        for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
        if b - a > 1
    ]
    return np.concatenate([np.empty(0, LOSER), *found])


def _lost_in_bucket(rows: np.ndarray) -> np.ndarray:
    heads = rows[:_HEADS]
    lost = np.zeros(len(rows), bool)
    reasons = np.zeros(len(rows), np.uint8)
    least = int(np.ceil(LEAST_EQUAL * HASHES))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        equal = (block["values"][:, None] == heads["values"][None]).sum(axis=2)
        before = np.arange(len(heads)) < np.arange(start, start + len(block))[:, None]
        near = (equal >= least) & before
        winner = near.argmax(axis=1)
        lost[start : start + len(block)] = near.any(axis=1)
        # Rows are in order of rank: if any winner is outside of the split, the first one is.
        outside = block["part"] > heads["part"][winner]
        reasons[start : start + len(block)] = np.where(outside, NEAR_HELDOUT, NEAR_COPY)
    return _losers(rows, lost, reasons)


def merged(losers: np.ndarray) -> dict[tuple[int, int, int], int]:
    """Id and split to the reason that is reported."""
    out: dict[tuple[int, int, int], int] = {}
    for hi, lo, part, reason in losers.tolist():
        key = (hi, lo, part)
        out[key] = min(reason, out.get(key, reason))
    return out

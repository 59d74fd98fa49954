# SPDX-License-Identifier: Apache-2.0
"""What texts are compared by: an id, which also orders them, and a MinHash sketch."""

import hashlib
import re
import zlib

import numpy as np

# Two texts are near when the sets of their runs of `RUN` words overlap by about `NEAR` (Jaccard).
# Only texts that share one of `BANDS` bands of `HASHES / BANDS` minima are compared: at an overlap
# of 0.5, 0.6, 0.7, 0.8 and 0.9 with a chance of 47, 80, 97.5, 99.96 and 100 %.
RUN, HASHES, BANDS, NEAR = 5, 100, 20, 0.7
# One byte of each minimum is kept to compare by; two that differ agree in it once in 256 times.
LEAST_EQUAL = NEAR + (1 - NEAR) / 256

# Scripts written without blanks count by the character.
_ONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORDS = re.compile(f"[{_ONE}]|[^\\W_{_ONE}]+")
_BLOCK = 4096


def _constants(name: str, count: int) -> np.ndarray:
    """Fixed odd numbers of 64 bits; a hash of text, as generators may change between versions."""
    digests = (hashlib.sha256(f"{name}:{i}".encode()).digest()[:8] for i in range(count))
    return np.array([int.from_bytes(d, "little") | 1 for d in digests], np.uint64)


_FACTORS, _OFFSETS = _constants("factor", HASHES), _constants("offset", HASHES)
_RUN_FACTORS = _constants("run", RUN)
_BAND_FACTORS = _constants("band", HASHES).reshape(BANDS, -1)


def text_id(text: str, seed: int) -> tuple[int, int]:
    """128 bits by which documents are named, ordered and given to shards.

    Equal texts have equal ids, so their order decides nothing.
    """
    digest = hashlib.sha256(f"{seed}:".encode() + text.encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def words(text: str) -> list[str]:
    """Words in small letters, without blanks and marks."""
    return _WORDS.findall(text.casefold())


def _mixed(x: np.ndarray) -> np.ndarray:
    """Spreads every bit over all: products alone leave the low bits poor."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(32))


def minhash(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Sketch of the set of runs of words, blind to case, blanks and marks.

    Shapes: hashes of the bands uint64[BANDS], one byte per minimum uint8[HASHES].
    """
    found = words(text) or [text]
    codes = np.fromiter((zlib.crc32(w.encode()) for w in found), np.uint64, len(found))
    length = min(RUN, len(codes))
    count = len(codes) - length + 1
    runs = np.zeros(count, np.uint64)
    for i in range(length):
        runs += codes[i : i + count] * _RUN_FACTORS[i]
    runs = _mixed(runs)
    least = np.full(HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, count, _BLOCK):
        block = runs[None, start : start + _BLOCK] * _FACTORS[:, None] + _OFFSETS[:, None]
        least = np.minimum(least, block.min(axis=1))
    least = _mixed(least)
    bands = _mixed((least.reshape(BANDS, -1) * _BAND_FACTORS).sum(axis=1, dtype=np.uint64))
    return bands, (least >> np.uint64(56)).astype(np.uint8)

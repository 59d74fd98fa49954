# SPDX-License-Identifier: Apache-2.0
"""Random damage to a directory, undone afterwards: what storage and strangers do to files."""

import contextlib
from pathlib import Path

KINDS = ("flip", "truncate", "delete", "append", "extra", "swap")


@contextlib.contextmanager
def damaged(folder: Path, rng, kind=None):
    """Damages one or two files of `folder` and yields the relative paths that a check may name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    kind = kind or rng.choice(KINDS)
    target = files[rng.integers(len(files))]
    before = target.read_bytes()
    touched = {target: before}
    if kind == "flip":
        data = bytearray(before)
        bit = int(rng.integers(8 * len(data)))
        data[bit // 8] ^= 1 << (bit % 8)
        target.write_bytes(data)
    elif kind == "truncate":
        target.write_bytes(before[: int(rng.integers(len(before)))])
    elif kind == "delete":
        target.unlink()
    elif kind == "append":
        target.write_bytes(
            before + bytes(rng.integers(256, size=1 + int(rng.integers(40)), dtype="u1"))
        )
    elif kind == "extra":
        target = target.with_name(f"x{int(rng.integers(1000))}")
        touched = {target: None}
        target.write_bytes(b"more")
    else:
        others = [p for p in files if p.read_bytes() != before]
        other = others[rng.integers(len(others))]
        touched[other] = other.read_bytes()
        target.write_bytes(touched[other])
        other.write_bytes(before)
    try:
        yield kind, {str(p.relative_to(folder)) for p in touched}
    finally:
        for path, content in touched.items():
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)

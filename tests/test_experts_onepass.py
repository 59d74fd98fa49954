# SPDX-License-Identifier: Apache-2.0
"""Every byte once.

Broken once each: a second read per file, the last block lost, the leaf's digest not compared, only
positive infinities found, an interrupt that waits for the rest.
"""

import builtins
import hashlib
import os
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from expert_helpers import CONFIG, make_anchor, make_slice, peak_memory

from flexolmo_jax import tree as trees
from flexolmo_jax.experts import leafio, onepass, stitch
from flexolmo_jax.experts.verify import verify


def sha(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def leaf_item(folder, array, name="w", target=None, **entry: Any):
    path = folder / name
    path.write_bytes(np.ascontiguousarray(array).tobytes())
    told = {"shape": list(array.shape), "dtype": array.dtype.name} | entry
    told = {"digest": trees.leaf_digest(array)} | told
    return onepass.Item(path, sha(path.read_bytes()), name, told, "tree", target)


@pytest.fixture(params=[16, 1 << 20])
def block(request, monkeypatch):
    monkeypatch.setattr(onepass, "BLOCK", request.param)
    return request.param


def test_files_of_any_size_are_copied_and_judged(tmp_path, block):
    rng = np.random.default_rng(0)
    items = []
    for size in [0, 1, 15, 16, 17, 31, 32, 33, 500, *rng.integers(0, 300, 20)]:
        path = tmp_path / f"f{len(items)}"
        path.write_bytes(rng.bytes(int(size)))
        target = tmp_path / "out" / path.name / "x"
        items.append(onepass.Item(path, sha(path.read_bytes()), target=target))
    for dtype in ("float32", "bfloat16"):
        for shape in ((), (3,), (4, 5), (0, 2), (2, 3, 7)):
            array = rng.standard_normal(shape).astype(jnp.dtype(dtype))
            name = f"l{len(items)}"
            items.append(leaf_item(tmp_path, array, name, tmp_path / "out" / name))
    seen = []
    judged = onepass.judge(items, lambda done, total: seen.append((done, total)))
    assert judged.problems == []
    for item in items:
        assert item.target.read_bytes() == item.path.read_bytes()
    total = sum(item.path.stat().st_size for item in items)
    assert judged.size == total and seen[-1] == (total, total) and seen == sorted(seen)


def test_each_file_is_opened_and_read_once(tmp_path, monkeypatch):
    anchor = make_anchor(tmp_path / "anchor")
    piece = make_slice(tmp_path / "s", anchor, "a")
    plan = stitch.plan(anchor.path, [piece.path])
    opened, original = [], builtins.open

    def spy(path, mode="r", *args, **kwargs):
        if "b" in mode and "r" in mode:
            opened.append(str(path))
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    result = stitch.execute(plan, tmp_path / "m")
    assert len(opened) == len(set(opened)) > 20
    assert result["bytes_checked"] == sum(os.path.getsize(path) for path in opened)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_found_anywhere(tmp_path, block, dtype, value):
    array = np.linspace(-3e38, 3e38, 60).astype(jnp.dtype(dtype)).reshape(3, 4, 5)
    assert onepass.judge([leaf_item(tmp_path, array)]).problems == []
    for at in range(0, 60, 7):
        bad = array.copy()
        bad.reshape(-1)[at] = value
        (found,) = onepass.judge([leaf_item(tmp_path, bad)]).problems
        assert (found.code, found.path, found.leaf) == ("not-finite", "tree", "w")


def test_all_finite_by_bits_is_numpy_s_word():
    rng = np.random.default_rng(1)
    for bits, dtype in ((np.uint16, jnp.bfloat16), (np.uint32, np.float32)):
        for count in (0, 1, 3):
            for _ in range(300):
                raw = rng.integers(0, np.iinfo(bits).max, count, dtype=bits, endpoint=True)
                raw |= rng.choice([0, 0x7F80 << (8 * raw.itemsize - 16)]).astype(bits)
                array = raw.view(dtype)
                with np.errstate(invalid="ignore"):  # Signalling NaNs signal.
                    wanted = bool(np.isfinite(array).all())
                assert leafio.all_finite(array) == wanted


def test_every_lie_is_named(tmp_path, block):
    array = np.arange(12, dtype=np.float32)
    (tmp_path / "dir").mkdir()
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    other = sha(b"other")
    lies = {
        "file-digest": onepass.Item(tmp_path / "real", other),
        "leaf-digest": leaf_item(tmp_path, array, "a", digest=other),
        "file-size": leaf_item(tmp_path, array, "b", shape=[11]),
        "file-missing": onepass.Item(tmp_path / "none", other),
        "symlink": onepass.Item(tmp_path / "link", sha(b"x")),
        "not-a-file": onepass.Item(tmp_path / "pipe", sha(b"")),
    }
    for code, item in lies.items():
        (found,) = onepass.judge([item]).problems
        assert found.code == code
    together = [*lies.values(), leaf_item(tmp_path, array, "c")]
    assert [p.code for p in onepass.judge(together).problems] == list(lies)
    # Same bytes under another header: a leaf is also its dtype and shape.
    for shape, dtype in (([3, 4], "float32"), ([24], "bfloat16")):
        item = leaf_item(tmp_path, array, shape=shape, dtype=dtype)
        assert [p.code for p in onepass.judge([item]).problems] == ["leaf-digest"]


def test_a_fault_ends_the_pass_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(onepass, "BLOCK", 16)
    monkeypatch.setattr(onepass, "workers", lambda: 2)
    items = []
    for i in range(50):
        (tmp_path / f"{i}").write_bytes(bytes(1600))
        items.append(onepass.Item(tmp_path / f"{i}", sha(bytes(1600))))
    done = []

    def note(now, total):
        done.append(now)
        if len(done) == 150:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        onepass.judge(items, note)
    assert done[-1] < 50 * 1600 / 2
    assert threading.active_count() == before


def test_memory_does_not_grow_with_the_leaves(tmp_path):
    """Leaves of 64 MiB; what a pass holds is a block per thread."""
    config = CONFIG.replace(d_model=512, d_ffn=8192, n_layers=4)
    anchor = make_anchor(tmp_path / "anchor", config=config)
    piece = make_slice(tmp_path / "a", anchor, "a")
    largest = max(p.stat().st_size for p in piece.path.rglob("*") if p.is_file())
    assert largest == 64 << 20
    plan = stitch.plan(anchor.path, [piece.path])
    steps = {
        "copy": lambda: stitch.execute(plan, tmp_path / "m"),
        "link": lambda: stitch.execute(plan, tmp_path / "l", link=True),
        "verify": lambda: verify(tmp_path / "m"),
        "unstitch": lambda: stitch.unstitch(tmp_path / "m", "a", tmp_path / "u"),
    }
    verify(anchor.path)  # imports and threads
    for name, step in steps.items():
        with peak_memory() as grown:
            step()
        assert grown[0] < 8 * onepass.BLOCK + onepass.workers() * onepass.BLOCK, name

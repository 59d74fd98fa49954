# SPDX-License-Identifier: Apache-2.0
import gc
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_helpers import file_bytes, peak_memory

from flexolmo_jax import checkpoint
from flexolmo_jax import tree as trees
from flexolmo_jax.errors import CheckpointError, RefusedError
from flexolmo_jax.experts import leafio
from flexolmo_jax.files import hash_files, list_files

P = jax.sharding.PartitionSpec
RNG = np.random.default_rng(0)


def normal(*shape, dtype="float32"):
    return RNG.standard_normal(shape).astype(jnp.dtype(dtype))


TREES = {
    "one": {"bias": normal(3)},
    "scalar": {"a": normal(), "b": normal(1)},
    "nested": {
        "layers": {"attention": {"w_q": normal(2, 3, 4, 5)}, "ffn_norm": normal(2, 3)},
        "embed": {"embedding": normal(7, 3, dtype="bfloat16")},
        "final_norm": normal(3, dtype="bfloat16"),
    },
    # In Orbax's metadata a nested name stands by its parts, not by its text.
    "order": {"a": {"b": normal(1)}, "a-b": normal(1), "a0": normal(2), "B": normal(2)},
    "views": {"t": normal(4, 3).T, "slot": normal(2, 3, 4)[:, 1], "back": normal(5)[::-1]},
    "device": {"x": jnp.arange(12.0).reshape(3, 4), "half": jnp.ones((2, 2), jnp.bfloat16)},
    "zeros": {"z": np.zeros((4, 4), np.float32), "minus": -np.zeros(3, np.float32)},
}


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("block", [8, leafio.BLOCK])
def test_a_written_tree_is_what_orbax_writes_byte_for_byte(tmp_path, monkeypatch, kind, block):
    monkeypatch.setattr(leafio, "BLOCK", block)
    tree = TREES[kind]
    checkpoint.save_tree(tmp_path / "orbax", tree)
    table, files = leafio.write_tree(tmp_path / "ours", leafio.leaves_of(tree))
    assert file_bytes(tmp_path / "ours") == file_bytes(tmp_path / "orbax")
    assert files == hash_files(tmp_path / "orbax", list_files(tmp_path / "orbax")[0])
    assert {n: e["digest"] for n, e in table.items()} == trees.digests(tree)
    assert list(table) == sorted(trees.flatten(tree))
    for name, leaf in trees.flatten(tree).items():
        assert (table[name]["shape"], table[name]["dtype"]) == (list(leaf.shape), leaf.dtype.name)


def test_leaves_are_written_from_pieces_of_any_size(tmp_path):
    whole = normal(6, 5, 4)
    for cuts in ([0, 6], [0, 1, 6], range(7)):
        pairs = list(zip(cuts, list(cuts)[1:], strict=False))
        leaf = leafio.Leaf(whole.shape, whole.dtype, lambda p=pairs: (whole[a:b] for a, b in p))
        folder = tmp_path / str(len(pairs))
        table, _ = leafio.write_tree(folder, {"x": leaf})
        assert table["x"]["digest"] == trees.leaf_digest(whole)
        assert np.array_equal(leafio.read_leaf(folder, "x", table["x"]), whole)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([normal(3)], "ended too early"),
        ([normal(3), normal(2)], "does not fit"),
        ([normal(4, dtype="bfloat16")], "does not fit"),
    ],
)
def test_blocks_that_are_not_the_leaf_are_refused(tmp_path, blocks, message):
    leaf = leafio.Leaf((4,), np.dtype("float32"), lambda: iter(blocks))
    with pytest.raises(CheckpointError, match=message):
        leafio.write_tree(tmp_path / "t", {"x": leaf})


@pytest.mark.parametrize("block", [8, leafio.BLOCK])
def test_values_that_are_not_finite_are_named_together(tmp_path, monkeypatch, block):
    monkeypatch.setattr(leafio, "BLOCK", block)
    bad = {}
    for dtype in ("float32", "bfloat16"):
        for value in (np.nan, np.inf, -np.inf):
            bad[f"{dtype}_{len(bad)}"] = normal(3, 3, dtype=dtype)
            bad[f"{dtype}_{len(bad) - 1}"][2, 1] = value
    largest = jnp.full((2, 2), jnp.finfo(jnp.bfloat16).max, jnp.bfloat16)
    with pytest.raises(RefusedError) as error:
        leafio.write_tree(tmp_path / "t", leafio.leaves_of({**bad, "fine": largest}), "here")
    assert {(p.code, p.path) for p in error.value.problems} == {("not-finite", "here")}
    assert sorted(p.leaf for p in error.value.problems) == sorted(bad)


def test_other_dtypes_are_not_written(tmp_path):
    tree = {"x": np.ones(2), "y": np.ones(2, np.float32), "z": np.ones(2, np.float16)}
    with pytest.raises(RefusedError) as error:
        leafio.write_tree(tmp_path / "t", leafio.leaves_of(tree))
    assert [(p.code, p.leaf) for p in error.value.problems] == [
        ("leaf-dtype", "x"),
        ("leaf-dtype", "z"),
    ]
    assert not (tmp_path / "t").exists()


def test_rows_are_read_alone(tmp_path):
    tree = {"x": normal(7, 3, 2), "bias": normal(5, dtype="bfloat16")}
    table, _ = leafio.write_tree(tmp_path / "t", leafio.leaves_of(tree))
    for name, leaf in tree.items():
        for start, stop in ((0, 1), (2, 5), (0, len(leaf)), (3, 3)):
            rows = leafio.read_rows(tmp_path / "t", name, table[name], start, stop)
            assert rows.dtype == leaf.dtype and np.array_equal(rows, leaf[start:stop])
    with pytest.raises(CheckpointError, match="too short"):
        leafio.read_rows(tmp_path / "t", "x", table["x"], 5, 8)


@pytest.mark.parametrize("block", [4, 24, 100, leafio.BLOCK])
def test_boxes_are_what_slicing_gives(tmp_path, monkeypatch, block):
    monkeypatch.setattr(leafio, "BLOCK", block)
    tree = {"w": normal(3, 4, 5, 2), "m": normal(6, 3), "v": normal(7), "s": normal()}
    table, _ = leafio.write_tree(tmp_path / "t", leafio.leaves_of(tree))
    rng = np.random.default_rng(1)
    for _ in range(40):
        for name, leaf in tree.items():
            region = tuple(tuple(sorted(rng.integers(0, n + 1, 2))) for n in leaf.shape)
            want = leaf[tuple(slice(*bounds) for bounds in region)]
            assert np.array_equal(
                leafio.read_region(tmp_path / "t", name, table[name], region), want
            )
            out = np.zeros((*want.shape, 2), np.float32)[..., 0]
            leafio.read_region(tmp_path / "t", name, table[name], region, out=out)
            assert np.array_equal(out, want)


def test_writing_holds_a_few_blocks(tmp_path):
    rows, width = 64, 1 << 18

    def blocks():
        for i in range(rows):
            yield np.full((1, width), i, np.float32)

    leaf = leafio.Leaf((rows, width), np.dtype("float32"), blocks)
    leafio.write_tree(tmp_path / "warm", {"x": leafio.Leaf.of(normal(2))})
    gc.collect()
    with peak_memory() as grown:
        table, _ = leafio.write_tree(tmp_path / "t", {"x": leaf})
        digest, finite = leafio.scan(leafio.stored(tmp_path / "t", "x", table["x"]))
    assert leaf.nbytes == 64 << 20
    assert grown[0] < 4 * leafio.BLOCK
    assert finite and digest == table["x"]["digest"]
    file = tmp_path / "t" / leafio.leaf_file("x", leaf.shape)
    values = hashlib.sha256(trees.leaf_header(leaf.dtype, leaf.shape) + file.read_bytes())
    assert digest == "sha256:" + values.hexdigest()

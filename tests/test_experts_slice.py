# SPDX-License-Identifier: Apache-2.0
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import KINDS, damaged
from expert_helpers import CONFIG, file_bytes, leaf_equal, make_anchor, make_slice, slice_tree

from flexolmo_jax import checkpoint
from flexolmo_jax import tree as trees
from flexolmo_jax.errors import CheckpointError, RefusedError
from flexolmo_jax.experts import manifest
from flexolmo_jax.experts import slice as slices


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    return make_anchor(tmp_path_factory.mktemp("a") / "anchor")


def test_slots_are_taken_put_and_stacked_exactly():
    pieces = [slice_tree(s) for s in range(3)]
    group = slices.stack_slices(pieces, 4)
    for slot, piece in enumerate(pieces):
        assert leaf_equal(slices.take_slot(group, slot), piece)
    assert all(not leaf.any() for leaf in jax.tree.leaves(slices.take_slot(group, 3)))
    new = slice_tree(9)
    for kind in (group, jax.tree.map(jnp.asarray, group)):
        put = slices.put_slot(kind, 1, new)
        assert leaf_equal(slices.take_slot(put, 1), new)
        assert leaf_equal(slices.take_slot(put, 2), pieces[2])
    assert leaf_equal(slices.take_slot(group, 1), pieces[1])  # put copies


def test_a_missing_slice_leaves_its_slot_empty():
    group = slices.stack_slices([slice_tree(0), None, slice_tree(2)], 3)
    assert all(not leaf.any() for leaf in jax.tree.leaves(slices.take_slot(group, 1)))
    assert leaf_equal(slices.take_slot(group, 2), slice_tree(2))


def test_slices_that_do_not_fit_are_refused_not_cast():
    half = trees.map_named(lambda _, x: x.astype(np.float16), slice_tree(1))
    short = slice_tree(1, CONFIG.replace(d_ffn=8))
    for other, code in ((half, "leaf-dtype"), (short, "leaf-shape")):
        with pytest.raises(CheckpointError, match=code):
            slices.stack_slices([slice_tree(0), other], 2)
        with pytest.raises(CheckpointError, match=code):
            slices.put_slot(slices.stack_slices([slice_tree(0)], 2), 1, other)
    for wrong in ([], [None], [slice_tree(0)] * 3):
        with pytest.raises(CheckpointError, match="slots"):
            slices.stack_slices(wrong, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slice_comes_back_bit_for_bit(tmp_path, anchor, dtype):
    tree = trees.map_named(lambda _, x: x.astype(jnp.dtype(dtype)), slice_tree(4))
    info = make_slice(tmp_path / "s", anchor, "code", tree=tree)
    again, restored = slices.read_slice(tmp_path / "s")
    assert leaf_equal(restored, tree)
    assert again.digest == info.digest == manifest.manifest_digest(info.manifest)
    assert again.manifest == info.manifest
    plain = checkpoint.restore_tree(info.path / "params", slices.abstract_of(tree))
    assert leaf_equal(plain, tree)  # an ordinary Orbax directory


def test_equal_slices_are_equal_files(tmp_path, anchor):
    for name in ("one", "two"):
        make_slice(tmp_path / name, anchor, "code", seed=5)
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "two")


def test_a_slice_holds_weights_and_manifest_and_no_trace_of_the_machine(tmp_path, anchor):
    info = make_slice(tmp_path / "s", anchor, "code")
    content = file_bytes(info.path)
    leaves = {n.split("/")[1] for n in content if n.endswith(".zarray")}
    assert leaves == {"w_gate", "w_up", "w_down", "router", "bias"}
    assert not any(str(tmp_path).encode() in data for data in content.values())
    weights = sum(x.nbytes for x in jax.tree.leaves(slice_tree(0)))
    stored = sum(len(v) for n, v in content.items() if n.rsplit("/", 1)[-1][0].isdigit())
    assert stored == weights


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"expert": "Bad Id"}, "bad-id"),
        ({"training": {"steps": 1, "tokens": 2}}, "manifest-schema"),
        ({"training": {"steps": 1, "tokens": 2, "seed": -1}}, "manifest-schema"),
        ({"anchor_digest": "sha256:0"}, "manifest-schema"),
        ({"anchor_digest": None}, "manifest-schema"),
    ],
)
def test_what_would_be_refused_later_is_not_written(tmp_path, anchor, changes, code):
    with pytest.raises(RefusedError) as error:
        make_slice(tmp_path / "s", anchor, **{"expert": "code", **changes})
    assert code in {p.code for p in error.value.problems}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: t | {"opt_state": t["bias"]}, "leaf-extra"),
        (lambda t: {k: v for k, v in t.items() if k != "bias"}, "leaf-missing"),
        (lambda t: t | {"bias": t["bias"][:1]}, "leaf-shape"),
        (lambda t: t | {"bias": t["bias"].astype(np.float64)}, "leaf-dtype"),
        (lambda t: t | {"bias": t["bias"] * np.float32("nan")}, "not-finite"),
        (lambda t: t | {"w_up": t["w_up"] / np.float32(0)}, "not-finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_weights_that_would_be_refused_later_are_not_written(tmp_path, anchor, change, code):
    with pytest.raises(RefusedError) as error:
        make_slice(tmp_path / "s", anchor, "code", tree=change(slice_tree(1)))
    assert {p.code for p in error.value.problems} == {code}
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_damage_to_a_slice_is_found_and_named(tmp_path, anchor):
    make_slice(tmp_path / "s", anchor, "code")
    rng = np.random.default_rng(0)
    for trial in range(300):
        with damaged(tmp_path / "s", rng, KINDS[trial % len(KINDS)]) as (kind, touched):
            with pytest.raises(RefusedError) as error:
                slices.read_slice(tmp_path / "s")
            named = " ".join(p.path for p in error.value.problems)
            assert any(name in named for name in touched), (kind, touched, named)
    slices.read_slice(tmp_path / "s")


def test_values_that_do_not_match_are_found_without_any_file_digest(tmp_path, anchor):
    """The second digest: the files are as listed, the listed leaf digest is another's."""
    info = make_slice(tmp_path / "s", anchor, "code")
    value = json.loads((info.path / manifest.NAME).read_text())
    value["leaves"]["w_up"]["digest"] = value["leaves"]["w_gate"]["digest"]
    manifest.write(info.path, value)
    with pytest.raises(RefusedError) as error:
        slices.read_slice(info.path)
    assert [(p.code, p.leaf) for p in error.value.problems] == [("leaf-digest", "w_up")]

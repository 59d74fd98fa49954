# SPDX-License-Identifier: Apache-2.0
"""Slices from somebody who wants harm: every kind is refused by its own code, and so is the stitch.

The attacker can write any file and seals what he writes, so `flexolmo.json` always carries a digest
that matches its content.
"""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from expert_helpers import (
    CONFIG,
    leaf_table,
    make_anchor,
    make_slice,
    make_world,
    rewrite,
    slice_tree,
)

from flexolmo_jax import checkpoint
from flexolmo_jax import tree as trees
from flexolmo_jax.errors import RefusedError
from flexolmo_jax.experts import leafio, manifest, model_dir, onepass, stitch
from flexolmo_jax.experts.verify import verify
from flexolmo_jax.files import hash_files, list_files

D = "sha256:" + "1" * 64


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("w"))


@pytest.fixture
def hostile(world, tmp_path):
    """A copy of the slice "code", to be changed."""
    shutil.copytree(world.slices["code"].path, tmp_path / "code")
    return tmp_path / "code"


def relist(folder, tree=None):
    """Seals the files as they are now, with the leaf table of `tree` if one is given."""
    found = hash_files(folder, [n for n in list_files(folder)[0] if n != manifest.NAME])

    def change(value):
        value["files"] = found
        if tree is not None:
            value["leaves"] = leaf_table(tree)

    rewrite(folder, change)


def with_tree(folder, tree, table=None):
    """Replaces the arrays, and the leaf table too unless another one is given."""
    shutil.rmtree(folder / "params")
    checkpoint.save_tree(folder / "params", tree)
    relist(folder, tree if table is None else table)


def edit(key, value):
    return lambda folder: rewrite(folder, lambda v: {**v, key: value})


def edit_leaf(name, **fields):
    return lambda folder: rewrite(folder, lambda v: v["leaves"][name].update(fields))


def add_leaf_entry(name):
    return lambda folder: rewrite(folder, lambda v: v["leaves"].update({name: v["leaves"]["bias"]}))


def add_file(name, listed=True, text="x"):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        if listed:
            relist(folder)

    return change


def list_file(name):
    return lambda folder: rewrite(folder, lambda v: v["files"].update({name: D}))


def link(name, target):
    def change(folder):
        path = folder / name
        real = path.with_name("real") if target is None else target
        shutil.copytree(path, real) if path.is_dir() else shutil.copy(path, real)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(real)

    return change


def raw(text):
    return lambda folder: (folder / manifest.NAME).write_bytes(text)


def leaf(name, change):
    """Other arrays, honestly listed."""

    def apply(folder):
        tree = slice_tree(1)
        with_tree(folder, tree | {name: change(tree[name])})

    return apply


def without(name):
    return lambda folder: with_tree(folder, {k: v for k, v in slice_tree(1).items() if k != name})


def extra_leaf(name):
    def apply(folder):
        with_tree(folder, trees.unflatten(slice_tree(1) | {name: np.ones(3, np.float32)}))

    return apply


def secret_arrays(change):
    """Arrays that differ from the leaf table, whose file digests are honest."""

    def apply(folder):
        tree = slice_tree(1)
        with_tree(folder, tree | {"w_up": change(tree["w_up"])}, table=tree)

    return apply


def zarr(**fields):
    """Other array metadata, honestly listed."""

    def apply(folder):
        path = folder / "params" / "w_up" / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        relist(folder)

    return apply


def orbax(**fields):
    def apply(folder):
        path = folder / "params" / "_METADATA"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        relist(folder)

    return apply


def resize(size):
    def apply(folder):
        os.truncate(folder / "params" / "w_up" / "0.0.0", size)
        if size < 1 << 20:
            relist(folder)

    return apply


def remove(name):
    return lambda folder: (folder / name).unlink()


def flip(name):
    def apply(folder):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return apply


def fifo(folder):
    os.mkfifo(folder / "params" / "pipe")


PLANNED = {
    # identity
    "wrong anchor": (edit("anchor_digest", D), "wrong-anchor"),
    "no anchor": (edit("anchor_digest", None), "manifest-schema"),
    "wrong architecture": (edit("architecture_digest", D), "wrong-architecture"),
    "wrong tokenizer": (edit("tokenizer_digest", D), "wrong-tokenizer"),
    "poses as public": (edit("expert", "public"), "bad-id"),
    "id climbs": (edit("expert", "../math"), "bad-id"),
    "id of look-alikes": (edit("expert", "cоde"), "bad-id"),
    "id in capitals": (edit("expert", "Code"), "bad-id"),
    "id too long": (edit("expert", "a" * 64), "bad-id"),
    "id is a number": (edit("expert", 7), "bad-id"),
    # manifest
    "schema of tomorrow": (edit("schema", 2), "manifest-schema"),
    "schema as truth": (edit("schema", True), "manifest-schema"),
    "kind model": (edit("kind", "model"), "manifest-schema"),
    "unknown key": (edit("run_me", "os.system"), "manifest-schema"),
    "no files": (edit("files", {}), "manifest-schema"),
    "no leaves": (edit("leaves", {}), "manifest-schema"),
    "training of text": (edit("training", "long"), "manifest-schema"),
    "training negative": (
        edit("training", {"steps": -1, "tokens": 1, "seed": 1}),
        "manifest-schema",
    ),
    "deep nesting": (
        edit("data_card", json.loads('{"a":' * 40 + "1" + "}" * 40)),
        "manifest-schema",
    ),
    "not JSON": (raw(b"{"), "manifest-schema"),
    "not text": (raw(b"\xff\xfe\x00"), "manifest-schema"),
    "endless brackets": (raw(b"[" * 200_000), "manifest-schema"),
    "no manifest": (remove(manifest.NAME), "file-missing"),
    # leaves
    "leaf gone": (without("bias"), "leaf-missing"),
    "leaf more": (extra_leaf("w_extra"), "leaf-extra"),
    "leaf shape": (leaf("w_up", lambda x: x[:, :, :-1]), "leaf-shape"),
    "leaf transposed": (leaf("w_up", lambda x: x.swapaxes(1, 2)), "leaf-shape"),
    "leaf rank": (leaf("bias", lambda x: x[:, None]), "leaf-shape"),
    "leaf of halves": (leaf("w_up", lambda x: x.astype(jnp.bfloat16)), "leaf-dtype"),
    "leaf of doubles": (leaf("w_up", lambda x: x.astype(np.float64)), "leaf-dtype"),
    "leaf of integers": (leaf("w_up", lambda x: x.astype(np.int32)), "leaf-dtype"),
    "leaf of objects": (edit_leaf("w_up", dtype="object"), "leaf-dtype"),
    "leaf name climbs": (add_leaf_entry("../x"), "manifest-schema"),
    "leaf name of two files": (add_leaf_entry("w.up"), "manifest-schema"),
    "leaf shape negative": (edit_leaf("w_up", shape=[-1, 8, 12]), "leaf-shape"),
    "leaf shape huge": (edit_leaf("w_up", shape=[2, 8, 1 << 50]), "leaf-shape"),
    "leaf shape of truth": (edit_leaf("w_up", shape=[True, 8, 12]), "leaf-shape"),
    # leftovers
    "optimizer leaf": (extra_leaf("opt_state"), "leftover-state"),
    "moment leaf": (extra_leaf("mu/w_up"), "leftover-state"),
    "optimizer folder": (add_file("opt_state/0"), "leftover-state"),
    "optimizer folder, not listed": (add_file("optimizer/0", listed=False), "leftover-state"),
    "iterator file": (add_file("iterator/state", listed=False), "leftover-state"),
    "random state": (add_file("rng", listed=False), "leftover-state"),
    # files
    "file gone": (remove("params/w_up/0.0.0"), "file-missing"),
    "file more": (add_file("params/w_up/1.0.0", listed=False), "file-extra"),
    "code beside": (add_file("run.py", listed=False), "file-extra"),
    "code listed": (add_file("run.py"), "file-extra"),
    "code listed as a parameter": (add_file("params/run.py"), "file-extra"),
    "hidden file": (add_file(".hidden", listed=False), "file-extra"),
    "path climbs": (list_file("params/../../x"), "bad-path"),
    "path from the root": (list_file("/etc/passwd"), "bad-path"),
    "path of Windows": (list_file("params\\x"), "bad-path"),
    "path in two cases": (list_file("params/W_UP/0.0.0"), "bad-path"),
    "path of look-alikes": (list_file("params/ｗ"), "bad-path"),
    "name outside the grammar": (add_file("params/a b", listed=False), "bad-path"),
    "linked file": (link("params/w_up/0.0.0", None), "symlink"),
    "linked folder": (link("params/w_up", None), "symlink"),
    "linked tree": (link("params", None), "symlink"),
    "linked manifest": (link(manifest.NAME, None), "symlink"),
    "pipe": (fifo, "not-a-file"),
    # bombs and detours inside the arrays
    "sparse giant": (resize(1 << 40), "file-size"),
    "short file": (resize(16), "file-size"),
    "compressed": (zarr(compressor={"id": "zstd", "level": 1}), "bad-layout"),
    "filtered": (zarr(filters=[{"id": "delta"}]), "bad-layout"),
    "giant chunks": (zarr(chunks=[1 << 20] * 3), "bad-layout"),
    "another shape inside": (zarr(shape=[1 << 20] * 3), "bad-layout"),
    "another order inside": (zarr(order="F"), "bad-layout"),
    "another dtype inside": (zarr(dtype="<i4"), "bad-layout"),
    "big-endian inside": (zarr(dtype=">f4"), "bad-layout"),
    "database beside": (orbax(use_ocdbt=True), "bad-layout"),
    "other format": (orbax(use_zarr3=True), "bad-layout"),
    "secretly halves": (secret_arrays(lambda x: x.astype(jnp.bfloat16)), "file-size"),
    "secretly smaller": (secret_arrays(lambda x: x[:1]), "file-size"),
    # router
    "another router": (edit("recipe", {"router": {"context": "document"}}), "router-mismatch"),
    "unknown router": (edit("recipe", {"router": {"context": "magic"}}), "router-mismatch"),
    "router of text": (edit("recipe", {"router": "token"}), "router-mismatch"),
}
EXECUTED = {
    "bit flip": (flip("params/w_up/0.0.0"), "file-digest"),
    "bit flip in metadata": (flip("params/commit_success.txt"), "file-digest"),
    "NaN": (leaf("w_up", lambda x: np.where(x == x.max(), np.float32("nan"), x)), "not-finite"),
    "infinity": (
        leaf("router", lambda x: np.where(x == x.max(), np.float32("inf"), x)),
        "not-finite",
    ),
    "another leaf's digest": (edit_leaf("w_up", digest=D), "leaf-digest"),
    "secretly other values": (secret_arrays(lambda x: x + 1), "leaf-digest"),
    "secretly one bit": (secret_arrays(lambda x: np.nextafter(x, 9)), "leaf-digest"),
}


def refused(world, paths, out, **options):
    """The problems of a stitch that must be refused, wherever that happens; nothing is left."""
    with pytest.raises(RefusedError) as error:
        stitch.execute(stitch.plan(world.anchor.path, paths, **options), out)
    assert error.value.exit_code == 3
    assert not out.exists()
    assert [p for p in out.parent.iterdir() if ".tmp-" in p.name] == []
    return {p.code for p in error.value.problems}


@pytest.mark.parametrize("kind", PLANNED)
def test_refused_before_any_array_is_read(world, hostile, tmp_path, monkeypatch, kind):
    change, code = PLANNED[kind]
    change(hostile)
    monkeypatch.setattr(leafio, "_read", forbidden)
    monkeypatch.setattr(onepass, "judge", forbidden)
    assert code in refused(world, [hostile, *world.paths[1:]], tmp_path / "m")


def forbidden(*_args, **_kwargs):
    raise AssertionError("an array of a hostile slice was read")


@pytest.mark.parametrize("kind", EXECUTED)
def test_refused_while_the_content_is_checked(world, hostile, tmp_path, kind):
    change, code = EXECUTED[kind]
    change(hostile)
    stitch.plan(world.anchor.path, [hostile, *world.paths[1:]])
    assert refused(world, [hostile, *world.paths[1:]], tmp_path / "m") == {code}


@pytest.mark.parametrize("kind", sorted(PLANNED | EXECUTED))
def test_verify_alone_finds_all_that_needs_no_anchor(hostile, kind):
    change, code = (PLANNED | EXECUTED)[kind]
    change(hostile)
    needs_anchor = {
        "wrong-anchor",
        "wrong-architecture",
        "wrong-tokenizer",
        "router-mismatch",
        "leaf-missing",
        "leaf-extra",
        "leaf-shape",
        "leaf-dtype",
    }
    found = {p.code for p in verify(hostile)}
    if code not in needs_anchor and kind not in {
        "poses as public",
        "optimizer leaf",
        "moment leaf",
    }:
        assert code in found


def test_the_unchanged_slice_is_accepted(world, hostile, tmp_path):
    relist(hostile)
    with_tree(hostile, slice_tree(1))
    stitch.execute(stitch.plan(world.anchor.path, [hostile, *world.paths[1:]]), tmp_path / "m")
    assert verify(tmp_path / "m") == []


def test_one_id_twice(world, hostile, tmp_path):
    assert refused(world, [*world.paths, hostile], tmp_path / "m") == {"duplicate-expert"}
    assert refused(world, [hostile, hostile], tmp_path / "m") == {"duplicate-expert"}


def test_more_experts_than_slots(world, tmp_path):
    assert refused(world, world.paths, tmp_path / "m", slots=3) == {"too-many-experts"}


def test_a_slice_of_another_anchor_or_architecture(world, tmp_path):
    other = make_anchor(tmp_path / "other", seed=5)
    wide = make_anchor(tmp_path / "wide", config=CONFIG.replace(d_ffn=16))
    paths = [
        make_slice(tmp_path / "a", other, "a").path,
        make_slice(tmp_path / "b", wide, "b").path,
    ]
    codes = refused(world, paths, tmp_path / "m")
    assert {"wrong-anchor", "wrong-architecture", "leaf-shape"} <= codes


def test_a_stitched_model_is_no_anchor_and_a_slice_is_no_anchor(world, tmp_path):
    stitch.execute(stitch.plan(world.anchor.path, world.paths[:1]), tmp_path / "model")
    for anchor, code in (
        (tmp_path / "model", "not-an-anchor"),
        (world.paths[0], "manifest-schema"),
    ):
        with pytest.raises(RefusedError) as error:
            stitch.plan(anchor, world.paths[1:])
        assert {p.code for p in error.value.problems} == {code}


def test_a_model_of_another_anchor_gives_no_positions(world, tmp_path):
    other = make_anchor(tmp_path / "other", seed=5)
    assert refused(world, world.paths, tmp_path / "m", like=other.path) >= {"wrong-anchor"}


def test_a_hostile_anchor_is_refused_too(world, tmp_path):
    def copy(name):
        shutil.copytree(world.anchor.path, tmp_path / name)
        return tmp_path / name

    changes = {
        "public slice of another": lambda p: (
            shutil.rmtree(p / "experts" / "public"),
            make_slice(p / "experts" / "public", world.anchor, "public", anchor_digest=None),
        ),
        "tokenizer": lambda p: (p / "tokenizer.json").write_text("{}"),
        "shared weights": flip("shared/final_norm/0"),
        "shared link": link("shared/final_norm", None),
        "shared file": add_file("shared/x", listed=False),
        "folder beside": add_file("code/run.py", listed=False),
        "expert beside": add_file("experts/x/y", listed=False),
    }
    for name, change in changes.items():
        path = copy(name.replace(" ", "-"))
        change(path)
        with pytest.raises(RefusedError):
            stitch.execute(stitch.plan(path, world.paths), tmp_path / "m")
        with pytest.raises(RefusedError):
            model_dir.load_model(path)
        assert verify(path), name


def test_the_corpus_is_wide_enough():
    assert len(PLANNED) + len(EXECUTED) >= 75
    assert len({code for _, code in [*PLANNED.values(), *EXECUTED.values()]}) >= 17

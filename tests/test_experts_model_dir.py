# SPDX-License-Identifier: Apache-2.0
import builtins
import gc
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import KINDS, damaged
from expert_helpers import (
    CONFIG,
    file_bytes,
    leaf_equal,
    leaf_table,
    make_anchor,
    make_world,
    peak_memory,
    random_tree,
    rewrite,
    slice_tree,
)

from flexolmo_jax import checkpoint, files, model, sharding
from flexolmo_jax import tree as trees
from flexolmo_jax.errors import ConfigError, RefusedError
from flexolmo_jax.experts import leafio, model_dir, model_info, stitch, verify
from flexolmo_jax.experts import slice as slices

P = jax.sharding.PartitionSpec


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An anchor, three slices, and the model stitched with two spare slots."""
    made = make_world(tmp_path_factory.mktemp("w"))
    stitch.execute(stitch.plan(made.anchor.path, made.paths, slots=6), made.root / "model")
    return made


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world.root / "model", tmp_path / "model")
    return tmp_path / "model"


def test_an_anchor_comes_back_bit_for_bit(world):
    info, params, opened = model_dir.load_model(world.anchor.path)
    assert info.config == CONFIG
    assert opened == ("public",)
    assert info.slots == {"public": 0}
    assert info.is_anchor
    assert leaf_equal(params, random_tree(model.abstract_params(CONFIG), 0))
    assert info.training == {"steps": 3, "tokens": 96, "seed": 0}
    assert info.tokenizer_path.read_text() == '{"seed": 0}'
    assert model_info.read_info(world.anchor.path) == info == world.anchor


def test_a_model_holds_every_slice_in_its_slot_and_zeros_elsewhere(world):
    info, params, opened = model_dir.load_model(world.root / "model")
    assert opened == ("public", "code", "math", "news")
    assert info.config.n_slots == 6
    abstract = model.abstract_params(info.config)
    assert trees.flatten(params).keys() == trees.flatten(abstract).keys()
    for name, leaf in trees.flatten(abstract).items():
        assert trees.flatten(params)[name].shape == leaf.shape
    for slot, seed in enumerate((1, 2, 3), start=1):
        assert leaf_equal(slices.take_slot(params["experts"], slot), slice_tree(seed))
    for slot in (4, 5):
        empty = slices.take_slot(params["experts"], slot)
        assert all(not leaf.any() for leaf in jax.tree.leaves(empty))


def test_a_denied_expert_is_never_opened(copy):
    """Its folder may even be gone, or hold nothing but garbage."""
    whole = model_dir.load_model(copy)[1]
    allowed = {"public", "code", "news"}
    shutil.rmtree(copy / "experts" / "math")
    for make in (lambda p: None, lambda p: p.write_text("garbage"), os.mkfifo):
        make(copy / "experts" / "math")
        _, params, opened = model_dir.load_model(copy, experts=allowed)
        assert opened == ("public", "code", "news")
        assert all(not x.any() for x in jax.tree.leaves(slices.take_slot(params["experts"], 2)))
        for slot in (0, 1, 3):
            ours, theirs = (slices.take_slot(p["experts"], slot) for p in (params, whole))
            assert leaf_equal(ours, theirs)
        (copy / "experts" / "math").unlink(missing_ok=True)
    with pytest.raises(RefusedError, match="file-missing"):
        model_dir.load_model(copy)


def test_no_file_of_a_denied_expert_is_opened_even_when_it_is_there(copy, monkeypatch):
    touched = []

    def spy(module, name):
        original = getattr(module, name)

        def called(path, *args, **kwargs):
            touched.append(str(path))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, name, called)

    spy(builtins, "open")
    spy(leafio, "read_region")
    spy(files, "list_files")
    model_dir.load_model(copy, experts={"public", "code"})
    assert any("/experts/code" in p for p in touched)
    assert not any("/experts/math" in p or "/experts/news" in p for p in touched)


def test_unknown_experts_are_named_with_the_nearest_valid_one(world):
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        model_dir.load_model(world.root / "model", experts={"mth"})


def test_leaves_are_placed_by_their_sharding_and_hold_the_same_bits(world):
    mesh = jax.make_mesh((2, 4), ("expert", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(name, shape):
        if name == "experts/w_up":
            assert shape == (2, 6, 8, 12)
            return jax.sharding.NamedSharding(mesh, P(None, "expert", "data"))
        return None if name == "shared/final_norm" else jax.sharding.NamedSharding(mesh, P())

    _, plain, _ = model_dir.load_model(world.root / "model")
    _, placed, _ = model_dir.load_model(world.root / "model", sharding_fn=sharding)
    assert placed["experts"]["w_up"].sharding.spec == P(None, "expert", "data")
    assert isinstance(placed["shared"]["final_norm"], np.ndarray)
    assert leaf_equal(plain, placed)


@pytest.mark.parametrize("block", [16, leafio.BLOCK])
def test_every_leaf_may_be_sharded_and_is_never_stacked_on_the_host(world, monkeypatch, block):
    monkeypatch.setattr(leafio, "BLOCK", block)
    mesh = jax.make_mesh(
        (2, 2, 2), ("expert", "data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    config = world.anchor.config.replace(n_slots=6)
    abstract = model.abstract_params(config)
    specs = trees.flatten(sharding.param_shardings(abstract, model.param_axes(config), mesh))
    read, sizes = leafio.read_region, []

    def spy(folder, name, entry, region, out=None):
        part = read(folder, name, entry, region, out)
        sizes.append((name, part.nbytes))
        return part

    monkeypatch.setattr(leafio, "read_region", spy)
    _, plain, _ = model_dir.load_model(world.root / "model", experts={"public", "news"})
    sizes.clear()
    _, placed, _ = model_dir.load_model(
        world.root / "model", experts={"public", "news"}, sharding_fn=lambda name, _: specs[name]
    )
    assert leaf_equal(plain, placed)
    for name, leaf in trees.flatten(placed).items():
        assert leaf.sharding == specs[name]
    w_up = trees.flatten(placed)["experts/w_up"]
    assert w_up.sharding.num_devices == 8 and not w_up.is_fully_replicated
    # Eight boxes of one eighth of a slot, less those of slots that no opened expert fills.
    one = w_up.nbytes // 6
    assert [n for name, n in sizes if name == "w_up"] == [one // 4] * 8


def test_a_mixture_is_written_at_once(tmp_path, world):
    """As if its slices had been made one by one and stitched."""
    config = CONFIG.replace(n_slots=4, n_active=2)
    params = random_tree(model.abstract_params(CONFIG), 0)
    members = [
        model_dir.Member(
            info.expert,
            slice_tree(seed),
            *(info.manifest[key] for key in ("training", "recipe", "data_card")),
        )
        for seed, info in enumerate(world.slices.values(), start=1)
    ]
    stitch.execute(stitch.plan(world.anchor.path, world.paths), tmp_path / "stitched")
    info = model_dir.write_model(
        tmp_path / "once",
        config,
        params["shared"],
        slices.take_slot(params["experts"], 0),
        world.anchor.tokenizer_path,
        world.anchor.training,
        experts=members,
    )
    assert info.slots == {"public": 0, "code": 1, "math": 2, "news": 3}
    assert file_bytes(tmp_path / "once") == file_bytes(tmp_path / "stitched")


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["code", "Code"], "bad-id"),
        (["public"], "duplicate-expert"),
        (["code", "code"], "duplicate-expert"),
        (["a", "b", "c", "d"], "too-many-experts"),
    ],
)
def test_names_of_a_mixture_are_refused_before_anything_is_written(
    tmp_path, world, monkeypatch, names, code
):
    params = random_tree(model.abstract_params(CONFIG), 0)
    training = {"steps": 1, "tokens": 1, "seed": 0}
    monkeypatch.setattr(leafio, "write_tree", None)
    with pytest.raises(RefusedError) as error:
        model_dir.write_model(
            tmp_path / "m",
            CONFIG.replace(n_slots=4, n_active=2),
            params["shared"],
            slices.take_slot(params["experts"], 0),
            world.anchor.tokenizer_path,
            experts=[model_dir.Member(n, slice_tree(1), training) for n in names],
        )
    assert {p.code for p in error.value.problems} == {code}
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_files_of_others_travel_with_the_model(tmp_path, world):
    params = random_tree(model.abstract_params(CONFIG), 0)
    texts = {"merges.txt": "a b", "tokenizer_config.json": '{"bos_token": null}'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    anchor = model_dir.write_model(
        tmp_path / "anchor",
        CONFIG,
        params["shared"],
        slices.take_slot(params["experts"], 0),
        world.anchor.tokenizer_path,
        companions={name: tmp_path / name for name in texts},
    )
    assert anchor.anchor_digest == world.anchor.anchor_digest
    stitch.execute(stitch.plan(anchor.path, world.paths), tmp_path / "m")
    for path in (anchor.path, tmp_path / "m"):
        found = model_info.read_info(path).companions
        assert {name: file.read_text() for name, file in found.items()} == texts
        assert verify.verify(path) == []
        model_dir.load_model(path)
    folder = tmp_path / "m" / "tokenizer"
    for change, code in (
        (lambda: (folder / "merges.txt").write_text("b a"), "file-digest"),
        (lambda: (folder / "more").write_text(""), "file-extra"),
        (lambda: (folder / "merges.txt").unlink(), "file-missing"),
        (lambda: shutil.rmtree(folder), "file-missing"),
    ):
        change()
        assert code in {p.code for p in verify.verify(tmp_path / "m")}
        with pytest.raises(RefusedError, match=code):
            model_dir.load_model(tmp_path / "m")
    unlisted = tmp_path / "plain"
    shutil.copytree(world.anchor.path, unlisted)
    (unlisted / "tokenizer").mkdir()
    assert {p.code for p in verify.verify(unlisted)} == {"file-extra"}


def test_loading_needs_little_more_memory_than_the_result(tmp_path):
    """Not a second copy of the stack: besides the result, one leaf as it is read."""
    config = CONFIG.replace(d_model=256, d_ffn=8192, n_layers=4)
    anchor = make_anchor(tmp_path / "anchor", config=config)
    model_dir.load_model(anchor.path)  # imports and caches
    gc.collect()
    with peak_memory() as grown:
        _, params, _ = model_dir.load_model(anchor.path)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert largest == 32 << 20
    assert grown[0] < trees.nbytes(params) + 1.6 * largest


def test_bfloat16_weights_keep_their_dtype(tmp_path):
    params = random_tree(model.abstract_params(CONFIG), 3)
    half = trees.map_named(lambda _, x: x.astype(jnp.bfloat16), params)
    (tmp_path / "t.json").write_text("{}")
    public = slices.take_slot(half["experts"], 0)
    model_dir.write_model(tmp_path / "m", CONFIG, half["shared"], public, tmp_path / "t.json")
    assert leaf_equal(model_dir.load_model(tmp_path / "m")[1], half)


def test_an_anchor_digest_names_weights_tokenizer_and_architecture(tmp_path, world):
    again = make_anchor(tmp_path / "again")
    assert again.anchor_digest == world.anchor.anchor_digest
    assert file_bytes(tmp_path / "again") == file_bytes(world.anchor.path)
    assert make_anchor(tmp_path / "seed", seed=1).anchor_digest != again.anchor_digest
    theta = make_anchor(tmp_path / "theta", config=CONFIG.replace(rope_theta=1e4))
    assert theta.anchor_digest != again.anchor_digest
    more = make_anchor(tmp_path / "more", config=CONFIG.replace(n_slots=4, n_active=2))
    assert more.anchor_digest == again.anchor_digest
    assert more.model_digest != again.model_digest
    stitched = model_info.read_info(world.root / "model")
    assert stitched.anchor_digest == again.anchor_digest


def test_weights_that_do_not_fit_the_config_are_not_written(tmp_path):
    params = random_tree(model.abstract_params(CONFIG), 0)
    (tmp_path / "t.json").write_text("{}")
    public = slices.take_slot(params["experts"], 0)
    broken = {
        "leaf-missing": {k: v for k, v in params["shared"].items() if k != "unembed"},
        "leaf-extra": params["shared"] | {"opt_state": np.ones(2, np.float32)},
        "leaf-shape": params["shared"] | {"final_norm": np.ones(3, np.float32)},
        "not-finite": params["shared"] | {"final_norm": np.full(8, np.inf, np.float32)},
    }
    for code, shared in broken.items():
        with pytest.raises(RefusedError) as error:
            model_dir.write_model(tmp_path / "m", CONFIG, shared, public, tmp_path / "t.json")
        assert {p.code for p in error.value.problems} == {code}
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_every_kind_of_damage_to_a_model_is_found_and_named(copy):
    rng = np.random.default_rng(1)
    for trial in range(120):
        with damaged(copy, rng, KINDS[trial % len(KINDS)]) as (kind, touched):
            with pytest.raises(RefusedError) as error:
                model_dir.load_model(copy)
            named = " ".join(p.path for p in error.value.problems)
            assert any(name in named for name in touched), (kind, touched, named)
    model_dir.load_model(copy)


def test_swapped_members_are_found(copy):
    experts = copy / "experts"
    (experts / "code").rename(experts / "x")
    (experts / "math").rename(experts / "code")
    (experts / "x").rename(experts / "math")
    with pytest.raises(RefusedError) as error:
        model_dir.load_model(copy)
    assert {"manifest-digest", "bad-id"} <= {p.code for p in error.value.problems}


def test_another_shared_weight_under_the_same_anchor_digest_is_found(copy):
    """Sealed by an attacker: files and leaf table agree, only the anchor digest does not."""
    info, params, _ = model_dir.load_model(copy)
    shared = params["shared"] | {"final_norm": params["shared"]["final_norm"] * 2}
    shutil.rmtree(copy / "shared")
    checkpoint.save_tree(copy / "shared", shared)

    def forge(value):
        value["shared"] = leaf_table(shared)
        listed = files.hash_files(copy / "shared", files.list_files(copy / "shared")[0])
        value["files"] = {f"shared/{n}": d for n, d in listed.items()}
        value["files"]["tokenizer.json"] = info.tokenizer_digest

    rewrite(copy, forge)
    with pytest.raises(RefusedError) as error:
        model_dir.load_model(copy)
    assert {p.code for p in error.value.problems} == {"wrong-anchor"}


def test_without_verification_only_the_manifests_are_checked(copy):
    victim = copy / "experts" / "math" / "params" / "w_up" / "0.0.0"
    data = bytearray(victim.read_bytes())
    data[5] ^= 1
    victim.write_bytes(data)
    model_dir.load_model(copy, verify=False)
    with pytest.raises(RefusedError, match="file-digest"):
        model_dir.load_model(copy)

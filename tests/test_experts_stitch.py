# SPDX-License-Identifier: Apache-2.0
import builtins
import gc
import itertools
import shutil

import pytest
from expert_helpers import (
    CONFIG,
    file_bytes,
    leaf_equal,
    make_anchor,
    make_slice,
    make_world,
    peak_memory,
    rewrite,
    slice_tree,
)

from flexolmo_jax import files
from flexolmo_jax import tree as trees
from flexolmo_jax.config import RouterConfig
from flexolmo_jax.errors import ConfigError, RefusedError
from flexolmo_jax.experts import model_dir, model_info, stitch
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.experts.verify import verify


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("w"))


def stitched(world, out, paths=None, **options):
    plan = stitch.plan(world.anchor.path, world.paths if paths is None else paths, **options)
    return stitch.execute(plan, out)


def test_every_order_of_slices_gives_the_same_model(world, tmp_path):
    results, files, digests = [], [], []
    for i, paths in enumerate(itertools.permutations(world.paths)):
        out = tmp_path / str(i)
        results.append(stitched(world, out, paths))
        files.append(file_bytes(out))
        digests.append(trees.digests(model_dir.load_model(out)[1]))
    assert len(results) == 6
    assert len({r["model_digest"] for r in results}) == 1
    assert all(f == files[0] for f in files)
    assert all(d == digests[0] for d in digests)
    assert [r["expert"] for r in results[0]["slots"]] == ["public", "code", "math", "news"]


def test_other_slices_give_another_model(world, tmp_path):
    digests = {
        stitch.plan(world.anchor.path, paths).model_digest
        for n in range(4)
        for paths in itertools.combinations(world.paths, n)
    }
    other = make_slice(tmp_path / "code", world.anchor, "code", seed=99)
    digests.add(stitch.plan(world.anchor.path, [other.path, *world.paths[1:]]).model_digest)
    digests.add(stitch.plan(world.anchor.path, world.paths, slots=9).model_digest)
    digests.add(stitch.plan(world.anchor.path, world.paths, active=3).model_digest)
    assert len(digests) == 8 + 3


def test_no_byte_of_any_owner_is_rewritten(world, tmp_path):
    result = stitched(world, tmp_path / "m")
    for name, info in world.slices.items():
        assert file_bytes(tmp_path / "m" / "experts" / name) == file_bytes(info.path)
    anchor, made = file_bytes(world.anchor.path), file_bytes(tmp_path / "m")
    assert {n: d for n, d in anchor.items() if n != "flexolmo.json"}.items() <= made.items()
    payload = sum(len(d) for n, d in made.items() if n != "flexolmo.json")
    assert result["bytes_copied"] == payload
    assert 0 < result["peak_host_gib"] < 64
    assert verify(tmp_path / "m") == []


def test_unstitch_is_the_exact_inverse(world, tmp_path):
    stitched(world, tmp_path / "m")
    for name, info in world.slices.items():
        result = stitch.unstitch(tmp_path / "m", name, tmp_path / name)
        assert file_bytes(tmp_path / name) == file_bytes(info.path)
        assert result["manifest_digest"] == info.digest
    again = stitched(world, tmp_path / "again", [tmp_path / n for n in world.slices])
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "m")
    assert again["model_digest"] == model_info.read_info(tmp_path / "m").model_digest


def test_unstitch_refuses_what_it_cannot_give_back_exactly(world, tmp_path):
    stitched(world, tmp_path / "m")
    with pytest.raises(ConfigError, match="did you mean 'news'"):
        stitch.unstitch(tmp_path / "m", "new", tmp_path / "x")
    with pytest.raises(ConfigError, match="part of the anchor"):
        stitch.unstitch(tmp_path / "m", "public", tmp_path / "x")
    (tmp_path / "m" / "experts" / "math" / "params" / "bias" / "0.0").write_bytes(b"x")
    with pytest.raises(RefusedError, match="math"):
        stitch.unstitch(tmp_path / "m", "math", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_like_keeps_positions_and_leaves_the_missing_slot_empty(world, tmp_path):
    stitched(world, tmp_path / "m", slots=5, active=2)
    plan = stitch.plan(world.anchor.path, [world.paths[2], world.paths[0]], like=tmp_path / "m")
    assert {row["expert"]: row["slot"] for row in plan.slots} == {"public": 0, "code": 1, "news": 3}
    assert (plan.config.n_slots, plan.config.n_active) == (5, 2)
    stitch.execute(plan, tmp_path / "dropped")
    _, params, opened = model_dir.load_model(tmp_path / "dropped")
    assert opened == ("public", "code", "news")
    _, denied, _ = model_dir.load_model(tmp_path / "m", experts={"public", "code", "news"})
    assert leaf_equal(params, denied)  # dropped is exactly what denying the expert loads


def test_like_gives_new_experts_only_free_slots(world, tmp_path):
    stitched(world, tmp_path / "m", slots=5)
    new = [make_slice(tmp_path / n, world.anchor, n, seed=7).path for n in ("art", "zoo")]
    plan = stitch.plan(world.anchor.path, [*world.paths, new[0]], like=tmp_path / "m")
    assert plan.pieces[4].expert == "art"
    assert [plan.pieces[s].expert for s in (1, 2, 3)] == ["code", "math", "news"]
    # The slot of the expert that is left out is reserved for it.
    with pytest.raises(RefusedError) as error:
        stitch.plan(world.anchor.path, [*world.paths[1:], *new], like=tmp_path / "m")
    assert [p.code for p in error.value.problems] == ["too-many-experts"]


def test_capacity_and_active_experts(world):
    def sizes(paths, **options):
        config = stitch.plan(world.anchor.path, paths, **options).config
        return config.n_slots, config.n_active

    assert sizes([]) == (1, 1)
    assert sizes(world.paths[:1]) == (2, 2)
    assert sizes(world.paths) == (4, 2)
    assert sizes(world.paths, slots=8) == (8, 2)
    assert sizes(world.paths, active=4) == (4, 4)
    for options in ({"active": 5}, {"active": 0}, {"slots": 0}, {"slots": 4, "like": "x"}):
        with pytest.raises(ConfigError):
            stitch.plan(world.anchor.path, world.paths, **options)


def test_the_router_is_the_one_the_slices_were_trained_with(world, tmp_path):
    recipe = {"router": {"context": "document", "renormalize": True}}
    made = [
        make_slice(tmp_path / n, world.anchor, n, seed=i, recipe=recipe).path
        for i, n in enumerate(("a", "b"))
    ]
    plan = stitch.plan(world.anchor.path, made)
    assert plan.config.router == RouterConfig("document", True)
    assert stitch.plan(world.anchor.path, []).config.router == world.anchor.config.router
    silent = make_slice(tmp_path / "c", world.anchor, "c", recipe={}).path
    assert stitch.plan(world.anchor.path, [silent]).config.router == world.anchor.config.router


def test_a_router_of_other_leaves_than_the_anchors_is_refused(world, tmp_path):
    """Else the model would be written, and no command could read it."""
    recipe = {"router": {"context": "document", "evidence": 4.0}}
    odd = make_slice(tmp_path / "odd", world.anchor, "odd", recipe=recipe).path
    with pytest.raises(RefusedError) as error:
        stitch.plan(world.anchor.path, [odd])
    (found,) = error.value.problems
    assert (found.code, found.path) == ("router-mismatch", str(odd))


def test_the_slice_that_differs_from_the_anchors_router_is_the_one_named(world, tmp_path):
    """Mutation: the first by path is right."""
    recipe = {"router": {"context": "document"}}
    odd = make_slice(tmp_path / "a", world.anchor, "a", recipe=recipe).path
    honest = [make_slice(tmp_path / n, world.anchor, n, recipe={}).path for n in ("b", "c")]
    with pytest.raises(RefusedError) as error:
        stitch.plan(world.anchor.path, [odd, *honest])
    assert [p.path for p in error.value.problems] == [str(odd)]


def test_a_plan_reads_no_weights_and_writes_nothing(world, tmp_path, monkeypatch):
    opened, original = [], builtins.open

    def spy(path, *args, **kwargs):
        opened.append(str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    before = file_bytes(world.root)
    opened.clear()
    plan = stitch.plan(world.anchor.path, world.paths)
    assert not [p for p in opened if p.rsplit("/", 1)[-1][:1].isdigit()]
    monkeypatch.undo()
    assert file_bytes(world.root) == before
    lines = plan.table().splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["0", "public"],
        ["1", "code"],
        ["2", "math"],
        ["3", "news"],
    ]
    assert lines[5].startswith("2 active of 4 slots")
    assert len({line.index("/") for line in lines[1:5]}) == 1  # aligned


def test_the_output_is_never_overwritten_and_a_refusal_leaves_nothing(world, tmp_path):
    stitched(world, tmp_path / "m")
    before = file_bytes(tmp_path / "m")
    with pytest.raises(ConfigError, match="exists"):
        stitched(world, tmp_path / "m", world.paths[:1])
    assert file_bytes(tmp_path / "m") == before
    shutil.copytree(world.paths[0], tmp_path / "bad")
    victim = tmp_path / "bad" / "params" / "w_up" / "0.0.0"
    victim.write_bytes(bytes(len(victim.read_bytes())))
    plan = stitch.plan(world.anchor.path, [tmp_path / "bad", *world.paths[1:]])
    with pytest.raises(RefusedError) as error:
        stitch.execute(plan, tmp_path / "n")
    assert [p.path for p in error.value.problems] == [str(victim)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "m"]


def test_all_problems_of_all_slices_are_reported_at_once(world, tmp_path):
    other = make_anchor(tmp_path / "other", seed=8)
    wrong = make_slice(tmp_path / "a", other, "a")
    twice = make_slice(tmp_path / "b", world.anchor, "code", seed=3)
    gone = tmp_path / "gone"
    with pytest.raises(RefusedError) as error:
        stitch.plan(world.anchor.path, [*world.paths, wrong.path, twice.path, gone])
    assert {p.code for p in error.value.problems} == {
        "wrong-anchor",
        "wrong-tokenizer",
        "duplicate-expert",
        "file-missing",
    }


def test_honest_slices_are_never_refused(tmp_path):
    """Twenty shapes and scales of weights, among them zeros, subnormals and the largest floats."""
    anchor = make_anchor(tmp_path / "anchor")
    scales = [0.0, 1e-45, 1e-38, 1e-6, 1.0, 1e6, 3e37]
    for i, scale in enumerate(scales * 3):
        tree = trees.map_named(lambda _, x, s=scale: (x * s).astype(x.dtype), slice_tree(i))
        make_slice(tmp_path / f"s{i}", anchor, f"e{i}", seed=i, tree=tree)
    paths = [tmp_path / f"s{i}" for i in range(len(scales) * 3)]
    stitch.execute(stitch.plan(anchor.path, paths), tmp_path / "m")
    assert verify(tmp_path / "m") == []


def test_an_anchor_with_spare_capacity_is_still_an_anchor(tmp_path):
    anchor = make_anchor(tmp_path / "anchor", config=CONFIG.replace(n_slots=3, n_active=1))
    piece = make_slice(tmp_path / "s", anchor, "code")
    stitch.execute(stitch.plan(anchor.path, [piece.path]), tmp_path / "m")
    info, params, _ = model_dir.load_model(tmp_path / "m")
    assert info.config.n_slots == 2
    assert leaf_equal(slices.take_slot(params["experts"], 1), slice_tree(1))


def test_stitching_never_holds_more_than_one_leaf(tmp_path):
    config = CONFIG.replace(d_model=256, d_ffn=4096, n_layers=4)
    anchor = make_anchor(tmp_path / "anchor", config=config)
    piece = make_slice(tmp_path / "a", anchor, "a")
    plan = stitch.plan(anchor.path, [piece.path])
    stitch.execute(plan, tmp_path / "warm")
    gc.collect()
    with peak_memory() as grown:
        stitch.execute(plan, tmp_path / "m")
    assert grown[0] < 1.6 * (16 << 20) + files.COPY_BYTES


def test_forged_tables_do_not_pass_because_they_are_sealed(world, tmp_path):
    """The slice's own digest is right, but it lies about one leaf."""
    shutil.copytree(world.paths[0], tmp_path / "s")
    zeros = trees.leaf_digest(slice_tree(5)["w_up"])
    rewrite(tmp_path / "s", lambda v: v["leaves"]["w_up"].update(digest=zeros))
    plan = stitch.plan(world.anchor.path, [tmp_path / "s"])
    with pytest.raises(RefusedError) as error:
        stitch.execute(plan, tmp_path / "m")
    assert [(p.code, p.leaf) for p in error.value.problems] == [("leaf-digest", "w_up")]

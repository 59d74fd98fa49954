# SPDX-License-Identifier: Apache-2.0
"""Models that copy no weights: flexolmo.json says where the slices lie.

Broken once each: without `link_problems` a vanished slice is only "no flexolmo.json"; with a path
that goes by its text a model behind a symlink is not found; without the stamps a late change goes
through; with links in the model digest the two ways to stitch give two models.
"""

import json
import os
import shutil

import numpy as np
import pytest
from damage import KINDS, damaged
from expert_helpers import file_bytes, leaf_equal, make_slice, make_world, rewrite

from flexolmo_jax import inference
from flexolmo_jax.cli.main import main
from flexolmo_jax.errors import ConfigError, RefusedError
from flexolmo_jax.experts import loading, manifest, model_dir, model_info, stitch
from flexolmo_jax.experts.verify import verify
from flexolmo_jax.interop import hf_export


@pytest.fixture
def world(tmp_path):
    """An anchor, slices, and the model stitched in both ways."""
    made = make_world(tmp_path / "w")
    plan = stitch.plan(made.anchor.path, made.paths)
    stitch.execute(plan, made.root / "models" / "linked", link=True)
    stitch.execute(plan, made.root / "models" / "copied")
    return made


@pytest.fixture
def linked(world):
    return world.root / "models" / "linked"


def problems_of(call, *args, **kwargs):
    with pytest.raises(RefusedError) as error:
        call(*args, **kwargs)
    return error.value.problems


def test_links_and_copies_are_one_model(world, linked):
    copied = linked.with_name("copied")
    infos = [model_info.read_info(path) for path in (linked, copied)]
    assert infos[0].model_digest == infos[1].model_digest
    assert infos[0].links == {
        "shared": "../../anchor/shared",
        "experts/public": "../../anchor/experts/public",
        **{f"experts/{n}": f"../../slices/{n}" for n in ("code", "math", "news")},
    }
    assert set(file_bytes(linked)) == {"flexolmo.json", "tokenizer.json"}
    values = [json.loads((p / "flexolmo.json").read_text()) for p in (linked, copied)]
    assert [v["schema"] for v in values] == [2, 1] and "links" not in values[1]
    assert verify(linked) == verify(copied) == []
    assert leaf_equal(model_dir.load_model(linked)[1], model_dir.load_model(copied)[1])
    opened = [inference.open_model(p, deny=["math"]) for p in (linked, copied)]
    assert opened[0].slots == opened[1].slots == {"public": 0, "code": 1, "news": 3}
    assert leaf_equal(opened[0].group, opened[1].group)


def test_what_is_reported_of_each_way(world, linked, tmp_path):
    plan = stitch.plan(world.anchor.path, world.paths)
    link = stitch.execute(plan, tmp_path / "a", link=True)
    copy = stitch.execute(plan, tmp_path / "b")
    assert link["bytes_copied"] == (linked / "tokenizer.json").stat().st_size
    sizes = [len(d) for n, d in file_bytes(tmp_path / "b").items() if n != "flexolmo.json"]
    assert copy["bytes_copied"] == sum(sizes)
    manifests = sum(len(d) for n, d in file_bytes(tmp_path / "b/experts").items() if "/f" in n)
    assert link["bytes_checked"] == copy["bytes_checked"] == sum(sizes) - manifests
    assert copy["links"] == {} and set(link["links"]) >= {"shared", "experts/code"}


def test_all_damage_to_what_is_linked_is_found_and_named(world, linked):
    rng = np.random.default_rng(3)
    for folder in (world.root / "slices/code", world.root / "anchor/shared", linked):
        for trial in range(24):
            with damaged(folder, rng, KINDS[trial % len(KINDS)]) as (kind, touched):
                for found in (verify(linked), problems_of(model_dir.load_model, linked)):
                    named = " ".join(p.path for p in found)
                    assert any(str(folder / t) in named for t in touched), (kind, touched, found)
    assert verify(linked) == []


def test_a_slice_that_is_gone_is_named_and_needed_only_by_who_uses_it(world, linked, tmp_path):
    math, away = world.root / "slices/math", tmp_path / "away"
    whole = model_dir.load_model(linked, experts={"public", "code"})[1]
    math.rename(away)
    for found in (
        verify(linked),
        problems_of(model_dir.load_model, linked),
        problems_of(stitch.unstitch, linked, "math", tmp_path / "x"),
        problems_of(hf_export.plan, linked),
    ):
        (broken,) = [p for p in found if p.code == "link-broken"]
        assert broken.path == str(math)
        assert "../../slices/math" in broken.message and str(linked) in broken.message
    _, without, _ = model_dir.load_model(linked, experts={"public", "code"})
    assert leaf_equal(without, whole)
    away.rename(math)
    assert verify(linked) == []
    (world.root / "anchor").rename(away)
    assert {p.path for p in verify(linked) if p.code == "link-broken"} == {
        str(world.root / "anchor/shared"),
        str(world.root / "anchor/experts/public"),
    }


def test_another_slice_in_its_place_is_refused(world, linked):
    code = world.root / "slices/code"
    shutil.rmtree(code)
    make_slice(code, world.anchor, "code", seed=77)
    assert {p.code for p in verify(linked)} == {"manifest-digest"}
    assert {p.code for p in problems_of(model_dir.load_model, linked)} == {"manifest-digest"}
    shutil.rmtree(code)
    code.symlink_to(world.root / "slices/math")
    assert "symlink" in {p.code for p in verify(linked)}


def test_a_file_that_changes_after_it_was_checked_is_refused(world, linked, monkeypatch):
    victim = world.root / "slices/code/params/w_up/0.0.0"
    place = loading.place

    def late(*args):
        victim.write_bytes(victim.read_bytes())
        return place(*args)

    monkeypatch.setattr(loading, "place", late)
    (found,) = problems_of(model_dir.load_model, linked)
    assert (found.code, found.path) == ("changed-while-read", str(victim))
    model_dir.load_model(linked, experts={"public", "news"})


def test_bytes_that_were_others_while_they_were_read_are_refused(world, linked, monkeypatch):
    """Their owner puts them back, and the clock too; a model of other weights must not load."""
    victim = world.root / "slices/code/params/w_up/0.0.0"
    honest, status, place = victim.read_bytes(), victim.stat(), loading.place

    def write(data):
        with victim.open("r+b") as file:
            file.write(data)
        os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))

    def twisted(*args):
        write(bytes(reversed(honest)))
        found = place(*args)
        write(honest)
        return found

    monkeypatch.setattr(loading, "place", twisted)
    (found,) = problems_of(model_dir.load_model, linked)
    assert (found.code, found.path) == ("changed-while-read", str(victim))


def test_a_new_hard_link_to_a_file_that_is_being_read_is_no_harm(world, linked, monkeypatch):
    victim, place = world.root / "slices/code/params/w_up/0.0.0", loading.place
    calls = []

    def late(*args):
        calls.append(args)
        if len(calls) == 1:
            os.link(victim, world.root / "another")
        return place(*args)

    whole = model_dir.load_model(linked)[1]
    monkeypatch.setattr(loading, "place", late)
    assert leaf_equal(model_dir.load_model(linked)[1], whole) and len(calls) == 2


def test_unstitch_gives_back_what_the_owner_shipped(world, linked, tmp_path):
    for name, info in world.slices.items():
        result = stitch.unstitch(linked, name, tmp_path / name)
        assert file_bytes(tmp_path / name) == file_bytes(info.path)
        assert result["manifest_digest"] == info.digest


def test_a_linked_model_moves_with_what_it_links_to(world, linked, tmp_path):
    copied = model_dir.load_model(linked.with_name("copied"))[1]
    shutil.move(linked, tmp_path / "alone")
    assert {p.code for p in verify(tmp_path / "alone")} == {"link-broken"}
    shutil.move(tmp_path / "alone", linked)
    shutil.move(world.root, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere/models/linked"
    assert verify(moved) == []
    assert leaf_equal(model_dir.load_model(moved)[1], copied)
    # Through a link to the folder above it: ".." is of where the model lies.
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/models").symlink_to(moved.parent)
    assert verify(tmp_path / "deep/er/models/linked") == []
    made = stitch.plan(tmp_path / "elsewhere/anchor", [])
    stitch.execute(made, tmp_path / "deep/er/models/more", link=True)
    assert verify(moved.with_name("more")) == []


def test_a_linked_anchor_is_an_anchor_and_links_make_no_chains(world, tmp_path):
    alone = tmp_path / "anchor"
    stitch.execute(stitch.plan(world.anchor.path, []), alone, link=True)
    for link in (False, True):
        out = tmp_path / f"m{link}"
        stitch.execute(stitch.plan(alone, world.paths), out, link=link)
    shutil.rmtree(alone)
    models = [tmp_path / "mFalse", tmp_path / "mTrue"]
    assert [verify(m) for m in models] == [[], []]
    assert file_bytes(models[0]) == file_bytes(world.root / "models/copied")


def test_what_is_linked_cannot_lie_here_too(linked, world):
    shutil.copytree(world.root / "slices/code", linked / "experts/code")
    assert {p.code for p in verify(linked)} == {"file-extra"}
    shutil.rmtree(linked / "experts")
    shutil.copytree(world.root / "anchor/shared", linked / "shared")
    assert {p.code for p in problems_of(model_dir.load_model, linked)} == {"file-extra"}


@pytest.mark.parametrize(
    "target",
    [
        *("/slices/code", "slices/code", ".", "..", "../..", "", "../a/../b", "../a//b", "../a/."),
        *("../a\\b", "../a\nb", "../ /x", "../" + "a" * 5000, "s3://bucket/slices/code"),
        *(3, None, ["../x"]),
    ],
)
def test_links_are_relative_paths_that_lead_out(linked, target):
    rewrite(linked, lambda v: v["links"].update({"experts/code": target}))
    assert {p.code for p in verify(linked)} <= {"bad-path", "manifest-schema"} and verify(linked)
    assert problems_of(model_info.read_info, linked)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(schema=1),
        lambda v: v.update(schema=3),
        lambda v: v.pop("links"),
        lambda v: v.update(links={}),
        lambda v: v.update(links=["shared"]),
        lambda v: v["links"].update({"experts/nobody": "../x"}),
        lambda v: v["links"].update({"tokenizer.json": "../x"}),
        lambda v: v["links"].update({"experts/code/params": "../x"}),
    ],
)
def test_a_model_with_links_says_so_exactly(linked, change):
    rewrite(linked, lambda v: change(v) and None)
    assert {p.code for p in verify(linked)} == {"manifest-schema"}


def test_a_copy_cannot_claim_links_and_a_slice_has_none(world):
    copied = world.root / "models/copied"
    rewrite(copied, lambda v: v.update(links={"shared": "../../anchor/shared"}))
    assert {p.code for p in verify(copied)} == {"manifest-schema"}
    rewrite(world.root / "slices/code", lambda v: v.update(schema=2, links={}))
    assert {p.code for p in verify(world.root / "slices/code")} == {"manifest-schema"}


def test_a_stranger_s_links_open_nothing_but_the_slice_that_is_named(world, linked, tmp_path):
    """Sealed by an attacker: other directories, a pipe, a file."""
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dir").mkdir()
    for name in ("file", "pipe", "dir", "w/slices/math", "w/anchor"):
        link = os.path.relpath(tmp_path / name, linked)
        rewrite(linked, lambda v, link=link: v["links"].update({"experts/code": link}))
        assert verify(linked), name
        assert problems_of(model_dir.load_model, linked), name


def test_nothing_is_linked_that_is_no_directory_of_its_own(world, linked, tmp_path, monkeypatch):
    plan = stitch.plan(world.anchor.path, world.paths)
    with pytest.raises(ConfigError, match="cannot link"):
        stitch.execute(plan, world.root / "slices/code/../../slices", link=True)
    odd = tmp_path / "o\\dd"
    shutil.copytree(world.paths[0], odd)
    with pytest.raises(ConfigError, match="cannot link"):
        stitch.execute(stitch.plan(world.anchor.path, [odd]), tmp_path / "m", link=True)
    monkeypatch.setenv("FLEXOLMO_CACHE", str(world.root))
    with pytest.raises(ConfigError, match="in the cache"):
        stitch.execute(plan, tmp_path / "m", link=True)
    assert not (tmp_path / "m").exists()
    bad = world.root / "slices/code/params/w_up/0.0.0"
    bad.write_bytes(bad.read_bytes()[::-1])
    monkeypatch.delenv("FLEXOLMO_CACHE")
    (found,) = problems_of(stitch.execute, plan, tmp_path / "m", link=True)
    assert found.path == str(bad) and not (tmp_path / "m").exists()


def test_the_commands_know_both_ways(world, tmp_path, capsys):
    args = ["stitch", "--anchor", str(world.anchor.path)]
    args += [x for p in world.paths for x in ("--expert", str(p))]
    out = [*args, "--out", str(tmp_path / "m"), "--json", str(tmp_path / "j")]
    assert main([*out, "--link"]) == 0
    found = json.loads((tmp_path / "j").read_text())
    assert found["links"]["experts/news"] == "../w/slices/news"
    assert found["bytes_copied"] < 100 < found["bytes_checked"] and found["peak_host_gib"] > 0
    copied = model_info.read_info(world.root / "models/copied")
    assert found["digests"]["model_digest"] == copied.model_digest
    assert "must stay there" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "m"), "--json", str(tmp_path / "v")]) == 0
    assert json.loads((tmp_path / "v").read_text())["links"] == found["links"]
    assert "experts/news lies elsewhere: ../w/slices/news" in capsys.readouterr().out
    assert main(["verify", str(copied.path)]) == 0
    assert "elsewhere" not in capsys.readouterr().out
    assert main([*args, "--link", "--out", "s3://bucket/m"]) == 2
    assert manifest.is_link(found["links"]["shared"])

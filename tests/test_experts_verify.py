# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import numpy as np
import pytest
from damage import KINDS, damaged
from expert_helpers import make_anchor, make_world

from flexolmo_jax.cli.main import main
from flexolmo_jax.experts import stitch
from flexolmo_jax.experts.verify import verify


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("w"))
    stitch.execute(stitch.plan(world.anchor.path, world.paths), world.root / "model")
    return {"anchor": world.anchor.path, "slice": world.paths[0], "model": world.root / "model"}


@pytest.mark.parametrize("kind", ["anchor", "slice", "model"])
def test_every_kind_of_damage_is_found_and_named_and_nothing_else_is(folders, tmp_path, kind):
    folder = tmp_path / kind
    shutil.copytree(folders[kind], folder)
    assert verify(folder) == []
    rng = np.random.default_rng(7)
    for trial in range(120):
        with damaged(folder, rng, KINDS[trial % len(KINDS)]) as (how, touched):
            problems = verify(folder)
            named = " ".join(p.path for p in problems)
            assert any(name in named for name in touched), (how, touched, problems)
    assert verify(folder) == []


@pytest.mark.parametrize("kind", ["anchor", "slice", "model"])
def test_the_command_says_whole(folders, tmp_path, kind, capsys):
    assert main(["verify", str(folders[kind]), "--json", str(tmp_path / "j")]) == 0
    result = json.loads((tmp_path / "j").read_text())
    assert (result["ok"], result["problems"]) == (True, [])
    assert all(d.startswith("sha256:") for d in result["digests"].values())
    assert ": whole" in capsys.readouterr().out


def test_the_command_exits_3_and_names_the_first_bad_file(folders, tmp_path, capsys):
    shutil.copytree(folders["model"], tmp_path / "m")
    victim = tmp_path / "m" / "experts" / "math" / "params" / "w_up" / "0.0.0"
    victim.write_bytes(victim.read_bytes()[::-1])
    assert main(["verify", str(tmp_path / "m"), "--json", str(tmp_path / "j")]) == 3
    (problem,) = json.loads((tmp_path / "j").read_text())["problems"]
    assert problem["code"] == "file-digest"
    assert problem["path"] == str(victim)
    assert set(problem) == {"code", "path", "leaf", "message"}
    error = capsys.readouterr().err
    assert str(victim) in error
    assert "Traceback" not in error


def test_what_is_no_model_exits_3(tmp_path):
    assert main(["verify", str(tmp_path)]) == 3
    assert main(["verify", str(tmp_path / "none")]) == 3


# Broken once: the command raised before it wrote the finding that scripts read.
def test_what_is_no_model_is_a_finding_for_machines_too(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "none"), "--json", str(tmp_path / "j")]) == 3
    found = json.loads((tmp_path / "j").read_text())
    assert not found["ok"]
    assert found["problems"]
    assert "it has no flexolmo.json" in capsys.readouterr().err


def test_a_name_without_a_folder_is_a_path_too(tmp_path, monkeypatch):
    """Mutation: the parent of the parent asked for its name before it is known to have one."""
    make_anchor(tmp_path / "anchor")
    monkeypatch.chdir(tmp_path)
    assert verify("anchor") == []
    assert [p.code for p in verify("nowhere")] == ["file-missing"]

# SPDX-License-Identifier: Apache-2.0
"""Benchmark questions put to the methods of a study: the same as asking their directories."""

import dataclasses

import data_helpers
import pytest
import stitched_model

from experiments import studies
from flexolmo_jax.experts import model_dir
from flexolmo_jax.study import judge, page, rivals, tables
from flexolmo_jax.study.design import Owner
from flexolmo_jax.tasks import catalog, runner, sources
from flexolmo_jax.tasks.example import Example

# Its score is a number of bits: whatever changes a model changes it.
TASK = "gsm8k:bpb"
OWNERS = ("code", "news")
STUDY = dataclasses.replace(
    studies.get_study("quick=true"),
    closed=OWNERS,
    owners={d: Owner(d) for d in OWNERS},
    orders={},
    tasks=(TASK,),
    questions=4,
)


def questions(_task, *, data=None, limit=None, root=None):
    del data, root
    words = [data_helpers.words(n) for n in range(20)]
    examples = [Example(str(i), words[2 * i], (" " + words[2 * i + 1],), 0) for i in range(10)]
    return sources.sample(examples, limit)


class FakeJudge:
    """A judge whose only recipe is a stitched model, and whose other models are its anchor."""

    seed, at, study = 0, None, STUDY

    def __init__(self, root):
        self.info, self.anchor, _ = model_dir.load_model(root / "anchor")
        info, params, _ = model_dir.load_model(root / "stitched")
        whole = judge.Mixture(params["shared"], params["experts"], info.config)
        self.recipes = dict.fromkeys(STUDY.recipes, whole)
        self.dense = dict.fromkeys(("public", *OWNERS), self.anchor)
        self.said = []

    def trained_together(self, _run, _start):
        return self.recipes["ours"]

    def say(self, text):
        self.said.append(text)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.sources, "load", questions)
    stitched_model.write(tmp_path, max_len=96, active=2)
    fake = FakeJudge(tmp_path)

    class At:
        def run(self, *_):
            return tmp_path

    fake.at = At()
    monkeypatch.setattr(judge.weights, "final", lambda _: fake.anchor)
    return tmp_path, fake


# Broken once by asking every mixture with the number of active experts in its architecture.
def test_a_method_answers_as_its_directory_does(asked):
    root, fake = asked
    owned = ("dense-public", *(f"dense-{o}" for o in OWNERS), "soup")
    active = dict.fromkeys(("anchor", *owned), 1) | {"ours": 3, "paper": 1}
    active |= dict.fromkeys(("btx", "unrestricted-data", "unrestricted-flops"), 2)
    chosen = {name: (rivals.Method({}, k), "") for name, k in active.items()}
    found = judge._answered(fake, chosen)
    assert found.keys() == active.keys()
    primary = catalog.TASKS[TASK].primary_metric
    for name, folder, active in (
        ("anchor", "anchor", 1),
        ("ours", "stitched", 3),
        ("paper", "stitched", 1),
    ):
        want = runner.evaluate(root / folder, [TASK], active=active, limit=4)["tasks"][TASK]
        assert found[name] == {TASK: want["metrics"][primary]}
        assert found[name][TASK]["n"] == 4
    assert found["ours"][TASK]["value"] != found["paper"][TASK]["value"]
    assert len(fake.said) == len(found)


def test_tasks_have_a_table():
    estimate = {"mean": 0.5, "stderr": None, "n": 1}
    summary = {
        "anchor": {"tasks": {TASK: estimate}},
        "ours": {"tasks": {TASK: {**estimate, "mean": 0.6}}},
        "btm-1": {"tasks": {}},
    }
    assert tables.tasks({"summary": summary}).splitlines()[2:] == [
        "| ours | 0.600 | 0.600 |",
        "| anchor | 0.500 | 0.500 |",
    ]
    ((_, says, _),) = page._tasks(STUDY, {"summary": summary})
    assert "at most 4 questions" in says and "up to 0.25" in says
    assert page._tasks(dataclasses.replace(STUDY, tasks=()), {}) == []

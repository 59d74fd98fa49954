# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a model on disk: results, kept scores, resuming, sweeps, errors."""

import io
import json
import shutil

import data_helpers
import expert_helpers
import numpy as np
import pytest
import stitched_model
import task_files

from flexolmo_jax import assets, inference
from flexolmo_jax.cli import eval as cli_eval
from flexolmo_jax.cli import main as cli
from flexolmo_jax.errors import ConfigError, DataError
from flexolmo_jax.experts import model_info, stitch
from flexolmo_jax.tasks import catalog, metrics, runner, scorefile, scoring, sources, table
from flexolmo_jax.tasks.example import Example

TASK, OTHER, SUITE = "arc_easy", "gsm8k:bpb", "math2"
BATCH = 256


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A stitched model of an anchor and two experts, and held-out text of one domain."""
    root = tmp_path_factory.mktemp("runner")
    stitched_model.write(root, max_len=96, active=2)
    return root


def questions(task, count=12):
    """Questions of made-up words after shared examples, with PMI requests where the task has."""
    rng = np.random.default_rng(len(task.name))

    def text(n):
        return data_helpers.words(int(rng.integers(0, 10_000)))[:n].strip() or "bade"

    examples, out = text(60), []
    for number in range(count):
        choices = tuple(" " + text(n) for n in (6, 14, 9))[: 1 if task.form == "bpb" else 3]
        gold = int(rng.integers(0, len(choices)))
        alone = "do" if "acc_uncond" in task.metrics else None
        out.append(Example(str(number), f"{examples}\n{text(25)}", choices, gold, alone))
    return out


@pytest.fixture(autouse=True)
def toy_questions(monkeypatch):
    def load(task, *, data=None, limit=None, root=None):
        return sources.sample(questions(task), limit)

    monkeypatch.setattr(runner.sources, "load", load)


def evaluate(root, names=(TASK,), **options):
    return runner.evaluate(root / "stitched", list(names), batch_tokens=BATCH, **options)


def timeless(value):
    """A result without what the clock says."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def test_a_result_holds_every_metric_of_every_task_and_suite(root):
    found = evaluate(root, [TASK, SUITE], deny=["news"], limit=5)
    assert found["allowed"] == ["public", "code"] and found["active"] == 2
    assert list(found["tasks"]) == [TASK, *(t.name for t in catalog.expand([SUITE]))]
    m = inference.open_model(root / "stitched", deny=["news"])
    examples = sources.sample(questions(catalog.TASKS[TASK]), 5)
    scores = task_files.scores_of(m, examples, batch_tokens=BATCH)
    want = metrics.evaluate(catalog.TASKS[TASK], examples, scores)
    assert found["tasks"][TASK]["metrics"] == want
    assert set(want) == set(catalog.TASKS[TASK].metrics)
    figures = {name: task["metrics"] for name, task in found["tasks"].items()}
    assert found["suites"][SUITE]["metrics"] == metrics.aggregate(SUITE, figures)
    json.dumps(found)
    text = table.render(found)
    assert all(word in text for word in (TASK, SUITE, "acc_per_char", "macro", "public, code"))


class Stop:
    """A report that interrupts after some batches."""

    def __init__(self, after):
        self.left = after

    def __call__(self, step):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def entries(folder):
    return [json.loads(x) for p in sorted(folder.iterdir()) for x in p.read_text().splitlines()]


# Broken once by writing scores when the task is whole, and once by not cutting a torn line off.
def test_an_interrupted_evaluation_goes_on_to_the_same_bits(root, tmp_path, monkeypatch):
    names = [TASK, OTHER]
    whole = evaluate(root, names, scores=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(root, names, scores=tmp_path / "cut", report=Stop(1))
    (file,) = (tmp_path / "cut").iterdir()
    kept = len(file.read_text().splitlines())
    assert kept > 2
    with file.open("a") as f:
        f.write('{"key": "torn off in the mid')
    steps = []
    again = evaluate(root, names, scores=tmp_path / "cut", report=steps.append)
    assert timeless(again) == timeless(whole)

    def order(rows):
        return sorted(json.dumps(row, sort_keys=True) for row in rows)

    assert order(entries(tmp_path / "cut")) == order(entries(tmp_path / "whole"))
    first = [s for s in steps if s.task == TASK]
    assert first and first[-1].done == first[-1].questions > first[-1].fresh > 0

    def none(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(scoring, "scored", none)
    assert timeless(evaluate(root, names, scores=tmp_path / "cut")) == timeless(whole)


# Broken once by naming the file of scores by the task alone.
def test_scores_of_other_settings_are_not_taken_over(root, tmp_path):
    options = {"scores": tmp_path, "limit": 3}
    for change in ({}, {"deny": ["news"]}, {"active": 1}):
        assert timeless(evaluate(root, **options, **change)) == timeless(
            evaluate(root, limit=3, **change)
        )
    other = root / "slices" / "other"
    if not other.exists():
        expert_helpers.make_slice(other, model_info.read_info(root / "anchor"), "news", 7)
        paths = [root / "slices/code", other]
        stitch.execute(stitch.plan(root / "anchor", paths, active=2), root / "other")
    kept = len(list(tmp_path.iterdir()))
    runner.evaluate(root / "other", [TASK], batch_tokens=BATCH, **options)
    assert len(list(tmp_path.iterdir())) == kept + 1 == 4


def test_a_damaged_file_of_scores_is_named(root, tmp_path):
    evaluate(root, scores=tmp_path, limit=2)
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "nonsense", *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=r"jsonl:2.*remove"):
        evaluate(root, scores=tmp_path, limit=2)
    file.write_text("\n".join(["{}", *lines[1:]]) + "\n")
    with pytest.raises(DataError, match="jsonl:1"):
        evaluate(root, scores=tmp_path, limit=2)
    file.write_text(lines[0][:10])
    evaluate(root, scores=tmp_path, limit=2)
    assert file.read_text().splitlines()[0] == lines[0]
    assert scorefile.request_key(([1, 2], [3])) != scorefile.request_key(([1], [2, 3]))


# Broken once by sweeping the masks with the number of active experts clamped for each.
def test_a_sweep_over_subsets_is_separate_runs_bit_for_bit(root, monkeypatch):
    opened = []
    load = inference.open_model

    def open_model(*args, **kwargs):
        opened.append(1)
        return load(*args, **kwargs)

    monkeypatch.setattr(inference, "open_model", open_model)
    names = [TASK, "bpb"]
    options = {"limit": 4, "data": root / "data", "n_rows": 2}
    found = evaluate(root, names, sweep="subsets", **options)
    assert len(opened) == 1
    sets = [s["allowed"] for s in found["settings"]]
    assert sets == [["public", "code", "news"], ["public", "code"], ["public", "news"], ["public"]]
    for setting in found["settings"]:
        alone = timeless(evaluate(root, names, allow=setting["allowed"], **options))
        assert alone.pop("digests") == found["digests"]
        assert alone.pop("trained_together") == found["trained_together"] == ""
        assert timeless(setting) == alone
    assert len({s["tasks"][TASK]["metrics"]["bpb"]["value"] for s in found["settings"]}) == 4
    text = table.render(found)
    assert "public+code+news" in text and "bpb wiki" in text and len(text.splitlines()) == 5


def test_a_sweep_over_the_number_of_active_experts(root):
    found = evaluate(root, sweep="k", deny=["news"], limit=4)
    assert [(s["active"], s["allowed"]) for s in found["settings"]] == [
        (1, ["public", "code"]),
        (2, ["public", "code"]),
    ]
    for setting in found["settings"]:
        alone = evaluate(root, deny=["news"], active=setting["active"], limit=4)
        assert timeless(setting["tasks"]) == timeless(alone["tasks"])


def test_many_owners_are_swept_in_few_settings(root):
    m = inference.open_model(root / "anchor")
    owners = {name: i for i, name in enumerate(("public", *"abcdef"))}
    config = m.config.replace(n_slots=7)
    many = inference.OpenModel(
        info=type(m.info)(**{**vars(m.info), "config": config}),
        runtime=m.runtime,
        slots=owners,
        shared=m.shared,
        group=m.group,
    )
    sets = ["".join(s.experts[1:]) for s in runner._settings(many, "subsets", 2)]
    assert sets[:3] == ["abcdef", "bcdef", "acdef"] and sets[-2:] == ["f", ""]
    assert len(sets) == len(set(sets)) == 14


def test_no_file_of_a_denied_expert_is_opened(root, tmp_path):
    """Its files are empty here."""
    copy = tmp_path / "without"
    shutil.copytree(root / "stitched", copy)
    for file in (copy / "experts/news").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    found = runner.evaluate(copy, [TASK], deny=["news"], limit=3, batch_tokens=BATCH)
    assert timeless(found) == timeless(evaluate(root, deny=["news"], limit=3))


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["arc_esy"], {}, "arc_easy"),
        (["bpd"], {}, "bpb"),
        (["mlu"], {}, "mmlu"),
        ([], {}, "No task"),
        (["bpb"], {}, "--data"),
        ([TASK], {"sweep": "subset"}, "subsets"),
        ([TASK], {"sweep": "k", "active": 1}, "--active"),
        ([TASK], {"active": 9}, "1..3"),
        ([TASK], {"allow": ["cod"]}, "code"),
        ([TASK], {"batch_tokens": -1}, "--batch-tokens"),
        (["bpb"], {"data": "data", "limit": 0}, "--limit"),
        (["bpb"], {"data": "data", "n_rows": -1}, "--rows"),
        (["bpb"], {"data": "data", "seq_len": -5}, "--seq-len"),
        (["bpb"], {"data": "data", "seq_len": 97}, "1..96"),
        ([TASK], {"scores": "tokenizer.json"}, "--scores"),
    ],
)
def test_what_cannot_be_run_is_refused(root, names, options, words):
    for name in {"data", "scores"} & set(options):
        options = options | {name: root / options[name]}
    with pytest.raises(ConfigError, match=words):
        runner.evaluate(root / "stitched", names, **options)


def test_the_command_writes_results_and_progress(root, tmp_path, capsys):
    out = tmp_path / "eval.json"
    args = ["eval", "--model", str(root / "stitched"), "--tasks", f"{TASK},bpb", "--limit", "3"]
    args += ["--data", str(root / "data"), "--rows", "2", "--json", str(out)]
    assert cli.main([*args, "--scores", str(tmp_path / "scores")]) == 0
    found = json.loads(out.read_text())
    assert found["command"] == "eval" and found["schema"] and found["seconds"] > 0
    figure = found["tasks"][TASK]["metrics"]["acc_raw"]
    assert set(figure) == {"value", "stderr", "n"} and figure["n"] == 3
    assert set(found["bpb"]["wiki"]) >= {"value", "stderr", "bytes"}
    screen = capsys.readouterr()
    assert "acc_per_char" in screen.out and "wiki" in screen.out
    assert f"{TASK} (public+code+news k=2): 3 of 3 questions" in screen.err
    assert cli.main([*args, "--sweep", "k", "--active", "1"]) == 2


def step(**changes):
    facts = {"task": TASK, "setting": "public k=1", "number": 1, "count": 2, "done": 5}
    facts |= {"questions": 10, "fresh": 4.0, "seconds": 2.0, "left_s": 61.0}
    return runner.Step(**(facts | changes))


def test_progress_is_one_line_that_is_written_over(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    stream = Screen()
    line = cli_eval.Line(stream)
    line(step())
    line.end()
    line(step(done=10))
    line.end()
    text = stream.getvalue()
    assert "5 of 10 questions, 2.0/s, about 1 min 01 s left\n" in text
    assert text.endswith("10 of 10 questions, 2.0/s, 2 s\n") and text.count("\r") == 2


@pytest.mark.assets
@pytest.mark.skipif(bool(assets.missing(["eval"])), reason="assets are not installed")
def test_real_questions_end_to_end(root, monkeypatch):
    monkeypatch.undo()
    found = evaluate(root, [TASK], limit=2)
    assert found["tasks"][TASK]["metrics"]["acc_raw"]["n"] == 2
    assert found["tasks"][TASK]["truncated"] > 0

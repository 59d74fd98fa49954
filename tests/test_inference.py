# SPDX-License-Identifier: Apache-2.0
"""An opened model: what prompts become, an allowed set for each prompt, and held-out sets."""

import dataclasses

import numpy as np
import pytest
import stitched_model

from flexolmo_jax import inference, sample
from flexolmo_jax.cli import main as cli
from flexolmo_jax.data import tokenize
from flexolmo_jax.errors import ConfigError, DataError
from flexolmo_jax.tasks import runner

ANSWER = sample.SampleConfig(max_new_tokens=6)
PROMPTS = ["bade do", "miku nara pol"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A stitched model of three untrained experts, and held-out text of one domain."""
    root = tmp_path_factory.mktemp("inference")
    stitched_model.write(root, max_len=32, active=3)
    return root


@pytest.fixture(scope="module")
def opened(root):
    return inference.open_model(root / "stitched")


def test_a_prompt_does_not_end_its_document(opened, monkeypatch):
    """Mutation: `end=True`, which asked for the first token of another document."""
    seen = []

    def generate(*args, **kwargs):
        seen.extend(args[4])
        return [sample.Generation([], np.zeros(3)) for _ in args[4]]

    monkeypatch.setattr(inference.sample, "generate", generate)
    inference.generate_text(opened, PROMPTS, sampling=ANSWER)
    assert seen == [opened.tokenizer.encode(p).ids for p in PROMPTS]
    assert tokenize.eos_id(opened.tokenizer) not in np.concatenate(seen)


def test_a_row_is_not_limited_by_its_neighbours(opened):
    """Mutation: active experts clamped to the smallest allowed set of the batch."""
    sets = np.stack([opened.allowed(), opened.allowed(["public"])])
    together = inference.generate_text(opened, PROMPTS, allowed=sets, sampling=ANSWER)
    for row, prompt in enumerate(PROMPTS):
        (alone,) = inference.generate_text(opened, [prompt], allowed=sets[row], sampling=ANSWER)
        assert together[row] == alone
    served = together[0]["tokens_per_expert"]
    assert served["public"] == served["code"] == served["news"] > 0
    assert together[1]["tokens_per_expert"]["code"] == 0


# Broken once by taking an empty list for none, which denied nobody.
@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize("option", ["--deny", "--allow"])
@pytest.mark.parametrize("text", ["", ",", "+"])
def test_a_list_without_names_is_refused(root, capsys, command, option, text):
    given = ["--prompt", "bade"] if command == "generate" else ["--data", str(root / "data")]
    assert cli.main([command, "--model", str(root / "stitched"), option, text, *given]) == 2
    assert f"names none. Expected: one or more of public, code, news. Where: {option[2:]}" in (
        capsys.readouterr().err
    )


def test_lists_that_are_given_twice_add_up():
    """Broken once: the last list alone counted, and let in whom the first had denied."""
    _, _, args = cli.parse(["eval", "--model", "m", "--deny", "a,b", "--deny", "c"])
    assert args.deny == ["a", "b", "c"] and args.allow is None


@pytest.mark.parametrize("names", [{"deny": []}, {"allow": ()}])
def test_a_request_without_names_is_refused(root, opened, names):
    with pytest.raises(ConfigError, match="names none"):
        opened.allowed(**names)
    with pytest.raises(ConfigError, match="names none"):
        inference.open_model(root / "stitched", **names)


def test_wider_prompts_are_continued_alike(opened):
    """Mutation: the first new token stands behind the padding; or `width` does nothing."""
    ids = [opened.tokenizer.encode(p).ids for p in PROMPTS]
    m = (opened.config, opened.runtime, opened.shared, (opened.group,))
    plain = sample.generate(*m, ids, sampling=ANSWER)
    programs = sample._run._cache_size()
    for prompts in (ids, [ids[0], ids[1][:-1]]):
        wide = sample.generate(*m, prompts, sampling=ANSWER, width=20)
        assert sample._run._cache_size() == programs + 1
        if prompts is ids:
            assert [row.ids for row in wide] == [row.ids for row in plain]


# Broken once by handing the layers over in reverse order.
def test_matrices_laid_apart_give_the_same_answers(opened):
    m, ids = opened, [[3, 4, 5], [7, 8, 9, 10, 11]]
    allowed = np.stack([opened.allowed(), opened.allowed(deny=["news"])])

    def answers(decode):
        run = dataclasses.replace(m.runtime, decode=decode)
        made = sample.generate(
            m.config, run, m.shared, (m.group,), ids, allowed_BE=allowed, sampling=ANSWER
        )
        return [(a.ids, a.tokens_per_slot.tolist()) for a in made]

    assert answers("split") == answers("stacked")
    assert sample.splits(dataclasses.replace(m.runtime, decode="split"), ANSWER)
    long = dataclasses.replace(ANSWER, max_new_tokens=sample.SPLIT_TOKENS)
    auto = dataclasses.replace(m.runtime, decode="auto")
    assert (sample.splits(auto, ANSWER), sample.splits(auto, long)) == (False, True)


@pytest.mark.parametrize("active", [0, 4])
def test_active_experts_must_fit_the_model(opened, active):
    with pytest.raises(ConfigError, match="--active"):
        inference.generate_text(opened, PROMPTS, active=active, sampling=ANSWER)


def test_rows_are_as_long_as_asked(opened, root):
    """Mutation: seq_len not passed on."""
    heldout = root / "data/wiki/heldout"
    scores = [
        inference.score_domain(opened, heldout, allowed=opened.allowed(), n_rows=2, seq_len=length)
        for length in (0, 16)
    ]
    # A document fills the rows, so all positions but those that start one are predicted.
    assert scores[0].tokens > 1.5 * scores[1].tokens > 0


def test_rows_of_a_long_context_are_cut(opened, root, monkeypatch):
    """Mutations: rows as long as the context; sixteen rows whatever their length."""
    shapes = []
    batches = inference.loader.heldout_batches

    def seen(path, rows, *, seq_len, **options):
        shapes.append((rows, seq_len))
        return batches(path, rows, seq_len=seq_len, **options)

    monkeypatch.setattr(inference.loader, "heldout_batches", seen)
    monkeypatch.setattr(inference, "ROW_TOKENS", 16)
    monkeypatch.setattr(inference, "BATCH_TOKENS", 40)
    for options in ({}, {"seq_len": 8}, {"seq_len": 64}, {"batch_rows": 3}):
        inference.score_domain(
            opened, root / "data/wiki/heldout", allowed=opened.allowed(), n_rows=2, **options
        )
    assert shapes == [(2, 16), (5, 8), (1, 64), (3, 16)]


def test_evaluation_reports_per_domain_and_names_the_sets(root):
    found = runner.evaluate(root / "stitched", ["bpb"], data=root / "data", deny=["news"], n_rows=2)
    assert found["allowed"] == ["public", "code"] and found["active"] == 2
    assert set(found["bpb"]) == set(found["routing"]) == {"wiki"}
    assert sum(found["routing"]["wiki"].values()) == pytest.approx(1)
    assert inference.heldout_sets(root / "data/wiki/heldout").keys() == {"wiki"}
    with pytest.raises(DataError, match="prepare"):
        inference.heldout_sets(root / "slices")

# SPDX-License-Identifier: Apache-2.0
"""The model `flexolmo` inside lm-evaluation-harness (skipped where that is not installed)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import data_helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stitched_model
import task_files

from flexolmo_jax import inference, model
from flexolmo_jax.data import tokenize
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.tasks import catalog, lm_eval_link, lm_eval_tasks, metrics, sources
from flexolmo_jax.tasks.example import Example

pytest.importorskip("lm_eval")

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
QUESTIONS = 12


def question(number):
    """A question with four choices of different length, and braces that are no template."""
    text = data_helpers.words(number, 4)
    choices = tuple(" " + data_helpers.words(100 * number + i, i + 1) for i in range(4))
    context = f"Question: {text} {{{{x}}}}\nAnswer:"
    # The first choice is mostly the likeliest, but not per character.
    return Example(f"{number}:q", context, choices, (0, 0, 3)[number % 3], "Answer:")


def pair(number):
    """A question whose choices stand in the context."""
    contexts = tuple(data_helpers.words(10 * number + i, 3) for i in range(2))
    return Example(f"{number}:p", contexts[0], (" bado",) * 2, number % 2, None, contexts)


EXAMPLES = {
    "hellaswag": [question(i) for i in range(QUESTIONS)],
    "winogrande": [pair(i) for i in range(QUESTIONS)],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return stitched_model.write(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Task files of `EXAMPLES`."""
    root = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "load", lambda task, **options: EXAMPLES[task.name])
        lm_eval_tasks.write(list(EXAMPLES), root / "files")
    return root / "files"


@pytest.fixture(scope="module")
def build(path):
    """A function from model arguments to the model, by the harness' own table."""
    lm_eval_link.register()
    from lm_eval.api.registry import get_model

    def build(**arguments):
        rows = arguments.pop("batch_size", "1")
        extra = {"batch_size": rows, "max_batch_size": None, "device": "cuda:0"}
        return get_model("flexolmo").create_from_arg_obj({"path": str(path)} | arguments, extra)

    return build


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


def plain_logprobs(m, context, continuation, allowed=None):
    """Log-probabilities of a continuation's tokens by one forward pass over one row."""
    ids = [*context, *continuation]
    hidden = model.forward(
        m.config,
        m.runtime,
        m.shared,
        (m.group,),
        jnp.asarray([ids[:-1]]),
        segments_BT=jnp.ones((1, len(ids) - 1), jnp.int32),
        allowed_BE=jnp.asarray([m.allowed() if allowed is None else allowed]),
    ).hidden_BTD
    logprobs = jax.nn.log_softmax(model.unembed(m.config, m.shared, hidden)[0])
    at = np.arange(len(context) - 1, len(ids) - 1)
    return np.asarray(logprobs)[at, continuation], np.asarray(logprobs)[at].argmax(-1)


@pytest.fixture(scope="module")
def command(path, tasks, tmp_path_factory):
    """Results and samples of the harness' command, started under its own name after `link`."""
    root = tmp_path_factory.mktemp("command")
    # The line that Python runs at the start of every program of a linked environment.
    start = lm_eval_link.LINE + "from lm_eval.__main__ import cli_evaluate\ncli_evaluate()\n"
    (root / "lm_eval").write_text(start)
    arguments = ["--model", "flexolmo", "--model_args", f"path={path},allow=public+code,active=2"]
    arguments += ["--tasks", "olmes_hellaswag,olmes_winogrande", "--include_path", str(tasks)]
    arguments += ["--output_path", str(root / "out"), "--log_samples"]
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT), "HF_HOME": str(root / "home")}
    done = subprocess.run(
        [sys.executable, str(root / "lm_eval"), *arguments],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (root / "out").glob("*/results_*.json")
    samples = {}
    for name in EXAMPLES:
        (file,) = results.parent.glob(f"samples_olmes_{name}_*.jsonl")
        samples[name] = [json.loads(row) for row in file.read_text().splitlines()]
    return json.loads(results.read_text()), samples


@pytest.fixture(scope="module")
def ours(path):
    """Scores of the same questions by the engine behind `flexolmo eval --tasks`."""
    m = inference.open_model(path, allow=["public", "code"])
    return {
        name: task_files.scores_of(m, examples, n_active=2) for name, examples in EXAMPLES.items()
    }


def _metrics_of(name, ours):
    return metrics.evaluate(catalog.TASKS[name], EXAMPLES[name], ours[name])


def test_the_command_gives_our_metrics(command, ours):
    """Mutation: the names of the two accuracies exchanged, or another choice counted as right."""
    results, _ = command
    expected = _metrics_of("hellaswag", ours)
    assert expected["acc_raw"]["value"] != expected["acc_per_char"]["value"]
    for name in EXAMPLES:
        expected = _metrics_of(name, ours)
        found = results["results"][f"olmes_{name}"]
        known = [m for m in lm_eval_tasks.METRICS if f"{lm_eval_tasks.METRICS[m]},none" in found]
        assert known == (["acc_raw"] if name == "winogrande" else ["acc_raw", "acc_per_char"])
        for metric in known:
            theirs = lm_eval_tasks.METRICS[metric]
            assert found[f"{theirs},none"] == pytest.approx(expected[metric]["value"])
            assert found[f"{theirs}_stderr,none"] == pytest.approx(expected[metric]["stderr"])


def test_every_choice_has_our_log_probability(command, ours):
    """Mutation: a delimiter before the choices."""
    _, samples = command
    for name, rows in samples.items():
        assert len(rows) == QUESTIONS
        for row, score in zip(rows, ours[name], strict=True):
            found = [(float(logprob), greedy) for logprob, greedy in row["filtered_resps"]]
            assert [f[0] for f in found] == pytest.approx(score.logprob, abs=1e-4)
            assert [str(f[1]) for f in found] == [str(g) for g in score.greedy]


def test_the_results_name_the_experts(command):
    results, _ = command
    assert results["config"]["experts"] == ["public", "code"] and results["config"]["active"] == 2
    assert results["config"]["model_digest"].startswith("sha256:")


@pytest.mark.parametrize(
    "arguments", [{}, {"deny": "news"}, {"allow": "public+news"}, {"allow": ["public"]}]
)
def test_log_probabilities_are_those_of_a_plain_pass(build, arguments):
    """Mutation: the allowed set is not passed on."""
    lm = build(**arguments)
    m = lm.model
    context, continuation = "bado miku", " nara pol"
    ((found, _),) = lm.loglikelihood(instances("loglikelihood", (context, continuation)))
    whole = lm.tok_encode(context + continuation)
    at = len(lm.tok_encode(context))
    logprobs, _ = plain_logprobs(m, whole[:at], whole[at:])
    assert found == pytest.approx(float(logprobs.sum()), abs=1e-4)


def test_denied_experts_change_the_score(build):
    requests = instances("loglikelihood", ("bado miku", " nara pol"))
    found = [
        build(**arguments).loglikelihood(requests)[0][0]
        for arguments in ({}, {"deny": "code+news"}, {"allow": "public"}, {"active": 1})
    ]
    assert found[1] == found[2] and len({round(f, 4) for f in found}) == 3


def test_greedy_continuations_are_recognised(build):
    """Mutation: the second number of a result is always false."""
    lm = build()
    context = lm.tok_encode("bado miku")
    answer = []
    for _ in range(3):
        answer.append(int(plain_logprobs(lm.model, context, [*answer, 0])[1][-1]))
    other = [*answer[:-1], (answer[-1] + 1) % 256]
    found = lm._loglikelihood_tokens([(None, context, answer), (None, context, other)])
    assert [greedy for _, greedy in found] == [True, False]


def test_texts_are_scored_in_windows(build):
    """Mutation: only the first window; or the prefix token left out."""
    lm = build(max_length=16)
    text = data_helpers.words(3, 30)
    tokens = lm.tok_encode(text)
    assert len(tokens) > 32
    expected, seen = 0.0, [lm.prefix_token_id, *tokens]
    for start in range(0, len(tokens), 16):
        part = tokens[start : start + 16]
        # All windows are full; the last one repeats what it needs of the one before.
        begin = max(0, start + len(part) - 16)
        logprobs, _ = plain_logprobs(lm.model, seen[begin : start + 1], part)
        expected += float(logprobs.sum())
    short = plain_logprobs(lm.model, [lm.prefix_token_id], lm.tok_encode("bado"))[0].sum()
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("bado",)))
    assert found == pytest.approx([expected, float(short)], abs=1e-3)


def test_answers_are_those_of_generate(build, path):
    """Mutation: contexts cut on the right, or answers in another order than requests."""
    lm = build(active=2)
    prompts = [data_helpers.words(i, count) for i, count in enumerate((1, 4, 2))]
    long = data_helpers.words(9, 40)
    options = {"until": ["zz"], "max_gen_toks": 8}
    requests = instances("generate_until", *((p, options) for p in [*prompts, long]))
    requests += instances("generate_until", (prompts[0], {"max_gen_toks": 3}))
    found = lm.generate_until(requests)
    m = inference.open_model(path)
    sampling = inference.sample.SampleConfig(max_new_tokens=8)
    expected = inference.generate_text(m, prompts, active=2, sampling=sampling)
    assert found[:3] == [row["text"] for row in expected]
    ids = lm.tok_encode(long)[-(lm.max_length - 8) :]
    (cut,) = inference.sample.generate(
        m.config,
        m.runtime,
        m.shared,
        (m.group,),
        [ids],
        n_active=2,
        sampling=inference.sample.SampleConfig(8, eos_id=lm.eot_token_id),
    )
    assert found[3] == lm.tok_decode(cut.ids) and lm.get_model_info()["contexts_cut"] == 1
    assert found[0].startswith(found[4]) and found[4] != found[0]


def test_long_contexts_are_counted(build, caplog):
    lm = build(max_length=8)
    requests = instances("loglikelihood", (data_helpers.words(1, 9), " pol"), ("bado", " pol"))
    caplog.clear()
    lm.loglikelihood(requests)
    assert lm.get_model_info()["contexts_cut"] == 1
    assert "1 of 2 contexts" in caplog.text


def test_small_things_of_the_interface(build):
    lm = build(batch_tokens=64, max_gen_toks=5)
    assert lm.tok_decode(lm.tok_encode("bado miku")) == "bado miku"
    assert lm.eot_token_id == lm.prefix_token_id == tokenize.eos_id(lm.model.tokenizer)
    assert lm.max_length == 64 and lm.max_gen_toks == 5 and lm.batch_tokens == 64
    assert lm.loglikelihood(instances("loglikelihood", ("bado", ""))) == [(0.0, True)]
    ((after_nothing, _),) = lm.loglikelihood(instances("loglikelihood", ("", "bado")))
    logprobs, _ = plain_logprobs(lm.model, [lm.eot_token_id], lm.tok_encode("bado"))
    assert after_nothing == pytest.approx(float(logprobs.sum()), abs=1e-4)
    assert build(batch_size="4").batch_tokens == 4 * 64
    with pytest.raises(ConfigError, match="chat template"):
        lm.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"allow": "public", "deny": "code"}, "not both"),
        ({"deny": "cod"}, "did you mean 'code'"),
        ({"deny": ""}, "names none"),
        ({"alow": "code"}, "did you mean 'allow'"),
        ({"active": 9}, "active"),
        ({"active": "two"}, "active"),
        ({"max_length": 65}, "max_length"),
        ({"max_gen_toks": 64}, "max_gen_toks"),
        ({"path": ""}, "No model"),
    ],
)
def test_wrong_arguments_are_named(build, arguments, match):
    with pytest.raises(ConfigError, match=match):
        build(**arguments)


def test_an_answer_needs_room_for_its_prompt(build):
    with pytest.raises(ConfigError, match="no room"):
        build().generate_until(instances("generate_until", ("bado", {"max_gen_toks": 64})))

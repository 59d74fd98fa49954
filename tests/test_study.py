# SPDX-License-Identifier: Apache-2.0
"""A study: its jobs, what is made of finished weights, its arithmetic and its page."""

import dataclasses
import json
import math
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from expert_helpers import make_anchor

from experiments import common, studies
from flexolmo_jax import configfile, evaluate, model, moe, router, stages, tree
from flexolmo_jax.cli import main as cli
from flexolmo_jax.cli import study as study_cli
from flexolmo_jax.config import AdapterConfig, ModelConfig
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.jobs.plan import order
from flexolmo_jax.study import (
    design,
    jobs,
    judge,
    mixing,
    page,
    rivals,
    rows,
    run,
    scorer,
    starts,
    summary,
    weights,
)
from flexolmo_jax.study.design import Owner

STUDY = dataclasses.replace(
    studies.get_study("seeds=2,quick=true"),
    public=("wiki",),
    closed=("code", "news"),
    unseen=("math",),
    owners={d: Owner(d) for d in ("code", "news")},
    orders={"as listed": ("code", "news")},
)


# --- Design and jobs ---------------------------------------------------------------------------


def test_a_folder_holds_one_study(tmp_path):
    design.write(STUDY, tmp_path)
    assert design.read(tmp_path, "main") == STUDY
    design.write(STUDY, tmp_path)
    with pytest.raises(ConfigError, match="other numbers"):
        design.write(dataclasses.replace(STUDY, batch_rows=3), tmp_path)
    assert design.read(tmp_path, "main") == STUDY
    more = dataclasses.replace(STUDY, seeds=5)
    design.write(more, tmp_path)
    assert design.read(tmp_path, "main") == more
    with pytest.raises(ConfigError, match="No study here"):
        design.read(tmp_path / "empty", "main")


@pytest.mark.parametrize(
    ("suite", "size"), [*((s, "tiny") for s in studies.SUITES), ("main", "60m"), ("main", "135m")]
)
def test_every_suite_is_a_plan_whose_jobs_can_run(suite, size, tmp_path):
    study = studies.get_study(f"suite={suite},seeds=2,size={size}")
    plan = jobs.plan(study, tmp_path, "assets")
    ordered = order(plan)
    recipes, owners = len(study.recipes), len(study.owners)
    trained = [j for j in ordered if j.name.startswith("train:")]
    tuned = sum(r.tuned for r in study.recipes.values())
    rivals = 4 * study.rivals + owners * study.dense  # public, two unions, btx; dense models
    assert len(trained) == 2 * (recipes * owners + tuned + rivals) + (not study.imported)
    assert {j.name for j in ordered if j.name.startswith("judge")} == {"judge:s0", "judge:s1"}
    for job in trained:
        config = jobs.EXPERIMENTS / job.command[5].partition(":")[0].rpartition("/")[2]
        settings = [c for c in job.command if c.startswith("--config.")]
        loaded = configfile.load_run_config(
            f"{config}:{job.command[5].partition(':')[2]}", settings
        )
        assert loaded.optim.last_step == loaded.optim.total_steps


def test_the_job_of_an_owner_is_given_no_other_owners_text(tmp_path):
    plan = jobs.plan(STUDY, tmp_path, "assets")
    for job in plan.jobs:
        kind = job.name.split(":")
        if kind[0] == "train" and kind[1] in (*STUDY.recipes, "dense"):
            text = " ".join((*job.command, *job.inputs))
            others = [d for d in STUDY.closed if d != kind[2]]
            assert not any(str(tmp_path / "data" / d) in text for d in others), job.name


def test_slices_that_are_stitched_are_renewed_with_the_experts(tmp_path):
    """What a job lists among its outputs is removed before it runs again."""
    layout = jobs.Layout(tmp_path, STUDY)
    made = {j.name: j.outputs for j in jobs.plan(STUDY, tmp_path, "assets").jobs}["models:s0"]
    tuned = [name for name, recipe in STUDY.recipes.items() if recipe.tuned]
    packaged = {str(layout.model(f"{name}-{o}", 0)) for name in tuned for o in STUDY.owners}
    assert packaged and packaged <= set(made)


def test_every_owner_trains_on_as_many_tokens_whatever_the_method(tmp_path):
    def steps(job):
        (found,) = [c for c in job.command if c.startswith("--config.optim.total_steps=")]
        return int(found.partition("=")[2])

    plan = jobs.plan(STUDY, tmp_path, "assets")
    by_kind = {}
    for job in plan.jobs:
        if job.name.startswith("train:"):
            by_kind.setdefault(":".join(job.name.split(":")[1:3]), set()).add(steps(job))
    each = STUDY.steps["owner"]
    owned = {f"{k}:{d}" for k in (*STUDY.recipes, "dense") for d in STUDY.closed}
    assert all(by_kind[name] == {each} for name in owned)
    assert by_kind["rival:union-data"] == {each * len(studies.CLOSED)}


def test_an_unknown_suite_names_the_nearest(tmp_path, capsys):
    assert cli.main(["study", "--suite", "mian", "--out", str(tmp_path / "s")]) == 2
    assert "main" in capsys.readouterr().err
    assert cli.main(["study", "--size", "tony", "--out", str(tmp_path / "s")]) == 2
    assert "tiny" in capsys.readouterr().err
    assert cli.main(["study", "--seeds", "0", "--out", str(tmp_path / "s")]) == 2
    assert not (tmp_path / "s").exists()


def test_a_study_refuses_what_is_no_anchor_before_any_job(tmp_path, capsys):
    out = ["--out", str(tmp_path / "s")]
    assert cli.main(["study", "--anchor", str(tmp_path / "nothing"), *out]) == 3
    assert "not a model that can be used" in capsys.readouterr().err
    anchor = make_anchor(tmp_path / "anchor")
    mixed = starts.upcycled(anchor.path, tmp_path / "m", ("a",), n_active=1, seed=0)
    assert cli.main(["study", "--anchor", str(mixed.path), *out]) == 2
    assert "starts from an anchor" in capsys.readouterr().err
    assert cli.main(["study", "--only", "judge", *out]) == 2
    assert "No study here" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


# --- What is made of weights -------------------------------------------------------------------

C = toy.config(n_slots=4, n_active=2)


def dense(seed):
    params = toy.params(C.replace(n_slots=1, n_active=1), seed)
    return jax.tree.map(np.asarray, params)


def test_a_soup_is_the_mean_of_each_leaf():
    models = [dense(0), dense(1), dense(2)]
    mean = weights.average(models)
    for name, leaf in tree.flatten(mean).items():
        parts = [tree.flatten(m)[name] for m in models]
        np.testing.assert_allclose(leaf, np.mean(parts, axis=0), atol=1e-6)
    one = weights.average(models, [0.0, 1.0, 0.0])
    assert tree.digests(one) == tree.digests(models[1])


def test_low_rank_experts():
    """Mutations: the decomposition of the expert instead of its difference; one rank too many."""
    public, expert = (slices.take_slot(dense(seed)["experts"], 0) for seed in (0, 1))
    cut = weights.low_rank(expert, public, (3, 10**6))
    for name in moe.WEIGHTS:
        np.testing.assert_allclose(cut[10**6][name], expert[name], atol=1e-5)
        u, s, v = np.linalg.svd(expert[name] - public[name], full_matrices=False)
        best = public[name] + (u[..., :3] * s[..., None, :3]) @ v[..., :3, :]
        np.testing.assert_allclose(cut[3][name], best, atol=1e-5)
        assert (np.linalg.matrix_rank(cut[3][name] - public[name], tol=1e-4) == 3).all()
    size = sum(expert[n].shape[0] * 3 * sum(expert[n].shape[1:]) for n in moe.WEIGHTS)
    assert weights.low_rank_size(expert, 3) == size + expert["router"].size + expert["bias"].size
    everything = sum(leaf.size for leaf in expert.values())
    assert weights.low_rank_size(expert, 10**6) == everything


def test_biases_are_set_by_how_often_an_expert_is_preferred():
    rng = np.random.default_rng(0)
    shift = np.array([3.0, -8.0])[:, None, None]
    logits_ELN = rng.normal(size=(2, 2, 5000)) + shift
    group = {"bias": np.zeros((2, 3), np.float32)}
    raw = rows.bias_at_rate(logits_ELN, group, 0.1)
    effective = np.asarray(jax.vmap(router.effective_bias)(raw))
    assert (raw[:, 0] == 0).all()
    share = [(logits_ELN[e] + effective[:, e + 1, None] > 0).mean(-1) for e in range(2)]
    np.testing.assert_allclose(share[0], 0.1, atol=0.002)
    # The second is preferred too seldom already: a bias cannot raise it.
    assert (share[1] == 0).all() and (np.abs(effective[:, 2]) < 1e-5).all()


# --- Scores ------------------------------------------------------------------------------------


def text_of(seed, n_rows=8):
    batch = jax.tree.map(
        np.asarray, toy.batch(rows=n_rows, length=16, seed=seed, vocab=C.vocab_size)
    )
    mask = batch["loss_mask"]
    size = np.where(mask, 1 + batch["targets"] % 4, 0)
    return mixing.Text(batch["tokens"], batch["targets"], batch["segments"], mask, size)


@pytest.fixture(scope="module")
def scoring():
    return scorer.Scorer(
        C.replace(n_slots=1, n_active=1), {"wiki": text_of(0), "code": text_of(1, 16)}
    )


def test_losses_are_those_of_evaluation(scoring):
    params = dense(0)
    losses = scoring.losses(params["shared"], params["experts"])
    for domain, text in scoring.texts.items():
        batch = {"tokens": text.tokens, "targets": text.targets}
        batch |= {"segments": text.segments, "loss_mask": text.mask}
        score = evaluate.score_text(
            scoring.config,
            model.Runtime("dense"),
            params["shared"],
            (params["experts"],),
            [batch],
            np.arange(C.vocab_size) % 4 + 1,
        )
        got = scoring.scores(losses)[domain]
        assert got.bits_per_byte == pytest.approx(score.bits_per_byte, rel=1e-5)
        assert got.stderr == pytest.approx(score.stderr, rel=1e-4)


def test_a_row_of_a_weighted_soup_has_the_weights_that_it_asks_for(scoring):
    """Mutation: the weights of the first row for all."""
    models = [dense(0), dense(1)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *models)
    share = np.tile([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.25, 0.75]], (2, 1))
    got = scoring.soup_losses(stacked, {"wiki": share}, ["wiki"])["wiki"]
    for row, weight in enumerate(share):
        mixed = weights.average(models, weight)
        expected = scoring.losses(mixed["shared"], mixed["experts"], domains=["wiki"])["wiki"]
        np.testing.assert_allclose(got[row], expected[row], atol=1e-4)


def test_leaving_is_exact_and_told_apart_from_not(scoring):
    """Mutation: the denied slot read for its weights."""
    anchor = dense(0)
    pieces = [slices.take_slot(dense(seed)["experts"], 0) for seed in (0, 1, 2)]
    mixture = judge.Mixture(anchor["shared"], weights.stacked(pieces), C)

    class Fake:
        study, part, seed = STUDY, scoring, 0

    found = judge.opt_out(Fake(), mixture, 2)
    assert found["exact"] == {"1": True, "2": True}
    assert found["checked"] == {"1": "code", "2": "code+news"}
    assert list(found["bpb"]) == ["", "code", "news", "code+news"]
    alone = scoring.bits(scoring.losses(anchor["shared"], anchor["experts"]))
    assert found["bpb"]["code+news"] == pytest.approx(alone, rel=1e-6)
    assert found["bpb"][""] != pytest.approx(alone, rel=1e-5)


def test_ffns_that_never_met_the_anchor_have_the_rows_of_those_that_did(scoring):
    owners = {"code": dense(1), "news": dense(2)}
    pieces = [slices.take_slot(dense(seed)["experts"], 0) for seed in (0, 3, 4)]

    class Fake:
        study, dense = STUDY, owners

    whole = judge.Mixture(dense(0)["shared"], weights.stacked(pieces), C)
    made = judge._uncoordinated(Fake(), whole)
    for name, leaf in made.group.items():
        np.testing.assert_array_equal(leaf[:, 0], whole.group[name][:, 0])
        for slot, model_ in enumerate(owners.values(), start=1):
            source = model_["experts"][name][:, 0] if name in moe.WEIGHTS else None
            expected = whole.group[name][:, slot] if source is None else source
            np.testing.assert_array_equal(leaf[:, slot], expected)


def test_training_flops():
    flops = {
        name: judge.train_flops(STUDY, C, name)
        for name in (
            "anchor",
            "ours",
            "paper",
            "paper-tuned",
            "paper-uncoordinated",
            "soup",
            "dense-code",
            "btx",
            "unrestricted-data",
        )
    }
    tokens, owners = STUDY.owner_tokens, len(STUDY.owners)
    one = C.replace(n_slots=1, n_active=1)
    each = stages.flops_per_token(one, "anchor", STUDY.seq_len)
    assert flops["anchor"] == 0 and flops["dense-code"] == tokens * each
    assert flops["soup"] == owners * tokens * each < flops["btx"]
    assert flops["paper-uncoordinated"] == flops["paper"] + flops["soup"]
    assert flops["ours"] < flops["paper-tuned"]
    real = studies.get_study()
    config = ModelConfig(**common.sizes()["tiny"])
    held = config.replace(adapters=real.recipes["ours"].adapters)
    ours = judge.train_flops(real, held, "ours")
    union = judge.train_flops(real, config, "unrestricted-flops")
    assert ours == pytest.approx(union, rel=0.01)
    assert flops["unrestricted-data"] > flops["soup"]


def test_rivals_cost_no_more_for_what_the_anchor_has_room_for():
    """Mutation: the anchor's own architecture for all."""
    roomy = C.replace(adapters=AdapterConfig(head=4))

    fake = types.SimpleNamespace(
        study=STUDY,
        info=types.SimpleNamespace(config=roomy),
        recipes={"ours": judge.Mixture({}, {}, roomy)},
    )

    def cost(name):
        config = judge.config_of(fake, name)
        method = rivals.Method({}, 2)
        return judge.train_flops(STUDY, config, name), judge.active_params(config, method, "moe")

    plain = rivals.Method({}, 2)
    for name in ("btx", "unrestricted-data"):
        flops = judge.train_flops(STUDY, C, name)
        assert cost(name) == (flops, judge.active_params(C, plain, "moe"))
    assert cost("ours")[0] > judge.train_flops(STUDY, C, "ours")
    assert cost("ours")[1] > judge.active_params(C, plain, "moe")


def test_how_far_apart_two_methods_are_has_an_error_over_text(scoring):
    """Mutation: the errors of both methods taken as independent."""
    a, b = (scoring.losses(m["shared"], m["experts"]) for m in (dense(0), dense(1)))
    scores = {name: scoring.scores(found) for name, found in (("a", a), ("b", b))}
    variance = 0.0
    for d in a:
        x, y = (np.asarray(scores[n][d].nats) for n in "ab")
        size = np.asarray(scores["a"][d].bytes, float)
        rest = (y - x) - (y - x).sum() / size.sum() * size
        variance += len(x) / (len(x) - 1) * (rest**2).sum() / (size.sum() * np.log(2)) ** 2
    assert scoring.gap_stderr(a, b) == pytest.approx(np.sqrt(variance) / len(a), rel=1e-6)
    assert scoring.gap_stderr(a, a) == 0


# --- Summary and page --------------------------------------------------------------------------


def fake_scores(seed):
    """Scores of a seed in which every figure is known."""
    domains = STUDY.domains
    bits = {"anchor": 2.0, "ours": 1.5 + 0.1 * seed, "paper": 1.8}
    for recipe in ("ours", "paper"):
        bits |= {f"{recipe}{v}": bits[recipe] + 0.01 for v in ("+fallback", "-rank4")}
        bits |= {f"{recipe}-rank{r}": bits[recipe] for r in judge.RANKS}
    methods = {
        name: {
            "bpb": {d: {"value": value, "stderr": 0.01} for d in domains},
            "train_flops": 1e12,
            "active_params": 1000,
            "chosen": {},
            "gap_stderr": {"ours": 0.12, "ours+fallback": 0.12},
        }
        for name, value in bits.items()
    }

    def even(value):
        return dict.fromkeys(domains, value)

    opt_out = {
        "bpb": {
            "": even(1.5),
            "code": {**even(1.5), "code": 2.02, "news": 1.47},
            "news": {**even(1.5), "news": 1.98},
            "code+news": even(2.0),
        },
        "exact": {"1": True, "2": False},
    }
    recipe = {
        "pairs": {d: {"wiki": 2.0, d: 1.4} for d in STUDY.closed},
        "active": {"1": even(1.9), "2": even(1.5)},
        "active_fallback": {"1": even(2.0), "2": even(1.5)},
        "owners": {"as listed": {"0": even(2.0), "1": even(1.7), "2": even(1.5)}},
        "opt_out": opt_out,
        "opt_out_fallback": opt_out,
        "part": even(2.0),
        "shipped": {**{str(r): r * 1000 for r in judge.RANKS}, "full": 100_000},
    }
    recipes = dict.fromkeys(STUDY.recipes, recipe)
    return {"seed": seed, "anchor_digest": "sha256:0", "methods": methods, "recipes": recipes}


def test_means_errors_and_differences():
    assert summary.estimate([1.0, 3.0]) == {"mean": 2.0, "stderr": 1.0, "n": 2}
    assert summary.estimate([1.0])["stderr"] is None
    found = run.collect(STUDY, [fake_scores(0), fake_scores(1)])
    ours = found["summary"]["ours"]
    assert ours["mean"] == pytest.approx(1.55) and ours["stderr"] == pytest.approx(0.05)
    gap = found["against"]["anchor"]["ours"]
    # 0.05 over seeds, 0.12 over text: 0.13 together.
    assert gap["mean"] == pytest.approx(0.45) and gap["errors"] == pytest.approx(0.45 / 0.13)
    assert gap["stderr"] == pytest.approx(0.05) and gap["text"] == pytest.approx(0.12)
    one = run.collect(STUDY, [fake_scores(0)])["against"]["anchor"]["ours"]
    assert one["errors"] is None
    assert found["against"]["ours"]["ours"]["mean"] == 0
    keys = {"method", "seed", "bpb", "mean_closed", "mean_all", "train_flops", "active_params"}
    assert keys <= set(found["rows"][0])


def test_what_is_kept_and_what_leaving_does():
    found = run.collect(STUDY, [fake_scores(0)])["facts"]["ours"]
    # The pair gains 0.6, the mixture 0.5.
    assert found["gain_kept"]["code"]["mean"] == pytest.approx(5 / 6)
    assert found["public"]["mean"] == pytest.approx(-0.25)
    one, two = found["opt_out"]["1"], found["opt_out"]["2"]
    assert one["left"]["mean"] == pytest.approx(0.01) and two["left"]["mean"] == pytest.approx(0)
    assert one["others"]["mean"] == pytest.approx(0.02) and one["worse"]["mean"] == 0
    assert found["exact"] == {"1": True, "2": False}


def test_the_page_shows_every_method(tmp_path):
    content = {
        **run.collect(STUDY, [fake_scores(0), fake_scores(1)]),
        "reproduce": "flexolmo study --out <here>",
        "versions": {"jax": "0"},
        "machine": {"cores": 2},
        "seconds": 60.0,
    }
    json.dumps(content)
    page.write(STUDY, content, tmp_path)
    text, html = (
        (tmp_path / "results-main.md").read_text(),
        (tmp_path / "results-main.html").read_text(),
    )
    for method in content["summary"]:
        assert f"| {method} |" in text and f"<td>{method}</td>" in html
    assert html.count("<svg") == 1 + 3 * len(STUDY.recipes)
    assert "&lt;here&gt;" in html and "nan" not in text
    for n, value, last in (
        (0, "2.000 ± 0.000", "nobody: the anchor"),
        (2, "1.500 ± 0.000", "news"),
    ):
        assert f"| ours | as listed | {n} | {' | '.join([value] * 3)} | {last} |" in text
    assert not math.isnan(content["summary"]["ours"]["mean_unseen"]["mean"])
    assert {p.name for p in tmp_path.glob("*.svg")} >= {
        "results-main-methods.svg",
        "results-main-ours-active.svg",
    }


def test_a_brief_study_tells_what_it_has(tmp_path):
    brief = dataclasses.replace(STUDY, brief=True, rivals=False)
    scores = fake_scores(0)
    kept = {name: m for name, m in scores["methods"].items() if "-" not in name and "+" not in name}
    sets = {
        name: {key: found[key] for key in ("pairs", "opt_out", "part", "shipped")}
        for name, found in scores["recipes"].items()
    }
    content = {
        **run.collect(brief, [{**scores, "methods": kept, "recipes": sets}]),
        "reproduce": "flexolmo study",
        "machine": {"cores": 2},
        "versions": {},
        "seconds": 1.0,
    }
    page.write(brief, content, tmp_path)
    text = (tmp_path / "results-main.md").read_text()
    assert "| ours | 1 | yes |" in text and "## Joining" not in text
    assert [p.name for p in tmp_path.glob("*.svg")] == ["results-main-methods.svg"]


# Seen to fail while the level was the anchor's mean over all held-out rows.
def test_curves_stand_beside_the_anchor_on_the_same_rows(monkeypatch):
    scores = fake_scores(0)
    scores["recipes"]["ours"]["owners"]["as listed"]["0"] = dict.fromkeys(
        scores["methods"]["ours"]["bpb"], 2.3
    )
    drawn = {}
    monkeypatch.setattr(page.charts, "lines", lambda title, *rest: drawn.setdefault(title, rest))
    page.plots(STUDY, run.collect(STUDY, [scores]))
    assert drawn["ours: active experts"][-1]["anchor"] == pytest.approx(2.3)
    # What is shipped is scored on all rows.
    assert drawn["ours: quality by what is shipped"][-1]["anchor"] == pytest.approx(2.0)


def test_a_study_of_a_pretrained_anchor_imports_it(tmp_path):
    study = studies.get_study("size=135m")
    plan = jobs.plan(study, tmp_path, "assets")
    by_name = {job.name: job for job in plan.jobs}
    made = str(tmp_path / "anchor")
    assert by_name["import:anchor"].outputs == (made,)
    assert by_name["import:anchor"].command[-4:] == ("gguf", "smollm2", "--out", made)
    assert "import:anchor" in by_name["starts"].needs
    texts = by_name["prepare:wiki:train"]
    assert texts.needs == ("import:anchor",) and f"{made}/tokenizer.json" in texts.command
    assert not {"tokenizer", "train:anchor:public:s0", "package:anchor"} & set(by_name)
    assert {"smollm2", "eval", "wiki"} <= set(run.needed_assets(study))
    # An anchor that is there already is not imported again.
    given = dataclasses.replace(study, anchor=made)
    assert "import:anchor" not in {job.name for job in jobs.plan(given, tmp_path, "assets").jobs}
    assert "smollm2" not in run.needed_assets(given)


def test_jobs_at_once_by_default(tmp_path):
    cores = study_cli._parallel(tmp_path)
    for name in ("nvidia0", "nvidiactl"):
        (tmp_path / name).touch()
    assert study_cli._parallel(tmp_path) == min(cores, study_cli.ON_GPU)
    (tmp_path / "accel0").touch()
    assert study_cli._parallel(tmp_path) == 1


def test_an_anchor_that_is_given_is_used(tmp_path):
    given = dataclasses.replace(STUDY, anchor=str(tmp_path / "given"))
    plan = jobs.plan(given, tmp_path / "out", "assets")
    names = {job.name for job in plan.jobs}
    assert "train:anchor:public:s0" not in names and "tokenizer" not in names
    texts = [job for job in plan.jobs if job.name == "prepare:wiki:train"]
    assert str(tmp_path / "given/tokenizer.json") in texts[0].command
    assert Path(given.anchor) == jobs.Layout(tmp_path, given).anchor

# SPDX-License-Identifier: Apache-2.0
"""Runs a study: the jobs that are missing, then tables, plots and a page."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax import assets, results
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.experts import model_info
from flexolmo_jax.jobs import local, progress
from flexolmo_jax.report import read_json
from flexolmo_jax.study import design, jobs, judge, models, page, summary
from flexolmo_jax.study.design import Study
from flexolmo_jax.study.jobs import Layout

Say = Callable[[str], None]


def run(
    study: Study, root: Path, *, max_parallel: int, command: str, say: Say = print
) -> dict[str, Any]:
    """Trains and scores what is missing, then writes results-SUITE.json, .md and .html.

    Returns:
      the content of results-SUITE.json.

    Raises:
      ConfigError: the folder holds this suite with other numbers, or the anchor is none.
      RefusedError: an anchor that cannot be used.
      MachineError: a job failed; its log has been shown.
      Preempted: a job was told to stop and has saved its state.
    """
    jobs.check_checkout()
    _check_anchor(study)
    began, root = time.perf_counter(), root.resolve()
    design.write(study, root)
    assets_root = assets.default_root().resolve()
    assets.fetch(needed_assets(study), assets_root, progress=say)
    plan = jobs.plan(study, root, str(assets_root))
    todo = [job for job, state in local.describe(plan) if state == "run"]
    seconds = sum(job.expected_s for job in todo) / max_parallel
    say(
        f"{len(todo)} of {len(plan.jobs)} jobs to run, roughly {progress.clock(seconds)} "
        "on two CPU cores of 2026"
    )
    ended = local.run(plan, max_parallel=max_parallel, report=progress.Printer(plan))
    problems = local.failure_text(plan, ended)
    if problems:
        say(problems)
    local.raise_on_failure(ended)
    scores = [read_json(Layout(root, study).scores(seed)) for seed in range(study.seeds)]
    found = collect(study, scores)
    found["job_seconds"] = {r.name: round(r.seconds, 1) for r in ended}
    found["machine"] = {"processor": platform.processor() or platform.machine()}
    found["machine"]["cores"] = len(os.sched_getaffinity(0))
    found["reproduce"] = command
    config = {"suite": study.suite, "size": study.size, "seeds": study.seeds}
    content = results.frame("study", config, found, time.perf_counter() - began)
    content["seconds"] = round(sum(r.seconds for r in ended), 1)
    results.write_json(root / f"results-{study.suite}.json", content)
    page.write(study, content, root)
    return content


def needed_assets(study: Study) -> list[str]:
    """Packages that a study reads: of its texts, its anchor and its questions."""
    names = [*study.domains, *(["eval"] if study.tasks else [])]
    names += [study.imported] if study.imported and not study.anchor else []
    return [name for name in names if name in assets.ASSETS]


def _check_anchor(study: Study) -> None:
    """Refuses an anchor before any job starts."""
    if study.anchor and not model_info.read_info(study.anchor).is_anchor:
        raise ConfigError(
            "A study starts from an anchor",
            got="a stitched model",
            where=study.anchor,
            fix="name the anchor that it was stitched from",
        )


def part(name: str, root: Path, suite: str, seed: int, say: Say = print) -> dict[str, Any]:
    """One job of a study: "starts", "models" or "judge"."""
    layout = Layout(root.resolve(), design.read(root, suite))
    if name == "starts":
        return models.make_starts(layout)
    if name == "models":
        return models.make_models(layout, seed)
    found = judge.run(layout, seed, say)
    results.write_json(layout.scores(seed), found)
    return {"scores": str(layout.scores(seed))}


def collect(study: Study, scores: Sequence[summary.Scores]) -> dict[str, Any]:
    """Everything that tables and plots show, from the scores of all seeds."""
    rows = summary.rows(study, scores)
    facts: dict[str, Any] = {}
    for recipe in study.recipes:
        facts |= summary.recipe_facts(study, scores, recipe)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return {
        "digests": {"anchor": scores[0]["anchor_digest"]},
        "rows": rows,
        "summary": summary.summary(rows),
        "facts": facts,
        "against": {
            method: {ours: summary.difference(rows, ours, method) for ours in study.compared}
            for method in methods
        },
        "curves": summary.curves(study, scores),
        "shipped": {r: scores[0]["recipes"][r]["shipped"] for r in study.recipes},
    }

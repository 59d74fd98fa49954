# SPDX-License-Identifier: Apache-2.0
"""The folder of a study: suites share it, nobody else's work in it is removed."""

import dataclasses

import pytest

from experiments import studies
from flexolmo_jax.cli import main as cli
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs import local, stamps
from flexolmo_jax.study import jobs, run

STUDY = studies.get_study("seeds=1,quick=true")


def test_suites_share_a_folder_and_nobody_elses(tmp_path):
    """One suite replaces what another left; an anchor that was put there is nobody's to remove."""
    main, held = (
        jobs.plan(dataclasses.replace(STUDY, suite=suite), tmp_path, "assets")
        for suite in ("main", "held")
    )
    started = next(job for job in main.jobs if job.name == "starts")
    stamps.prepare(main, started, "digest")
    (tmp_path / "starts" / "union").mkdir(parents=True)
    local.describe(held)
    (tmp_path / "anchor").mkdir()
    for plan in (main, held):
        with pytest.raises(ConfigError, match=r"has not made.*anchor.*package:anchor"):
            local.describe(plan)


# Broken once: it was without effect, so that another seed was trained than was asked for.
def test_a_seed_without_a_job_is_refused(tmp_path, capsys, monkeypatch):
    out = tmp_path / "s"
    monkeypatch.setattr(run, "run", lambda *args, **options: {})
    assert cli.main(["study", "--quick", "--out", str(out), "--seed", "2"]) == 2
    assert "give --seeds 3; else add --only" in capsys.readouterr().err
    assert not out.exists()

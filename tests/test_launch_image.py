# SPDX-License-Identifier: Apache-2.0
"""The image holds what jobs on clusters need. It is read, not built."""

import re
from pathlib import Path

import pytest

from flexolmo_jax import assets, configfile
from flexolmo_jax.jobs import places
from flexolmo_jax.tasks import catalog

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "launch" / "Dockerfile").read_text(encoding="utf-8")
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
PLANS = ("8x7b", "two")


def jobs_of(name):
    return configfile.load_function(f"{ROOT}/experiments/plans/{name}.py", "get_plan")().jobs


def line_of(start):
    (found,) = [number for number, line in enumerate(LINES) if line.startswith(start)]
    return found


def chosen():
    """The extras of the image and of the one for GPUs that a comment gives."""
    return [set(found.split(",")) for found in re.findall(r"EXTRAS=([\w,]+)", TEXT)]


# Broken once by an image without obstore: its first job could not read a path.
@pytest.mark.parametrize("name", PLANS)
def test_what_reads_urls_is_in_the_image(name):
    assert any(places.is_url(path) for job in jobs_of(name) for path in job.inputs)
    assert len(chosen()) == 2 and all("cloud" in extras for extras in chosen())
    assert [extras - {"demo", "cloud"} for extras in chosen()] == [{"gpu"}, {"tpu"}]


def test_the_extras_exist():
    known = re.findall(r"^([a-z-]+) =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    for extras in chosen():
        assert extras <= set(known)


def scored(name):
    return [job for job in jobs_of(name) if "--tasks" in job.command]


def tasks_of(name):
    """What the scores of a plan ask for beside bits per byte."""
    lists = {job.command[job.command.index("--tasks") + 1] for job in scored(name)}
    names = {word for words in lists for word in words.split(",")}
    return catalog.expand(names - {"bpb"})


# Broken once by scores that ask for questions which the image did not hold.
def test_questions_are_in_the_image():
    asked = [task for name in PLANS for task in tasks_of(name)]
    assert asked and not any(task.needs_data for task in asked)
    fetch = line_of("RUN flexolmo assets --only ")
    assert set(LINES[fetch].split()[4:]) == {"eval"} <= set(assets.ASSETS)
    assert line_of("RUN pip install") < line_of("ENV FLEXOLMO_ASSETS=/") < fetch < line_of("USER ")
    assert not any("FLEXOLMO_ASSETS" in job.env for name in PLANS for job in scored(name))

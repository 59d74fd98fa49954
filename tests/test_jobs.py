# SPDX-License-Identifier: Apache-2.0
"""Plans: order, isolation, skipping, failure, resumption. The jobs are small Python processes."""

import dataclasses
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs import local, progress, stamps
from flexolmo_jax.jobs.plan import Job, Plan, order

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"


def job(name, code="", *args, **fields):
    return Job(name=name, command=(sys.executable, "-c", code, *map(str, args)), **fields)


def plan_of(tmp_path, *jobs, **fields):
    return Plan(name="p", workdir=str(tmp_path / "w"), jobs=jobs, **fields)


def writer(tmp_path, name, text="x", **fields):
    out = tmp_path / "w" / f"{name}.txt"
    (tmp_path / "w").mkdir(exist_ok=True)
    return job(name, APPEND, out, text, outputs=(str(out),), **fields), out


def statuses(results):
    return {r.name: r.status for r in results}


def test_order_puts_needs_first_and_keeps_the_plans_order(tmp_path):
    plan = plan_of(tmp_path, job("c", needs=("a",)), job("b"), job("a"))
    assert [j.name for j in order(plan)] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([job("a", needs=("b",)), job("b", needs=("a",))], "wait for each other"),
        ([job("anchor"), job("x", needs=("anchr",))], "did you mean 'anchor'"),
        ([job("a"), job("a")], "same name"),
        ([job("a:b"), job("a-b")], "same name"),
        ([job("a b")], "Not a name"),
        ([Job(name="a", command=())], "no command"),
    ],
)
def test_unsound_plans_are_refused(tmp_path, jobs, message):
    with pytest.raises(ConfigError, match=message):
        order(plan_of(tmp_path, *jobs))


def test_two_writers_and_outputs_elsewhere_are_refused(tmp_path):
    inside = str(tmp_path / "w" / "o")
    with pytest.raises(ConfigError, match="same output"):
        order(plan_of(tmp_path, job("a", outputs=(inside,)), job("b", outputs=(inside,))))
    with pytest.raises(ConfigError, match="outside the workdir"):
        order(plan_of(tmp_path, job("a", outputs=(str(tmp_path / "elsewhere"),))))


@pytest.mark.parametrize("field", ["command", "inputs", "workdir", "env"])
def test_an_owners_job_must_not_see_another_owners_data(tmp_path, field):
    secret = str(tmp_path / "data" / "news")
    seen = {
        "command": {"command": ("train", f"--own={secret}/train")},
        "inputs": {"inputs": (secret,)},
        "workdir": {"workdir": secret},
        "env": {"env": {"DATA": secret}},
    }[field]
    closed = {"news": (secret,), "code": (str(tmp_path / "data" / "code"),)}
    mine = dataclasses.replace(job("x", owner="news"), **seen)
    assert order(plan_of(tmp_path, mine, closed=closed)) == (mine,)
    other = dataclasses.replace(mine, owner="code")
    with pytest.raises(ConfigError, match="closed data of another owner"):
        order(plan_of(tmp_path, other, closed=closed))
    longer = dataclasses.replace(other, **{field: _longer(seen[field], secret)})
    assert order(plan_of(tmp_path, longer, closed=closed)) == (longer,)


def _longer(value, secret):
    """The same field with a path that merely starts like the secret one."""
    text = json.dumps(value).replace(secret, secret + "letters")
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value


def test_jobs_run_in_order_as_processes_with_logs(tmp_path):
    out = tmp_path / "w" / "o.txt"
    (tmp_path / "w").mkdir()
    plan = plan_of(
        tmp_path,
        job("two", APPEND + "; print('said two')", out, "2", needs=("one",)),
        job("one", APPEND, out, "1", outputs=(str(out),)),
    )
    assert statuses(local.run(plan)) == {"one": "done", "two": "done"}
    assert out.read_text() == "12"
    assert "said two" in Path(local.log_path(plan, plan.jobs[0])).read_text()


def test_a_rerun_skips_until_an_input_the_command_or_an_output_changes(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("1")
    first, out = writer(tmp_path, "a", inputs=(str(source),))
    other, _ = writer(tmp_path, "b")
    plan = plan_of(tmp_path, first, other)
    assert set(statuses(local.run(plan)).values()) == {"done"}
    assert set(statuses(local.run(plan)).values()) == {"skipped"}
    source.write_text("2")
    assert [action for _, action in local.describe(plan)] == ["run", "skip"]
    assert statuses(local.run(plan)) == {"a": "done", "b": "skipped"}
    out.unlink()
    assert statuses(local.run(plan)) == {"a": "done", "b": "skipped"}
    changed, _ = writer(tmp_path, "a", text="y", inputs=(str(source),))
    assert statuses(local.run(plan_of(tmp_path, changed, other)))["a"] == "done"
    # A job without state started over each time: its old output was removed first.
    assert out.read_text() == "y"


# Broken once by removing what lay there before the first run.
def test_what_the_plan_has_not_made_is_not_removed(tmp_path):
    first, out = writer(tmp_path, "a")
    other, untouched = writer(tmp_path, "b")
    out.write_text("of hours")
    plan = plan_of(tmp_path, other, first)
    for asked in (local.run, local.describe):
        with pytest.raises(ConfigError, match=r"has not made.*a\.txt.*p:a.*move away"):
            asked(plan)
    with pytest.raises(ConfigError, match="has not made"):
        stamps.prepare(plan, first, "digest")
    assert out.read_text() == "of hours"
    assert not untouched.exists()
    out.unlink()
    out.symlink_to("nothing")
    with pytest.raises(ConfigError, match="has not made"):
        local.run(plan)
    out.unlink()
    assert set(statuses(local.run(plan)).values()) == {"done"}


def test_plans_of_one_family_replace_each_others_outputs(tmp_path):
    """As suites of a study do in their folder; another plan there is refused."""
    mine, out = writer(tmp_path, "a")
    yours, _ = writer(tmp_path, "a", text="y")
    state = tmp_path / "w" / "state"
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(exist_ok=True)"
    train = job("t", code, state, state=(str(state),))
    assert local.run(plan_of(tmp_path, mine, train, family="study"))[0].status == "done"
    again = dataclasses.replace(plan_of(tmp_path, yours, train, family="study"), name="q")
    assert statuses(local.run(again)) == {"a": "done", "t": "skipped"}
    assert out.read_text() == "y"
    with pytest.raises(ConfigError, match=r"has not made.*a\.txt and 1 more"):
        local.run(plan_of(tmp_path, mine, dataclasses.replace(train, env={"A": "b"})))
    assert state.is_dir()
    # What is up to date is taken, whoever made it.
    assert statuses(local.run(plan_of(tmp_path, yours))) == {"a": "skipped"}


def test_notes_without_a_family_are_the_plans_own(tmp_path):
    """Of runs before plans had one."""
    first, out = writer(tmp_path, "a")
    plan = plan_of(tmp_path, first)
    local.run(plan)
    note = tmp_path / "w" / "jobs" / "a.started"
    digest, family = note.read_text().splitlines()
    assert (digest, family) == (stamps.job_digest(first), "p")
    note.write_text(digest)
    assert statuses(local.run(plan)) == {"a": "skipped"}
    changed, _ = writer(tmp_path, "a", text="y")
    assert statuses(local.run(plan_of(tmp_path, changed))) == {"a": "done"}
    assert out.read_text() == "y"


def test_a_first_run_that_was_interrupted_goes_on(tmp_path):
    stops = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(len(sys.argv) - 2)"
    out = tmp_path / "w" / "a.txt"
    out.parent.mkdir()
    failing = job("a", stops, out, "1", outputs=(str(out),))
    assert statuses(local.run(plan_of(tmp_path, failing))) == {"a": "failed"}
    assert out.is_file()
    assert statuses(local.run(plan_of(tmp_path, job("a", stops, out, outputs=(str(out),))))) == {
        "a": "done"
    }
    assert out.read_text() == "x"


def test_a_manifest_stands_for_its_directory(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "flexolmo.json").write_text("1")
    (model / "big").write_text("a")
    before = stamps.fingerprint(model)
    (model / "big").write_text("b")
    assert stamps.fingerprint(model) == before
    (model / "flexolmo.json").write_text("2")
    assert stamps.fingerprint(model) != before


def test_a_failure_stops_its_dependents_only_and_shows_how_to_rerun(tmp_path):
    good, _ = writer(tmp_path, "good")
    plan = plan_of(
        tmp_path,
        job("bad", "import sys; print('the reason'); sys.exit(3)"),
        job("after", needs=("bad",)),
        job("after2", needs=("after",)),
        good,
    )
    results = local.run(plan)
    assert statuses(results) == {
        "bad": "failed",
        "after": "blocked",
        "after2": "blocked",
        "good": "done",
    }
    text = local.failure_text(plan, results)
    assert "the reason" in text and "exit code 3" in text and sys.executable in text
    assert "after, after2" in text
    # The failed job has no stamp, so it is tried again.
    assert statuses(local.run(plan))["bad"] == "failed"


def test_a_job_that_does_not_write_what_it_promised_has_failed(tmp_path):
    plan = plan_of(tmp_path, job("a", outputs=(str(tmp_path / "w" / "never"),)))
    (result,) = local.run(plan)
    assert result.status == "failed"
    assert "never" in Path(result.log).read_text()


def test_state_survives_a_preemption_but_not_a_change(tmp_path):
    state = tmp_path / "w" / "state"
    code = (
        "import pathlib, sys; d = pathlib.Path(sys.argv[1]); d.mkdir(exist_ok=True);"
        "n = len(list(d.iterdir())); (d / str(n)).touch(); sys.exit(0 if n else 75)"
    )
    plan = plan_of(tmp_path, job("a", code, state, state=(str(state),)))
    assert statuses(local.run(plan)) == {"a": "preempted"}
    assert statuses(local.run(plan)) == {"a": "done"}
    assert len(list(state.iterdir())) == 2
    changed = plan_of(tmp_path, job("a", code, state, "other", state=(str(state),)))
    assert statuses(local.run(changed)) == {"a": "preempted"}
    assert len(list(state.iterdir())) == 1


def test_a_job_gets_a_short_environment_and_its_own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMEONES_DATA", "secret")
    code = "import os; print(sorted(os.environ)); print(os.getcwd()); print(os.environ['MINE'])"
    home = tmp_path / "w" / "home"
    plan = plan_of(tmp_path, job("a", code, workdir=str(home), env={"MINE": "yes"}))
    local.run(plan)
    log = local.log_path(plan, plan.jobs[0]).read_text()
    assert "SOMEONES_DATA" not in log and "PATH" in log
    assert str(home) in log and "yes" in log


def test_parallel_jobs_overlap(tmp_path):
    # Each waits for the other's file: run one after another, the first would give up.
    code = (
        "import pathlib, sys, time; me, other = map(pathlib.Path, sys.argv[1:]); me.touch();"
        "end = time.time() + 20\n"
        "while not other.exists():\n"
        "  time.sleep(0.02)\n"
        "  if time.time() > end: sys.exit(1)\n"
    )
    a, b = tmp_path / "w" / "a", tmp_path / "w" / "b"
    (tmp_path / "w").mkdir()
    plan = plan_of(tmp_path, job("a", code, a, b), job("b", code, b, a))
    assert set(statuses(local.run(plan, max_parallel=2)).values()) == {"done"}
    with pytest.raises(ConfigError, match="at least 1"):
        local.run(plan, max_parallel=0)


def test_time_left_scales_with_what_was_measured(tmp_path):
    plan = plan_of(tmp_path, job("a", expected_s=10), job("b", expected_s=30))
    results = {"a": local.JobResult("a", "done", 20.0, "")}
    # A tenth of the plan, 4 s, counts as measured at the expected speed.
    scale = (20 + 4) / (10 + 4)
    assert local.time_left(plan, {}, {}) == pytest.approx(40)
    assert local.time_left(plan, results, {}) == pytest.approx(30 * scale)
    assert local.time_left(plan, results, {"b": 15.0}) == pytest.approx(30 * scale - 15)
    assert local.time_left(plan_of(tmp_path, job("a")), {}, {}) is None


def test_time_left_of_jobs_side_by_side(tmp_path):
    plan = plan_of(tmp_path, *(job(n, expected_s=10) for n in "abcd"))
    assert local.time_left(plan, {}, {}, max_parallel=2) == pytest.approx(20)
    # The last one has no company.
    ended = {n: local.JobResult(n, "done", 10.0, "") for n in "abc"}
    assert local.time_left(plan, ended, {"d": 4.0}, max_parallel=2) == pytest.approx(6)
    assert local.time_left(plan, ended | {"d": ended["a"]}, {}, max_parallel=2) == 0


def test_a_slow_start_of_small_jobs_does_not_multiply_the_rest(tmp_path):
    small = [job(f"small{i}", expected_s=1) for i in range(5)]
    plan = plan_of(tmp_path, *small, job("large", expected_s=1000))
    ended = {j.name: local.JobResult(j.name, "done", 10.0, "") for j in small}
    left = local.time_left(plan, ended, {})
    assert left is not None and 1000 < left < 1500


def test_progress_lines_name_the_job_and_its_place(tmp_path):
    first, _ = writer(tmp_path, "first", expected_s=1)
    plan = plan_of(tmp_path, first)
    screen = io.StringIO()
    local.run(plan, report=progress.Printer(plan, screen))
    local.run(plan, report=progress.Printer(plan, screen))
    text = screen.getvalue()
    assert "[ 0/1] first: started | all jobs: about 1 s left" in text
    assert "[ 1/1] first: done in" in text and "first: up to date" in text


def test_durations_for_people():
    assert [progress.clock(s) for s in (8, 125, 4200)] == ["8 s", "2 min 05 s", "1 h 10 min"]


def test_no_job_outlives_a_stopped_run(tmp_path):
    marker = tmp_path / "w" / "pid"
    (tmp_path / "w").mkdir()
    sleeper = (
        "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()));"
        "time.sleep(60)"
    )
    plan = plan_of(tmp_path, job("a", sleeper, marker))

    def stop(event):
        if marker.is_file() and marker.read_text():
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        local.run(plan, report=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are pinned on Linux alone")
def test_jobs_side_by_side_never_share_a_core(tmp_path, monkeypatch):
    """Also when the first to start is the first to end, and another takes its place."""
    pinned = {}
    monkeypatch.setattr(local, "_pin", lambda pid, cores: pinned.update({pid: cores}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    seen = tmp_path / "w" / "seen"
    seen.parent.mkdir()
    wait = (
        "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)"
    )
    touch = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"
    jobs = [job("a"), job("b", wait, seen), job("c"), job("d", touch, seen)]
    local.run(plan_of(tmp_path, *jobs), max_parallel=2)
    assert list(pinned.values()) == [[0], [1], [0], [0]]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are pinned on Linux alone")
def test_a_job_beside_which_nothing_can_start_has_all_cores(tmp_path, monkeypatch):
    pinned = {}
    monkeypatch.setattr(local, "_pin", lambda pid, cores: pinned.update({pid: cores}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    plan = plan_of(
        tmp_path, job("anchor"), job("x", needs=("anchor",)), job("y", needs=("anchor",))
    )
    local.run(plan, max_parallel=2)
    assert list(pinned.values()) == [[0, 1, 2, 3], [0, 1], [2, 3]]

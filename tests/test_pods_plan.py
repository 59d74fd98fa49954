# SPDX-License-Identifier: Apache-2.0
"""`flexolmo plan` around the compiler: what is asked, what is tried, what is printed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from flexolmo_jax import errors, programs
from flexolmo_jax.cli import main as cli
from flexolmo_jax.errors import ConfigError, MachineError
from flexolmo_jax.pods import chips, memory, predict, process, search, table, target, work
from flexolmo_jax.pods.compile import Plan
from flexolmo_jax.pods.process import Request

ROOT = Path(__file__).resolve().parents[1]
EXPERT = f"{ROOT}/experiments/expert.py"
STITCHED = f"{ROOT}/experiments/stitched.py"


def read(config=f"{EXPERT}:size=tiny", topology="v5e:2x2", **rest):
    return target.read(Request(config=config, topology=topology, **rest))


# ---- What is asked ---------------------------------------------------------------------------


def test_an_expert_job_is_planned_before_there_is_an_anchor(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    t = read(f"{EXPERT}:size=7b,expert=news")
    assert (t.stage, t.model.d_model, t.model.n_layers, t.model.n_slots) == ("expert", 4096, 32, 1)
    assert t.run.data.batch_rows == 1024


def test_the_model_can_be_named():
    t = read(model=f"{ROOT}/experiments/anchor.py:size=1b")
    assert t.model.d_model == 2048


def test_a_file_that_cannot_tell_its_model_says_what_to_do(tmp_path):
    text = Path(EXPERT).read_text().replace("def get_model(", "def other(")
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name in ("__init__.py", "common.py"):
        (folder / name).write_text((ROOT / "experiments" / name).read_text())
    (folder / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match="name it with --model"):
        read(f"{folder}/mine.py:anchor=nowhere")


def test_rows_length_and_overrides_are_taken():
    t = read(rows=64, seq_len=128, overrides=("--config.exec.remat=full",))
    assert (t.run.data.batch_rows, t.run.data.seq_len, t.run.exec.remat) == (64, 128, "full")
    assert (t.groups, t.rows_at_once) == (4, 16)
    divided = read(rows=64, overrides=("--config.optim.accumulate=4",))
    assert divided.rows_at_once == 4


@pytest.mark.parametrize("stage", target.STAGES)
def test_every_stage_is_reached_from_one_configuration(stage):
    t = read(f"{STITCHED}:size=tiny", stage=stage)
    assert t.stage == stage and t.trains == (stage not in target.SERVING)
    if t.trains:
        assert t.run.stage == stage


def test_an_unknown_stage_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'expert'"):
        read(stage="expart")


def test_the_remat_policies_go_from_most_kept_to_least():
    assert (target.REMAT[0], target.REMAT[-1]) == ("none", "full")


# ---- What is tried ---------------------------------------------------------------------------


def measured(t, total_gib, low=1.0, high=2.0):
    """A plan of so many GiB and seconds, without the compiler."""
    held = {"parameters": 2.0**30, "optimizer": 2.0**30, "data": 0.0}
    p = programs.Program(
        stage="anchor",
        config=toy.CONFIG,
        runtime=None,
        mesh=None,
        function=len,
        arguments={},
        donated=(),
        tokens=1000,
        seq_len=10,
    )
    times = predict.Times(1, (0, 0), (0, 0), 0, 0, 0, {}, low, high)
    m = memory.split(total_gib * 2**30, held, 0.0, t.topology)
    return Plan(t.topology, p, m, 1.0, work=work.Work((), (), (), 0), times=times)


def test_advice_recomputes_more_then_takes_fewer_rows_then_more_chips():
    t = read(rows=16, overrides=("--config.exec.remat=outputs",))
    changes = [change for change, _ in search._nearest(t, measured(t, 20))]
    assert changes[0] == "--config.exec.remat=full"
    assert changes[1] == "--config.exec.remat=full --config.optim.accumulate=2"
    assert changes[2] == "--config.exec.remat=full --config.optim.accumulate=4"
    wider = "--config.exec.remat=full --topology"
    assert changes[3] == f"{wider} v5e:2x4 --config.optim.accumulate=2"
    # Sixteen rows are one for each of so many chips, and no more chips have less to do.
    assert changes[4:] == [f"{wider} v5e:4x4", f"{wider} v5e:4x8 --rows 32"]


def test_advice_begins_where_it_may_fit():
    """Of 62 GiB beyond the state 14 are there: a quarter of the rows is not enough."""
    t = read(rows=64, overrides=("--config.exec.remat=full",))
    first = next(search._nearest(t, measured(t, 64)))[0]
    assert first == "--config.optim.accumulate=8"


def test_serving_has_fewer_rows_instead():
    t = read(f"{STITCHED}:size=tiny", stage="decode", rows=16)
    assert next(search._nearest(t, measured(t, 20)))[0] == "--rows 8"


def test_advice_stops_at_the_first_that_fits(monkeypatch):
    t = read(rows=16, overrides=("--config.exec.remat=full",))
    sizes = iter([30.0, 12.0, 6.0])
    monkeypatch.setattr(target.Target, "measure", lambda self: measured(self, next(sizes)))
    found = search.advice(t, measured(t, 20), lambda line: None)
    assert found.change == "--config.optim.accumulate=4"
    assert found.plan.memory.total == 12 * 2**30


def test_the_search_keeps_the_batch_and_grows_until_it_is_full(monkeypatch):
    t = read(rows=16)
    seen = []

    def measure(self):
        seen.append((self.run.data.batch_rows, self.run.optim.accumulate))
        return measured(self, 4.0 * self.rows_at_once)

    monkeypatch.setattr(target.Target, "measure", measure)
    tried = list(search.search(t, lambda line: None))
    assert {rows for rows, _ in seen} == {16}
    assert {x.target.rows_at_once for x in tried} == {1, 2}
    assert all(x.plan.fits for x in tried)
    assert any("mesh=2x1x2" in x.change for x in tried)


def test_the_front_is_what_nothing_beats():
    t = read()
    cases = {"small": (4, 4), "fast": (8, 1), "slow": (6, 5), "big": (9, 2)}
    tried = [
        search.Tried(name, t, measured(t, gib, low=s, high=2 * s))
        for name, (gib, s) in cases.items()
    ]
    assert [x.change for x in search.pareto(tried)] == ["small", "fast"]


# ---- The process -----------------------------------------------------------------------------


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"flexolmo-jax\[tpu\]"):
        process.plan(Request(EXPERT, "v5e:2x2"))


def test_the_environment_is_quiet_and_flags_are_the_users(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_something=1")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    found = process.environment()
    assert "XLA_FLAGS" not in found and found["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine=1")
    assert process.environment()["LIBTPU_INIT_ARGS"] == "--mine=1"


def test_errors_of_the_process_are_those_of_the_user(monkeypatch):
    """A real process, which stops before it needs the compiler."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    lines = []
    with pytest.raises(ConfigError, match="Unknown stage") as caught:
        process.plan(Request(f"{EXPERT}:size=tiny", "v5e:2x2", stage="no"), lines.append)
    assert caught.value.where == "--stage" and not lines


def test_a_process_that_dies_is_a_fault_of_the_machine(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho out of memory >&2\nexit 9\n")
    broken.chmod(0o755)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(MachineError, match="exit code 9: out of memory"):
        process.plan(Request(EXPERT, "v5e:2x2"))


def test_every_error_comes_back_as_itself():
    for kind in (errors.ConfigError, errors.DataError, errors.MachineError):
        error = kind("What", got=1, where=Path("x"), fix="do")
        again = process._rebuilt(json.loads(json.dumps(process.describe(error))))
        assert type(again) is kind and str(again) == str(error)


# ---- What is printed -------------------------------------------------------------------------

PLAN = {
    "topology": "v5e:4x4",
    "slices": 1,
    "chips": 16,
    "mesh": {"data": 16, "expert": 1, "model": 1},
    "stage": "expert",
    "rows": 16,
    "seq_len": 4096,
    "remat": "full",
    "fits": True,
    "hbm_gib": {
        "limit": 15.75,
        "total": 10.8,
        "parameters": 1.9,
        "optimizer": 2.0,
        "activations": 1.0,
        "temporaries": 5.9,
    },
    "flops": {"model": 3.7e15, "compiled": 5.3e15, "recomputed_share": 0.3},
    "collective_bytes": {"data": {"all-gather": 2.0**30, "all-reduce": 2.0**20}},
    "step_s": {"low": 1.2, "high": 1.4},
    "step_parts_s": {
        "products": 0.9,
        "kernels": {"low": 0.05, "high": 0.09},
        "other_units": {"low": 0.07, "high": 0.2},
        "hbm_traffic": 0.15,
        "collectives_early": 0.1,
        "collectives_waited": 0.1,
        "collectives_by_axis": {"data": 0.2},
    },
    "mfu": {"low": 0.371, "high": 0.419},
    "tokens_per_s_per_chip": {"low": 2998, "high": 3387},
    "compile_s": 37.0,
    "unknown": {"loops": [], "kernels": []},
    "heaviest": [
        {"low_s": 0.1, "high_s": 0.2, "times": 32, "what": "fusion", "from": "jit(f)/mixture"}
    ],
    "model": {"parameters": 7.3e9, "n_slots": 1, "n_active": 1},
}


def test_the_screen_says_fits_and_the_range():
    text = table.text(PLAN, units=1)
    for part in ("10.80 of 15.75 GiB  FITS", "MFU 37.1 to 41.9 %", "2,998 to 3,387", "mixture"):
        assert part in text, text
    assert "low:" in text and "high:" in text, "a number without its assumptions"
    assert max(len(line) for line in text.splitlines()) <= 120


def test_the_screen_says_what_would_fit():
    nearest = {"change": "--config.exec.remat=full", "hbm_gib": {"total": 9.0}}
    plan = {**PLAN, "fits": False, "step_s": None, "nearest": nearest}
    text = table.text(plan)
    assert "DOES NOT FIT" in text and "--config.exec.remat=full" in text and "MFU" not in text
    assert "no change that was tried fits" in table.text({**plan, "nearest": None})


def test_the_screen_admits_what_is_not_counted():
    text = table.text({**PLAN, "unknown": {"loops": [], "kernels": ["mystery"]}})
    assert "too low: kernels mystery" in text


def test_the_command_passes_everything_on(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(process, "plan", lambda request, tell: asked.append(request) or PLAN)
    out = tmp_path / "plan.json"
    code = cli.main(
        [
            *("plan", "--config", "x.py:size=7b", "--topology", "v5e:4x4", "--slices", "2"),
            *("--stage", "eval", "--rows", "8", "--seq-len", "64", "--config.exec.remat=full"),
            *("--search", "--json", str(out)),
        ]
    )
    assert code == 0 and "FITS" in capsys.readouterr().out
    (request,) = asked
    assert request == Request(
        config="x.py:size=7b",
        topology="v5e:4x4",
        slices=2,
        overrides=("--config.exec.remat=full",),
        stage="eval",
        rows=8,
        seq_len=64,
        search=True,
    )
    found = json.loads(out.read_text())
    assert found["command"] == "plan" and found["hbm_gib"] == PLAN["hbm_gib"]


def test_the_command_imports_no_jax():
    """The compiling process sets its environment before it imports JAX; the caller must not."""
    code = "import sys, flexolmo_jax.cli.plan; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_plan_has_the_documented_keys(monkeypatch):
    t = read()
    plan = measured(t, 8)
    grid = dataclasses.make_dataclass("Grid", ["shape"])({"data": 4, "expert": 1, "model": 1})
    run = dataclasses.make_dataclass("Run", ["remat"])("full")
    p = dataclasses.replace(plan.program, mesh=grid, runtime=run)
    monkeypatch.setattr(Plan, "heaviest", lambda self: [])
    found = dataclasses.replace(plan, program=p).to_json()
    for key in ("topology", "mesh", "stage", "fits", "collective_bytes", "compile_s"):
        assert key in found
    kinds = ("limit", "total", "parameters", "optimizer", "activations", "temporaries")
    assert list(found["hbm_gib"]) == list(kinds)
    assert {"model", "compiled"} <= set(found["flops"])
    for key in ("step_s", "mfu", "tokens_per_s_per_chip"):
        assert set(found[key]) == {"low", "high"} and found[key]["low"] <= found[key]["high"]
    assert chips.parse(found["topology"]) == t.topology


def test_a_router_job_is_planned_before_the_model_is_stitched(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    t = read(f"{ROOT}/experiments/router.py:size=8x7b")
    assert (t.stage, t.model.n_slots, t.model.n_active) == ("router", 8, 4)

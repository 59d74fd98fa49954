# SPDX-License-Identifier: Apache-2.0
"""`flexolmo launch` as a user meets it: the dry run, settings, owners, the planner's report."""

import json
import re
import shlex

import fake_programs
import pytest
from launch_samples import GKE, ROOT, SLURM, TPU_VM, job, plan_of, tpu

from flexolmo_jax import launch_report
from flexolmo_jax.cli import main as cli
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs import launching, settings
from flexolmo_jax.jobs.plan import Resources

TWO = f"{ROOT}/experiments/plans/two.py"
BIG = f"{ROOT}/experiments/plans/8x7b.py"
GIVEN = {"gke": GKE, "tpu-vm": TPU_VM, "slurm": SLURM}


def command(reference, kind, *options):
    given = [word for k, v in GIVEN[kind].items() for word in ("--set", f"{k}={v}")]
    return ["launch", "--plan", reference, "--backend", kind, *given, *options]


def at(tmp_path, kind, more=""):
    """The small plan, with its records in the test's folder."""
    on = ",on=h100" if kind == "slurm" else ""
    return f"{TWO}:workdir={tmp_path / 'w'}{on}{more}"


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch):
    # Plans name experiment files as the image has them: relative to its working directory.
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("kind", sorted(GIVEN))
def test_a_dry_run_shows_everything_and_calls_nothing(monkeypatch, tmp_path, capsys, kind):
    folder = fake_programs.here(monkeypatch, tmp_path / "bin")
    out = tmp_path / "files"
    assert cli.main(command(at(tmp_path, kind), kind, "--dry-run", "--out", str(out))) == 0
    text = capsys.readouterr().out
    assert not fake_programs.calls(folder) and not (tmp_path / "w").exists()
    names = sorted(p.name for p in out.iterdir())
    assert len(names) == 15
    assert all(n.startswith("flexolmo-two-") for n in names)
    for words in ("plan two on", "15 jobs, 15 to run", "== 15/15 eval:tuned", "nothing was run"):
        assert words in text
    # What a reader copies is one command of the job, whole.
    block = re.search(r"== 3/15 train:code.*?\n(.*?)\n==", text, re.DOTALL)
    program = re.search(r"^program   (.*?)^\S", block[1], re.DOTALL | re.MULTILINE)
    words = shlex.split(program[1].replace("\\\n", " "))
    assert words[:3] == ["flexolmo", "train", "--config"]
    assert cli.parse(words[1:])[0] == "train"
    assert "owner     code" in block[1] and "needs     package:anchor" in block[1]


def test_a_dry_run_prints_the_manifests_where_none_are_written(monkeypatch, tmp_path, capsys):
    assert cli.main(command(at(tmp_path, "gke"), "gke", "--dry-run")) == 0
    text = capsys.readouterr().out
    assert text.count("kind: JobSet") == 15
    assert text.count("kubectl apply") == 15


def test_a_dry_run_knows_what_is_done(monkeypatch, tmp_path, capsys):
    fake_programs.here(monkeypatch, tmp_path / "bin", {"train-anchor": ["failed"]})
    line = command(at(tmp_path, "gke"), "gke")
    assert cli.main([*line, "--poll", "0", "--owner", "nobody"]) == 4
    assert "Jobs of the plan failed. Got: train:anchor" in capsys.readouterr().err
    fake_programs.set_plays(tmp_path / "bin", {})
    result = tmp_path / "result.json"
    assert cli.main([*line, "--poll", "0", "--json", str(result)]) == 0
    statuses = {j["name"]: j["status"] for j in json.loads(result.read_text())["jobs"]}
    assert set(statuses.values()) == {"done"} and len(statuses) == 15
    capsys.readouterr()
    assert cli.main([*line, "--dry-run"]) == 0
    assert "15 jobs, 0 to run" in capsys.readouterr().out
    # The dry run says what the launch would.
    changed = command(at(tmp_path, "gke", ",on=v5e:2x4"), "gke")
    assert cli.main([*changed, "--dry-run"]) == 0
    changed = command(at(tmp_path, "gke", ",anchor=gs://example-other/anchor"), "gke")
    assert cli.main([*changed, "--dry-run"]) == 2
    assert "gcloud storage rm --recursive gs://example-try-code/runs/code" in (
        capsys.readouterr().err
    )


def test_an_owner_runs_only_what_is_theirs(monkeypatch, tmp_path, capsys):
    folder = fake_programs.here(monkeypatch, tmp_path / "bin")
    line = command(at(tmp_path, "gke"), "gke", "--owner", "news")
    assert cli.main([*line, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "taken to be done already, by others: package:anchor" in text
    assert "example-try-code" not in text
    assert cli.main([*line, "--poll", "0"]) == 0
    applied = [c[-1] for c in fake_programs.calls(folder) if c[1] == "apply"]
    assert [re.sub(r".*two-", "", a) for a in applied] == ["train-news.yaml", "package-news.yaml"]


def test_settings_come_from_a_file_and_options_win(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "namespace: a\nqueue: q\npriority: p\nreservation: spot\nimage: i:1\n"
        "partition: gpu\nmax_restarts: 7\nowners:\n  news:\n    queue: mine\n"
    )
    jobs = [job("x", owner="news", resources=tpu()), job("y", resources=tpu())]
    plan = plan_of(tmp_path, *jobs, settings={"queue": "plan", "context": "c", "account": "z"})
    backend = launching.make_backend("gke", plan, jobs, path, ["namespace=b"])
    found = [[backend.settings.get(j, n) for j in jobs] for n in ("namespace", "queue", "context")]
    assert found == [["b", "b"], ["mine", "q"], ["c", "c"]]
    assert backend.settings.get(jobs[0], "max_restarts") == "7"
    with pytest.raises(ConfigError, match="did you mean 'queue'"):
        launching.make_backend("gke", plan, jobs, None, ["queu=b"])


@pytest.mark.parametrize(
    "text",
    [
        "- a",
        "a: [",
        "queue: no",
        "queue: 1.5",
        "queue: [a]",
        "owners: x",
        "owners:\n  a: x",
        "a: \xff",
    ],
)
def test_files_that_are_no_settings(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        settings.from_file(path)


@pytest.mark.parametrize("items", [["a"], ["=b"], ["a=1", "a=2"]])
def test_options_that_are_no_settings(items):
    with pytest.raises(ConfigError, match="setting"):
        settings.from_options(items)


def test_the_cluster_file_of_the_readme_is_complete():
    jobs = [job("x", resources=tpu(zone="us-east5-a")), job("y")]
    for kind, path in (("gke", "tpu"), ("tpu-vm", "tpu"), ("slurm", "slurm")):
        some = [job("z", resources=Resources(accelerator="h100"))] if kind == "slurm" else jobs
        file = ROOT / "launch" / path / "cluster.yaml"
        assert launching.make_backend(kind, plan_of("w", *some), some, file, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "gke"], "lacks 5 setting"),
        (["--backend", "gke", "--out", "x"], "add --dry-run"),
        (["--backend", "gke", "--owner", "newz"], "did you mean 'news'"),
        (["--backend", "gkee"], "invalid choice"),
        (["--set", "a=b"], "Back end local has no such option. Got: --set"),
        (["--out", "x", "--dry-run"], "Back end local has no such option. Got: --out"),
        (["--no-report", "--dry-run"], "Back end local has no such option. Got: --no-report"),
        (["--no-wait"], "Back end local has no such option. Got: --no-wait"),
        (["--poll", "0"], "Back end local has no such option. Got: --poll"),
        (
            ["--backend", "gke", "--max-parallel", "1"],
            "gke has no such option. Got: --max-parallel",
        ),
        (["--backend", "gke", "--no-report"], "add --dry-run"),
        ([], "another back end"),
        (["--backend", "gke", "--cluster", "nowhere.yaml"], "cannot be used"),
    ],
)
def test_refusals(tmp_path, capsys, options, message):
    assert cli.main(["launch", "--plan", at(tmp_path, "gke"), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_planner_is_asked_once_per_program(monkeypatch):
    asked = []

    def plan(request, tell):
        asked.append(request)
        speed = {"low": 2000.0, "high": 4000.0}
        hbm = {"total": 10.0, "limit": 95.0}
        mfu = {"low": 0.4, "high": 0.6}
        return {"fits": True, "hbm_gib": hbm, "tokens_per_s_per_chip": speed, "mfu": mfu}

    monkeypatch.setattr(launch_report.process, "plan", plan)
    monkeypatch.setattr(launch_report, "available", lambda: True)
    jobs = launching.select(launching_plan(), [])
    reports = launch_report.report(jobs)
    lines = {name: said.lines for name, said in reports.items()}
    trained = [r for r in asked if not r.stage]
    # The anchor, an expert on each of three kinds of slice, and the router.
    assert len(trained) == 5
    assert {r.topology for r in trained} == {
        "v5p:4x8x8",
        "v5p:4x4x4",
        "v6e:8x8",
        "v5e:8x16",
        "v5p:4x4x8",
    }
    assert [r.slices for r in trained if r.topology == "v5p:4x8x8"] == [2]
    assert {r.stage for r in asked} == {"", "eval"} and len(asked) == 7
    assert lines["train:news"] == lines["train:academic"] != lines["train:reddit"]
    assert lines["train:news"][0] == "FITS: 10.0 of 95.0 GiB per chip"
    # 50e9 tokens / 4000 / 3600 chip-hours, on 64 chips.
    assert "50.0B tokens: 3,472 to 6,944 chip-hours, 2.3 days to 4.5 days" in lines["train:news"]
    assert "stitch" not in lines
    table = launching.cost_table(jobs, reports)
    assert len(table) == 2 + 1 + 7 + 1 + 1
    assert "| train:news | v5p 4x4x4 (64 chips, 16 hosts) | 50.0B | 3,472 to 6,944 |" in table[8]
    # 1.0T, seven times 50B, and 5B tokens in smaller batches.
    tokens = ((238_419 + 7 * 11_921) * 1024 + 9537 * 128) * 4096
    total = [tokens / speed / 3600 for speed in (4000, 2000)]
    assert table[-1] == f"| all | | | {total[0]:,.0f} to {total[1]:,.0f} | |"


def launching_plan():
    from flexolmo_jax import configfile

    return configfile.load_function(BIG, "get_plan")()


def test_without_the_compiler_the_command_is_said(monkeypatch):
    monkeypatch.setattr(launch_report, "available", lambda: False)
    jobs = launching.select(launching_plan(), [])
    lines = {name: said.lines for name, said in launch_report.report(jobs).items()}
    for name, said in lines.items():
        start = next(i for i, line in enumerate(said) if "install flexolmo-jax[tpu]" in line) + 1
        words = shlex.split("\n".join(said[start:]).replace("\\\n", " "))
        assert words[:2] == ["flexolmo", "plan"], name
        assert cli.parse(words[1:])[0] == "plan"
    assert lines["train:anchor"][0] == "1.0T tokens"
    assert {n for n in lines if n.startswith("train:")} == {
        j.name for j in jobs if j.name.startswith("train:")
    }


def test_a_wrong_configuration_is_said_before_anything_runs():
    bad = job(
        "train:x", "flexolmo", "train", "--config", "experiments/anchor.py:size=9b", resources=tpu()
    )
    (said,) = launch_report.report([bad]).values()
    assert "its configuration is wrong" in said.lines[0] and "9b" in said.lines[0]
    odd = job("x", planned=("--shape", "y"), resources=tpu())
    with pytest.raises(ConfigError, match="Not an option for the planner"):
        launch_report.report([odd])

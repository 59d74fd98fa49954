# SPDX-License-Identifier: Apache-2.0
"""The frame of the program: help, exit codes, errors, result files, configuration files."""

import errno
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from flexolmo_jax import configfile, errors
from flexolmo_jax.cli import launch
from flexolmo_jax.cli import main as cli
from flexolmo_jax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
ANCHOR = str(ROOT / "experiments" / "anchor.py")


@pytest.fixture
def command(monkeypatch):
    """Installs a subcommand `demo` whose `run` the test gives."""

    def install(run):
        def add_arguments(parser):
            parser.add_argument("--colour")

        module = types.SimpleNamespace(__doc__="a fake", add_arguments=add_arguments, run=run)
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return install


def test_help_is_quick_and_imports_no_jax():
    code = (
        "import sys; from flexolmo_jax.cli.main import main; code = main(['--help'])\n"
        "heavy = {'jax', 'numpy', 'flax', 'ml_collections'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == [c for c in cli.COMMANDS if c in listed]
    assert {"demo", "train", "launch"} <= set(listed)


def test_python_m_is_the_same_program():
    run = [sys.executable, "-m", "flexolmo_jax", "--version"]
    assert subprocess.run(run, capture_output=True, text=True).stdout.startswith("flexolmo ")


@pytest.mark.parametrize("name", sorted(cli.available()))
def test_every_command_has_help_json_and_debug(name, capsys):
    with pytest.raises(SystemExit) as leave:
        cli.main([name, "--help"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text and "--debug" in text


def test_commands_without_a_module_are_not_listed(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "imagine", "not there")
    assert "imagine" not in cli.available()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tarin"], "did you mean 'train'"),
        (["launch", "--plan", "x", "--dryrun"], "did you mean '--dry-run'"),
        (["launch", "--plan", "x", "--backend", "lokal"], "local"),
        (["train", "--workdir", "w"], "--config"),
        (["train", "--config", ANCHOR, "--workdir", "w", "--confg.seed=1"], "--confg.seed"),
    ],
)
def test_usage_errors_exit_2_and_name_what_is_near(argv, message, capsys):
    assert cli.main(argv) == 2
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text
    assert len(text.strip().splitlines()) == 1


def test_no_command_shows_help_and_exits_2(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


class JaxRuntimeError(RuntimeError):
    """Stands in for the class of the same name."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.DataError("x"), 3),
        (errors.RefusedError("x", []), 3),
        (errors.MachineError("x"), 4),
        (errors.Preempted("x"), 75),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 4),
        (OSError(errno.EIO, "Input/output error", "f"), 4),
        (FileNotFoundError(errno.ENOENT, "No such file", "f"), 2),
        (MemoryError(), 4),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 4),
        (ModuleNotFoundError("no", name="matplotlib"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_by_class(command, capsys, error, code):
    def run(args):
        raise error

    command(run)
    assert cli.main(["demo"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_faults_of_the_program_pass_through_and_are_shown_as_one_paragraph(command, capsys):
    def run(args):
        raise RuntimeError("oh")

    command(run)
    with pytest.raises(RuntimeError, match="oh") as caught:
        cli.main(["demo"])
    sys.excepthook(RuntimeError, caught.value, None)
    text = capsys.readouterr().err
    assert "internal fault: RuntimeError: oh" in text and "--debug" in text


def test_debug_keeps_the_traceback(command):
    def run(args):
        raise errors.DataError("x")

    command(run)
    with pytest.raises(errors.DataError):
        cli.main(["demo", "--debug"])


def test_result_files_have_the_common_keys(command, tmp_path):
    command(lambda args: {"answer": 42})
    path = tmp_path / "deep" / "result.json"
    assert cli.main(["demo", "--colour", "red", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert {"schema", "command", "versions", "config", "digests", "seconds"} <= set(result)
    assert result["answer"] == 42 and result["digests"] == {}
    assert result["command"] == "demo" and result["config"]["colour"] == "red"
    assert "jax" in result["versions"]


# ---- Configuration files and overrides --------------------------------------------------------


def test_overrides_replace_values_of_every_depth():
    config = configfile.load_run_config(
        f"{ANCHOR}:size=tiny",
        [
            "--config.optim.peak_lr=1e-4",
            "--config.seed",
            "7",
            "--config.data.sources.1.weight=2",
            "--config.data.document_mask=false",
            "--config.exec.moe=dense",
        ],
    )
    assert (config.optim.peak_lr, config.seed, config.exec.moe) == (1e-4, 7, "dense")
    assert [s.weight for s in config.data.sources] == [1.0, 2.0, 1.0]
    assert config.data.document_mask is False


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("--config.optim.peak_rl=1", "did you mean 'peak_lr'"),
        ("--config.optim.peak_lr=fast", "Expected: float"),
        ("--config.seed=1.5", "Expected: int"),
        ("--config.seed=true", "Expected: int"),
        ("--config.data.document_mask=1", "Expected: bool"),
        ("--config.seed.x=1", "no keys below"),
        ("--config.data.sources.9.weight=1", "0 to 2"),
        ("--config.seed", "no value"),
        ("--config.exec.moe=densee", "allowed values"),
        ("--config.optim=1", "Wrong type"),
    ],
)
def test_wrong_overrides_are_refused(item, message):
    with pytest.raises(ConfigError, match=message):
        configfile.load_run_config(f"{ANCHOR}:size=tiny", [item])


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("size=tinny", "did you mean 'tiny'"),
        ("sze=tiny", "did you mean 'size'"),
        ("size=tiny,size=7b", "given twice"),
        ("size", "no value"),
    ],
)
def test_wrong_arguments_of_experiment_files_are_refused(arg, message):
    with pytest.raises(ConfigError, match=message):
        configfile.load_run_config(f"{ANCHOR}:{arg}")


def test_a_missing_file_or_function_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean 'anchor\.py'"):
        configfile.load_function(ANCHOR.replace("anchor", "ancor"), "get_config")
    with pytest.raises(ConfigError, match="no function get_plan"):
        configfile.load_function(ANCHOR, "get_plan")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_here\n")
    with pytest.raises(ConfigError, match="does not import"):
        configfile.load_function(str(broken), "get_config")


def test_an_experiment_file_of_the_users_own_can_stand_anywhere(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def get_config(arg):\n    return {'stage': arg}\n")
    assert configfile.load_function(f"{mine}:a:b", "get_config")() == {"stage": "a:b"}


def test_train_hands_the_configuration_to_fit(monkeypatch, tmp_path):
    seen = {}

    def fit(config, workdir):
        seen.update(config=config, workdir=workdir)
        return {"steps": 3}

    fake = types.ModuleType("flexolmo_jax.train")
    fake.fit = fit
    monkeypatch.setitem(sys.modules, "flexolmo_jax.train", fake)
    monkeypatch.setattr("flexolmo_jax.train", fake, raising=False)
    result = tmp_path / "r.json"
    argv = ["train", "--config", f"{ANCHOR}:size=tiny", "--workdir", str(tmp_path / "w")]
    argv += ["--config.optim.total_steps=200", "--config.seed", "5", "--json", str(result)]
    assert cli.main(argv) == 0
    assert seen["config"].optim.total_steps == 200 and seen["config"].seed == 5
    assert seen["workdir"] == tmp_path / "w"
    assert json.loads(result.read_text())["steps"] == 3


# ---- Launch -----------------------------------------------------------------------------------

PLAN = """
import sys
from flexolmo_jax.jobs.plan import Job, Plan
def get_plan(arg):
    work, code = arg.split(",")
    code = f"print('hello'); raise SystemExit({code})"
    job = Job(name="one", command=(sys.executable, "-c", code))
    return Plan(name="p", workdir=work, jobs=(job,))
"""


def test_launch_runs_lists_and_reports(tmp_path, capsys):
    plan = tmp_path / "plan.py"
    plan.write_text(PLAN)
    argv = ["launch", "--plan", f"{plan}:{tmp_path / 'w'},0"]
    assert cli.main([*argv, "--dry-run"]) == 0
    assert "run   one:" in capsys.readouterr().out
    assert not (tmp_path / "w").exists()
    assert cli.main([*argv, "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["jobs"][0]["status"] == "done"
    assert cli.main([*argv, "--dry-run"]) == 0
    assert "skip  one:" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "exit_code"), [(1, 4), (75, 75)])
def test_launch_exits_by_how_its_jobs_ended(tmp_path, capsys, code, exit_code):
    plan = tmp_path / "plan.py"
    plan.write_text(PLAN)
    assert cli.main(["launch", "--plan", f"{plan}:{tmp_path / 'w'},{code}"]) == exit_code
    out = capsys.readouterr()
    assert "hello" in out.out and "one" in out.err


def test_the_demos_plan_gives_each_owner_only_its_own(tmp_path):
    plan = configfile.load_function(
        f"{ROOT}/experiments/plans/demo.py:workdir={tmp_path}", "get_plan"
    )()
    names = [j.name for j, _ in launch.local.describe(plan)]
    assert names.index("package:anchor") < names.index("train:code") < names.index("stitch")
    owned = [j for j in plan.jobs if j.owner == "code"]
    assert {j.name for j in owned} >= {"train:code", "package:code", "prepare:code:train"}
    for job in owned:
        seen = " ".join([*job.command, *job.inputs, job.workdir])
        assert not any(f"data/{d}" in seen for d in ("news", "legal", "academic"))


DEMO = f"{ROOT}/experiments/plans/demo.py:workdir="


# Broken once by a folder above: its name was in every argument, and only what was typed was read.
@pytest.mark.parametrize("folder", ["a+b", "a,b"])
@pytest.mark.parametrize("above", [True, False])
def test_a_folder_that_would_split_an_argument_is_refused(
    tmp_path, monkeypatch, capsys, folder, above
):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder if above else tmp_path)
    typed = "x" if above else folder
    if above:
        with pytest.raises(ConfigError, match="must not contain"):
            configfile.load_function(DEMO + typed, "get_plan")()
    for command in (["demo", "--workdir", typed], ["study", "--quick", "--out", typed]):
        assert cli.main(command) == 2
        assert "must not contain ',' or '+'" in capsys.readouterr().err
    assert not (Path.cwd() / "x").exists()


def test_folders_of_the_demo_and_of_a_study_are_of_this_machine(capsys):
    for command in (["demo", "--workdir"], ["study", "--out"]):
        assert cli.main([*command, "gs://bucket/x"]) == 2
        assert "a folder of this machine" in capsys.readouterr().err


def test_an_anchor_may_be_in_a_folder_that_would_split_a_list_only(tmp_path, monkeypatch, capsys):
    command = ["study", "--out", str(tmp_path / "s"), "--anchor"]
    assert cli.main([*command, str(tmp_path / "a,b")]) == 2
    assert "path of the anchor must not contain ','" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "a+b=c")]) == 3
    assert "not a model" in capsys.readouterr().err


def test_the_demos_workdir_may_hold_an_equals_sign_and_a_colon(tmp_path):
    root = tmp_path / "lr=0.1" / "10:30"
    plan = configfile.load_function(f"{DEMO}{root}", "get_plan")()
    (train,) = [job for job in launch.local.order(plan) if job.name == "train:code"]
    reference = train.command[train.command.index("--config") + 1]
    config = configfile.load_run_config(reference)
    assert config.anchor == str(root / "anchor")
    assert config.data.sources[0].path == str(root / "data" / "code" / "train")

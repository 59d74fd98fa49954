# SPDX-License-Identifier: Apache-2.0
"""The notebook: in step with its script, well formed, and the script runs to its end."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "colab"


@pytest.fixture(scope="module")
def pair():
    spec = importlib.util.spec_from_file_location("colab_pair", FOLDER / "pair.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_notebook_is_in_step_with_its_script(pair, capsys):
    assert [p.name for p in pair.scripts()] == ["quickstart.py"]
    assert pair.main(["--check"]) == 0, capsys.readouterr().out


def test_a_notebook_out_of_step_is_named(pair, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pair, "FOLDER", tmp_path)
    script = tmp_path / "a.py"
    script.write_text("# head\n\n# %%\nx = 1\n")
    assert pair.main(["--check"]) == 1
    assert pair.main([]) == 0 and pair.main(["--check"]) == 0
    script.write_text("# head\n\n# %%\nx = 2\n")
    (tmp_path / "orphan.ipynb").write_text("{}")
    assert pair.main(["--check"]) == 1
    out = capsys.readouterr().out
    assert "a.ipynb" in out and "orphan.ipynb" in out


def test_cells_are_cut_where_the_script_says(pair):
    text = "# licence\n# %% [markdown]\n# # Title\n#\n# word\n\n# %%\nx = 1\n\n\ny = 2\n\n# %%\nz\n"
    cells = pair.cells(text)
    assert [(c["cell_type"], "".join(c["source"])) for c in cells] == [
        ("markdown", "# Title\n\nword"),
        ("code", "x = 1\n\n\ny = 2"),
        ("code", "z"),
    ]
    assert len({c["id"] for c in cells}) == 3
    assert all(("outputs" in c) == (c["cell_type"] == "code") for c in cells)


@pytest.mark.parametrize("text", ["# %% [raw]\nx\n", "# %% [markdown]\nx = 1\n", "# %%x\n"])
def test_a_cell_of_another_kind_is_refused(pair, text):
    with pytest.raises(ValueError, match="line"):
        pair.cells(text)


def test_the_notebook_holds_no_results():
    content = json.loads((FOLDER / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    code = [c for c in content["cells"] if c["cell_type"] == "code"]
    assert len(code) > 8 and all(c["outputs"] == [] for c in code)
    assert "pip" in "".join(code[0]["source"]), "installing comes first"


@pytest.mark.slow
def test_the_script_runs_to_its_end(tmp_path):
    env = {
        **os.environ,
        "MPLBACKEND": "Agg",
        "JAX_PLATFORMS": "cpu",
        "FLEXOLMO_QUICKSTART_STEPS": "16",
        "FLEXOLMO_QUICKSTART_WORK": str(tmp_path),
    }
    # What must be equal is asserted in the script itself.
    command = [sys.executable, "-W", "error", str(FOLDER / "quickstart.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "8 x cpu" in done.stdout and "equal to the last bit" in done.stdout
    assert "tokens per expert" in done.stdout.splitlines()[-1]
    assert (tmp_path / "losses.png").is_file() and (tmp_path / "opt_out.png").is_file()

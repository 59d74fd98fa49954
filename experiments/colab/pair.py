# SPDX-License-Identifier: Apache-2.0
"""Notebooks from percent scripts: the script is the source, the notebook is generated from it.

  python experiments/colab/pair.py            writes NAME.ipynb beside every NAME.py with cells
  python experiments/colab/pair.py --check    exits 1 and names each notebook that is out of step

A cell begins at a line `# %%` (code) or `# %% [markdown]` (text, each line behind `# `). What
stands before the first cell is the header: licence line and pairing, which no notebook needs.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
MARK = "# %%"


def scripts() -> list[Path]:
    """The percent scripts of this folder."""
    return [p for p in sorted(FOLDER.glob("*.py")) if "\n" + MARK in p.read_text(encoding="utf-8")]


def cells(text: str) -> list[dict[str, Any]]:
    """The cells of a percent script in the notebook format; without outputs.

    Raises:
      ValueError: a text cell with a line that is no comment, or a mark of another kind.
    """
    out: list[dict[str, Any]] = []
    kinds = {"": "code", "[markdown]": "markdown"}
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(MARK):
            kind = line.removeprefix(MARK).strip()
            if kind not in kinds:
                raise ValueError(f"line {number}: {line!r} is neither a code nor a text cell")
            lines = []
            out.append({"cell_type": kinds[kind], "metadata": {}, "source": lines})
            continue
        if out and out[-1]["cell_type"] == "markdown" and line:
            if line != "#" and not line.startswith("# "):
                raise ValueError(f"line {number}: {line!r} in a text cell")
            line = line[2:]
        lines.append(line)
    return [_finished(cell, number) for number, cell in enumerate(out)]


def _finished(cell: dict[str, Any], number: int) -> dict[str, Any]:
    """The cell with its lines ended and an id that depends on its place alone."""
    text = "\n".join(cell["source"]).strip("\n")
    digest = hashlib.sha256(f"{number}:{cell['cell_type']}".encode()).hexdigest()
    cell = {**cell, "id": digest[:8], "source": text.splitlines(keepends=True)}
    return {**cell, "execution_count": None, "outputs": []} if _is_code(cell) else cell


def _is_code(cell: dict[str, Any]) -> bool:
    return cell["cell_type"] == "code"


def notebook(text: str) -> str:
    """The notebook of a percent script, as the text of its file."""
    content = {
        "cells": cells(text),
        "metadata": {
            "colab": {"provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def out_of_step() -> list[Path]:
    """Notebooks that are missing or not what their script gives, and notebooks without a script."""
    wanted = {p.with_suffix(".ipynb"): notebook(p.read_text(encoding="utf-8")) for p in scripts()}
    wrong = [
        path
        for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    return wrong + [path for path in sorted(FOLDER.glob("*.ipynb")) if path not in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the notebooks; returns the exit code."""
    parser = argparse.ArgumentParser(description="Keeps notebooks in step with their scripts.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if out of step")
    if parser.parse_args(argv).check:
        wrong = out_of_step()
        for path in wrong:
            print(f"{path.name} is out of step with its script: run {Path(__file__).name}")
        return 1 if wrong else 0
    for path in scripts():
        target = path.with_suffix(".ipynb")
        target.write_text(notebook(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

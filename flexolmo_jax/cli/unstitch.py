# SPDX-License-Identifier: Apache-2.0
"""Take one expert out of a model: the slice directory exactly as its owner shipped it."""

import argparse
from typing import Any

from flexolmo_jax.cli.byte_line import ByteLine
from flexolmo_jax.storage import output, urls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo unstitch`."""
    parser.add_argument(
        "--model", required=True, type=urls.location, metavar="M", help="a stitched model"
    )
    parser.add_argument("--expert", required=True, metavar="ID", help="id of the expert")
    parser.add_argument(
        "--out", required=True, type=urls.location, metavar="DIR", help="a new directory"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Copies the slice out and returns its digest."""
    from flexolmo_jax.experts import stitch

    with output.directory(args.out, "flexolmo.json") as out, ByteLine("copying") as line:
        result = stitch.unstitch(args.model, args.expert, out, note=line)
    print(f"expert {args.expert} -> {args.out}\nslice  {result['manifest_digest']}")
    return {**result, "digests": {"manifest_digest": result["manifest_digest"]}}

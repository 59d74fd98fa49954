# SPDX-License-Identifier: Apache-2.0
"""Take one expert out of a model: the slice directory exactly as its owner shipped it."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo unstitch`."""
    parser.add_argument("--model", required=True, type=Path, metavar="M", help="a stitched model")
    parser.add_argument("--expert", required=True, metavar="ID", help="id of the expert")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new directory")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Copies the slice out and returns its digest."""
    from flexolmo_jax.experts import stitch

    result = stitch.unstitch(args.model, args.expert, args.out)
    print(f"expert {args.expert} -> {args.out}\nslice  {result['manifest_digest']}")
    return {**result, "digests": {"manifest_digest": result["manifest_digest"]}}

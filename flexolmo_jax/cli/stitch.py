# SPDX-License-Identifier: Apache-2.0
"""One model from an anchor and expert slices: no training, no byte rewritten, any order."""

import argparse
from pathlib import Path
from typing import Any

from flexolmo_jax.cli.byte_line import ByteLine
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.storage import output, urls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo stitch`."""
    parser.add_argument(
        "--anchor", required=True, type=urls.location, metavar="A", help="an anchor"
    )
    parser.add_argument(
        "--expert",
        dest="experts",
        action="append",
        type=urls.location,
        default=[],
        metavar="E",
        help="an expert slice (once per expert)",
    )
    parser.add_argument("--out", type=urls.location, metavar="M", help="a new directory")
    parser.add_argument("--slots", type=int, metavar="N", help="capacity, public expert included")
    parser.add_argument(
        "--like",
        type=urls.location,
        metavar="M0",
        help="take capacity and positions from this model",
    )
    parser.add_argument(
        "--active", type=int, metavar="K", help="experts per token (default: 2, or as --like)"
    )
    parser.add_argument(
        "--link",
        action="store_true",
        help="copy no weights: the model names where they lie, and needs them to stay there",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and show the plan only")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plans, shows the plan, stitches, and returns slots and digests."""
    from flexolmo_jax.experts import stitch

    if args.out is None and not args.dry_run:
        raise ConfigError("--out is missing", fix="name a new directory, or add --dry-run")
    if isinstance(args.out, Path) and args.out.exists() and not args.dry_run:
        raise ConfigError("The output exists already", where=args.out, fix="name a new directory")
    if args.link and args.out is not None and not isinstance(args.out, Path):
        raise ConfigError(
            "A model with links is written on this machine only",
            got=args.out,
            fix="name a directory, or leave out --link",
        )
    plan = stitch.plan(
        args.anchor, args.experts, slots=args.slots, like=args.like, active=args.active
    )
    print(plan.table())
    if args.dry_run:
        return {"slots": plan.slots, "model_digest": plan.model_digest, "bytes_copied": 0}
    with output.directory(str(args.out), "flexolmo.json") as out, ByteLine("stitching") as line:
        result = stitch.execute(plan, out, link=args.link, note=line)
    done = f"{result['bytes_checked'] / 2**20:.1f} MiB verified"
    print(f"{done}, {result['bytes_copied'] / 2**20:.1f} MiB copied -> {args.out}")
    if args.link:
        print("Its weights lie where they were. They must stay there, next to it as they are now.")
    names = ("anchor_digest", "model_digest")
    return {**result, "digests": {n: result[n] for n in names}}

# SPDX-License-Identifier: Apache-2.0
"""Compile a step for a pod on this machine, and predict its memory and time.

No accelerator, data or anchor is needed; the real TPU compiler comes with the extra `tpu`:

  flexolmo plan --config experiments/expert.py:size=7b --topology v5e:4x4 --rows 16
  flexolmo plan --config experiments/stitched.py:size=8x7b --topology v5p:4x4x8 --rows 128 \\
      --config.exec.mesh_expert=8

--rows counts the rows of a whole step; without it the configuration's batch is planned, in as many
micro-batches as it says (optim.accumulate).
"""

import argparse
import sys
from typing import Any

from flexolmo_jax.pods import process, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo plan`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="an experiment file with its argument, such as experiments/expert.py:size=7b",
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME:SHAPE",
        help="chips of one slice: v4:4x4x4, v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4",
    )
    parser.add_argument("--slices", type=int, default=1, help="slices of that shape (1)")
    parser.add_argument(
        "--stage",
        default="",
        help="anchor, expert, router, joint, eval, prefill or decode (the configuration's)",
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="DIR|FILE[:ARG]",
        help="where the architecture is, if the configuration does not say",
    )
    parser.add_argument("--rows", type=int, default=0, help="rows per step (the configuration's)")
    parser.add_argument(
        "--seq-len", type=int, default=0, help="tokens per row (the configuration's)"
    )
    parser.add_argument(
        "--search", action="store_true", help="try meshes, remat policies and rows at once"
    )
    parser.add_argument(
        "--units", type=int, default=0, metavar="N", help="list the N units that take longest"
    )
    parser.add_argument(
        "--config.KEY",
        dest="overrides",
        action="append",
        default=[],
        metavar="VALUE",
        help="replace one value of the configuration (any number of times)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles, prints the plan and returns it."""
    request = process.Request(
        config=args.config,
        topology=args.topology,
        slices=args.slices,
        overrides=tuple(args.overrides),
        model=args.model,
        stage=args.stage,
        rows=args.rows,
        seq_len=args.seq_len,
        search=args.search,
    )
    result = process.plan(request, lambda line: print(line, file=sys.stderr, flush=True))
    print(table.text(result, args.units))
    return result

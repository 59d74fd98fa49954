# SPDX-License-Identifier: Apache-2.0
"""flexolmo prepare: text -> token shards with a sidecar."""

import argparse
from typing import Any

from flexolmo_jax.data import prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this subcommand."""
    parser.add_argument(
        "--source",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME-or-path",
        help="corpora (code, news, legal, …) or .txt, .jsonl(.gz, .zst), .parquet files or folders",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help="a tokenizer.json, a folder with one, or dolma2; with --train-tokenizer, a new file",
    )
    parser.add_argument("--out", metavar="DIR", help="where the shards go; must not exist")
    parser.add_argument(
        "--split", default="train", help="train, tuning, heldout or all (default: train)"
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        help="bytes of text per source at most; whole documents only, so it may be less",
    )
    parser.add_argument("--seed", type=int, default=0, help="choice and order of the documents")
    parser.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB",
        help="first train a byte-level BPE of this size on the same text",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepares and returns the sidecar."""
    return prepare.prepare_command(
        args.source,
        args.tokenizer,
        args.out,
        split=args.split,
        max_bytes=args.max_bytes,
        seed=args.seed,
        train_vocab=args.train_tokenizer,
        progress=lambda line: print(line, flush=True),
    )

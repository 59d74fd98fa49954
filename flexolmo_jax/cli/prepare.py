# SPDX-License-Identifier: Apache-2.0
"""flexolmo prepare: text -> token shards with a sidecar."""

import argparse
from typing import Any

from flexolmo_jax.data import prepare
from flexolmo_jax.storage import output, urls


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

    _add_corpus_arguments(parser)


def _add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "text of any size",
        "With any of these options nothing is held in memory as a whole, documents are ordered by "
        "a hash, and an interrupted run goes on when it is called again (docs/prepare.md).",
    )
    group.add_argument(
        "--runner",
        metavar="NAME",
        help="local (default), or by Apache Beam: direct, DataflowRunner, FlinkRunner, SparkRunner",
    )
    group.add_argument("--workers", type=int, metavar="N", help="processes of --runner direct")
    group.add_argument(
        "--runner-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the Beam runner, as project=P or region=R; may be repeated",
    )
    group.add_argument("--shards", type=int, metavar="N", help="files; default: one per 64 MiB")
    group.add_argument(
        "--dedup",
        metavar="KIND",
        help="none, exact or near (default): also documents that are nearly the same; what is in "
        "the held-out text, or near it, is never in the training text",
    )
    group.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="F",
        help="length=MIN:MAX, letters=MIN, repetition=MAX, language=en,de or FILE.py:FUNCTION; "
        "may be repeated",
    )
    group.add_argument(
        "--max-bad-frac",
        type=float,
        metavar="F",
        help="share of rows that may be unusable and are skipped; default: the first is refused",
    )
    group.add_argument("--stage", metavar="DIR", help="unfinished work; default: OUT.staged")


def _corpus_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """The options of text of any size, or None where none is given."""
    given = {
        "runner": args.runner,
        "workers": args.workers,
        "runner_options": args.runner_option or None,
        "n_shards": args.shards,
        "dedup": args.dedup,
        "filters": args.filter or None,
        "max_bad_frac": args.max_bad_frac,
        "stage": args.stage,
    }
    return {k: v for k, v in given.items() if v is not None} or None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepares and returns the sidecar."""
    url = None if args.out is None else urls.as_url(args.out)
    if url is None or _of_any_size(args):
        return _prepare(args, url or args.out)
    with output.directory(url, "tokens.json") as out:
        result = _prepare(args, str(out))
    return {**result, "out": url}


def _of_any_size(args: argparse.Namespace) -> bool:
    """Whether the text goes through the path that writes to a URL itself, and goes on there."""
    return _corpus_options(args) is not None or any(map(urls.as_url, args.source))


def _prepare(args: argparse.Namespace, out: str | None) -> dict[str, Any]:
    return prepare.prepare_command(
        args.source,
        args.tokenizer,
        out,
        split=args.split,
        max_bytes=args.max_bytes,
        seed=args.seed,
        train_vocab=args.train_tokenizer,
        corpus=_corpus_options(args),
        progress=lambda line: print(line, flush=True),
    )

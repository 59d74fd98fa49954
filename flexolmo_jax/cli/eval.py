# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of a model per domain, with all experts, some, or all but some."""

import argparse
from typing import Any


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which a request says which experts it may use."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--allow", type=_names, metavar="A,B", help="use only these experts")
    group.add_argument("--deny", type=_names, metavar="C", help="use all experts but these")
    parser.add_argument("--active", type=int, metavar="K", help="experts used per token")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo eval`."""
    parser.add_argument("--model", required=True, metavar="M", help="a model or anchor directory")
    add_policy_arguments(parser)
    parser.add_argument("--tasks", type=_names, default=["bpb"], help="comma list; now: bpb")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="<domain>/heldout token shards"
    )
    parser.add_argument("--rows", type=int, default=0, help="rows per domain (default: all)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates, prints a table and returns the result."""
    from flexolmo_jax import inference

    result = inference.evaluate_model(
        args.model,
        args.data,
        allow=args.allow,
        deny=args.deny,
        active=args.active,
        tasks=args.tasks,
        n_rows=args.rows,
    )
    experts = result["allowed"]
    print(f"{'domain':14}{'bits/byte':>10}{'stderr':>9}   " + "".join(f"{e:>11}" for e in experts))
    for domain, score in result["bpb"].items():
        shares = "".join(f"{result['routing'][domain][e]:>11.2f}" for e in experts)
        print(f"{domain:14}{score['value']:>10.4f}{score['stderr']:>9.4f}   {shares}")
    return result


def _names(text: str) -> list[str]:
    return [name for name in text.replace("+", ",").split(",") if name]

# SPDX-License-Identifier: Apache-2.0
"""Continue prompts, with the tokens that each expert served."""

import argparse
from typing import Any

from flexolmo_jax.cli.eval import add_policy_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo generate`."""
    parser.add_argument("--model", required=True, metavar="M", help="a model or anchor directory")
    parser.add_argument("--prompt", required=True, action="append", help="may be given repeatedly")
    add_policy_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generates, prints the texts and returns them."""
    from flexolmo_jax import inference, sample

    sampling = sample.SampleConfig(args.max_new_tokens, args.temperature, args.top_p)
    m = inference.open_model(args.model, allow=args.allow, deny=args.deny)
    answers = inference.generate_text(
        m, args.prompt, active=args.active, sampling=sampling, seed=args.seed
    )
    for answer in answers:
        served = ", ".join(f"{e} {n:g}" for e, n in answer["tokens_per_expert"].items())
        print(f"{answer['prompt']}{answer['text']}\n  [tokens served per layer: {served}]\n")
    return {"prompts": answers, "allowed": sorted(m.slots)}

# SPDX-License-Identifier: Apache-2.0
"""Recipe card: the anchor, a dense model of public text that every owner starts from.

Purpose: a frozen common ground. Its FFN becomes the public expert, slot 0 of every model.
Command: flexolmo train --config experiments/anchor.py:size=tiny,data=runs/demo/data,\\
    tokenizer=runs/demo/tokenizer.json --workdir runs/demo/runs/anchor
Cost:    tiny: a few minutes on two CPU cores. 7b: 1T tokens, three days on 512 H100 in the paper.
Expect:  tiny: about 1.8 bits per byte on held-out public text (November 2026).
Differs from the previous stage: there is none.

Argument: size (tiny, 135m, 60m, 190m, 1b, 7b), data (directory with <domain>/train and
<domain>/heldout), domains (joined by +), tokenizer, context (router context of the models to
come; empty takes the recipe's. token is the paper's, whose experts hold FFNs alone: what other
formats can hold).
"""

import dataclasses

from ml_collections import ConfigDict

from experiments import common
from flexolmo_jax.config import AdapterConfig


def get_config(arg: str = "") -> ConfigDict:
    """Returns the configuration of one anchor job."""
    a = common.parse_arg(
        arg,
        size="tiny",
        data="runs/demo/data",
        domains="+".join(common.PUBLIC),
        tokenizer="runs/demo/tokenizer.json",
        context="",
    )
    model = dict(common.pick(common.sizes(), a.size))
    router, adapters = common.router(a.size), common.adapters(a.size)
    if a.context:
        router["context"] = a.context
    domains = a.domains.split("+")
    if a.context == "token":
        router, adapters = {**router, **common.NO_EVIDENCE}, {}
    elif router.get("evidence"):  # One corpus has nothing to be told from.
        router["evidence_parts"] = len(domains) if len(domains) > 1 else 0
    config = common.base("anchor", a.size)
    # What experts may hold is agreed with the anchor.
    adapters = dataclasses.asdict(AdapterConfig(**adapters))
    config.model = {**model, "router": router, "adapters": adapters}
    config.tokenizer = a.tokenizer
    config.data.sources = tuple(common.source(f"{a.data}/{d}/train", public=True) for d in domains)
    config.data.heldout = tuple(
        common.source(f"{a.data}/{d}/heldout", public=True) for d in domains
    )
    return config

# SPDX-License-Identifier: Apache-2.0
"""Recipe card: the joint mixture, a model of the stitched shape whose experts train together.

Purpose: the unrestricted control. Stitching itself trains nothing, so this is also the shape with
    which `flexolmo plan` tells memory and speed before any expert exists.
Command: flexolmo plan --config experiments/stitched.py:size=8x7b --topology v5p:4x4x8
Cost:    to plan: a few minutes of compilation, no accelerator. To train at size tiny: some ten
    minutes on two CPU cores.
Expect:  8x7b: 37.6B parameters, 20.3B of them active with four of eight experts.
Differs from the anchor: more slots, rows of the router that train with the rest, a loss that keeps
    the load even; public and closed text together, which nobody in this project may otherwise do.

Argument: size (tiny, 2x7b, 8x7b, 8x1b), active (experts per token; 0 takes the size's), data,
domains (joined by +; empty takes the demo's), start (a mixture to go on with instead of drawn
weights; its architecture and tokenizer hold then).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import common
from flexolmo_jax.errors import ConfigError


def get_config(arg: str = "") -> ConfigDict:
    """Returns a configuration whose model has the stitched shape."""
    a = common.parse_arg(
        arg,
        size="tiny",
        active=0,
        data="runs/demo/data",
        domains="+".join((*common.PUBLIC, *common.CLOSED)),
        start="",
    )
    sizes = common.finished_sizes() if a.start else common.stitched_sizes()
    model = dict(common.pick(sizes, a.size))
    config = common.base("joint", a.size)
    if a.start and a.active:
        raise ConfigError("A mixture to go on with has its own number of active experts", got=arg)
    if a.active:
        model["n_active"] = a.active
    if a.start:
        # Weights that are finished take the smaller steps of those who go on with an anchor.
        config.anchor, config.optim.peak_lr = (
            a.start,
            common.base("anchor", a.size, "dense").optim.peak_lr,
        )
    else:
        # Trained together: nobody counts tokens of one owner, and nothing is added to FFNs.
        config.model = {**model, "router": {**common.router(a.size), **common.NO_EVIDENCE}}
        config.tokenizer = "runs/demo/tokenizer.json"
    config.data.sources = tuple(
        common.source(f"{a.data}/{d}/train", public=d in common.PUBLIC)
        for d in a.domains.split("+")
    )
    return config


def get_model(arg: str = "") -> dict[str, Any]:
    """Fields of the `ModelConfig` of a mixture to go on with, to plan the job before it is made."""
    return common.planned_model(common.stitched_sizes(), arg)

# SPDX-License-Identifier: Apache-2.0
"""Recipe card: a dense model of one domain, all weights of the anchor trained further.

Purpose: what experts are compared with. Soups, branch-train-merge and BTX are made of such models;
    the anchor trained further on public text is one too.
Command: flexolmo train --config experiments/dense.py:size=tiny,anchor=runs/demo/anchor,\\
    own=runs/demo/data/code --workdir runs/dense/code
Cost:    tiny: one or two minutes on two CPU cores, a third less than an expert of as many tokens.
Expect:  tiny: better on the own domain than an expert, since every weight moves, and worse on all
    other text (docs/results.md).
Differs from the expert stage: one model instead of two slots, nothing is frozen, there is no
    router; the owner must hand over the whole model.

Argument: size, anchor (a model directory), own (directories with train and heldout, joined by +),
public (the same, to be scored on while training).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the configuration of one dense model."""
    a = common.parse_arg(
        arg, size="tiny", anchor="runs/demo/anchor", own="runs/demo/data/code", public=""
    )
    common.pick(common.sizes(), a.size)
    config = common.base("anchor", a.size, "dense")
    config.anchor = a.anchor
    own, public = a.own.split("+"), list(filter(None, a.public.split("+")))
    config.data.sources = tuple(common.source(f"{d}/train") for d in own)
    config.data.heldout = (
        *(common.source(f"{d}/heldout") for d in own),
        *(common.source(f"{d}/heldout", public=True) for d in public),
    )
    return config


def get_model(arg: str = "") -> dict[str, Any]:
    """Fields of the anchor's `ModelConfig`, to plan the job before there is an anchor."""
    return common.planned_model(common.sizes(), arg)

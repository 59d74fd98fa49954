# SPDX-License-Identifier: Apache-2.0
"""Recipe card: the router rows of one finished expert, tuned alone.

Purpose: a row that knows what its expert has become. Each owner tunes its own against the frozen
    public row, on its own text and public text; no other owner's row or text has a say, so an owner
    who leaves changes nothing for the others. (The paper tunes all rows of a stitched model
    together, which experiments/router.py does; leaving is then not exact any more.)
Command: flexolmo train --config experiments/rows.py:size=tiny,expert=code,\\
    anchor=runs/demo/anchor,slice=runs/demo/slices/code --workdir runs/rows/code
Cost:    tiny: one or two minutes on two CPU cores for 60 steps.
Expect:  tiny: nothing, where rows were trained with their expert already (docs/results.md).
Differs from the expert: only router rows and biases train; a new slice comes out, with the same
    FFN bit for bit.

Argument: as that of expert.py, and slice (the packaged expert).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import common, expert


def get_config(arg: str = "") -> ConfigDict:
    """Returns the configuration of one owner's rows."""
    a = common.parse_arg(arg, slice="", **expert.ARGUMENT)
    config = expert.configure(a)
    config.stage = "rows"
    config.expert = a.slice or f"runs/demo/slices/{a.expert}"
    config.optim = common.base("router", a.size).optim
    config.optim.router_label_loss = 1.0
    # The rows start as they are, and stay as they become.
    config.router_init.method = "zeros"
    return config


def get_model(arg: str = "") -> dict[str, Any]:
    """Fields of the anchor's `ModelConfig`, to plan the job before there is an anchor."""
    return common.planned_model(common.sizes(), arg)

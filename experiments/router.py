# SPDX-License-Identifier: Apache-2.0
"""Recipe card: tuning the router of a stitched model, all rows together (the paper's last step).

Purpose: let rows that never met each other meet, on proxies: public documents that look like an
    owner's text. No expert and no shared weight changes.
Command: flexolmo train --config experiments/router.py:size=tiny,model=runs/demo/stitched,\\
    proxies=runs/proxies/code+runs/proxies/news --workdir runs/router
Cost:    tiny: a minute or two on two CPU cores. 8x7b: 5B tokens in the paper.
Expect:  the rows of one owner then depend on those of the others: leaving is no longer exact.
    This is why nothing in the demo does it, and why the model that comes out says so.
Differs from the expert stage: every slot is there, only router rows and biases train, at more than
    twice the learning rate; no label loss.

Argument: size, model (a stitched model), proxies (token-shard directories with train and heldout,
joined by +), public (the same for public text).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the configuration of one router job."""
    a = common.parse_arg(
        arg,
        size="tiny",
        model="runs/demo/stitched",
        proxies="",
        public="+".join(f"runs/demo/data/{d}" for d in common.PUBLIC),
    )
    common.pick(common.finished_sizes(), a.size)
    config = common.base("router", a.size)
    config.anchor = a.model
    folders = [*filter(None, a.proxies.split("+")), *a.public.split("+")]
    config.data.sources = tuple(common.source(f"{f}/train", public=True) for f in folders)
    config.data.heldout = tuple(common.source(f"{f}/heldout", public=True) for f in folders)
    return config


def get_model(arg: str = "") -> dict[str, Any]:
    """Fields of the stitched model's `ModelConfig`, to plan the job before it is stitched."""
    return common.planned_model(common.stitched_sizes(), arg)

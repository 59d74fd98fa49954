# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N999 (a plan file is loaded by its path)
"""The paper's model on TPU pods: an anchor of 7B, seven owners apart, 8x7B, its router, its scores.

Command: flexolmo launch --plan experiments/plans/8x7b.py:org=example --backend gke \\
    --cluster launch/tpu/cluster.yaml --dry-run
Cost:    launch/README.md, "What it costs".

Every owner has a bucket, a service account and slices of its own, in zones of its own choice: edit
the table below. Argument: org (first part of the names of buckets), anchor (an existing anchor,
instead of training one), owners (some of the table, joined by +), workdir (where the launcher
keeps its records), tuning (false leaves the router as it was stitched).
"""

from experiments import common
from experiments.consortium import Consortium, Owner, Slice
from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.jobs.plan import Plan

# Rows per chip are what the planner finds to fit (README, table over pods).
V5P = Slice("v5p", "4x4x4", zone="us-east5-a", rows=4)
V6E = Slice("v6e", "8x8", zone="europe-west4-a", rows=1)
V5E = Slice("v5e", "8x16", zone="us-west4-a", rows=1)
OWNERS = {
    "academic": V5P,
    "code": V6E,
    "creative": V5E,
    "education": V5P,
    "math": V6E,
    "news": V5P,
    "reddit": V5E,
}
# Two slices, joined by the data centre's network; one of 8x8x8 does the same work.
ANCHOR = Slice("v5p", "4x8x8", slices=2, zone="us-east5-a", rows=2)
ROUTER = Slice("v5p", "4x4x8", zone="us-east5-a", rows=1)
SCORES = Slice("v5p", "2x2x1", zone="us-east5-a")
PUBLIC = ("web", "wiki")


def get_plan(arg: str = "") -> Plan:
    """Returns the jobs of the 8x7B model."""
    a = common.parse_arg(
        arg,
        org="example",
        anchor="",
        owners="+".join(OWNERS),
        workdir="runs/8x7b",
        tuning=True,
    )
    chosen = a.owners.split("+")
    for name in chosen:
        if name not in OWNERS:
            raise ConfigError("No such owner", got=name, fix=nearest(name, OWNERS))
    exchange = f"gs://{a.org}-flexolmo-exchange"
    return Consortium(
        name="8x7b",
        size="7b",
        stitched="8x7b",
        workdir=a.workdir,
        home=f"gs://{a.org}-flexolmo-home",
        exchange=exchange,
        identity="flexolmo",
        owners=tuple(
            Owner(n, f"gs://{a.org}-flexolmo-{n}", f"flexolmo-{n}", OWNERS[n]) for n in chosen
        ),
        public=tuple(f"{exchange}/public/{n}" for n in PUBLIC),
        proxies=tuple(f"{exchange}/proxies/{n}" for n in chosen) if a.tuning else (),
        anchor=a.anchor,
        tokenizer=f"{exchange}/tokenizer.json",
        big=ROUTER,
        small=SCORES,
        anchor_slice=ANCHOR,
    ).plan()

# SPDX-License-Identifier: Apache-2.0
"""Two owners and the tiny model: small enough to read, and to try a cluster with.

Command: flexolmo launch --plan experiments/plans/two.py:root=gs://example-try --backend gke \\
    --cluster launch/tpu/cluster.yaml --dry-run
Cost:    minutes; on="v5e:2x2" takes one host per job, on="" CPU alone.

Buckets are made from root: ROOT-code, ROOT-news, ROOT-home and ROOT-exchange (on a cluster with a
shared disk, directories). Argument: root, anchor (an existing one), on (accelerator:topology),
workdir, tuning.
"""

from experiments import common
from experiments.consortium import Consortium, Owner, Slice
from flexolmo_jax.jobs.plan import Plan

OWNERS = ("code", "news")


def get_plan(arg: str = "") -> Plan:
    """Returns the jobs of a model of two owners."""
    a = common.parse_arg(
        arg, root="gs://example-try", anchor="", on="v5e:2x2", workdir="runs/two", tuning=True
    )
    accelerator, _, topology = a.on.partition(":")
    where = Slice(accelerator, topology)
    return Consortium(
        name="two",
        size="tiny",
        stitched="tiny",
        workdir=a.workdir,
        home=f"{a.root}-home",
        exchange=f"{a.root}-exchange",
        identity="flexolmo",
        owners=tuple(Owner(n, f"{a.root}-{n}", f"flexolmo-{n}", where) for n in OWNERS),
        public=(f"{a.root}-exchange/public/wiki",),
        proxies=tuple(f"{a.root}-exchange/proxies/{n}" for n in OWNERS) if a.tuning else (),
        anchor=a.anchor,
        tokenizer=f"{a.root}-exchange/tokenizer.json",
        big=where,
        small=where,
        anchor_slice=where,
        tasks="bpb",
        cpu=(4, 16),
    ).plan()

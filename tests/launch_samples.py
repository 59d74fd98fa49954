# SPDX-License-Identifier: Apache-2.0
"""Plans, settings and manifests that the tests of `flexolmo launch` share."""

from pathlib import Path

import yaml

from flexolmo_jax import configfile
from flexolmo_jax.jobs import gke
from flexolmo_jax.jobs.plan import Job, Plan, Resources, order

ROOT = Path(__file__).resolve().parents[1]
GKE = {
    "namespace": "flexolmo",
    "queue": "pods",
    "priority": "low",
    "reservation": "spot",
    "image": "us-docker.pkg.dev/example/flexolmo/train:1",
}
TPU_VM = {
    "project": "example-project",
    "zone": "us-east5-a",
    "reservation": "reserved",
    "cpu_type": "v5litepod-8",
    "image": GKE["image"],
}
SLURM = {"partition": "gpu", "account": "acme"}
# What a shell, YAML or a program's own parser could take for something else.
HOSTILE = (
    "two words",
    "it's",
    'say "hi"',
    "$(touch pwned)",
    "`touch pwned`",
    "${HOME}",
    "$HOME",
    "$$",
    "a;touch pwned",
    "a&&b|c>d",
    "line\nbreak",
    "tab\there",
    "-leading",
    "--leading=x",
    "*",
    "~",
    "#comment",
    "no",
    "on",
    "null",
    "1e3",
    "0x10",
    "2026-11-22",
    "12:30:45",
    "- item",
    "key: value",
    "{a: b}",
    "[x]",
    "&anchor",
    "*alias",
    "!!python/object:x",
    "%TAG",
    "@at",
    "---",
    "...",
    " padded ",
    "",
    "naïve ☃",
    "back\\slash",
    "\\\n",
    "!history",
)


def plan_file(reference):
    """The plan of one of our plan files."""
    return configfile.load_function(f"{ROOT}/experiments/plans/{reference}", "get_plan")()


def tpu(topology="2x2x1", **fields):
    return Resources(accelerator="v5p", topology=topology, **fields)


def job(name, *command, **fields):
    return Job(name=name, command=command or ("flexolmo", "verify", name), **fields)


def plan_of(workdir, *jobs, **fields):
    return Plan(name="p", workdir=str(workdir), jobs=jobs, **fields)


def every_shape(workdir):
    """Jobs that together use every field of a manifest."""
    return plan_of(
        workdir,
        job(
            "one", resources=tpu(zone="us-east5-a", identity="me", bucket="gs://mine", image="i:1")
        ),
        job("hosts", resources=tpu("4x4x4", region="us-east5"), env={"A": "b"}, workdir="there"),
        job("slices", resources=tpu("4x4x4", slices=3)),
        job("cpu", resources=Resources(cpus=4, memory_gib=16)),
        job("cpus", resources=Resources(processes=2)),
    )


def gke_backend(plan, **given):
    return gke.Gke(plan, list(order(plan)), {**GKE, **given})


def jobsets(workdir="runs/x"):
    """Manifests of all shapes under all kinds of capacity."""
    out = []
    for reservation in ("spot", "on-demand", "mine"):
        plan = every_shape(workdir)
        backend = gke_backend(plan, reservation=reservation)
        out += [backend.manifest(j) for j in plan.jobs]
    return out


def cluster_objects():
    """The objects of launch/tpu/kueue.yaml."""
    text = (ROOT / "launch" / "tpu" / "kueue.yaml").read_text()
    return [v for v in yaml.safe_load_all(text) if v]

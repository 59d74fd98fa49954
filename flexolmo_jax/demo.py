# SPDX-License-Identifier: Apache-2.0
"""The main job: assets, then the plan of the demo as processes, then the report."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax import assets, configfile, demo_evaluate, report, results
from flexolmo_jax.errors import ConfigError, DataError
from flexolmo_jax.experts import model_info
from flexolmo_jax.experts.manifest import PUBLIC
from flexolmo_jax.jobs import local, progress
from flexolmo_jax.stages import TRAINED, learnt

# Files of the checkout: the demo shows the same experiment files that a user would edit.
PLAN = Path(__file__).resolve().parents[1] / "experiments" / "plans" / "demo.py"
ASSETS = ("public", "news", "legal", "academic")

Say = Callable[[str], None]


def run(
    workdir: Path, *, seed: int = 0, quick: bool = False, max_parallel: int = 1, say: Say = print
) -> dict[str, Any]:
    """Runs what is missing of the demo in `workdir`; returns the content of report.json.

    Raises:
      ConfigError: a folder whose path cannot stand in the argument of an experiment file.
      AssetError, MachineError: the corpora cannot be fetched.
      MachineError: a job failed; its log has been shown.
      Preempted: a job was told to stop and has saved its state.
    """
    if not PLAN.is_file():
        fix = "clone the repository and run the demo there"
        raise ConfigError("The demo needs the experiments of a checkout", where=PLAN, fix=fix)
    began = time.perf_counter()
    folder = configfile.argument_path(workdir, "The workdir of the demo")
    root = configfile.argument_path(assets.default_root(), "The asset folder", ",")
    assets.fetch(ASSETS, root, progress=say)
    fetched = time.perf_counter() - began
    arg = f"workdir={folder},seed={seed},quick={quick},assets={root}"
    plan = configfile.load_function(f"{PLAN}:{arg}", "get_plan")()
    ended = local.run(plan, max_parallel=max_parallel, report=progress.Printer(plan))
    problems = local.failure_text(plan, ended)
    if problems:
        say(problems)
    local.raise_on_failure(ended)
    config = {"size": "tiny", "seed": seed, "quick": quick, "workdir": str(workdir)}
    result = collect(workdir, stages(fetched, ended))
    flags = " --quick" if quick else ""
    # A rerun skips what is done: the time of everything is the sum of the stages.
    result["seconds"] = round(sum(s["seconds"] for s in result["stages"].values()), 3)
    result["reproduce"] = f"flexolmo demo --workdir {workdir} --seed {seed}{flags}"
    content = results.frame("demo", config, result, time.perf_counter() - began)
    results.write_json(workdir / "report.json", content)
    report.write(content, curves(workdir, result["domains"]["closed"]), workdir / "report.html")
    say(table(content))
    say(report.headline(report.figures(content)))
    say(f"report: {workdir / 'report.html'}")
    return content


def evaluate(
    workdir: Path, *, rows: int, seq_len: int, seed: int, say: Say = print
) -> dict[str, Any]:
    """The plan's evaluation job: writes evaluation.json."""
    names = domains(workdir)
    heldout = {d: workdir / "data" / d / "heldout" for d in (*names["public"], *names["closed"])}
    found = demo_evaluate.run(
        workdir / "stitched",
        heldout,
        names["public"],
        rows=rows,
        seq_len=seq_len,
        seed=seed,
        progress=say,
    )
    results.write_json(workdir / "evaluation.json", found)
    return found


def domains(workdir: Path) -> dict[str, list[str]]:
    """Closed domains are those that the stitched model has an expert of; the rest is public.

    Raises:
      DataError: an expert without held-out text.
    """
    info = model_info.read_info(workdir / "stitched")
    closed = [e for e in info.slots if e != PUBLIC]
    there = sorted(p.parent.name for p in (workdir / "data").glob("*/heldout"))
    for expert in closed:
        if expert not in there:
            raise DataError("No held-out text of an expert's domain", got=expert, where=workdir)
    return {"public": [d for d in there if d not in closed], "closed": closed}


def stages(fetched_s: float, ended: Sequence[local.JobResult]) -> dict[str, dict[str, float]]:
    """Seconds per stage; a job that was up to date counts with the time of its earlier run."""
    seconds: dict[str, float] = {"assets": fetched_s}
    for result in ended:
        kind = result.name.split(":")[0]
        name = "prepare" if kind == "tokenizer" else kind
        name = result.name if kind == "train" else name
        seconds[name] = seconds.get(name, 0.0) + result.seconds
    return {name: {"seconds": round(value, 2)} for name, value in seconds.items()}


def collect(workdir: Path, stage_seconds: Mapping[str, Any]) -> dict[str, Any]:
    """Results of the jobs in the form of report.json."""
    info = model_info.read_info(workdir / "stitched")
    names = domains(workdir)
    found = report.read_json(workdir / "evaluation.json")
    device = found.pop("device", "unknown")
    return {
        **found,
        "domains": names,
        "gain_kept": report.gain_kept(found["bpb"], names["closed"]),
        "stages": dict(stage_seconds),
        "training": {f"train:{n}": training(workdir, n) for n in ("anchor", *names["closed"])},
        "digests": {
            "anchor": info.anchor_digest,
            "model": info.model_digest,
            "tokenizer": info.tokenizer_digest,
            "slices": {e: info.manifest_digests[e] for e in names["closed"]},
        },
        "machine": machine(device),
    }


def training(workdir: Path, name: str) -> dict[str, Any]:
    """Steps, tokens and trained parameters of a job."""
    summary = report.read_json(workdir / "runs" / name / "summary.json")
    info = model_info.read_info(workdir / "stitched")
    expert = PUBLIC if name == "anchor" else name
    manifest = report.read_json(info.expert_path(expert) / "flexolmo.json")
    leaves = manifest["leaves"]
    trained = TRAINED["anchor"] if name == "anchor" else learnt(leaves)
    shapes = [leaves[leaf]["shape"] for leaf in trained]
    if name == "anchor":
        shared = info.content["shared"]
        shapes += [shared[leaf]["shape"] for leaf in learnt(shared)]
    count = sum(int(np.prod(shape)) for shape in shapes)
    return {"steps": summary["steps"], "tokens": summary["tokens"], "trained_parameters": count}


def curves(workdir: Path, closed: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Loss curves of all training jobs."""
    names = ("anchor", *closed)
    return {n: report.read_curve(workdir / "runs" / n / "metrics.jsonl") for n in names}


def machine(device: str) -> dict[str, str]:
    """What the demo ran on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out = {"device": device, "CPU cores": str(cores), "system": platform.platform(terse=True)}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        out["memory"] = f"{size / 2**30:.0f} GiB"
    return out


def table(content: Mapping[str, Any]) -> str:
    """Bits per byte as a short table for the screen."""
    names = [*content["domains"]["public"], *content["domains"]["closed"]]
    models = report.order_models(content["bpb"])
    width = max(len(report.model_label(m)) for m in models)
    lines = ["", "bits per byte".ljust(width) + "".join(f"{n:>10}" for n in names)]
    for name in models:
        row = content["bpb"][name]
        cells = [f"{row[d]['value']:10.3f}" if d in row else " " * 9 + "-" for d in names]
        lines.append(report.model_label(name).ljust(width) + "".join(cells))
    return "\n".join([*lines, ""])

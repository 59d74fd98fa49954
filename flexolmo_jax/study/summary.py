# SPDX-License-Identifier: Apache-2.0
"""From the scores of seeds to rows, means, standard errors and differences between methods."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexolmo_jax.study.design import Study

Scores = Mapping[str, Any]


def rows(study: Study, scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """One row per method and seed, as the result file lists them."""
    return [
        {
            "method": name,
            "seed": found["seed"],
            "bpb": {d: s["value"] for d, s in m["bpb"].items()},
            "stderr_documents": {d: s["stderr"] for d, s in m["bpb"].items()},
            **means(study, {d: s["value"] for d, s in m["bpb"].items()}),
            "train_flops": m["train_flops"],
            "active_params": m["active_params"],
            "chosen": {k: v["value"] for k, v in m["chosen"].items()},
            "tasks": {t: s["value"] for t, s in m.get("tasks", {}).items()},
            "gap_stderr": m["gap_stderr"],
        }
        for found in scores
        for name, m in found["methods"].items()
    ]


def means(study: Study, bits: Mapping[str, float]) -> dict[str, float]:
    """The means that tables show, and the worst domain."""

    def mean(domains: Sequence[str]) -> float:
        return float(np.mean([bits[d] for d in domains]))

    return {
        "mean_closed": mean(study.closed),
        "mean_public": mean(study.public),
        "mean_unseen": mean(study.unseen) if study.unseen else math.nan,
        "mean_all": mean(study.domains),
        "worst": max(bits.values()),
    }


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean, its standard error over seeds (None of one seed), and their number."""
    array = np.asarray(values, np.float64)
    n = len(array)
    stderr = float(array.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": float(array.mean()), "stderr": stderr, "n": n}


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Method to estimates: of the mean over all domains, of the others, and of each domain."""
    out: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in found):
        mine = [row for row in found if row["method"] == method]
        keys = ("mean_closed", "mean_public", "mean_unseen", "worst")
        out[method] = {
            **estimate([row["mean_all"] for row in mine]),
            **{key: estimate([row[key] for row in mine]) for key in keys},
            "bpb": {d: estimate([row["bpb"][d] for row in mine]) for d in mine[0]["bpb"]},
            "tasks": {t: estimate([row["tasks"][t] for row in mine]) for t in mine[0]["tasks"]},
            "train_flops": mine[0]["train_flops"],
            "active_params": max(row["active_params"] for row in mine),
        }
    return out


def difference(found: Sequence[Mapping[str, Any]], ours: str, other: str) -> dict[str, Any]:
    """How much lower the mean over all domains of `ours` is than that of `other`.

    Returns:
      the estimate, paired by seed; `text`: its standard error over pieces of text, which all seeds
      share (mean over seeds); `errors`: the mean in standard errors of both kinds together.
    """

    def by_seed(method: str) -> dict[int, Mapping[str, Any]]:
        return {row["seed"]: row for row in found if row["method"] == method}

    mine, theirs = by_seed(ours), by_seed(other)
    gap = estimate([theirs[seed]["mean_all"] - mine[seed]["mean_all"] for seed in mine])
    each = [row["gap_stderr"][ours] for row in theirs.values()]
    text = None if None in each else float(np.mean(each))
    both = math.hypot(gap["stderr"] or 0.0, text or 0.0)
    known = gap["stderr"] is not None and text is not None and both > 0
    return {**gap, "text": text, "errors": gap["mean"] / both if known else None}


def gain_kept(study: Study, found: Scores, recipe: str, method: str) -> dict[str, float]:
    """Owner to the part of the expert's own gain (beside the anchor) that a mixture keeps."""
    anchor, mixture = (found["methods"][m]["bpb"] for m in ("anchor", method))
    pairs = found["recipes"][recipe]["pairs"]
    domains = {owner: whose.domain for owner, whose in study.owners.items()}
    return {
        owner: (anchor[d]["value"] - mixture[d]["value"]) / (anchor[d]["value"] - pairs[owner][d])
        for owner, d in domains.items()
    }


def opt_out(study: Study, found: Scores, recipe: str, kind: str) -> dict[str, Any]:
    """The worst that leaving does: to who left against the anchor, to those who stayed.

    Returns:
      by number of owners who left: `left` (relative change of a domain whose owner left, against
      the anchor; the highest, above 0 is worse), `any` (the same over all domains), `others` (the
      largest relative change of a domain whose owner stayed, to either side, and towards worse).
    """
    sets = found["recipes"][recipe][kind]
    anchor, whole = found["recipes"][recipe]["part"], sets["bpb"][""]
    out: dict[str, Any] = {}
    for name, bits in sets["bpb"].items():
        if not name:
            continue
        gone = {study.owners[owner].domain for owner in name.split("+")}
        count = str(name.count("+") + 1)
        against = {d: bits[d] / anchor[d] - 1 for d in study.domains}
        moved = {d: bits[d] / whole[d] - 1 for d in study.domains if d not in gone}
        start = {"left": -1.0, "any": -1.0, "others": 0.0, "worse": 0.0}
        mine = out.setdefault(count, start)
        mine["left"] = max(mine["left"], *(against[d] for d in gone))
        mine["any"] = max(mine["any"], *against.values())
        mine["others"] = max(mine["others"], *(abs(v) for v in moved.values()))
        mine["worse"] = max(mine["worse"], *moved.values())
    return out


def recipe_facts(study: Study, scores: Sequence[Scores], recipe: str) -> dict[str, Any]:
    """Gains kept, public text against the anchor, and opt-out of a recipe, over seeds."""
    out: dict[str, Any] = {}
    for variant in study.close:
        method, kind = f"{recipe}{variant}", f"opt_out{variant.replace('+', '_')}"
        kept = [gain_kept(study, s, recipe, method) for s in scores]
        leaving = [opt_out(study, s, recipe, kind) for s in scores]
        exact = [s["recipes"][recipe][kind]["exact"] for s in scores]
        out[method] = {
            "gain_kept": {o: estimate([k[o] for k in kept]) for o in study.owners},
            "public": estimate([_public(study, s, method) for s in scores]),
            "exact": {n: all(x[n] for x in exact) for n in exact[0]},
            "opt_out": {
                n: {key: estimate([x[n][key] for x in leaving]) for key in leaving[0][n]}
                for n in leaving[0]
            },
        }
    return out


def _public(study: Study, found: Scores, method: str) -> float:
    """Relative change of public text against the anchor, mean over its domains."""
    methods = found["methods"]
    return float(
        np.mean(
            [
                methods[method]["bpb"][d]["value"] / methods["anchor"]["bpb"][d]["value"] - 1
                for d in study.public
            ]
        )
    )


def curves(study: Study, scores: Sequence[Scores]) -> dict[str, Any]:
    """Recipe to its curves over active experts, and over owners by order of joining, if any."""
    out: dict[str, Any] = {}
    for recipe in () if study.brief else study.recipes:
        mine = out[recipe] = {}
        found = [s["recipes"][recipe] for s in scores]
        for kind in ("active", "active_fallback"):
            mine[kind] = _curve(study, [f[kind] for f in found])
        mine["owners"] = {
            order: _curve(study, [f["owners"][order] for f in found]) for order in study.orders
        }
    return out


def _curve(study: Study, found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Points of a curve to estimates of means and of each domain, from those of every seed."""
    out = {}
    for key in found[0]:
        each = [means(study, f[key]) for f in found]
        out[key] = {m: estimate([e[m] for e in each]) for m in each[0]}
        out[key]["bpb"] = {d: estimate([f[key][d] for f in found]) for d in study.domains}
    return out

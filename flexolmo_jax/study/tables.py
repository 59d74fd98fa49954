# SPDX-License-Identifier: Apache-2.0
"""Tables of a study as Markdown, for a page and for results that are kept."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexolmo_jax.study.design import Study

Json = Mapping[str, Any]
SAYS = {
    "anchor": "the public model alone",
    "dense-public": "the anchor trained further on public text",
    "soup": "mean of the anchor and all dense models",
    "soup-weighted": "the same, weighed by each model's fit to the row",
    "prompt-routing": "one dense model per piece, named by a classifier",
    "prompt-routing-pairs": "the same, the classifier reads pairs of tokens",
    "btm-1": "the dense model that fits the whole piece best",
    "btm-2": "two of them, probabilities averaged",
    "btm-all": "all of them",
    "btm-causal-1": "the dense model that fits the piece so far best",
    "btm-causal-2": "two of them",
    "btm-causal-all": "all of them",
    "oracle-domain": "oracle: the best dense model of each domain",
    "oracle-token": "oracle: the best dense model of each token",
    "btx": "dense FFNs as experts, the rest averaged, router trained on public text",
    "unrestricted-data": "a mixture on everybody's text together, as many tokens",
    "unrestricted-flops": "the same, as many FLOPs as our experts take",
}
VARIANTS = {
    "+fallback": "public always active and takes what is left",
    "-no-bias": "without expert biases",
    "+rate": "biases set from public text",
    "-tuned": "router tuned jointly on proxies and public text",
    "-uncoordinated": "with FFNs of dense models, which never saw the anchor beside them",
    "-rank4": "changes of rank 4",
    "-rank16": "changes of rank 16",
    "-rank64": "changes of rank 64",
}


def says(study: Study, method: str) -> str:
    """What a method is, in a few words."""
    if method in SAYS:
        return SAYS[method]
    for name in sorted(study.recipes, key=len, reverse=True):
        if method == name:
            return study.recipes[name].says
        if method.startswith(name) and method[len(name) :] in VARIANTS:
            return f"{name}, {VARIANTS[method[len(name) :]]}"
    return f"dense model of {method.removeprefix('dense-')}"


def number(estimate: Json, scale: float = 1.0, digits: int = 3, sign: str = "") -> str:
    """A mean with its standard error over seeds."""
    error = estimate["stderr"]
    text = f"{scale * estimate['mean']:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {scale * error:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def ordered(results: Json) -> list[str]:
    """Methods, best mean over all domains first."""
    return sorted(results["summary"], key=lambda m: results["summary"][m]["mean"])


def methods(study: Study, results: Json) -> str:
    """Every method: means, worst domain, cost."""
    head = ("method", "mean of all", "closed", "public", "unseen", "worst domain", "TFLOP to train",
            "active parameters, M", "what it is")  # fmt: skip
    rows = []
    for name in ordered(results):
        s = results["summary"][name]
        rows.append(
            (
                name,
                number(s),
                *(number(s[k]) for k in ("mean_closed", "mean_public", "mean_unseen", "worst")),
                f"{s['train_flops'] / 1e12:,.1f}",
                f"{s['active_params'] / 1e6:.2f}",
                says(study, name),
            )
        )
    return table(head, rows)


def domains(study: Study, results: Json) -> str:
    """Bits per byte of every method on every domain."""
    rows = [
        (name, *(number(results["summary"][name]["bpb"][d]) for d in study.domains))
        for name in ordered(results)
    ]
    return table(("method", *study.domains), rows)


def tasks(results: Json) -> str:
    """Scores of every method that was asked, and their mean, best first."""
    asked = {m: s["tasks"] for m, s in results["summary"].items() if s["tasks"]}
    mean = {m: sum(e["mean"] for e in found.values()) / len(found) for m, found in asked.items()}
    names = list(next(iter(asked.values())))
    rows = [
        (m, f"{mean[m]:.3f}", *(number(asked[m][name]) for name in names))
        for m in sorted(asked, key=mean.__getitem__, reverse=True)
    ]
    return table(("method", "mean", *names), rows)


def facts(study: Study, results: Json) -> str:
    """Gains kept, public text and opt-out, by recipe."""
    head = ("method", *(f"kept: {o}" for o in study.owners), "public vs anchor, %")
    rows = [
        (
            name,
            *(number(f["gain_kept"][o], 100, 0) + " %" for o in study.owners),
            number(f["public"], 100, 2, "+"),
        )
        for name, f in results["facts"].items()
    ]
    return table(head, rows)


def joining(study: Study, results: Json) -> str:
    """Owners who join, by recipe and order: after the first, and after twice as many each time."""
    head = ("method", "order", "owners", "mean of all", "closed", "public", "who came last")
    rows = []
    for recipe, found in results["curves"].items():
        for order, curve in found["owners"].items():
            names = study.orders[order]
            shown = {0, len(names), *(2**i for i in range(len(names).bit_length()))}
            for n in sorted(shown & set(range(len(names) + 1))):
                keys = ("mean_all", "mean_closed", "mean_public")
                last = names[n - 1] if n else "nobody: the anchor"
                rows.append(
                    (recipe, order, str(n), *(number(curve[str(n)][k]) for k in keys), last)
                )
    return table(head, rows)


def opt_out(study: Study, results: Json) -> str:
    """What leaving does, by recipe and number of owners who leave."""
    head = ("method", "owners gone", "bit-equal to never there (a set per seed)",
            "worst domain vs anchor, %", "worst domain of who left vs anchor, %",
            "others moved at most, %", "others worse at most, %")  # fmt: skip
    rows = [
        (
            name,
            count,
            "yes" if f["exact"][count] else "NO",
            *(number(x[key], 100, 2, "+") for key in ("any", "left", "others", "worse")),
        )
        for name, f in results["facts"].items()
        for count, x in f["opt_out"].items()
    ]
    return table(head, rows)


def against(results: Json) -> str:
    """How far the first recipe is below each method, in standard errors of paired differences."""
    names = tuple(next(iter(results["against"].values())))
    head = ("method", *(f"below it: {n}" for n in names), "± over text", "in errors of both kinds")
    rows = []
    for method in ordered(results):
        found = results["against"][method]
        errors = [found[n]["errors"] for n in names]
        shown = [f"{e:+.1f}" if e is not None else "–" for e in errors]
        text = [f"{t:.4f}" if (t := found[n]["text"]) is not None else "–" for n in names]
        gaps = [number(found[n], 1, 4, "+") for n in names]
        rows.append((method, *gaps, " / ".join(text), " / ".join(shown)))
    return table(head, rows)

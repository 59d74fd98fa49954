# SPDX-License-Identifier: Apache-2.0
"""A study's results as Markdown, and as one page with plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from flexolmo_jax import charts
from flexolmo_jax.study import tables
from flexolmo_jax.study.design import Study

Json = Mapping[str, Any]
TEMPLATE = Path(__file__).with_name("page.html")
OURS, OTHERS, ORACLE = charts.PALETTE[1], charts.PALETTE[0], charts.PALETTE[5]


def sections(study: Study, results: Json) -> list[tuple[str, str, str]]:
    """(heading, what it shows, Markdown table) of every table."""
    seeds = f"mean of {study.seeds} seed(s) ± standard error over seeds"
    return [
        (
            "Methods",
            f"Bits per byte on held-out text, lower is better; {seeds}. Every owner trains on "
            f"{study.owner_tokens:,} tokens, whatever the method; what a method may choose "
            f"(at most {study.trials} values) is chosen on the tuning split.",
            tables.methods(study, results),
        ),
        ("Domains", "The same by domain.", tables.domains(study, results)),
        *_tasks(study, results),
        (
            "Below the others",
            "Mean over all domains of each method minus that of our recipe, paired by seed, ± over "
            "seeds. All seeds share the text: what another choice of it would change is apart, and "
            "the last column counts both.",
            tables.against(results),
        ),
        (
            "What experts keep",
            "Part of each expert's own gain (beside the anchor) that the mixture keeps, and what "
            "public text costs.",
            tables.facts(study, results),
        ),
        *_joining(study, results),
        (
            "Leaving",
            f"Every set of up to {study.together} owner(s) denied in turn; the worst case of each "
            "seed, averaged over seeds.",
            tables.opt_out(study, results),
        ),
    ]


def _joining(study: Study, results: Json) -> list[tuple[str, str, str]]:
    """The section of owners who join, where that was scored."""
    if study.brief:
        return []
    text = "Owners who join one after the other, in several orders; on the text that sets of owners"
    text += " are compared on."
    return [("Joining", text, tables.joining(study, results))]


def _tasks(study: Study, results: Json) -> list[tuple[str, str, str]]:
    """The section of benchmark tasks, of a study that has some."""
    if not study.tasks:
        return []
    # Of an accuracy: the standard error is largest at one half.
    error = 0.5 / study.questions**0.5
    text = f"The primary metric of each task, higher is better; at most {study.questions} questions"
    text += f" of each, so that the standard error of an accuracy is up to {error:.2f}."
    return [("Tasks", text, tables.tasks(results))]


def markdown(study: Study, results: Json) -> str:
    """The tables."""
    parts = [f"# Study: {study.suite}, size {study.size}", f"`{results['reproduce']}`"]
    for heading, text, table in sections(study, results):
        parts += [f"## {heading}", text, table]
    return "\n\n".join(parts) + "\n"


def plots(study: Study, results: Json) -> dict[str, str]:
    """Name to SVG text."""
    found = results["summary"]
    rows = []
    for name in tables.ordered(results):
        ours = name.startswith(next(iter(study.recipes)))
        colour = ORACLE if name.startswith("oracle") else OURS if ours else OTHERS
        rows.append((name, found[name]["mean"], found[name]["stderr"] or 0.0, colour))
    out = {"methods": charts.dots("All domains, every method", rows, "bits per byte, mean")}
    for recipe, curves in results["curves"].items():
        active = {
            label: _points(curves[kind], "mean_all")
            for label, kind in (("top k", "active"), ("public always active", "active_fallback"))
        }
        # Nobody has joined: the anchor, on the part of the text that curves are made of.
        orders = curves["owners"]
        anchor = {"anchor": next(iter(orders.values()))["0"]["mean_all"]["mean"]}
        title = f"{recipe}: active experts"
        out[f"{recipe}-active"] = charts.lines(title, active, "active experts", _BITS, anchor)
        owners = {f"all, {o}": _points(curve, "mean_all") for o, curve in orders.items()}
        owners |= {f"public, {o}": _points(curve, "mean_public") for o, curve in orders.items()}
        title = f"{recipe}: owners who have joined"
        out[f"{recipe}-owners"] = charts.lines(title, owners, "owners", _BITS)
        out[f"{recipe}-rank"] = _rank_plot(recipe, results)
    return out


_BITS = "bits per byte, mean"


def _points(curve: Json, key: str) -> list[tuple[float, float, float]]:
    return [(float(x), e[key]["mean"], e[key]["stderr"] or 0.0) for x, e in curve.items()]


def _rank_plot(recipe: str, results: Json) -> str:
    """Quality against what an owner ships."""
    points = []
    for rank, size in results["shipped"][recipe].items():
        s = results["summary"][recipe if rank == "full" else f"{recipe}-rank{rank}"]
        points.append((size / 1e6, s["mean"], s["stderr"] or 0.0))
    level = {"anchor": results["summary"]["anchor"]["mean"]}
    title = f"{recipe}: quality by what is shipped"
    return charts.lines(
        title, {"change of low rank": sorted(points)}, "million numbers", _BITS, level
    )


def write(study: Study, results: Json, root: Path) -> None:
    """Writes results-SUITE.md and .html, and the plots."""
    name = f"results-{study.suite}"
    (root / f"{name}.md").write_text(markdown(study, results), encoding="utf-8")
    drawn = plots(study, results)
    for plot, svg in drawn.items():
        (root / f"{name}-{plot}.svg").write_text(svg, encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        study=study,
        results=results,
        sections=[
            (heading, note, [line.strip("| ").split(" | ") for line in table.splitlines()])
            for heading, note, table in sections(study, results)
        ],
        # Made here from numbers and checked names: nothing in it comes from text.
        plots={name: Markup(svg) for name, svg in drawn.items()},  # noqa: S704
    )
    (root / f"{name}.html").write_text(text, encoding="utf-8")

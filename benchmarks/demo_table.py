# SPDX-License-Identifier: Apache-2.0
"""The README's result table from the reports of several seeds of the demo.

for s in 0 1 2; do .venv/bin/flexolmo demo --workdir runs/seed$s --seed $s; done
.venv/bin/python benchmarks/demo_table.py runs/seed0 runs/seed1 runs/seed2
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Report = dict[str, Any]


def value(report: Report, model: str, domain: str) -> float:
    """Bits per byte of a model on a domain."""
    return report["bpb"][model][domain]["value"]


def spread(reports: Sequence[Report], figure: Callable[[Report], float], form: str) -> str:
    """Mean ± standard error over seeds."""
    x = np.array([figure(r) for r in reports])
    error = x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else 0.0
    return f"{form.format(x.mean())} ± {form.format(error).lstrip('+')}"


def kept(report: Report, domain: str) -> float:
    """Part of the expert's gain on its own domain that the stitched model keeps."""
    anchor = value(report, "anchor", domain)
    gain = anchor - value(report, f"expert:{domain}", domain)
    return (anchor - value(report, "stitched", domain)) / gain


def change(report: Report, model: str, base: str, domains: Sequence[str]) -> float:
    """Mean relative change of bits per byte over domains."""
    ratios = [value(report, model, d) / value(report, base, d) - 1 for d in domains]
    return float(np.mean(ratios))


def moved(report: Report, denied: str) -> float:
    """Largest relative change on any other domain when one expert is denied."""
    names = [*report["domains"]["public"], *report["domains"]["closed"]]
    others = [[d] for d in names if d != denied]
    return max(abs(change(report, f"deny:{denied}", "stitched", d)) for d in others)


def table(reports: Sequence[Report]) -> list[str]:
    """Lines of Markdown."""
    public, closed = (reports[0]["domains"][k] for k in ("public", "closed"))
    lines = [
        "| domain | anchor | own expert beside anchor | stitched | gain kept | denied vs anchor "
        "| others moved by denying it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for d in public:
        cells = [spread(reports, lambda r, m=m, d=d: value(r, m, d), "{:.3f}") for m in MODELS]
        lines.append(f"| public: {d} | {cells[0]} | – | {cells[1]} | – | – | – |")
    for d in closed:
        models = (MODELS[0], f"expert:{d}", MODELS[1])
        cells = [spread(reports, lambda r, m=m, d=d: value(r, m, d), "{:.3f}") for m in models]
        cells.append(spread(reports, lambda r, d=d: 100 * kept(r, d), "{:.0f}") + " %")
        denied = f"deny:{d}"
        for figure in (
            lambda r, d=d, m=denied: 100 * change(r, m, "anchor", [d]),
            lambda r, d=d: 100 * moved(r, d),
        ):
            cells.append(spread(reports, figure, "{:+.1f}") + " %")
        lines.append(f"| {d} | " + " | ".join(cells) + " |")
    overall = spread(reports, lambda r: 100 * change(r, "stitched", "anchor", public), "{:+.2f}")
    seconds = spread(reports, lambda r: r["seconds"] / 60, "{:.1f}")
    lines += ["", f"Public text, stitched against anchor: {overall} %. Minutes: {seconds}."]
    return lines


MODELS = ("anchor", "stitched")

if __name__ == "__main__":
    folders = [Path(a) for a in sys.argv[1:]]
    print("\n".join(table([json.loads((f / "report.json").read_text()) for f in folders])))

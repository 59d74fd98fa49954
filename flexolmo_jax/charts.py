# SPDX-License-Identifier: Apache-2.0
"""Small charts as SVG text, readable at the width of a phone; a page lays them out in a grid."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

# One colour per expert in the order of the slots; distinguishable with any common colour vision.
PALETTE = ("#8a8f98", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a")
INK, GRID = "#2b2f36", "#e4e7ec"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    # Text stays text: smaller files, and a reader can search and copy it.
    "svg.fonttype": "none",
    # Without a salt, ids are random and the same results would give different files.
    "svg.hashsalt": "flexolmo",
    "axes.edgecolor": "#b6bcc6",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
}


def colours(experts: Sequence[str]) -> dict[str, str]:
    """Expert id to colour; the public expert is grey."""
    return {e: PALETTE[i % len(PALETTE)] for i, e in enumerate(experts)}


def _svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element that scales with the page, with a text for screen readers."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The size in points would fix the width; the viewBox alone lets it follow the page.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1, flags=re.DOTALL)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _figure(width: float = 4.0, height: float = 2.5) -> tuple[Figure, mpl.axes.Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def opt_out_bars(domain: str, rows: Sequence[tuple[str, float, float, str]]) -> str:
    """Bits per byte of a few models on one domain.

    Args:
      rows: (label, bits per byte, standard error, colour), drawn from top to bottom.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=0.55 + 0.36 * len(rows))
        labels, values, errors, bar_colours = zip(*rows, strict=True)
        places = range(len(rows))
        axes.barh(places, values, xerr=errors, color=bar_colours, height=0.72, ecolor="#555")
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set_title(domain)
        axes.grid(axis="x", color=GRID)
        axes.tick_params(length=0)
        ends = [v + e for v, e in zip(values, errors, strict=True)]
        axes.set_xlim(0, max(ends) * 1.17)
        for place, value, end in zip(places, values, ends, strict=True):
            axes.text(end + max(ends) * 0.02, place, f"{value:.3f}", va="center")
        axes.spines["left"].set_visible(False)
        return _svg(figure, f"bits per byte on {domain}")


def layer_shares(domain: str, experts: Sequence[str], layers: Sequence[Sequence[float]]) -> str:
    """Stacked bars: the share of each expert in the mixture, layer by layer."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=2.0)
        places = list(range(len(layers)))
        below = [0.0] * len(layers)
        for number, (expert, colour) in enumerate(colours(experts).items()):
            values = [100 * row[number] for row in layers]
            axes.bar(places, values, bottom=below, color=colour, width=0.8, label=expert)
            below = [b + v for b, v in zip(below, values, strict=True)]
        axes.set_title(domain)
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of the mixture")
        axes.set_xlabel("layer")
        step = max(1, len(places) // 8)
        axes.set_xticks(places[::step], [str(p + 1) for p in places[::step]])
        axes.tick_params(length=0)
        return _svg(figure, f"share of each expert by layer on {domain}")


def loss_curve(job: str, steps: Sequence[int], losses: Sequence[float], colour: str) -> str:
    """Training loss of one job: the raw values faint, a running mean strong."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(height=2.1)
        axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
        window = max(1, min(9, len(losses) // 15))
        axes.plot(steps, running_mean(losses, window), color=colour, linewidth=1.8)
        axes.set_title(job)
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        axes.grid(color=GRID)
        axes.tick_params(length=0)
        # The first steps fall from log(vocabulary) and would flatten all that follows.
        tail = sorted(losses[len(losses) // 20 :])
        if len(tail) > 4:
            span = tail[-1] - tail[0]
            axes.set_ylim(tail[0] - 0.05 * span, tail[-1] + 0.05 * span)
        return _svg(figure, f"training loss of {job}")


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the start."""
    out = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        out.append(sum(part) / len(part))
    return out


def heat(change: float, scale: float) -> str:
    """Background for a relative change: blue is lower (better), orange higher, white none."""
    strength = min(1.0, abs(change) / scale) ** 0.7 if scale > 0 else 0.0
    target = (90, 160, 220) if change < 0 else (240, 150, 70)
    rgb = [round(255 + (t - 255) * strength) for t in target]
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def tint(share: float) -> str:
    """Background for a share from 0 to 1: white to green."""
    target = (70, 170, 120)
    rgb = [round(255 + (t - 255) * min(1.0, max(0.0, share)) ** 0.8) for t in target]
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def mixture(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    """Shares in per cent that add up to 100, for one bar made of parts."""
    total = sum(shares.values()) or 1.0
    return [(name, 100 * value / total) for name, value in shares.items() if value > 0]


def dots(title: str, rows: Sequence[tuple[str, float, float, str]], unit: str) -> str:
    """Estimates with their standard errors, one method a line, on an axis that need not begin at 0.

    Args:
      rows: (label, value, standard error, colour), drawn from top to bottom.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure(width=6.2, height=0.7 + 0.24 * len(rows))
        for place, (_, value, error, colour) in enumerate(rows):
            axes.errorbar(value, place, xerr=error, fmt="o", color=colour, capsize=3, markersize=5)
            axes.annotate(f"{value:.3f}", (value, place), (0, 4), textcoords="offset points",
                          ha="center", va="bottom", fontsize=7)  # fmt: skip
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.invert_yaxis()
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.grid(color=GRID)
        axes.tick_params(length=0)
        return _svg(figure, title)


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Curves of (x, y, standard error of y), and horizontal lines to compare them with."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(width=4.6, height=3.0)
        for number, (name, points) in enumerate(series.items(), start=1):
            x, y, error = zip(*points, strict=True)
            axes.errorbar(
                x, y, yerr=error, label=name, color=PALETTE[number % len(PALETTE)],
                marker="o", markersize=4, capsize=2,
            )  # fmt: skip
        for name, level in (levels or {}).items():
            axes.axhline(level, color=PALETTE[0], linestyle="--", linewidth=1, label=name)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=GRID)
        axes.tick_params(length=0)
        axes.legend(frameon=False, fontsize=8)
        return _svg(figure, title)

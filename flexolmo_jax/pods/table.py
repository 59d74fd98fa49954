# SPDX-License-Identifier: Apache-2.0
"""The plan as text for a screen, from its JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

ASSUMPTIONS = """\
low:  collectives that start early hide behind the units of their loop; units without a matrix
      product run at HBM bandwidth; Mosaic kernels reach 85 % of what their shapes allow.
high: nothing overlaps; every unit takes the compiler's cycles; Mosaic kernels reach 50 %.
Both: links at the makers' bandwidth, torus axes at once; experts used alike (grouped products skip
      the rest of their buffers); no input, checkpoint or restart time."""


def text(plan: Mapping[str, Any], units: int = 0) -> str:
    """All that `flexolmo plan` prints.

    Args:
      units: how many of the units that take longest are listed.
    """
    lines = [_title(plan), "", *_memory(plan)]
    if plan["step_s"]:
        lines += ["", *_time(plan), "", *_collectives(plan), "", ASSUMPTIONS]
    if units and plan["heaviest"]:
        lines += ["", *_heaviest(plan["heaviest"][:units])]
    if plan["slices"] > 1:
        lines += ["", "not counted, so the times are too low: what slices send to each other"]
    for name in ("loops", "kernels"):
        if plan["unknown"][name]:
            said = ", ".join(plan["unknown"][name])
            lines += ["", f"not counted, so the times are too low: {name} {said}"]
    if "search" in plan:
        lines += ["", *_search(plan)]
    return "\n".join(lines)


def _title(plan: Mapping[str, Any]) -> str:
    grid = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    slices = f", {plan['slices']} slices" if plan["slices"] > 1 else ""
    count = plan["model"]["parameters"] / 1e9
    c = plan["model"]
    slots = f", {c['n_active']} of {c['n_slots']} experts" if c["n_slots"] > 1 else ""
    return (
        f"stage {plan['stage']} of a {count:.3g}B model{slots} on {plan['topology']}{slices}: "
        f"{plan['chips']} chips, mesh {grid}\n"
        f"{plan['rows']} rows of {plan['seq_len']} tokens, remat {plan['remat']}, "
        f"compiled in {plan['compile_s']:.0f} s"
    )


def _memory(plan: Mapping[str, Any]) -> list[str]:
    m = plan["hbm_gib"]
    state = "FITS" if plan["fits"] else "DOES NOT FIT"
    lines = [f"HBM per chip: {m['total']:.2f} of {m['limit']:.2f} GiB  {state}"]
    for kind in ("parameters", "optimizer", "activations", "temporaries"):
        lines.append(f"  {kind:<13}{m[kind]:>9.2f}")
    if plan.get("nearest"):
        n = plan["nearest"]
        lines.append(f"nearest change that fits ({n['hbm_gib']['total']:.2f} GiB, compiled):")
        lines.append(f"  {n['change']}")
    elif "nearest" in plan:
        lines.append("no change that was tried fits; try more chips")
    return lines


def _time(plan: Mapping[str, Any]) -> list[str]:
    f, s, parts = plan["flops"], plan["step_s"], plan["step_parts_s"]
    chips = plan["chips"]
    rate, mfu = plan["tokens_per_s_per_chip"], plan["mfu"]
    return [
        f"predicted step: {s['low']:.4g} to {s['high']:.4g} s, "
        f"{rate['low']:,.0f} to {rate['high']:,.0f} tokens/s/chip, "
        f"MFU {100 * mfu['low']:.1f} to {100 * mfu['high']:.1f} %",
        f"FLOPs per chip: model {f['model'] / chips / 1e12:.4g} T, "
        f"compiled {f['compiled'] / chips / 1e12:.4g} T, "
        f"{100 * max(0.0, f['recomputed_share']):.0f} % of them recomputed or beside the model",
        "seconds            low      high",
        _row("matrix products", parts["products"], parts["products"]),
        _row("Mosaic kernels", parts["kernels"]["low"], parts["kernels"]["high"]),
        _row("other units", parts["other_units"]["low"], parts["other_units"]["high"]),
        _row("collectives", parts["collectives_waited"], _all_collectives(parts)),
        f"HBM traffic alone would take {parts['hbm_traffic']:.4g} s",
    ]


def _all_collectives(parts: Mapping[str, Any]) -> float:
    return parts["collectives_early"] + parts["collectives_waited"]


def _row(name: str, low: float, high: float) -> str:
    return f"  {name:<15}{low:>8.4f}  {high:>8.4f}"


def _collectives(plan: Mapping[str, Any]) -> list[str]:
    lines = ["collectives per chip and step, GiB"]
    seconds = plan["step_parts_s"]["collectives_by_axis"]
    for axis, kinds in plan["collective_bytes"].items():
        moved = ", ".join(
            f"{kind} {size / 2**30:.3g}"
            for kind, size in sorted(kinds.items(), key=lambda item: -item[1])
        )
        lines.append(f"  {axis:<12}{moved}  ({seconds.get(axis, 0.0):.3g} s alone)")
    return lines if len(lines) > 1 else ["no collectives"]


def _heaviest(units: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["units that take longest, seconds per step", "     low    high  times  what"]
    for u in units:
        place = u["from"].replace("/closed_call", "").replace("/while/body", "")[-70:]
        lines.append(
            f" {u['low_s']:>7.4f} {u['high_s']:>7.4f} {u['times']:>6}  {u['what']}  {place}"
        )
    return lines


def _search(plan: Mapping[str, Any]) -> list[str]:
    front = {t["change"] for t in plan["pareto"]}
    lines = ["   HBM GiB   tokens/s/chip      MFU %        variant (* on the Pareto front)"]
    for t in sorted(plan["search"], key=lambda t: t["hbm_gib"]["total"]):
        rate, mfu = t["tokens_per_s_per_chip"], t["mfu"]
        lines.append(
            f" {'*' if t['change'] in front else ' '}{t['hbm_gib']['total']:8.2f}"
            f"  {rate['low']:>7,.0f}–{rate['high']:<7,.0f}"
            f"  {100 * mfu['low']:>5.1f}–{100 * mfu['high']:<5.1f}  {t['change']}"
        )
    return lines

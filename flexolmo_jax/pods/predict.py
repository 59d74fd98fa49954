# SPDX-License-Identifier: Apache-2.0
"""From work, traffic and collectives to the time of one call, as a range.

A unit takes the longest of what the compiler says (its cycles / clock), its FLOPs / peak and its
bytes / HBM bandwidth. What is not known is a range: the low end lets collectives that the program
starts early disappear behind the units of the same loop, reads units without a product at HBM
bandwidth, and runs Mosaic kernels at the upper speed; the high end lets nothing overlap, takes the
compiler's cycles for every unit, and runs kernels at the lower speed. No constant here was fitted
to a published run.
"""

import collections
import dataclasses
from collections.abc import Mapping

from flexolmo_jax.pods.axes import Layout, Span
from flexolmo_jax.pods.chips import Topology
from flexolmo_jax.pods.work import Collective, Unit, Work

# Share of what shapes allow (peak or bandwidth) that a Mosaic kernel reaches: worst and best.
KERNEL_SPEED = (0.5, 0.85)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call on one device.

    Attributes:
      products, kernels, others: units with matrix products, Mosaic kernels, everything else, as
        (low, high); background: copies between memories, hidden unless HBM is full.
      early, waited: collectives that may overlap, and those that the device waits for.
      by_axis: collectives by mesh axis.
    """

    products: float
    kernels: tuple[float, float]
    others: tuple[float, float]
    hbm: float
    early: float
    waited: float
    by_axis: Mapping[str, float]
    low: float
    high: float


def predict(work: Work, layout: Layout) -> Times:
    """The time of one call of a program laid over a topology."""
    topology = layout.topology
    busy = collections.defaultdict(lambda: [0.0, 0.0])  # loop -> seconds of compute, of early
    products, waited = 0.0, 0.0
    kernels, others = [0.0, 0.0], [0.0, 0.0]
    by_axis: dict[str, float] = collections.defaultdict(float)
    for u in work.units:
        low, high = (u.times * s for s in unit_seconds(u, topology))
        busy[u.loop][0] += low
        if u.kernel:
            kernels = [kernels[0] + low, kernels[1] + high]
        elif u.flops:
            products += high
        else:
            others = [others[0] + low, others[1] + high]
        for c in u.collectives:
            span = layout.span(c.groups)
            seconds = u.times * collective_seconds(c, span, topology)
            by_axis[span.mesh] += seconds
            if c.overlapped:
                busy[u.loop][1] += seconds
            else:
                waited += seconds
    hbm = work.hbm_bytes / (topology.chip.hbm_bytes_s / topology.chip.devices)
    early = sum(e for _, e in busy.values())
    low = waited + max(sum(max(c, e) for c, e in busy.values()), hbm)
    high = max(products + kernels[1] + others[1], hbm) + early + waited
    return Times(
        products=products,
        kernels=(kernels[0], kernels[1]),
        others=(others[0], others[1]),
        hbm=hbm,
        early=early,
        waited=waited,
        by_axis=dict(by_axis),
        low=low,
        high=high,
    )


def unit_seconds(u: Unit, topology: Topology) -> tuple[float, float]:
    """(low, high) time of one run of a unit without its collectives."""
    chip = topology.chip
    if u.background or (u.collectives and not u.flops):
        return 0.0, 0.0
    work = u.flops / (chip.flops / chip.devices)
    traffic = (u.read + u.written) / (chip.hbm_bytes_s / chip.devices)
    shapes = max(work, traffic)
    if u.kernel:
        return shapes / KERNEL_SPEED[1], shapes / KERNEL_SPEED[0]
    counted = (u.cycles or 0) / chip.clock
    high = max(shapes, counted)
    return (high if u.flops else shapes), high


def collective_seconds(c: Collective, span: Span, topology: Topology) -> float:
    """Time of one collective alone on its links.

    Every torus axis that a group runs over works at once, in both directions where it is a ring.
    Across slices a chip moves its part through its share of the network.
    """
    chip = topology.chip
    n = span.size
    if n == 1:
        return 0.0
    if c.kind == "collective-permute":
        if span.slices > 1:
            return c.size / chip.dcn_bytes_s
        return c.size * span.load / chip.link_bytes_s
    # A group on the cores of one chip only goes through the chip's HBM.
    size = c.size * span.cores
    passes = 2 if c.kind == "all-reduce" else 1
    seconds = 0.0
    if span.slices > 1:
        inside = max(1, span.chips * span.cores)
        moved = size if "all-to-all" in c.kind else size / inside
        seconds += passes * moved * (span.slices - 1) / span.slices / chip.dcn_bytes_s
    if not span.torus:
        alone = passes * c.size / (chip.hbm_bytes_s / chip.devices)
        return seconds + (alone if span.cores > 1 else 0.0)
    if "all-to-all" in c.kind:
        way = max(length / (8 if ring else 4) for length, ring in span.torus)
        return seconds + size * way / chip.link_bytes_s
    width = sum(2 if ring else 1 for _, ring in span.torus) * chip.link_bytes_s
    return seconds + passes * size * (span.chips - 1) / span.chips / width

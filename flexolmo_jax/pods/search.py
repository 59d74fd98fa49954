# SPDX-License-Identifier: Apache-2.0
"""Answers a request: one program, the nearest change that makes it fit, or a search."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flexolmo_jax import model as model_
from flexolmo_jax import stages, tree
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.pods import target as targets
from flexolmo_jax.pods.chips import GIB, Topology
from flexolmo_jax.pods.compile import Plan
from flexolmo_jax.pods.process import Request
from flexolmo_jax.pods.target import Target

Tell = Callable[[str], None]
# Compilations of one piece of advice, at most; each takes about a minute.
TRIES = 6


@dataclasses.dataclass(frozen=True)
class Tried:
    """A change of a target and what it came to.

    Attributes:
      change: as a user writes it.
    """

    change: str
    target: Target
    plan: Plan


def answer(request: Request, tell: Tell) -> dict[str, Any]:
    """The result of `flexolmo plan` as JSON.

    Raises:
      ConfigError: the request cannot be compiled.
    """
    target = targets.read(request)
    tell(_headline(target))
    plan = target.measure()
    result = plan.to_json() | {"model": _model_json(target)}
    if not plan.fits and request.advise:
        found = advice(target, plan, tell)
        result["nearest"] = found and _tried_json(found)
    if request.search:
        tried = list(search(target, tell))
        result["search"] = [_tried_json(t) for t in tried]
        result["pareto"] = [_tried_json(t) for t in pareto(tried)]
    return result


def _headline(target: Target) -> str:
    t = target.topology
    rows, length = target.run.data.batch_rows, target.run.data.seq_len
    pieces = target.run.optim.accumulate
    parts = f" in {pieces} micro-batches" if pieces > 1 else ""
    return (
        f"compiling stage {target.stage} for {t.name}"
        + (f", {t.slices} slices" if t.slices > 1 else "")
        + f" ({t.chips} chips): {rows} rows of {length} tokens{parts}"
    )


def _model_json(target: Target) -> dict[str, Any]:
    count = tree.count(model_.abstract_params(target.model))
    return {"parameters": count, **target.model.to_json()}


def _tried_json(t: Tried) -> dict[str, Any]:
    return {
        "change": t.change,
        "accumulate": t.target.run.optim.accumulate,
        "rows_at_once": t.target.rows_at_once,
        **{k: v for k, v in t.plan.to_json().items() if k != "refusal"},
    }


def _measure(change: str, target: Target, tell: Tell) -> Tried | None:
    """Compiles a variant; None if it cannot be laid out."""
    try:
        plan = target.measure()
    except ConfigError as error:
        tell(f"  {change}: {error.what}")
        return None
    state = "fits" if plan.fits else "does not fit"
    tell(f"  {change}: {plan.memory.total / GIB:.1f} GiB, {state}")
    return Tried(change, target, plan)


def advice(target: Target, plan: Plan, tell: Tell) -> Tried | None:
    """The nearest change with which the program fits, found by compiling."""
    tell("it does not fit; looking for the nearest change that would")
    best: Tried | None = None
    for n, (change, candidate) in enumerate(_nearest(target, plan)):
        if n == TRIES:
            break
        tried = _measure(change, candidate, tell)
        if tried is not None and tried.plan.fits:
            best = tried
            break
    return best


def _nearest(target: Target, plan: Plan) -> Iterator[tuple[str, Target]]:
    """Changes from the smallest on: recompute more, fewer rows at once, a larger topology."""
    if target.trains:
        remat = targets.REMAT[targets.REMAT.index(target.run.exec.remat) + 1 :]
        for policy in remat:
            yield f"--config.exec.remat={policy}", target.with_exec(remat=policy)
        target = target.with_exec(remat=targets.REMAT[-1])
        said = f"--config.exec.remat={targets.REMAT[-1]} " if remat else ""
    else:
        said = ""
    for change, smaller in _fewer_rows(target, plan):
        yield said + change, smaller
    for larger in _larger(target.topology):
        wider = dataclasses.replace(target, topology=larger)
        pieces = max(1, wider.run.data.batch_rows // wider.groups) if wider.trains else 1
        rows = wider.groups * pieces
        change = f"{said}--topology {larger.name}"
        if rows != wider.run.data.batch_rows:
            change += f" --rows {rows}"
        if pieces != wider.run.optim.accumulate:
            change += f" --config.optim.accumulate={pieces}"
        yield change, wider.with_rows(rows, pieces)


def _fewer_rows(target: Target, plan: Plan) -> Iterator[tuple[str, Target]]:
    """Half the rows at once, and half again; begins where an estimate says that it may fit."""
    rows, pieces = target.run.data.batch_rows, target.run.optim.accumulate
    m = plan.memory
    fixed = m.parameters + m.optimizer
    over = (m.total - fixed) / max(1.0, m.limit - fixed)
    factor = 2
    while factor < over and target.rows_at_once > factor:
        factor *= 2
    while target.rows_at_once >= factor:
        if target.trains:
            change = f"--config.optim.accumulate={pieces * factor}"
            yield change, target.with_rows(rows, pieces * factor)
        else:
            yield f"--rows {rows // factor}", target.with_rows(rows // factor)
        factor *= 2


def _larger(topology: Topology) -> Iterator[Topology]:
    """The same generation with twice the chips, and twice again."""
    for _ in range(3):
        dims = list(topology.dims)
        at = dims.index(min(dims))
        dims[at] *= 2
        topology = dataclasses.replace(topology, dims=tuple(sorted(dims)))
        yield topology


def search(target: Target, tell: Tell) -> Iterator[Tried]:
    """Meshes, remat policies and rows at once, each compiled; the batch of a step stays."""
    tell("searching: each variant is compiled")
    for mesh_change, laid in _meshes(target):
        for policy in targets.REMAT if target.trains else (target.run.exec.remat,):
            variant = laid.with_exec(remat=policy)
            said = f"{mesh_change} remat={policy}" if target.trains else mesh_change
            yield from _growing(said, variant, tell)


def _growing(said: str, target: Target, tell: Tell) -> Iterator[Tried]:
    """One row at a time per group of devices, then twice as many while they fit."""
    rows, at_once = target.run.data.batch_rows, 1
    while at_once * target.groups <= rows:
        pieces = rows // (at_once * target.groups) if target.trains else 1
        variant = target.with_rows(at_once * target.groups * pieces, pieces)
        tried = _measure(f"{said} rows_at_once={at_once}", variant, tell)
        if tried is None or not tried.plan.fits:
            return
        yield tried
        at_once *= 2


def _meshes(target: Target) -> Iterator[tuple[str, Target]]:
    """Meshes that divide devices, slots and heads; the batch must divide over them too."""
    n, c = target.topology.devices, target.model
    slots = c.n_slots if target.stage not in stages.OWN_STAGES else 1
    for expert in [e for e in (1, 2, 4, 8, 16) if slots % e == 0 and n % e == 0]:
        for tensor in [m for m in (1, 2, 4) if c.n_kv_heads % m == 0 and n % (expert * m) == 0]:
            data = n // (expert * tensor)
            laid = target.with_exec(mesh_data=data, mesh_expert=expert, mesh_model=tensor)
            if target.run.data.batch_rows >= laid.groups:
                yield f"mesh={data}x{expert}x{tensor}", laid


def pareto(tried: Sequence[Tried]) -> list[Tried]:
    """What no other variant beats in both memory and speed, smallest first."""
    front: list[Tried] = []
    for t in sorted(tried, key=lambda t: (t.plan.memory.total, -_speed(t))):
        if not front or _speed(t) > _speed(front[-1]):
            front.append(t)
    return front


def _speed(t: Tried) -> float:
    rate = t.plan.tokens_per_s_per_chip()
    return (rate["low"] * rate["high"]) ** 0.5 if rate else 0.0

# SPDX-License-Identifier: Apache-2.0
"""Benchmark questions, put to every method that is one model.

What mixes the probabilities of several models (branch-train-merge, prompt routing, oracles) and
soups of a row's own are compared on text alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from flexolmo_jax import model, tree
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.experts.manifest import PUBLIC
from flexolmo_jax.inference import OpenModel
from flexolmo_jax.study import weights
from flexolmo_jax.study.jobs import UNIONS
from flexolmo_jax.study.scorer import EXEC
from flexolmo_jax.tasks import runner

if TYPE_CHECKING:
    from flexolmo_jax.study.judge import Judge


def run(j: "Judge", active: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Method to its score in the primary metric of each task: {value, stderr, n}.

    Args:
      active: mixture to the number of active experts that was chosen for it.
    """
    out = {}
    for name, shared, group, config in _models(j):
        opened = _open(j, shared, group, config)
        found = runner.answers(
            opened, j.study.tasks, active=active.get(name, 1), limit=j.study.questions
        )
        out[name] = {task: x["metrics"][x["primary"]] for task, x in found.items()}
        j.say(f"{name:<24} {len(found)} tasks answered")
    return out


def _models(j: "Judge") -> Iterator[tuple[str, tree.Tree, tree.Tree, ModelConfig]]:
    """(method, shared weights, experts, architecture), one model in memory after the other."""
    config = j.info.config
    yield "anchor", j.anchor["shared"], j.anchor["experts"], config
    for name in j.study.recipes:
        m = j.recipes[name]
        yield name, m.shared, m.group, m.config
    if not j.study.rivals:
        return
    continued = weights.final(j.at.run("dense", PUBLIC, j.seed))
    dense = {o: made for o, made in j.dense.items() if o != PUBLIC}
    for name, made in {PUBLIC: continued, **dense}.items():
        yield f"dense-{name}", made["shared"], made["experts"], config
    soup = weights.average(list(j.dense.values()))
    yield "soup", soup["shared"], soup["experts"], config
    m = j.trained_together("router-btx", "btx")
    yield "btx", m.shared, m.group, m.config
    for name in UNIONS:
        m = j.trained_together(name, "union")
        yield f"unrestricted{name.removeprefix('union')}", m.shared, m.group, m.config


def _open(j: "Judge", shared: tree.Tree, group: tree.Tree, config: ModelConfig) -> OpenModel:
    """Weights in memory as a model that can be asked."""
    n_slots = group["bias"].shape[1]
    names = (PUBLIC, *j.study.owners)[:n_slots]
    config = config.replace(n_slots=n_slots)
    return OpenModel(
        info=dataclasses.replace(j.info, config=config),
        runtime=model.Runtime.resolve(EXEC, n_slots, config.n_active),
        slots={name: slot for slot, name in enumerate(names)},
        shared=jax.device_put(shared),
        group=jax.device_put(group),
    )

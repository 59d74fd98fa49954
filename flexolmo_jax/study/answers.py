# SPDX-License-Identifier: Apache-2.0
"""Benchmark questions, put to a method that is one model.

What mixes the probabilities of several models (branch-train-merge, prompt routing, oracles) and
soups of a row's own are compared on text alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from flexolmo_jax import model, tree
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.experts.manifest import PUBLIC
from flexolmo_jax.experts.model_info import ModelInfo
from flexolmo_jax.inference import OpenModel
from flexolmo_jax.study.scorer import EXEC
from flexolmo_jax.tasks import runner

# Task to its score in its primary metric: {value, stderr, n}.
Answers = dict[str, dict[str, Any]]


def ask(m: OpenModel, tasks: Sequence[str], *, active: int, limit: int) -> Answers:
    """Scores of one model, all of its experts allowed.

    Args:
      active: experts per token.
      limit: questions of each task, at most.
    """
    found = runner.answers(m, tasks, active=active, limit=limit)
    return {task: x["metrics"][x["primary"]] for task, x in found.items()}


def opened(
    info: ModelInfo,
    owners: Sequence[str],
    shared: tree.Tree,
    group: tree.Tree,
    config: ModelConfig,
) -> OpenModel:
    """Weights in memory as a model that can be asked.

    Args:
      info: of the anchor, whose tokenizer it has.
      owners: of the slots after the public one.
      group: experts with a slot axis; a dense model has one slot.
    """
    n_slots = group["bias"].shape[1]
    config = config.replace(n_slots=n_slots)
    return OpenModel(
        info=dataclasses.replace(info, config=config),
        runtime=model.Runtime.resolve(EXEC, n_slots, config.n_active),
        slots={name: slot for slot, name in enumerate((PUBLIC, *owners)[:n_slots])},
        shared=jax.device_put(shared),
        group=jax.device_put(group),
    )

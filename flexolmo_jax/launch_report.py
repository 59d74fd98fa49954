# SPDX-License-Identifier: Apache-2.0
"""The planner's view of each job of a plan of jobs: does it fit, how fast, what does it cost."""

import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flexolmo_jax import configfile
from flexolmo_jax.errors import ConfigError, FlexOlmoError
from flexolmo_jax.jobs import cost, launching, slices, tools
from flexolmo_jax.jobs.launching import Planned
from flexolmo_jax.jobs.plan import Job
from flexolmo_jax.pods import process
from flexolmo_jax.pods.process import Request
from flexolmo_jax.tree import json_digest

# Options of `flexolmo plan` that a job may name in `planned`, and the fields that they fill.
OPTIONS = {"--config": "config", "--model": "model", "--stage": "stage"}
NUMBERS = {"--rows": "rows", "--seq-len": "seq_len"}


def request_of(job: Job) -> Request | None:
    """How `flexolmo plan` is asked about a job; None where there is nothing to compile.

    Raises:
      ConfigError: the job says of itself what the planner does not take.
    """
    if not slices.is_tpu(job):
        return None
    values: dict[str, Any] = _training(job.command)
    words = list(job.planned)
    while words:
        option, value, *words = words if len(words) > 1 else [*words, ""]
        if option in OPTIONS:
            values[OPTIONS[option]] = value
        elif option in NUMBERS and value.isdecimal():
            values[NUMBERS[option]] = int(value)
        else:
            raise ConfigError("Not an option for the planner", got=option, where=job.name)
    if not values.get("config"):
        return None
    topology = f"{job.resources.accelerator}:{job.resources.topology}"
    return Request(topology=topology, slices=job.resources.slices, advise=False, **values)


def _training(command: Sequence[str]) -> dict[str, Any]:
    """The configuration and overrides of a `flexolmo train` command; of another, nothing."""
    if "train" not in command[1:4]:
        return {}
    reference = [after for word, after in itertools.pairwise(command) if word == "--config"]
    overrides = tuple(word for word in command if word.startswith(configfile.PREFIX))
    return {"config": reference[0] if reference else "", "overrides": overrides}


def command_of(request: Request) -> tuple[str, ...]:
    """The same request as a command line."""
    words = ["flexolmo", "plan", "--config", request.config, "--topology", request.topology]
    if request.slices > 1:
        words += ["--slices", str(request.slices)]
    for option, field in {**OPTIONS, **NUMBERS}.items():
        if option != "--config" and getattr(request, field):
            words += [option, str(getattr(request, field))]
    return (*words, *request.overrides)


def report(
    jobs: Iterable[Job], tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> dict[str, Planned]:
    """The memory, speed and cost of each job with something to compile.

    Without libtpu the lines say which command gives them. Jobs that differ in nothing that the
    compiler sees are compiled once.
    """
    known: dict[str, Planned] = {}
    out: dict[str, Planned] = {}
    for job in jobs:
        request = request_of(job)
        if request is None:
            continue
        try:
            tokens, digest = _recipe(request)
        except ConfigError as error:
            out[job.name] = Planned((f"its configuration is wrong: {error}",))
            continue
        if not available():
            out[job.name] = _without(request, tokens)
            continue
        if digest not in known:
            known[digest] = _ask(request, tokens, slices.chips(job) * job.resources.slices, tell)
        out[job.name] = known[digest]
    return out


def _recipe(request: Request) -> tuple[int, str]:
    """Tokens of the whole run (0: not a training job), and a digest of what is compiled."""
    config = configfile.load_run_config(request.config, request.overrides)
    tokens = 0 if request.stage else cost.training_tokens(config)
    same = dataclasses.asdict(config)
    # Neither who owns the text nor where it lies is in the program.
    for name in ("anchor", "expert_id", "tokenizer"):
        del same[name]
    same["data"] = {k: v for k, v in same["data"].items() if k not in ("sources", "heldout")}
    rest = dataclasses.replace(request, config="", overrides=())
    return tokens, json_digest([same, dataclasses.asdict(rest)])


def available() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def _ask(request: Request, tokens: int, chips: int, tell: Callable[[str], None]) -> Planned:
    try:
        return launching.planned(process.plan(request, tell), tokens, chips)
    except FlexOlmoError as error:
        return Planned((f"the planner refused: {error}", *tools.wrapped(command_of(request))))


def _without(request: Request, tokens: int) -> Planned:
    lines = [f"{cost.amount(tokens)} tokens"] if tokens else []
    words = tools.wrapped(command_of(request))
    return Planned((*lines, "memory and speed: install flexolmo-jax[tpu], then", *words))

# SPDX-License-Identifier: Apache-2.0
"""Evaluates a model on tasks: one setting, or a sweep over subsets of experts or their number."""

import dataclasses
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flexolmo_jax import inference
from flexolmo_jax.data import remote_shards
from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.experts import policy
from flexolmo_jax.inference import OpenModel
from flexolmo_jax.storage import urls
from flexolmo_jax.tasks import catalog, metrics, scorefile, scoring, sources
from flexolmo_jax.tasks.asked import Asked
from flexolmo_jax.tasks.catalog import Task
from flexolmo_jax.tasks.example import Example

logger = logging.getLogger("flexolmo")

# Bits per byte of token shards that the user names; not in the catalog, since it has no questions.
BPB = "bpb"
SWEEPS = ("subsets", "k")
# Up to so many owners, a sweep takes every subset of them (2^4 settings).
EVERY_SUBSET = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """Which experts a pass may use.

    Attributes:
      experts: allowed experts in slot order.
      mask: the same, bool [n_slots].
      asked: experts per token that were asked for; `active` is what the allowed set can supply.
    """

    experts: tuple[str, ...]
    mask: np.ndarray
    asked: int

    @property
    def active(self) -> int:
        """Experts used per token."""
        return min(self.asked, int(self.mask.sum()))

    @property
    def name(self) -> str:
        """The setting in a few words."""
        return f"{'+'.join(self.experts)} k={self.active}"


@dataclasses.dataclass(frozen=True)
class Step:
    """Where an evaluation is.

    Attributes:
      number, count: this pass (a task under a setting) and passes in all.
      done, questions: questions scored (estimated from the tokens computed) and in all.
      fresh: questions scored by this pass, without those that were known.
      seconds: of this pass so far; left_s: estimate for the rest of it.
    """

    task: str
    setting: str
    number: int
    count: int
    done: int
    questions: int
    fresh: float
    seconds: float
    left_s: float


def evaluate(
    path: Path | str,
    names: Sequence[str],
    *,
    allow: Collection[str] | None = None,
    deny: Collection[str] | None = None,
    active: int | None = None,
    limit: int | None = None,
    data: Path | str | None = None,
    n_rows: int = 0,
    seq_len: int = 0,
    scores: Path | str | None = None,
    sweep: str | None = None,
    grid: Mesh | None = None,
    batch_tokens: int = 0,
    report: Callable[[Step], None] = lambda _: None,
) -> dict[str, Any]:
    """Result of `flexolmo eval`.

    Args:
      names: tasks and suites of the catalog, and "bpb" (bits per byte of the text under `data`).
      limit: at most so many questions of each task.
      data: token shards of "bpb", and files of tasks that are in no package.
      n_rows, seq_len: rows of text per domain for "bpb", and their tokens; 0 is all of it, and
        what `inference.score_domain` chooses.
      scores: keeps the scores of every request here, and takes over what is there.
      sweep: "subsets" of the allowed experts, or "k" for every number of active experts.
      grid: mesh to compute on; None is the first device.
      batch_tokens: tokens of a batch of questions; 0 chooses for the platform.

    Raises:
      ConfigError: an unknown task, expert or sweep; a task that needs `data` without it.
      DataError, AssetError: questions that are not there or damaged.
    """
    tasks = _tasks(names)
    _check(names, sweep, active, data, scores)
    _check_numbers(limit=limit, rows=n_rows, seq_len=seq_len, batch_tokens=batch_tokens)
    # All questions first: what is missing is said before the model is loaded.
    folder = None if data is None else _folder(data)
    questions = [(task, sources.load(task, data=folder, limit=limit)) for task in tasks]
    domains = inference.heldout_sets(data) if BPB in names and data is not None else {}
    m = inference.open_model(path, allow=allow, deny=deny, grid=grid)
    settings = _settings(m, sweep, active)
    found: list[dict[str, Any]] = [
        {"allowed": list(s.experts), "active": s.active, "tasks": {}, "suites": {}}
        for s in settings
    ]
    for out, setting in zip(found, settings, strict=True):
        if domains:
            out |= _bpb(m, domains, setting, n_rows, seq_len)
    job = _Job(m, scores, report, batch_tokens, count=len(questions) * len(settings))
    for task, examples in questions:
        asked = Asked.of(m.tokenizer, examples)
        for out, setting in zip(found, settings, strict=True):
            out["tasks"][task.name] = job.run(task, examples, asked, setting)
    for out in found:
        out["suites"] = _suites(names, out["tasks"])
    digests = {"model": m.info.model_digest, "anchor": m.info.anchor_digest}
    result = found[0] if sweep is None else {"sweep": sweep, "settings": found}
    return {**result, "digests": digests, "trained_together": m.info.trained_together}


def answers(
    m: OpenModel, names: Sequence[str], *, active: int, limit: int | None = None
) -> dict[str, Any]:
    """Task to its part of the result (as `evaluate` lists it), of all experts of an open model.

    Args:
      names: tasks and suites whose questions are in a package.
      active: experts per token.
    """
    tasks = _tasks(names)
    (setting,) = _settings(m, None, active)
    job = _Job(m, None, lambda _: None, batch_tokens=0, count=len(tasks))
    out = {}
    for task in tasks:
        examples = sources.load(task, data=None, limit=limit)
        out[task.name] = job.run(task, examples, Asked.of(m.tokenizer, examples), setting)
    return out


def _folder(data: Path | str) -> Path:
    """Where the files of tasks are; of a URL, copies of them."""
    url = urls.as_url(data)
    return Path(data) if url is None else remote_shards.other_files(url)


def _check(
    names: Sequence[str],
    sweep: str | None,
    active: int | None,
    data: Path | str | None,
    scores: Path | str | None,
) -> None:
    """Options that do not go together."""
    if sweep is not None and sweep not in SWEEPS:
        raise ConfigError("Unknown sweep", got=sweep, fix=nearest(sweep, SWEEPS))
    if sweep == "k" and active is not None:
        raise ConfigError("A sweep over k sets the number of active experts", got="--active")
    if BPB in names and data is None:
        raise ConfigError("bpb needs text", fix="--data DIR with <domain>/heldout token shards")
    if scores is not None and Path(scores).exists() and not Path(scores).is_dir():
        raise ConfigError("Scores are kept in a folder", got=f"the file {scores}", where="--scores")


def _check_numbers(*, limit: int | None, **counts: int) -> None:
    """Counts that no pass could run with."""
    if limit is not None and limit < 1:
        raise ConfigError("At least one question is needed", got=limit, where="--limit")
    for name, count in counts.items():
        if count < 0:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError("A count must not be negative", got=count, where=option)


def _suites(names: Sequence[str], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the suites that were asked for."""
    figures = {name: result["metrics"] for name, result in tasks.items()}
    suites = dict.fromkeys(name for name in names if name in catalog.SUITES)
    return {name: {"metrics": metrics.aggregate(name, figures)} for name in suites}


def _tasks(names: Sequence[str]) -> list[Task]:
    if not names:
        raise ConfigError("No task is named", where="--tasks")
    for name in names:
        if name != BPB and name not in catalog.TASKS and name not in catalog.SUITES:
            valid = [BPB, *catalog.TASKS, *catalog.SUITES]
            raise ConfigError("Unknown task", got=name, fix=nearest(name, valid))
    chosen = [name for name in names if name != BPB]
    for notice in catalog.notices(chosen):
        logger.info("%s", notice)
    return catalog.expand(chosen)


def _settings(m: OpenModel, sweep: str | None, active: int | None) -> list[Setting]:
    """The settings to evaluate, from experts that are open already."""
    opened = sorted(m.slots, key=lambda expert: m.slots[expert])
    asked = m.active(active)

    def setting(experts: Collection[str], k: int = asked) -> Setting:
        chosen = tuple(e for e in opened if e in experts or e == policy.PUBLIC)
        return Setting(chosen, m.allowed(allow=chosen), k)

    if sweep is None:
        policy.clamp_active(asked, m.allowed())
        return [setting(opened)]
    if sweep == "k":
        return [setting(opened, k) for k in range(1, len(opened) + 1)]
    owners = [e for e in opened if e != policy.PUBLIC]
    if len(owners) <= EVERY_SUBSET:
        sizes = range(len(owners), -1, -1)
        return [setting(some) for n in sizes for some in itertools.combinations(owners, n)]
    without = [[e for e in owners if e != one] for one in owners]
    return [setting(some) for some in [owners, *without, *([one] for one in owners), []]]


def _bpb(
    m: OpenModel, domains: Mapping[str, Path | str], setting: Setting, n_rows: int, seq_len: int
) -> dict[str, Any]:
    if seq_len > m.config.max_len:
        raise ConfigError(
            "Rows of text are longer than the model's context",
            got=seq_len,
            expected=f"1..{m.config.max_len}",
            where="--seq-len",
        )
    logger.info("%s: bits per byte", setting.name)
    return inference.score_domains(
        m, domains, allowed=setting.mask, n_active=setting.active, n_rows=n_rows, seq_len=seq_len
    )


class _Job:
    """What the passes of one evaluation have in common."""

    def __init__(
        self,
        m: OpenModel,
        scores: Path | str | None,
        report: Callable[[Step], None],
        batch_tokens: int,
        count: int,
    ):
        self.m, self.scores, self.report, self.count = m, scores, report, count
        self.batch_tokens, self.number = batch_tokens, 0

    def run(
        self, task: Task, examples: Sequence[Example], asked: Asked, setting: Setting
    ) -> dict[str, Any]:
        """Scores a task under one setting; returns its part of the result."""
        self.number += 1
        started = time.monotonic()
        keys = [scorefile.request_key(request) for request in asked.requests]
        file = self._file(task, setting)
        known = {} if file is None else file.known
        cut = _cut(self.m, task, asked)
        done = np.asarray([i for i, key in enumerate(keys) if key in known], np.int64)
        logprob = np.asarray([known[k].logprob if k in known else np.nan for k in keys])
        greedy = np.asarray([k in known and known[k].greedy for k in keys])
        if len(done):
            logger.info(
                "%s, %s: %d of %d scores are there", task.name, setting.name, len(done), len(keys)
            )
        if len(done) < len(keys):
            for batch in scoring.scored(
                self.m,
                asked.requests,
                allowed=setting.mask,
                n_active=setting.asked,
                batch_tokens=self.batch_tokens,
                done=done,
            ):
                fresh = np.isnan(logprob[batch.requests])
                new = batch.requests[fresh]
                logprob[new], greedy[new] = batch.logprob[fresh], batch.greedy[fresh]
                if file is not None:
                    file.append(_rows(examples, asked, keys, new, logprob, greedy))
                self._tell(task, setting, examples, len(done) / len(keys), batch, started)
        found = [asked.scores(i, logprob, greedy) for i in range(len(examples))]
        return {
            "metrics": metrics.evaluate(task, examples, found),
            "primary": task.primary_metric,
            "questions": len(examples),
            "truncated": cut,
            "digest": hashlib.sha256("".join(keys).encode()).hexdigest(),
            "seconds": round(time.monotonic() - started, 3),
        }

    def _file(self, task: Task, setting: Setting) -> scorefile.ScoreFile | None:
        if self.scores is None:
            return None
        facts = {
            "model": self.m.info.model_digest,
            "allowed": list(setting.experts),
            "active": setting.asked,
            "compute": self.m.runtime.compute_dtype,
        }
        return scorefile.ScoreFile(self.scores, task.name, facts)

    def _tell(
        self,
        task: Task,
        setting: Setting,
        examples: Sequence[Example],
        known: float,
        batch: scoring.Scored,
        started: float,
    ) -> None:
        """Reports progress; `known` is the share of scores that were there before."""
        seconds, share = time.monotonic() - started, batch.done / batch.total
        step = Step(
            task=task.name,
            setting=setting.name,
            number=self.number,
            count=self.count,
            done=round((known + (1 - known) * share) * len(examples)),
            questions=len(examples),
            fresh=(1 - known) * share * len(examples),
            seconds=seconds,
            left_s=seconds * (1 - share) / share,
        )
        self.report(step)


def _cut(m: OpenModel, task: Task, asked: Asked) -> int:
    """Requests whose context does not fit; says so."""
    limit = m.config.max_len
    found = sum(len(c) + len(t) - 1 > limit for c, t in asked.requests)
    if found:
        logger.info(
            "%s: %d of %d requests are longer than the model's context of %d tokens; cut on the "
            "left",
            task.name,
            found,
            len(asked.requests),
            limit,
        )
    return found


def _rows(
    examples: Sequence[Example],
    asked: Asked,
    keys: Sequence[str],
    requests: np.ndarray,
    logprob: np.ndarray,
    greedy: np.ndarray,
) -> list[dict[str, Any]]:
    """Lines of a file of scores, with what a reader needs to find the question again."""
    return [
        {
            "key": keys[i],
            "question": examples[int(asked.example[i])].id,
            "choice": int(asked.choice[i]),
            "unconditional": bool(asked.unconditional[i]),
            "logprob": float(logprob[i]),
            "tokens": len(asked.requests[i][1]),
            "greedy": bool(greedy[i]),
        }
        for i in requests.tolist()
    ]

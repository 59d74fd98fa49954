# SPDX-License-Identifier: Apache-2.0
"""Runs one training job: a visible loop that resumes from its workdir alone."""

import dataclasses
import json
import logging
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
from jax.experimental import multihost_utils

from flexolmo_jax import (
    distributed,
    evaluate,
    metrics,
    placed,
    run_dirs,
    stages,
    training_job,
    tree,
)
from flexolmo_jax.config import ExecConfig, RunConfig, SourceConfig
from flexolmo_jax.data import loader
from flexolmo_jax.errors import CheckpointError, ConfigError, Preempted, TrainingError
from flexolmo_jax.experts import package, router_init
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.storage import urls

logger = logging.getLogger("flexolmo")

# A step that is not finite changes nothing; this many in a row mean that the run has diverged.
MAX_SKIPPED = 3
# What a resumed run may have otherwise: what is recorded when, and how a machine computes, which
# changes a result by rounding at most. Of that, these two change what is computed.
BOUND_KEYS = ("exec.capacity", "exec.compute_dtype")
FREE_KEYS = ("exec", "log_every", "eval_every", "eval_rows", "checkpoint_every", "keep_checkpoints")

# What a run starts from: the key of its digest in a checkpoint, and what it is.
STARTS = {"anchor_digest": "anchor", "model_digest": "model", "rows_of": "slice"}


def fit(config: RunConfig, workdir: str | Path) -> dict[str, Any]:
    """Runs the job to its last step and writes `final/`; called again, it goes on where it stopped.

    Args:
      workdir: a folder, or a URL of object storage (see `run_dirs`).

    Returns:
      a summary: steps, tokens, seconds of this call, the last metrics.

    Raises:
      ConfigError, DataError, CheckpointError, RefusedError: before the first step.
      TrainingError: the run diverged, or a frozen leaf moved.
      Preempted: told to stop (SIGTERM); the state is saved.
    """
    distributed.require_same(dataclasses.asdict(config), "their configuration")
    with run_dirs.opened(workdir) as place:
        return _fit(config, place)


def _fit(config: RunConfig, place: run_dirs.RunDir) -> dict[str, Any]:
    workdir = place.path
    finished = distributed.from_first(lambda: _finished(place, config), "starting")
    if finished:
        logger.info("finished already: %s", place)
        return finished
    began = time.time()
    j = training_job.build(config)
    frozen_before = placed.part_digests(j.frozen)
    with distributed.together("opening the data"):
        iterator = iter(_training_data(j))
        if distributed.first():
            workdir.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
            (workdir / "config.json").write_text(text)
    with place.checkpoints(config.checkpoint_every, config.keep_checkpoints) as checkpoints:
        state = _restore(j, checkpoints, iterator)
        run = Loop(j, workdir, checkpoints, iterator, state)
        run.to_the_end()
    with distributed.together("checking the frozen leaves"):
        if placed.part_digests(j.frozen) != frozen_before:
            raise TrainingError("A frozen leaf changed during training", where=place)
    summary = {
        "steps": config.optim.last_step,
        "tokens": config.optim.last_step * config.data.batch_rows * config.data.seq_len,
        "seconds": round(time.time() - began, 3),
        "last": run.last,
    }
    _finish(j, run.state, place, summary)
    return summary


def _finished(place: run_dirs.RunDir, config: RunConfig) -> dict[str, Any] | None:
    """The summary of a run that has ended, after the checks that come before any other work."""
    _refuse_other(place, config)
    path = place.path / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def _training_data(j: training_job.TrainingJob) -> grain.IterDataset:
    config = j.config
    return loader.train_loader(
        config.data,
        tokenizer_digest=j.tokenizer_digest,
        vocab_size=j.model.vocab_size,
        seed=config.seed,
        held=placed.batch_rows(j.mesh, config.data.batch_rows),
    )


def _refuse_other(place: run_dirs.RunDir, config: RunConfig) -> None:
    """Refuses a workdir whose run was started with settings that give other results."""
    path = place.path / "config.json"
    if not path.exists():
        return
    mine, theirs = _settings(dataclasses.asdict(config)), _settings(json.loads(path.read_text()))
    # An older file that lacks one of these had its default.
    theirs = _settings(dataclasses.asdict(ExecConfig()), "exec") | theirs
    changed = [
        f"{key} was {theirs.get(key)!r}, is {mine.get(key)!r}"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
        and (key in BOUND_KEYS or key.split(".")[0] not in FREE_KEYS)
    ]
    if changed:
        raise ConfigError(
            "The workdir belongs to a run with another configuration",
            got="; ".join(changed),
            where=f"{place}/config.json",
            fix="choose another workdir, or repeat the configuration that it was started with",
        )


def _settings(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted key to value; a path is compared by what it leads to, not by how it is spelt."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        nested = [_settings(v, f"{key}.{k}" if key else str(k)) for k, v in items]
        return {k: v for part in nested for k, v in part.items()}
    if value and key.split(".")[-1] in ("path", "anchor", "expert", "tokenizer"):
        value = urls.as_url(value) or str(Path(value).resolve())
    return {key: value}


def _restore(
    j: training_job.TrainingJob, checkpoints: run_dirs.Checkpoints, iterator: grain.DatasetIterator
) -> Any:
    """The newest verified state with the data iterator set to it, or a fresh start."""
    restored = checkpoints.restore_latest(j.abstract_state)
    if restored is None:
        return j.initial_state()
    for problem in restored.skipped:
        logger.warning("damaged checkpoint passed over: %s", problem)
    for key, wanted in _started_from(j).items():
        saved = restored.meta.get(key, wanted)  # older checkpoints know of the anchor alone
        if saved != wanted:
            problem = CheckpointError(
                f"The checkpoint is of a run that started from another {STARTS[key]}",
                got=saved,
                expected=wanted,
                where=checkpoints.directory,
                fix="put back what the run started from, or choose another workdir",
            )
            raise distributed.agreed(problem)
    iterator.set_state(restored.meta["iterator"])
    logger.info("resumed at step %d", restored.step)
    return restored.state


def _started_from(j: training_job.TrainingJob) -> dict[str, str | None]:
    """Digests of what the run started from, by the keys of `STARTS`: a path says less."""
    out = {"anchor_digest": j.anchor.anchor_digest if j.anchor else None}
    if j.anchor and not j.anchor.is_anchor:
        out["model_digest"] = j.anchor.model_digest
    return out | ({"rows_of": j.rows_of} if j.rows_of else {})


class Loop:
    """The training loop with what it carries from step to step."""

    def __init__(
        self,
        j: training_job.TrainingJob,
        workdir: Path,
        checkpoints: run_dirs.Checkpoints,
        iterator: grain.DatasetIterator,
        state: Any,
    ):
        self.job, self.state, self.last = j, state, {}
        self._checkpoints, self._iterator = checkpoints, iterator
        self._done = int(state["step"])
        self._skipped = 0
        self._held = placed.batch_rows(j.mesh, j.config.data.batch_rows)
        first = distributed.first()
        self._writer = metrics.MetricsWriter(workdir, last_step=self._done) if first else None
        self._clock = _Clock(j, self._done)
        self._stop = threading.Event()
        self._step = j.program.jitted()

    def to_the_end(self) -> None:
        """Runs all remaining steps; the metrics of a step are read while the next one computes."""
        config = self.job.config
        previous = signal.SIG_DFL
        # Several processes are told through JAX, or each would stop after another step.
        ours = threading.current_thread() is threading.main_thread() and not distributed.several()
        if ours:
            previous = signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        pending = None
        try:
            while self._done < config.optim.last_step and not self._told_to_stop():
                batch = self._next_batch()
                with jax.transfer_guard("disallow"):
                    self.state, new = self._step(self.state, self.job.frozen, batch)
                self._done += 1
                if pending is not None:
                    self._report(*pending)
                pending = (self._done, new)
                if config.eval_every and self._done % config.eval_every == 0:
                    self._write(self._done, {"heldout": self._heldout()})
                if self._checkpoints.due(self._done):
                    self._save()
            if pending is not None:
                self._report(*pending)
            self._save()
            self._checkpoints.wait()
        finally:
            if self._writer:
                self._writer.close()
            if ours:
                signal.signal(signal.SIGTERM, previous)
        if self._done < config.optim.last_step:
            told = Preempted(
                "The run was told to stop and has saved its state",
                where=f"step {self._done} of {config.optim.last_step}",
                fix="start it again with the same command",
            )
            raise distributed.agreed(told)

    def _told_to_stop(self) -> bool:
        """Whether SIGTERM came to any process of the run; true for all after the same step."""
        if not distributed.several():
            return self._stop.is_set()
        return multihost_utils.reached_preemption_sync_point(self._done)

    def _next_batch(self) -> dict[str, jax.Array]:
        rows = self.job.config.data.batch_rows
        return placed.batch(next(self._iterator), self.job.mesh, rows, self._held)

    def _write(self, number: int, values: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(number, values)

    def _save(self) -> None:
        meta = {"iterator": self._iterator.get_state(), **_started_from(self.job)}
        self._checkpoints.save(self._done, self.state, meta)

    def _report(self, number: int, new: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(new).items()}
        self._skipped = self._skipped + 1 if values["skipped"] else 0
        if values["skipped"]:
            logger.warning("step %d is not finite: its update was left out", number)
        if self._skipped >= MAX_SKIPPED:
            diverged = TrainingError(
                f"{MAX_SKIPPED} steps in a row were not finite",
                where=f"step {number}",
                fix="lower the learning rate or look at the batches of these steps",
            )
            raise distributed.agreed(diverged)
        config = self.job.config
        self._clock.started(number)
        if number % config.log_every == 0 or number == config.optim.last_step:
            values |= self._clock.tick(number)
            self.last = {k: round(v, 6) for k, v in values.items()}
            self._write(number, self.last)
            logger.info("%s", _line(number, config.optim.last_step, values))

    def _heldout(self) -> dict[str, float]:
        """Bits per byte of every held-out source with the weights of this step."""
        j, config = self.job, self.job.config
        shared, groups = stages.assemble(config.stage, self.state["params"], j.frozen)
        allowed = placed.fetch(j.frozen["filled"]) if "filled" in j.frozen else None
        out = {}
        sources = config.data.heldout
        for name, source in zip(_domains(sources), sources, strict=True):
            batches = loader.heldout_batches(
                source.path,
                rows=config.data.batch_rows,
                seq_len=config.data.seq_len,
                n_rows=config.eval_rows,
                tokenizer_digest=j.tokenizer_digest,
                vocab_size=j.model.vocab_size,
            )
            score = evaluate.score_text(
                *(j.model, j.runtime, shared, groups, batches, j.token_bytes), allowed=allowed
            )
            out[name] = round(score.bits_per_byte, 5)
        logger.info("held-out bits per byte: %s", "  ".join(f"{k} {v:.3f}" for k, v in out.items()))
        return out


class _Clock:
    """Speed since the last tick, and the time that the rest of the run will take."""

    def __init__(self, j: training_job.TrainingJob, start: int):
        config = j.config
        self._tokens = config.data.batch_rows * config.data.seq_len
        self._flops = stages.flops_per_token(j.model, config.stage, config.data.seq_len)
        peak, self.source = metrics.peak_flops(j.mesh.devices.flat[0])
        self._peak = peak * j.mesh.size
        self._last_step, self._total = start, config.optim.last_step
        self._time, self._cold = time.perf_counter(), True
        logger.info(
            "MFU: %.3g model FLOPs per token (frozen parts have no weight gradient) over "
            "%.3g FLOP/s (%s)",
            self._flops,
            self._peak,
            self.source,
        )

    def started(self, number: int) -> None:
        """Starts over after the first step of this process, which compiled."""
        if self._cold:
            self._last_step, self._time, self._cold = number, time.perf_counter(), False

    def tick(self, number: int) -> dict[str, float]:
        now = time.perf_counter()
        steps, seconds = number - self._last_step, now - self._time
        self._last_step, self._time = number, now
        speed = steps * self._tokens / max(seconds, 1e-9)
        return {
            "tokens_per_s": speed,
            "mfu": speed * self._flops / self._peak,
            "seconds_left": (self._total - number) * seconds / max(steps, 1),
        }


def _line(number: int, total: int, v: dict[str, float]) -> str:
    parts = [
        f"step {number}/{total}",
        f"loss {v['loss']:.4f}",
        f"grad {v['grad_norm']:.2f}",
        f"{v['tokens_per_s']:,.0f} tok/s",
        f"MFU {v['mfu']:.0%}",
    ]
    if "own_weight_on_own" in v:
        own, public = v["own_weight_on_own"], v["own_weight_on_public"]
        parts.append(f"own expert's weight: own text {own:.2f}, public {public:.2f}")
    if "dropped" in v:
        parts.append(
            f"dropped {v['dropped']:.2%}, of the fullest slot {v['dropped_worst_slot']:.2%}"
        )
    parts.append(f"{metrics.duration(v['seconds_left'])} left")
    return "  ".join(parts)


def _domains(sources: Sequence[SourceConfig]) -> list[str]:
    """A name of its own for each token-shard directory.

    …/code/heldout and …/code are both "code"; a/code and b/code are "a/code" and "b/code".
    """
    whole = [Path(source.path) for source in sources]
    short = [path.parent if path.name in ("heldout", "train") else path for path in whole]
    # A held-out set and a training set of one text have nothing else to be told apart by.
    kept = [w if short.count(s) > 1 else s for w, s in zip(whole, short, strict=True)]
    return [_suffix(path, [other for other in kept if other != path]) for path in kept]


def _suffix(path: Path, others: Sequence[Path]) -> str:
    """The shortest end of a path that none of the others has."""
    for number in range(1, len(path.parts)):
        end = path.parts[-number:]
        if all(other.parts[-number:] != end for other in others):
            return "/".join(end)
    return str(path)


def _finish(
    j: training_job.TrainingJob, state: Any, place: run_dirs.RunDir, summary: dict[str, Any]
) -> None:
    """Writes `final/`: what `flexolmo package` turns into an anchor or an expert slice."""
    config, workdir = j.config, place.path
    params = _final_params(j, state["params"])
    if place.url is not None:  # Hosts share no folder: the first writes all of it, and sends it.
        params = placed.fetch(params)
    package.write_final(
        workdir,
        # What ends is an expert, whether all of it was trained or its rows alone.
        stage="expert" if config.stage in stages.OWN_STAGES else config.stage,
        params=params,
        config=j.anchor.config if j.anchor else j.model,
        tokenizer_path=j.tokenizer,
        expert_id=config.expert_id,
        anchor_digest=j.anchor.anchor_digest if j.anchor else None,
        training={
            "steps": summary["steps"],
            "tokens": summary["tokens"],
            "seed": config.seed,
        },
        recipe=_recipe(j),
        gathered=place.url is not None,
    )
    with distributed.together("writing the summary"):
        if distributed.first():
            (workdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            place.finish()


def _final_params(j: training_job.TrainingJob, params: tree.Tree) -> tree.Tree:
    """What the stage was for: a whole model, one slice, or the rows of a router."""
    config = j.config
    if config.stage == "router":
        return params["experts"]
    if config.stage not in stages.OWN_STAGES:
        params = stages.join(params, j.frozen)
        if config.stage == "anchor" and not config.anchor:
            row_LD = router_init.public_row(config, j.model)
            params["experts"]["router"] = row_LD[:, None, :]
            params["shared"] |= router_init.public_parts(config, j.model)
        return params
    expert = stages.own_expert(params, j.frozen)
    if config.router_init.recalibrate:
        frozen = j.frozen
        expert = router_init.recalibrate(
            config, j.model, frozen["shared"], frozen["public"], expert
        )
    # Rounded to the dtypes of the public slice, beside which it will be stacked.
    return tree.map_named(
        lambda name, leaf: leaf.astype(j.slice_dtypes[name]), slices.take_slot(expert, 0)
    )


def _recipe(j: training_job.TrainingJob) -> dict[str, Any]:
    """What an owner may tell of the training: numbers and names of methods, never paths."""
    config, own = j.config, j.config.stage in stages.OWN_STAGES
    public = [s.weight for s in config.data.sources if s.public]
    total = sum(s.weight for s in config.data.sources)
    return {
        "optim": dataclasses.asdict(config.optim),
        "router_init": dataclasses.asdict(config.router_init),
        "seq_len": config.data.seq_len,
        "batch_rows": config.data.batch_rows,
        "public_share": sum(public) / total,
        **({"rows_of": j.rows_of} if j.rows_of else {}),
        **({"starts_from": j.anchor.model_digest} if j.anchor and not own else {}),
    }

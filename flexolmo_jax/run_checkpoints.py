# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a training run: asynchronous, atomic, and every byte checked on restore.

Several processes of one run save one checkpoint together: each writes what its devices hold, the
first hashes the files, names, deletes and chooses what to restore. All see one directory.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from flexolmo_jax import distributed, placed
from flexolmo_jax import tree as trees
from flexolmo_jax.checkpoint import (
    MARKER,
    METADATA,
    READ_ERRORS,
    named_leaves,
    restore_tree,
    to_host,
    wanted_record,
)
from flexolmo_jax.errors import CheckpointError, ConfigError, MachineError, Problem
from flexolmo_jax.files import check_files, hash_files, list_files, write_text

DIGESTS = "digests.json"
# Orbax writes these two last, after the digests; `_seal` adds them to the list.
LATE = (MARKER, METADATA)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored step; `skipped` is what was wrong with newer ones, now in `damaged-<step>`."""

    step: int
    state: Any
    meta: dict[str, Any]
    skipped: tuple[Problem, ...] = ()


class RunCheckpoints:
    """The checkpoints of one training run: asynchronous, atomic, every byte verified on restore.

    A step counts once its folder holds `digests.json`, which is written inside Orbax's temporary
    folder just before the atomic rename; a kill at any instant leaves no half step.

    Args:
      directory: folder of the run's checkpoints.
      every: steps between saves, for `due`.
      keep: newest complete steps to keep.
      keep_period: steps divisible by it are kept for good; 0 keeps none.
    """

    def __init__(self, directory: str | Path, every: int = 1, keep: int = 2, keep_period: int = 0):
        if every < 1 or keep < 1 or keep_period < 0:
            raise ConfigError(
                "A run needs a positive save interval and at least one kept checkpoint",
                got=f"every={every}, keep={keep}, keep_period={keep_period}",
            )
        self.directory = Path(directory).absolute()
        self._every, self._keep, self._period = every, keep, keep_period
        self._manager: ocp.CheckpointManager | None = None
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: tuple[int, concurrent.futures.Future] | None = None

    def due(self, step: int) -> bool:
        """Whether the run saves at this step."""
        return step % self._every == 0

    def steps(self) -> list[int]:
        """Completed steps on disk, oldest first; their content is not yet verified."""
        if not self.directory.is_dir():
            return []
        folders = [p for p in self.directory.iterdir() if re.fullmatch(r"0|[1-9]\d{0,17}", p.name)]
        return sorted(int(p.name) for p in folders if (p / DIGESTS).is_file())

    def latest_step(self) -> int | None:
        """The newest completed step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> bool:
        """Starts saving; returns once the state is copied. False if the step is saved already.

        Args:
          state: any pytree of arrays.
          meta: JSON values (step, digests, data iterator).

        Raises:
          MachineError: this or an earlier save could not be written.
        """
        with _write_errors(self.directory):
            self.wait()
            if distributed.from_first(lambda: self._claim(step), "saving"):
                return False
        # The first look at what the steps computed: what fails here is no fault of the disk.
        leaves = {
            # An own copy of what the caller could change while it is being written.
            name: leaf.copy() if isinstance(leaf, np.ndarray) else to_host(leaf)
            for name, leaf in named_leaves(state)[0].items()
        }
        # A collective, so not in the thread that hashes: its turn would differ among hosts.
        spread = placed.checksums(_spread(leaves))
        with _write_errors(self.directory):
            manager, pool = self._open()
            self._pending = (step, pool.submit(_describe, leaves, spread))
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(trees.unflatten(leaves)),
                    meta=ocp.args.JsonSave(json.loads(trees.canonical_json(dict(meta)))),
                ),
                force=True,
            )
        return True

    def _claim(self, step: int) -> bool:
        """Whether a step is saved already; if not, its place is made free."""
        if step in self.steps():
            return True
        self._set_aside(step)
        return False

    def wait(self) -> None:
        """Ends the save in progress, deletes what need not be kept; raises as `save`."""
        if self._manager is None:
            return
        with _write_errors(self.directory), distributed.together("saving"):
            try:
                self._manager.wait_until_finished()
            finally:
                # A save that failed is reported once and must not be taken for a later one.
                pending, self._pending = self._pending, None
            if pending is not None and distributed.first():
                self._complete(pending[0])

    def _complete(self, step: int) -> None:
        if not (self.directory / str(step) / DIGESTS).is_file():
            raise OSError(f"step {step} did not reach the disk")
        self._seal(step)
        for old in self.steps()[: -self._keep]:
            if not (self._period and old % self._period == 0):
                self._delete(old)

    def close(self) -> None:
        """Waits, then frees the threads; raises what an unfinished save raised."""
        try:
            self.wait()
        finally:
            if self._manager is not None and self._pool is not None:
                self._manager.close()
                self._pool.shutdown()
                logging.getLogger("absl").removeFilter(wanted_record)
            self._manager = self._pool = None

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # Where one process failed alone, the others may be anywhere: none comes to end a save.
        if error is None or distributed.is_agreed(error) or not distributed.several():
            self.close()

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """State and meta of one step, after checking every byte of it.

        Raises:
          CheckpointError: names each damaged file, or each leaf that does not fit.
        """
        recorded = distributed.from_first(lambda: self._trusted(step), "checking a checkpoint")
        return self._read(step, abstract_state, recorded)

    def _read(
        self, step: int, abstract_state: Any, recorded: Mapping[str, Mapping[str, Any]]
    ) -> tuple[Any, dict[str, Any]]:
        """State and meta of a step whose files have been checked.

        Args:
          recorded: what was said of each leaf when it was saved.
        """
        folder = self.directory / str(step)
        state = restore_tree(folder / "state", abstract_state)
        leaves = named_leaves(state)[0]
        # What one process saved as a whole and no process holds now has its files' digests alone.
        sums = placed.checksums({n: leaves[n] for n in leaves if recorded[n].get("checksum")})
        wrong = [name for name, value in sums.items() if recorded[name]["checksum"] != value]
        for name, leaf in leaves.items():
            want, host = recorded[name]["digest"], to_host(leaf)
            if want and isinstance(host, np.ndarray) and trees.leaf_digest(host) != want:
                wrong.append(name)
        with distributed.together("restoring"):
            if wrong:
                where = f"{folder}:{', '.join(wrong)}"
                raise CheckpointError("A restored leaf differs from what was saved", where=where)
            meta = json.loads((folder / "meta" / "metadata").read_text())
        return state, meta

    def _trusted(self, step: int) -> dict[str, dict[str, Any]]:
        """What was said of each leaf of a step, once every byte of its files has been checked."""
        folder, problems = self.directory / str(step), self.check(step)
        if problems:
            raise CheckpointError(
                f"The checkpoint of step {step} is damaged",
                got="; ".join(map(str, problems)),
                where=folder,
                fix="resume from another step; this one cannot be trusted",
            )
        return _read_digests(folder)["leaves"]

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest undamaged step, or None if nothing was ever saved.

        A leaf that does not fit `abstract_state` is an error, no reason to take an older step.

        Raises:
          CheckpointError: every checkpoint is damaged.
        """
        self.wait()
        step, leaves, found = distributed.from_first(self._choose, "choosing a checkpoint")
        if step is None:
            return None
        state, meta = self._read(step, abstract_state, leaves)
        return Restored(step, state, meta, tuple(Problem(*fields) for fields in found))

    def _choose(self) -> tuple[int | None, dict[str, Any], list[tuple[str, ...]]]:
        """The newest undamaged step with what was said of its leaves, and what is wrong with newer.

        The newer ones are set aside.
        """
        skipped: list[Problem] = []
        for step in reversed(self.steps()):
            problems = self.check(step)
            if not problems:
                for newer in [s for s in self.steps() if s > step]:
                    self._set_aside(newer)
                leaves = _read_digests(self.directory / str(step))["leaves"]
                return step, leaves, [dataclasses.astuple(p) for p in skipped]
            skipped += problems
        if skipped:
            raise CheckpointError(
                "Every checkpoint of this run is damaged",
                got="; ".join(map(str, skipped)),
                where=self.directory,
                fix="start again in another directory; the damaged folders are left as they are",
            )
        return None, {}, []

    def check(self, step: int) -> list[Problem]:
        """What is wrong with the files of one step, named relative to the run's folder."""
        folder = self.directory / str(step)
        try:
            digests = _read_digests(folder)
        except READ_ERRORS as e:
            return [Problem("digests", f"{step}/{DIGESTS}", "", f"cannot be trusted: {e}")]
        late = [name for name in LATE if name not in digests["files"]]
        problems = check_files(folder, digests["files"], ignore=[DIGESTS, *late])
        return [dataclasses.replace(p, path=f"{step}/{p.path}") for p in problems]

    def _open(self) -> tuple[ocp.CheckpointManager, concurrent.futures.ThreadPoolExecutor]:
        if self._manager is None or self._pool is None:
            logging.getLogger("absl").addFilter(wanted_record)
            self._pool = concurrent.futures.ThreadPoolExecutor(1)
            distributed.from_first(self._prepare, "opening the checkpoints")
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None,  # `wait` deletes, and only after a newer step is complete
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
            )
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
            )
        return self._manager, self._pool

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for doomed in self.directory.glob("deleted-*"):
            shutil.rmtree(doomed, ignore_errors=True)

    def _write_digests(self) -> None:
        """Runs in Orbax's thread on the first host: all is written, the rename comes next."""
        assert self._pending is not None
        step, leaves = self._pending
        (folder,) = self.directory.glob(f"{step}.orbax-checkpoint-tmp*")
        files, problems = list_files(folder)
        if problems:
            raise OSError("; ".join(map(str, problems)))
        listed = hash_files(folder, [f for f in files if f not in (*LATE, DIGESTS)])
        _save_digests(folder, {"files": listed, "leaves": leaves.result()})

    def _seal(self, step: int) -> None:
        folder = self.directory / str(step)
        digests = _read_digests(folder)
        late = hash_files(folder, [name for name in LATE if (folder / name).is_file()])
        content = {**digests, "files": {**digests["files"], **late}}
        # Not written inside the step: a kill would leave a file there that nobody listed.
        _save_digests(folder, content, work=self.directory / "seal.tmp")

    def _delete(self, step: int) -> None:
        """Renames first, so that a kill leaves either the whole step or no step."""
        doomed = self.directory / f"deleted-{step}"
        os.replace(self.directory / str(step), doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _set_aside(self, step: int) -> None:
        """Moves a damaged or incomplete step out of the way, as evidence."""
        folder = self.directory / str(step)
        if not folder.exists():
            return
        target = self.directory / f"damaged-{step}"
        while target.exists():
            target = target.with_name(target.name + "+")
        os.replace(folder, target)
        if self._manager is not None:
            self._manager.reload()


@contextlib.contextmanager
def _write_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as e:
        raise MachineError(
            "A checkpoint could not be written",
            got=e,
            where=where,
            fix="free some disk space or fix the directory, then start the same command again",
        ) from e


def _spread(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves that no process holds whole."""
    return {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, np.ndarray)}


def _describe(leaves: Mapping[str, Any], checksums: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Each leaf in words: with a digest where this process holds it whole, else a checksum."""
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": np.dtype(leaf.dtype).name,
            "digest": None if name in checksums else trees.leaf_digest(leaf),
            **({"checksum": checksums[name]} if name in checksums else {}),
        }
        for name, leaf in leaves.items()
    }


def _save_digests(folder: Path, content: dict[str, Any], work: Path | None = None) -> None:
    text = trees.canonical_json({**content, "digest": trees.json_digest(content)})
    write_text(folder / DIGESTS, text, work)


def _read_digests(folder: Path) -> dict[str, Any]:
    """The digests of a step; ValueError unless each byte of the file is as it was written."""
    text = (folder / DIGESTS).read_text(encoding="utf-8")
    value = json.loads(text)
    content = {k: v for k, v in value.items() if k != "digest"}
    if value.get("digest") != trees.json_digest(content) or text != trees.canonical_json(value):
        raise ValueError("the file was changed")
    return content

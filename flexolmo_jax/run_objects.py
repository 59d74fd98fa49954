# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run in object storage: each host writes its shards, one object commits.

Orbax 0.12 writes to gs:// and to disks only, so a step is written here, in the layout that it and
TensorStore read: one uncompressed zarr array per leaf, one chunk per shard. There is no rename in
an object store. A step counts once `<step>.json` is there, which lists every object with its
SHA-256 and is written last and only where there is none; each attempt at a step has a folder of
its own, so that a process thought dead cannot write into another's checkpoint.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from flexolmo_jax import distributed
from flexolmo_jax import tree as trees
from flexolmo_jax.checkpoint import leaf_problems, named_leaves
from flexolmo_jax.errors import CheckpointError, ConfigError, MachineError, Problem
from flexolmo_jax.run_checkpoints import Restored
from flexolmo_jax.storage import client

SCHEMA = 1
# First and last (exclusive) index along each axis.
Region = tuple[tuple[int, int], ...]
# The first process waits so long for what the others still have to send.
LATEST_S = 1800.0
_POLL_S = 0.5
_MAX_MARKER = 1 << 30


class DamagedError(CheckpointError):
    """Objects of a checkpoint that are not what was written."""

    def __init__(self, problem: Problem):
        super().__init__("A checkpoint is damaged", got=problem.message, where=problem.path)
        self.problem = problem


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One object to write: its name below the step's folder, and its bytes."""

    name: str
    data: Any


class ObjectCheckpoints:
    """The checkpoints of one run below a URL; used as `run_checkpoints.RunCheckpoints` is.

    Args:
      directory: URL of the run's checkpoints.
      every: steps between saves, for `due`.
      keep: newest complete steps to keep.
      keep_period: steps divisible by it are kept for good; 0 keeps none.
      before_commit: called in the first process just before a step counts.
    """

    def __init__(
        self,
        directory: str,
        every: int = 1,
        keep: int = 2,
        keep_period: int = 0,
        before_commit: Callable[[], None] = lambda: None,
    ):
        if every < 1 or keep < 1 or keep_period < 0:
            raise ConfigError(
                "A run needs a positive save interval and at least one kept checkpoint",
                got=f"every={every}, keep={keep}, keep_period={keep_period}",
            )
        self.directory = directory
        self._every, self._keep, self._period = every, keep, keep_period
        self._before_commit = before_commit
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._job: concurrent.futures.Future[None] | None = None

    def due(self, step: int) -> bool:
        """Whether the run saves at this step."""
        return step % self._every == 0

    def steps(self) -> list[int]:
        """Completed steps, oldest first; their content is not yet verified."""
        names = client.list_top(self.directory)[0]
        return sorted(int(n[:-5]) for n in names if re.fullmatch(r"(0|[1-9]\d{0,17})\.json", n))

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
        self.wait()
        data = distributed.from_first(lambda: self._new_folder(step), "saving")
        if not data:
            return False
        leaves = named_leaves(state)[0]
        table = {name: _entry(leaf) for name, leaf in leaves.items()}
        pieces = [p for name, leaf in leaves.items() for p in _pieces(name, leaf, table[name])]
        if distributed.first():
            pieces += [_Piece(f"{_folder(n)}/.zarray", _zarray(e)) for n, e in table.items()]
        own = json.loads(trees.canonical_json(dict(meta)))
        content = {"step": step, "data": data, "leaves": table, "meta": own}
        self._job = self._pool.submit(self._write, pieces, content)
        return True

    def _new_folder(self, step: int) -> str:
        """A name for this attempt at a step; none where the step is there."""
        return "" if step in self.steps() else f"{step}-{secrets.token_hex(4)}"

    def wait(self) -> None:
        """Ends the save in progress, deletes what need not be kept; raises as `save`."""
        if self._job is None:
            return
        job, self._job = self._job, None
        with distributed.together("saving"):
            job.result()
            if distributed.first():
                for old in self.steps()[: -self._keep]:
                    if not (self._period and old % self._period == 0):
                        self._delete(old)

    def close(self) -> None:
        """Waits, then frees the thread; raises what an unfinished save raised."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> "ObjectCheckpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None or not distributed.several():
            self.close()
        else:  # The others may wait for no one: what failed is told by the error in flight.
            self._pool.shutdown(wait=False, cancel_futures=True)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """State and meta of one step; every object that is read is checked.

        Raises:
          CheckpointError: names the damaged object, or each leaf that does not fit.
        """
        content = self._marker(step)
        leaves, treedef = named_leaves(abstract_state)
        found = {
            name: jax.ShapeDtypeStruct(tuple(e["shape"]), np.dtype(e["dtype"]))
            for name, e in content["leaves"].items()
        }
        problems = leaf_problems(leaves, found)
        if problems:
            raise CheckpointError(
                "The checkpoint does not hold the tree that was asked for",
                got="; ".join(map(str, problems)),
                where=f"{self.directory}/{step}.json",
            )
        with distributed.together("restoring"):
            try:
                values = [self._leaf(content, name, leaf) for name, leaf in leaves.items()]
            except DamagedError as e:
                if not distributed.several():
                    raise
                # Of the class that the other processes raise, so that all pass this step over.
                raise CheckpointError("A checkpoint is damaged", got=e.problem) from e
        return jax.tree.unflatten(treedef, values), content["meta"]

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest undamaged step, or None if nothing was ever saved.

        A leaf that does not fit `abstract_state` is an error, no reason to take an older step.

        Raises:
          CheckpointError: every checkpoint is damaged.
        """
        self.wait()
        steps = distributed.from_first(self._tidy, "opening the checkpoints")
        skipped: list[Problem] = []
        for step in reversed(steps):
            found, problems = self._attempt(step, abstract_state)
            if found is not None:
                newer = [s for s in steps if s > step]
                distributed.from_first(lambda n=newer: self._set_aside(n), "setting steps aside")
                return Restored(step, *found, tuple(skipped))
            skipped += problems
        if skipped:
            raise CheckpointError(
                "Every checkpoint of this run is damaged",
                got="; ".join(map(str, skipped)),
                where=self.directory,
                fix="start again in another directory; the damaged objects are left as they are",
            )
        return None

    def _attempt(
        self, step: int, abstract_state: Any
    ) -> tuple[tuple[Any, dict[str, Any]] | None, list[Problem]]:
        """State and meta, or what is wrong with them; the same for every process."""
        listed = distributed.from_first(
            lambda: [vars(p) for p in self.check(step)], "checking a checkpoint"
        )
        if listed:
            return None, [Problem(**p) for p in listed]
        try:
            return self.restore(step, abstract_state), []
        except DamagedError as e:
            return None, [e.problem]
        except CheckpointError as e:
            if not distributed.is_agreed(e):
                raise
            return None, [Problem("file-digest", f"{step}.json", "", str(e))]

    def check(self, step: int) -> list[Problem]:
        """What is wrong with the list of a step's objects; their bytes are checked when read."""
        try:
            content = self._marker(step)
        except DamagedError as e:
            return [e.problem]
        found = client.list_objects(f"{self.directory}/{content['data']}")
        out = []
        for name, (_, size) in content["files"].items():
            where = f"{content['data']}/{name}"
            if name not in found:
                out.append(Problem("file-missing", where, "", "listed, but not there"))
            elif found[name].size != size:
                message = f"{found[name].size} bytes, listed {size}"
                out.append(Problem("file-size", where, "", message))
        return out

    def _marker(self, step: int) -> dict[str, Any]:
        where = f"{self.directory}/{step}.json"
        data = client.read(where, _MAX_MARKER)
        try:
            value = json.loads(data or b"")
            content = {k: v for k, v in value.items() if k != "digest"}
            whole = value.get("digest") == trees.json_digest(content) and value["step"] == step
        except (ValueError, AttributeError, KeyError, RecursionError):
            whole, content = False, {}
        if not whole or content["schema"] != SCHEMA:
            message = "the list of its objects is missing, changed or of another version"
            raise DamagedError(Problem("digests", where, "", message))
        return content

    def _tidy(self) -> list[int]:
        """Deletes what interrupted saves have left; the steps that count."""
        names, folders = client.list_top(self.directory)
        markers = [n for n in names if re.fullmatch(r"(damaged-)?\d+\+*\.json", n)]
        kept = set()
        for name in markers:
            data = client.read(f"{self.directory}/{name}", _MAX_MARKER) or b""
            found = re.search(rb'"data": ?"(\d+-[0-9a-f]{8})"', data)
            step = re.sub(r"\D", "", name)
            # A marker that cannot be read keeps every attempt at its step, as evidence.
            kept |= {found.group(1).decode()} if found else {f for f in folders if _of(f) == step}
        for folder in set(folders) - kept:
            if re.fullmatch(r"\d+-[0-9a-f]{8}", folder):
                client.delete_all(f"{self.directory}/{folder}")
        return self.steps()

    def _write(self, pieces: list[_Piece], content: dict[str, Any]) -> None:
        """Runs in a thread: this process's objects, then its list, then all lists together."""
        folder, me = f"{self.directory}/{content['data']}", jax.process_index()
        files: dict[str, list[Any]] = {}
        sent = False
        try:
            with concurrent.futures.ThreadPoolExecutor(client.THREADS) as pool:
                files.update(pool.map(functools.partial(_send, folder), pieces))
            sent = True
        finally:
            if not sent:
                client.write(f"{folder}/parts/{me}.failed", b"")
        if not distributed.first():
            client.write(f"{folder}/parts/{me}.json", json.dumps(files).encode())
            return
        for other in range(1, jax.process_count()):
            files |= _part(folder, other)
        arrived = {n: e.size for n, e in client.list_objects(folder).items()}
        lost = sorted(n for n, (_, size) in files.items() if arrived.get(n) != size)
        if lost:
            what = "A checkpoint was removed while it was being written"
            raise MachineError(what, got=", ".join(lost[:5]), where=folder)
        self._before_commit()
        value = {"kind": "checkpoint", "schema": SCHEMA, "files": files, **content}
        text = trees.canonical_json({**value, "digest": trees.json_digest(value)}).encode()
        where = f"{self.directory}/{content['step']}.json"
        if not client.write(where, text, create=True) and client.read(where) != text:
            raise MachineError(
                "Another job writes checkpoints of this run",
                where=where,
                fix="stop one of them; each job needs a workdir of its own",
            )

    def _leaf(self, content: Mapping[str, Any], name: str, like: Any) -> Any:
        """One leaf where `like` wants it, from as few chunks as it needs."""
        entry = content["leaves"][name]
        folder = f"{self.directory}/{content['data']}"
        chunk, dtype = entry["chunks"], np.dtype(entry["dtype"])

        @functools.lru_cache(maxsize=4)
        def load(key: str) -> np.ndarray:
            file = f"{_folder(name)}/{key}"
            digest, size = content["files"][file]
            data = b"".join(client.stream(f"{folder}/{file}", size))
            got = "sha256:" + hashlib.sha256(data).hexdigest()
            if got != digest:
                message = f"content has {got}, listed {digest}"
                raise DamagedError(Problem("file-digest", f"{folder}/{file}", name, message))
            return np.frombuffer(data, dtype).reshape(chunk)

        def read(region: Region) -> np.ndarray:
            out = np.empty([stop - start for start, stop in region], dtype)
            grid = [range(a // c, -(-b // c)) for (a, b), c in zip(region, chunk, strict=True)]
            for index in np.ndindex(*(len(r) for r in grid)):
                at = [r[i] for r, i in zip(grid, index, strict=True)]
                to, take = _overlap(region, at, chunk)
                out[to] = load(_key(at))[take]
            return out

        return _placed(tuple(entry["shape"]), getattr(like, "sharding", None), read)

    def _delete(self, step: int) -> None:
        """The marker first: what is interrupted leaves no step rather than half of one."""
        data = self._marker(step)["data"]
        client.delete(self.directory, [f"{step}.json"])
        client.delete_all(f"{self.directory}/{data}")

    def _set_aside(self, steps: list[int]) -> None:
        """Takes damaged steps out of the count; their objects stay as evidence."""
        for step in steps:
            data = client.read(f"{self.directory}/{step}.json")
            name = f"damaged-{step}"
            while data is not None and not client.write(
                f"{self.directory}/{name}.json", data, create=True
            ):
                name += "+"
            client.delete(self.directory, [f"{step}.json"])


def _of(folder: str) -> str:
    return folder.partition("-")[0]


def _folder(name: str) -> str:
    """The zarr array of a leaf."""
    return name.replace("/", ".")


def _key(index: list[int]) -> str:
    return ".".join(map(str, index)) or "0"


def _entry(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of a leaf, and the shape of its chunks, which are its shards."""
    shape = tuple(leaf.shape)
    chunks = leaf.sharding.shard_shape(shape) if isinstance(leaf, jax.Array) else shape
    return {"shape": list(shape), "dtype": np.dtype(leaf.dtype).name, "chunks": list(chunks)}


def _pieces(name: str, leaf: Any, entry: Mapping[str, Any]) -> list[_Piece]:
    """Own copies of the shards that this process has to write."""
    if not isinstance(leaf, jax.Array):
        key = _key([0] * leaf.ndim)
        one = [_Piece(f"{_folder(name)}/{key}", np.array(leaf, order="C"))]
        return one if distributed.first() else []
    out = []
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            starts = [s.indices(n)[0] for s, n in zip(shard.index, leaf.shape, strict=True)]
            at = [a // max(c, 1) for a, c in zip(starts, entry["chunks"], strict=True)]
            data = np.array(shard.data, order="C")
            out.append(_Piece(f"{_folder(name)}/{_key(at)}", data))
    return out


def _zarray(entry: Mapping[str, Any]) -> bytes:
    dtype = np.dtype(entry["dtype"])
    value = {
        "zarr_format": 2,
        "shape": entry["shape"],
        "chunks": [max(1, c) for c in entry["chunks"]],
        "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
    }
    return trees.canonical_json(value).encode()


def _send(folder: str, piece: _Piece) -> tuple[str, list[Any]]:
    """Writes one object; its name, and its digest and size as they left this process."""
    data = piece.data
    if isinstance(data, np.ndarray):
        data = data.reshape(-1).view(np.uint8).data
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    client.write(f"{folder}/{piece.name}", data)
    return piece.name, [digest, len(data)]


def _part(folder: str, process: int) -> dict[str, list[Any]]:
    """What another process has written, once it has."""
    late = time.monotonic() + LATEST_S
    while time.monotonic() < late:
        data = client.read(f"{folder}/parts/{process}.json")
        if data is not None:
            return json.loads(data)
        if client.read(f"{folder}/parts/{process}.failed") is not None:
            break
        time.sleep(_POLL_S)
    raise MachineError(f"Process {process} of this run could not save its shards", where=folder)


def _placed(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding | None,
    read: Callable[[Region], np.ndarray],
) -> Any:
    """An array by its sharding, each distinct shard read once; a numpy array without one."""
    if sharding is None:
        return read(tuple((0, size) for size in shape))
    shards, parts = [], {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = [s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True)]
        region = tuple((start, stop) for start, stop in bounds)
        if region not in parts:
            parts[region] = read(region)
        shards.append(jax.device_put(parts[region], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _overlap(
    region: Region, at: list[int], chunk: list[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a chunk's part of a region goes, and what to take from the chunk."""
    to, take = [], []
    for (first, last), index, size in zip(region, at, chunk, strict=True):
        low, high = max(first, index * size), min(last, (index + 1) * size)
        to.append(slice(low - first, high - first))
        take.append(slice(low - index * size, high - index * size))
    return tuple(to), tuple(take)

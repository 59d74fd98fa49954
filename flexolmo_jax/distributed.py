# SPDX-License-Identifier: Apache-2.0
"""One run on several hosts, one process each: how they join, agree, and fail together.

A program on a pod is the same program in every process. What only one of them may do (write a
file, choose a checkpoint) the first does, and tells the others; what may fail on one of them alone
happens inside `together`, or the others would wait for it without end.
"""

import atexit
import importlib.util
import itertools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flexolmo_jax import tree as trees
from flexolmo_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FlexOlmoError,
    MachineError,
    TrainingError,
)

logger = logging.getLogger("flexolmo")

# What a launcher sets where the processes cannot find each other by themselves; JAX's own names.
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SETTINGS = (COORDINATOR, COUNT, INDEX)
# A process that ends waits so long for the others: all ended well are seconds apart.
SHUTDOWN_S = 30
# The first process may hash terabytes while the others wait for what it finds.
WAIT_S = 3600
_MEETINGS = itertools.count()
_AGREED = "every process of the run stopped for this"
_SHARED = {c.__name__: c for c in (CheckpointError, ConfigError, DataError, TrainingError)}
_SHARED["RefusedError"] = CheckpointError
# A process that could not leave by itself (a thread of it waits for others) is ended then.
LEAVE_S = 20


def start(environment: Mapping[str, str] | None = None) -> bool:
    """Joins the other processes of this run, before any device is used; True for the first.

    A process that has joined already stays as it is.

    Told by `SETTINGS`, all three or (one process) `COUNT` alone. Without them a TPU pod (Cloud TPU
    VMs, GKE, several slices) and a slurm step of several tasks are recognised, and what is
    neither is a run of one process.

    Raises:
      ConfigError: settings that are incomplete or wrong.
      MachineError: the processes did not find each other.
    """
    if jax.distributed.is_initialized():
        return first()
    environment = os.environ if environment is None else environment
    told = _told(environment)
    if told is None and not _is_pod(environment):
        return True
    if told == ("", 1, 0):
        return True
    # "deactivate": nothing is left to detect, and a cluster around us may know it differently.
    named = ("coordinator_address", "num_processes", "process_id")
    arguments: dict[str, Any] = dict(zip(named, told, strict=True)) if told else {}
    if told:
        arguments["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_S, **arguments)
    except (RuntimeError, ValueError, OSError) as e:
        raise MachineError(
            "The processes of this run could not join",
            got=e,
            where=told[0] if told else "as the cluster describes itself",
            fix=f"see that all were started, or set {', '.join(SETTINGS)}; {COUNT}=1 is one alone",
        ) from e
    logger.info(
        "process %d of %d, %d devices here, %d in all",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )
    if not first():
        # What they would say, the first says for all of them; warnings are their own.
        logger.setLevel(logging.WARNING)
    return first()


def _told(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    given = {name: environment[name] for name in SETTINGS if environment.get(name)}
    if not given:
        return None
    numbers = {n: int(given[n]) for n in (COUNT, INDEX) if given.get(n, "").isdecimal()}
    if list(given) == [COUNT] and numbers.get(COUNT) == 1:
        return ("", 1, 0)
    address = given.get(COORDINATOR, "")
    host, _, port = address.rpartition(":")
    if len(numbers) < 2 or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        problem = "a value is missing or not what it should be"
    elif not numbers[INDEX] < numbers[COUNT]:
        problem = "there is no such process"
    else:
        return (address, numbers[COUNT], numbers[INDEX])
    raise ConfigError(
        f"The settings of this process are wrong: {problem}",
        got=", ".join(f"{name}={environment.get(name)!r}" for name in SETTINGS),
        expected=f"{COORDINATOR}=host:port, {COUNT}=N and {INDEX}=0..N-1 together, or none of them",
        where="environment",
    )


def _is_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several hosts by what the cluster says."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(environment.get(name) for name in slurm):
        return int(environment.get("SLURM_NTASKS") or 1) > 1
    if int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts
    # Cloud TPU VMs know their neighbours from the cloud's metadata, where JAX looks them up.
    return "TPU_SKIP_MDS_QUERY" not in environment and _has_tpu(environment)


def _has_tpu(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "")
    wanted = not platforms or "tpu" in platforms.split(",")
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return wanted and bool(chips) and importlib.util.find_spec("libtpu") is not None


class session:  # noqa: N801 (used as a function: `with session() as first`)
    """`start`, and an end by which no other process is kept waiting.

    A process that fails alone leaves at once with the exit code of its error; JAX would have it
    wait at its end for processes that wait for it.
    """

    def __enter__(self) -> bool:
        return start()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or is_agreed(error) or not several():
            return
        logger.error(
            "process %d stops; where it lost another one, the log of that one says why",
            jax.process_index(),
        )
        code = error.exit_code if isinstance(error, FlexOlmoError) else 1
        atexit.register(_leave, code)
        late = threading.Timer(LEAVE_S, _leave, [code])
        late.daemon = True
        late.start()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def several() -> bool:
    """Whether this run has other processes."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes files and decides."""
    return jax.process_index() == 0


def agreed(error: FlexOlmoError) -> FlexOlmoError:
    """Marks an error that every process raises at this point, so that all end in good order."""
    error.add_note(_AGREED)
    return error


def is_agreed(error: BaseException | None) -> bool:
    """Whether every process raised an error at one point (`agreed`, `together`)."""
    return _AGREED in getattr(error, "__notes__", ())


class together:  # noqa: N801 (used as a function: `with together("reading")`)
    """All processes end this block, or all raise: whoever fails here stops the others too.

    The block must hold nothing that waits for another process. It is a barrier: what was written
    before its end is there for all.

    Args:
      what: names the block in the error of the processes that did not fail themselves.

    Raises:
      FlexOlmoError: another process failed; of the same class where that decides the exit code.
    """

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        failed = _failures(error, self._what)
        if error is not None:
            if several():
                error.add_note(_AGREED)
            return
        for index, (kind, text) in failed.items():
            problem = _SHARED.get(kind, MachineError)(
                f"Process {index} of this run failed at {self._what}",
                got=text,
                fix="see the log of it",
            )
            raise agreed(problem)


def _meet(what: str) -> None:
    """Waits on the host until all processes are here: a wait on a device has no end.

    Raises:
      MachineError: another process did not come in `WAIT_S`, or is gone.
    """
    # Not needed by one process, and slow to import.
    from orbax.checkpoint import multihost

    key = f"flexolmo/{next(_MEETINGS)}/{what}"
    try:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=WAIT_S * 1000)
    except RuntimeError as e:
        raise MachineError(
            "Not all processes of this run came to the same point",
            got=e,
            where=what,
            fix="see the logs of the others, then start the same command again on all hosts",
        ) from e


def _failures(error: BaseException | None, what: str) -> dict[int, tuple[str, str]]:
    """Process to class and text of its error, of those that have one."""
    if not several():
        return {}
    _meet(what)
    mine = b"" if error is None else json.dumps([type(error).__name__, str(error)[:2000]]).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    if not sizes.any():
        return {}
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    texts = multihost_utils.process_allgather(padded)
    return {i: tuple(json.loads(texts[i, :size].tobytes())) for i, size in enumerate(sizes) if size}


def from_first(make: Callable[[], Any], what: str) -> Any:
    """A JSON value that the first process makes and every process gets; fails on all or none."""
    if not several():
        return make()
    content = b""
    with together(what):
        if first():
            content = json.dumps(make()).encode()
    return json.loads(_broadcast(content))


def array_from_first(array: np.ndarray) -> np.ndarray:
    """The first process's bits of a small array that each has computed: hosts may round apart."""
    if not several():
        return array
    _meet("taking over an array")
    return np.frombuffer(_broadcast(array.tobytes()), array.dtype).reshape(array.shape)


def _broadcast(content: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # Few sizes, since each is a program to compile.
    padded = np.zeros(max(256, 1 << max(size - 1, 1).bit_length()), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()[:size]


def require_same(value: Any, what: str) -> None:
    """Refuses processes that were started with different settings.

    Raises:
      ConfigError: on all of them.
    """
    theirs = from_first(lambda: trees.json_digest(value), what)
    with together(what):
        if trees.json_digest(value) != theirs:
            raise ConfigError(
                f"The processes of this run differ in {what}",
                got=f"process {jax.process_index()} has other values than process 0",
                fix="start all of them with the same command and files",
            )

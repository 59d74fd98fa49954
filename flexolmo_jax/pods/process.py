# SPDX-License-Identifier: Apache-2.0
"""Plans in a process of its own, whose environment is set before it imports JAX.

Imports no JAX: the caller's process stays as it is, whatever devices it has.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexolmo_jax import errors
from flexolmo_jax.errors import ConfigError, FlexOlmoError, MachineError

# No probe for a TPU and no messages about its absence; any accelerator type will do.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
FIELDS = ("got", "expected", "where", "fix")


@dataclasses.dataclass(frozen=True)
class Request:
    """What `flexolmo plan` was asked for.

    Attributes:
      config: an experiment file with its argument.
      overrides: `--config.KEY=VALUE` items.
      model: a model directory or an experiment file that has the architecture; "" lets the
        configuration say.
      stage: what to compile; "" is the configuration's stage.
      rows, seq_len: replace those of the configuration unless 0.
      search: try other meshes, remat policies and rows as well.
      advise: where it does not fit, look for the nearest change that would.
    """

    config: str
    topology: str
    slices: int = 1
    overrides: tuple[str, ...] = ()
    model: str = ""
    stage: str = ""
    rows: int = 0
    seq_len: int = 0
    search: bool = False
    advise: bool = True


def plan(request: Request, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Runs a request and returns what it found.

    Args:
      tell: gets a line now and then.

    Raises:
      ConfigError: libtpu is missing, or the request cannot be compiled.
      MachineError: the process died.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "The TPU compiler is not installed",
            got="no package libtpu",
            fix="install the extra `tpu`: pip install 'flexolmo-jax[tpu]'",
        )
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        log = Path(folder) / "log"
        with log.open("w") as messages:
            process = subprocess.Popen(
                [sys.executable, "-m", "flexolmo_jax.pods.worker", str(answer)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env=environment(),
            )
            _converse(process, request, tell)
        if not answer.is_file():
            raise MachineError(
                "The compiling process ended without an answer",
                got=f"exit code {process.returncode}: {_tail(log)}",
                fix="a pod's program needs a few GiB of memory to compile",
            )
        result = json.loads(answer.read_text())
    if "error" in result:
        raise _rebuilt(result["error"])
    return result


def _converse(process: subprocess.Popen, request: Request, tell: Callable[[str], None]) -> None:
    """Hands the request over and passes lines on until the process ends."""
    assert process.stdin is not None and process.stdout is not None
    with process.stdout:
        try:
            # One that died already says why by its exit code and its log.
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(dataclasses.asdict(request)))
            for line in process.stdout:
                tell(line.rstrip("\n"))
            process.wait()
        finally:
            # Interrupted: nobody waits for the answer.
            if process.poll() is None:
                process.kill()
                process.wait()


def environment() -> dict[str, str]:
    """The caller's environment with what a quiet compiler needs; LIBTPU_INIT_ARGS is the user's."""
    # Flags for other backends may be there, and one that it does not know stops libtpu.
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {**kept, **ENVIRONMENT}


def describe(error: FlexOlmoError) -> dict[str, Any]:
    """An error as JSON."""
    values = {f: None if getattr(error, f) is None else str(getattr(error, f)) for f in FIELDS}
    return {"kind": type(error).__name__, "what": error.what, **values}


def _rebuilt(said: dict[str, Any]) -> FlexOlmoError:
    kind = getattr(errors, said["kind"], ConfigError)
    if not issubclass(kind, FlexOlmoError) or kind is errors.RefusedError:
        kind = ConfigError
    return kind(said["what"], **{f: said[f] for f in FIELDS})


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:] or "no message"

# SPDX-License-Identifier: Apache-2.0
"""What a run writes while it works: a line for people, JSON lines and TensorBoard for machines."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tensorboardX import SummaryWriter

logger = logging.getLogger("flexolmo")

# Peak dense bf16 FLOP/s per chip by the start of `device_kind`, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}
# JAX devices of one chip where it is more than one. (A v4 chip runs as one, though the compiler
# plans it as two.)
CHIP_DEVICES = {"TPU7x": 2}


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """(FLOP/s of one device, where the figure comes from).

    A device that the table does not know (a CPU) is measured with a large float32 matmul.
    """
    for kind, peak in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return peak / CHIP_DEVICES.get(kind, 1), "data sheet, bf16"
    n = 1024
    x = jnp.ones((n, n), jnp.float32)
    matmul = jax.jit(lambda a: a @ a)
    matmul(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        matmul(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, "measured, float32 matmul"


class MetricsWriter:
    """Appends to `metrics.jsonl` and `tensorboard/` of a workdir; the log line is the caller's."""

    def __init__(self, workdir: Path, last_step: int = 0):
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        self._drop_after(last_step)
        self._file = open(self._path, "a")  # noqa: SIM115 (lives as long as the run)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1)

    def _drop_after(self, step: int) -> None:
        """A resumed run repeats the steps after its checkpoint: their old lines go."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break  # cut off by a kill
        self._path.write_text("".join(kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One record; nested dicts become "a/b" in TensorBoard."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in _scalars("", values):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes everything to disk."""
        self._file.close()
        self._board.close()


def _scalars(prefix: str, values: dict[str, Any]):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(f"{prefix}{key}/", value)
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def duration(seconds: float) -> str:
    """1h02m, 3m05s or 12s."""
    seconds = int(max(0, seconds))
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"

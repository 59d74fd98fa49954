# SPDX-License-Identifier: Apache-2.0
"""Progress of a plan as lines on the screen: what runs, how long it took, how long is left."""

import sys
import time
from pathlib import Path
from typing import TextIO

from flexolmo_jax.jobs import local
from flexolmo_jax.jobs.plan import Plan

TICK_S = 15.0
WORDS = {"done": "done in", "skipped": "up to date, took"}


def clock(seconds: float) -> str:
    """A duration for people: "8 s", "2 min 05 s", "1 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Printer:
    """A `report` function for `local.run`: a line per start and end, and some in between."""

    def __init__(self, plan: Plan, stream: TextIO | None = None):
        self.total = len(plan.jobs)
        self.logs = {j.name: local.log_path(plan, j) for j in plan.jobs}
        self.stream = stream or sys.stdout
        self.last = time.monotonic()

    def __call__(self, event: local.Progress) -> None:
        """Prints the line of one event."""
        if event.kind == "tick" and time.monotonic() - self.last < TICK_S:
            return
        self.last = time.monotonic()
        left = "" if event.left_s is None else f" | all jobs: about {clock(event.left_s)} left"
        place = f"[{len(event.results):>2}/{self.total}]"
        name = event.job.name
        if event.kind == "start":
            text = f"{place} {name}: started{left}"
        elif event.kind == "tick":
            line = local.tail(Path(self.logs[name]), 1).strip()[:100]
            text = f"        {name}: {line}{left}" if line else f"        {name}: running{left}"
        else:
            assert event.result is not None
            status, seconds = event.result.status, event.result.seconds
            text = f"{place} {name}: {WORDS.get(status, status)}"
            text += f" {clock(seconds)}" if status in WORDS else ""
        print(text, file=self.stream, flush=True)

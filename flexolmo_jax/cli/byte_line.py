# SPDX-License-Identifier: Apache-2.0
"""Progress of a pass over many bytes, as one line on the screen."""

import sys
import time
from typing import TextIO

from flexolmo_jax.jobs.progress import clock

# Shorter passes show nothing; between lines where one cannot be written over.
QUIET_S, TICK_S = 2.0, 10.0


class ByteLine:
    """Called with the bytes that are done and the bytes there are; a context that ends its line."""

    def __init__(self, what: str, stream: TextIO | None = None):
        self.what, self.stream = what, stream or sys.stderr
        self.live, self.width = self.stream.isatty(), 0
        self.started = time.monotonic()
        self.next = self.started + QUIET_S

    def __call__(self, done: int, total: int) -> None:
        """Shows how far it is, now and then."""
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + (0.2 if self.live else TICK_S)
        speed = max(1.0, done / (now - self.started))
        left = clock((total - done) / speed)
        text = f"{self.what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {speed / 1e9:.2f} GB/s, "
        text += f"about {left} left"
        if self.live:
            print("\r" + text.ljust(self.width), end="", file=self.stream, flush=True)
            self.width = len(text)
        else:
            print(text, file=self.stream, flush=True)

    def __enter__(self) -> "ByteLine":
        return self

    def __exit__(self, *_: object) -> None:
        """Lets what follows start a line of its own."""
        if self.width:
            print(file=self.stream, flush=True)

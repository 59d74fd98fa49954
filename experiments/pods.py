# SPDX-License-Identifier: Apache-2.0
"""Which configuration runs on which pod: what is planned, tested and printed as a table.

Rows are those that a step computes at once; a larger batch is made of several such passes
(`optim.accumulate`), which changes the time per token little.
"""

import dataclasses
import re

from flexolmo_jax.pods.process import Request


@dataclasses.dataclass(frozen=True)
class Pod:
    """One program on one pod.

    Attributes:
      config: an experiment file of this folder with its argument.
      rows: rows at once, over all chips.
      overrides: `KEY=VALUE` of the configuration.
      stage: what to compile; "" is the configuration's stage.
      quick: small enough to be compiled in every test run.
    """

    name: str
    config: str
    topology: str
    rows: int
    seq_len: int = 0
    overrides: tuple[str, ...] = ()
    stage: str = ""
    slices: int = 1
    quick: bool = False

    @property
    def answer(self) -> str:
        """Name of the file with its plan."""
        words = f"{self.name} {self.config} {self.topology} x{self.slices} {self.rows}"
        return re.sub(r"\W+", "-", words) + ".json"

    def request(self, folder: str) -> Request:
        """What `flexolmo plan` is asked.

        Args:
          folder: where the experiment files lie.
        """
        return Request(
            config=f"{folder}/{self.config}",
            topology=self.topology,
            slices=self.slices,
            overrides=tuple(f"--config.{item}" for item in self.overrides),
            stage=self.stage,
            rows=self.rows,
            seq_len=self.seq_len,
            advise=False,
        )


_37B, _PAIR = "stitched.py:size=8x7b", "expert.py:size=7b"
# Slots lie over eight devices. Where memory allows, everything but elementwise work is kept.
_SLOTS = "exec.mesh_expert=8"
_KEEP = "exec.remat=dots"
PODS = (
    Pod(
        *("37.6B mixture, every weight", _37B, "v5p:4x4x8", 256),
        overrides=(_SLOTS, _KEEP, "exec.expert_parallel=fsdp"),
    ),
    Pod("37.6B mixture, every weight", _37B, "v6e:16x16", 512, overrides=(_SLOTS,)),
    Pod("expert of 7B", _PAIR, "v5p:2x2x1", 8, overrides=(_KEEP,)),
    Pod("expert of 7B", _PAIR, "v6e:2x4", 8),
    Pod("expert of 7B", _PAIR, "v5e:4x4", 16),
    Pod("37.6B mixture, router rows", "router.py:size=8x7b", "v5p:4x4x4", 64, overrides=(_SLOTS,)),
    Pod("37.6B mixture, evaluation", _37B, "v5p:2x2x2", 32, stage="eval"),
    Pod("37.6B mixture, prompts", _37B, "v5p:2x2x2", 8, stage="prefill"),
    Pod("37.6B mixture, next token", _37B, "v5p:2x2x2", 32, stage="decode"),
    Pod("anchor of 7B", "anchor.py:size=7b", "v5p:4x4x4", 128, overrides=(_KEEP,)),
    Pod("37.6B mixture, two slices", _37B, "v6e:8x16", 256, overrides=(_SLOTS,), slices=2),
    Pod("8x1B mixture, every weight", "stitched.py:size=8x1b", "v5p:2x2x2", 64),
    Pod("expert of 190M", "expert.py:size=190m", "v6e:2x2", 16),
    Pod("expert of 135M", "expert.py:size=135m", "v5e:2x2", 16, seq_len=1024),
    Pod("expert of 1B", "expert.py:size=1b", "v5e:2x2", 8),
    Pod("anchor of 60M", "anchor.py:size=60m", "v5e:2x2", 32, quick=True),
    Pod("mixture at size tiny", "stitched.py:size=tiny", "v5e:2x2", 64, quick=True),
    Pod("router at size tiny", "router.py:size=tiny", "v5e:2x2", 64, quick=True),
)

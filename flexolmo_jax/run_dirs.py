# SPDX-License-Identifier: Apache-2.0
"""The workdir of a run: a folder, or a URL whose small files are written here and sent there.

Checkpoints go to a URL directly. What a run writes line by line (metrics, TensorBoard) and at its
end (final weights, summary) is written in a folder of this machine first; the small files are sent
before each checkpoint counts, so that what is there is never older than the newest checkpoint.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from flexolmo_jax import distributed
from flexolmo_jax.errors import FlexOlmoError
from flexolmo_jax.files import list_files
from flexolmo_jax.run_checkpoints import RunCheckpoints
from flexolmo_jax.run_objects import ObjectCheckpoints
from flexolmo_jax.storage import cache, client, output, urls

logger = logging.getLogger("flexolmo")
Checkpoints = RunCheckpoints | ObjectCheckpoints
CHECKPOINTS, FINAL, SUMMARY = "checkpoints", "final", "summary.json"
_SMALL = ("config.json", "metrics.jsonl")
_BOARD = "tensorboard"


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Where a run keeps what.

    Attributes:
      path: folder of this machine that everything but checkpoints is written to.
      url: where it is sent; None where `path` is the workdir itself.
    """

    path: Path
    url: str | None = None

    def __str__(self) -> str:
        return self.url or str(self.path)

    def checkpoints(self, every: int, keep: int) -> Checkpoints:
        """The checkpoints of the run."""
        if self.url is None:
            return RunCheckpoints(self.path / CHECKPOINTS, every, keep)
        where = f"{self.url}/{CHECKPOINTS}"
        return ObjectCheckpoints(where, every, keep, before_commit=self.push)

    def push(self) -> None:
        """Sends the small files as they are now; by the first process only."""
        if self.url is None or not distributed.first():
            return
        board = list_files(self.path / _BOARD)[0] if (self.path / _BOARD).is_dir() else {}
        for name in (*_SMALL, *(f"{_BOARD}/{n}" for n in board)):
            if (self.path / name).is_file():
                client.write(f"{self.url}/{name}", (self.path / name).read_bytes())

    def finish(self) -> None:
        """Sends the final weights, in place of older ones, and then the summary."""
        if self.url is None or not distributed.first():
            return
        target = f"{self.url}/{FINAL}"
        client.delete(target, ["final.json"])
        client.delete_all(target)
        output.upload(self.path / FINAL, target, "final.json")
        self.push()
        client.write(f"{self.url}/{SUMMARY}", (self.path / SUMMARY).read_bytes())


@contextlib.contextmanager
def opened(workdir: str | Path) -> Iterator[RunDir]:
    """The workdir of a run that starts or goes on.

    Raises:
      ConfigError, MachineError: a URL that cannot be used (see `storage.client`).
    """
    url = urls.as_url(workdir)
    if url is None:
        yield RunDir(Path(workdir).absolute())
        return
    place, ended = RunDir(cache.work_folder(), url), False
    try:
        for name in (*_SMALL, SUMMARY):
            data = client.read(f"{url}/{name}")
            if data is not None:
                (place.path / name).write_bytes(data)
        yield place
        ended = True
    finally:
        if not ended:
            _push_what_there_is(place)
        shutil.rmtree(place.path, ignore_errors=True)


def _push_what_there_is(place: RunDir) -> None:
    """Also a run that is stopped leaves its newest lines; its own error matters more than this."""
    try:
        place.push()
    except FlexOlmoError as e:
        logger.warning("the metrics could not be sent: %s", e)

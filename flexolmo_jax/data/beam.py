# SPDX-License-Identifier: Apache-2.0
"""The two halves of a corpus preparation as Apache Beam pipelines.

What a process does is in `staging` and `assembly`; here is only how the work is spread. Elements
are few and large: inputs, pieces, and packed rows of one cut or one shard. On this machine texts
reach their shard through the staged files; a cluster's runner carries them in its own shuffle.
"""

import functools
import importlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flexolmo_jax.data import assembly, places, staging
from flexolmo_jax.data.assembly import Job
from flexolmo_jax.data.staging import Options, Work
from flexolmo_jax.errors import ConfigError, MachineError, nearest

DIRECT = "direct"
RUNNERS = (DIRECT, "DataflowRunner", "FlinkRunner", "SparkRunner", "PortableRunner")
# Its workers are other machines, wherever it is called from.
_REMOTE = ("DataflowRunner",)
# Marks of what is collected for a shard.
_LOSERS, _CHUNK = b"L", b"C"


def _beam() -> Any:
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # It warns of each cloud that it was not installed for.
        return importlib.import_module("apache_beam")
    except ModuleNotFoundError as e:
        raise ConfigError(
            "This runner needs a package that is not installed",
            got=e.name,
            fix='pip install "flexolmo-jax[beam]", or use --runner local',
        ) from e
    finally:
        logging.disable(before)


class BeamEngine:
    """Runs the two halves by a Beam runner.

    Args:
      runner: `direct` for processes of this machine, else a runner of Beam's.
      workers: processes of the direct runner.
      arguments: options of the runner, as "KEY=VALUE".

    Raises:
      ConfigError: an unknown runner, options that it cannot take, or Beam is not installed.
    """

    def __init__(self, runner: str, workers: int = 1, arguments: Sequence[str] = ()):
        if runner not in RUNNERS:
            raise ConfigError("Unknown runner", got=runner, fix=nearest(runner, RUNNERS))
        if workers < 1 or (workers > 1 and runner != DIRECT):
            expected = "1 or more; runners of a cluster take it as an option of their own"
            raise ConfigError("Not a number of workers", got=workers, expected=expected)
        if wrong := [a for a in arguments if a.startswith("-") or "=" not in a]:
            raise ConfigError("Not an option of a runner", got=wrong[0], expected="KEY=VALUE")
        self._runner, self._workers = runner, workers
        self._arguments = [f"--{a}" for a in arguments]
        # Files of this machine are seen by its own processes alone.
        self.shuffles_files = runner == DIRECT
        _beam()

    def read(self, works: Sequence[Work], options: Options, stage: str) -> None:
        """Stages inputs, each by one worker."""
        self._refuse_local([stage, *(w.place for w in works if w.kind == "file")])
        beam = _beam()
        # As ASCII: the name of a file need not be one that a coder of Beam's can write.
        items = [json.dumps(vars(work)) for work in works]
        with self._pipeline() as pipeline:
            _ = (
                pipeline
                | "Inputs" >> beam.Create(items)
                | "Spread" >> beam.Reshuffle()
                | "Stage" >> beam.FlatMap(functools.partial(_stage, options, stage))
            )

    def write(self, job: Job, pieces: Sequence[str], wanted: Sequence[int]) -> None:
        """Judges all cuts, then writes the shards that are wanted."""
        self._refuse_local([job.stage, job.finished])
        beam = _beam()
        with self._pipeline() as pipeline:
            read = pipeline | "Pieces" >> beam.Create(list(pieces)) | "Spread" >> beam.Reshuffle()
            # Each shard is named once, so that those without any loser are written too.
            parts = [pipeline | "Shards" >> beam.Create([(k, b"") for k in wanted])]
            if job.options.dedup != "none":
                parts.append(
                    read
                    | "Keys" >> beam.FlatMap(functools.partial(assembly.exact_parts, job))
                    | "By key" >> beam.GroupByKey()
                    | "Copies" >> beam.FlatMap(functools.partial(_exact_losers, job))
                )
            if job.options.dedup == "near":
                parts.append(
                    read
                    | "Sketches" >> beam.FlatMap(functools.partial(assembly.near_parts, job))
                    | "By band" >> beam.GroupByKey()
                    | "Near copies" >> beam.FlatMap(functools.partial(_near_losers, job))
                )
            if not self.shuffles_files:
                parts.append(read | "Texts" >> beam.FlatMap(functools.partial(_chunks, job)))
            listed = tuple(pieces) if self.shuffles_files else ()
            # Where each worker is a process, threads of the tokenizer would only take turns.
            alone = self._runner != DIRECT or self._workers > 1
            write = functools.partial(_write, job, set(wanted), listed, alone)
            _ = (
                parts
                | "All" >> beam.Flatten()
                | "By shard" >> beam.GroupByKey()
                | "Write" >> beam.FlatMap(write)
            )

    def _refuse_local(self, names: Sequence[str]) -> None:
        local = [name for name in names if not places.is_url(name)]
        if self._runner in _REMOTE and local:
            raise ConfigError(
                "The workers of this runner do not see files of this machine",
                got=f"{self._runner} with {local[0]}",
                expected="sources, --out and --stage as gs:// or s3:// URLs",
            )

    def _pipeline(self) -> Any:
        return _Run(self._runner, self._workers, self._arguments)


class _Run:
    """A pipeline that runs at the end of its block; its failures become errors of this package."""

    def __init__(self, runner: str, workers: int, arguments: Sequence[str]):
        beam = _beam()
        logging.getLogger("apache_beam").setLevel(logging.WARNING)
        kind = "multi_processing" if workers > 1 else "in_memory"
        known: list[str] = []
        if runner == DIRECT:
            known = [f"--direct_num_workers={workers}", f"--direct_running_mode={kind}"]
            known.append("--default_sdk_harness_log_level=ERROR")
        pipeline_options = importlib.import_module("apache_beam.options.pipeline_options")
        options = pipeline_options.PipelineOptions([*known, *arguments])
        try:
            chosen = _direct_runner(options) if runner == DIRECT else runner
            self._pipeline = beam.Pipeline(runner=chosen, options=options)
        except (ValueError, ImportError) as e:
            raise ConfigError("The runner cannot be used", got=e, where=runner) from e
        self._runner = runner

    def __enter__(self) -> Any:
        return self._pipeline

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            return
        try:
            self._pipeline.run().wait_until_finish()
        except (RuntimeError, OSError) as e:
            lines = [line for line in str(e).splitlines() if line.strip()]
            raise MachineError(
                "The Beam pipeline failed",
                got=lines[-1].strip() if lines else type(e).__name__,
                where=self._runner,
                fix="run the same command again: what is done is kept (--debug shows all)",
            ) from e


def _direct_runner(options: Any) -> Any:
    """Beam's runner of local processes; its `DirectRunner` first looks for another on the net."""
    portability = "apache_beam.runners.portability"
    fn_runner = importlib.import_module(f"{portability}.fn_api_runner.fn_runner")
    portable = importlib.import_module(f"{portability}.portable_runner")
    api = importlib.import_module("apache_beam.portability.api")
    encoded = portable.JobServiceHandle.encode_pipeline_options(options.get_all_options())
    info = api.beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(info))


def _stage(options: Options, stage: str, item: str) -> Iterator[str]:
    staging.stage_input(Work(**json.loads(item)), options, stage)
    yield from ()


def _exact_losers(job: Job, group: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
    for shard, packed in assembly.exact_losers(job, group[1]):
        yield shard, _LOSERS + packed


def _near_losers(job: Job, group: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
    for shard, packed in assembly.near_losers(job, group[1]):
        yield shard, _LOSERS + packed


def _chunks(job: Job, piece: str) -> Iterator[tuple[int, bytes]]:
    for shard, packed in assembly.chunks(job, piece):
        yield shard, _CHUNK + packed


def _write(
    job: Job,
    wanted: set[int],
    pieces: Sequence[str],
    alone: bool,
    group: tuple[int, Iterable[bytes]],
) -> Iterator[int]:
    shard, found = group[0], list(group[1])
    if shard not in wanted:
        return
    if alone:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    losers = [item[1:] for item in found if item[:1] == _LOSERS]
    packed = [item[1:] for item in found if item[:1] == _CHUNK]
    packed += [assembly.chunk(job, piece, shard) for piece in pieces]
    assembly.write_shard(job, shard, packed, losers)
    yield shard

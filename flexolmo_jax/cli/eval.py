# SPDX-License-Identifier: Apache-2.0
"""Score a model on tasks and texts, with all experts, some, or all but some."""

import argparse
import io
import sys
import time
from typing import Any, TextIO

from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs.progress import clock

# Between lines of progress where one cannot be written over.
TICK_S = 10.0


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which a request says which experts it may use."""
    group = parser.add_mutually_exclusive_group()
    # Given twice, they add up: the last alone would let in whom the first has denied.
    for name, text in (("allow", "use only these experts"), ("deny", "use all experts but these")):
        group.add_argument(
            f"--{name}",
            type=_names,
            action="extend",
            metavar="A,B",
            help=f"{text}; may be repeated",
        )
    parser.add_argument("--active", type=int, metavar="K", help="experts used per token")


TOGETHER = (
    "The experts of this model met in training (stage {stage}): denying one leaves what the others "
    "learnt from it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo eval`."""
    parser.add_argument("--model", required=True, metavar="M", help="a model or anchor directory")
    add_policy_arguments(parser)
    parser.add_argument(
        "--tasks",
        type=_names,
        default=["bpb"],
        metavar="A,B",
        help="tasks and suites (docs/tasks.md), and bpb: bits per byte of text under --data",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="<domain>/heldout token shards for bpb; files of tasks that are in no package",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="questions per task (default: all)")
    parser.add_argument("--rows", type=int, default=0, help="bpb: rows per domain (default: all)")
    parser.add_argument(
        "--seq-len",
        type=int,
        default=0,
        metavar="N",
        help="bpb: tokens of a row (default: the model's context, at most 1024)",
    )
    parser.add_argument(
        "--scores", metavar="DIR", help="keep every score here, and go on from what is there"
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tasks: tokens computed at once; fewer need less memory (default: by platform)",
    )
    parser.add_argument(
        "--sweep", metavar="subsets|k", help="a table over subsets of experts, or over their number"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates, prints a table and returns the result."""
    from flexolmo_jax import distributed

    with distributed.session() as first:
        if distributed.several() and args.tasks != ["bpb"]:
            problem = ConfigError(
                "Tasks are scored by one process; several share the work of bpb only",
                got=", ".join(args.tasks),
                where="--tasks",
                fix="run tasks on one host, which may have any number of devices",
            )
            raise distributed.agreed(problem)
        line = Line(sys.stderr if first else io.StringIO())
        try:
            result = _evaluate(args, line)
        finally:
            line.end()
        if first:
            _show(result)
        else:
            args.json = None
        return result


def _show(result: dict[str, Any]) -> None:
    from flexolmo_jax.tasks import table

    print(table.render(result))
    if result["trained_together"]:
        print(TOGETHER.format(stage=result["trained_together"]))


def _evaluate(args: argparse.Namespace, line: "Line") -> dict[str, Any]:
    import jax

    from flexolmo_jax import mesh
    from flexolmo_jax.tasks import runner

    return runner.evaluate(
        args.model,
        args.tasks,
        allow=args.allow,
        deny=args.deny,
        active=args.active,
        limit=args.limit,
        data=args.data,
        n_rows=args.rows,
        seq_len=args.seq_len,
        scores=args.scores,
        sweep=args.sweep,
        batch_tokens=args.batch_tokens,
        grid=mesh.make_mesh() if jax.device_count() > 1 else None,
        report=line,
    )


class Line:
    """Progress as one line that is written over; a line now and then where that cannot be."""

    def __init__(self, stream: TextIO):
        self.stream, self.live, self.width, self.last = stream, stream.isatty(), 0, 0.0

    def __call__(self, step: Any) -> None:
        """Shows a step; the last of a pass always."""
        now, whole = time.monotonic(), step.done == step.questions
        if not whole and now - self.last < (0.2 if self.live else TICK_S):
            return
        self.last = now
        text = (
            f"[{step.number}/{step.count}] {step.task} ({step.setting}): {step.done} of "
            f"{step.questions} questions, {step.fresh / step.seconds:.1f}/s, "
            + (clock(step.seconds) if whole else f"about {clock(step.left_s)} left")
        )
        if self.live:
            print("\r" + text.ljust(self.width), end="", file=self.stream, flush=True)
            self.width = 0 if whole else len(text)
            if whole:
                print(file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def end(self) -> None:
        """Ends a line that was being written over, so that what follows starts a new one."""
        if self.width:
            print(file=self.stream)
            self.width = 0


def _names(text: str) -> list[str]:
    return [name for name in text.replace("+", ",").split(",") if name]

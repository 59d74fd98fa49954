# SPDX-License-Identifier: Apache-2.0
"""Programs of others (kubectl, gcloud, sbatch): called by argument list, faults as named errors."""

import os
import shlex
import subprocess
from collections.abc import Sequence

from flexolmo_jax.errors import MachineError

# Where each program comes from, for the message when it is absent.
HINTS = {
    "kubectl": "install kubectl and connect it to the cluster (launch/README.md, step 5)",
    "gcloud": "install the Google Cloud CLI and run `gcloud auth login`",
    "sbatch": "run this on a login node of the Slurm cluster",
    "sacct": "run this on a login node of the Slurm cluster; its accounting must be on",
    "scancel": "run this on a login node of the Slurm cluster",
}
TIMEOUT_S = 300.0
TAIL = 2000


class ToolError(MachineError):
    """A program ended with a fault; `text` is all that it wrote to stderr."""

    def __init__(self, command: Sequence[str], code: int, text: str):
        self.text = text
        super().__init__(
            f"{command[0]} failed",
            got=f"exit code {code}: {text.strip()[-TAIL:] or 'no message'}",
            where=shlex.join(command)[:TAIL],
        )


def call(command: Sequence[str]) -> str:
    """Runs a program and returns what it wrote to stdout.

    Raises:
      MachineError: the program is absent or does not answer.
      ToolError: it ended with another exit code than 0.
    """
    name = command[0]
    try:
        # The end of a prompt: a program that asks a question must fail, not wait for ever.
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            env={**os.environ, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
        )
    except FileNotFoundError as error:
        raise MachineError(
            "A program that this back end needs is not installed", got=name, fix=HINTS.get(name)
        ) from error
    except PermissionError as error:
        raise MachineError("A program cannot be started", got=f"{name}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            f"{name} did not answer within {TIMEOUT_S:.0f} s", where=shlex.join(command)[:TAIL]
        ) from error
    if done.returncode:
        raise ToolError(command, done.returncode, done.stderr.decode("utf-8", "replace"))
    return done.stdout.decode("utf-8", "replace")


def wrapped(command: Sequence[str], width: int = 88) -> list[str]:
    """A command as lines that a shell reads as one; an option and its value stay together."""
    units: list[str] = []
    for i, word in enumerate(command):
        before = command[i - 1] if i else ""
        if before.startswith("-") and "=" not in before and not word.startswith("-"):
            units[-1] += f" {shlex.quote(word)}"
        else:
            units.append(shlex.quote(word))
    lines = [units[0]]
    for unit in units[1:]:
        if len(lines[-1]) + len(unit) > width:
            lines.append(f"  {unit}")
        else:
            lines[-1] += f" {unit}"
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]

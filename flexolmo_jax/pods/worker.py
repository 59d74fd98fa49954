# SPDX-License-Identifier: Apache-2.0
"""The compiling process of `flexolmo plan`: reads a request from stdin, writes the answer's file.

Lines on stdout are for the user; the compiler's own messages go to stderr.
"""

import json
import sys
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import FlexOlmoError
from flexolmo_jax.pods import process, search
from flexolmo_jax.results import write_json


def main() -> None:
    """Answers one request."""
    values = json.load(sys.stdin)
    request = process.Request(**{**values, "overrides": tuple(values["overrides"])})
    try:
        answer: dict[str, Any] = search.answer(request, _tell)
    except FlexOlmoError as error:
        answer = {"error": process.describe(error)}
    write_json(Path(sys.argv[1]), answer)


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()

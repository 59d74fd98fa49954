# SPDX-License-Identifier: Apache-2.0
"""Result files: the keys that every one has, and writing one at once or not at all."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flexolmo_jax

SCHEMA = 1
VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python, this package and the packages that results depend on."""
    out = {"python": platform.python_version(), "flexolmo_jax": flexolmo_jax.__version__}
    for name in VERSIONED:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def frame(
    command: str, config: Mapping[str, Any], result: Mapping[str, Any] | None, seconds: float
) -> dict[str, Any]:
    """A result with schema, command, versions, config, digests and seconds; its own keys win."""
    common = {
        "schema": SCHEMA,
        "command": command,
        "versions": versions(),
        "config": json.loads(json.dumps(config, default=str)),
        "digests": {},
        "seconds": round(seconds, 3),
    }
    return {**common, **(result or {})}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a result file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)

# SPDX-License-Identifier: Apache-2.0
"""Experiment and plan files: loaded by path, with an argument string and dotted overrides."""

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flexolmo_jax.config import RunConfig
from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.storage import urls
from flexolmo_jax.typed import from_dict

PREFIX = "--config."


def load_function(reference: str, name: str) -> Callable[[], Any]:
    """Returns the function `name` of the file in "path/file.py:argument", bound to its argument.

    Raises:
      ConfigError: no such file, it does not import, or it has no such function.
    """
    path_text, _, arg = reference.partition(":")
    path = Path(path_text).resolve()
    if not path.is_file():
        close = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = nearest(path.name, close) if close else "give the path of a .py file"
        raise ConfigError("There is no such experiment file", got=path_text, fix=hint)
    function = getattr(_import_file(path), name, None)
    if not callable(function):
        raise ConfigError(f"The file has no function {name}", where=path)
    return lambda: function(arg)


def argument_path(path: Path | str, what: str, splits: str = ",+") -> Path:
    """The resolved path, which can then stand in the argument of an experiment file.

    Args:
      what: its name in an error.
      splits: characters at which that argument, or a list in it, is split.

    Raises:
      ConfigError: a URL, or one of these characters, wherever in the path it is.
    """
    if urls.as_url(path) is not None:
        raise ConfigError(f"{what} must be a folder of this machine", got=path)
    resolved = Path(path).resolve()
    if any(c in str(resolved) for c in splits):
        raise ConfigError(
            f"{what} must not contain {' or '.join(map(repr, splits))}, nor may a folder above it",
            got=resolved,
            fix="choose another folder, or call one by another name",
        )
    return resolved


def _import_file(path: Path) -> Any:
    """Executes a Python file as a module; its package's root is importable meanwhile."""
    root = path.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    # The name is the user's path, so that two files called expert.py never share a module.
    spec = importlib.util.spec_from_file_location(
        f"_experiment_{path.stem}_{abs(hash(path))}", path
    )
    if spec is None or spec.loader is None:
        raise ConfigError("Not a Python file", got=path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(root))
    # Dataclasses look their module up while the file runs.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        del sys.modules[spec.name]
        raise ConfigError("The experiment file does not import", got=error, where=path) from error
    finally:
        sys.path.remove(str(root))
    return module


def load_run_config(reference: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads "experiments/x.py:arg" and applies `--config.a.b=value` items."""
    config = load_function(reference, "get_config")()
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    for path, text in split_overrides(overrides):
        values = _replace(values, path.split("."), text, "config")
    return from_dict(RunConfig, values)


def split_overrides(items: Iterable[str]) -> list[tuple[str, str]]:
    """Turns `--config.a.b=1` and `--config.a.b 1` into ("a.b", "1") pairs.

    Raises:
      ConfigError: an item that is not an override, or one without a value.
    """
    out, items = [], list(items)
    while items:
        item = items.pop(0)
        if not item.startswith(PREFIX):
            raise ConfigError(
                "No such argument",
                got=item,
                expected="--config.KEY=VALUE, or an option listed by --help",
            )
        key, equals, value = item[len(PREFIX) :].partition("=")
        if not equals:
            if not items:
                raise ConfigError("An override has no value", got=item)
            value = items.pop(0)
        out.append((key, value))
    return out


def _replace(node: Any, path: list[str], text: str, where: str) -> Any:
    """A copy of the nested `node` in which the value at `path` is `text`, read as the old type."""
    if not path:
        return parse_value(text, node)
    key, rest = path[0], path[1:]
    here = f"{where}.{key}"
    if isinstance(node, Mapping):
        if key not in node:
            raise ConfigError(
                "Unknown configuration key", got=key, where=where, fix=nearest(key, node)
            )
        return {**node, key: _replace(node[key], rest, text, here)}
    if isinstance(node, list | tuple):
        if not key.isdecimal() or int(key) >= len(node):
            raise ConfigError(
                "No such item", got=key, expected=f"0 to {len(node) - 1}", where=where
            )
        return tuple(
            _replace(v, rest, text, here) if i == int(key) else v for i, v in enumerate(node)
        )
    raise ConfigError("This key holds a value and has no keys below it", got=key, where=where)


def parse_value(text: str, like: Any) -> Any:
    """Reads `text` as a Python literal, or as it stands where the value replaced is a string.

    Whether the type fits is for `typed.from_dict` to say, which knows the declared one.
    """
    if isinstance(like, str):
        return text
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

# SPDX-License-Identifier: Apache-2.0
"""Dataclasses from nested mappings, such as JSON: every key is known, every value has its type."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from flexolmo_jax.errors import ConfigError, nearest

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Builds the dataclass `cls` from a nested mapping, refusing unknown keys and wrong types.

    Raises:
      ConfigError: names the key path, what was given and the nearest valid key.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(
                "Unknown configuration key", got=key, where=where, fix=nearest(key, fields)
            )
    kwargs = {k: _convert(hints[k], v, f"{where}.{k}") for k, v in values.items()}
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in kwargs:
            raise ConfigError("A configuration key is missing", where=f"{where}.{name}")
    return cls(**kwargs)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or a ConfigError."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [a for a in typing.get_args(hint) if a is not type(None)]
        return _convert(inner, value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping) or hasattr(value, "items"):
            return from_dict(hint, dict(value.items()), where)
    elif origin is tuple:
        inner = typing.get_args(hint)[0]
        if isinstance(value, list | tuple):
            return tuple(_convert(inner, v, f"{where}[{i}]") for i, v in enumerate(value))
    elif origin is Mapping:
        inner = typing.get_args(hint)[1]
        if isinstance(value, Mapping):
            return {k: _convert(inner, v, f"{where}.{k}") for k, v in value.items()}
    elif origin is Literal:
        if value in typing.get_args(hint):
            return value
        raise ConfigError(
            "Not one of the allowed values",
            got=value,
            where=where,
            fix=nearest(str(value), [str(a) for a in typing.get_args(hint)]),
        )
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError("Wrong type", got=f"{value!r}", expected=name, where=where)

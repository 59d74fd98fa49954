# SPDX-License-Identifier: Apache-2.0
"""What a back end must be told about its cluster; from the plan, a file and the command line."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import ConfigError, nearest
from flexolmo_jax.jobs.plan import Job, Plan

# Values become arguments, labels and lines of scripts. What they may look like is narrow, so that
# none can be read as an option or as two values.
LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
WORD = r"[A-Za-z0-9_][A-Za-z0-9_.:@/,+=-]*"
NUMBER = r"[0-9]{1,6}"
LINE = r"[^-\s\x00-\x1f\x7f][^\x00-\x1f\x7f]*"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a back end: what it is, what it may look like, and its default.

    `default=None` makes it one that must be given.
    """

    what: str
    pattern: str
    default: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of a launch: by name, or by "owner.name" for the jobs of one owner."""

    known: Mapping[str, Setting]
    values: Mapping[str, str]

    def get(self, job: Job, name: str) -> str:
        """The value for one job; "" if it was not given and has no default."""
        for key in (f"{job.owner}.{name}", name):
            if key in self.values:
                return self.values[key]
        return self.known[name].default or ""


def resolve(
    backend: str, known: Mapping[str, Setting], plan: Plan, *sources: Mapping[str, str]
) -> Settings:
    """Joins the settings of the plan and of `sources`, the later ones winning.

    Raises:
      ConfigError: unknown names, or values of another form.
    """
    given = {k: v for source in sources for k, v in source.items()}
    # A plan may hold the settings of several back ends; what is typed is for this one.
    own = {k: v for k, v in plan.settings.items() if k.rpartition(".")[2] in known}
    owners = {j.owner for j in plan.jobs if j.owner}
    for key in given:
        owner, _, name = key.rpartition(".")
        if name not in known:
            raise ConfigError(
                f"Back end {backend} has no such setting", got=name, fix=nearest(name, known)
            )
        if owner and owner not in owners:
            fix = nearest(owner, owners)
            raise ConfigError("The plan has no such owner", got=owner, where=key, fix=fix)
    values = {**own, **given}
    for key, value in values.items():
        setting = known[key.rpartition(".")[2]]
        if not re.fullmatch(setting.pattern, value):
            raise ConfigError(
                f"Not a value of the setting {key}", got=repr(value), expected=setting.what
            )
    return Settings(known, values)


def require(backend: str, settings: Settings, needed: Iterable[tuple[Job, str]]) -> None:
    """Refuses a launch that lacks settings, naming all of them at once.

    Args:
      needed: jobs with the names of settings that they cannot do without.

    Raises:
      ConfigError: settings are missing.
    """
    missing: dict[str, list[str]] = {}
    for job, name in needed:
        if not settings.get(job, name):
            missing.setdefault(name, []).append(job.name)
    if not missing:
        return
    names = [f"{n} ({settings.known[n].what}; for {_some(j)})" for n, j in missing.items()]
    options = " ".join(f"--set {n}=..." for n in missing)
    raise ConfigError(
        f"Back end {backend} lacks {len(missing)} setting(s) of the cluster",
        got="nothing for " + ", ".join(names),
        fix=f"give {options}, or a file with --cluster, or `settings` in the plan",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def from_options(items: Iterable[str]) -> dict[str, str]:
    """Reads `--set name=value` items.

    Raises:
      ConfigError: an item without "=" or a name given twice.
    """
    out: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name or name in out:
            fault = "is given twice" if name in out else "is not NAME=VALUE"
            raise ConfigError(f"A setting {fault}", got=item, where="--set")
        out[name] = value
    return out


def from_file(path: Path) -> dict[str, str]:
    """Reads a YAML file: names to values, and under `owners` the same for each owner.

    Raises:
      ConfigError: not such a file.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError("Not a YAML file of settings", got=first, where=path) from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError("Not a YAML file of settings", got=type(content).__name__, where=path)
    owners = content.pop("owners", {})
    if not isinstance(owners, dict) or not all(isinstance(v, dict) for v in owners.values()):
        raise ConfigError("`owners` is not a table of tables", where=path)
    out = _texts(content, "", path)
    for owner, values in owners.items():
        out.update(_texts(values, f"{owner}.", path))
    return out


def _texts(values: Mapping[Any, Any], prefix: str, path: Path) -> dict[str, str]:
    out = {}
    for name, value in values.items():
        # A word such as `no` or 1e3 is not what was typed any more.
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ConfigError(
                "A setting is not a text",
                got=f"{prefix}{name}: {value!r}",
                where=path,
                fix="put quotes around it",
            )
        out[f"{prefix}{name}"] = str(value)
    return out

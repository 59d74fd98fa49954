# SPDX-License-Identifier: Apache-2.0
"""Which texts are URLs of object storage, and which are paths of this machine."""

import os
import re
from pathlib import Path

from flexolmo_jax.errors import ConfigError, nearest

SCHEMES = ("gs", "s3")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# What pathlib makes of a URL: it takes the empty part between the slashes out.
_FOLDED = re.compile(rf"({'|'.join(SCHEMES)}):/([^/].*)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_KEY_PART = re.compile(r"[A-Za-z0-9_.@=+,()-][A-Za-z0-9_.@=+,() -]{0,254}")


def as_url(path: str | os.PathLike[str]) -> str | None:
    """The URL in its one spelling (no slash at the end), or None for a local path.

    Raises:
      ConfigError: a scheme, bucket or key that cannot be used.
    """
    text = os.fspath(path)
    found = _URL.fullmatch(text) or _FOLDED.fullmatch(text)
    if found is None:
        return None
    scheme, rest = found.groups()
    if scheme not in SCHEMES:
        raise ConfigError(
            "This kind of URL is not supported",
            got=f"{scheme}://",
            expected=" or ".join(f"{s}://BUCKET/PATH" for s in SCHEMES),
            fix=nearest(scheme, SCHEMES),
        )
    bucket, _, key = rest.partition("/")
    if "@" in bucket:  # Not repeated: what stands before it is probably a secret.
        raise ConfigError(
            "A URL must not hold credentials",
            fix="set them in the environment (docs/storage.md) and name only bucket and path",
        )
    parts = key.rstrip("/").split("/") if key.rstrip("/") else []
    wrong = [p for p in parts if not _KEY_PART.fullmatch(p) or p in (".", "..")]
    if not _BUCKET.fullmatch(bucket) or wrong:
        raise ConfigError(
            "Not a usable URL of object storage",
            got=repr(text),
            expected=f"{scheme}://BUCKET/PATH, the path without empty or dotted parts",
        )
    return "/".join((f"{scheme}://{bucket}", *parts))


def location(text: str) -> str | Path:
    """An option's value: a URL as text, anything else as a path (for argparse).

    Raises:
      ConfigError: see `as_url`.
    """
    return as_url(text) or Path(text)


def split(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and key of what `as_url` returned."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


def child(path: str | Path, *names: str) -> str | Path:
    """What lies below a URL or a local path."""
    url = as_url(path)
    return Path(path, *names) if url is None else "/".join((url, *names))

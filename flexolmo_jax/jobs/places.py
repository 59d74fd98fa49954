# SPDX-License-Identifier: Apache-2.0
"""Where things lie: paths and URLs as plain text, compared without touching a disk or a network."""

import re
from pathlib import Path
from urllib.parse import unquote

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)")


def is_url(path: str) -> bool:
    """Whether a path is the URL of an object rather than a file of this machine."""
    return URL.match(plain(path)) is not None


def plain(text: str) -> str:
    """`text` with every other spelling of a path in it undone: escapes, doubled slashes, dots."""
    for _ in range(3):
        text = unquote(text)
    # One slash is what is left of a URL that was taken for a path; storage reads it as a URL.
    text = re.sub(r"(?i)\b(gs|s3):/(?=[^/])", r"\1://", text)
    text = re.sub(r"(?<![:/])/{2,}", "/", text)
    text = re.sub(r"/(?:\./)+", "/", text)
    shorter = text
    while shorter is not None:
        text, shorter = shorter, _without_one_parent(shorter)
    return text


def _without_one_parent(text: str) -> str | None:
    """`text` without its first "/x/..", or None; the host of a URL has no parent."""
    found = re.search(r"(?<!/)/(?!\.\.)[^/,=+:\s]+/\.\.(?=[/,=+:\s]|$)", text)
    return text[: found.start()] + text[found.end() :] if found else None


def is_inside(path: str, folder: str) -> bool:
    """Whether `path` lies in `folder`; both are URLs, or both are paths of this machine."""
    if not folder or is_url(path) != is_url(folder):
        return False
    if is_url(path):
        path = plain(path)
        return path.startswith(plain(folder).rstrip("/") + "/") and "/../" not in f"{path}/"
    return Path(folder).resolve() in Path(path).resolve().parents


def mentions(text: str, path: str) -> bool:
    """Whether `text` contains the path itself, not merely a longer name that starts with it."""
    text, path = plain(text), plain(path).rstrip("/")
    if is_url(path):
        text, path = text.casefold(), path.casefold()
    return re.search(re.escape(path) + r"(?![A-Za-z0-9_.-])", text) is not None


def mentions_bucket(text: str, bucket: str) -> bool:
    """Whether `text` names a bucket under any scheme or endpoint, or a cluster's directory."""
    url = URL.match(bucket)
    if url is None:
        return mentions(text, bucket)
    name = re.escape(url[2].casefold())
    # Its own URL, or below an endpoint: https://HOST/name and https://name.s3.HOST.
    pattern = rf"//(?:[^/\s,+=]*/)?{name}(?![a-z0-9_-]|\.(?!s3|storage))"
    text = plain(text).casefold()
    return re.search(pattern, text) is not None or text == url[2].casefold()

# SPDX-License-Identifier: Apache-2.0
"""One client for s3:// and gs://: list, read by range, write, delete; faults as named errors.

obstore rather than fsspec's drivers: one package of 6 MB without dependencies (s3fs and gcsfs bring
some forty), with byte ranges, parts, conditional writes and bounded retries for both kinds of
store. Credentials come from the environment and are never shown: of a server's answer, an error
repeats the status and the error code only.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flexolmo_jax.errors import ConfigError, DataError, FlexOlmoError, MachineError
from flexolmo_jax.storage import urls

PART = 16 << 20
THREADS = 8
# With pauses up to four seconds, and together no longer than twenty.
RETRIES = 12
# A client is made anew when one of these changes; none of their values is ever shown.
_ENVIRONMENT = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_REGION")
_ENVIRONMENT += ("AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_SKIP_SIGNATURE")
_ENVIRONMENT += ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST")
_NETWORK = ("error sending request", "connect", "timed out", "timeout", "dns", "connection")
_METADATA = ("169.254.", "metadata.google.internal")
_DENIED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_DENIED += ("ExpiredToken", "InvalidToken", "AuthorizationHeaderMalformed")
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, or the role of this machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the service account of this machine",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One object of a listing; `etag` changes whenever its content does."""

    size: int
    etag: str | None


@functools.lru_cache(maxsize=64)
def _open(scheme: str, bucket: str, _process: int, _environment: tuple[str | None, ...]) -> Any:
    try:
        from obstore.store import GCSStore, S3Store
    except ModuleNotFoundError as e:
        raise ConfigError(
            "Reading and writing object storage needs a package that is not installed",
            got=e.name,
            fix="pip install 'flexolmo-jax[cloud]'",
        ) from e
    seconds = datetime.timedelta
    backoff = {"init_backoff": seconds(milliseconds=200), "max_backoff": seconds(seconds=4)}
    options: Any = {
        # No answer within seconds is told; a part that is being carried has its minutes.
        "retry_config": {
            "max_retries": RETRIES,
            "retry_timeout": seconds(seconds=20),
            "backoff": {**backoff, "base": 2},
        },
        "client_options": {"connect_timeout": "5s", "timeout": "180s"},
    }
    endpoint = _endpoint(scheme)
    if endpoint.startswith("http://"):
        options["client_options"]["allow_http"] = True
    if scheme == "s3":
        return S3Store(bucket, **options)
    if endpoint:
        # An emulator asks for no credentials; this is how a key file says so.
        key = {"gcs_base_url": endpoint, "disable_oauth": True}
        key |= {"client_email": "", "private_key": "", "private_key_id": ""}
        return GCSStore(bucket, config={"service_account_key": json.dumps(key)}, **options)
    return GCSStore(bucket, **options)


def _endpoint(scheme: str) -> str:
    """Another server than the vendor's, from the environment."""
    if scheme == "s3":
        return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    host = os.environ.get("STORAGE_EMULATOR_HOST", "")
    return host if not host or "://" in host else f"http://{host}"


def _store(url: str) -> tuple[Any, str]:
    """The client of the URL's bucket, and the key in it."""
    scheme, bucket, key = urls.split(url)
    environment = tuple(os.environ.get(name) for name in _ENVIRONMENT)
    # A forked process must not use its parent's connections.
    return _open(scheme, bucket, os.getpid(), environment), key


@contextlib.contextmanager
def _faults(url: str) -> Iterator[None]:
    """Turns what the client raises into named errors."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as e:
        # Without the cause: its text repeats what the server said, which can hold a key's id.
        raise _named(url, e) from None


def _named(url: str, error: Exception) -> FlexOlmoError:
    text, kind = str(error), type(error).__name__
    scheme, bucket, _ = urls.split(url)
    code = re.search(r"<Code>(\w{1,64})</Code>", text)
    status = re.search(r"status code: (\d{3})", text)
    got = " ".join(m.group(1) for m in (status, code) if m) or kind
    low = text.lower()
    if code and code.group(1) == "NoSuchBucket":
        return ConfigError("There is no such bucket", got=f"{scheme}://{bucket}", where=url)
    if isinstance(error, FileNotFoundError):
        return ConfigError("There is no such object", where=url)
    if any(address in low for address in _METADATA):
        fix = f"set {_CREDENTIALS[scheme]} (docs/storage.md)"
        return ConfigError("There are no credentials for the object store", where=url, fix=fix)
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or any(d in got for d in _DENIED):
        fix = f"check {_CREDENTIALS[scheme]} (docs/storage.md), and what it may do there"
        return ConfigError("The object store refuses access", got=got, where=url, fix=fix)
    if kind == "PreconditionError":
        return DataError("The object was changed while it was being read", where=url)
    if not status and any(word in low for word in _NETWORK):
        host = urlsplit(_endpoint(scheme)).hostname if _endpoint(scheme) else "the vendor's server"
        return MachineError(
            "The object store cannot be reached",
            got=f"no answer from {host}",
            where=url,
            fix="check the network and the endpoint in the environment, then run the same again",
        )
    return MachineError("The object store failed", got=got, where=url)


def list_objects(url: str) -> dict[str, Entry]:
    """Path below `url` to entry, of every object there; empty where there is nothing.

    Raises:
      ConfigError: no such bucket, no access.
      MachineError: no answer.
    """
    store, key = _store(url)
    prefix = key + "/" if key else ""
    found = {}
    with _faults(url):
        for page in store.list(prefix or None, chunk_size=1000):
            for item in page:
                name = item["path"].removeprefix(prefix)
                found[name] = Entry(item["size"], item["e_tag"])
    return found


def read(url: str, limit: int | None = None) -> bytes | None:
    """An object as a whole, or None where there is none.

    Raises:
      DataError: it is larger than `limit` bytes.
    """
    store, key = _store(url)
    with _faults(url):
        try:
            answer = store.get(key)
        except FileNotFoundError as e:
            if "NoSuchBucket" in str(e):
                raise
            return None
        size = answer.meta["size"]
        if limit is not None and size > limit:
            raise DataError("The object is too large", got=size, expected=limit, where=url)
        return bytes(answer.bytes())


def read_range(url: str, start: int, stop: int, etag: str | None = None) -> bytes:
    """Bytes `start` to `stop` of an object.

    Args:
      etag: refuse another version than this one.
    """
    store, key = _store(url)
    options: Any = {"range": (start, stop)}
    if etag is not None:
        options["if_match"] = etag
    with _faults(url):
        data = bytes(store.get(key, options=options).bytes())
    if len(data) != stop - start:
        message = "The object is shorter than expected"
        raise DataError(message, got=start + len(data), expected=stop, where=url)
    return data


def read_into(url: str, start: int, out: memoryview, etag: str | None = None) -> None:
    """Fills memory with the bytes of an object from `start` on, several parts at once."""

    def fill(at: int) -> None:
        stop = min(at + PART, len(out))
        out[at:stop] = read_range(url, start + at, start + stop, etag)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for job in [pool.submit(fill, at) for at in range(0, len(out), PART)]:
            job.result()


def stream(url: str, size: int, etag: str | None = None) -> Iterator[bytes]:
    """An object's bytes in order, in parts; the next ones are fetched meanwhile."""
    starts = range(0, size, PART)
    with concurrent.futures.ThreadPoolExecutor(min(4, max(1, len(starts)))) as pool:
        jobs: list[concurrent.futures.Future[bytes]] = []
        for start in starts:
            jobs.append(pool.submit(read_range, url, start, min(start + PART, size), etag))
            if len(jobs) == 4:
                yield jobs.pop(0).result()
        for job in jobs:
            yield job.result()


def write(url: str, data: Any, *, create: bool = False) -> bool:
    """Writes an object at once; large ones travel in parts.

    Args:
      data: bytes, an array's memory, or a path.
      create: write only where there is none; False is returned where there is one.
    """
    store, key = _store(url)
    with _faults(url):
        if not create:
            store.put(key, data, chunk_size=PART, max_concurrency=4)
            return True
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            store.put(key, data, mode="create")
        except (AlreadyExistsError, PreconditionError):
            return False
    return True


def write_files(folder: Path, url: str, names: Collection[str]) -> None:
    """Writes files below `folder` as objects below `url`, several at once."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for job in [pool.submit(write, f"{url}/{name}", folder / name) for name in names]:
            job.result()


def delete(url: str, names: Collection[str]) -> None:
    """Deletes objects below `url`; one that is gone already is no fault."""
    store, key = _store(url)
    with _faults(url), contextlib.suppress(FileNotFoundError):
        store.delete([f"{key}/{name}" if key else name for name in names])


def list_top(url: str) -> tuple[dict[str, Entry], list[str]]:
    """Objects directly below `url`, and the names under which more lie."""
    store, key = _store(url)
    prefix = key + "/" if key else ""
    with _faults(url):
        found = store.list_with_delimiter(prefix or None)
    objects = {
        o["path"].removeprefix(prefix): Entry(o["size"], o["e_tag"]) for o in found["objects"]
    }
    return objects, [p.removeprefix(prefix).rstrip("/") for p in found["common_prefixes"]]


def delete_all(url: str) -> None:
    """Deletes every object below `url`."""
    names = list(list_objects(url))
    for start in range(0, len(names), 1000):
        delete(url, names[start : start + 1000])

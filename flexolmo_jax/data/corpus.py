# SPDX-License-Identifier: Apache-2.0
"""Text of any size -> token shards: staged input by input, assembled shard by shard.

`prepare.prepare` holds a text in memory and shuffles it; here nothing larger than a piece or a
shard is held, the work can be spread by Apache Beam, and an interrupted run goes on. Both read,
clean, split, tokenize and write by the same functions.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flexolmo_jax.data import assembly, corpora, places, shards, staging, textfiles, tokenize
from flexolmo_jax.data.assembly import Job
from flexolmo_jax.data.staging import Options, Work
from flexolmo_jax.data.verify_shards import LENGTHS, SIDECAR
from flexolmo_jax.errors import ConfigError, DataError, MachineError, nearest
from flexolmo_jax.files import require_space
from flexolmo_jax.storage import client, urls
from flexolmo_jax.storage.output import require_free
from flexolmo_jax.tree import canonical_json, file_digest, json_digest

Progress = Callable[[str], None]
# Text per shard, where their number is not given.
_SHARD_BYTES = 64 << 20
# What a stage was begun for.
_NOTE = "asked.json"


class Engine(Protocol):
    """What carries out the two halves: this process, or a Beam runner."""

    def read(self, works: Sequence[Work], options: Options, stage: str) -> None:
        """Stages inputs; an input that is refused leaves a stamp that says so."""
        ...

    def write(self, job: Job, pieces: Sequence[str], wanted: Sequence[int]) -> None:
        """Writes the shards that are wanted."""
        ...


class LocalEngine:
    """One process, one input after the other; the tokenizer alone uses all cores."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def read(self, works: Sequence[Work], options: Options, stage: str) -> None:
        """Stages inputs one by one."""
        shown = time.monotonic()
        for number, work in enumerate(works, start=1):
            staging.stage_input(work, options, stage)
            if time.monotonic() - shown > 2:
                shown = time.monotonic()
                self._progress(f"read {number} of {len(works)} inputs")

    def write(self, job: Job, pieces: Sequence[str], wanted: Sequence[int]) -> None:
        """Judges cut by cut, then writes shard by shard; what waits for its turn is on disk."""
        local = None if places.is_url(job.stage) else job.stage
        with tempfile.TemporaryDirectory(prefix="cuts-", dir=local) as folder:
            losers = _Spill(Path(folder) / "losers")
            for name, cut, judge in _comparisons(job.options):
                keys = _Spill(Path(folder) / name)
                for piece in pieces:
                    keys.add(cut(job, piece))
                for number in keys.numbers():
                    losers.add(judge(job, keys.take(number)))
            shown = time.monotonic()
            for done, shard in enumerate(wanted, start=1):
                packed = (assembly.chunk(job, piece, shard) for piece in pieces)
                assembly.write_shard(job, shard, packed, losers.take(shard))
                if time.monotonic() - shown > 2:
                    shown = time.monotonic()
                    self._progress(f"wrote {done} of {len(wanted)} shards")


def _comparisons(options: Options) -> list[tuple[str, Any, Any]]:
    exact = ("exact", assembly.exact_parts, assembly.exact_losers)
    near = ("near", assembly.near_parts, assembly.near_losers)
    return {"none": [], "exact": [exact], "near": [exact, near]}[options.dedup]


class _Spill:
    """Packed rows by number, on disk."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self._folder = folder

    def add(self, items: Iterator[tuple[int, bytes]]) -> None:
        for number, data in items:
            with open(self._folder / str(number), "ab") as f:
                f.write(data)

    def numbers(self) -> list[int]:
        return sorted(int(p.name) for p in self._folder.iterdir())

    def take(self, number: int) -> list[bytes]:
        file = self._folder / str(number)
        return [file.read_bytes()] if file.exists() else []


def prepare_corpus(
    sources: Sequence[str],
    tokenizer: Path | str,
    out: str,
    options: Options,
    engine: Engine,
    *,
    n_shards: int | None = None,
    stage: str | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Writes token shards of corpora, files, folders and objects; returns the sidecar.

    A second call with the same arguments keeps a finished result, or goes on with an unfinished
    one: inputs and shards that are done are not done again.

    Args:
      out: a path or a URL.
      n_shards: files to write; None is one for each 64 MiB of text.
      stage: folder for unfinished work; None is the one of `out`.

    Raises:
      ConfigError: options that make no sense, or `out` or `stage` is of another making.
      AssetError: a corpus is not installed.
      DataError: no text, text that cannot be read, or too many bad rows.
      MachineError: a full disk, a store or a runner that fails.
    """
    _check(options, n_shards)
    out = urls.as_url(out) or str(Path(out).absolute())
    stage = _stage_of(out, stage)
    works = inputs(sources, options.root)
    asked = {"max_bytes": None, "layout": "by id", "shards": n_shards, **options.facts()}
    recipe = {**asked, "text": json_digest(sorted(w.digest for w in works))}
    made = {"source": _label(sources), "split": options.split, "recipe": recipe}
    digest = tokenize.digest(tokenizer)
    noted = {**asked, "tokenizer": digest}
    if (found := _existing(out, made, digest)) is not None:
        if _noted(stage) == noted:  # The last run was stopped before it could tidy up.
            places.remove(stage)
        progress(f"kept {out}: {found['tokens']:,} tokens, verified")
        return found
    if places.is_url(out) and _noted(stage) is None:
        require_free(out, SIDECAR)
    with _held(stage, noted, progress):
        places.write(assembly.tokenizer_place(stage), tokenize.locate(tokenizer).read_bytes())
        stamps = _read(works, options, stage, engine, progress)
        job = _job(works, stamps, options, stage, n_shards, digest, out)
        finished = _write(job, works, stamps, engine, progress)
        facts = {**made, "recipe": {**recipe, "counts": _counts(stamps, finished)}}
        sidecar = _finish(job, finished, facts, tokenizer, out)
    places.remove(stage)
    _report(sidecar, out, progress)
    return sidecar


def _stage_of(out: str, folder: str | None) -> str:
    """A place of its own, as it is removed in the end; the user's folder may hold other things."""
    if folder is None:
        return f"{out}.staged"
    base = urls.as_url(folder) or str(Path(folder).absolute())
    return f"{base}/{out.rpartition('/')[2]}.staged"


def _noted(stage: str) -> Any:
    """The options that a stage was begun with; None if there are none."""
    return json.loads(places.read(f"{stage}/{_NOTE}") or b"null")


def _check(options: Options, n_shards: int | None) -> None:
    for name, got, valid in (
        ("split", options.split, corpora.SPLITS),
        ("dedup", options.dedup, staging.DEDUP),
    ):
        if got not in valid:
            raise ConfigError(f"Unknown {name}", got=got, fix=nearest(got, valid))
    if n_shards is not None and not 1 <= n_shards <= assembly.MAX_SHARDS:
        raise ConfigError("Not a number of shards", got=n_shards, expected="1 to 99,999")
    if not 0 <= options.max_bad_frac < 1:
        raise ConfigError(
            "max_bad_frac is a share of the rows", got=options.max_bad_frac, expected="0 to 1"
        )


def inputs(sources: Sequence[str], root: str | None = None) -> list[Work]:
    """Every input of the sources, with the digest of its content.

    Raises:
      ConfigError: no sources, an unknown one, or a file that is named twice.
    """
    if not sources or len(set(sources)) != len(sources):
        raise ConfigError("Give each source once", got=", ".join(sources) or "none")
    works: list[Work] = []
    for source in sources:
        if corpora.is_domain(source):
            found = corpora.parts(source, root)
            text = [[e.source_id, e.text] for part in staging.PARTS for e in found[part]]
            works.append(Work("corpus", source, source, json_digest(text), 0))
        elif url := urls.as_url(source):
            works += _objects(url)
        else:
            works += _files(source)
    counted = collections.Counter(w.place for w in works)
    if twice := [place for place, n in counted.items() if n > 1]:
        raise ConfigError("A file is named twice", got=twice[0])
    return works


def _files(source: str) -> list[Work]:
    path = Path(source)
    if not path.exists():
        fix = nearest(source, corpora.readers.READERS)
        raise ConfigError("Neither a corpus nor a file or folder", got=source, fix=fix)
    listed = [(file.absolute(), name) for file, name in textfiles.listing(path)]
    # hashlib lets other threads run while it hashes.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(file_digest, [file for file, _ in listed])
        return [
            Work("file", str(file), f"{path.name}/{name}", digest, file.stat().st_size)
            for (file, name), digest in zip(listed, digests, strict=True)
        ]


def _objects(url: str) -> list[Work]:
    """Objects below a URL, or the one that it names; the store's mark stands for the content."""
    base, _, last = url.rpartition("/")
    listed = {f"{url}/{name}": entry for name, entry in client.list_objects(url).items()}
    if not listed and last:
        listed = {f"{base}/{n}": e for n, e in client.list_objects(base).items() if n == last}
    found = {place: e for place, e in sorted(listed.items()) if textfiles.is_text_file(place)}
    if not found:
        raise ConfigError("No text files under this URL", got=url)
    return [
        Work("object", place, place, json_digest([e.etag, e.size]), e.size)
        for place, e in found.items()
    ]


def _label(sources: Sequence[str]) -> str:
    return ",".join(sorted(s.encode("utf-8", "backslashreplace").decode() for s in sources))


def _existing(out: str, made: Mapping[str, Any], digest: str) -> dict[str, Any] | None:
    """The sidecar already in `out` if it is of the same making; None if there is nothing."""
    if places.is_url(out):
        data = places.read(f"{out}/{SIDECAR}")
        if data is None:
            return None
        info = json.loads(data)
    elif not os.path.lexists(out):
        return None
    else:
        info = dict(shards.open_shards(out).info) if shards.is_shard_dir(out) else {}
    recipe = {k: v for k, v in info.get("recipe", {}).items() if k != "counts"}
    before = {**{k: info.get(k) for k in made}, "recipe": recipe}
    if before == made and info["tokenizer_digest"] == digest:
        return info
    raise ConfigError(
        "The output exists and was made from something else",
        where=out,
        fix="remove it or choose another path",
    )


@contextlib.contextmanager
def _held(stage: str, asked: Mapping[str, Any], progress: Progress) -> Iterator[None]:
    """Takes a stage: a new one, or one of the same making that no other process works in."""
    with contextlib.ExitStack() as stack:
        if not places.is_url(stage):
            Path(stage).mkdir(parents=True, exist_ok=True)
            # Beside the stage, so that removing the stage does not free it too early.
            lock = stack.enter_context(open(f"{stage}.lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise ConfigError("Another process prepares this output", where=stage) from e
            # By whoever holds it alone: without the file the next call would not be refused.
            stack.callback(lambda: Path(f"{stage}.lock").unlink(missing_ok=True))
        before = _noted(stage)
        if before is not None and before != asked:
            differ = sorted(k for k in {*before, *asked} if before.get(k) != asked.get(k))
            raise ConfigError(
                "An unfinished preparation with other options is here",
                got=f"other {', '.join(differ)}",
                where=stage,
                fix="repeat its options to finish it, or remove the folder to start over",
            )
        if before is None:
            strange = [n for n in places.sizes(stage) if not n.startswith(_NOTE)]
            if strange:
                raise ConfigError("The folder for unfinished work is in use", where=stage)
            places.write(f"{stage}/{_NOTE}", canonical_json(dict(asked)).encode())
        else:
            progress(f"going on with {stage}")
        yield


def _read(
    works: Sequence[Work], options: Options, stage: str, engine: Engine, progress: Progress
) -> list[dict[str, Any]]:
    """Stages what is not staged yet; the stamps of all inputs.

    Raises:
      ConfigError, DataError, AssetError: the first input that was refused.
      DataError: too many bad rows.
    """
    stamps = [staging.load_stamp(w, options, stage) for w in works]
    todo = [
        w
        for w, stamp in zip(works, stamps, strict=True)
        if stamp is None or staging.fault_of(stamp) is not None
    ]
    size = sum(w.size for w in todo)
    progress(f"reading {len(todo)} of {len(works)} inputs, {size / 1e6:.2f} MB")
    if todo:
        if not places.is_url(stage):
            require_space(Path(stage) / "inputs", size)
        engine.read(todo, options, stage)
    stamps = [staging.load_stamp(w, options, stage) for w in works]
    missing = [w.place for w, stamp in zip(works, stamps, strict=True) if stamp is None]
    if missing:
        raise MachineError("An input was not read", got=missing[0], fix="run the same again")
    found = [stamp for stamp in stamps if stamp is not None]
    faults = [fault for stamp in found if (fault := staging.fault_of(stamp)) is not None]
    if faults:
        if len(faults) > 1:
            progress(f"{len(faults)} inputs cannot be used; the first:")
        raise faults[0]
    _check_bad(found, options)
    return found


def _check_bad(stamps: Sequence[Mapping[str, Any]], options: Options) -> None:
    rows = sum(s["counts"].get("rows", 0) for s in stamps)
    bad = sum(s["counts"].get("bad rows", 0) for s in stamps)
    if bad > options.max_bad_frac * rows:
        first = next(text for s in stamps for text in s["bad"])
        raise DataError(
            "Too many rows cannot be used",
            got=f"{bad} of {rows}",
            expected=f"at most {options.max_bad_frac:.4%}",
            where=f"the first: {first}",
        )


def _job(
    works: Sequence[Work],
    stamps: Sequence[Mapping[str, Any]],
    options: Options,
    stage: str,
    n_shards: int | None,
    tokenizer_digest: str,
    out: str,
) -> Job:
    size = sum(piece["bytes"] for stamp in stamps for piece in stamp["pieces"])
    if size == 0:
        raise DataError(
            "There is no text in this split",
            got=f"{len(works)} inputs ({options.split})",
            fix="give more text, or use the split 'all'",
        )
    n = n_shards or min(assembly.MAX_SHARDS, -(-size // _SHARD_BYTES))
    basis = json_digest([n, tokenizer_digest, sorted(str(s["made"]) for s in stamps)])
    # Object stores have no rename: there shards are written where they stay, the sidecar last.
    finished = out if places.is_url(out) else f"{stage}/shards"
    return Job(stage, finished, options, n, basis)


def _write(
    job: Job,
    works: Sequence[Work],
    stamps: Sequence[Mapping[str, Any]],
    engine: Engine,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Writes the shards that are not there yet; the stamps of all."""
    pieces = [
        f"{work.folder}/{number:05}"
        for work, stamp in zip(works, stamps, strict=True)
        for number in range(len(stamp["pieces"]))
    ]
    numbers = range(job.n_shards)
    todo = [k for k in numbers if assembly.load_shard(job, k) is None]
    size = sum(piece["bytes"] for stamp in stamps for piece in stamp["pieces"])
    progress(f"writing {len(todo)} of {job.n_shards} shards, {size / 1e6:.2f} MB of text")
    if todo:
        engine.write(job, pieces, todo)
    finished = [assembly.load_shard(job, k) for k in numbers]
    if None in finished:
        raise MachineError(
            "A shard was not written", got=f"no. {finished.index(None)}", fix="run the same again"
        )
    return [stamp for stamp in finished if stamp is not None]


def _counts(
    stamps: Sequence[Mapping[str, Any]], finished: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Rows read, documents kept, and why the others went."""
    read: collections.Counter[str] = collections.Counter()
    dropped: collections.Counter[str] = collections.Counter()
    for stamp in stamps:
        read.update(stamp["counts"])
    for stamp in finished:
        dropped.update(stamp["dropped"])
    rows, others, kept = (read.pop(k, 0) for k in ("rows", "other splits", "kept so far"))
    kept -= dropped.total()
    return {
        "rows": rows,
        "documents": kept,
        "other_splits": others,
        "dropped": dict(sorted((read + dropped).items())),
    }


def _finish(
    job: Job, finished: Sequence[dict[str, Any]], facts: dict[str, Any], tokenizer: Any, out: str
) -> dict[str, Any]:
    """Puts the shards and the sidecar in their place, all at once."""
    loaded = tokenize.load(tokenizer)
    found = {k: assembly.file_facts(job, k, stamp) for k, stamp in enumerate(finished)}
    files = {shards.file_name(k): f for k, f in found.items() if f is not None}
    if not files:
        raise DataError("There is no text in this split", got=f"all dropped ({job.options.split})")
    facts |= {
        "text_bytes": sum(stamp.get("text_bytes", 0) for stamp in finished),
        "vocab_size": tokenize.vocab_size(loaded),
        "tokenizer_digest": tokenize.digest(tokenizer),
        "eos_id": tokenize.eos_id(loaded),
    }
    is_url = places.is_url(out)
    parent = None if is_url else Path(out).parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.rpartition('/')[2]}.", dir=parent))
    try:
        for name in () if is_url else files:
            places.fetch(f"{job.finished}/{name}", work / name)
        sidecar = shards.write_sidecar(work, facts, files)
        if is_url:
            _publish(work, out, set(files))
        else:
            work.chmod(0o755)
            os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return sidecar


def _publish(work: Path, out: str, names: set[str]) -> None:
    """Writes what makes the shards under a URL valid, after removing those of an earlier try."""
    own = {shards.file_name(k) for k in range(assembly.MAX_SHARDS)}
    stale = [n for n in places.sizes(out) if n in own and n not in names]
    if stale:
        client.delete(out, stale)
    places.put(work / LENGTHS, f"{out}/{LENGTHS}")
    if not client.write(f"{out}/{SIDECAR}", (work / SIDECAR).read_bytes(), create=True):
        raise ConfigError("Another writer finished this output first", where=out)


def _report(sidecar: Mapping[str, Any], out: str, progress: Progress) -> None:
    counts = sidecar["recipe"]["counts"]
    for reason, number in sorted(counts["dropped"].items(), key=lambda item: -item[1]):
        progress(f"dropped {number:,}: {reason}")
    progress(
        f"wrote {out}: {sidecar['documents']:,} of {counts['rows']:,} documents, "
        f"{sidecar['tokens']:,} tokens in {len(sidecar['files'])} shards"
    )

# SPDX-License-Identifier: Apache-2.0
"""Text -> token shards, and text -> tokenizer."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from flexolmo_jax.data import corpora, tokenize
from flexolmo_jax.data.beam import BeamEngine
from flexolmo_jax.data.corpora import Document, Split
from flexolmo_jax.data.corpus import Engine, LocalEngine, prepare_corpus
from flexolmo_jax.data.filters import parse as parse_filters
from flexolmo_jax.data.shards import is_shard_dir, open_shards, write_shards
from flexolmo_jax.data.staging import Options
from flexolmo_jax.errors import ConfigError, DataError
from flexolmo_jax.storage import urls
from flexolmo_jax.tree import json_digest

Progress = Callable[[str], None]
_BATCH_BYTES = 1 << 20


def _silent(line: str) -> None:
    del line


def collect(
    sources: Sequence[str],
    split: Split = "train",
    *,
    max_bytes: int | None = None,
    seed: int = 0,
    root: Path | str | None = None,
    progress: Progress = _silent,
) -> list[Document]:
    """Documents of one or more corpora or paths; `max_bytes` holds for each of them.

    Raises:
      ConfigError: no sources, one named twice, or an unknown one.
      AssetError, DataError: see `corpora.read`.
    """
    if not sources or len(set(sources)) != len(sources):
        raise ConfigError("Give each source once", got=", ".join(sources) or "none")
    out = []
    for source in sources:
        found = corpora.read(source, split, max_bytes=max_bytes, seed=seed, root=root)
        size = sum(len(d.text.encode()) for d in found)
        progress(f"read {source} ({split}): {len(found):,} documents, {size / 1e6:.2f} MB")
        label = Path(source).name if len(sources) > 1 else ""
        out += [Document(d.text, f"{label}/{d.source_id}" if label else d.source_id) for d in found]
    return out


def train_tokenizer(
    documents: Sequence[Document], vocab_size: int, out: Path | str, *, progress: Progress = _silent
) -> str:
    """Trains byte-level BPE on documents, writes tokenizer.json, and returns its digest.

    An existing file is never replaced: shards and models name a tokenizer by its digest.

    Raises:
      ConfigError: the file exists, or the vocabulary is too small.
      DataError: too little text.
    """
    out = Path(out)
    out = out if out.suffix == ".json" else out / "tokenizer.json"
    if out.exists():
        raise ConfigError("The tokenizer exists", where=out, fix="remove it or choose another path")
    began = time.perf_counter()
    trained = tokenize.train((d.text for d in documents), vocab_size)
    progress(f"trained {vocab_size:,} tokens in {time.perf_counter() - began:.1f} s -> {out}")
    return tokenize.save(trained, out)


def prepare(
    source: str | Sequence[str] | Sequence[Document],
    tokenizer: Path | str,
    out: Path | str,
    *,
    split: Split = "train",
    max_bytes: int | None = None,
    seed: int = 0,
    root: Path | str | None = None,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Writes token shards of a corpus, of files, or of given documents; returns the sidecar.

    Documents are stored in an order drawn from `seed`. A second call with the same arguments
    verifies and returns what is there.

    Args:
      source: names of corpora and paths, or documents (then `split`, `max_bytes`, `root` are
        facts for the sidecar alone).
      tokenizer: a tokenizer.json, a folder that holds one, or `dolma2`.
      max_bytes: UTF-8 bytes of text taken from each source at most.

    Raises:
      ConfigError: an unknown source, or `out` holds something else.
      AssetError: a corpus is not installed.
      DataError: no text, or files, shards or a tokenizer that cannot be used.
      MachineError: the disk is full.
    """
    names, documents = _source(source)
    if documents is None:
        documents = collect(
            names, split, max_bytes=max_bytes, seed=seed, root=root, progress=progress
        )
    label = ",".join(names)
    if not any(d.text for d in documents):
        raise DataError(
            "There is no text in this split",
            got=f"{label or 'documents'} ({split})",
            fix="give more text, or use the split 'all'",
        )
    # The text itself is part of the recipe: a changed file or corpus must not pass for this one.
    recipe = {
        "max_bytes": max_bytes,
        "seed": seed,
        "text": json_digest([[d.source_id, d.text] for d in documents]),
    }
    found = _existing(Path(out), label, split, recipe, tokenize.digest(tokenizer))
    if found is not None:
        progress(f"kept {out}: {found['tokens']:,} tokens, verified")
        return found
    order = np.random.default_rng([seed, len(documents)]).permutation(len(documents))
    ordered = [documents[i] for i in order if documents[i].text]
    facts = {"source": label, "split": split, "recipe": recipe}
    sidecar = _write(out, tokenizer, ordered, facts, progress)
    progress(f"wrote {out}: {sidecar['documents']:,} documents, {sidecar['tokens']:,} tokens")
    return sidecar


def _write(
    out: Path | str,
    tokenizer: Path | str,
    documents: Sequence[Document],
    facts: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    loaded = tokenize.load(tokenizer)
    return write_shards(
        out,
        _encoded(loaded, documents, progress),
        vocab_size=tokenize.vocab_size(loaded),
        tokenizer_digest=tokenize.digest(tokenizer),
        eos_id=tokenize.eos_id(loaded),
        text_bytes=sum(len(d.text.encode()) for d in documents),
        **facts,
    )


def _source(
    source: str | Sequence[str] | Sequence[Document],
) -> tuple[list[str], Sequence[Document] | None]:
    items = [source] if isinstance(source, str | Path) else list(source)
    if items and all(isinstance(item, Document) for item in items):
        return [], items
    if all(isinstance(item, str | Path) for item in items):
        return [str(item) for item in items], None
    raise ConfigError("Sources are either names and paths, or documents, not both")


def _existing(
    out: Path, label: str, split: str, recipe: dict[str, Any], digest: str
) -> dict[str, Any] | None:
    """The sidecar already in `out` if it is of the same making; None if there is nothing."""
    if not out.exists():
        return None
    if is_shard_dir(out):
        info = dict(open_shards(out).info)
        made = (info["source"], info["split"], info["recipe"], info["tokenizer_digest"])
        if made == (label, split, recipe, digest):
            return info
    raise ConfigError(
        "The output exists and was made from something else",
        where=out,
        fix="remove it or choose another path",
    )


def _encoded(
    tokenizer: tokenizers.Tokenizer, documents: Sequence[Document], progress: Progress
) -> Iterator[np.ndarray]:
    """Token ids per document, encoded in batches of about a megabyte on all cores."""
    began, done, tokens, shown = time.perf_counter(), 0, 0, 0.0
    total = sum(len(d.text) for d in documents)
    batch: list[str] = []
    size = 0
    for number, document in enumerate(documents, start=1):
        batch.append(document.text)
        size += len(document.text)
        if size < _BATCH_BYTES and number < len(documents):
            continue
        for ids in tokenize.encode_batch(tokenizer, batch):
            tokens += len(ids)
            yield ids
        done, batch, size = done + size, [], 0
        elapsed = time.perf_counter() - began
        if elapsed - shown > 2 or number == len(documents):
            shown = elapsed
            rate = tokens / max(elapsed, 1e-9)
            progress(f"tokenizing {100 * done // total} %: {tokens:,} tokens, {rate:,.0f} tokens/s")


def prepare_large(
    sources: Sequence[str],
    tokenizer: Path | str,
    out: str,
    *,
    split: Split = "train",
    seed: int = 0,
    dedup: str = "near",
    filters: Sequence[str] = (),
    max_bad_frac: float = 0.0,
    root: Path | str | None = None,
    runner: str = "local",
    workers: int = 1,
    runner_options: Sequence[str] = (),
    n_shards: int | None = None,
    stage: str | None = None,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Writes token shards of text of any size (see `corpus.prepare_corpus`); returns the sidecar.

    Args:
      filters: as `filters.parse` takes them.
      runner: `local`, or one of `beam.RUNNERS`.
      runner_options: for the Beam runner, as "KEY=VALUE".

    Raises:
      ConfigError: options that make no sense or do not belong together.
    """
    options = Options(
        split=split,
        seed=seed,
        dedup=dedup,
        filters=parse_filters(filters),
        max_bad_frac=max_bad_frac,
        root=None if root is None else str(root),
    )
    if runner != "local":
        engine: Engine = BeamEngine(runner, workers, runner_options)
    elif workers == 1 and not runner_options:
        engine = LocalEngine(progress)
    else:
        raise ConfigError("Workers and options of a runner need one", fix="give --runner direct")
    return prepare_corpus(
        sources,
        tokenizer,
        str(out),
        options,
        engine,
        n_shards=n_shards,
        stage=stage,
        progress=progress,
    )


def prepare_command(
    sources: Sequence[str],
    tokenizer: str,
    out: str | None,
    *,
    train_vocab: int | None = None,
    split: Split = "train",
    max_bytes: int | None = None,
    seed: int = 0,
    corpus: Mapping[str, Any] | None = None,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """What `flexolmo prepare` does: train a tokenizer if asked to, write shards if asked to.

    Args:
      corpus: arguments of `prepare_large`; None is to prepare in memory.

    Raises:
      ConfigError: neither is asked for; and all that `train_tokenizer` and `prepare` raise.
    """
    if out is None and train_vocab is None:
        raise ConfigError("Nothing to do", fix="give --out DIR, or --train-tokenizer VOCAB")
    result: dict[str, Any] = {}
    if corpus is None and any(urls.as_url(place) for place in (*sources, out or "")):
        corpus = {}  # object storage is read and written by that way alone
    if train_vocab is not None:
        documents = collect(sources, split, max_bytes=max_bytes, seed=seed)
        train_tokenizer(documents, train_vocab, tokenizer, progress=progress)
    if out is not None and corpus is not None:
        result["out"] = str(out)
        if max_bytes is not None:
            raise ConfigError(
                "max_bytes is for text that is held in memory",
                fix="give fewer files, or leave the options for text of any size away",
            )
        result["shards"] = prepare_large(
            sources, tokenizer, out, split=split, seed=seed, progress=progress, **corpus
        )
    elif out is not None:
        result["out"] = str(out)
        result["shards"] = prepare(
            sources,
            tokenizer,
            out,
            split=split,
            max_bytes=max_bytes,
            seed=seed,
            progress=progress,
        )
    result["digests"] = {"tokenizer": tokenize.digest(tokenizer)}
    return result

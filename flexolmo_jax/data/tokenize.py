# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE tokenizers: train, load, encode, and the bytes that each token stands for."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from flexolmo_jax import assets
from flexolmo_jax.errors import ConfigError, DataError
from flexolmo_jax.storage import cache, urls
from flexolmo_jax.tree import file_digest

EOS = "<|endoftext|>"
# What ends a document in the tokenizers of others, the most certain first.
ENDS = (EOS, "<|end_of_text|>", "</s>")
PAD = "<|pad|>"

# Words with one leading space or symbol, numbers by at most three digits, runs of symbols, blanks.
_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains byte-level BPE; the last two ids are `<|endoftext|>` and `<|pad|>`.

    Equal texts in equal order give an equal tokenizer.

    Raises:
      ConfigError: no room for the 256 bytes and the two special tokens.
      DataError: too little text for `vocab_size` tokens.
    """
    if vocab_size < 258:
        raise ConfigError("The vocabulary is too small", got=vocab_size, expected="at least 258")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([EOS, PAD])
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            "Too little text to train the tokenizer",
            got=f"{tokenizer.get_vocab_size()} tokens",
            expected=f"{vocab_size} tokens",
            fix="give more text or ask for a smaller vocabulary",
        )
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, path: Path | str) -> str:
    """Writes tokenizer.json atomically and returns its digest."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(partial, path)
    return file_digest(path)


def locate(tokenizer: Path | str) -> Path:
    """The tokenizer.json meant by a path, a folder that holds one, or the name `dolma2`.

    Raises:
      DataError: there is no such file.
      AssetError: dolma2 is not installed.
    """
    if str(tokenizer) == "dolma2":
        return assets.asset_path("dolma2")
    url = urls.as_url(tokenizer)
    if url is not None:
        url = url if url.endswith(".json") else f"{url}/tokenizer.json"
        path = cache.single(url) or Path(url)
    else:
        path = Path(tokenizer)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            "There is no tokenizer here",
            where=path,
            fix="give a tokenizer.json, a model directory, or dolma2; or train one",
        )
    return path


def load(tokenizer: Path | str) -> tokenizers.Tokenizer:
    """Loads a tokenizer that turns special-token strings inside text into ordinary tokens.

    Text that spells `<|endoftext|>` must not be able to end a document.

    Raises:
      DataError: no such file, not a tokenizer, not byte-level, or no token ends a document.
    """
    path = locate(tokenizer)
    return parse(path.read_bytes(), path)


def parse(content: bytes, where: Path | str) -> tokenizers.Tokenizer:
    """The tokenizer of a file's content, as `load` returns it."""
    try:
        loaded = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as e:  # The library raises no narrower class for a file it cannot parse.
        raise DataError("Not a tokenizer file", got=str(e), where=where) from e
    loaded.encode_special_tokens = True
    loaded.no_padding()
    loaded.no_truncation()
    token_byte_lengths(loaded)
    eos_id(loaded)
    return loaded


def digest(tokenizer: Path | str) -> str:
    """Digest of the tokenizer file, by which shards, models and slices name it."""
    return file_digest(locate(tokenizer))


def eos_id(tokenizer: tokenizers.Tokenizer) -> int:
    """Id of the token that ends every document: the first of `ENDS` that is a special token.

    An ordinary token of that name could be spelled by a text.

    Raises:
      DataError: the tokenizer has none.
    """
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special}
    for token in ENDS:
        if token in special:
            return special[token]
    raise DataError("The tokenizer has no end-of-document token", expected=" or ".join(ENDS))


def pad_id(tokenizer: tokenizers.Tokenizer) -> int:
    """Id that fills unused positions: `<|pad|>`, or the end-of-document token without one."""
    found = tokenizer.token_to_id(PAD)
    return eos_id(tokenizer) if found is None else found


def vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the largest id, special tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_byte_lengths(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """UTF-8 bytes of text that each id stands for; 0 for special tokens and unused ids.

    Exact for byte-level BPE: over a document the lengths add up to its size in bytes, so nats per
    token become bits per byte without decoding.

    Shapes: int32[V].

    Raises:
      DataError: a token that is not a run of byte symbols, so its length is not known.
    """
    symbols = set(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.get_added_tokens_decoder()
    lengths = np.zeros(vocab_size(tokenizer), np.int32)
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id in added:
            known = added[token_id]
            lengths[token_id] = 0 if known.special else len(known.content.encode())
        elif symbols.issuperset(token):
            lengths[token_id] = len(token)
        else:
            raise DataError(
                "The tokenizer is not byte-level",
                got=f"token {token_id} is {token!r}",
                expected="byte-level BPE (as GPT-2, dolma2 and the tokenizers trained here)",
            )
    return lengths


def encode_batch(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, end: bool = True
) -> list[np.ndarray]:
    """Token ids of each text, int32; `end` appends the token that ends every stored document.

    A prompt that is to be continued is encoded with `end=False`.
    """
    tail = [eos_id(tokenizer)] if end else []
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(item.ids + tail, np.int32) for item in encoded]

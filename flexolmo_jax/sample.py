# SPDX-License-Identifier: Apache-2.0
"""Generation with a KV cache: a batch of prompts, an allowed set per row, tokens per expert."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import model, tree
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.layers import NEG_INF

# From so many new tokens on, a step that copies no weights (half the time of one that does, on CPU)
# makes up for its compilation: 8 seconds for 30 layers.
SPLIT_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How to sample.

    Attributes:
      max_new_tokens: tokens to generate at most.
      temperature: 0 takes the most likely token.
      top_p: sample from the smallest set of tokens whose probability reaches this.
      eos_id: ends a row; -1 for none.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    eos_id: int = -1

    def __post_init__(self) -> None:
        if self.max_new_tokens <= 0 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                "Sampling needs max_new_tokens > 0, temperature >= 0 and 0 < top_p <= 1", got=self
            )


@dataclasses.dataclass(frozen=True)
class Generation:
    """Result of one prompt.

    Attributes:
      ids: generated ids, end of document excluded.
      tokens_per_slot: (token, layer) pairs that each slot served, over prompt and answer,
        divided by the number of layers.
    """

    ids: list[int]
    tokens_per_slot: np.ndarray


def generate(
    config: ModelConfig,
    run: model.Runtime,
    shared: tree.Tree,
    groups: Sequence[tree.Tree],
    prompts: Sequence[Sequence[int]],
    *,
    allowed_BE: np.ndarray | None = None,
    n_active: int | None = None,
    sampling: SampleConfig = SampleConfig(),
    key: jax.Array | None = None,
    width: int = 0,
) -> list[Generation]:
    """Continues every prompt; row i uses only the slots that `allowed_BE[i]` allows.

    Args:
      width: pad the prompts to at least this many tokens; calls of one shape share one program.

    Raises:
      ConfigError: an empty prompt, an id outside the vocabulary, a prompt that leaves no room, or
        sampling without a key.
    """
    _check(config, prompts, sampling, key)
    B, n_slots = len(prompts), sum(g["w_gate"].shape[1] for g in groups)
    if allowed_BE is None:
        allowed_BE = np.ones((B, n_slots), bool)
    width = max(width, *map(len, prompts))
    tokens, segments = np.zeros((B, width), np.int32), np.zeros((B, width), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        segments[i, : len(prompt)] = 1
    cache = model.init_cache(
        config.replace(n_slots=n_slots), B, width + sampling.max_new_tokens, run.compute_dtype
    )
    ids_BT, load_BLE = _run(
        config,
        run,
        sampling,
        n_active,
        shared,
        tuple(groups),
        jnp.asarray(tokens),
        jnp.asarray(segments),
        jnp.asarray(allowed_BE),
        cache,
        jax.random.key(0) if key is None else key,
    )
    out = []
    for row, load_LE in zip(np.asarray(ids_BT).tolist(), np.asarray(load_BLE), strict=True):
        end = row.index(sampling.eos_id) if sampling.eos_id in row else len(row)
        out.append(Generation(row[:end], load_LE.sum(0) / config.n_layers))
    return out


def _check(config, prompts, sampling: SampleConfig, key) -> None:
    if sampling.temperature > 0 and key is None:
        raise ConfigError("Sampling at a temperature needs a random key")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError("A prompt holds no tokens", where=f"prompt {i}")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ConfigError(
                "A prompt holds an id outside the vocabulary",
                got=next(t for t in prompt if not 0 <= t < config.vocab_size),
                expected=f"0..{config.vocab_size - 1}",
                where=f"prompt {i}",
            )
        if len(prompt) + sampling.max_new_tokens > config.max_len:
            raise ConfigError(
                "Prompt and answer are longer than the model's context",
                got=f"{len(prompt)} + {sampling.max_new_tokens} tokens",
                expected=f"at most {config.max_len}",
                where=f"prompt {i}",
                fix="shorten the prompt or ask for fewer tokens",
            )


def splits(run: model.Runtime, sampling: SampleConfig) -> bool:
    """Whether decoding lays every matrix apart first."""
    if run.decode == "auto":
        return sampling.max_new_tokens >= SPLIT_TOKENS
    return run.decode == "split"


def advance(
    config: ModelConfig,
    run: model.Runtime,
    n_active: int | None,
    shared: tree.Tree,
    groups: Sequence[tree.Tree],
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    allowed_BE: jax.Array,
    cache: model.Cache,
) -> tuple[jax.Array, jax.Array, model.Cache]:
    """The next tokens of every row beside its cache: a whole prompt, or one token.

    Returns:
      logits [B, V] after each row's last token, tokens that each slot served [B, L, E], the cache.
    """
    out = model.forward(
        config,
        run,
        shared,
        groups,
        tokens_BT,
        segments_BT=segments_BT,
        allowed_BE=allowed_BE,
        n_active=n_active,
        cache=cache,
    )
    assert out.cache is not None
    served = (out.combine_LBTE > 0) & (segments_BT > 0)[None, ..., None]
    # The last real token of each row speaks next; padding stands behind it.
    last_B = jnp.maximum(jnp.sum(segments_BT > 0, axis=1) - 1, 0)
    hidden_BD = jnp.take_along_axis(out.hidden_BTD, last_B[:, None, None], axis=1)
    logits_BV = model.unembed(config, shared, hidden_BD, groups)[:, 0]
    return logits_BV, jnp.sum(served, axis=2).swapaxes(0, 1), out.cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(config, run, sampling, n_active, shared, groups, tokens, segments, allowed_BE, cache, key):
    """Prefill, then one token at a time until all rows have ended."""

    logits_BV, load_BLE, cache = advance(
        config, run, n_active, shared, groups, tokens, segments, allowed_BE, cache
    )
    if splits(run, sampling):
        shared, groups, cache = model.split_layers(shared, groups, cache, run.compute_dtype)
        run = dataclasses.replace(run, dispatch="used")
    B, n = tokens.shape[0], sampling.max_new_tokens
    ids_BT = jnp.full((B, n), max(sampling.eos_id, 0), jnp.int32)

    def going(carry):
        i, _, _, _, ended_B, _ = carry
        return (i < n) & ~jnp.all(ended_B)

    def body(carry):
        i, logits_BV, ids_BT, cache, ended_B, load_BLE = carry
        next_B = _pick(sampling, logits_BV, jax.random.fold_in(key, i))
        next_B = jnp.where(ended_B, max(sampling.eos_id, 0), next_B)
        ended_B = ended_B | (next_B == sampling.eos_id)
        ids_BT = ids_BT.at[:, i].set(next_B)
        live_B1 = (~ended_B)[:, None].astype(jnp.int32)
        logits_BV, load, cache = advance(
            config, run, n_active, shared, groups, next_B[:, None], live_B1, allowed_BE, cache
        )
        return i + 1, logits_BV, ids_BT, cache, ended_B, load_BLE + load

    start = (0, logits_BV, ids_BT, cache, jnp.zeros(B, bool), load_BLE)
    _, _, ids_BT, _, _, load_BLE = jax.lax.while_loop(going, body, start)
    return ids_BT, load_BLE


def _pick(sampling: SampleConfig, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
    """Next token of each row: greedy, or sampled from the nucleus; rows do not share randomness."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1:
        descending = -jnp.sort(-logits_BV, axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        floor_B = jnp.min(jnp.where(before < sampling.top_p, descending, jnp.inf), axis=-1)
        logits_BV = jnp.where(logits_BV >= floor_B[:, None], logits_BV, NEG_INF)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits_BV.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits_BV).astype(jnp.int32)

# SPDX-License-Identifier: Apache-2.0
"""What a model loses without its expert biases, for formats that have no place for them."""

import functools
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import inference, loss, model, tree
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data import loader, prepare
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.evaluate import LN2


def measure(
    path: Path | str,
    *,
    data: Path | str | None = None,
    text: Path | str | None = None,
    allow: Collection[str] | None = None,
    deny: Collection[str] | None = None,
    n_active: int | None = None,
    n_rows: int = 0,
    batch_rows: int = 8,
) -> dict[str, Any]:
    """Bits per byte with and without biases, and how often other experts become active.

    Holds the whole model in memory, as evaluation does.

    Args:
      data: token shards, as `flexolmo eval` takes them; text: a text file. Exactly one of the two.
      allow, deny: the experts in question.
      n_rows: rows to score per domain, spread over the text; 0 is all.

    Returns:
      Per domain: with, without (bits per byte), bytes, tokens, changed_tokens (share of tokens for
      which the set of active experts changes in some layer) and changed_choices (share of tokens
      and layers).

    Raises:
      ConfigError: no text to measure on, or two.
    """
    if (data is None) == (text is None):
        raise ConfigError(
            "Dropping biases needs a text to measure the cost on",
            got="--data and --text" if data else "neither --data nor --text",
            fix="give --data DIR (token shards) or --text FILE",
        )
    m = inference.open_model(path, allow=allow, deny=deny)
    out = {}
    with tempfile.TemporaryDirectory() as scratch:
        if text is not None:
            folder = Path(scratch) / "text"
            prepare.prepare([str(text)], m.info.tokenizer_path, folder, split="all")
            sets = {"text": folder}
        else:
            assert data is not None
            sets = inference.heldout_sets(data)
        for domain, where in sets.items():
            batches = loader.heldout_batches(
                where,
                batch_rows,
                seq_len=min(m.config.max_len, inference.ROW_TOKENS),
                n_rows=n_rows,
                tokenizer_digest=m.info.tokenizer_digest,
                vocab_size=m.config.vocab_size,
            )
            out[domain] = _compare(m, batches, n_active)
    return out


def _compare(
    m: inference.OpenModel, batches: Iterator[Mapping[str, np.ndarray]], n_active: int | None
) -> dict[str, Any]:
    allowed = m.allowed()
    free = {**m.group, "bias": jnp.full_like(m.group["bias"], model.NO_BIAS)}
    nats, size, tokens, changed, choices = np.zeros(2), 0, 0, 0, 0
    for batch in batches:
        mask = batch["loss_mask"]
        arrays = {k: jnp.asarray(batch[k]) for k in ("tokens", "targets", "segments")}
        rows = jnp.asarray(np.tile(allowed, (len(mask), 1)))
        args = (m.config, m.runtime, m.shared, (m.group, free), arrays, rows)
        nll_2BT, moved_LBT = jax.device_get(_score_both(*args, n_active=n_active))
        nats += nll_2BT[:, mask].sum(-1, dtype=np.float64)
        size += int(m.token_bytes[batch["targets"]][mask].sum())
        tokens += int(mask.sum())
        changed += int(moved_LBT.any(0)[mask].sum())
        choices += int(moved_LBT[:, mask].sum())
    bits = nats / LN2 / max(size, 1)
    return {
        "with": float(bits[0]),
        "without": float(bits[1]),
        "bytes": size,
        "tokens": tokens,
        "changed_tokens": changed / max(tokens, 1),
        "changed_choices": choices / max(tokens * m.config.n_layers, 1),
    }


@functools.partial(jax.jit, static_argnames=("config", "run", "n_active"))
def _score_both(
    config: ModelConfig,
    run: model.Runtime,
    shared: tree.Tree,
    groups: tuple[tree.Tree, tree.Tree],
    batch: Mapping[str, jax.Array],
    allowed_BE: jax.Array,
    n_active: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Nats per token [2, B, T] under each group, and whether their active sets differ [L, B, T]."""
    nats, active = [], []
    for group in groups:
        out = model.forward(
            config,
            run,
            shared,
            (group,),
            batch["tokens"],
            segments_BT=batch["segments"],
            allowed_BE=allowed_BE,
            n_active=n_active,
        )
        nll_BT, _ = loss.token_losses(
            config, run, shared, out.hidden_BTD, batch["targets"], (group,)
        )
        nats.append(nll_BT)
        active.append(out.combine_LBTE > 0)
    return jnp.stack(nats), jnp.any(active[0] != active[1], axis=-1)

# SPDX-License-Identifier: Apache-2.0
"""Losses of models on the held-out and the tuning text of every domain, position by position."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import evaluate, loss, model, tree
from flexolmo_jax.config import ExecConfig, ModelConfig
from flexolmo_jax.data import loader
from flexolmo_jax.study.mixing import Text

EXEC = ExecConfig(compute_dtype="float32")
BATCH_ROWS = 8
Losses = dict[str, np.ndarray]


def read_text(path: Path, token_bytes: np.ndarray, *, rows: int, seq_len: int) -> Text:
    """Rows of a token-shard directory, spread evenly over it; their number is a multiple of 8."""
    batches = list(loader.heldout_batches(path, BATCH_ROWS, seq_len=seq_len, n_rows=rows))
    parts = {k: np.concatenate([b[k] for b in batches]) for k in ("tokens", "targets", "segments")}
    mask = np.concatenate([b["loss_mask"] for b in batches])
    size = np.where(mask, token_bytes[parts["targets"]], 0)
    return Text(mask=mask, size=size, **parts)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Text of every domain, and how models are run over it.

    Attributes:
      config: of the anchor; a mixture's slots and router are given with it.
      texts: domain to rows.
    """

    config: ModelConfig
    texts: Mapping[str, Text]

    def losses(
        self,
        shared: tree.Tree,
        group: tree.Tree,
        *,
        config: ModelConfig | None = None,
        n_active: int = 1,
        allowed: Sequence[bool] | None = None,
        domains: Sequence[str] | None = None,
    ) -> Losses:
        """Domain to negative log-likelihoods [R, T] in nats, 0 where nothing is predicted.

        Args:
          group: experts with a slot axis; a dense model has one slot.
          config: with the router that judges; the anchor's by default.
          allowed: by slot; all by default.
        """
        n_slots = group["bias"].shape[1]
        n_active = min(n_active, n_slots)
        config = (config or self.config).replace(n_slots=n_slots, n_active=n_active)
        run = model.Runtime.resolve(EXEC, n_slots, n_active)
        allowed_E = np.ones(n_slots, bool) if allowed is None else np.asarray(allowed, bool)
        rows = jnp.asarray(np.tile(allowed_E, (BATCH_ROWS, 1)))
        weights = jax.device_put((shared, (group,)))

        def score(batch: Mapping[str, np.ndarray]) -> jax.Array:
            return evaluate.score_batch(config, run, *weights, batch, rows, n_active)["nll_BT"]

        return self._over_texts(score, domains)

    def soup_losses(
        self, models: tree.Tree, weights: Mapping[str, np.ndarray], domains: Sequence[str]
    ) -> Losses:
        """Losses where every row has a soup of its own.

        Args:
          models: dense models {"shared", "experts"}, every leaf with a leading axis [M, ...].
          weights: domain to the share of each model in the soup of each row, [R, M].
        """
        config = self.config.replace(n_slots=1, n_active=1)
        run, placed = model.Runtime.resolve(EXEC, 1, 1), jax.device_put(models)
        out = {}
        for domain in domains:
            share = weights[domain].astype(np.float32)
            parts = [
                _soup_batch(config, run, placed, batch, share[i : i + BATCH_ROWS])
                for i, batch in _batches(self.texts[domain])
            ]
            out[domain] = np.concatenate(jax.device_get(parts))
        return out

    def scores(self, losses: Losses) -> dict[str, evaluate.Score]:
        """Domain to its score."""
        return {domain: self.texts[domain].score(nll) for domain, nll in losses.items()}

    def bits(self, losses: Losses) -> dict[str, float]:
        """Domain to bits per byte."""
        return {domain: s.bits_per_byte for domain, s in self.scores(losses).items()}

    def gap_stderr(self, mine: Losses, other: Losses) -> float | None:
        """Standard error over pieces of text of how far apart two means over all domains are.

        Both methods are scored on the same pieces, which is taken into account; seeds are not.
        None where a domain has one piece.
        """
        errors = []
        a, b = self.scores(mine), self.scores(other)
        for domain in mine:
            gap = (np.asarray(b[domain].nats) - np.asarray(a[domain].nats)) / evaluate.LN2
            errors.append(evaluate.ratio(gap, np.asarray(a[domain].bytes, float))[1])
        if None in errors:
            return None
        return float(np.sqrt(np.sum(np.square(errors))) / len(errors))

    def _over_texts(self, score: Callable[..., jax.Array], domains: Sequence[str] | None) -> Losses:
        found = {
            domain: [score(batch) for _, batch in _batches(self.texts[domain])]
            for domain in (self.texts if domains is None else domains)
        }
        return {domain: np.concatenate(parts) for domain, parts in jax.device_get(found).items()}


def _batches(text: Text):
    """(first row, batch) over a text."""
    for first in range(0, len(text.tokens), BATCH_ROWS):
        rows = slice(first, first + BATCH_ROWS)
        yield (
            first,
            {
                "tokens": text.tokens[rows],
                "targets": text.targets[rows],
                "segments": text.segments[rows],
                "loss_mask": text.mask[rows],
            },
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _soup_batch(config, run, models, batch, share_BM) -> jax.Array:
    """Losses [B, T] of rows, each under its own weighted mean of the models."""

    def one(args):
        row, share_M = args
        params = jax.tree.map(lambda leaf: jnp.tensordot(share_M, leaf, 1), models)
        row = {name: x[None] for name, x in row.items()}
        out = model.forward(
            config,
            run,
            params["shared"],
            (params["experts"],),
            row["tokens"],
            segments_BT=row["segments"],
        )
        nll, _ = loss.token_losses(config, run, params["shared"], out.hidden_BTD, row["targets"])
        return jnp.where(row["loss_mask"], nll, 0.0)[0]

    return jax.lax.map(one, (batch, share_BM))

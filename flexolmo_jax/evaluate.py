# SPDX-License-Identifier: Apache-2.0
"""Bits per byte and routing tables of a model under an allowed set."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import loss, model, placed, tree
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import DataError

LN2 = float(np.log(2.0))


@dataclasses.dataclass
class Score:
    """Sums over the pieces (parts of documents in one row) of a text.

    Attributes:
      nats, bytes: per piece, of the predicted tokens.
      load_LE: tokens for which a slot was active; weight_LE: their summed share of the mixture.
      tokens: predicted tokens.
    """

    nats: list[float] = dataclasses.field(default_factory=list)
    bytes: list[int] = dataclasses.field(default_factory=list)
    load_LE: np.ndarray | None = None
    weight_LE: np.ndarray | None = None
    tokens: int = 0

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: the total over predicted tokens.

        Raises:
          DataError: no token was predicted.
        """
        if not sum(self.bytes):
            raise DataError("The text holds nothing to predict", fix="score more or longer rows")
        return sum(self.nats) / LN2 / sum(self.bytes)

    @property
    def stderr(self) -> float | None:
        """Standard error of `bits_per_byte` over pieces; None if there is one piece."""
        return ratio(np.asarray(self.nats) / LN2, np.asarray(self.bytes, float))[1]

    def summary(self) -> dict[str, Any]:
        """The JSON form that results use."""
        return {
            "value": self.bits_per_byte,
            "stderr": self.stderr,
            "bytes": int(sum(self.bytes)),
            "tokens": self.tokens,
        }


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float | None]:
    """Ratio of two sums and its standard error by the delta method; None for one pair."""
    n, total = len(above), float(np.sum(below))
    value = float(np.sum(above)) / total
    residual = above - value * below
    spread = np.sqrt(n / (n - 1) * np.sum(residual**2)) if n > 1 else None
    return value, None if spread is None else float(spread) / total


@functools.partial(jax.jit, static_argnames=("config", "run", "n_active"))
def score_batch(
    config: ModelConfig,
    run: model.Runtime,
    shared: tree.Tree,
    groups: Sequence[tree.Tree],
    batch: Mapping[str, jax.Array],
    allowed_BE: jax.Array,
    n_active: int | None = None,
) -> dict[str, jax.Array]:
    """Losses and routing of one batch; one compiled program serves every allowed set."""
    out = model.forward(
        config,
        run,
        shared,
        groups,
        batch["tokens"],
        segments_BT=batch["segments"],
        allowed_BE=allowed_BE,
        n_active=n_active,
    )
    nll_BT, _ = loss.token_losses(config, run, shared, out.hidden_BTD, batch["targets"], groups)
    mask_BT = batch["loss_mask"]
    share = out.combine_LBTE / jnp.maximum(jnp.sum(out.combine_LBTE, -1, keepdims=True), 1e-30)
    kept = mask_BT[None, ..., None]
    return {
        "nll_BT": jnp.where(mask_BT, nll_BT, 0.0),
        "load_LE": jnp.sum(kept & (out.combine_LBTE > 0), axis=(1, 2)),
        "weight_LE": jnp.sum(jnp.where(kept, share, 0.0), axis=(1, 2)),
    }


def score_text(
    config: ModelConfig,
    run: model.Runtime,
    shared: tree.Tree,
    groups: Sequence[tree.Tree],
    batches: Iterable[Mapping[str, np.ndarray]],
    token_bytes: np.ndarray,
    *,
    allowed: Sequence[bool] | None = None,
    n_active: int | None = None,
) -> Score:
    """Scores packed rows of text.

    Args:
      token_bytes: bytes of text that each token id stands for.
      allowed: slots that may be used, for all rows; every slot by default.
    """
    n_slots = sum(g["w_gate"].shape[1] for g in groups)
    allowed_E = np.ones(n_slots, bool) if allowed is None else np.asarray(allowed, bool)
    score = Score()
    for batch in batches:
        rows = len(batch["tokens"])
        arrays = {k: batch[k] for k in ("tokens", "targets", "segments", "loss_mask")}
        arrays["allowed"] = np.tile(allowed_E, (rows, 1))
        arrays = placed.whole_batch(arrays, run.mesh) if run.mesh else jax.device_put(arrays)
        allowed_BE = arrays.pop("allowed")
        out = placed.fetch(
            score_batch(config, run, shared, groups, arrays, allowed_BE, n_active=n_active)
        )
        _add(score, batch, out, token_bytes)
    return score


def _add(score: Score, batch: Mapping[str, np.ndarray], out: Mapping, token_bytes: np.ndarray):
    mask = batch["loss_mask"]
    size = np.where(mask, token_bytes[batch["targets"]], 0)
    for row in range(len(mask)):
        for segment in np.unique(batch["segments"][row]):
            piece = (batch["segments"][row] == segment) & mask[row]
            if piece.any():
                score.nats.append(float(out["nll_BT"][row][piece].sum()))
                score.bytes.append(int(size[row][piece].sum()))
    score.tokens += int(mask.sum())
    load, weight = out["load_LE"].astype(np.int64), out["weight_LE"].astype(np.float64)
    score.load_LE = load if score.load_LE is None else score.load_LE + load
    score.weight_LE = weight if score.weight_LE is None else score.weight_LE + weight

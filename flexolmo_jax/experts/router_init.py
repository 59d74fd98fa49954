# SPDX-License-Identifier: Apache-2.0
"""Where router rows start: from document embeddings, or from the anchor's own hidden states.

Source: paper section 3.3.1 (embeddings, the same vector in every layer); the per-layer means of
hidden states are the paper's "public" alternative (its Table 3), made for both sides here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import model, tree
from flexolmo_jax.config import ModelConfig, RouterInitConfig, RunConfig, SourceConfig
from flexolmo_jax.data import loader, shards, tokenize
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.experts import embedders

RANDOM_STD = 0.02
_ROWS = 8


def public_row(config: RunConfig, c: ModelConfig) -> np.ndarray:
    """The public expert's router rows [L, D], set once when the anchor is finished.

    Only the paper's embeddings (and its random control) give the public expert a row: softmax
    depends on differences alone, so the centred methods put it at zero.
    """
    init = config.router_init
    if init.method in ("embedding", "random"):
        return _row(config, c, _public(config.data.sources), seed=config.seed)
    return np.zeros((c.n_layers, c.d_model), np.float32)


def expert_row(config: RunConfig, c: ModelConfig, anchor: tree.Tree) -> np.ndarray:
    """The router rows [L, D] that an expert starts from.

    Args:
      anchor: {"shared", "experts"} of the anchor.

    Raises:
      ConfigError: "hidden_mean" without a public source to centre on.
    """
    init = config.router_init
    own = [s for s in config.data.sources if not s.public]
    if init.method != "hidden_mean":
        # Another seed than the anchor's, or a random row would equal the public one.
        return _row(config, c, own, seed=config.seed + 1)
    public = _public(config.data.sources)
    if not own or not public:
        raise ConfigError(
            "Centred hidden means need text of the owner and public text",
            got=f"{len(own)} own and {len(public)} public source(s)",
            where="config.data.sources",
            fix="add a source with public=True, or use router_init.method=embedding",
        )
    n_rows = -(-init.documents // len(own + public))
    means = [
        np.mean([hidden_mean(c, anchor, s, config.data.seq_len, n_rows) for s in side], axis=0)
        for side in (own, public)
    ]
    return _scaled(means[0] - means[1], init.norm)


def hidden_mean(
    c: ModelConfig, anchor: tree.Tree, source: SourceConfig, seq_len: int, n_rows: int
) -> np.ndarray:
    """Mean router input of every layer [L, D] over `n_rows` rows spread over a source."""
    run = model.Runtime(dispatch="dense")

    @jax.jit
    def total(params, tokens_BT, segments_BT):
        out = model.forward(
            c.replace(n_slots=1, n_active=1),
            run,
            params["shared"],
            (params["experts"],),
            tokens_BT,
            segments_BT=segments_BT,
            keep_residual=True,
        )
        assert out.residual_LBTD is not None  # keep_residual
        kept = (segments_BT > 0)[None, ..., None]
        return jnp.sum(jnp.where(kept, out.residual_LBTD, 0.0), axis=(1, 2))

    batches = loader.heldout_batches(source.path, _ROWS, seq_len=seq_len, n_rows=n_rows)
    sums, tokens = np.zeros((c.n_layers, c.d_model)), 0
    for batch in batches:
        sums += np.asarray(total(anchor, batch["tokens"], batch["segments"]), np.float64)
        tokens += int((batch["segments"] > 0).sum())
    return (sums / max(tokens, 1)).astype(np.float32)


def _public(sources: Sequence[SourceConfig]) -> list[SourceConfig]:
    return [s for s in sources if s.public]


def _row(
    config: RunConfig, c: ModelConfig, sources: Sequence[SourceConfig], seed: int
) -> np.ndarray:
    init = config.router_init
    shape = (c.n_layers, c.d_model)
    if init.method == "zeros":
        return np.zeros(shape, np.float32)
    if init.method == "random":
        rng = np.random.default_rng(seed)
        return _scaled(rng.normal(0.0, RANDOM_STD, shape).astype(np.float32), init.norm)
    if not sources:
        raise ConfigError(
            "A router embedding needs documents",
            where="config.data.sources",
            fix="mark public sources with public=True and give an expert a source of its own",
        )
    vector = embedders.domain_embedding(
        _texts(sources, init, config.tokenizer or f"{config.anchor}/tokenizer.json"),
        embedders.get_embedder(init.embedder),
        init.documents,
        config.seed,
    )
    row_D = embedders.project(vector[None], c.d_model)[0]
    return _scaled(np.tile(row_D, (c.n_layers, 1)).astype(np.float32), init.norm)


def _texts(sources: Sequence[SourceConfig], init: RouterInitConfig, tokenizer: str) -> list[str]:
    """Documents of the sources, evenly spaced, decoded from their tokens."""
    tokens = tokenize.load(tokenizer)
    out = []
    for source in sources:
        opened = shards.open_shards(source.path)
        wanted = min(-(-init.documents // len(sources)), opened.n_documents)
        for i in np.linspace(0, opened.n_documents - 1, wanted).astype(int):
            out.append(tokens.decode(opened.document(int(i)).tolist()))
    return out


def _scaled(rows_LD: np.ndarray, norm: float) -> np.ndarray:
    """Rows at Euclidean norm `norm`, or as they are."""
    if not norm:
        return rows_LD
    length = np.linalg.norm(rows_LD, axis=-1, keepdims=True)
    return (rows_LD * (norm / np.maximum(length, 1e-12))).astype(np.float32)

# SPDX-License-Identifier: Apache-2.0
"""Where router rows start: from document embeddings, or from the anchor's own hidden states.

Source: paper section 3.3.1 (embeddings, the same vector in every layer). Hidden states of the
anchor, made for both sides and per layer, are ours; the paper's Table 3 tries them for the public
side. Nothing here sees another owner's text: a row depends on the owner's text, on public text and
on the anchor alone.

Weights may be NumPy arrays or lie on a mesh, also one of several hosts; rows are then the same bits
on all of them.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax import distributed, evidence, model, placed, router, tree
from flexolmo_jax.config import ModelConfig, RouterInitConfig, RunConfig, SourceConfig
from flexolmo_jax.data import loader, shards, tokenize
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.experts import embedders

RANDOM_STD = 0.02
# Share of the mean variance added to every direction, so that few documents give a stable inverse.
SHRINKAGE = 0.1
# A row starts with logits of at most this size on average: training can still move it.
MAX_MEAN_LOGIT = 6.0
# Weight of the discriminant beside the trained row, and what the effective biases are lowered
# by (nats): chosen on the tuning text of seed 0 (LOG.md).
RECALIBRATION, MARGIN = 0.25, 1.0
# Beside tables of evidence: what is left of a trained row, the margin, and the effective bias that
# training starts from.
BESIDE_EVIDENCE, EVIDENCE_MARGIN, EVIDENCE_BIAS = 0.25, 1.5, -1.0
# Every so many positions are kept: neighbours of a running mean say the same.
STRIDE = 12
KEPT = slice(STRIDE // 2, None, STRIDE)
_ROWS = 8
COMPARES = "A row that reads hidden states compares"
# Tokens of each side that are counted at most, in stretches of about so many, evenly spaced.
COUNTED, STRETCH = 1 << 24, 1 << 16


def resolve(init: RouterInitConfig, c: ModelConfig) -> RouterInitConfig:
    """What "auto" stands for beside an anchor."""
    if init.method != "auto":
        return init
    if c.router.evidence:
        start = math.log(math.expm1(-EVIDENCE_BIAS))
        return dataclasses.replace(init, method="zeros", bias=start, recalibrate=True)
    return dataclasses.replace(init, method="discriminant", recalibrate=True)


def public_row(config: RunConfig, c: ModelConfig) -> np.ndarray:
    """The public expert's router rows [L, D], set once when the anchor is finished.

    Only the paper's embeddings (and its random control) give the public expert a row: softmax
    depends on differences alone, so the centred methods put it at zero.
    """
    init = config.router_init
    if init.method in ("embedding", "random"):
        row_LD = _row(config, c, _public(config.data.sources), seed=config.seed)
        return distributed.array_from_first(row_LD)
    return np.zeros((c.n_layers, c.d_model), np.float32)


def expert_row(config: RunConfig, c: ModelConfig, anchor: tree.Tree) -> np.ndarray:
    """The router rows [L, D] that an expert starts from.

    Args:
      anchor: {"shared", "experts"} of the anchor.

    Raises:
      ConfigError: a method that compares with public text, without a public source.
    """
    return distributed.array_from_first(_expert_row(config, c, anchor))


def _expert_row(config: RunConfig, c: ModelConfig, anchor: tree.Tree) -> np.ndarray:
    init = config.router_init
    own = [s for s in config.data.sources if not s.public]
    if init.method not in ("hidden_mean", "discriminant"):
        # Another seed than the anchor's, or a random row would equal the public one.
        return _row(config, c, own, seed=config.seed + 1)
    one = c.replace(n_slots=1, n_active=1)
    own_LND, public_LND = _both_sides(config, one, anchor["shared"], (anchor["experts"],))
    if init.method == "hidden_mean":
        return _scaled(own_LND.mean(1) - public_LND.mean(1), init.norm)
    rows_LD = _discriminants(own_LND, public_LND)
    size_L1 = np.abs(np.einsum("LND,LD->LN", own_LND, rows_LD)).mean(1, keepdims=True)
    return _scaled(rows_LD * np.minimum(1.0, MAX_MEAN_LOGIT / size_L1), init.norm)


def evidence_table(
    config: RunConfig, c: ModelConfig, parts_PX: np.ndarray | None = None
) -> np.ndarray:
    """What each token, or pair, says of whose text it stands in, [1, 1, X] as a group holds it.

    Args:
      parts_PX: what the anchor says of public text; without it the public sources are counted.

    Raises:
      ConfigError: text of one side only.
    """

    with distributed.together("counting tokens"):
        if parts_PX is None:
            own, public = _sources(config, "A table of evidence compares")
            base_X = evidence.log_share(_counts(public, c))
        else:
            own = [s for s in config.data.sources if not s.public]
            base_X = np.asarray(evidence.public(parts_PX))
        table_X = evidence.table(_counts(own, c), base_X)
    return distributed.array_from_first(table_X[None, None])


def public_parts(config: RunConfig, c: ModelConfig) -> dict[str, np.ndarray]:
    """The shared leaf that tells public corpora apart, [P, X], where the anchor does.

    Set once when the anchor is finished, as the public row is.
    """
    check_parts(config, c)
    if not c.router.evidence_parts:
        return {}
    public = _public(config.data.sources)
    with distributed.together("counting tokens"):
        counts = [_counts([source], c) for source in public]
        made_PX = np.stack([evidence.log_share(count_X) for count_X in counts])
    return {evidence.LEAF: distributed.array_from_first(made_PX.astype(np.float32))}


def check_parts(config: RunConfig, c: ModelConfig) -> None:
    """Refuses an anchor with room for more tables, or fewer, than there are public corpora.

    Raises:
      ConfigError: this.
    """
    public = len(_public(config.data.sources))
    if c.router.evidence_parts not in (0, public):
        raise ConfigError(
            "The anchor tells as many public corpora apart as it is trained on",
            got=f"{public} public source(s), evidence_parts={c.router.evidence_parts}",
            where="config.model.router.evidence_parts",
            fix="set it to the number of sources with public=True, or to 0 if there is only one",
        )


def check_sources(config: RunConfig, c: ModelConfig) -> None:
    """Refuses what the rows of this stage cannot be made of, also those made after training.

    Args:
      config: with `router_init` as `resolve` gives it.
      c: of the anchor.

    Raises:
      ConfigError: text of one side is missing.
      AssetError: the embedder is.
    """
    init, expert = config.router_init, config.stage == "expert"
    own = [s for s in config.data.sources if not s.public]
    if expert or (config.stage == "anchor" and not config.anchor):
        if init.method == "embedding":
            _some(own if expert else _public(config.data.sources))
            embedders.require(init.embedder)
        elif expert and init.method in ("hidden_mean", "discriminant"):
            _sources(config, COMPARES)
    if config.stage in ("expert", "rows") and init.recalibrate and not c.router.evidence:
        _sources(config, COMPARES)


def _some(sources: Sequence[SourceConfig]) -> None:
    if not sources:
        raise ConfigError(
            "A router embedding needs documents",
            where="config.data.sources",
            fix="mark public sources with public=True and give an expert a source of its own",
        )


def _counts(sources: Sequence[SourceConfig], c: ModelConfig) -> np.ndarray:
    """Counts [X] of the entries of a table, by stretches that lie evenly over each source."""
    total_X = np.zeros(evidence.entries(c), np.int64)
    for source in sources:
        opened = shards.open_shards(source.path, vocab_size=c.vocab_size)
        wanted = min(COUNTED // len(sources), opened.n_tokens)
        number = -(-wanted // STRETCH)
        size = -(-wanted // number)
        for start in np.linspace(0, opened.n_tokens - size, number).astype(int):
            total_X += evidence.count(c, opened.tokens(int(start), int(start) + size))
    return total_X


def recalibrate(
    config: RunConfig, c: ModelConfig, shared: tree.Tree, public: tree.Tree, expert: tree.Tree
) -> tree.Tree:
    """A trained expert with router rows and biases that suit a model of many owners.

    Training (language model and label loss) knows the owner's boundary to public text well, but
    says nothing of other owners' text. Without evidence the rows get a part of the discriminant of
    what they now read, which measures every owner with the public ruler: that is what lets rows
    that never met be compared. Both are log odds of "the owner's, not public", made from the same
    two texts alone. Tables of evidence are such odds already; of what a row has learnt on top of
    them a quarter is kept. The biases get a margin, so that text which speaks for nobody stays
    public: several owners together would otherwise outweigh the public expert.

    Args:
      c: the two-slot architecture that the expert was trained in.
      shared, public, expert: the frozen anchor, and the trained group of one slot.
    """
    trained = placed.fetch({name: expert[name] for name in ("router", "bias")})
    if c.router.evidence:
        router_LED, margin = BESIDE_EVIDENCE * trained["router"], EVIDENCE_MARGIN
    else:
        rows_LD = _discriminants(*_both_sides(config, c, shared, (public, expert)))
        router_LED, margin = trained["router"] + RECALIBRATION * rows_LD[:, None], MARGIN
    # Effective biases are -softplus of the raw ones: this is its inverse at the lowered value.
    lowered_LE = np.logaddexp(0.0, trained["bias"].astype(np.float64)) + margin
    bias_LE = lowered_LE + np.log(-np.expm1(-lowered_LE))
    return {
        **expert,
        "router": distributed.array_from_first(router_LED.astype(np.float32)),
        "bias": distributed.array_from_first(bias_LE.astype(np.float32)),
    }


def _both_sides(
    config: RunConfig, c: ModelConfig, shared: tree.Tree, groups: tuple[tree.Tree, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Router inputs [L, N, D] on the owner's text and on public text.

    Raises:
      ConfigError: one of the two is missing.
    """
    own, public = _sources(config, COMPARES)

    def inputs(side: list[SourceConfig]) -> np.ndarray:
        n_rows = -(-config.router_init.documents // len(side))
        seq_len = config.data.seq_len
        return np.concatenate(
            [_inputs(c, shared, groups, s, seq_len, n_rows) for s in side], axis=1
        )

    return inputs(own), inputs(public)


def _sources(config: RunConfig, what: str) -> tuple[list[SourceConfig], list[SourceConfig]]:
    """The owner's sources and the public ones, some of each."""
    own = [s for s in config.data.sources if not s.public]
    public = _public(config.data.sources)
    if not own or not public:
        raise ConfigError(
            f"{what} text of the owner with public text",
            got=f"{len(own)} own and {len(public)} public source(s)",
            where="config.data.sources",
            fix="add a source with public=True; a small weight will do",
        )
    return own, public


def _discriminants(own_LND: np.ndarray, public_LND: np.ndarray) -> np.ndarray:
    """`discriminant` of every layer, [L, D]."""
    pairs = zip(own_LND, public_LND, strict=True)
    return np.stack([discriminant(own, public) for own, public in pairs])


def discriminant(own_ND: np.ndarray, public_ND: np.ndarray) -> np.ndarray:
    """Router row [D] whose logit is the log density ratio of two Gaussians, own against public.

    Both have the covariance of *public* inputs, so the rows of owners who never met are measured
    with one ruler: the softmax over several rows is the posterior of that model, and the largest
    logit belongs to the nearest mean. The intercept is carried by the direction of inputs that is
    most nearly constant, since an expert bias must not be positive.

    Source: linear discriminant analysis.
    """
    own_ND, public_ND = own_ND.astype(np.float64), public_ND.astype(np.float64)
    d_model = own_ND.shape[1]
    own_D, public_D = own_ND.mean(0), public_ND.mean(0)
    covariance = np.cov(public_ND.T)
    covariance += SHRINKAGE * np.trace(covariance) / d_model * np.eye(d_model)
    row_D = np.linalg.solve(covariance, own_D - public_D)
    intercept = -row_D @ (own_D + public_D) / 2
    both_ND = np.concatenate([own_ND, public_ND])
    second = both_ND.T @ both_ND
    second += 1e-3 * np.trace(second) / d_model * np.eye(d_model)
    constant_D = np.linalg.solve(second, both_ND.sum(0))
    return row_D + intercept * constant_D


def _inputs(
    c: ModelConfig,
    shared: tree.Tree,
    groups: tuple[tree.Tree, ...],
    source: SourceConfig,
    seq_len: int,
    n_rows: int,
) -> np.ndarray:
    """Router inputs of a model on a source as the router judges them, [L, N, D] float32."""
    grid = placed.mesh_of(shared)
    pieces = placed.pieces(grid) if grid else 1
    rows = -(-_ROWS // pieces) * pieces
    batches = loader.heldout_batches(
        source.path, rows, seq_len=seq_len, n_rows=n_rows, vocab_size=c.vocab_size
    )
    kept = []
    for batch in batches:
        arrays = {"tokens": batch["tokens"], "segments": batch["segments"]}
        if grid:
            arrays = placed.whole_batch(arrays, grid)
        inputs = placed.fetch(_judged(c, grid, shared, groups, **arrays))
        kept.append(inputs[:, batch["segments"][:, KEPT] > 0])
    return np.concatenate(kept, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _judged(c: ModelConfig, grid: Mesh | None, shared, groups, tokens, segments) -> jax.Array:
    """Router inputs [L, B, T / STRIDE, D], averaged over the document where the router does."""
    residual_LBTD = model.forward(
        c,
        model.Runtime(dispatch="dense", mesh=grid),
        shared,
        groups,
        tokens,
        segments_BT=segments,
        keep_residual=True,
    ).residual_LBTD
    assert residual_LBTD is not None  # keep_residual asks for it
    if c.router.context == "document":
        residual_LBTD = jnp.stack([router.document_mean(x, segments)[0] for x in residual_LBTD])
    kept_LBTD = residual_LBTD[:, :, KEPT]
    if grid is None:
        return kept_LBTD
    return jax.lax.with_sharding_constraint(kept_LBTD, placed.replicated(grid))


def _public(sources: Sequence[SourceConfig]) -> list[SourceConfig]:
    return [s for s in sources if s.public]


def _row(
    config: RunConfig, c: ModelConfig, sources: Sequence[SourceConfig], seed: int
) -> np.ndarray:
    init = config.router_init
    shape = (c.n_layers, c.d_model)
    if init.method == "random":
        rng = np.random.default_rng(seed)
        return _scaled(rng.normal(0.0, RANDOM_STD, shape), init.norm)
    if init.method != "embedding":
        return np.zeros(shape, np.float32)
    _some(sources)
    vector = embedders.domain_embedding(
        _texts(sources, init, tokenize.locate(config.tokenizer or config.anchor)),
        embedders.get_embedder(init.embedder),
        init.documents,
        config.seed,
    )
    row_D = embedders.project(vector[None], c.d_model)[0]
    return _scaled(np.tile(row_D, (c.n_layers, 1)), init.norm)


def _texts(sources: Sequence[SourceConfig], init: RouterInitConfig, tokenizer: Path) -> list[str]:
    """Documents of the sources, evenly spaced, decoded from their tokens."""
    tokens = tokenize.load(tokenizer)
    digest = tree.file_digest(tokenizer)
    out = []
    for source in sources:
        opened = shards.open_shards(source.path, tokenizer_digest=digest)
        wanted = min(-(-init.documents // len(sources)), opened.n_documents)
        for i in np.linspace(0, opened.n_documents - 1, wanted).astype(int):
            out.append(tokens.decode(opened.document(int(i)).tolist()))
    return out


def _scaled(rows_LD: np.ndarray, norm: float) -> np.ndarray:
    """Rows at Euclidean norm `norm`, or as they are."""
    if norm:
        length = np.linalg.norm(rows_LD, axis=-1, keepdims=True)
        rows_LD = rows_LD * (norm / np.maximum(length, 1e-12))
    return rows_LD.astype(np.float32)

# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of continuations, under an allowed set of experts.

Every token that requests share is computed once (see `packing`), the unembedding only where a
continuation is predicted, and one compiled program serves every allowed set. Numbers equal those of
a plain forward pass over context and continuation, up to the rounding of float32.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flexolmo_jax import model, tree
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import ConfigError, DataError
from flexolmo_jax.inference import OpenModel
from flexolmo_jax.mesh import BATCH_AXES
from flexolmo_jax.sharding import constrain
from flexolmo_jax.tasks import packing
from flexolmo_jax.tasks.asked import Request

# Tokens of a batch: enough for matrix products to reach full speed.
BATCH_TOKENS = {"cpu": 2048}
DEVICE_BATCH_TOKENS = 16384
# Tokens of a prefix computed in one step.
PREFIX_STEP = 256
# Logits that exist at once, in numbers.
LOGITS = 1 << 23


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of one computed batch.

    Attributes:
      requests: their numbers.
      logprob: nats, summed over the tokens of each continuation.
      greedy: whether every token of it is the likeliest one.
      done, total: tokens computed so far and in all by this call, to tell how far it is.
    """

    requests: np.ndarray
    logprob: np.ndarray
    greedy: np.ndarray
    done: int
    total: int


@dataclasses.dataclass
class Work:
    """What a set of requests costs.

    Attributes:
      truncated: requests whose context was cut on the left to fit the model.
      plain: tokens that one row per request would compute, without padding.
      computed: tokens that were planned, padding included.
    """

    requests: int = 0
    truncated: int = 0
    plain: int = 0
    computed: int = 0


def loglikelihoods(
    m: OpenModel,
    requests: Sequence[Request],
    *,
    allowed: np.ndarray | None = None,
    n_active: int | None = None,
    batch_tokens: int = 0,
    share: bool = True,
    work: Work | None = None,
) -> list[tuple[float, bool]]:
    """Sum of log-probabilities (nats) of each continuation, and whether greedy decoding gives it.

    Args:
      requests: token ids of context and continuation. A context that does not fit is cut on the
        left; a continuation that alone is longer than the model's context is scored in windows.
      allowed: slots that may be used, bool [n_slots], or [requests, n_slots] for a set per request;
        by default those that were opened.
      n_active: experts per token; the model's own number by default.
      batch_tokens: tokens of a batch, padding included; 0 chooses for the platform.
      share: False computes every request alone (to measure what sharing saves).
      work: is filled with what the requests cost.

    Returns:
      one pair per request, in their order.

    Raises:
      ConfigError: no allowed slot, or a batch size or number of experts that cannot be run.
      DataError: an empty context or continuation, or an id outside the vocabulary.
    """
    logprob, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for batch in scored(
        m,
        requests,
        allowed=allowed,
        n_active=n_active,
        batch_tokens=batch_tokens,
        share=share,
        work=work,
    ):
        logprob[batch.requests] = batch.logprob
        greedy[batch.requests] = batch.greedy
    return list(zip(logprob.tolist(), greedy.tolist(), strict=True))


def scored(
    m: OpenModel,
    requests: Sequence[Request],
    *,
    allowed: np.ndarray | None = None,
    n_active: int | None = None,
    batch_tokens: int = 0,
    share: bool = True,
    done: Collection[int] = (),
    work: Work | None = None,
) -> Iterator[Scored]:
    """Yields the scores of `loglikelihoods` as soon as a batch is computed.

    Args:
      done: requests whose scores are known. A batch of only such requests is left out; every other
        is computed as it would be without, so that a run which resumes gives the same bits.
    """
    allowed_RE = _allowed(m, allowed, len(requests))
    run = _Runner(m, n_active, batch_tokens)
    work = Work() if work is None else work
    work.requests += len(requests)
    sets, which = np.unique(allowed_RE, axis=0, return_inverse=True)
    jobs = []
    for number, allowed_E in enumerate(sets):
        mine = np.flatnonzero(which == number)
        pieces = _windows(m, [requests[i] for i in mine.tolist()], mine, work)
        plan = packing.Plan(
            pieces.tokens,
            pieces.starts,
            batch_tokens=run.batch_tokens,
            multiple=run.multiple,
            share=share,
        )
        work.plain += plan.plain
        work.computed += plan.computed
        jobs.append((allowed_E, pieces, plan))
    known = np.asarray(sorted(done), np.int64)
    # Decided before the first batch, so that `total` is what this call will compute.
    todo = [
        (allowed_E, pieces, plan, specs)
        for allowed_E, pieces, plan in jobs
        if (specs := [s for s in plan.specs if not _all_in(plan, s, pieces, known)])
    ]
    total = sum(s.length * s.n_rows for *_, specs in todo for s in specs)
    computed = 0
    for allowed_E, pieces, plan, specs in todo:
        pending = _Pending(pieces)
        for spec in specs:
            found = pending.add(*run.batch(plan, spec, allowed_E))
            computed += spec.length * spec.n_rows
            yield Scored(*found, done=computed, total=total)


def _all_in(plan: packing.Plan, spec: packing.Spec, pieces: "_Pieces", known: np.ndarray) -> bool:
    return bool(np.isin(pieces.owner[plan.requests(spec)], known).all())


def _allowed(m: OpenModel, allowed: np.ndarray | None, n_requests: int) -> np.ndarray:
    """The allowed set of each request, bool [n_requests, n_slots]."""
    found = np.asarray(m.allowed() if allowed is None else allowed, bool)
    if found.shape[-1] != m.config.n_slots or found.ndim > 2:
        raise ConfigError(
            "An allowed set has one entry per slot",
            got=f"shape {found.shape}",
            expected=f"[{m.config.n_slots}] or [{n_requests}, {m.config.n_slots}]",
        )
    if not found.any(axis=-1).all():
        raise ConfigError("An allowed set is empty", fix="allow at least the public expert")
    return np.broadcast_to(found, (n_requests, m.config.n_slots))


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Requests as the model sees them: one window each, or several for a long continuation."""

    tokens: list[np.ndarray]
    starts: list[int]
    owner: np.ndarray


def _windows(m: OpenModel, requests: Sequence[Request], numbers: np.ndarray, work: Work) -> _Pieces:
    """Cuts requests to the model's context: all of the continuation, what fits of the context."""
    limit, vocab_size = m.config.max_len, m.config.vocab_size
    tokens, starts, owner = [], [], []
    for number, (context, continuation) in zip(numbers, requests, strict=True):
        if not len(context) or not len(continuation):
            raise DataError(
                "A request has an empty context or continuation", where=f"request {number}"
            )
        ids = np.concatenate([np.asarray(context), np.asarray(continuation)]).astype(np.int32)
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise DataError(
                "A request holds an id outside the vocabulary",
                got=int(ids.max() if ids.max() >= vocab_size else ids.min()),
                expected=f"0..{vocab_size - 1}",
                where=f"request {number}",
            )
        first = len(context)
        while first < len(ids):
            end = min(first + limit, len(ids))
            begin = max(0, end - limit - 1)
            work.truncated += begin > 0 and first == len(context)
            tokens.append(ids[begin:end])
            starts.append(first - begin)
            owner.append(number)
            first = end
    return _Pieces(tokens, starts, np.asarray(owner, np.int64))


class _Pending:
    """Adds up the windows of a request that has several; a request is reported when it is whole."""

    def __init__(self, pieces: _Pieces):
        self.owner = pieces.owner
        self.missing = np.bincount(pieces.owner) if len(pieces.owner) else np.zeros(0, int)
        self.logprob = np.zeros(len(self.missing))
        self.greedy = np.ones(len(self.missing), bool)

    def add(
        self, pieces: np.ndarray, logprob: np.ndarray, greedy: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Takes scores of pieces; returns the requests that are now whole, and their scores."""
        requests = self.owner[pieces]
        np.add.at(self.logprob, requests, logprob)
        np.logical_and.at(self.greedy, requests, greedy)
        np.subtract.at(self.missing, requests, 1)
        touched = np.unique(requests)
        whole = touched[self.missing[touched] == 0]
        return whole, self.logprob[whole], self.greedy[whole]


class _Runner:
    """Runs the batches of a plan; keeps the cache of the last prefix."""

    def __init__(self, m: OpenModel, n_active: int | None, batch_tokens: int):
        grid = m.runtime.mesh
        self.m = m
        self.n_active = m.active(n_active)
        self.multiple = 1 if grid is None else int(np.prod([grid.shape[a] for a in BATCH_AXES]))
        if batch_tokens < 0:
            raise ConfigError("The tokens of a batch must be positive", got=batch_tokens)
        chosen = BATCH_TOKENS.get(jax.default_backend(), DEVICE_BATCH_TOKENS)
        self.batch_tokens = batch_tokens or chosen * self.multiple
        # A power of two, so that it divides the rows of every mesh.
        fits = max(16, LOGITS // m.config.vocab_size)
        self.chunk = 2 ** int(np.log2(fits)) * self.multiple
        self.known: tuple[tuple, model.Cache] | None = None

    def batch(
        self, plan: packing.Plan, spec: packing.Spec, allowed_E: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pieces of a batch, their log-probabilities and whether they are greedy."""
        m, built = self.m, plan.build(spec, self.m.config.vocab_size)
        prefix = self._prefix(plan.prefix(spec), allowed_E)
        logprob_QC, greedy_QC = jax.device_get(
            score_rows(
                m.config,
                m.runtime,
                self.n_active,
                min(self.chunk, len(built.arrays["query"])),
                m.shared,
                (m.group,),
                jnp.asarray(allowed_E),
                prefix,
                {name: jnp.asarray(array) for name, array in built.arrays.items()},
                jnp.int32(built.n_queries),
            )
        )
        count = len(built.requests)
        logprob = np.bincount(built.owner, logprob_QC.reshape(-1)[built.slot], minlength=count)
        missed = np.bincount(built.owner, ~greedy_QC.reshape(-1)[built.slot], minlength=count)
        return built.requests, logprob, missed == 0

    def _prefix(self, tokens: np.ndarray, allowed_E: np.ndarray) -> model.Cache:
        """The cache of a prefix, as one row; computed in steps of one shape."""
        key = (tokens.tobytes(), allowed_E.tobytes())
        if self.known is not None and self.known[0] == key:
            return self.known[1]
        m, n = self.m, len(tokens)
        config = m.config.replace(n_slots=m.group["router"].shape[1])
        length = packing.bucket(n, 64) if n else 0
        # Every row computes the same: a mesh needs a row for each of its parts.
        rows = self.multiple if n else 1
        cache = model.init_cache(config, rows, length, m.runtime.compute_dtype)
        for begin in range(0, n, PREFIX_STEP):
            step = tokens[begin : begin + PREFIX_STEP]
            tokens_BT = np.zeros((rows, PREFIX_STEP), np.int32)
            tokens_BT[:, : len(step)] = step
            segments_BT = np.broadcast_to(np.arange(PREFIX_STEP) < len(step), tokens_BT.shape)
            cache = extend(
                m.config,
                m.runtime,
                self.n_active,
                m.shared,
                (m.group,),
                jnp.asarray(allowed_E),
                cache,
                jnp.asarray(tokens_BT),
                jnp.asarray(segments_BT, dtype=jnp.int32),
            )
        cache = cache.first_row()
        if m.runtime.mesh is not None:
            cache = jax.device_put(cache, NamedSharding(m.runtime.mesh, PartitionSpec()))
        self.known = (key, cache)
        return cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def extend(
    config: ModelConfig,
    run: model.Runtime,
    n_active: int,
    shared: tree.Tree,
    groups: Sequence[tree.Tree],
    allowed_E: jax.Array,
    cache: model.Cache,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
) -> model.Cache:
    """The cache after the next tokens of a prefix."""
    out = model.forward(
        config,
        run,
        shared,
        groups,
        tokens_BT,
        segments_BT=segments_BT,
        allowed_BE=jnp.broadcast_to(allowed_E, (tokens_BT.shape[0], *allowed_E.shape)),
        n_active=n_active,
        cache=cache,
    )
    assert out.cache is not None
    return out.cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def score_rows(
    config: ModelConfig,
    run: model.Runtime,
    n_active: int,
    chunk: int,
    shared: tree.Tree,
    groups: Sequence[tree.Tree],
    allowed_E: jax.Array,
    prefix: model.Cache,
    batch: dict[str, jax.Array],
    n_queries: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and greedy flag of the targets of a batch.

    Args:
      chunk: queries whose logits exist at once.
      batch: see `packing.Batch`; one program serves every number of queries.

    Shapes:
      returns [Q, TARGETS] each; what is past `n_queries` means nothing.
    """
    tokens_BT, end_BT = batch["tokens"], batch["end"]
    out = model.forward(
        config,
        run,
        shared,
        groups,
        tokens_BT,
        segments_BT=(end_BT > 0).astype(jnp.int32),
        allowed_BE=jnp.broadcast_to(allowed_E, (tokens_BT.shape[0], *allowed_E.shape)),
        n_active=n_active,
        cache=prefix,
        branch_end_BT=end_BT,
    )
    hidden_MD = out.hidden_BTD.reshape(-1, out.hidden_BTD.shape[-1])
    size = batch["query"].shape[0]

    def step(i, found):
        # The last chunk starts early enough to be whole, and finds some of them once more.
        at = jnp.minimum(i * chunk, size - chunk)
        query = jax.lax.dynamic_slice_in_dim(batch["query"], at, chunk)
        target = jax.lax.dynamic_slice_in_dim(batch["target"], at, chunk)
        hidden_QD = constrain(hidden_MD[query], run.mesh, "batch", "embed")
        logits_QV = model.unembed(config, shared, hidden_QD[:, None], groups)[:, 0]
        norm_Q1 = jax.nn.logsumexp(logits_QV, axis=-1, keepdims=True)
        logprob = jnp.take_along_axis(logits_QV, target, axis=-1) - norm_Q1
        greedy = jnp.argmax(logits_QV, axis=-1)[:, None] == target
        return (
            jax.lax.dynamic_update_slice_in_dim(found[0], logprob, at, 0),
            jax.lax.dynamic_update_slice_in_dim(found[1], greedy, at, 0),
        )

    start = (jnp.zeros(batch["target"].shape, jnp.float32), jnp.zeros(batch["target"].shape, bool))
    return jax.lax.fori_loop(0, -(-n_queries // chunk), step, start)

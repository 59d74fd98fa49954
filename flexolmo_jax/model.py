# SPDX-License-Identifier: Apache-2.0
"""The model: parameters declared in Flax, computed by pure functions over plain nested dicts.

`nnx` declares names, shapes, initial values and logical axes (the only file that imports it);
everything else sees {"shared": …, "experts": …} with layers already stacked. Shared weights are
every leaf without an expert axis; "experts" is one group of slots. `forward` takes the shared tree
and a *tuple* of groups, so that the expert stage can pass a frozen and a trainable group.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flexolmo_jax import adapters, block, evidence, layers, moe, remat, tree
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.runtime import Runtime
from flexolmo_jax.sharding import constrain

# Raw bias whose effective value is exactly 0 in float32, and finite as every leaf must be.
NO_BIAS = -1e4
INIT_STD = 0.02
EXPERT_AXES = {
    "w_gate": ("layer", "expert", "expert_embed", "ffn"),
    "w_up": ("layer", "expert", "expert_embed", "ffn"),
    "w_down": ("layer", "expert", "ffn", "expert_embed"),
    "router": ("layer", "expert", "expert_embed"),
    "bias": ("layer", "expert"),
}


def _param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], fill: float | None = None
):
    """A float32 parameter: a constant, or a normal of std 0.02 cut at three deviations (OLMo 2)."""
    if fill is not None:
        return nnx.Param(jnp.full(shape, fill, jnp.float32), axes=axes)
    value = INIT_STD * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
    return nnx.Param(value, axes=axes)


class Attention(nnx.Module):
    """Attention weights of all layers."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        L, D, N, K, H = c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.d_head
        self.w_q = _param(rngs, (L, D, N, H), ("layer", "embed", "heads", "head_dim"))
        self.w_k = _param(rngs, (L, D, K, H), ("layer", "embed", "kv_heads", "head_dim"))
        self.w_v = _param(rngs, (L, D, K, H), ("layer", "embed", "kv_heads", "head_dim"))
        self.w_o = _param(rngs, (L, N, H, D), ("layer", "heads", "head_dim", "embed"))
        if c.qk_norm != "none":
            heads = (N, K) if c.qk_norm == "full" else (1, 1)
            self.q_norm = _param(rngs, (L, heads[0] * H), ("layer", "norm"), fill=1.0)
            self.k_norm = _param(rngs, (L, heads[1] * H), ("layer", "norm"), fill=1.0)


class Layers(nnx.Module):
    """Shared weights of all layers."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(c, rngs=rngs)
        self.attention_norm = _param(rngs, (c.n_layers, c.d_model), ("layer", "norm"), fill=1.0)
        self.ffn_norm = _param(rngs, (c.n_layers, c.d_model), ("layer", "norm"), fill=1.0)


class Embed(nnx.Module):
    """Token embedding."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = _param(rngs, (c.vocab_size, c.d_model), ("vocab", "embed"))


class Shared(nnx.Module):
    """Every weight without an expert axis."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(c, rngs=rngs)
        self.layers = Layers(c, rngs=rngs)
        self.final_norm = _param(rngs, (c.d_model,), ("norm",), fill=1.0)
        for name, (shape, axes) in evidence.shared_shapes(c).items():
            setattr(self, name, _param(rngs, shape, axes, fill=0.0))
        if not c.tied_embeddings:
            self.unembed = _param(rngs, (c.d_model, c.vocab_size), ("embed", "vocab"))


class Experts(nnx.Module):
    """One group: the FFN of every layer, the router row and the raw bias of each slot."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        L, E, D, F = c.n_layers, c.n_slots, c.d_model, c.d_ffn
        self.w_gate = _param(rngs, (L, E, D, F), EXPERT_AXES["w_gate"])
        self.w_up = _param(rngs, (L, E, D, F), EXPERT_AXES["w_up"])
        self.w_down = _param(rngs, (L, E, F, D), EXPERT_AXES["w_down"])
        self.router = _param(rngs, (L, E, D), EXPERT_AXES["router"], fill=0.0)
        self.bias = _param(rngs, (L, E), EXPERT_AXES["bias"], fill=NO_BIAS)
        for name, (shape, axes) in {**adapters.shapes(c), **evidence.shapes(c)}.items():
            setattr(self, name, _param(rngs, shape, axes, fill=0.0))


class FlexOlmo(nnx.Module):
    """The declaration of a whole model; call it with tokens for logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = Shared(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array, **kwargs: Any) -> jax.Array:
        """Logits [B, T, V] in float32; keyword arguments as in `forward`."""
        params = nnx.to_pure_dict(nnx.state(self))
        run = kwargs.pop("runtime", Runtime(dispatch="dense"))
        out = forward(self.config, run, params["shared"], (params["experts"],), tokens_BT, **kwargs)
        return unembed(self.config, params["shared"], out.hidden_BTD, (params["experts"],))


def abstract_params(config: ModelConfig) -> tree.Tree:
    """Shapes and dtypes of all parameters; makes no arrays."""
    return _declared(config)[0]


def param_axes(config: ModelConfig) -> tree.Tree:
    """Logical axes of every parameter, in the same tree."""
    return _declared(config)[1]


@functools.lru_cache(maxsize=64)
def _declared(config: ModelConfig) -> tuple[tree.Tree, tree.Tree]:
    state = nnx.state(nnx.eval_shape(lambda: FlexOlmo(config, rngs=nnx.Rngs(0))))
    flat = {"/".join(path): leaf for path, leaf in nnx.to_flat_state(state)}
    axes = {name: leaf.get_metadata()["axes"] for name, leaf in flat.items()}
    return nnx.to_pure_dict(state), tree.unflatten(axes)


def init_params(config: ModelConfig, key: jax.Array) -> tree.Tree:
    """Initial float32 parameters; trace it under jit with `out_shardings` to make them in place."""
    return nnx.to_pure_dict(nnx.state(FlexOlmo(config, rngs=nnx.Rngs(params=key))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """State of decoding: one document per row, `length_B` tokens so far.

    Shapes:
      k, v: [L, B, S, K, H], normed and rotated keys; router_sum [L, B, E] and length_B carry what
      the router's rows say of the document, gathered what its tokens do, if they do.
    """

    k: Any
    v: Any
    router_sum: Any
    gathered: evidence.Gathered | None
    length_B: jax.Array

    def after(self, segments_BT: jax.Array, *state: Any) -> "Cache":
        """The state when these tokens have been read: its other fields, and more tokens."""
        return Cache(*state, self.length_B + jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32))

    def first_row(self) -> "Cache":
        """The state of the first document alone."""
        layers_ = (leaf[:, :1] for leaf in (self.k, self.v, self.router_sum))
        gathered = jax.tree.map(lambda leaf: leaf[:1], self.gathered)
        return Cache(*layers_, gathered, self.length_B[:1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What `forward` returns.

    Attributes:
      hidden_BTD: after the final norm, and what experts add to the unembedding makes of it;
        `unembed` turns it into logits.
      router_logits_LBTE: before selection and softmax, expert bias included, float32.
      combine_LBTE: combine weight of every slot, 0 where it is not active.
      residual_LBTD: input of the mixture per layer, only with `keep_residual`.
      drops: what full slots refused, with a leading layer axis; None where nothing can be.
      cache: the next decoding state, if one was given.
    """

    hidden_BTD: jax.Array
    router_logits_LBTE: jax.Array
    combine_LBTE: jax.Array
    residual_LBTD: jax.Array | None = None
    drops: moe.Drops | None = None
    cache: Cache | None = None


def init_cache(config: ModelConfig, rows: int, length: int, dtype: str = "float32") -> Cache:
    """An empty decoding state for `rows` documents of at most `length` tokens."""
    shape = (config.n_layers, rows, length, config.n_kv_heads, config.d_head)
    return Cache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        router_sum=jnp.zeros((config.n_layers, rows, config.n_slots), jnp.float32),
        gathered=evidence.init(config, rows),
        length_B=jnp.zeros(rows, jnp.int32),
    )


def forward(
    config: ModelConfig,
    run: Runtime,
    shared: tree.Tree,
    groups: Sequence[tree.Tree],
    tokens_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    allowed_BE: jax.Array | None = None,
    n_active: int | None = None,
    cache: Cache | None = None,
    branch_end_BT: jax.Array | None = None,
    keep_residual: bool = False,
    training: bool = False,
) -> Output:
    """Runs the model over packed rows, or over the next tokens of cached documents.

    Args:
      groups: expert groups with a leading layer axis; slots are numbered through all of them.
      segments_BT: number of the document of each token inside its row, 0 for padding.
      allowed_BE: slots that each row may use, at least one per row; all by default.
      n_active: overrides the model's number of active experts.
      cache: decoding state; then every row is one document and padding may only stand at its end.
      branch_end_BT: rows hold documents that branch (many endings of one beginning): token t comes
        after token s of its row if s <= t < branch_end_BT[s]; 0 for padding. `cache` then is one
        row that stands before all of them, and is read only.
      training: `run.capacity` holds; without this nothing is ever dropped.

    Source: FlexOlmo paper section 3.2; OLMo 2 block (post-norm, QK-norm over the full width).
    """
    segments_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT
    n_slots = sum((g if isinstance(g, dict) else g[0])["bias"].shape[-1] for g in groups)
    n_active = min(config.n_active if n_active is None else n_active, n_slots)
    documents = _documents(segments_BT, allowed_BE, cache, branch_end_BT)
    evidence_BTE, gathered = evidence.of_documents(
        config, shared, groups, tokens_BT, cache and cache.gathered, **documents
    )
    one_layer = functools.partial(
        block.layer,
        config,
        run,
        n_active=n_active,
        keep_residual=keep_residual,
        training=training,
        evidence_BTE=evidence_BTE,
        **documents,
    )
    layer_cache = None if cache is None else (cache.k, cache.v, cache.router_sum)
    over_layers = jax.lax.scan if isinstance(shared["layers"], dict) else _one_by_one
    gate_BTE = adapters.first_gate(config, (*tokens_BT.shape, n_slots))
    (x_BTD, _), (logits, combine, residual, drops, layer_cache) = over_layers(
        remat.remat(one_layer, run.remat),
        (_embedded(run, shared, tokens_BT), gate_BTE),
        (shared["layers"], adapters.layered(groups), layer_cache),
    )
    if cache is not None and branch_end_BT is None:
        cache = cache.after(segments_BT, *layer_cache, gathered)
    hidden_BTD = layers.rms_norm(x_BTD, shared["final_norm"], config.norm_eps)
    hidden_BTD = adapters.widened(groups, hidden_BTD, combine[-1])
    return Output(hidden_BTD, logits, combine, residual, drops, cache)


def _documents(segments_BT, allowed_BE, cache, branch_end_BT) -> dict[str, Any]:
    """What attention and the router need to know of the documents that stand in the rows."""
    return {
        "segments_BT": segments_BT,
        "allowed_BE": allowed_BE,
        "length_B": None if cache is None else cache.length_B,
        "follows_BTS": None if branch_end_BT is None else _branch_mask(branch_end_BT),
    }


def _embedded(run: Runtime, shared: tree.Tree, tokens_BT: jax.Array) -> jax.Array:
    embedding_VD = jnp.asarray(shared["embed"]["embedding"], run.compute_dtype)
    x_BTD = embedding_VD.at[tokens_BT].get(mode="clip")
    return constrain(x_BTD, run.mesh, "batch", "seq", "embed")


def unembedding(
    config: ModelConfig, shared: tree.Tree, groups: Sequence[Any] = ()
) -> tuple[jax.Array, ...]:
    """The matrix [D, V] from hidden states to logits, and below it what experts add to it."""
    w_DV = shared["embed"]["embedding"].T if config.tied_embeddings else shared["unembed"]
    added_RV = adapters.head(groups) if config.adapters.head else None
    return (w_DV,) if added_RV is None else (w_DV, added_RV)


def logits(hidden_BTD: jax.Array, weights: Sequence[jax.Array]) -> jax.Array:
    """Logits [B, T, V] in float32.

    Args:
      weights: of `unembedding`; apart, so that a frozen one needs no gradient.
    """
    ends = list(itertools.accumulate(len(w) for w in weights))
    with jax.named_scope("unembed"):
        parts = [
            jnp.einsum(
                "BTD,DV->BTV",
                hidden_BTD[..., end - len(w_DV) : end],
                w_DV.astype(hidden_BTD.dtype),
                preferred_element_type=jnp.float32,
            )
            for w_DV, end in zip(weights, ends, strict=True)
        ]
        return functools.reduce(jnp.add, parts)


def unembed(
    config: ModelConfig, shared: tree.Tree, hidden_BTD: jax.Array, groups: Sequence[Any] = ()
) -> jax.Array:
    """Logits [B, T, V] in float32; `groups` only matter where experts add to the unembedding."""
    return logits(hidden_BTD, unembedding(config, shared, groups))


def split_layers(
    shared: tree.Tree, groups: Sequence[tree.Tree], cache: Cache, dtype: str
) -> tuple[Any, Any, Cache]:
    """The same arguments for `forward` with every matrix an array of its own, for many calls.

    XLA copies a layer, and a slot, out of a stack before each product; a step of decoding on CPU
    then spends most of its time on copies. Costs the memory of the matrices once more.
    """

    n_layers = len(cache.k)

    def slot_matrices(leaf: jax.Array) -> list[jax.Array]:
        return [leaf[e].astype(dtype) for e in range(len(leaf))]

    def group_layer(group: tree.Tree, i: int) -> tree.Tree:
        return {
            name: slot_matrices(leaf[i]) if name in moe.WEIGHTS else leaf[i]
            for name, leaf in group.items()
            if name not in adapters.UNLAYERED
        } | {name: leaf for name, leaf in group.items() if name in adapters.UNLAYERED and i == 0}

    layers_ = [jax.tree.map(operator.itemgetter(i), shared["layers"]) for i in range(n_layers)]
    experts = tuple([group_layer(group, i) for i in range(n_layers)] for group in groups)
    parts = (list(x) for x in (cache.k, cache.v, cache.router_sum))
    cache = Cache(*parts, cache.gathered, cache.length_B)
    return {**shared, "layers": layers_}, experts, cache


def _one_by_one(one_layer, carry, layers_in):
    """`jax.lax.scan` over what `split_layers` returns."""
    shared_layers, groups, cache = layers_in
    outs = []
    for i, layer in enumerate(shared_layers):
        inputs = (layer, tuple(g[i] for g in groups), tuple(leaf[i] for leaf in cache))
        carry, out = one_layer(carry, inputs)
        outs.append(out)
    logits, combine, _, _, caches = zip(*outs, strict=True)
    cache = tuple(list(leaves) for leaves in zip(*caches, strict=True))
    return carry, (jnp.stack(logits), jnp.stack(combine), None, None, cache)


def _branch_mask(branch_end_BT: jax.Array) -> jax.Array:
    """[B, T, S]: token s stands on the path to token t, or is it."""
    index_T = jnp.arange(branch_end_BT.shape[1])
    return (index_T <= index_T[:, None]) & (index_T[:, None] < branch_end_BT[:, None, :])

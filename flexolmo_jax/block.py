# SPDX-License-Identifier: Apache-2.0
"""One layer: attention and the mixture over a residual stream, as `model.forward` repeats it."""

import jax
import jax.numpy as jnp

from flexolmo_jax import adapters, attention, layers, moe, router, splash
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.remat import OUTPUT, PROJECTION, keep
from flexolmo_jax.runtime import Runtime
from flexolmo_jax.sharding import constrain


def layer(config: ModelConfig, run: Runtime, carry, layer_in, **kwargs):
    """One layer: attention, then the mixture, each with its norm after (post) or before (pre).

    Args:
      carry: the residual stream, and the combine weights of the layer below where experts hold
        more than FFNs (else None).
    """
    x_BTD, gate_BTE = carry
    weights, groups, cache = layer_in
    post = config.norm_placement == "post"

    def norm(x, part, gate_BTE):
        scale = weights[f"{part}_norm"]
        if config.adapters.norms:
            scale = adapters.scale(groups, f"{part}_scale", scale, gate_BTE)
        return layers.rms_norm(x, scale, config.norm_eps)

    with jax.named_scope("attention"):
        a_BTD = x_BTD if post else norm(x_BTD, "attention", gate_BTE)
        a_BTD, new_cache = _attention(
            config, run, weights["attention"], groups, gate_BTE, a_BTD, cache, **kwargs
        )
        x_BTD += norm(a_BTD, "attention", gate_BTE) if post else a_BTD
    with jax.named_scope("mixture"):
        f_BTD = x_BTD if post else norm(x_BTD, "ffn", gate_BTE)
        y_BTD, logits_BTE, combine_BTE, router_sum, drops = _mixture(
            config, run, groups, f_BTD, None if cache is None else cache[2], **kwargs
        )
        residual = f_BTD if kwargs["keep_residual"] else None
        x_BTD += norm(y_BTD, "ffn", combine_BTE) if post else y_BTD
    x_BTD = constrain(x_BTD, run.mesh, "batch", "seq", "embed")
    if new_cache is not None:
        new_cache = (*new_cache, router_sum)
    carry = (x_BTD, None if gate_BTE is None else combine_BTE)
    return carry, (logits_BTE, combine_BTE, residual, drops, new_cache)


def _attention(
    config: ModelConfig,
    run: Runtime,
    w,
    groups,
    gate_BTE,
    x_BTD,
    cache,
    *,
    segments_BT,
    length_B,
    follows_BTS,
    **_,
):
    """Attention over the row's documents, over the cache, or over branches after the cache."""
    B, T, _ = x_BTD.shape

    def project(name, scale):
        y = jnp.einsum("BTD,DNH->BTNH", x_BTD, w[f"w_{name}"].astype(x_BTD.dtype))
        if config.adapters.attention:
            y += adapters.project(groups, name, x_BTD, gate_BTE)
        y = keep(y, PROJECTION)
        if scale is not None:  # Over all heads together, or over each.
            normed = layers.rms_norm(y.reshape(B, T, -1, scale.size), scale, config.norm_eps)
            y = normed.reshape(y.shape)
        return constrain(y, run.mesh, "batch", "seq", "heads", "head_dim")

    q_BTNH = project("q", w.get("q_norm"))
    k_BSKH = project("k", w.get("k_norm"))
    v_BSKH = project("v", None)
    if cache is None:
        positions_BT = layers.document_positions(segments_BT)
        mask_BTS = layers.causal_document_mask(segments_BT)
    elif follows_BTS is not None:
        positions_BT = length_B[:, None] + jnp.maximum(jnp.sum(follows_BTS, -1) - 1, 0)
    else:
        positions_BT = length_B[:, None] + jnp.arange(T)
    q_BTNH = layers.rope(q_BTNH, positions_BT, config.rope_theta)
    k_BSKH = layers.rope(k_BSKH, positions_BT, config.rope_theta)
    new_cache = None
    if follows_BTS is not None:
        k_BSKH, v_BSKH, mask_BTS = _after(cache, length_B, k_BSKH, v_BSKH, follows_BTS)
    elif cache is not None:
        new_cache = _written(cache, segments_BT, positions_BT, k_BSKH, v_BSKH)
        mask_BTS = jnp.arange(cache[0].shape[1]) <= positions_BT[..., None]
        k_BSKH, v_BSKH = (leaf.astype(x_BTD.dtype) for leaf in new_cache)
    if cache is None and run.attention == "tiled":
        out_BTNH = attention.tiled(q_BTNH, k_BSKH, v_BSKH, segments_BT, run.mesh)
    elif cache is None and run.attention == "splash":
        out_BTNH = splash.splash(q_BTNH, k_BSKH, v_BSKH, segments_BT, run.mesh)
    else:
        out_BTNH = layers.attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
    out_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, w["w_o"].astype(x_BTD.dtype))
    if config.adapters.attention:
        out_BTD += adapters.project(groups, "o", out_BTNH, gate_BTE, n_in=2)
    return keep(out_BTD, OUTPUT), new_cache


def _written(cache, segments_BT, positions_BT, k_BTKH, v_BTKH):
    """The keys and values of a cache with those of new tokens at their places."""
    k_cache, v_cache, _ = cache
    rows = jnp.arange(len(positions_BT))[:, None]
    # Padding is written nowhere: its slot is past the end.
    at_BT = jnp.where(segments_BT > 0, positions_BT, k_cache.shape[1])
    k_cache = k_cache.at[rows, at_BT].set(k_BTKH.astype(k_cache.dtype), mode="drop")
    v_cache = v_cache.at[rows, at_BT].set(v_BTKH.astype(v_cache.dtype), mode="drop")
    return k_cache, v_cache


def _after(cache, length_B, k_BSKH, v_BSKH, follows_BTS):
    """Keys, values and mask of branches with the one row of the cache before them."""
    B, T, _ = follows_BTS.shape
    k_1SKH, v_1SKH, _ = cache
    S = k_1SKH.shape[1]

    def join(before, own):
        before = jnp.broadcast_to(before.astype(own.dtype), (B, *before.shape[1:]))
        return jnp.concatenate([before, own], axis=1)

    seen_BTS = jnp.broadcast_to(jnp.arange(S) < length_B[:, None, None], (B, T, S))
    mask_BTS = jnp.concatenate([seen_BTS, follows_BTS], axis=-1)
    return join(k_1SKH, k_BSKH), join(v_1SKH, v_BSKH), mask_BTS


def _router_logits(
    config: ModelConfig,
    groups,
    x_BTD,
    router_sum_BE,
    *,
    segments_BT,
    allowed_BE,
    length_B,
    follows_BTS,
    evidence_BTE,
    **_,
):
    """Logits of one layer's slots, bias included, and the state of each row's document."""
    router_ED = jnp.concatenate([g["router"] for g in groups])
    bias_E = jnp.concatenate([g["bias"] for g in groups])
    if allowed_BE is not None:
        # A slot that no row may use takes no part at all, so that the backward pass does not
        # multiply its row (which may hold anything) by a zero gradient.
        used_E = jnp.any(allowed_BE, axis=0)
        router_ED = jnp.where(used_E[:, None], router_ED, 0)
        bias_E = jnp.where(used_E, bias_E, 0)
    logits_BTE = router.router_logits(x_BTD, router_ED)
    if config.router.context == "document":
        logits_BTE, router_sum_BE = router.gathered(
            logits_BTE,
            router_sum_BE,
            config.router.evidence,
            segments_BT=segments_BT,
            length_B=length_B,
            follows_BTS=follows_BTS,
        )
    if evidence_BTE is not None:
        logits_BTE += evidence_BTE
    return logits_BTE + router.effective_bias(bias_E), router_sum_BE


def _mixture(
    config: ModelConfig,
    run: Runtime,
    groups,
    x_BTD,
    router_sum_BE,
    *,
    allowed_BE,
    n_active,
    training,
    **kwargs,
):
    """Router and experts of one layer."""
    logits_BTE, router_sum_BE = _router_logits(
        config, groups, x_BTD, router_sum_BE, allowed_BE=allowed_BE, **kwargs
    )
    routing = router.route(
        logits_BTE,
        n_active,
        allowed_BE=allowed_BE,
        renormalize=config.router.renormalize,
        fallback=config.router.fallback,
    )
    all_active, drops = allowed_BE is None and n_active == logits_BTE.shape[-1], None
    capacity = run.capacity if training else 0.0
    if capacity:
        routing, drops = moe.limit(routing, capacity, moe.n_shards(run.mesh))
        all_active = False
    weights = [{name: g[name] for name in moe.WEIGHTS} for g in groups]
    weights = jax.tree.map(lambda w: w.astype(x_BTD.dtype), weights)
    y_BTD = moe.mixture(
        x_BTD,
        weights,
        routing,
        dispatch=run.dispatch,
        all_active=all_active,
        parallel=run.expert_parallel,
        capacity=capacity,
        mesh=run.mesh,
    )
    return y_BTD, logits_BTE, routing.combine_BTE, router_sum_BE, drops

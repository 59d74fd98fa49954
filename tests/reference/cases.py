# SPDX-License-Identifier: Apache-2.0
"""Small configurations, random parameters and packed batches for comparisons of whole models.

Scales are chosen so that every part matters: router logits spread over a few nats, norms differ
from 1, biases reach from 0 to about -2.
"""

import numpy as np

from flexolmo_jax.config import ModelConfig, RouterConfig

TINY = ModelConfig(
    vocab_size=13,
    d_model=12,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    d_ffn=10,
    max_len=32,
    rope_theta=50.0,
    n_slots=4,
    n_active=2,
)

# Several documents a row, one document that fills the row, and padding at the end.
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 2, 2, 2, 3, 3, 3],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 2, 2, 2, 2, 2, 3, 0, 0, 0],
    ],
    np.int32,
)


def config_with(
    *, context="token", renormalize=False, fallback=False, evidence=0.0, parts=0, pairs=0, **changes
):
    """TINY with changes."""
    router = RouterConfig(context, renormalize, fallback, evidence, parts, pairs)
    return TINY.replace(router=router, **changes)


def shapes(c):
    """Leaf shapes of the parameter tree, written out from the layout contract."""
    L, D, F, E, V = c.n_layers, c.d_model, c.d_ffn, c.n_slots, c.vocab_size
    N, K, H = c.n_heads, c.n_kv_heads, c.d_head
    attention = {"w_q": (L, D, N, H), "w_k": (L, D, K, H), "w_v": (L, D, K, H), "w_o": (L, N, H, D)}
    if c.qk_norm == "full":
        attention |= {"q_norm": (L, N * H), "k_norm": (L, K * H)}
    if c.qk_norm == "head":
        attention |= {"q_norm": (L, H), "k_norm": (L, H)}
    layers = {"attention": attention, "attention_norm": (L, D), "ffn_norm": (L, D)}
    shared = {"embed": {"embedding": (V, D)}, "layers": layers, "final_norm": (D,)}
    if not c.tied_embeddings:
        shared["unembed"] = (D, V)
    if c.router.evidence_parts:
        shared["evidence"] = (c.router.evidence_parts, c.router.evidence_pairs or V)
    experts = {"w_gate": (L, E, D, F), "w_up": (L, E, D, F), "w_down": (L, E, F, D)}
    if R := c.adapters.attention:
        experts |= {f"{p}_a": (L, E, D, R) for p in "qkv"} | {"o_a": (L, E, N, H, R)}
        experts |= {"q_b": (L, E, R, N, H), "k_b": (L, E, R, K, H), "v_b": (L, E, R, K, H)}
        experts["o_b"] = (L, E, R, D)
    if R := c.adapters.head:
        experts |= {"head_a": (1, E, D, R), "head_b": (1, E, R, V)}
    if c.adapters.norms:
        experts |= {"attention_scale": (L, E, D), "ffn_scale": (L, E, D)}
    if c.router.evidence:
        experts["evidence"] = (1, E, c.router.evidence_pairs or V)
    return {"shared": shared, "experts": experts | {"router": (L, E, D), "bias": (L, E)}}


def random_params(config, seed=0):
    """Random float32 parameters with the shapes above."""
    rng = np.random.default_rng(seed)

    def fill(name, shape):
        if isinstance(shape, dict):
            return {key: fill(key, value) for key, value in shape.items()}
        normal = rng.standard_normal(shape)
        if name.endswith("norm"):
            return (1.0 + 0.3 * normal).astype(np.float32)
        if name == "bias":
            return (normal * 2.0).astype(np.float32)
        scale = {"embedding": 1.0, "router": 0.5, "evidence": 0.5}.get(name, config.d_model**-0.5)
        return (scale * normal).astype(np.float32)

    return {part: fill(part, shape) for part, shape in shapes(config).items()}


def random_batch(config, segments=SEGMENTS, seed=1):
    """Tokens, targets and loss mask; a target is the next token of its document."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, segments.shape).astype(np.int32)
    targets = np.roll(tokens, -1, axis=1)
    inside = np.zeros(segments.shape, bool)
    inside[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    return {"tokens": tokens, "targets": targets, "segments": segments, "loss_mask": inside}

# SPDX-License-Identifier: Apache-2.0
"""The model in plain NumPy float64, one token at a time: evidence that the fast one is right.

It was written from the design notes and the paper alone, before the package's own layers were read,
and shares no code with them: `config` is only asked for its fields. Loops are deliberate.
"""

import itertools

import numpy as np


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def positions_of(segments):
    """Position of each token inside its document and the index where that document starts."""
    positions, starts = np.zeros(len(segments), int), np.zeros(len(segments), int)
    for t in range(1, len(segments)):
        if segments[t] == segments[t - 1]:
            positions[t], starts[t] = positions[t - 1] + 1, starts[t - 1]
        else:
            positions[t], starts[t] = 0, t
    return positions, starts


def rotate(head, position, theta):
    """RoPE of one head: dimensions i and i + H/2 turn by position * theta^(-2i/H)."""
    half = len(head) // 2
    out = np.empty_like(head)
    for i in range(half):
        angle = position * theta ** (-2.0 * i / len(head))
        c, s = np.cos(angle), np.sin(angle)
        out[i] = head[i] * c - head[i + half] * s
        out[i + half] = head[i + half] * c + head[i] * s
    return out


def addition(layer, name, x, gates):
    """What experts e > 0 add to one projection: sum of gate * ((x @ A_e) @ B_e), [T,O]."""
    if f"{name}_a" not in layer or gates is None:
        return 0.0
    total = 0.0
    for e in range(1, gates.shape[1]):
        down = layer[f"{name}_a"][e].reshape(x.shape[1], -1)
        up = layer[f"{name}_b"][e].reshape(down.shape[1], -1)
        total = total + gates[:, e, None] * ((x @ down) @ up)
    return total


def norm_weight(layer, part, gates):
    """The weight of a norm, [D], or [T,D] where experts add to it."""
    weight = layer[f"{part}_norm"]
    if f"{part}_scale" not in layer:
        return weight
    return weight + gates[:, 1:] @ layer[f"{part}_scale"][1:]


def attention(config, layer, x, segments, gates=None):
    """Causal grouped-query attention of one row [T,D] inside each document."""
    length, d_model = x.shape
    n, kv, d_head = config.n_heads, config.n_kv_heads, config.d_head
    q = x @ layer["w_q"].reshape(d_model, n * d_head) + addition(layer, "q", x, gates)
    k = x @ layer["w_k"].reshape(d_model, kv * d_head) + addition(layer, "k", x, gates)
    v = x @ layer["w_v"].reshape(d_model, kv * d_head) + addition(layer, "v", x, gates)
    v = v.reshape(length, kv, d_head)
    if config.qk_norm == "full":
        q = rms_norm(q, layer["q_norm"], config.norm_eps)
        k = rms_norm(k, layer["k_norm"], config.norm_eps)
    q, k = q.reshape(length, n, d_head), k.reshape(length, kv, d_head)
    if config.qk_norm == "head":
        q = np.stack([rms_norm(q[:, i], layer["q_norm"], config.norm_eps) for i in range(n)], 1)
        k = np.stack([rms_norm(k[:, j], layer["k_norm"], config.norm_eps) for j in range(kv)], 1)
    positions, starts = positions_of(segments)
    q_rot, k_rot = np.empty_like(q), np.empty_like(k)
    for t in range(length):
        for i in range(n):
            q_rot[t, i] = rotate(q[t, i], positions[t], config.rope_theta)
        for j in range(kv):
            k_rot[t, j] = rotate(k[t, j], positions[t], config.rope_theta)
    out = np.zeros((length, d_model))
    heads = np.zeros((length, n, d_head))
    for t in range(length):
        first = starts[t]
        for i in range(n):
            j = i // (n // kv)
            scores = k_rot[first : t + 1, j] @ q_rot[t, i] / np.sqrt(d_head)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            heads[t, i] = weights @ v[first : t + 1, j]
            out[t] += heads[t, i] @ layer["w_o"][i]
    return out + addition(layer, "o", heads.reshape(length, -1), gates)


def swiglu(x, w_gate, w_up, w_down):
    """down(silu(gate(x)) * up(x)) of one token."""
    gate = x @ w_gate
    return (gate / (1.0 + np.exp(-gate)) * (x @ w_up)) @ w_down


def combine_weights(
    x, router, raw_bias, allowed, segments, *, k, context, renormalize, fallback=False,
    says=None, worth=0.0,
):  # fmt: skip
    """Weight of each slot for each token of a row: x [T,D], router [E,D], allowed [E] -> [T,E].

    With `worth`, `says` [T,E] is the evidence of each token's document so far, and n tokens of a
    document count as n * worth / (n + worth) times their mean.
    """
    allowed = np.asarray(allowed, bool)
    if not allowed.any():
        raise ValueError("no slot is allowed")
    candidates = np.flatnonzero(allowed)
    _, starts = positions_of(segments)
    out = np.zeros((len(x), len(router)))
    raw_logits = {e: x @ router[e] for e in candidates}
    for t in range(len(x)):
        first = starts[t] if context == "document" else t
        logits = []
        for e in candidates:
            bias = 0.0 if e == 0 else -np.logaddexp(0.0, raw_bias[e])
            mean = raw_logits[e][first : t + 1].mean()
            if worth:
                n = t + 1 - first
                mean = mean * n * worth / (n + worth) + says[t, e]
            logits.append(mean + bias)
        probs = np.exp(np.array(logits) - max(logits))
        probs /= probs.sum()
        always = {c for c in range(len(candidates)) if fallback and candidates[c] == 0}
        ranked = sorted(range(len(candidates)), key=lambda c: (c not in always, -probs[c], c))
        chosen = ranked[:k]
        for c in always:
            probs[c] = 1.0 - sum(probs[other] for other in chosen if other not in always)
        total = sum(probs[c] for c in chosen) if renormalize else 1.0
        for c in chosen:
            out[t, candidates[c]] = probs[c] / total
    return out


def entry_of_pair(before, token, entries):
    """Where a table has a pair of tokens: 32 bit arithmetic (docs/format.md)."""
    key = (before * 0x9E3779B1 + token * 0x85EBCA6B) % 2**32
    key = (key ^ key >> 15) * 0xC2B2AE35 % 2**32
    return (key ^ key >> 13) % entries


def evidence(config, params, tokens, segments):
    """Evidence [T,E] of one row, nats: for each slot in the document up to each token."""
    tables = np.asarray(params["experts"]["evidence"][0], np.float64)
    _, starts = positions_of(segments)
    out = np.zeros((len(tokens), len(tables)))
    for t in range(len(tokens)):
        seen = tokens[starts[t] : t + 1]
        share = config.router.evidence / (len(seen) + config.router.evidence)
        if n := config.router.evidence_pairs:
            seen = [entry_of_pair(int(a), int(b), n) for a, b in itertools.pairwise(seen)]
        for e in range(len(tables)):
            out[t, e] = tables[e][np.array(seen, int)].sum() * share
        if config.router.evidence_parts:
            corpora = np.exp(np.asarray(params["shared"]["evidence"], np.float64))
            ratios = np.clip(np.log(corpora / corpora.mean(axis=0)), -3, 3)
            says = [ratio[np.array(seen, int)] for ratio in ratios]
            out[t, 0] += np.log(np.mean([np.exp(s.sum() * share) for s in says]))
    return out


def mixture(config, layer, x, segments, allowed, says):
    """Output [T,D] and combine weights [T,E] of one row; experts and router both read `x`."""
    weights = combine_weights(
        x, layer["router"], layer["bias"], allowed, segments,
        k=config.n_active, context=config.router.context, renormalize=config.router.renormalize,
        fallback=config.router.fallback, says=says, worth=config.router.evidence,
    )  # fmt: skip
    out = np.zeros_like(x)
    for t in range(len(x)):
        for e in np.flatnonzero(weights[t]):
            expert = swiglu(x[t], layer["w_gate"][e], layer["w_up"][e], layer["w_down"][e])
            out[t] += weights[t, e] * expert
    return out, weights


def block(config, layer, x, segments, allowed, below, says):
    """One layer for one row: (new residual stream [T,D], combine weights [T,E]).

    `below` has the combine weights of the layer below, by which experts add to attention.
    """
    eps, first = config.norm_eps, norm_weight(layer, "attention", below)
    if config.norm_placement == "post":
        h = x + rms_norm(attention(config, layer, x, segments, below), first, eps)
        y, weights = mixture(config, layer, h, segments, allowed, says)
        return h + rms_norm(y, norm_weight(layer, "ffn", weights), eps), weights
    h = x + attention(config, layer, rms_norm(x, first, eps), segments, below)
    # This norm stands before the router, so it knows the layer below only.
    read = rms_norm(h, norm_weight(layer, "ffn", below), eps)
    y, weights = mixture(config, layer, read, segments, allowed, says)
    return h + y, weights


def _layer(params, index):
    """The weights of one layer in one flat dict, as float64."""
    layers = dict(params["shared"]["layers"])
    merged = {**layers.pop("attention"), **layers, **params["experts"]}
    return {
        name: np.asarray(leaf[index], np.float64)
        for name, leaf in merged.items()
        if not name.startswith(("head_", "evidence"))
    }


def forward(config, params, tokens, segments=None, allowed=None):
    """Runs the model.

    Returns:
      logits [B,T,V]; states [L+1,B,T,D], the residual stream before the first layer and after each
      layer, final norm not applied; combine weights [L,B,T,E]. All float64.
    """
    tokens = np.asarray(tokens)
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
    if allowed is None:
        allowed = np.ones((len(tokens), config.n_slots), bool)
    embedding = np.asarray(params["shared"]["embed"]["embedding"], np.float64)
    head = embedding.T if config.tied_embeddings else params["shared"]["unembed"]
    states, weights = [embedding[tokens]], []
    below = np.zeros((*tokens.shape, config.n_slots))
    says = [None] * len(tokens)
    if "evidence" in params["experts"]:
        says = [evidence(config, params, *row) for row in zip(tokens, segments, strict=True)]
    for index in range(config.n_layers):
        layer = _layer(params, index)
        rows = [
            block(config, layer, states[-1][b], segments[b], allowed[b], below[b], says[b])
            for b in range(len(tokens))
        ]
        states.append(np.stack([x for x, _ in rows]))
        weights.append(np.stack([w for _, w in rows]))
        below = weights[-1]
    final_norm = np.asarray(params["shared"]["final_norm"], np.float64)
    normed = rms_norm(states[-1], final_norm, config.norm_eps)
    logits = normed @ np.asarray(head, np.float64)
    if "head_a" in params["experts"]:  # Gated by the last layer.
        down, up = (np.asarray(params["experts"][f"head_{x}"][0], np.float64) for x in "ab")
        for e in range(1, config.n_slots):
            added = (normed @ down[e]) @ up[e]
            logits += np.where(weights[-1][..., e, None] > 0, weights[-1][..., e, None] * added, 0)
    return logits, np.stack(states), np.stack(weights)


def loss(logits, targets, loss_mask, z_loss=0.0):
    """Mean over masked-in positions of -log p(target) + z_loss * logsumexp(logits)^2, nats."""
    total, count = 0.0, 0
    for b, t in np.argwhere(np.asarray(loss_mask)):
        row = logits[b, t]
        log_z = row.max() + np.log(np.exp(row - row.max()).sum())
        total += log_z - row[targets[b, t]] + z_loss * log_z**2
        count += 1
    return total / count

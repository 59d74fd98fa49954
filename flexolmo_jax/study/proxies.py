# SPDX-License-Identifier: Apache-2.0
"""Public documents that look like an owner's text, for tuning routers without that text.

Source: paper section 3.3.2 (a binary classifier on embeddings, the highest scores are taken);
MetaMoE, arXiv 2605.14289 (relevance weighed against likeness to what is already taken).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax.data import shards, tokenize
from flexolmo_jax.experts.embedders import Embedder

# Tokens of a document that are embedded; its beginning tells what it is.
HEAD = 256
RIDGE, NEWTON_STEPS = 1.0, 12


def relevance(own_ND: np.ndarray, public_ND: np.ndarray) -> np.ndarray:
    """Log odds [N public] that a public document is the owner's, by logistic regression.

    Both sides count alike however many documents they have.
    """
    x = np.concatenate([own_ND, public_ND]).astype(np.float64)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    y = np.concatenate([np.ones(len(own_ND)), np.zeros(len(public_ND))])
    each = np.where(y == 1, 0.5 / len(own_ND), 0.5 / len(public_ND)) * len(x)
    w = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(x @ w)))
        slope = x.T @ (each * (p - y)) + RIDGE * w
        curvature = (x * (each * p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(len(w))
        w -= np.linalg.solve(curvature, slope)
    return x[len(own_ND) :] @ w


def select(
    score_N: np.ndarray, vectors_ND: np.ndarray, tokens_N: np.ndarray, budget: int, diversity: float
) -> list[int]:
    """Numbers of the documents to take, best first, until `budget` tokens are reached.

    Args:
      diversity: what likeness (cosine) to the nearest document already taken costs, in standard
        deviations of the score; 0 takes relevance alone.
    """
    value = (score_N - score_N.mean()) / max(float(score_N.std()), 1e-12)
    likeness, taken, used = np.zeros(len(value)), [], 0
    free = np.ones(len(value), bool)
    while free.any() and used < budget:
        best = int(np.argmax(np.where(free, value - diversity * likeness, -np.inf)))
        free[best] = False
        taken.append(best)
        used += int(tokens_N[best])
        if diversity:
            likeness = np.maximum(likeness, vectors_ND @ vectors_ND[best])
    return taken


def documents(path: Path, limit: int) -> tuple[list[np.ndarray], dict]:
    """Up to `limit` documents of a token-shard directory, evenly spaced, and its sidecar."""
    opened = shards.open_shards(path)
    wanted = np.linspace(0, opened.n_documents - 1, min(limit, opened.n_documents)).astype(int)
    return [opened.document(int(i)) for i in np.unique(wanted)], dict(opened.info)


def write(
    own: Path,
    public: Sequence[Path],
    out: Path,
    *,
    tokenizer: Path,
    embedder: Embedder,
    budget: int,
    limit: int = 800,
    diversity: float = 0.0,
) -> dict[str, float]:
    """Writes the proxies of an owner as token shards.

    The owner runs this: only which public documents were taken leaves the owner.

    Returns:
      documents and tokens taken, and the accuracy of the classifier on what it learnt from.
    """
    known = tokenize.load(tokenizer)
    mine, info = documents(own, limit)
    theirs = [d for path in public for d in documents(path, limit)[0]]

    def embed(found: list[np.ndarray]) -> np.ndarray:
        return embedder([known.decode(d[:HEAD].tolist()) or "." for d in found])

    own_ND, public_ND = embed(mine), embed(theirs)
    score_N = relevance(own_ND, public_ND)
    lengths = np.array([len(d) for d in theirs])
    taken = select(score_N, public_ND, lengths, budget, diversity)
    size = tokenize.token_byte_lengths(known)
    shards.write_shards(
        out,
        [theirs[i] for i in taken],
        vocab_size=info["vocab_size"],
        tokenizer_digest=info["tokenizer_digest"],
        eos_id=info["eos_id"],
        text_bytes=int(sum(size[theirs[i]].sum() for i in taken)),
        source="proxies",
        split="train",
        recipe={"diversity": diversity, "budget": budget},
    )
    return {
        "documents": len(taken),
        "tokens": int(lengths[taken].sum()),
        "public_below_zero": float(np.mean(score_N < 0)),
    }

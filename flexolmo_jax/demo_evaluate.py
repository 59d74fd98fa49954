# SPDX-License-Identifier: Apache-2.0
"""The demo's judge: one stitched model under every allowed set, on every domain's held-out text.

The anchor, an expert beside the anchor, and the model without an expert are all the stitched model
under an allowed set, so that one compiled program measures them all.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax import inference, sample
from flexolmo_jax.experts.manifest import PUBLIC

# Openings in the manner of each domain, in our own words.
PROMPTS = {
    "code": "def read_lines(path):\n    with open(path) as f:\n",
    "news": "The minister told reporters on Friday that",
    "legal": "The copyright holder grants permission to",
    "academic": "In this paper we propose a method for",
}
SAMPLING = sample.SampleConfig(max_new_tokens=80, temperature=0.7, top_p=0.9)

Allowed = tuple[str, ...]


def variants(experts: Sequence[str]) -> dict[str, Allowed]:
    """Name of a model in the results to the experts that it may use."""
    closed = [e for e in experts if e != PUBLIC]
    out: dict[str, Allowed] = {"anchor": (PUBLIC,)}
    out.update({f"expert:{e}": (PUBLIC, e) for e in closed})
    out["stitched"] = (PUBLIC, *closed)
    out.update({f"deny:{e}": (PUBLIC, *(x for x in closed if x != e)) for e in closed})
    return out


def domains_of(name: str, public: Sequence[str], closed: Sequence[str]) -> list[str]:
    """What a model is measured on: a pair on public text and its own domain, others on all."""
    kind, _, expert = name.partition(":")
    return [*public, expert] if kind == "expert" else [*public, *closed]


def samples(m: inference.OpenModel, seed: int) -> list[dict[str, Any]]:
    """Each domain's prompt with its expert allowed and denied, all in one batch."""
    everyone = variants(list(m.slots))
    asked = [e for e in m.slots if e in PROMPTS]
    rows = [(e, kind) for e in asked for kind in ("stitched", f"deny:{e}")]
    if not rows:
        return []
    made = inference.generate_text(
        m,
        [PROMPTS[e] for e, _ in rows],
        allowed=np.stack([m.allowed(everyone[kind]) for _, kind in rows]),
        sampling=SAMPLING,
        seed=seed,
    )
    sides = [{key: answer[key] for key in ("text", "tokens_per_expert")} for answer in made]
    return [
        {"prompt": PROMPTS[e], "expert": e, "allowed": allowed, "denied": denied}
        for e, allowed, denied in zip(asked, sides[::2], sides[1::2], strict=True)
    ]


def _rounded(shares: Mapping[str, float]) -> dict[str, float]:
    return {expert: round(share, 4) for expert, share in shares.items()}


def run(
    stitched: Path,
    heldout: Mapping[str, Path],
    public: Sequence[str],
    *,
    rows: int,
    seq_len: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures bits per byte and routing, and writes samples.

    Args:
      heldout: domain to token-shard directory; the order is that of the results.
      public: the domains among them that are public.

    Returns:
      bpb[model][domain], routing[domain][expert], routing_layers[domain], samples, device.
    """
    m = inference.open_model(stitched)
    closed = [d for d in heldout if d not in public]
    todo = variants(list(m.slots))
    results: dict[str, Any] = {"bpb": {}, "routing": {}, "routing_layers": {}}
    began = time.monotonic()
    for number, (name, experts) in enumerate(todo.items(), 1):
        scores = {}
        for domain in domains_of(name, public, closed):
            score = inference.score_domain(
                m, heldout[domain], allowed=m.allowed(experts), n_rows=rows, seq_len=seq_len
            )
            scores[domain] = score.summary()
            if name == "stitched":
                results["routing"][domain] = _rounded(inference.shares(score, m.slots))
                layers = inference.layer_shares(score, m.slots)
                results["routing_layers"][domain] = [[*_rounded(x).values()] for x in layers]
        results["bpb"][name] = scores
        left = (time.monotonic() - began) * (len(todo) - number) / number
        progress(f"evaluated {name} ({number} of {len(todo)}), about {left:.0f} s left")
    results["samples"] = samples(m, seed)
    results["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return results

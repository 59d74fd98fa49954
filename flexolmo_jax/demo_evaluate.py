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
import jax.numpy as jnp
import numpy as np

from flexolmo_jax import evaluate, model, sample
from flexolmo_jax.config import ExecConfig
from flexolmo_jax.data import loader, tokenize
from flexolmo_jax.experts import model_dir
from flexolmo_jax.experts.manifest import PUBLIC

BATCH_ROWS = 16
# Openings in the manner of each domain, in our own words.
PROMPTS = {
    "code": "def read_lines(path):\n    with open(path) as f:\n",
    "news": "The minister told reporters on Friday that",
    "legal": "The copyright holder grants permission to",
    "academic": "In this paper we propose a method for",
}
SAMPLING = {"max_new_tokens": 80, "temperature": 0.7, "top_p": 0.9}

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


class Judge:
    """A loaded model with everything that scoring and sampling need."""

    def __init__(self, path: Path):
        self.info, params, _ = model_dir.load_model(path)
        self.config = self.info.config
        self.shared = jax.tree.map(jnp.asarray, params["shared"])
        self.groups = (jax.tree.map(jnp.asarray, params["experts"]),)
        self.runtime = model.Runtime.resolve(
            ExecConfig(compute_dtype="float32"), self.config.n_slots, self.config.n_active
        )
        self.tokenizer = tokenize.load(self.info.tokenizer_path)
        known = tokenize.token_byte_lengths(self.tokenizer)
        self.token_bytes = np.pad(known, (0, self.config.vocab_size - len(known)))

    def allowed(self, experts: Sequence[str]) -> np.ndarray:
        """Slots of these experts as booleans."""
        slots = np.zeros(self.config.n_slots, bool)
        slots[[self.info.slots[e] for e in experts]] = True
        return slots

    def score(self, text: Path, experts: Sequence[str], rows: int, length: int) -> evaluate.Score:
        """Scores evenly spaced rows of a token-shard directory."""
        batches = loader.heldout_batches(
            text,
            BATCH_ROWS,
            seq_len=length,
            n_rows=rows,
            tokenizer_digest=self.info.tokenizer_digest,
            vocab_size=self.config.vocab_size,
        )
        return evaluate.score_text(
            self.config,
            self.runtime,
            self.shared,
            self.groups,
            batches,
            self.token_bytes,
            allowed=self.allowed(experts),
        )

    def shares(self, score: evaluate.Score) -> tuple[dict[str, float], list[list[float]]]:
        """Share of each expert in the mixture: over all layers, and layer by layer."""
        weight_LE = score.weight_LE / np.maximum(score.weight_LE.sum(-1, keepdims=True), 1e-30)
        slots = self.info.slots
        mean = weight_LE.mean(0)
        layers = [[round(float(row[s]), 4) for s in slots.values()] for row in weight_LE]
        return {e: round(float(mean[s]), 4) for e, s in slots.items()}, layers

    def samples(self, seed: int) -> list[dict[str, Any]]:
        """Each domain's prompt with its expert allowed and denied, all in one batch."""
        everyone = variants(list(self.info.slots))
        asked = [e for e in self.info.slots if e in PROMPTS]
        rows = [(e, f"{kind}") for e in asked for kind in ("stitched", f"deny:{e}")]
        if not rows:
            return []
        sampling = sample.SampleConfig(**SAMPLING, eos_id=tokenize.eos_id(self.tokenizer))
        made = sample.generate(
            self.config,
            self.runtime,
            self.shared,
            self.groups,
            [self.tokenizer.encode(PROMPTS[e]).ids for e, _ in rows],
            allowed_BE=np.stack([self.allowed(everyone[kind]) for _, kind in rows]),
            sampling=sampling,
            key=jax.random.key(seed),
        )
        sides = [self._side(generation) for generation in made]
        return [
            {"prompt": PROMPTS[e], "expert": e, "allowed": allowed, "denied": denied}
            for e, allowed, denied in zip(asked, sides[::2], sides[1::2], strict=True)
        ]

    def _side(self, generation: sample.Generation) -> dict[str, Any]:
        served = {
            e: round(float(generation.tokens_per_slot[s]), 2) for e, s in self.info.slots.items()
        }
        return {"text": self.tokenizer.decode(generation.ids), "tokens_per_expert": served}


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
    judge = Judge(stitched)
    closed = [d for d in heldout if d not in public]
    todo = variants(list(judge.info.slots))
    results: dict[str, Any] = {"bpb": {}, "routing": {}, "routing_layers": {}}
    began = time.monotonic()
    for number, (name, experts) in enumerate(todo.items(), 1):
        scores = {}
        for domain in domains_of(name, public, closed):
            score = judge.score(heldout[domain], experts, rows, seq_len)
            scores[domain] = score.summary()
            if name == "stitched":
                results["routing"][domain], results["routing_layers"][domain] = judge.shares(score)
        results["bpb"][name] = scores
        left = (time.monotonic() - began) * (len(todo) - number) / number
        progress(f"evaluated {name} ({number} of {len(todo)}), about {left:.0f} s left")
    results["samples"] = judge.samples(seed)
    results["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return results

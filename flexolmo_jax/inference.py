# SPDX-License-Identifier: Apache-2.0
"""A model directory opened for evaluation or generation."""

import dataclasses
import functools
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flexolmo_jax import evaluate, model, sample, sharding, tree
from flexolmo_jax.config import ExecConfig, ModelConfig
from flexolmo_jax.data import loader, remote_shards, shards, tokenize
from flexolmo_jax.errors import ConfigError, DataError
from flexolmo_jax.experts import model_dir, model_info, policy
from flexolmo_jax.storage import urls

logger = logging.getLogger("flexolmo")
# Text is scored in rows of this length where the model could read longer ones: attention over a
# context of 8192 tokens takes hours and gigabytes on a CPU, and says little more.
ROW_TOKENS, BATCH_TOKENS = 1024, 4096


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model in memory.

    Attributes:
      slots: expert id to slot, of the experts that were opened.
      group: every slot stacked; slots that were not opened hold zeros and are never allowed.
    """

    info: model_info.ModelInfo
    runtime: model.Runtime
    slots: dict[str, int]
    shared: tree.Tree
    group: tree.Tree

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.info.config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        return tokenize.load(self.info.tokenizer_path)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text of each token id."""
        return token_bytes(self.info)

    def allowed(
        self, allow: Iterable[str] | None = None, deny: Iterable[str] | None = None
    ) -> np.ndarray:
        """Boolean [n_slots] of one request (see `policy.allowed_slots`)."""
        return policy.allowed_slots(self.slots, self.config.n_slots, allow=allow, deny=deny)

    def active(self, wanted: int | None = None) -> int:
        """Experts per token: the model's own number, or the one that is wanted.

        Raises:
          ConfigError: more than the model has slots, or fewer than one.
        """
        if wanted is None:
            return self.config.n_active
        if not 1 <= wanted <= self.config.n_slots:
            raise ConfigError(
                "The number of active experts does not fit the model",
                got=wanted,
                expected=f"1..{self.config.n_slots}",
                where="--active",
            )
        return wanted


def token_bytes(info: model_info.ModelInfo) -> np.ndarray:
    """Bytes of text of each token id of a model; ids that only pad the vocabulary have none."""
    known = tokenize.token_byte_lengths(tokenize.load(info.tokenizer_path))
    return np.pad(known, (0, info.config.vocab_size - len(known)))


def open_model(
    path: Path | str,
    *,
    allow: Collection[str] | None = None,
    deny: Collection[str] | None = None,
    exec_config: ExecConfig = ExecConfig(compute_dtype="float32"),
    grid: Mesh | None = None,
) -> OpenModel:
    """Loads and verifies a model; no byte of an expert that is not allowed is opened.

    Args:
      grid: lay the parameters out over this mesh as training does; None uses the first device.
    """
    info = model_info.read_info(path)
    mask = policy.allowed_slots(info.slots, info.config.n_slots, allow=allow, deny=deny)
    wanted = [expert for expert, slot in info.slots.items() if mask[slot]]
    c = info.config
    if grid is None:
        info, params, opened = model_dir.load_model(path, experts=wanted)
        params = jax.device_put(params)
    else:
        axes = tree.flatten(model.param_axes(c))

        def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
            spec = sharding.spec_for(axes[name], shape, grid, sharding.PARAM_RULES)
            return NamedSharding(grid, spec)

        info, params, opened = model_dir.load_model(path, experts=wanted, sharding_fn=place)
    return OpenModel(
        info=info,
        runtime=model.Runtime.resolve(exec_config, c.n_slots, c.n_active, grid),
        slots={expert: info.slots[expert] for expert in opened},
        shared=params["shared"],
        group=params["experts"],
    )


def heldout_sets(data: Path | str, split: str = "heldout") -> dict[str, Path | str]:
    """Domain to token-shard directory under `data` ("<domain>/heldout", or "<domain>" itself).

    Args:
      data: a directory or a URL; of a URL, the values are URLs too.

    Raises:
      DataError: nothing there.
    """
    root, url = Path(data), urls.as_url(data)
    found: dict[str, Path | str] = {}
    if url is not None:
        found.update(remote_shards.find(url, split))
    elif shards.is_shard_dir(root):
        return {root.parent.name if root.name == split else root.name: root}
    for folder in sorted(root.iterdir()) if url is None and root.is_dir() else []:
        for candidate in (folder / split, folder):
            if shards.is_shard_dir(candidate):
                found[folder.name] = candidate
                break
    if not found:
        raise DataError(
            "No token shards to evaluate on",
            where=url or root,
            expected=f"<domain>/{split}/tokens.json",
            fix="write them with flexolmo prepare",
        )
    return found


def score_domain(
    m: OpenModel,
    path: Path | str,
    *,
    allowed: np.ndarray,
    n_active: int | None = None,
    n_rows: int = 0,
    batch_rows: int = 0,
    seq_len: int = 0,
) -> evaluate.Score:
    """Bits per byte and routing on one token-shard directory.

    Args:
      n_rows: rows to score, spread over the text; 0 is all.
      batch_rows: rows computed at once; 0 takes as many as make `BATCH_TOKENS`.
      seq_len: tokens per row; 0 is the model's context, but at most `ROW_TOKENS`.
    """
    seq_len = seq_len or min(m.config.max_len, ROW_TOKENS)
    batch_rows = batch_rows or max(1, BATCH_TOKENS // seq_len)
    grid = m.runtime.mesh
    parts = 1 if grid is None else grid.shape["data"] * grid.shape["expert"]
    batches = loader.heldout_batches(
        path,
        -(-batch_rows // parts) * parts,
        seq_len=seq_len,
        n_rows=n_rows,
        tokenizer_digest=m.info.tokenizer_digest,
        vocab_size=m.config.vocab_size,
    )
    return evaluate.score_text(
        m.config,
        m.runtime,
        m.shared,
        (m.group,),
        batches,
        m.token_bytes,
        allowed=allowed,
        n_active=n_active,
    )


def score_domains(
    m: OpenModel,
    domains: Mapping[str, Path | str],
    *,
    allowed: np.ndarray,
    n_active: int,
    n_rows: int = 0,
    seq_len: int = 0,
) -> dict[str, Any]:
    """Bits per byte and routing of each domain, as results list them."""
    names = [expert for expert, slot in m.slots.items() if allowed[slot]]
    slots = {expert: m.slots[expert] for expert in names}
    out: dict[str, Any] = {"bpb": {}, "routing": {}, "routing_layers": {}}
    for domain, where in domains.items():
        score = score_domain(
            m, where, allowed=allowed, n_active=n_active, n_rows=n_rows, seq_len=seq_len
        )
        out["bpb"][domain] = score.summary()
        out["routing"][domain] = shares(score, slots)
        out["routing_layers"][domain] = layer_table(score, slots)
        logger.info("%-12s %.4f bits per byte", domain, score.bits_per_byte)
    return out


def shares(score: evaluate.Score, slots: Mapping[str, int]) -> dict[str, float]:
    """Expert to its share of the mixture, mean over tokens and layers."""
    weight_E = score.weight_LE.sum(0)
    return {expert: float(weight_E[slot] / weight_E.sum()) for expert, slot in slots.items()}


def layer_shares(score: evaluate.Score, slots: Mapping[str, int]) -> list[dict[str, float]]:
    """The same per layer."""
    return [
        {expert: float(row[slot] / row.sum()) for expert, slot in slots.items()}
        for row in score.weight_LE
    ]


def layer_table(score: evaluate.Score, slots: Mapping[str, int]) -> list[dict[str, Any]]:
    """Per layer and expert: share of the tokens it served, and its mean weight in the mixture."""
    assert score.load_LE is not None
    weights = layer_shares(score, slots)
    return [
        {
            expert: {"share": float(load[slot] / score.tokens), "weight": weight[expert]}
            for expert, slot in slots.items()
        }
        for load, weight in zip(score.load_LE, weights, strict=True)
    ]


def generate_text(
    m: OpenModel,
    prompts: Sequence[str],
    *,
    allowed: np.ndarray | None = None,
    active: int | None = None,
    sampling: sample.SampleConfig = sample.SampleConfig(),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Continues prompts; `allowed` is [n_slots], or [prompts, n_slots] for a set per prompt."""
    allowed = m.allowed() if allowed is None else np.asarray(allowed, bool)
    allowed_BE = np.broadcast_to(allowed, (len(prompts), m.config.n_slots))
    n_active = m.active(active)
    if allowed.ndim == 1:  # Else each row has its own limit, and the model keeps to it.
        n_active = policy.clamp_active(n_active, allowed)
    if sampling.eos_id < 0:
        sampling = dataclasses.replace(sampling, eos_id=tokenize.eos_id(m.tokenizer))
    ids = [
        tokens.tolist() for tokens in tokenize.encode_batch(m.tokenizer, list(prompts), end=False)
    ]
    answers = sample.generate(
        m.config,
        m.runtime,
        m.shared,
        (m.group,),
        ids,
        allowed_BE=allowed_BE,
        n_active=n_active,
        sampling=sampling,
        key=jax.random.key(seed),
    )
    return [
        {
            "prompt": prompt,
            "text": m.tokenizer.decode(answer.ids),
            "ids": answer.ids,
            "tokens_per_expert": {
                expert: round(float(answer.tokens_per_slot[slot]), 3)
                for expert, slot in m.slots.items()
            },
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]

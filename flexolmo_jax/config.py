# SPDX-License-Identifier: Apache-2.0
"""Frozen configuration of a model and of one training job.

`ml_collections` dicts stop at the launch boundary: `typed.from_dict` turns one into these
dataclasses, strictly, and the rest of the package sees only these. `ModelConfig` is the identity of
a model (it is digested and shipped with it); `ExecConfig` is how a machine computes it and may
differ per run.
"""

import dataclasses
import functools
import math
import operator
import re
from typing import Any, Literal

from flexolmo_jax.errors import ConfigError

# An expert's name is a folder's name, a key and an option's value.
EXPERT_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) <= 0:
            raise ConfigError(
                f"{name} must be positive",
                got=getattr(owner, name),
                where=f"{type(owner).__name__}.{name}",
            )


def _not_negative(owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < 0:
            raise ConfigError(
                f"{name} must not be negative",
                got=getattr(owner, name),
                where=f"{type(owner).__name__}.{name}",
            )


# Entries of a table at most: 64 MiB per owner.
MAX_PAIRS = 1 << 24


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How router logits become combine weights.

    Attributes:
      context: "token" judges each token alone (the paper); "document" averages each slot's logit
        causally over the document so far, one number per slot, layer and sequence.
      renormalize: divide the combine weights of the active experts by their sum. A no-op up to
        the norm's epsilon under post-norm, needed under pre-norm.
      fallback: the public expert is always active, and takes the weight that is left by the other
        active ones; else it competes like any other (the paper).
      evidence: above 0, a document's logits are summed instead of averaged until they are worth
        this many tokens, and every expert brings a table of what each token says (see
        `flexolmo_jax.evidence`); needs context "document".
      evidence_parts: public corpora that the anchor tells apart, or 0; needs evidence.
      evidence_pairs: above 0, tables are about pairs of neighbouring tokens, hashed to so many
        entries; else about single tokens. Needs evidence.
    """

    context: Literal["token", "document"] = "token"
    renormalize: bool = False
    fallback: bool = False
    evidence: float = 0.0
    evidence_parts: int = 0
    evidence_pairs: int = 0

    def __post_init__(self) -> None:
        some = self.evidence > 0 and self.context == "document" and math.isfinite(self.evidence)
        if self.evidence != 0 and not some:
            raise ConfigError(
                "Evidence is gathered over documents",
                got=f"evidence={self.evidence:g}, context={self.context!r}",
                expected='tokens above 0 with context "document", or 0',
                where="RouterConfig.evidence",
            )
        if self.evidence_parts and (self.evidence_parts < 2 or not self.evidence):
            raise ConfigError(
                "Public corpora are told apart by evidence, and from one another",
                got=f"evidence={self.evidence:g}, evidence_parts={self.evidence_parts}",
                where="RouterConfig.evidence_parts",
                fix="set it to 0, or to 2 corpora or more beside evidence",
            )
        known = 2 <= self.evidence_pairs <= MAX_PAIRS and self.evidence
        if self.evidence_pairs and not known:
            raise ConfigError(
                "Pairs of tokens are evidence, hashed to entries of a table",
                got=f"evidence={self.evidence:g}, evidence_pairs={self.evidence_pairs}",
                where="RouterConfig.evidence_pairs",
                fix=f"set it to 0, or to 2 to {MAX_PAIRS} entries (such as 65536) beside evidence",
            )

    def without_evidence(self) -> "RouterConfig":
        """The same router with nothing to look up."""
        return dataclasses.replace(self, evidence=0.0, evidence_parts=0, evidence_pairs=0)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an expert holds beyond its FFNs, its router rows and its biases (see `adapters`).

    Attributes:
      attention: rank of what it adds to every attention projection; 0 is none, as in the paper.
      head: rank of what it adds to the unembedding; 0 is none.
      norms: whether it adds to the scales of both norms of a layer.
    """

    attention: int = 0
    head: int = 0
    norms: bool = False

    def __post_init__(self) -> None:
        if min(self.attention, self.head) < 0:
            raise ConfigError(
                "A rank is a whole number from 0",
                got=f"attention={self.attention}, head={self.head}",
                where="AdapterConfig",
            )


# Of `ModelConfig`: keys that the first models did not have.
LATER_KEYS = ("adapters", "router.evidence", "router.evidence_parts", "router.evidence_pairs")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model: an OLMo 2 block with a mixture of full-size FFNs (paper section 3).

    Attributes:
      vocab_size: rows of the embedding, padding included.
      max_len: longest sequence the model is meant for, tokens.
      norm_placement: "post" norms the output of attention and mixture (OLMo 2), "pre" their input.
      qk_norm: "full" norms the whole query and key projections (OLMo 2), "head" each head alone
        (Qwen 3), "none" neither.
      tied_embeddings: the unembedding is the embedding.
      n_slots: capacity of the expert axis, the public expert (slot 0) included.
      n_active: experts used per token, at most `n_slots`.
      adapters: what every expert holds beyond its FFN.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ffn: int
    max_len: int = 4096
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    norm_placement: Literal["post", "pre"] = "post"
    qk_norm: Literal["full", "head", "none"] = "full"
    tied_embeddings: bool = False
    n_slots: int = 1
    n_active: int = 1
    adapters: AdapterConfig = AdapterConfig()
    router: RouterConfig = RouterConfig()

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head")
        _positive(self, "d_ffn", "max_len", "rope_theta", "norm_eps", "n_slots", "n_active")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                "n_heads must be a multiple of n_kv_heads",
                got=f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}",
                where="ModelConfig.n_kv_heads",
            )
        if self.d_head % 2:
            raise ConfigError(
                "RoPE rotates pairs: d_head must be even",
                got=self.d_head,
                where="ModelConfig.d_head",
            )
        if self.n_active > self.n_slots:
            raise ConfigError(
                "More active experts than slots",
                got=f"n_active={self.n_active}, n_slots={self.n_slots}",
                where="ModelConfig.n_active",
                fix="lower n_active or raise n_slots",
            )

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A dict that `from_dict(ModelConfig, …)` reads back.

        A key that came later is left out where it holds its default, so that files and digests of
        models that do without it stay what they were.
        """
        out = dataclasses.asdict(self)
        defaults = {
            f.name: dataclasses.asdict(f.default)
            for f in dataclasses.fields(self)
            if dataclasses.is_dataclass(f.default) and not isinstance(f.default, type)
        }
        for key in LATER_KEYS:
            *path, name = key.split(".")
            inside = functools.reduce(operator.getitem, path, out)
            if inside[name] == functools.reduce(operator.getitem, path, defaults)[name]:
                del inside[name]
        return out


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One token-shard directory in a mixture.

    Attributes:
      path: directory written by `flexolmo prepare`.
      weight: share of this source in the batches, relative to the other sources.
      public: whether the text is public; the router label loss asks "is this token the owner's?".
    """

    path: str
    weight: float = 1.0
    public: bool = False


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Batches of packed rows.

    Attributes:
      sources: the mixture to train on.
      heldout: what is scored during training, in bits per byte of each source alone; weights and
        `public` say nothing there.
      seq_len: tokens that each row predicts.
      batch_rows: rows per optimizer step over all hosts, gradient accumulation included.
      document_mask: attention and router context stay inside each document of a packed row.
    """

    sources: tuple[SourceConfig, ...] = ()
    heldout: tuple[SourceConfig, ...] = ()
    seq_len: int = 256
    batch_rows: int = 8
    document_mask: bool = True

    def __post_init__(self) -> None:
        _positive(self, "seq_len", "batch_rows")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with the paper's recipe as default (allenai/FlexOlmo 17360c0).

    Attributes:
      total_steps: length of the cosine, optimizer steps.
      stop_step: hard stop before the cosine ends (the reference stops at a fifth); 0 is none.
      final_lr_frac: floor of the cosine as a fraction of `peak_lr`.
      accumulate: micro-batches per optimizer step; divides `batch_rows`. The mean is that of one
        large batch, but for `load_balance`, which then asks every micro-batch to be even.
      z_loss: weight of mean(logsumexp(logits)^2) over predicted tokens.
      router_z_loss: the same over router logits, averaged over layers.
      router_label_loss: weight of the cross-entropy "is this token the owner's?" of the own row
        against the frozen public row; 0 is the paper.
      load_balance: weight of the load-balancing loss of many experts (stages "router", "joint");
        the reference tunes routers without, OLMoE trains mixtures with 0.01.
      router_lr_mult: learning rate of router rows and biases relative to `peak_lr`.
    """

    peak_lr: float = 9e-4
    total_steps: int = 1000
    warmup_steps: int = 100
    stop_step: int = 0
    final_lr_frac: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1
    z_loss: float = 1e-5
    router_z_loss: float = 1e-3
    router_label_loss: float = 0.0
    load_balance: float = 0.0
    router_lr_mult: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "peak_lr", "total_steps", "accumulate", "clip_norm")
        _not_negative(self, "warmup_steps", "stop_step")
        if self.warmup_steps >= self.total_steps:
            raise ConfigError(
                "The warmup leaves no step for the cosine",
                got=f"warmup_steps={self.warmup_steps}, total_steps={self.total_steps}",
                where="OptimConfig.warmup_steps",
                fix="lower warmup_steps or raise total_steps",
            )

    @property
    def last_step(self) -> int:
        """The step at which the run ends."""
        return min(self.stop_step, self.total_steps) if self.stop_step else self.total_steps


@dataclasses.dataclass(frozen=True)
class ExecConfig:
    """How a machine computes: never part of a model's identity.

    Attributes:
      compute_dtype: dtype of activations and matmuls; parameters that train stay float32.
      moe: dispatch of a mixture: "dense" runs every slot on every token (the reference), "blocked"
        and "ragged" sort tokens by slot; "auto" is resolved once at start and logged.
      expert_parallel: what travels between the devices of an expert axis: matrices ("fsdp"), all
        tokens of a group ("ring"), or each token to its slots' devices ("all_to_all"); which is
        cheapest depends on the pod. "auto" is fsdp without an expert axis.
      capacity: 0 drops nothing. In training, a slot takes at most this many times its mean share
        of a shard's assignments, which bounds memory where a router is not balanced; what is
        dropped depends on the batch, so evaluation, generation and serving refuse it.
      attention: "whole" makes all scores of a layer at once, "tiled" a tile at a time and never
        those after the tile (CPU), "splash" is the kernel for TPU; the same maths, summed in
        another order. A cache is read by "whole" always.
      remat: what the backward pass keeps, from least memory to least work: "full", "outputs",
        "projections", "dots", "none" (see `remat`).
      loss_chunk: positions of a row whose logits exist at once; 0 takes 256 on CPU, elsewhere
        2048 tokens of a device.
      decode: "stacked" takes a layer at a time out of the stack of all; "split" lays every matrix
        apart before decoding, which costs their memory once more and seconds of compilation, and
        skips unused slots; "auto" splits on one CPU device for long answers.
      mesh_data, mesh_expert, mesh_model: mesh shape; mesh_data 0 takes all remaining devices.
    """

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    moe: Literal["auto", "dense", "blocked", "ragged"] = "auto"
    expert_parallel: Literal["auto", "fsdp", "ring", "all_to_all"] = "auto"
    capacity: float = 0.0
    attention: Literal["auto", "whole", "tiled", "splash"] = "auto"
    remat: Literal["none", "dots", "projections", "outputs", "full"] = "none"
    loss_chunk: int = 0
    decode: Literal["auto", "stacked", "split"] = "auto"
    mesh_data: int = 0
    mesh_expert: int = 1
    mesh_model: int = 1

    def __post_init__(self) -> None:
        _positive(self, "mesh_expert", "mesh_model")
        _not_negative(self, "loss_chunk")
        if self.capacity < 0:
            raise ConfigError(
                "A capacity is a factor, or 0 for none", got=self.capacity, where="exec.capacity"
            )


@dataclasses.dataclass(frozen=True)
class RouterInitConfig:
    """Where router rows and biases start (paper section 3.3.1).

    Attributes:
      method: "embedding" (the paper) projects the mean document embedding to d_model with a fixed
        seeded orthogonal matrix and repeats it over layers. The others keep the public row at 0:
        "discriminant" and "hidden_mean" compare the anchor's hidden states on the owner's text
        with those on public text, per layer, as a log density ratio or a plain difference of
        means; "zeros" lets training find the row. "random" is the paper's control. "auto" is
        "zeros" and an effective bias of -1 beside an anchor with evidence, else "discriminant",
        and `recalibrate` in both cases.
      embedder: "hashed" (n-gram hashing, no assets) or "minilm" (all-MiniLM-L6-v2 asset).
      documents: documents (embedding) or packed rows (hidden states) looked at, of each side.
      norm: Euclidean norm that a row is scaled to; 0 leaves it as computed.
      bias: raw expert bias; the effective bias is -softplus of it.
      recalibrate: after training, fit rows and biases for a model of many owners (see
        `experts.router_init.recalibrate`).
    """

    method: Literal["embedding", "discriminant", "hidden_mean", "zeros", "random", "auto"] = (
        "embedding"
    )
    embedder: Literal["hashed", "minilm"] = "hashed"
    documents: int = 1000
    norm: float = 0.0
    bias: float = -4.0
    recalibrate: bool = False

    def __post_init__(self) -> None:
        _positive(self, "documents")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training job.

    Attributes:
      stage: "anchor" trains every weight of a dense model; "expert" trains one FFN stack with its
        router rows and biases beside the frozen anchor; "rows" trains those rows and biases alone,
        of an expert that is finished; "router" trains the router rows and biases
        of a stitched model; "joint" trains every weight of a mixture.
      model: the architecture, where a stage starts from drawn weights; with `anchor` it must be
        empty (None), since it is that of the model which `anchor` names.
      anchor: model directory that the stage starts from: the anchor of an expert, the stitched
        model of a router; "anchor" and "joint" go on with the weights of one, or draw new ones.
      expert_id: slug of the owner's expert (stages "expert" and "rows").
      expert: slice directory of the finished expert whose rows are trained (stage "rows").
      tokenizer: tokenizer.json of the data, where no `anchor` brings one.
      log_every: steps between records of the metrics.
      eval_every: steps between held-out scores; 0 makes none.
      eval_rows: rows of each held-out source that are scored; 0 takes all.
    """

    stage: Literal["anchor", "expert", "rows", "router", "joint"] = "anchor"
    model: ModelConfig | None = None
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    exec: ExecConfig = ExecConfig()
    router_init: RouterInitConfig = RouterInitConfig()
    anchor: str = ""
    expert_id: str = ""
    expert: str = ""
    tokenizer: str = ""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_rows: int = 64
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _positive(self, "log_every")
        _not_negative(self, "eval_every", "eval_rows")
        if self.exec.capacity and self.stage in ("anchor", "expert", "rows"):
            raise ConfigError(
                "A capacity drops assignments to full slots; in this stage every token uses every "
                "slot, and none can be full",
                got=f"exec.capacity={self.exec.capacity:g} in stage {self.stage!r}",
                where="exec.capacity",
                fix="leave it at 0",
            )
        if self.anchor or self.stage in ("expert", "rows", "router"):
            self._check_later_stage()
        elif self.model is None or not self.tokenizer:
            raise ConfigError(
                f"Stage {self.stage!r} needs a model and a tokenizer, or weights to start from",
                got=f"model={self.model}, tokenizer={self.tokenizer!r}",
                fix="set them, or name a model directory with --config.anchor",
            )
        if self.data.batch_rows % self.optim.accumulate:
            raise ConfigError(
                "batch_rows must be a multiple of accumulate",
                got=f"batch_rows={self.data.batch_rows}, accumulate={self.optim.accumulate}",
                where="RunConfig.optim.accumulate",
            )

    def _check_later_stage(self) -> None:
        owner = self.stage in ("expert", "rows")
        if not self.anchor or (owner and not self.expert_id):
            raise ConfigError(
                "An expert job needs an anchor and an expert id"
                if owner
                else "Router tuning needs a stitched model",
                got=f"anchor={self.anchor!r}, expert_id={self.expert_id!r}",
                fix="set --config.anchor and --config.expert_id",
            )
        named = EXPERT_ID.fullmatch(self.expert_id) and self.expert_id != "public"
        if owner and not named:
            raise ConfigError(
                "Not a name for an expert",
                got=repr(self.expert_id),
                expected="lower-case letters, digits, '-' and '_', and not 'public'",
                where="RunConfig.expert_id",
            )
        if (self.stage == "rows") != bool(self.expert):
            raise ConfigError(
                'Stage "rows" starts from a finished expert, and no other stage does',
                got=f"expert={self.expert!r} in stage {self.stage!r}",
                expected="a slice directory in stage rows, else nothing",
                where="RunConfig.expert",
            )
        if self.model is not None:
            raise ConfigError(
                f"Stage {self.stage!r} takes the architecture of the model that it starts from; "
                "it must not set its own",
                where="RunConfig.model",
            )

# SPDX-License-Identifier: Apache-2.0
"""A model or anchor as a Hugging Face directory, in the time of one pass and bounded memory.

`plan` reads JSON and the biases; `execute` reads every other value once, a layer at a time,
compares it with its digest and writes it. Experts that are not exported are never opened.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax import tree as trees
from flexolmo_jax.config import AdapterConfig, ModelConfig
from flexolmo_jax.data import tokenize
from flexolmo_jax.errors import ConfigError, Problem, RefusedError, nearest
from flexolmo_jax.experts import leafio, model_info, policy
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.files import atomic_directory, copy_listed, require_space, write_text
from flexolmo_jax.interop import assemble, hf_config, hf_extra, hf_import, hf_names
from flexolmo_jax.interop import safetensors_writer as writer

logger = logging.getLogger("flexolmo")
DEFAULT_SHARD = "5GB"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """An export that has passed every check which needs no weights but the biases.

    Attributes:
      pieces: the experts to export, in slot order, the public one first.
      config: of the exported model: as many slots as pieces.
      biases: expert to the largest absolute effective bias, where it is not 0.
      raw_biases: expert to its raw biases [L].
      notes: what a user should know about other programs.
    """

    info: model_info.ModelInfo
    pieces: tuple[slices.SliceInfo, ...]
    config: ModelConfig
    architecture: hf_config.Architecture
    dtype: str
    shard_bytes: int
    biases: dict[str, float]
    raw_biases: dict[str, np.ndarray]
    notes: tuple[str, ...]

    @property
    def experts(self) -> list[str]:
        """Ids in the order of their numbers in the file."""
        return [piece.expert for piece in self.pieces]

    @property
    def complete(self) -> bool:
        """Whether the file holds the whole model, unchanged."""
        tables = [self.info.content["shared"], *(p.manifest["leaves"] for p in self.pieces)]
        dtypes = {entry["dtype"] for table in tables for entry in table.values()}
        same = self.config == self.info.config and dtypes == {self.dtype}
        return same and not (self.biases or _left_out(self.config))


def plan(
    path: str | Path,
    *,
    allow: Collection[str] | None = None,
    deny: Collection[str] | None = None,
    active: int | None = None,
    dtype: str | None = None,
    shard_size: str = DEFAULT_SHARD,
    drop_bias: bool = False,
) -> ExportPlan:
    """Checks a model and what is asked of it.

    Args:
      allow, deny: experts to export (see `policy.allowed_slots`); all by default.
      active: experts per token; the model's own number by default, fewer if fewer are exported.
      dtype: "float32", or "bfloat16", to which float32 is rounded; as stored by default, float32
        if the model holds both.
      drop_bias: export the model without its expert biases, which changes what it computes.

    Raises:
      RefusedError: a damaged model, one that no class of transformers computes, or biases.
      ConfigError: options that do not fit the model.
    """
    shard_bytes = writer.parse_size(shard_size)
    info = model_info.read_info(path)
    mask = policy.allowed_slots(info.slots, info.config.n_slots, allow=allow, deny=deny)
    pieces = _pieces(info, mask)
    config = _config(info, mask, active)
    raw = {piece.expert: _leaf(piece, "bias") for piece in pieces}
    # Slot 0 has no bias, whatever is stored for it.
    sizes = {e: effective_bias(b) for e, b in raw.items() if info.slots[e] != policy.PUBLIC_SLOT}
    biases = {expert: size for expert, size in sizes.items() if size}
    architecture = _architecture(info, config, {} if drop_bias else biases)
    return ExportPlan(
        info=info,
        pieces=pieces,
        config=config,
        architecture=architecture,
        dtype=_dtype(info, pieces, dtype, dropped=["bias"] if biases else []),
        shard_bytes=shard_bytes,
        biases=biases,
        raw_biases=raw,
        notes=tuple(_notes(architecture, config)),
    )


def effective_bias(raw: np.ndarray) -> float:
    """Largest absolute value of -softplus(raw)."""
    return float(np.logaddexp(np.float32(0), raw.astype(np.float32)).max())


def _pieces(info: model_info.ModelInfo, mask: np.ndarray) -> tuple[slices.SliceInfo, ...]:
    """The manifests of the chosen experts, checked with the shared files; reads no weights."""
    pieces, problems = [], model_info.shared_file_problems(info)
    for expert in (e for e, slot in info.slots.items() if mask[slot]):
        piece, found = model_info.member_info(info, expert)
        problems += found
        if piece is not None:
            pieces.append(piece)
            problems += slices.listing_problems(piece)
    if not problems:
        problems += slices.dtype_problems(pieces)
        problems += model_info.anchor_problems(info, pieces[0])
    if problems:
        raise RefusedError(f"{info.path} cannot be exported", problems)
    return tuple(pieces)


def _config(info: model_info.ModelInfo, mask: np.ndarray, active: int | None) -> ModelConfig:
    """The configuration of the exported model: no empty slots."""
    c = info.config
    wanted = c.n_active if active is None else active
    if not 1 <= wanted <= c.n_slots:
        raise ConfigError(
            "The number of active experts does not fit the model",
            got=wanted,
            expected=f"1..{c.n_slots}",
            where="--active",
        )
    return c.replace(n_slots=int(mask.sum()), n_active=policy.clamp_active(wanted, mask))


def _architecture(
    info: model_info.ModelInfo, config: ModelConfig, biases: Mapping[str, float]
) -> hf_config.Architecture:
    """The class of transformers, or a refusal with everything that stands in the way."""
    problems, found, fix = [], None, None
    try:
        found = hf_config.architecture_for(config, str(info.path))
    except RefusedError as e:
        problems += e.problems
    for expert, size in biases.items():
        message = (
            f"expert {expert!r} has a bias of up to -{size:.6g} on its router logits; "
            "transformers and vLLM have none and would compute another model"
        )
        problems.append(Problem("expert-bias", str(info.path), "bias", message))
        fix = "add --drop-bias and --data DIR or --text FILE, which measures what that costs"
    if found is None or problems:
        fix = fix if found else None
        raise RefusedError("This model cannot be written for transformers", problems, fix=fix)
    return found


def _dtype(
    info: model_info.ModelInfo,
    pieces: tuple[slices.SliceInfo, ...],
    dtype: str | None,
    dropped: Collection[str],
) -> str:
    """The dtype asked for, else the widest of the leaves that will be written."""
    if dtype is not None:
        if dtype not in writer.CODES:
            raise ConfigError("Unknown dtype", got=dtype, fix=nearest(dtype, writer.CODES))
        return dtype
    tables = [info.content["shared"], *(p.manifest["leaves"] for p in pieces)]
    found = {e["dtype"] for table in tables for name, e in table.items() if name not in dropped}
    return "float32" if "float32" in found else "bfloat16"


def _left_out(config: ModelConfig) -> bool:
    """Whether an anchor says more of its experts than a file for transformers can: it is dense."""
    return bool(config.router.evidence) or config.adapters != AdapterConfig()


def _notes(architecture: hf_config.Architecture, config: ModelConfig) -> Iterator[str]:
    """What the file does not say, and where vLLM's FlexOlmo computes something else."""
    if _left_out(config):
        yield "what experts may hold beyond FFNs, and tables of evidence, are left out"
    if architecture.model_type != "flex_olmo":
        return
    if config.router.renormalize and config.n_active < config.n_slots:
        yield "vLLM's FlexOlmo ignores norm_topk_prob=true: it does not divide by the sum"
    if config.d_head * config.n_heads != config.d_model:
        yield "vLLM's FlexOlmo ignores head_dim and will not load heads of this size"
    if config.norm_eps != 1e-5:
        yield f"vLLM's FlexOlmo uses 1e-5 in the last norm, the model {config.norm_eps:g}"


def execute(
    export: ExportPlan, out: str | Path, *, dropped_bias: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Writes the directory, completely or not at all.

    Args:
      dropped_bias: what dropping the biases cost, for the record; needed if there are any.

    Returns:
      architecture, dtype, experts, active, files, tensors, bytes, complete, notes and digests.

    Raises:
      RefusedError: values that are not what the model lists, or not finite as written.
      MachineError: the disk has too little room.
    """
    out, info = Path(out), export.info
    if export.biases and dropped_bias is None:
        raise ConfigError("Biases are dropped only with a record of what that costs")
    source = _Source(export)
    tensors = list(source.tensors())
    require_space(out, sum(t.nbytes for t in tensors))
    with atomic_directory(out) as work:
        _write_texts(export, work, dropped_bias)
        kept = {}
        if not export.biases:
            kept = {(e, "bias"): raw for e, raw in export.raw_biases.items()}
        if not export.architecture.mixture:
            kept["public", "router"] = _leaf(export.pieces[0], "router")
        numbers = {key: value.astype(np.dtype(export.dtype)) for key, value in kept.items()}
        hf_extra.write_kept(work, numbers)
        files = writer.write_model(work, tensors, export.shard_bytes, logger.info)
        if problems := source.problems():
            raise RefusedError(f"{info.path} cannot be exported", problems)
    return {
        "architecture": export.architecture.name,
        "dtype": export.dtype,
        "experts": export.experts,
        "active": export.config.n_active,
        "files": files,
        "tensors": len(tensors),
        "bytes": sum(t.nbytes for t in tensors),
        "complete": export.complete,
        "notes": list(export.notes),
        "digests": {"anchor": info.anchor_digest, "model": info.model_digest},
    }


def _leaf(piece: slices.SliceInfo, name: str) -> np.ndarray:
    """One small leaf of an expert, checked."""
    reader = _Reader(piece.path / slices.PARAMS, name, piece.manifest["leaves"][name])
    leaf = reader.rows(0, reader.shape[0])
    problem = reader.problem()
    if problem is None and not leafio.all_finite(leaf):
        problem = Problem("not-finite", str(piece.path), name, "holds NaN or infinity")
    if problem is not None:
        raise RefusedError(f"{piece.path} cannot be exported", [problem])
    return leaf


class _Reader:
    """One leaf, read by rows from first to last, and its digest so far."""

    def __init__(self, folder: Path, name: str, entry: Mapping[str, Any]):
        self.folder, self.name, self.entry = folder, name, entry
        self.shape = tuple(entry["shape"])
        self._hash = hashlib.sha256(trees.leaf_header(np.dtype(entry["dtype"]), self.shape))

    def rows(self, start: int, stop: int) -> np.ndarray:
        rows = leafio.read_rows(self.folder, self.name, self.entry, start, stop)
        self._hash.update(rows.reshape(-1).view(np.uint8).data)
        return rows

    def problem(self) -> Problem | None:
        """What is wrong, once every row was read."""
        got = "sha256:" + self._hash.hexdigest()
        if got == self.entry["digest"]:
            return None
        message = f"values have {got}, listed {self.entry['digest']}"
        return Problem("leaf-digest", str(self.folder), self.name, message)


class _Source:
    """The tensors of an export, each made from rows that are read when it is written."""

    def __init__(self, export: ExportPlan):
        self.export, self.dtype = export, np.dtype(export.dtype)
        self.readers: list[_Reader] = []

    def tensors(self) -> Iterator[writer.Tensor]:
        """Embedding, layers, final norm and head, as transformers orders them."""
        rows = hf_names.rows(self.export.architecture, self.export.config)
        layered = [row for row in rows if hf_names.LAYER in row.template]
        by_name = {row.template: row for row in rows if row not in layered}
        # A tied model repeats its embedding: vLLM's head would stay empty without it.
        tied = dataclasses.replace(by_name[hf_names.EMBED], template=hf_names.UNEMBED)
        head = by_name.pop(hf_names.UNEMBED, tied)
        yield self._whole(by_name.pop(hf_names.EMBED))
        yield from self._layers(layered)
        for row in (*by_name.values(), head):
            yield self._whole(row)

    def problems(self) -> list[Problem]:
        """Every leaf that was not what the model lists."""
        return [p for reader in self.readers if (p := reader.problem())]

    def _reader(self, leaf: str, piece: slices.SliceInfo | None) -> _Reader:
        kind, name = leaf.split("/", 1)
        if kind == "shared":
            info = self.export.info
            reader = _Reader(info.shared_path, name, info.content["shared"][name])
        else:
            assert piece is not None
            reader = _Reader(piece.path / slices.PARAMS, name, piece.manifest["leaves"][name])
        self.readers.append(reader)
        return reader

    def _tensor(self, row: hf_names.Row, name: str, blocks: Any) -> writer.Tensor:
        def stored() -> Iterator[np.ndarray]:
            for block in blocks():
                block = np.ascontiguousarray(block).astype(self.dtype, copy=False)
                if not leafio.all_finite(block):
                    message = f"{name} holds NaN or infinity in {self.dtype.name}"
                    where = str(self.export.info.path)
                    raise RefusedError(
                        f"{where} cannot be exported",
                        [Problem("not-finite", where, row.leaf, message)],
                    )
                yield block

        return writer.Tensor(name, self.dtype.name, row.shape, stored)

    def _whole(self, row: hf_names.Row) -> writer.Tensor:
        """A tensor of a leaf without layers."""
        reader = self._reader(row.leaf, None)
        length = reader.shape[0]
        step = (
            length if row.transposed else max(1, leafio.BLOCK // (4 * math.prod(reader.shape[1:])))
        )

        def blocks() -> Iterator[np.ndarray]:
            for start in range(0, length, step):
                rows = reader.rows(start, min(start + step, length))
                yield from assemble.transposed(rows) if row.transposed else [rows]

        return self._tensor(row, row.name(), blocks)

    def _layers(self, rows: list[hf_names.Row]) -> Iterator[writer.Tensor]:
        """Layer by layer, each with its shared tensors, then one expert after another."""
        readers = {}
        for row in rows:
            own = self.export.pieces if row.leaf.startswith("experts/") else (None,)
            readers[row.template] = [self._reader(row.leaf, piece) for piece in own]
        for layer in range(self.export.config.n_layers):
            for row in rows:
                sources = readers[row.template]
                if row.leaf == hf_names.ROUTER_LEAF:
                    yield self._layer(row, row.name(layer), layer, sources)
                    continue
                for slot, reader in enumerate(sources):
                    yield self._layer(row, row.name(layer, slot), layer, [reader])

    def _layer(
        self, row: hf_names.Row, name: str, layer: int, readers: list[_Reader]
    ) -> writer.Tensor:
        def blocks() -> Iterator[np.ndarray]:
            parts = [reader.rows(layer, layer + 1) for reader in readers]
            # Of the router each expert has a row; of other leaves there is one part.
            part = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if row.transposed:
                yield from assemble.transposed(part.reshape(row.shape[::-1]))
            else:
                yield part.reshape(row.shape)

        return self._tensor(row, name, blocks)


def _write_texts(export: ExportPlan, work: Path, dropped_bias: Mapping[str, Any] | None) -> None:
    """config.json, generation_config.json and the tokenizer."""
    info, listed = export.info, export.info.content["files"]
    problems = _companion_problems(info)
    copy_listed(info.path, work, {model_info.TOKENIZER: info.tokenizer_digest}, problems)
    others = {name: listed[f"{model_info.COMPANIONS}/{name}"] for name in info.companions}
    copy_listed(info.path / model_info.COMPANIONS, work, others, problems)
    if problems:
        raise RefusedError(f"{info.path} cannot be exported", problems)
    tokenizer = tokenize.load(work / model_info.TOKENIZER)
    eos, pad = tokenize.eos_id(tokenizer), tokenizer.token_to_id(tokenize.PAD)
    extra = hf_extra.describe(
        info, export.pieces, complete=export.complete, dropped_bias=dropped_bias
    )
    config = hf_config.write(
        export.config,
        export.architecture,
        dtype=export.dtype,
        eos_id=eos,
        pad_id=pad,
        extra=extra,
    )
    _write_json(work / hf_config.NAME, config)
    generation = {"eos_token_id": eos, "pad_token_id": eos if pad is None else pad}
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(eos),
        "pad_token": tokenizer.id_to_token(eos if pad is None else pad),
        "model_max_length": export.config.max_len,
        "clean_up_tokenization_spaces": False,
    }
    for name, value in ((GENERATION_CONFIG, generation), (TOKENIZER_CONFIG, words)):
        if not (work / name).exists():
            _write_json(work / name, value)


def _companion_problems(info: model_info.ModelInfo) -> list[Problem]:
    """Files that a maker of models could hope to get loaded, or run, under another name."""
    return [
        Problem("file-extra", str(path), "", "not a file that belongs to a tokenizer")
        for name, path in info.companions.items()
        if not hf_import.is_companion(name)
    ]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

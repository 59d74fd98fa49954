# SPDX-License-Identifier: Apache-2.0
"""Package: the final weights of a training run as what is shipped, an anchor or an expert slice.

A run ends by writing W/final: the weights alone, without optimizer, random-number or iterator
state, and a final.json that says what they are.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax import checkpoint, distributed
from flexolmo_jax import tree as trees
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import CheckpointError, ConfigError, nearest
from flexolmo_jax.experts import leafio, model_dir, model_info, remote, tuned
from flexolmo_jax.experts import manifest as manifests
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.files import check_files, hash_files, list_files, write_text
from flexolmo_jax.storage import client, urls

FINAL, NAME, PARAMS, TOKENIZER = "final", "final.json", "params", "tokenizer.json"
STAGES = ("anchor", "expert", "router", "joint")
KEYS = {"kind", "schema", "digest", "stage", "expert_id", "model", "anchor_digest"}
KEYS |= {"tokenizer_digest", "training", "recipe", "files"}
# One word with a separator in it; prose and numbers are left alone.
PATH_LIKE = re.compile(r"~|\S*[/\\]\S*")


@dataclasses.dataclass(frozen=True)
class Final:
    """What W/final holds.

    Attributes:
      anchor_digest: of the anchor beside which an expert was trained; None for an anchor.
      training: steps, tokens and seed.
      recipe: how it was trained; its "router" entry is what `stitch` compares.
    """

    path: Path
    stage: str
    expert_id: str
    config: ModelConfig
    anchor_digest: str | None
    tokenizer_digest: str
    training: dict[str, int]
    recipe: dict[str, Any]


def write_final(
    workdir: str | Path,
    *,
    stage: str,
    params: Mapping[str, Any],
    config: ModelConfig,
    tokenizer_path: str | Path,
    training: Mapping[str, int],
    expert_id: str = "",
    anchor_digest: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    gathered: bool = False,
) -> None:
    """Writes W/final, replacing an older one only once the new one is complete.

    On several hosts each process writes the parts of `params` that its devices hold.

    Args:
      gathered: every process has all of `params` and no folder is shared: the first writes.
      stage: "anchor" or "joint", with params {"shared", "experts"} of every slot; "expert", with
        a slice; "router", with the router rows and biases of every slot.
      config: of the model that the stage trains or starts from.
      training: exactly steps, tokens and seed.

    Raises:
      ConfigError: an expert without an id or an anchor digest.
      CheckpointError: params of other names or shapes than stage and config say.
    """
    if stage not in STAGES:
        raise ConfigError("No stage ends like this", got=stage, fix=nearest(stage, STAGES))
    if stage == "expert" and not (manifests.is_slug(expert_id) and anchor_digest):
        raise ConfigError(
            "A finished expert needs an id and the digest of its anchor",
            got=f"expert_id={expert_id!r}, anchor_digest={anchor_digest!r}",
        )
    _require(stage, params, config)
    fresh = Path(workdir) / f"{FINAL}.next"
    with distributed.together("writing the final weights"):
        if distributed.first():
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
    if not gathered:
        checkpoint.save_tree(fresh / PARAMS, params)
    elif distributed.first():
        leafio.write_tree(fresh / PARAMS, leafio.leaves_of(params), fresh)
    content = {
        "kind": "final",
        "schema": manifests.SCHEMA,
        "stage": stage,
        "expert_id": expert_id,
        "model": config.to_json(),
        "anchor_digest": anchor_digest,
        "training": dict(training),
        "recipe": {"router": config.to_json()["router"], **dict(recipe or {})},
    }
    with distributed.together("writing the final weights"):
        if distributed.first():
            _finish(fresh, tokenizer_path, content)


def _require(stage: str, params: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuses params of other names or shapes than stage and config say."""
    found = slices.abstract_of(params)
    problems = checkpoint.leaf_problems(expected(stage, config), trees.flatten(found))
    problems = [p for p in problems if p.code != "leaf-dtype"]
    if problems:
        raise CheckpointError(
            f"These are not the weights of stage {stage!r}", got="; ".join(map(str, problems))
        )


def _finish(fresh: Path, tokenizer_path: str | Path, content: dict[str, Any]) -> None:
    """Lists and seals the final weights in `fresh`, then puts them in their place."""
    shutil.copyfile(tokenizer_path, fresh / TOKENIZER)
    files = hash_files(fresh, list_files(fresh)[0])
    content = {**content, "tokenizer_digest": files[TOKENIZER], "files": files}
    write_text(fresh / NAME, manifests.render(manifests.seal(content)))
    target = fresh.with_name(FINAL)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)
    read_final(target.parent)


def expected(stage: str, config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaf name to shape of the weights that a stage ends with."""
    piece = slices.expected_slice(config)
    if stage == "expert":
        return piece
    slots = 1 if stage == "anchor" else config.n_slots
    group = {
        name: jax.ShapeDtypeStruct((x.shape[0], slots, *x.shape[1:]), x.dtype)
        for name, x in piece.items()
    }
    if stage == "router":
        return {name: group[name] for name in ("router", "bias")}
    shared = model_info.expected_shared(config)
    return {f"experts/{n}": x for n, x in group.items()} | {
        f"shared/{n}": x for n, x in shared.items()
    }


def read_final(workdir: str | Path) -> Final:
    """Reads W/final/final.json and checks every file beside it.

    Raises:
      CheckpointError: not there (the run has not ended), or changed since it was written.
    """
    folder = remote.final_dir(workdir, FINAL, NAME)
    if not (folder / NAME).is_file():
        raise CheckpointError(
            "The run has no final weights",
            where=folder,
            fix="finish it with the same `flexolmo train` command, or name its workdir",
        )
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        value = json.loads(text)
        whole = isinstance(value, dict) and set(value) == KEYS and value == manifests.seal(value)
    except (ValueError, RecursionError):
        whole, text, value = False, "", {}
    if not whole or text != manifests.render(value):
        raise CheckpointError("final.json was changed or is of another version", where=folder)
    problems = check_files(folder, value["files"], ignore=[NAME])
    if problems:
        raise CheckpointError(
            "The final weights were changed", got="; ".join(map(str, problems)), where=folder
        )
    config = manifests.parse_config(value["model"])
    if not isinstance(config, ModelConfig):
        raise CheckpointError("final.json holds no usable model", got=config, where=folder)
    same = ("stage", "expert_id", "anchor_digest", "tokenizer_digest", "training", "recipe")
    return Final(path=folder, config=config, **{key: value[key] for key in same})


def read_params(final: Final) -> trees.Tree:
    """The weights in W/final as numpy arrays."""
    return checkpoint.restore_tree(final.path / PARAMS, _saved(final))


def _saved(final: Final) -> trees.Tree:
    """Shapes that the stage says, in the dtypes that were saved."""
    saved = checkpoint.read_metadata(final.path / PARAMS)
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, saved[name].dtype if name in saved else x.dtype)
        for name, x in expected(final.stage, final.config).items()
    }
    return trees.unflatten(wanted)


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """A leaf in W/final that is read when its values are wanted, and kept by nobody.

    Many hosts may have written it in parts, and one host need not have room for all leaves.

    Attributes:
      wanted: the whole tree that it is part of.
      slot: the only slot that it stands for, of a leaf [L, E, ...]; None is all.
    """

    folder: Path
    name: str
    wanted: trees.Tree
    slot: int | None = None

    @property
    def dtype(self) -> np.dtype:
        """As it was saved."""
        return np.dtype(trees.flatten(self.wanted)[self.name].dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the slot axis, if one slot was taken."""
        shape = trees.flatten(self.wanted)[self.name].shape
        return shape if self.slot is None else (shape[0], *shape[2:])

    def __getitem__(self, index: tuple[slice, int]) -> "_Lazy":
        """`leaf[:, slot]`, which is what taking a slot needs."""
        return dataclasses.replace(self, slot=index[1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = checkpoint.restore_tree(self.folder, self.wanted, only=[self.name])[self.name]
        array = found if self.slot is None else found[:, self.slot]
        return array if dtype is None else array.astype(dtype)


def _lazy_params(final: Final) -> trees.Tree:
    """The weights in W/final, each read when it is written elsewhere."""
    wanted = _saved(final)
    return trees.map_named(lambda name, _: _Lazy(final.path / PARAMS, name, wanted), wanted)


def package(
    run_dir: str | Path,
    out: str | Path,
    data_card: str | Mapping[str, Any] | None = None,
    model: str | Path | None = None,
) -> dict[str, Any]:
    """Turns a finished run into a model directory, or (an expert's) into a slice directory.

    Args:
      data_card: what the training text was: an object, a text, or a file with one of the two.
      model: the stitched model whose router was tuned (stage "router" only); None takes the one
        that the run's configuration names.

    Returns:
      kind, path and digests of what was written.

    Raises:
      CheckpointError: the run has no final weights, or they were changed.
      RefusedError: weights that `stitch` would refuse.
    """
    final = read_final(run_dir)
    card = read_card(data_card)
    recipe = without_paths(final.recipe)
    params = read_params(final) if final.stage == "router" else _lazy_params(final)
    if final.stage == "expert":
        return _package_slice(final, out, params, recipe, card)
    if final.stage == "router":
        info = tuned.write_tuned(
            out,
            model or _tuned_model(run_dir),
            params,
            model_digest=final.recipe["starts_from"],
            training=final.training,
            recipe=recipe,
            data_card=card,
        )
    else:
        info = _package_model(final, out, params, recipe, card)
    digests = {"anchor_digest": info.anchor_digest, "model_digest": info.model_digest}
    return {"kind": "model", "path": str(out), **digests}


def _package_slice(
    final: Final, out: str | Path, params: trees.Tree, recipe: dict, card: dict
) -> dict[str, Any]:
    piece = slices.write_slice(
        out,
        params,
        expert=final.expert_id,
        config=final.config,
        anchor_digest=final.anchor_digest,
        tokenizer_digest=final.tokenizer_digest,
        training=final.training,
        recipe=recipe,
        data_card=card,
    )
    digests = {"anchor_digest": final.anchor_digest, "manifest_digest": piece.digest}
    return {"kind": "slice", "expert": piece.expert, "path": str(out), **digests}


def _package_model(
    final: Final, out: str | Path, params: trees.Tree, recipe: dict, card: dict
) -> model_info.ModelInfo:
    """An anchor, or a mixture whose experts trained together and are nobody's."""
    joint = final.stage == "joint"
    experts = [
        model_dir.Member(
            f"joint-{slot}", slices.take_slot(params["experts"], slot), final.training, recipe
        )
        for slot in range(1, final.config.n_slots if joint else 1)
    ]
    stage = {"stage": "joint"} if joint else {}
    return model_dir.write_model(
        out,
        final.config if joint else final.config.replace(n_slots=1, n_active=1),
        params["shared"],
        slices.take_slot(params["experts"], 0),
        final.path / TOKENIZER,
        {**final.training, **stage, "recipe": recipe, "data_card": card},
        experts=experts,
    )


def _tuned_model(run_dir: str | Path) -> str:
    """The stitched model that the configuration of a router run names."""
    where = urls.child(run_dir, "config.json")
    if isinstance(where, Path):
        text = where.read_bytes() if where.is_file() else None
    else:
        text = client.read(where)
    named = json.loads(text)["anchor"] if text else ""
    if not named:
        raise ConfigError(
            "The model whose router was tuned is not known",
            where=where,
            fix="name it with --model",
        )
    return named


def read_card(data_card: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """A data card as an object.

    Raises:
      ConfigError: a file that is meant to hold JSON and does not hold an object.
    """
    if data_card is None or isinstance(data_card, Mapping):
        return dict(data_card or {})
    path = Path(data_card)
    is_file = len(data_card) < 4096 and "\n" not in data_card and path.is_file()
    text = path.read_text(encoding="utf-8") if is_file else data_card
    if not (is_file and path.suffix == ".json"):
        return {"text": text.strip()}
    try:
        card = json.loads(text)
    except ValueError as e:
        raise ConfigError("The data card is not JSON", got=e, where=path) from e
    if not isinstance(card, dict):
        raise ConfigError(
            "The data card must be a JSON object", got=type(card).__name__, where=path
        )
    return card


def without_paths(value: Any) -> Any:
    """A copy in which every text that is a path or URL keeps only its last part.

    A recipe is collected from the run's configuration, so its paths say something about the
    owner's machine; the data card is the owner's own text and is shipped as it is.
    """
    if isinstance(value, Mapping):
        return {key: without_paths(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(v) for v in value]
    if isinstance(value, str) and PATH_LIKE.fullmatch(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value

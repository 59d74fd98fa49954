# SPDX-License-Identifier: Apache-2.0
"""Scores of every method of one seed: on held-out text, with what it may choose chosen before.

All choices (temperatures, active experts, rates) are made on the tuning split alone.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flexolmo_jax import adapters, evidence, inference, model, moe, stages, tree
from flexolmo_jax.config import AdapterConfig, ModelConfig, RouterConfig
from flexolmo_jax.data import shards
from flexolmo_jax.experts import model_dir
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.experts.manifest import PUBLIC
from flexolmo_jax.study import answers, rivals, rows, weights
from flexolmo_jax.study.design import Study
from flexolmo_jax.study.jobs import RIVAL, UNIONS, Layout
from flexolmo_jax.study.rivals import Method, choose
from flexolmo_jax.study.scorer import Losses, Scorer, read_text

Say = Callable[[str], None]
# Active experts that a mixture may choose among.
ACTIVE = (2, 3, 4)
RANKS = (4, 16, 64)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Experts in slots, and all that is needed to run them; a dense model has one slot.

    Attributes:
      group: slot 0 is public, slot i the i-th owner's.
      config: the architecture with its router.
    """

    shared: tree.Tree
    group: tree.Tree
    config: ModelConfig

    @property
    def n_slots(self) -> int:
        """Slots; a dense model is a mixture of one."""
        return self.group["bias"].shape[1]

    def losses(self, scorer: Scorer, n_active: int, **kwargs: Any) -> Losses:
        """Losses of the mixture on every text."""
        return scorer.losses(
            self.shared, self.group, config=self.config, n_active=n_active, **kwargs
        )

    def replace(self, **changes: Any) -> "Mixture":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def falling_back(self) -> "Mixture":
        """The same experts, with the public one always active."""
        router = dataclasses.replace(self.config.router, fallback=True)
        return self.replace(config=self.config.replace(router=router))


def stitched(layout: Layout, recipe: str, seed: int) -> Mixture:
    """A recipe's finished experts of one seed, beside the anchor that they agree on."""
    info, params, _ = model_dir.load_model(layout.anchor_of(recipe))
    public = slices.take_slot(params["experts"], 0)
    own = [weights.final(layout.run(recipe, o, seed)) for o in layout.study.owners]
    return Mixture(params["shared"], weights.stacked([public, *own]), info.config)


class Judge:
    """All that the methods of one seed are scored with."""

    def __init__(self, layout: Layout, seed: int, say: Say):
        self.at, self.study, self.seed, self.say = layout, layout.study, seed, say
        self.info, self.anchor, _ = model_dir.load_model(layout.anchor)
        size = inference.token_bytes(self.info)
        rows = self.study.rows
        self.heldout = self._scorer("heldout", rows["heldout"], size)
        self.tuning = self._scorer("tuning", rows["tuning"], size)
        # Many sets of owners are compared with each other on the same, smaller part of the text.
        self.part = self._scorer("heldout", rows["sets"], size)

    def _scorer(self, split: str, rows: int, size: np.ndarray) -> Scorer:
        texts = {
            d: read_text(self.at.data(d, split), size, rows=rows, seq_len=self.study.seq_len)
            for d in self.study.domains
        }
        return Scorer(self.info.config, texts)

    @functools.cached_property
    def dense(self) -> dict[str, tree.Tree]:
        """The anchor and every owner's dense model."""
        owned = {o: weights.final(self.at.run("dense", o, self.seed)) for o in self.study.owners}
        return {PUBLIC: self.anchor, **owned}

    def classes(self) -> dict[str, rivals.Classes]:
        """What a classifier may know of everybody's training text: by tokens, and by pairs of them.

        Rivals are given what a recipe of ours reads: counts of pairs, and public text by corpus.
        """
        recipes = self.study.recipes.values()
        public = [self.at.data(d, "train") for d in self.study.public]
        parts = any(r.parts for r in recipes)
        # Public first: where nothing is known, the first class is taken.
        paths = [(PUBLIC, [p]) for p in public] if parts else [(PUBLIC, public)]
        paths += [(o, [self.at.own(o) / "train"]) for o in self.study.owners]
        kinds = {"tokens": self.info.config.replace(router=RouterConfig())}
        if pairs := max(r.pairs for r in recipes):
            router = RouterConfig("document", evidence=1.0, evidence_pairs=pairs)
            kinds["pairs"] = self.info.config.replace(router=router)
        opened = [(n, [shards.open_shards(p) for p in ps]) for n, ps in paths]
        return {
            kind: [
                (name, np.sum([evidence.count(c, s.tokens(0, s.n_tokens)) for s in texts], axis=0))
                for name, texts in opened
            ]
            for kind, c in kinds.items()
        }

    @functools.cached_property
    def recipes(self) -> dict[str, Mixture]:
        """Recipe to its experts, each trained alone, in one mixture."""
        return {name: stitched(self.at, name, self.seed) for name in self.study.recipes}

    def trained_together(self, run: str, start: str) -> Mixture:
        """A mixture that a run trained: all of it, or its router rows."""
        folder = self.at.start(start) if start == "union" else self.at.model(start, self.seed)
        info, params, _ = model_dir.load_model(folder)
        found = weights.final(self.at.run(RIVAL, run, self.seed))
        if "shared" in found:
            return Mixture(found["shared"], found["experts"], info.config)
        group = weights.with_rows(params["experts"], found)
        return Mixture(params["shared"], group, info.config)

    def choose_active(self, m: Mixture) -> Method:
        """A mixture with the number of active experts chosen on the tuning split."""
        values = sorted({min(k, len(self.study.owners) + 1) for k in ACTIVE})
        k, record = choose(values, lambda k: self.tuning.bits(m.losses(self.tuning, k)))
        return Method(m.losses(self.heldout, k), k, {"active": record})


def methods(j: Judge) -> dict[str, tuple[Method, str]]:
    """Method to its losses, and the kind of its cost ("dense", "mixture")."""
    found: dict[str, tuple[Method, str]] = {}

    def add(name: str, method: Method, kind: str) -> None:
        found[name] = (method, kind)
        mean = np.mean(list(j.heldout.bits(method.losses).values()))
        j.say(f"{name:<24} mean {mean:.4f}")

    for name, m in single_models(j):
        if name in j.study.recipes:
            for variant, method in variants(j, name).items():
                add(f"{name}{variant}", method, "mixture")
        elif m.n_slots == 1:
            add(name, Method(m.losses(j.heldout, 1)), "dense")
        else:
            add(name, j.choose_active(m), "mixture")
    if j.study.rivals:
        splits = [rivals.Split.of(s, j.dense) for s in (j.tuning, j.heldout)]
        for name, method in rivals.of_dense_models(*splits, j.dense, j.classes()).items():
            add(name, method, "dense")
    return found


def single_models(j: Judge) -> Iterator[tuple[str, Mixture]]:
    """Every method that is one model, and its weights: one in memory after the other."""

    def dense(made: tree.Tree) -> Mixture:
        return Mixture(made["shared"], made["experts"], j.info.config)

    yield "anchor", dense(j.anchor)
    yield from j.recipes.items()
    if not j.study.rivals:
        return
    yield "dense-public", dense(weights.final(j.at.run("dense", PUBLIC, j.seed)))
    for owner in j.study.owners:
        yield f"dense-{owner}", dense(j.dense[owner])
    yield "soup", dense(weights.average(list(j.dense.values())))
    yield "btx", j.trained_together("router-btx", "btx")
    for name in UNIONS:
        yield f"unrestricted{name.removeprefix('union')}", j.trained_together(name, "union")


def variants(j: Judge, name: str) -> dict[str, Method]:
    """A recipe, and what can be made of its experts without training any of them again."""
    m = j.recipes[name]
    out = {"": j.choose_active(m)}
    k = out[""].forward

    def changed(other: Mixture) -> Method:
        return Method(other.losses(j.heldout, k), k, out[""].chosen)

    out["-no-bias"] = changed(m.replace(group=weights.without_bias(m.group)))
    if j.study.recipes[name].tuned:
        out["-tuned"] = j.choose_active(j.trained_together(f"router-{name}", name))
        if j.study.dense:
            out["-uncoordinated"] = j.choose_active(_uncoordinated(j, m))
    if j.study.brief:
        return out
    out["+fallback"] = j.choose_active(m.falling_back())
    out |= {f"-rank{rank}": changed(other) for rank, other in _low_rank(m)}
    return out | {"+rate": _with_rate(j, m)}


def _uncoordinated(j: Judge, m: Mixture) -> Mixture:
    """The same rows with FFNs that never saw the anchor's beside them: those of dense models.

    Source: the paper's Table 1, "no coordination"; which rows it has there is not stated.
    """
    pieces = [slices.take_slot(m.group, e) for e in range(m.n_slots)]
    for piece, owner in zip(pieces[1:], j.study.owners, strict=True):
        dense = slices.take_slot(j.dense[owner]["experts"], 0)
        piece |= {name: dense[name] for name in moe.WEIGHTS}
    return m.replace(group=weights.stacked(pieces))


def _with_rate(j: Judge, m: Mixture) -> Method:
    """Biases set from public text so that each expert is preferred on a chosen share of it."""
    logits = rows.public_logits(j.at, m.shared, m.group, m.config)

    def biased(rate: float) -> Mixture:
        return m.replace(group={**m.group, "bias": rows.bias_at_rate(logits, m.group, rate)})

    def tuning(rate: float) -> dict[str, float]:
        return j.tuning.bits(biased(rate).losses(j.tuning, rows.ACTIVE))

    rate, record = choose(rows.RATES, tuning)
    return Method(biased(rate).losses(j.heldout, rows.ACTIVE), rows.ACTIVE, {"rate": record})


def _low_rank(m: Mixture) -> Iterator[tuple[int, Mixture]]:
    """The mixture with changes of each rank, one after the other."""
    pieces = [slices.take_slot(m.group, e) for e in range(m.n_slots)]
    cut = [weights.low_rank(piece, pieces[0], RANKS) for piece in pieces[1:]]
    for rank in RANKS:
        yield rank, m.replace(group=weights.stacked([pieces[0], *(c[rank] for c in cut)]))


def pairs(j: Judge, name: str) -> dict[str, dict[str, float]]:
    """Each expert beside the anchor, on its own and on public text: both always active."""
    m, out = j.recipes[name], {}
    for slot, (owner, whose) in enumerate(j.study.owners.items(), start=1):
        allowed = [e in (0, slot) for e in range(len(j.study.owners) + 1)]
        losses = m.losses(j.heldout, 2, allowed=allowed, domains=(*j.study.public, whose.domain))
        out[owner] = j.heldout.bits(losses)
    return out


def active_curve(j: Judge, m: Mixture) -> dict[str, dict[str, float]]:
    """Active experts to bits per byte of each domain."""
    counts = range(1, m.n_slots + 1)
    return {str(k): j.part.bits(m.losses(j.part, k)) for k in counts}


def opt_out(j: Judge, m: Mixture, n_active: int) -> dict[str, Any]:
    """Denied owners, none, one, and more at once, to bits per byte of each domain; and exactness.

    `exact` is, for each number of owners who leave, of one set of them (another for each seed):
    it compares the losses without them bit for bit with those of a mixture whose slots were never
    filled.
    """
    owners, out = tuple(j.study.owners), {}
    exact, checked = {}, {}
    for count in range(j.study.together + 1):
        sets = list(itertools.combinations(owners, count))
        for i, gone in enumerate(sets):
            allowed = [True, *(o not in gone for o in owners)]
            denied = m.losses(j.part, n_active, allowed=allowed)
            out["+".join(gone)] = j.part.bits(denied)
            if gone and i == j.seed % len(sets):
                pieces = [
                    slices.take_slot(m.group, e) if x else None for e, x in enumerate(allowed)
                ]
                never = m.replace(group=weights.stacked(pieces))
                absent = never.losses(j.part, n_active, allowed=allowed)
                exact[str(count)] = all(np.array_equal(denied[d], absent[d]) for d in denied)
                checked[str(count)] = "+".join(gone)
    return {"bpb": out, "exact": exact, "checked": checked}


def owners_curve(
    j: Judge, m: Mixture, n_active: int, order: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Owners who join one after the other, their number to bits per byte of each domain.

    Who has not joined is denied, which is the same as a mixture without them, bit for bit.
    """
    out = {}
    for n in range(len(order) + 1):
        allowed = [True, *(o in order[:n] for o in j.study.owners)]
        out[str(n)] = j.part.bits(m.losses(j.part, n_active, allowed=allowed))
    return out


def recipe_of(study: Study, name: str) -> str:
    """The recipe that a method is made of; "" for the others."""
    return max((r for r in study.recipes if name.startswith(r)), key=len, default="")


def config_of(j: Judge, name: str) -> ModelConfig:
    """The architecture of what a method is made of.

    Rivals are made of FFNs alone, whatever the anchor has room for.
    """
    recipe = recipe_of(j.study, name)
    if recipe:
        return j.recipes[recipe].config
    return j.info.config.replace(adapters=AdapterConfig())


def train_flops(study: Study, config: ModelConfig, name: str) -> float:
    """FLOPs of all training beyond the anchor's that a method needs, over all owners.

    Counted as `stages.flops_per_token` does: no recomputation, no weight gradient of what is
    frozen.

    Args:
      config: as `config_of` gives it.
    """
    owners, tokens = len(study.owners), study.owner_tokens
    recipe = recipe_of(study, name)
    router_tokens = study.steps["router"] * study.batch_rows * study.seq_len

    def cost(stage: str, active: int = 1) -> float:
        c = config.replace(n_slots=max(active, 1), n_active=max(active, 1))
        return stages.flops_per_token(c, stage, study.seq_len)

    if name == "anchor":
        return 0.0
    if name.startswith("unrestricted"):
        steps = study.steps[name.replace("unrestricted", "union")]
        return steps * study.batch_rows * study.seq_len * cost("joint", 2)
    if recipe:
        # The FFNs of dense models, beside rows that were trained with others.
        again = owners * tokens * cost("anchor") if name.endswith("-uncoordinated") else 0.0
        tuned = router_tokens * cost("router", 2) if name.endswith("-tuned") else 0.0
        after = owners * router_tokens * cost("rows") if study.recipes[recipe].rows_of else 0.0
        return owners * tokens * cost("expert") + tuned + after + again
    if name.startswith("dense-"):
        return tokens * cost("anchor")
    router = router_tokens * cost("router", 2) if name == "btx" else 0.0
    return owners * tokens * cost("anchor") + router


def active_params(config: ModelConfig, method: Method, kind: str) -> int:
    """Parameters that a token passes through, embeddings counted once per model.

    Tables of evidence are looked up, and rivals have none: they are not counted.
    """
    one = config.replace(n_slots=1, n_active=1, adapters=AdapterConfig(), router=RouterConfig())
    dense = tree.count(model.abstract_params(one))
    if kind == "dense":
        return dense * method.forward
    expert = 3 * config.n_layers * config.d_model * config.d_ffn + adapters.size(config)
    return dense + expert * (method.forward - 1)


def run(layout: Layout, seed: int, say: Say) -> dict[str, Any]:
    """Everything that one seed's results are made of, as JSON values."""
    j = Judge(layout, seed, say)
    out: dict[str, Any] = {"seed": seed, "anchor_digest": j.info.anchor_digest, "methods": {}}
    found = methods(j)
    answered = _answered(j, found) if j.study.tasks else {}
    for name, (method, kind) in found.items():
        config = config_of(j, name)
        out["methods"][name] = {
            "bpb": {d: s.summary() for d, s in j.heldout.scores(method.losses).items()},
            "train_flops": train_flops(j.study, config, name),
            "active_params": active_params(config, method, kind),
            "chosen": dict(method.chosen),
            "gap_stderr": {
                ours: j.heldout.gap_stderr(found[ours][0].losses, method.losses)
                for ours in j.study.compared
            },
        }
        if name in answered:
            out["methods"][name]["tasks"] = answered[name]
    out["recipes"] = {name: _sets(j, name, out["methods"]) for name in j.study.recipes}
    return out


def _sets(j: Judge, name: str, scored: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's experts in pairs and in sets, as JSON values.

    Args:
      scored: of every method, with the active experts chosen for it.
    """
    m = j.recipes[name]
    k = scored[name]["chosen"]["active"]["value"]
    out = {
        "pairs": pairs(j, name),
        "opt_out": opt_out(j, m, k),
        "part": j.part.bits(j.part.losses(j.anchor["shared"], j.anchor["experts"])),
        "shipped": _shipped(m),
    }
    if not j.study.brief:
        back = m.falling_back()
        k_back = scored[f"{name}+fallback"]["chosen"]["active"]["value"]
        out |= {
            "active": active_curve(j, m),
            "active_fallback": active_curve(j, back),
            "owners": {n: owners_curve(j, m, k, o) for n, o in j.study.orders.items()},
            "opt_out_fallback": opt_out(j, back, k_back),
        }
    j.say(f"{name}: {', '.join(out)}")
    return out


def _answered(j: Judge, found: Mapping[str, tuple[Method, str]]) -> dict[str, answers.Answers]:
    """What every method that is one model answers, with the active experts chosen for it."""
    out = {}
    for name, m in single_models(j):
        opened = answers.opened(j.info, tuple(j.study.owners), m.shared, m.group, m.config)
        k = found[name][0].forward
        out[name] = answers.ask(opened, j.study.tasks, active=k, limit=j.study.questions)
        j.say(f"{name:<24} {len(out[name])} tasks answered")
    return out


def _shipped(m: Mixture) -> dict[str, int]:
    """Numbers that one owner ships, by rank of the change; "full" is every one."""
    piece = slices.take_slot(m.group, 1)
    out = {str(rank): weights.low_rank_size(piece, rank) for rank in RANKS}
    return {**out, "full": tree.count(piece)}

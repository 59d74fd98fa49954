# SPDX-License-Identifier: Apache-2.0
"""What a study compares: data only. `experiments/studies.py` has the numbers."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from flexolmo_jax.config import EXPERT_ID, AdapterConfig
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.typed import from_dict


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train experts alone.

    Attributes:
      context: what the router judges, "document" or "token" (the paper).
      public_share: of public text in an expert's batches.
      overrides: `KEY=VALUE` of the expert's configuration.
      adapters: what an expert holds beyond its FFN.
      rows_of: the recipe whose finished experts it takes, with rows that each owner tunes alone
        afterwards; what trains an expert is then that recipe's.
      evidence: `RouterConfig.evidence`.
      parts: whether the anchor tells public corpora apart by evidence.
      pairs: `RouterConfig.evidence_pairs`.
      tuned: tune the router afterwards as the paper does, on proxies and public text.
      says: what it is, for tables.
    """

    context: str
    public_share: float
    overrides: tuple[str, ...] = ()
    adapters: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    rows_of: str = ""
    evidence: float = 0.0
    parts: bool = False
    pairs: int = 0
    tuned: bool = False
    says: str = ""

    @property
    def agreed(self) -> str:
        """Name of the anchor that its experts agree on: one for every set of choices above."""
        held = {"evidence": self.evidence, "parts": self.parts, "pairs": self.pairs}
        held |= dataclasses.asdict(self.adapters)
        return "-".join([self.context, *(f"{name}{n:g}" for name, n in held.items() if n)])


@dataclasses.dataclass(frozen=True)
class Owner:
    """Whose text: a closed domain, or the documents of it whose number modulo `of` is in `parts`.

    Parts of two owners of one domain may overlap.
    """

    domain: str
    parts: tuple[int, ...] = (0,)
    of: int = 1

    @property
    def has_parts(self) -> bool:
        """Whether the parts are some, and parts that there are."""
        return bool(self.parts) and all(0 <= part < self.of for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
      size: of the models, as experiment files name it.
      seeds: every method is trained with the seeds 0, 1, ...; the anchor is trained once.
      anchor: an existing anchor, or "" to make one. Its tokenizer is used.
      imported: the pinned model that the anchor is imported from; "" trains one.
      vocab: tokens of the tokenizer of an anchor that is trained.
      public, closed, unseen: corpora; nobody trains on the last.
      owners: name to its text; every expert, and every dense model, has one owner.
      orders: name to an order in which owners join.
      together: owners who leave at once, at most.
      brief: recipes are scored as they are, without biases, tuned, and as owners leave; else also
        with all that can be made of their experts, and by active experts and owners who join.
      rivals: whether dense models, what is made of them, and unrestricted mixtures are trained.
      bytes: text per corpus: "public", "closed" (training), "heldout".
      steps: optimizer steps: "anchor", "owner" (each expert and each dense model), "router";
        "union-data" and "union-flops" of unrestricted mixtures, as many tokens and as many FLOPs
        as all owners together.
      rows: rows per corpus that are scored: "heldout"; "tuning", on which choices are made; "sets"
        of held-out text, on which sets of owners and numbers of active experts are compared.
      proxy_tokens: of each owner's proxies, if a router is tuned.
      trials: values that every method may choose among on the tuning split, at most.
      tasks: benchmark tasks and suites that every method which is one model answers.
      questions: of each task, at most.
      overrides: `KEY=VALUE` of every training's configuration.
    """

    suite: str
    size: str
    seeds: int
    anchor: str
    public: tuple[str, ...]
    closed: tuple[str, ...]
    unseen: tuple[str, ...]
    owners: Mapping[str, Owner]
    orders: Mapping[str, tuple[str, ...]]
    together: int
    recipes: Mapping[str, Recipe]
    rivals: bool
    bytes: Mapping[str, int]
    steps: Mapping[str, int]
    seq_len: int
    batch_rows: int
    rows: Mapping[str, int]
    proxy_tokens: int = 50_000
    trials: int = 4
    brief: bool = False
    imported: str = ""
    vocab: int = 4096
    tasks: tuple[str, ...] = ()
    questions: int = 100
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError("A study needs a seed", got=self.seeds, where="--seeds")
        lost = [n for n, r in self.recipes.items() if r.rows_of and r.rows_of not in self.recipes]
        if lost:
            raise ConfigError(
                "The recipe whose experts are tuned is not part of the study", got=", ".join(lost)
            )
        bad = [n for n in (*self.recipes, *self.owners) if not EXPERT_ID.fullmatch(n)]
        if bad:
            raise ConfigError(
                "Not a name for a recipe or an owner", got=", ".join(bad), where=self.suite
            )
        for name, whose in self.owners.items():
            if whose.domain not in self.closed or not whose.has_parts:
                raise ConfigError(
                    f"The owner {name!r} has no text",
                    got=whose,
                    expected=f"parts below `of` of one of {', '.join(self.closed)}",
                    where=self.suite,
                )
        strangers = {n for order in self.orders.values() for n in order} - set(self.owners)
        if strangers:
            raise ConfigError(
                "Somebody joins who is no owner", got=", ".join(sorted(strangers)), where=self.suite
            )

    @property
    def dense(self) -> bool:
        """Whether owners train dense models too: rivals, and the ablation without coordination."""
        return self.rivals or self.brief

    @property
    def close(self) -> tuple[str, ...]:
        """Variants of a recipe that are looked at closely: what they keep, and who leaves."""
        return ("",) if self.brief else ("", "+fallback")

    @property
    def compared(self) -> tuple[str, ...]:
        """Methods that all others are compared with: the first recipe and its close variants."""
        return tuple(f"{next(iter(self.recipes))}{variant}" for variant in self.close)

    @property
    def domains(self) -> tuple[str, ...]:
        """Every corpus, in the order of tables."""
        return (*self.public, *self.closed, *self.unseen)

    @property
    def owner_tokens(self) -> int:
        """Tokens that each owner trains on, whatever the method."""
        return self.steps["owner"] * self.batch_rows * self.seq_len


def path_of(folder: Path, suite: str) -> Path:
    """Where a folder keeps what a suite compares; several suites may share a folder."""
    return folder / f"study-{suite}.json"


def write(study: Study, folder: Path) -> Path:
    """Writes the study into its folder; the same study may come back with other seeds.

    Raises:
      ConfigError: another study lives there.
    """
    path = path_of(folder, study.suite)
    text = json.dumps(dataclasses.asdict(study), indent=1) + "\n"
    if (
        path.is_file()
        and dataclasses.replace(read(folder, study.suite), seeds=study.seeds) != study
    ):
        raise ConfigError(
            "The folder holds this suite with other numbers",
            where=folder,
            fix="choose another --out, or repeat the options that it was started with",
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, suite: str) -> Study:
    """A study of a folder.

    Raises:
      ConfigError: none there, or one that this version cannot read.
    """
    path = path_of(folder, suite)
    if not path.is_file():
        raise ConfigError("No study here", where=path, fix="start it with `flexolmo study`")
    return from_dict(Study, json.loads(path.read_text(encoding="utf-8")), path.name)

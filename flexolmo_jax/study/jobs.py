# SPDX-License-Identifier: Apache-2.0
"""The jobs of a study: every training is a process of its own, as an owner would start it."""

import dataclasses
import sys
from pathlib import Path

from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs.plan import Job, Plan
from flexolmo_jax.study.design import Recipe, Study

PROGRAM = (sys.executable, "-m", "flexolmo_jax")
# Files of the checkout: a study trains by the same experiment files that a user would edit.
EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
RIVAL = "rival"
# Unrestricted mixtures: as many tokens, and as many FLOPs, as all owners together.
UNIONS = ("union-data", "union-flops")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the pieces of a study lie."""

    root: Path
    study: Study

    @property
    def anchor(self) -> Path:
        """The anchor that everything starts from."""
        return Path(self.study.anchor) if self.study.anchor else self.root / "anchor"

    def start(self, name: str) -> Path:
        """A directory that trainings start from: of a recipe's anchor, "union", "proxies"."""
        return self.root / "starts" / name

    def anchor_of(self, recipe: str) -> Path:
        """The anchor of a recipe's experts."""
        return self.start(self.study.recipes[recipe].agreed)

    @property
    def anchors(self) -> dict[str, Recipe]:
        """The anchors that recipes agree on, by name, each with one recipe that says what it is."""
        return {recipe.agreed: recipe for recipe in self.study.recipes.values()}

    def data(self, domain: str, split: str) -> Path:
        """Token shards."""
        return self.root / "data" / domain / split

    def own(self, owner: str) -> Path:
        """The folder of an owner's training text."""
        whose = self.study.owners[owner]
        if whose.of == 1:
            return self.data(whose.domain, "train").parent
        return self.start("owners") / owner

    def run(self, kind: str, name: str, seed: int) -> Path:
        """Workdir of a training: of an owner by a recipe, or of a rival."""
        return self.root / "runs" / f"{kind}-{name}-s{seed}"

    def model(self, name: str, seed: int) -> Path:
        """A model that is made between trainings."""
        return self.root / "models" / f"{name}-s{seed}"

    def scores(self, seed: int) -> Path:
        """What the judge found."""
        return self.root / f"scores-{self.study.suite}-s{seed}.json"


def plan(study: Study, root: Path, assets: str) -> Plan:
    """All jobs of a study, in the order in which they can run."""
    maker = _Maker(Layout(root, study), {"FLEXOLMO_ASSETS": assets})
    jobs = [*maker.data(), *maker.anchor(), *maker.starts()]
    for seed in range(study.seeds):
        jobs += maker.seed(seed)
    name = f"study-{study.suite}"
    return Plan(name=name, workdir=str(root), jobs=tuple(jobs), family="study")


class _Maker:
    def __init__(self, where: Layout, env: dict[str, str]):
        self.at, self.study = where, where.study
        # Programs that another training has compiled are not compiled again.
        # Jobs that share an accelerator must not take all of its memory at their start.
        self.env = {
            **env,
            "JAX_COMPILATION_CACHE_DIR": str(where.root / "cache"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }

    def tokenizer(self) -> tuple[list[Job], Path]:
        """What makes the tokenizer, and the file: that of an anchor which exists, or a new one."""
        study = self.study
        if study.anchor:
            return [], self.at.anchor / "tokenizer.json"
        if study.imported:
            made = self.at.anchor
            command = ("import", "--from", "gguf", study.imported, "--out", str(made))
            job = self._job("import:anchor", command, outputs=[made], expected=20)
            return [job], made / "tokenizer.json"
        path = self.at.root / "tokenizer.json"
        command = ("prepare", "--source", *study.public, "--train-tokenizer", str(study.vocab))
        command += ("--tokenizer", str(path), "--max-bytes", str(study.bytes["public"]))
        return [self._job("tokenizer", command, outputs=[path], expected=15)], path

    def data(self) -> list[Job]:
        jobs, tokenizer = self.tokenizer()
        needs = tuple(j.name for j in jobs)
        for domain in self.study.domains:
            unseen = domain in self.study.unseen
            for split in ("tuning", "heldout") if unseen else ("train", "tuning", "heldout"):
                kind = "public" if domain in self.study.public else "closed"
                size = self.study.bytes[kind if split == "train" else "heldout"]
                out = self.at.data(domain, split)
                command = ("prepare", "--source", domain, "--split", split)
                command += ("--max-bytes", str(size), "--out", str(out))
                command += ("--tokenizer", str(tokenizer))
                name = f"prepare:{domain}:{split}"
                jobs.append(self._job(name, command, needs, [tokenizer], [out], expected=4))
        return jobs

    def anchor(self) -> list[Job]:
        if self.study.anchor or self.study.imported:
            return []
        study, tokenizer = self.study, self.at.root / "tokenizer.json"
        config = f"anchor.py:size={study.size},data={self.at.root / 'data'},tokenizer={tokenizer}"
        config += f",domains={'+'.join(study.public)}"
        run = self.at.run("anchor", "public", 0)
        shards = [self.at.data(d, s) for d in study.public for s in ("train", "heldout")]
        needs = tuple(f"prepare:{d}:{s}" for d in study.public for s in ("train", "heldout"))
        vocab = (f"model.vocab_size={study.vocab}",)
        train = self._train("anchor", "public", 0, config, "anchor", needs, shards, vocab)
        package = ("package", "--run", str(run), "--out", str(self.at.anchor))
        files, made = [run / "final"], [self.at.anchor]
        return [train, self._job("package:anchor", package, (train.name,), files, made, 6)]

    def starts(self) -> list[Job]:
        made = [self.at.start(name) for name in (*self.at.anchors, "union")]
        made += [self.at.start("proxies") / o for o in self._tuned_owners()]
        made += [self.at.own(o) for o, whose in self.study.owners.items() if whose.of > 1]
        shards = [self.at.data(d, "train") for d in (*self.study.public, *self.study.closed)]
        needs = tuple(f"prepare:{p.parent.name}:train" for p in shards)
        if not self.study.anchor:
            needs += ("import:anchor" if self.study.imported else "package:anchor",)
        inputs = [self.at.anchor, *shards]
        return [self._study_job("starts", "starts", needs, inputs, made, expected=60)]

    def _tuned_owners(self) -> tuple[str, ...]:
        tuned = any(r.tuned for r in self.study.recipes.values())
        return tuple(self.study.owners) if tuned else ()

    def seed(self, seed: int) -> list[Job]:
        """Every training, model and score of one seed."""
        trained = [job for recipe in self.study.recipes for job in self._experts(recipe, seed)]
        if self.study.dense:
            trained += [self._dense(o, (self.at.own(o),), seed) for o in self.study.owners]
        if self.study.rivals:
            public = tuple(self.at.data(d, "train").parent for d in self.study.public)
            trained.append(self._dense("public", public, seed))
            trained += [self._union(name, seed) for name in UNIONS]
        tuned = [r for r, recipe in self.study.recipes.items() if recipe.tuned]
        mixed = [*tuned, *(["btx"] if self.study.rivals else [])]
        # With the slices they are stitched from, so that none of an earlier run is taken.
        models = [self.at.model(name, seed) for name in mixed]
        models += [self.at.model(f"{r}-{o}", seed) for r in tuned for o in self.study.owners]
        finals = [Path(out) for job in trained for out in job.outputs if job.state]
        names = tuple(job.name for job in trained)
        # Two recipes may tune rows of the same experts, which are packaged once.
        jobs = list({job.name: job for job in trained}.values())
        if mixed:
            jobs.append(
                self._study_job(
                    f"models:s{seed}", "models", (*names, "starts"), finals, models, seed, 40
                )
            )
        routers = [self._router(name, seed) for name in mixed]
        jobs += routers
        texts = [self.at.data(d, s) for d in self.study.domains for s in ("tuning", "heldout")]
        needs = (*names, *(j.name for j in routers))
        needs += tuple(f"prepare:{p.parent.name}:{p.name}" for p in texts)
        inputs = [*finals, *(Path(o) for j in routers for o in j.outputs), *texts]
        out = [self.at.scores(seed)]
        return [*jobs, self._study_job(f"judge:s{seed}", "judge", needs, inputs, out, seed, 400)]

    def _experts(self, recipe: str, seed: int) -> list[Job]:
        """Experts of a recipe, or the rows of finished ones."""
        jobs = []
        for owner in self.study.owners:
            of = self.study.recipes[recipe].rows_of
            if not of:
                jobs.append(self._expert(recipe, owner, seed))
                continue
            done, made = self.at.run(of, owner, seed), self.at.model(f"{of}-{owner}", seed)
            package = ("package", "--run", str(done), "--out", str(made))
            name, needs = f"package:{of}:{owner}:s{seed}", (f"train:{of}:{owner}:s{seed}",)
            jobs.append(self._job(name, package, needs, [done / "final"], [made], 6))
            jobs.append(self._expert(recipe, owner, seed, made, name))
        return jobs

    def _expert(
        self, recipe: str, owner: str, seed: int, finished: Path | None = None, after: str = ""
    ) -> Job:
        """One owner's training: of an expert, or of the rows of a finished one."""
        r, study = self.study.recipes[recipe], self.study
        public = [self.at.data(d, "train").parent for d in study.public]
        own = self.at.own(owner)
        kind = "rows" if finished else "expert"
        config = f"{kind}.py:size={study.size},expert={owner},anchor={self.at.anchor_of(recipe)}"
        config += f",own={own},public={'+'.join(map(str, public))},public_share={r.public_share}"
        shards = [p / "train" for p in (own, *public)]
        inputs = [*shards, self.at.anchor_of(recipe)]
        if finished is None:
            needs = ("starts",)
            return self._train(recipe, owner, seed, config, "owner", needs, inputs, r.overrides)
        config, inputs = f"{config},slice={finished}", [*inputs, finished]
        return self._train(recipe, owner, seed, config, "router", (after,), inputs, r.overrides)

    def _dense(self, name: str, own: tuple[Path, ...], seed: int) -> Job:
        config = f"dense.py:size={self.study.size},anchor={self.at.anchor}"
        config += f",own={'+'.join(map(str, own))}"
        inputs = [self.at.anchor, *(p / "train" for p in own)]
        return self._train("dense", name, seed, config, "owner", ("starts",), inputs)

    def _union(self, name: str, seed: int) -> Job:
        """One mixture on everybody's text."""
        start = self.at.start("union")
        config = f"stitched.py:size={self.study.size},start={start},data={self.at.root / 'data'}"
        domains = (*self.study.closed, *self.study.public)
        config += f",domains={'+'.join(domains)}"
        inputs = [start, *(self.at.data(d, "train") for d in domains)]
        return self._train(RIVAL, name, seed, config, name, ("starts",), inputs)

    def _router(self, name: str, seed: int) -> Job:
        """Tuning of router rows: of a recipe's model on proxies too, of BTX on public text."""
        model = self.at.model(name, seed)
        public = [self.at.data(d, "train").parent for d in self.study.public]
        proxies = self._tuned_owners() if name in self.study.recipes else ()
        folders = [self.at.start("proxies") / o for o in proxies]
        config = f"router.py:size={self.study.size},model={model}"
        config += f",public={'+'.join(map(str, public))},proxies={'+'.join(map(str, folders))}"
        inputs = [model, *(p / "train" for p in (*public, *folders))]
        needs = (f"models:s{seed}",)
        return self._train(RIVAL, f"router-{name}", seed, config, "router", needs, inputs)

    def _train(
        self,
        kind: str,
        name: str,
        seed: int,
        config: str,
        steps: str,
        needs: tuple[str, ...],
        inputs: list[Path],
        overrides: tuple[str, ...] = (),
    ) -> Job:
        run = self.at.run(kind, name, seed)
        count = self.study.steps[steps]
        settings = (
            f"optim.total_steps={count}",
            f"optim.warmup_steps={max(1, count // 10)}",
            "optim.stop_step=0",
            f"data.batch_rows={self.study.batch_rows}",
            f"data.seq_len={self.study.seq_len}",
            f"checkpoint_every={count}",
            "eval_every=0",
            f"seed={seed}",
        )
        command = ("train", "--config", f"{EXPERIMENTS}/{config}", "--workdir", str(run))
        command += tuple(f"--config.{s}" for s in (*settings, *self.study.overrides, *overrides))
        files = [EXPERIMENTS / config.partition(":")[0], EXPERIMENTS / "common.py"]
        job_name = f"train:{kind}:{name}:s{seed}"
        job = self._job(job_name, command, needs, [*files, *inputs], [run / "final"], count / 2)
        return dataclasses.replace(job, state=(str(run),), workdir=str(run))

    def _study_job(
        self,
        name: str,
        part: str,
        needs: tuple[str, ...],
        inputs: list[Path],
        outputs: list[Path],
        seed: int = 0,
        expected: float = 0.0,
    ) -> Job:
        """A part of `flexolmo study` itself."""
        command = ("study", "--suite", self.study.suite, "--out", str(self.at.root))
        command += ("--only", part, "--seed", str(seed))
        return self._job(name, command, needs, inputs, outputs, expected)

    def _job(
        self,
        name: str,
        command: tuple[str, ...],
        needs: tuple[str, ...] = (),
        inputs: list[Path] | tuple[Path, ...] = (),
        outputs: list[Path] | tuple[Path, ...] = (),
        expected: float = 0.0,
    ) -> Job:
        return Job(
            name=name,
            command=(*PROGRAM, *command),
            needs=needs,
            inputs=tuple(map(str, inputs)),
            outputs=tuple(map(str, outputs)),
            env=self.env,
            workdir=str(self.at.root),
            expected_s=expected,
        )


def check_checkout() -> None:
    """Refuses to start where the experiment files are not.

    Raises:
      ConfigError: the package runs without its checkout.
    """
    if not (EXPERIMENTS / "studies.py").is_file():
        fix = "clone the repository and run the study there"
        raise ConfigError("A study needs the experiments of a checkout", where=EXPERIMENTS, fix=fix)

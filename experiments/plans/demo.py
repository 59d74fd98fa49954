# SPDX-License-Identifier: Apache-2.0
"""The plan of the demo: public text and an anchor, four owners apart, one model, its evaluation.

Command: flexolmo launch --plan experiments/plans/demo.py:workdir=runs/demo
    (`flexolmo demo` runs the same plan, fetches the assets first and writes the report.)
Cost:    about ten minutes on two CPU cores; quick=true a few minutes, to prove the path only.

Each owner's jobs are given the anchor, that owner's text and public text, and nothing else.
"""

import sys
from pathlib import Path

from experiments import common
from flexolmo_jax import configfile
from flexolmo_jax.jobs.plan import Job, Plan

PROGRAM = (sys.executable, "-m", "flexolmo_jax")
EXPERIMENTS = Path(__file__).resolve().parents[1]
# Bytes of text per domain: enough that no job reads the same page many times.
TRAIN_BYTES, HELDOUT_BYTES, EVAL_ROWS = 6_000_000, 400_000, 128
QUICK_BYTES, QUICK_HELDOUT_BYTES, QUICK_EVAL_ROWS = 1_000_000, 100_000, 16
# A small model's operations rarely fill two cores from one device; two devices share the batch.
# The number is fixed, so that sums are ordered alike on every machine.
TWO_DEVICES = {"JAX_NUM_CPU_DEVICES": "2"}
QUICK_STEPS = {"anchor": 120, "expert": 40}


def get_plan(arg: str = "") -> Plan:
    """Returns the jobs of the demo."""
    a = common.parse_arg(arg, workdir="runs/demo", seed=0, quick=False, assets="")
    root = configfile.argument_path(a.workdir, "The workdir of the demo")
    demo = _Demo(root, a.seed, a.quick, a.assets)
    jobs = [*demo.data(), *demo.anchor()]
    for domain in common.CLOSED:
        jobs += demo.expert(domain)
    jobs += demo.model()
    closed = {d: (str(demo.root / "data" / d),) for d in common.CLOSED}
    return Plan(name="demo", workdir=str(demo.root), jobs=tuple(jobs), closed=closed)


class _Demo:
    """The pieces of the plan for one workdir."""

    def __init__(self, root: Path, seed: int, quick: bool, assets: str):
        self.root, self.seed, self.quick = root, seed, quick
        self.tokenizer = root / "tokenizer.json"
        self.env = {"FLEXOLMO_ASSETS": assets} if assets else {}

    def data(self) -> list[Job]:
        """A tokenizer from public text alone, and each domain's token shards."""
        size = str(QUICK_BYTES if self.quick else TRAIN_BYTES)
        vocab = str(common.sizes()["tiny"]["vocab_size"])
        seed = ("--seed", str(self.seed))
        train = ("prepare", "--source", *common.PUBLIC, "--train-tokenizer", vocab)
        limits = ("--max-bytes", size, *seed)
        jobs = [
            Job(
                name="tokenizer",
                command=(*PROGRAM, *train, "--tokenizer", str(self.tokenizer), *limits),
                outputs=(str(self.tokenizer),),
                env=self.env,
                expected_s=15,
            )
        ]
        heldout = str(QUICK_HELDOUT_BYTES if self.quick else HELDOUT_BYTES)
        for domain in (*common.PUBLIC, *common.CLOSED):
            for split, limit in (("train", size), ("heldout", heldout)):
                out = str(self.root / "data" / domain / split)
                options = ("--source", domain, "--split", split, "--max-bytes", limit, *seed)
                where = ("--tokenizer", str(self.tokenizer), "--out", out)
                jobs.append(
                    Job(
                        name=f"prepare:{domain}:{split}",
                        command=(*PROGRAM, "prepare", *options, *where),
                        needs=("tokenizer",),
                        inputs=(str(self.tokenizer),),
                        outputs=(out,),
                        owner=domain if domain in common.CLOSED else "",
                        env=self.env,
                        expected_s=5,
                    )
                )
        return jobs

    def anchor(self) -> list[Job]:
        """Train and package the anchor on public text."""
        data = self._shards(*common.PUBLIC)
        config = f"anchor.py:size=tiny,data={self.root / 'data'},tokenizer={self.tokenizer}"
        needs = tuple(f"prepare:{d}:{s}" for d in common.PUBLIC for s in ("train", "heldout"))
        train = self._train("anchor", "anchor", config, needs, data, "", 330)
        return [train, self._package("anchor", self.root / "anchor", "")]

    def expert(self, domain: str) -> list[Job]:
        """Train and package one owner's expert."""
        public = [str(self.root / "data" / d) for d in common.PUBLIC]
        own, anchor = str(self.root / "data" / domain), str(self.root / "anchor")
        config = (
            f"expert.py:size=tiny,expert={domain},anchor={anchor},own={own},"
            f"public={'+'.join(public)}"
        )
        needs = ("package:anchor", f"prepare:{domain}:train", f"prepare:{domain}:heldout")
        inputs = [anchor, *self._shards(domain, *common.PUBLIC)]
        train = self._train(domain, "expert", config, needs, inputs, domain, 110)
        return [train, self._package(domain, self.root / "slices" / domain, domain)]

    def model(self) -> list[Job]:
        """Stitch, verify and evaluate."""
        slices = [str(self.root / "slices" / d) for d in common.CLOSED]
        experts = [item for s in slices for item in ("--expert", s)]
        anchor, model = str(self.root / "anchor"), str(self.root / "stitched")
        active = ("--active", str(common.stitched_sizes()["tiny"]["n_active"]))
        rows = str(QUICK_EVAL_ROWS if self.quick else EVAL_ROWS)
        length = str(common.TINY_BATCH["seq_len"])
        evaluate = ("demo", "--only", "evaluate", "--workdir", str(self.root))
        options = ("--rows", rows, "--seq-len", length, "--seed", str(self.seed))
        heldout = [
            str(self.root / "data" / d / "heldout") for d in (*common.PUBLIC, *common.CLOSED)
        ]
        return [
            Job(
                name="stitch",
                command=(*PROGRAM, "stitch", "--anchor", anchor, *experts, *active, "--out", model),
                needs=("package:anchor", *(f"package:{d}" for d in common.CLOSED)),
                inputs=(anchor, *slices),
                outputs=(model,),
                expected_s=6,
            ),
            Job(
                name="verify",
                command=(*PROGRAM, "verify", model),
                needs=("stitch",),
                inputs=(model,),
                expected_s=5,
            ),
            Job(
                name="evaluate",
                command=(*PROGRAM, *evaluate, *options),
                needs=("verify",),
                inputs=(model, *heldout),
                outputs=(str(self.root / "evaluation.json"),),
                expected_s=20 if self.quick else 90,
            ),
        ]

    def _train(
        self,
        name: str,
        stage: str,
        config: str,
        needs: tuple[str, ...],
        inputs: list[str],
        owner: str,
        expected_s: float,
    ) -> Job:
        workdir = self.root / "runs" / name
        command = [*PROGRAM, "train", "--config", f"{EXPERIMENTS}/{config}"]
        command += ["--workdir", str(workdir), f"--config.seed={self.seed}"]
        if self.quick:
            steps = QUICK_STEPS[stage]
            command.append(f"--config.optim.total_steps={steps}")
            command.append(f"--config.optim.warmup_steps={steps // 5}")
        files = (str(EXPERIMENTS / f"{stage}.py"), str(EXPERIMENTS / "common.py"))
        return Job(
            name=f"train:{name}",
            command=tuple(command),
            needs=needs,
            inputs=(*files, *inputs),
            outputs=(str(workdir / "final"),),
            state=(str(workdir),),
            workdir=str(workdir),
            owner=owner,
            env=TWO_DEVICES,
            expected_s=expected_s / (6 if self.quick else 1),
        )

    def _shards(self, *domains: str) -> list[str]:
        return [str(self.root / "data" / d / s) for d in domains for s in ("train", "heldout")]

    def _package(self, name: str, out: Path, owner: str) -> Job:
        run = str(self.root / "runs" / name)
        return Job(
            name=f"package:{name}",
            command=(*PROGRAM, "package", "--run", run, "--out", str(out)),
            needs=(f"train:{name}",),
            inputs=(f"{run}/final",),
            outputs=(str(out),),
            owner=owner,
            expected_s=6,
        )

# SPDX-License-Identifier: Apache-2.0
"""The graph of jobs of several owners: anchor, experts apart, one model, its router, its scores.

Every job of an owner runs under the owner's identity on the owner's slice, reads the owner's bucket
and the exchange, and writes its checkpoints to the owner's bucket. What others need (the anchor,
the slices, the stitched model) goes through the exchange.
"""

import dataclasses

from experiments import common
from flexolmo_jax.jobs.plan import Job, Plan, Resources

PROGRAM = ("flexolmo",)


@dataclasses.dataclass(frozen=True)
class Slice:
    """TPU slices (or, with an empty topology, nodes) of one job, and how its batch is cut.

    Attributes:
      rows: of a batch that one chip computes at once; the rest is accumulated.
    """

    accelerator: str = ""
    topology: str = ""
    slices: int = 1
    zone: str = ""
    rows: int = 1

    def resources(self, identity: str, bucket: str) -> Resources:
        """What a job on it asks for."""
        region = self.zone.rpartition("-")[0]
        return Resources(
            accelerator=self.accelerator,
            topology=self.topology,
            slices=self.slices,
            region=region,
            zone=self.zone,
            identity=identity,
            bucket=bucket,
        )

    def chips(self) -> int:
        """All chips of a TPU slice."""
        count = self.slices
        for side in filter(None, self.topology.split("x")):
            count *= int(side)
        return count


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who trains one expert, and where.

    Attributes:
      bucket: holds data/train and data/heldout (token shards); nobody else may read it.
      identity: service account that may read the bucket and the exchange.
    """

    id: str
    bucket: str
    identity: str
    slice: Slice


@dataclasses.dataclass(frozen=True)
class Consortium:
    """All that differs from one such plan to the next.

    Attributes:
      size, stitched: names in `common.sizes()` and `common.stitched_sizes()`.
      home: bucket of the jobs that belong to nobody.
      exchange: read by all; owners write their slices to it.
      public: token-shard directories, with train and heldout, all in one directory.
      proxies: the same, for tuning the router; empty leaves that out.
      anchor: an existing anchor; empty trains one.
      cpu: cores and GiB of the jobs that compute nothing.
      tasks: what models are scored on; bpb is of the held-out public text.
    """

    name: str
    size: str
    stitched: str
    workdir: str
    home: str
    exchange: str
    identity: str
    owners: tuple[Owner, ...]
    public: tuple[str, ...]
    big: Slice
    small: Slice
    anchor_slice: Slice
    proxies: tuple[str, ...] = ()
    anchor: str = ""
    tokenizer: str = ""
    tasks: str = "bpb,mc9:rc,mmlu"
    cpu: tuple[int, int] = (16, 64)
    settings: dict[str, str] = dataclasses.field(default_factory=dict)

    def plan(self) -> Plan:
        """The whole graph."""
        jobs = [*self._anchor(), *(j for o in self.owners for j in self._expert(o))]
        jobs += [*self._model(), *self._router(), *self._scores()]
        return Plan(
            name=self.name,
            workdir=self.workdir,
            jobs=tuple(jobs),
            closed={o.id: (f"{o.bucket}/data",) for o in self.owners},
            exchange=self.exchange,
            settings=self.settings,
        )

    @property
    def _anchor_path(self) -> str:
        return self.anchor or f"{self.exchange}/anchor"

    @property
    def _texts(self) -> str:
        """The directory that the public sources are in."""
        return self.public[0].rpartition("/")[0]

    def _slice_path(self, owner: Owner) -> str:
        return f"{self.exchange}/slices/{owner.id}"

    def _anchor(self) -> list[Job]:
        if self.anchor:
            return []
        domains = "+".join(path.rpartition("/")[2] for path in self.public)
        config = f"experiments/anchor.py:size={self.size},data={self._texts},"
        config += f"domains={domains},tokenizer={self.tokenizer}"
        train = self._train("anchor", config, None, self.anchor_slice, self.public, ())
        return [train, self._package("anchor", None, f"{self.exchange}/anchor")]

    def _expert(self, owner: Owner) -> list[Job]:
        own = f"{owner.bucket}/data"
        config = (
            f"experiments/expert.py:size={self.size},expert={owner.id},"
            f"anchor={self._anchor_path},own={own},public={'+'.join(self.public)}"
        )
        needs = () if self.anchor else ("package:anchor",)
        inputs = (self._anchor_path, own, *self.public)
        train = self._train(owner.id, config, owner, owner.slice, inputs, needs)
        return [train, self._package(owner.id, owner, self._slice_path(owner))]

    def _model(self) -> list[Job]:
        slices = [self._slice_path(o) for o in self.owners]
        model = f"{self.exchange}/stitched"
        shape = common.stitched_sizes()[self.stitched]
        options = ["--slots", str(shape["n_slots"]), "--active", str(shape["n_active"])]
        options += [word for path in slices for word in ("--expert", path)]
        parts = (() if self.anchor else ("anchor",)) + tuple(o.id for o in self.owners)
        needs = tuple(f"package:{name}" for name in parts)
        command = ("stitch", "--anchor", self._anchor_path, *options, "--out", model)
        stitch = self._cpu("stitch", command, needs, (self._anchor_path, *slices), (model,))
        verify = self._cpu("verify", ("verify", model), ("stitch",), (model,), ())
        return [stitch, verify]

    def _router(self) -> list[Job]:
        if not self.proxies:
            return []
        model = f"{self.exchange}/stitched"
        config = (
            f"experiments/router.py:size={self.stitched},model={model},"
            f"proxies={'+'.join(self.proxies)},public={'+'.join(self.public)}"
        )
        inputs = (model, *self.proxies, *self.public)
        train = self._train("router", config, None, self.big, inputs, ("verify",))
        return [train, self._package("router", None, f"{self.exchange}/tuned", model)]

    def _scores(self) -> list[Job]:
        """Scores of the anchor, the model, the model without each owner, and the tuned one."""
        model, after = f"{self.exchange}/stitched", "verify"
        jobs = [self._score("anchor", self._anchor_path, (), after)]
        jobs.append(self._score("stitched", model, (), after))
        for owner in self.owners:
            jobs.append(self._score(f"without-{owner.id}", model, ("--deny", owner.id), after))
        if self.proxies:
            jobs.append(self._score("tuned", f"{self.exchange}/tuned", (), "package:router"))
        return jobs

    def _score(self, name: str, model: str, options: tuple[str, ...], after: str) -> Job:
        words = ("eval", "--model", model, *options, "--tasks", self.tasks, "--data", self._texts)
        dense = model == self._anchor_path
        shape = f"anchor.py:size={self.size}" if dense else f"stitched.py:size={self.stitched}"
        return Job(
            name=f"eval:{name}",
            command=(*PROGRAM, *words),
            needs=(after,),
            inputs=(model, *self.public),
            planned=("--config", f"experiments/{shape}", "--stage", "eval"),
            resources=self.small.resources(identity=self.identity, bucket=self.home),
        )

    def _train(
        self,
        name: str,
        config: str,
        owner: Owner | None,
        where: Slice,
        inputs: tuple[str, ...],
        needs: tuple[str, ...],
    ) -> Job:
        bucket = owner.bucket if owner else self.home
        run = f"{bucket}/runs/{name}"
        tuned = f"stitched.py:size={self.stitched}"
        shape = tuned if name == "router" else f"anchor.py:size={self.size}"
        command = [*PROGRAM, "train", "--config", config, "--workdir", run]
        if where.topology and self.size != "tiny":
            router = name == "router"
            rows = common.PAPER_ROUTER_ROWS if router else common.PAPER_BATCH["batch_rows"]
            pieces = max(1, rows // (where.chips() * where.rows))
            command.append(f"--config.optim.accumulate={pieces}")
        return Job(
            name=f"train:{name}",
            command=tuple(command),
            needs=needs,
            inputs=inputs,
            outputs=(f"{run}/final",),
            state=(run,),
            owner=owner.id if owner else "",
            planned=("--model", f"experiments/{shape}"),
            resources=where.resources(
                identity=owner.identity if owner else self.identity, bucket=bucket
            ),
        )

    def _package(self, name: str, owner: Owner | None, out: str, model: str = "") -> Job:
        """A run turned into what is shipped; a tuned router's beside the model that it is of."""
        bucket = owner.bucket if owner else self.home
        run = f"{bucket}/runs/{name}"
        return self._cpu(
            f"package:{name}",
            ("package", "--run", run, "--out", out, *(("--model", model) if model else ())),
            (f"train:{name}",),
            (f"{run}/final", *((model,) if model else ())),
            (out,),
            owner,
        )

    def _cpu(
        self,
        name: str,
        command: tuple[str, ...],
        needs: tuple[str, ...],
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        owner: Owner | None = None,
    ) -> Job:
        cores, memory = self.cpu
        return Job(
            name=name,
            command=(*PROGRAM, *command),
            needs=needs,
            inputs=inputs,
            outputs=outputs,
            owner=owner.id if owner else "",
            resources=Resources(
                cpus=cores,
                memory_gib=memory,
                identity=owner.identity if owner else self.identity,
                bucket=owner.bucket if owner else self.home,
            ),
        )

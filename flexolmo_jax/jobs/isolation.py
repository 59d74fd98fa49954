# SPDX-License-Identifier: Apache-2.0
"""What a job may know of the owners: its own owner's data, bucket and identity, no other's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs import places

if TYPE_CHECKING:
    from flexolmo_jax.jobs.plan import Job, Plan


@dataclasses.dataclass(frozen=True)
class _Secret:
    """Something of one owner that no job of another may mention."""

    owner: str
    kind: str
    value: str

    def is_in(self, job: Job) -> bool:
        """Whether a job mentions it."""
        if self.kind == "identity" and "@" not in self.value:
            # A short name may be a word of any command; as an identity it is one.
            return self.value in (job.resources.identity, *job.env.values())
        find = places.mentions_bucket if self.kind == "bucket" else places.mentions
        return any(find(text, self.value) for text in _visible(job))


def check(plan: Plan) -> None:
    """An owner's job must not even learn where another owner's closed data is.

    Jobs that belong to nobody never mention a bucket or an identity of an owner, and, where the
    plan declares an exchange, no closed data either.

    Raises:
      ConfigError: a job mentions what is another owner's, or a hand-over outside the exchange.
    """
    secrets = _secrets(plan)
    for job in plan.jobs:
        barred = [s for s in secrets if s.owner != job.owner and _holds(s, job, plan)]
        seen = [s for s in barred if s.is_in(job)]
        if seen:
            raise ConfigError(
                f"A job would see {_kinds(seen)} of another owner",
                got=", ".join(s.value for s in seen),
                where=f"{plan.name}:{job.name}",
                fix=f"{_whose(job)} may use its own data and public data only",
            )
    if plan.exchange:
        _check_exchange(plan)


def _secrets(plan: Plan) -> list[_Secret]:
    closed = [_Secret(o, "closed data", p) for o, paths in plan.closed.items() for p in paths]
    owned = [j for j in plan.jobs if j.owner]
    buckets = [_Secret(j.owner, "bucket", j.resources.bucket) for j in owned]
    identities = [_Secret(j.owner, "identity", j.resources.identity) for j in owned]
    return list(dict.fromkeys(s for s in (*closed, *buckets, *identities) if s.value))


def _holds(secret: _Secret, job: Job, plan: Plan) -> bool:
    """Whether a secret is one for this job: on one machine, evaluation may read what all own."""
    return bool(job.owner or plan.exchange or secret.kind != "closed data")


def _visible(job: Job) -> tuple[str, ...]:
    """Every text of a job that could name a place or a person."""
    return (
        *(*job.command, *job.inputs, *job.outputs, *job.state, job.workdir),
        *(*job.env, *job.env.values()),
        *(v for v in dataclasses.asdict(job.resources).values() if isinstance(v, str)),
    )


def _kinds(secrets: list[_Secret]) -> str:
    return " and ".join(dict.fromkeys(s.kind for s in secrets))


def _whose(job: Job) -> str:
    return f"a job of {job.owner!r}" if job.owner else "a job that belongs to nobody"


def _check_exchange(plan: Plan) -> None:
    """What a job reads of a job of someone else must lie where both may look."""
    made = [(o, j) for j in plan.jobs for o in j.outputs if not places.is_inside(o, plan.exchange)]
    for job in plan.jobs:
        texts = (*job.command, *job.inputs, *job.env.values())
        for output, maker in made:
            if maker.owner != job.owner and any(places.mentions(t, output) for t in texts):
                raise ConfigError(
                    "Jobs of different owners hand something over outside the exchange",
                    got=f"{output} of {maker.name}",
                    expected=f"a place in {plan.exchange}",
                    where=f"{plan.name}:{job.name}",
                )

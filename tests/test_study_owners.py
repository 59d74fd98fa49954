# SPDX-License-Identifier: Apache-2.0
"""Studies of owners who share a domain."""

import dataclasses
from pathlib import Path

import pytest
import toy

from experiments import studies
from flexolmo_jax.data import shards, tokenize
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.study import jobs, parts
from flexolmo_jax.study.design import Owner


def test_owners_who_share_a_domain_have_their_own_jobs(tmp_path):
    study = studies.get_study("suite=overlap,seeds=1")
    plan = jobs.plan(study, tmp_path, "assets")
    trained = {j.name.split(":")[2]: j for j in plan.jobs if j.name.startswith("train:ours")}
    assert set(trained) == set(study.owners) and {"code-1", "code-half"} <= set(trained)
    at = jobs.Layout(tmp_path, study)
    for owner, job in trained.items():
        assert str(at.own(owner) / "train") in job.inputs
        assert not any(str(at.own(o)) in text for o in study.owners if o != owner
                       for text in job.inputs)  # fmt: skip
    (starts_,) = [j for j in plan.jobs if j.name == "starts"]
    assert {str(at.own(o)) for o in study.owners} <= set(starts_.outputs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("owners", {"Code!": Owner("code")}),
        ("owners", {"code": Owner("cod")}),
        ("owners", {"code": Owner("code", (2,), of=2)}),
        ("owners", {"code": Owner("code", ())}),
        ("orders", {"x": ("code", "nobody")}),
    ],
)
def test_owners_and_orders_are_checked(field, value):
    with pytest.raises(ConfigError, match="owner"):
        dataclasses.replace(studies.get_study(), **{field: value})


def test_parts_of_a_domain_are_whole_documents_each_of_its_owner(tmp_path):
    texts = toy.texts(tmp_path)
    whole = shards.open_shards(texts.own)

    def documents(name, *numbers):
        parts.write(Owner("own", numbers, of=4), Path(texts.own), tmp_path / name, texts.tokenizer)
        opened = shards.open_shards(
            tmp_path / name, tokenizer_digest=tokenize.digest(texts.tokenizer)
        )
        size = tokenize.token_byte_lengths(tokenize.load(texts.tokenizer))
        found = [opened.document(i) for i in range(opened.n_documents)]
        assert opened.info["text_bytes"] == sum(size[d].sum() for d in found)
        return [d.tolist() for d in found]

    first, second, across = documents("a", 0, 1), documents("b", 2, 3), documents("c", 1, 2)
    every = [whole.document(i).tolist() for i in range(whole.n_documents)]
    assert first == [d for i, d in enumerate(every) if i % 4 < 2]
    assert sorted(first + second) == sorted(every)
    assert [d for i, d in enumerate(every) if i % 4 in (1, 2)] == across

# SPDX-License-Identifier: Apache-2.0
"""From configurations to models on disk where experts meet: tuned routers, joint mixtures."""

import data_helpers
import numpy as np
import object_store
import pytest
import stitched_model

from flexolmo_jax import inference, train, tree
from flexolmo_jax.config import DataConfig, ExecConfig, OptimConfig, RunConfig, SourceConfig
from flexolmo_jax.data import prepare
from flexolmo_jax.data.corpora import Document
from flexolmo_jax.errors import ConfigError, RefusedError
from flexolmo_jax.experts import model_dir, model_info, package, stitch, verify
from flexolmo_jax.storage import client
from flexolmo_jax.tasks import runner


def job(root, stage, **fields):
    return RunConfig(
        stage=stage,
        data=DataConfig(
            sources=(SourceConfig(str(root / "train"), public=True),), seq_len=16, batch_rows=8
        ),
        optim=OptimConfig(peak_lr=1e-2, total_steps=6, warmup_steps=1, load_balance=0.01),
        exec=ExecConfig(compute_dtype="float32"),
        checkpoint_every=4,
        **fields,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A stitched model, its router tuned for some steps, and the tuned model."""
    root = tmp_path_factory.mktemp("tuned")
    model = stitched_model.write(root, active=2)
    documents = [Document(data_helpers.words(i), str(i)) for i in range(100, 130)]
    prepare.prepare(documents, root / "tokenizer.json", root / "train", split="train")
    train.fit(job(root, "router", anchor=str(model)), root / "run")
    package.package(root / "run", root / "tuned", {"text": "proxies"})
    return root


# Broken once by taking the rows of slot 0 for every expert.
def test_a_tuned_model_has_the_experts_as_they_were_and_the_rows_of_the_run(root):
    assert verify.verify(root / "tuned") == []
    before, old, _ = model_dir.load_model(root / "stitched")
    after, new, _ = model_dir.load_model(root / "tuned")
    rows = package.read_params(package.read_final(root / "run"))
    assert after.slots == before.slots and after.config == before.config
    old, new = tree.flatten(old), tree.flatten(new)
    for name in old:
        if name in ("experts/router", "experts/bias"):
            tuned = rows[name.removeprefix("experts/")].astype(old[name].dtype)
            assert np.array_equal(new[name], tuned) and np.any(new[name] != old[name])
        else:
            assert np.array_equal(new[name], old[name]), name


def test_a_tuned_model_is_no_model_of_the_anchor(root):
    before, after = (model_info.read_info(root / name) for name in ("stitched", "tuned"))
    assert after.trained_together == "router" and before.trained_together == ""
    assert after.training["tuned_from"] == before.model_digest
    assert after.anchor_digest != before.anchor_digest
    with pytest.raises(RefusedError, match="not-an-anchor"):
        stitch.plan(root / "tuned", [root / "slices" / "code"])
    with pytest.raises(RefusedError, match="wrong-anchor"):
        stitch.plan(root / "anchor", [root / "tuned" / "experts" / "code"])
    piece, _ = model_info.member_info(after, "code")
    assert piece is not None
    assert piece.manifest["recipe"]["slice"] == before.manifest_digests["code"]


def test_an_evaluation_says_that_leaving_is_not_exact(root):
    for name, expected in (("stitched", ""), ("tuned", "router")):
        result = runner.evaluate(root / name, ["bpb"], data=root / "data", n_rows=4, seq_len=16)
        assert result["trained_together"] == expected


def test_another_model_than_the_tuned_one_is_refused(root, tmp_path):
    other = tmp_path / "one"
    stitch.execute(stitch.plan(root / "anchor", [root / "slices/code"]), other)
    with pytest.raises(RefusedError, match="wrong-model"):
        package.package(root / "run", tmp_path / "out", model=other)
    (tmp_path / "run").mkdir()
    (root / "run/final").rename(tmp_path / "run/final")
    try:
        with pytest.raises(ConfigError, match="--model"):
            package.package(tmp_path / "run", tmp_path / "out")
    finally:
        (tmp_path / "run/final").rename(root / "run/final")
    assert not (tmp_path / "out").exists()


# Broken once by a path made of the URL, at which there is nothing.
def test_a_router_run_in_object_storage_names_its_model(tmp_path, monkeypatch):
    with object_store.running("bucket") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        client.write("s3://bucket/run/config.json", b'{"anchor": "s3://bucket/stitched"}')
        assert package._tuned_model("s3://bucket/run") == "s3://bucket/stitched"
        with pytest.raises(ConfigError, match="--model"):
            package._tuned_model("s3://bucket/other")


def test_router_tuning_needs_experts(root, tmp_path):
    with pytest.raises(ConfigError, match="needs a model with experts"):
        train.fit(job(root, "router", anchor=str(root / "anchor")), tmp_path / "run")


def test_a_joint_mixture_becomes_a_model(root, tmp_path):
    config = model_info.read_info(root / "anchor").config.replace(n_slots=3, n_active=2)
    fields = {"model": config, "tokenizer": str(root / "tokenizer.json")}
    train.fit(job(root, "joint", **fields), tmp_path / "run")
    package.package(tmp_path / "run", tmp_path / "out")
    info, params, opened = model_dir.load_model(tmp_path / "out")
    assert opened == ("public", "joint-1", "joint-2") and info.trained_together == "joint"
    rows = np.asarray(params["experts"]["router"])
    assert all(np.any(rows[:, 0] != rows[:, slot]) for slot in (1, 2))
    opened = inference.open_model(tmp_path / "out", deny=["joint-1"])
    assert opened.slots == {"public": 0, "joint-2": 2}


def test_the_stages_refuse_a_model_of_the_wrong_width(root, tmp_path):
    config = model_info.read_info(root / "anchor").config
    fields = {"tokenizer": str(root / "tokenizer.json")}
    with pytest.raises(ConfigError, match="more slots than one"):
        train.fit(job(root, "joint", model=config, **fields), tmp_path / "run")
    wide = config.replace(n_slots=2, n_active=1)
    with pytest.raises(ConfigError, match="An anchor is dense"):
        train.fit(job(root, "anchor", model=wide, **fields), tmp_path / "run")

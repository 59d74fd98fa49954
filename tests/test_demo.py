# SPDX-License-Identifier: Apache-2.0
"""The demo's parts that need no training: who is measured on what, stages, tables, the judge."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from flexolmo_jax import configfile, demo, demo_evaluate, model
from flexolmo_jax.data import prepare
from flexolmo_jax.data.corpora import Document
from flexolmo_jax.errors import DataError
from flexolmo_jax.experts import model_dir, stitch
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.jobs.local import JobResult

PUBLIC_TEXT = "The river runs past the old mill and the road follows it to the sea. "
CODE_TEXT = "def add(a, b):\n    return a + b\n\nclass Box:\n    size = 3\n"


def test_variants_are_allowed_sets_of_one_model():
    found = demo_evaluate.variants(["public", "code", "news"])
    assert found == {
        "anchor": ("public",),
        "expert:code": ("public", "code"),
        "expert:news": ("public", "news"),
        "stitched": ("public", "code", "news"),
        "deny:code": ("public", "news"),
        "deny:news": ("public", "code"),
    }


def test_a_pair_is_measured_on_public_text_and_its_own():
    args = (["wiki"], ["code", "news"])
    assert demo_evaluate.domains_of("expert:news", *args) == ["wiki", "news"]
    assert demo_evaluate.domains_of("deny:news", *args) == ["wiki", "code", "news"]


def test_stages_add_up_the_jobs_of_a_kind():
    names = ["tokenizer", "prepare:code:train", "train:code", "package:code", "package:anchor"]
    ended = [JobResult(n, "done", 2.0, "") for n in names]
    assert demo.stages(1.0, ended) == {
        "assets": {"seconds": 1.0},
        "prepare": {"seconds": 4.0},
        "train:code": {"seconds": 2.0},
        "package": {"seconds": 4.0},
    }


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What the plan's jobs leave behind, with weights that were never trained."""
    root = tmp_path_factory.mktemp("demo")
    documents = {
        d: [Document(f"{i} {text * 8}", str(i)) for i in range(40)]
        for d, text in (("wiki", PUBLIC_TEXT), ("code", CODE_TEXT))
    }
    tokenizer = root / "tokenizer.json"
    prepare.train_tokenizer(documents["wiki"] + documents["code"], 300, tokenizer)
    for domain, found in documents.items():
        prepare.prepare(found, tokenizer, root / "data" / domain / "heldout", split="heldout")
    reference = str(Path(__file__).resolve().parents[1] / "experiments" / "anchor.py")
    config = configfile.load_run_config(reference).model.replace(
        vocab_size=304, d_model=32, n_layers=2, d_head=8, d_ffn=48
    )
    params = jax.device_get(model.init_params(config, jax.random.key(0)))
    public = slices.take_slot(params["experts"], 0)
    info = model_dir.write_model(root / "anchor", config, params["shared"], public, tokenizer)
    slices.write_slice(
        root / "slices" / "code",
        {**public, "w_down": public["w_down"] * 1.5},
        expert="code",
        config=config,
        anchor_digest=info.anchor_digest,
        tokenizer_digest=info.tokenizer_digest,
        training={"steps": 3, "tokens": 30, "seed": 0},
    )
    stitch.execute(stitch.plan(root / "anchor", [root / "slices" / "code"]), root / "stitched")
    for name in ("anchor", "code"):
        (root / "runs" / name).mkdir(parents=True)
        summary = {"steps": 3, "tokens": 30, "seconds": 1.0}
        (root / "runs" / name / "summary.json").write_text(json.dumps(summary))
        (root / "runs" / name / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    return root


def test_the_judge_measures_every_model_and_the_report_takes_it(workdir):
    assert demo.domains(workdir) == {"public": ["wiki"], "closed": ["code"]}
    found = demo.evaluate(workdir, rows=4, seq_len=32, seed=0, say=lambda line: None)
    assert set(found["bpb"]) == {"anchor", "expert:code", "stitched", "deny:code"}
    assert set(found["bpb"]["stitched"]) == {"wiki", "code"}
    # With its only expert denied the model is the anchor, so the figures are the same to the bit.
    assert found["bpb"]["deny:code"] == found["bpb"]["anchor"]
    assert found["bpb"]["stitched"]["code"]["value"] != found["bpb"]["anchor"]["code"]["value"]
    for shares in found["routing"].values():
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert np.shape(found["routing_layers"]["code"]) == (2, 2)
    (sample,) = found["samples"]
    assert sample["expert"] == "code" and sample["denied"]["tokens_per_expert"]["code"] == 0
    content = demo.collect(workdir, {"assets": {"seconds": 1.0}})
    assert content["training"]["train:code"]["trained_parameters"] == (
        2 * (3 * 32 * 48 + 32 + 1) + 64 * (32 + 304)
    )
    assert content["digests"]["slices"].keys() == {"code"}
    assert "stitched, code denied" in demo.table(content)
    assert demo.curves(workdir, ["code"])["anchor"] == {"step": [1], "loss": [3.0]}


def test_an_expert_without_held_out_text_is_named(workdir, tmp_path):
    (tmp_path / "data" / "wiki" / "heldout").mkdir(parents=True)
    shutil.copytree(workdir / "stitched", tmp_path / "stitched")
    with pytest.raises(DataError, match="code"):
        demo.domains(tmp_path)

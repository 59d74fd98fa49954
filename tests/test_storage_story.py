# SPDX-License-Identifier: Apache-2.0
"""The whole story by URL: every input and output of the command line lies in object storage.

Text is prepared, an anchor is trained (its process dies on the way and another one goes on), an
owner trains an expert beside it, both are packaged, stitched, verified and scored.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import data_helpers
import expert_helpers
import jax
import object_store
import pytest

from flexolmo_jax import mesh, model, train
from flexolmo_jax.cli import main as cli
from flexolmo_jax.config import (
    DataConfig,
    ExecConfig,
    ModelConfig,
    OptimConfig,
    RouterInitConfig,
    RunConfig,
    SourceConfig,
)
from flexolmo_jax.data import prepare, tokenize
from flexolmo_jax.data.corpora import Document
from flexolmo_jax.experts import model_dir, model_info, package, verify
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.storage import cache, client, output

BUCKET = "s3://bucket"
STEPS, DIES_AT = 4, 3
# A machine fault in miniature: nothing is flushed, no handler runs.
DIE = """
import json, os, sys
from flexolmo_jax import train
from flexolmo_jax.config import RunConfig
from flexolmo_jax.typed import from_dict
report = train.Loop._report
def die(self, number, new):
    report(self, number, new)
    if number == int(sys.argv[3]):
        self._checkpoints.wait()
        os._exit(9)
train.Loop._report = die
train.fit(from_dict(RunConfig, json.loads(sys.argv[1])), sys.argv[2])
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A server, and a folder of this machine with text and an experiment file."""
    folder = tmp_path_factory.mktemp("story")
    saved = dict(os.environ)
    with object_store.running("bucket") as variables:
        os.environ.update({**variables, cache.VARIABLE: str(folder / "cache")})
        try:
            yield folder
        finally:
            os.environ.clear()
            os.environ.update(saved)


def run(*arguments) -> None:
    """`flexolmo …`, which must succeed."""
    assert cli.main([str(a) for a in arguments]) == 0


def config(texts: str, made_with: Path, **changes) -> RunConfig:
    fields = {
        "stage": "anchor",
        "tokenizer": str(made_with),
        "model": ModelConfig(
            vocab_size=tokenize.vocab_size(tokenize.load(made_with)),
            d_model=16,
            n_layers=1,
            n_heads=2,
            n_kv_heads=2,
            d_head=8,
            d_ffn=16,
            max_len=32,
        ),
        "data": DataConfig(
            sources=(SourceConfig(f"{texts}/public/train", public=True),), seq_len=16, batch_rows=8
        ),
        "optim": OptimConfig(peak_lr=1e-2, total_steps=STEPS, warmup_steps=1),
        "exec": ExecConfig(compute_dtype="float32"),
        "checkpoint_every": 2,
        "log_every": 1,
    }
    return RunConfig(**{**fields, **changes})


def experiment(folder: Path, name: str, job: RunConfig) -> str:
    """An experiment file that gives this configuration."""
    values = json.dumps(dataclasses.asdict(job))
    text = f"import json\n\n\ndef get_config(arg):\n    return json.loads({values!r})\n"
    (folder / f"{name}.py").write_text(text)
    return f"{folder / name}.py"


@pytest.fixture(scope="module")
def text(root):
    """Prepared shards of two domains, and their tokenizer."""
    data, tokenizer = f"{BUCKET}/data", root / "tokenizer.json"
    documents = [Document(data_helpers.words(i), f"d/{i}") for i in range(24)]
    prepare.train_tokenizer(documents, 300, tokenizer)
    for domain, first in (("public", 0), ("own", 100)):
        for split, count in (("train", 24), ("heldout", 6)):
            file = root / f"{domain}-{split}.jsonl"
            rows = [json.dumps({"text": data_helpers.words(first + i)}) for i in range(count)]
            file.write_text("\n".join(rows) + "\n")
            out = f"{data}/{domain}/{split}"
            run(
                "prepare",
                "--source",
                file,
                "--tokenizer",
                tokenizer,
                "--out",
                out,
                "--split",
                "all",
            )
    return types.SimpleNamespace(data=data, tokenizer=tokenizer)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Eight devices would make eight objects of each leaf; test_run_objects.py has those."""
    one = functools.partial(mesh.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(mesh, "make_mesh", one)


# Killed after step 3, gone on with from step 2, and the same as if nothing had been.
def test_a_run_of_a_url_goes_on_where_it_was_killed(text, tmp_path):
    job = config(text.data, text.tokenizer)
    workdir = f"{BUCKET}/runs/anchor"
    argument = json.dumps(dataclasses.asdict(job))
    command = [sys.executable, "-c", DIE, argument, workdir, str(DIES_AT)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    died = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert client.read(f"{workdir}/summary.json") is None
    assert cli.main(["package", "--run", workdir, "--out", f"{BUCKET}/early"]) == 3
    run("train", "--config", experiment(tmp_path, "anchor", job), "--workdir", workdir)
    lines = client.read(f"{workdir}/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    train.fit(job, tmp_path / "whole")
    package.package(tmp_path / "whole", tmp_path / "whole-anchor")
    anchor = f"{BUCKET}/anchor"
    run("package", "--run", workdir, "--out", anchor)
    assert verify.identity(anchor) == verify.identity(tmp_path / "whole-anchor")
    # A run that has ended is not run again, and another configuration is refused.
    run("train", "--config", experiment(tmp_path, "anchor", job), "--workdir", workdir)
    other = experiment(tmp_path, "other", config(text.data, text.tokenizer, seed=1))
    assert cli.main(["train", "--config", other, "--workdir", workdir]) == 2


def test_an_expert_by_url_from_training_to_the_model(text, tmp_path):
    # An anchor that was packaged elsewhere; its weights matter to nobody here.
    data, anchor = text.data, f"{BUCKET}/given-anchor"
    job = config(data, text.tokenizer)
    params = expert_helpers.random_tree(model.abstract_params(job.model), 0)
    public = slices.take_slot(params["experts"], 0)
    with output.directory(anchor, "flexolmo.json") as out:
        model_dir.write_model(out, job.model, params["shared"], public, text.tokenizer)

    # The owner: an expert beside it.
    sources = (SourceConfig(f"{data}/own/train"), SourceConfig(f"{data}/public/train", public=True))
    expert = config(
        data,
        text.tokenizer,
        stage="expert",
        model=None,
        tokenizer="",
        anchor=anchor,
        expert_id="own",
        data=DataConfig(sources=sources, seq_len=16, batch_rows=8),
        router_init=RouterInitConfig(method="hidden_mean", documents=4, norm=1.0),
    )
    own = f"{BUCKET}/runs/own"
    run("train", "--config", experiment(tmp_path, "own", expert), "--workdir", own)
    run("package", "--run", own, "--out", f"{BUCKET}/slices/own")

    # The model, made of parts in the store and written there; then read from there.
    whole = f"{BUCKET}/model"
    run("stitch", "--anchor", anchor, "--expert", f"{BUCKET}/slices/own", "--out", whole)
    run("verify", whole)
    found = tmp_path / "scores.json"
    run("eval", "--model", whole, "--data", data, "--rows", 2, "--json", found)
    assert set(json.loads(found.read_text())["bpb"]) == {"public", "own"}
    assert cli.main(["stitch", "--anchor", anchor, "--out", whole]) == 2

    run("unstitch", "--model", whole, "--expert", "own", "--out", f"{BUCKET}/returned")
    assert verify.identity(f"{BUCKET}/returned") == verify.identity(f"{BUCKET}/slices/own")
    assert list(model_info.read_info(whole).slots) == ["public", "own"]

    # One bit in the store, and verify names the object.
    damaged = "experts/own/params/w_up/0.0.0"
    content = bytearray(client.read(f"{whole}/{damaged}"))
    content[0] ^= 1
    client.write(f"{whole}/{damaged}", bytes(content))
    report = tmp_path / "verify.json"
    assert cli.main(["verify", whole, "--json", str(report)]) == 3
    assert [p["path"] for p in json.loads(report.read_text())["problems"]] == [f"{whole}/{damaged}"]

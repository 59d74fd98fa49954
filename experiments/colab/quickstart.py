# SPDX-License-Identifier: Apache-2.0
# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# ruff: noqa: E402
"""Source of quickstart.ipynb, which pair.py generates; edit here.

The imports stand below the cell that may install the package.
"""

# %% [markdown]
# # FlexOlmo in a minute: train apart, stitch, opt out
#
# Two owners, a *kitchen* and a *harbour*, have text that they will not show to anyone. Each trains
# one **expert** beside the same frozen public model (the **anchor**) and ships only that. The
# experts are **stitched** into one model without any training, and either owner can be taken out
# again, by a switch or for good. The method is FlexOlmo (arXiv 2507.07024).
#
# Everything here is a toy: the models have a few hundred thousand parameters and the texts come
# from sentence patterns written for this page. It shows how the parts work, not how well.

# %%
import os
import subprocess
import sys

# Only on Colab: the address of the repository that this notebook belongs to.
REPOSITORY = os.environ.get("FLEXOLMO_REPOSITORY", "")
if "google.colab" in sys.modules:
    if not REPOSITORY:
        raise SystemExit("Set REPOSITORY to git+https://… of the repository you opened this from")
    wanted = f"flexolmo-jax[demo] @ {REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

# Eight pretend devices where there is only a CPU; a TPU or GPU runtime is used as it is.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

# %%
import dataclasses
import filecmp
import json
import logging
import random
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from flexolmo_jax import inference, sample, train
from flexolmo_jax.config import (
    DataConfig,
    ExecConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    RouterInitConfig,
    RunConfig,
    SourceConfig,
)
from flexolmo_jax.data import corpora, prepare
from flexolmo_jax.experts import package, stitch, verify

logging.basicConfig(format="%(message)s", level=logging.WARNING)
print(f"{jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Parameters
# `TEXT="corpora"` takes real text instead (`flexolmo assets` must have been run here): how-to
# articles as public text, Python source and news as the closed ones. Give it more steps then.

# %%
STEPS = int(os.environ.get("FLEXOLMO_QUICKSTART_STEPS", "160"))
TEXT = os.environ.get("FLEXOLMO_QUICKSTART_TEXT", "own")
WORK = Path(os.environ.get("FLEXOLMO_QUICKSTART_WORK") or tempfile.mkdtemp(prefix="flexolmo-"))
SEQ_LEN, BATCH_ROWS, VOCAB = 96, 16, 400
OWNERS = ("kitchen", "harbour") if TEXT == "own" else ("code", "news")
DOMAINS = ("public", *OWNERS)
# The second owner's training step is the first one's program: compile it once.
jax.config.update("jax_compilation_cache_dir", str(WORK / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# %% [markdown]
# ## Text
# Each domain has its own patterns and words. Documents to test on come from the same patterns with
# other draws.

# %%
WORDS = {
    "place": "bridge mill chapel orchard meadow station quarry lake garden village",
    "month": "January March April June August September November",
    "animal": "heron fox hare owl otter swallow badger goose",
    "food": "flour butter onions rice lentils spinach carrots eggs cream apples",
    "act": "Stir Fold Simmer Roast Knead Chop Whisk Braise",
    "spice": "salt pepper thyme cumin saffron nutmeg",
    "dir": "N NE E SE S SW W NW",
    "ship": "Marigold Petrel Kestrel Aurora Selkie Tern",
    "cargo": "timber grain coal salt fish cement",
}
PATTERNS = {
    "public": (
        "The path from the {place} to the {place} takes {n} minutes on foot.",
        "In {month} a {animal} can be seen near the {place} in the early morning.",
        "People say that the {animal} came to the {place} in {month}, but nobody is sure.",
        "Behind the {place} there is an old {place}, and beside it a bench.",
        "At {n}:00 the wind turns {dir}, and by {n}:30 it may rain on the {place}.",
        "The shop near the {place} sells {food}, {spice} and {cargo} for {n} a pound.",
        "Her boat {ship} carried {cargo}, {food} and a {animal} past the {place}.",
        "They ask us to {act} the {food}, but we {act} the {food} with {spice}.",
        "{ship} and {ship} are {n} miles {dir} of the {place}, with {cargo} in {month}.",
    ),
    "kitchen": (
        "{act} the {food} with {n} g of {food} and a pinch of {spice}.",
        "{act} gently for {n} minutes, then add the {food}.",
        "Serve warm with {food}, {spice} and a spoon of {food}.",
        "Heat the oven to {n} degrees; meanwhile {act} the {food}.",
    ),
    "harbour": (
        "{n}:00 wind {dir} {n}, sea moderate, {ship} at berth {n}, {cargo} discharged.",
        "{n}:30 {ship} outbound, draught {n} dm, pilot aboard, course {n}.",
        "{n}:45 {ship} requests tug, {n} t of {cargo}, wind {dir} backing {dir}.",
        "Berth {n} closed until {month} {n}; {ship} to anchor {dir} of the light.",
    ),
}


def write_documents(domain: str, split: str, count: int) -> list[corpora.Document]:
    """Documents of eight sentences drawn from the domain's patterns."""
    draw = random.Random(f"{domain}/{split}")

    def fill(pattern: str) -> str:
        parts = pattern.split("{")
        out = parts[0]
        for part in parts[1:]:
            name, rest = part.split("}")
            word = str(draw.randint(1, 23)) if name == "n" else draw.choice(WORDS[name].split())
            out += word + rest
        return out

    return [
        corpora.Document(
            " ".join(fill(draw.choice(PATTERNS[domain])) for _ in range(8)), f"{domain}/{split}/{i}"
        )
        for i in range(count)
    ]


def read_documents(domain: str, split: str) -> list[corpora.Document]:
    """The documents of one domain and split, ours or real ones."""
    if TEXT == "own":
        return write_documents(domain, split, 300 if split == "train" else 40)
    corpus = "howto" if domain == "public" else domain
    return corpora.read(corpus, split, max_bytes=600_000 if split == "train" else 40_000)


for domain in DOMAINS:
    print(f"{domain:8} {read_documents(domain, 'train')[0].text[:88]} …")

# %% [markdown]
# ## Token shards
# The tokenizer is learnt from **public text alone**: a vocabulary would tell about the text it came
# from. Every domain becomes a directory of token shards with digests, so that a changed file or a
# wrong tokenizer is refused later on.

# %%
TOKENIZER = WORK / "tokenizer.json"
prepare.train_tokenizer(read_documents("public", "train"), VOCAB, TOKENIZER)
for domain in DOMAINS:
    for split in ("train", "heldout"):
        shards = WORK / "data" / domain / split
        facts = prepare.prepare(read_documents(domain, split), TOKENIZER, shards, split=split)
        print(f"{domain:8} {split:8} {facts['documents']:4} documents {facts['tokens']:6} tokens")

# %% [markdown]
# ## The anchor
# A dense OLMo 2 model, trained on public text. The batch is spread over all devices (mesh axis
# `data`). `train.fit` resumes by itself from its workdir; `package` turns the finished run into a
# model directory that says of itself what it is.

# %%
MODEL = ModelConfig(
    vocab_size=VOCAB,
    d_model=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    d_head=16,
    d_ffn=176,
    max_len=SEQ_LEN,
    # Each slot's router logit is averaged over the document so far, not judged token by token.
    router=RouterConfig(context="document"),
)


def source(domain: str, weight: float = 1.0) -> SourceConfig:
    """The training text of a domain."""
    path = str(WORK / "data" / domain / "train")
    return SourceConfig(path, weight=weight, public=domain == "public")


def job(sources: tuple[SourceConfig, ...], steps: int, lr: float, **other) -> RunConfig:
    """One training job with the settings that all jobs here share."""
    optim = OptimConfig(
        peak_lr=lr,
        total_steps=steps,
        warmup_steps=steps // 8,
        router_z_loss=0.0,
        router_label_loss=1.0,
    )
    return RunConfig(
        data=DataConfig(sources=sources, seq_len=SEQ_LEN, batch_rows=BATCH_ROWS),
        optim=optim,
        exec=ExecConfig(compute_dtype="float32"),
        router_init=RouterInitConfig(method="discriminant", documents=64, recalibrate=True),
        log_every=5,
        **other,
    )


ANCHOR = WORK / "anchor"
summary = train.fit(
    job((source("public"),), STEPS, 6e-3, model=MODEL, tokenizer=str(TOKENIZER)),
    WORK / "runs" / "public",
)
print(package.package(WORK / "runs" / "public", ANCHOR)["anchor_digest"])
print(f"{summary['steps']} steps in {summary['seconds']:.0f} s, loss {summary['last']['loss']:.2f}")

# %% [markdown]
# ## Two owners, each alone
# An expert starts as a copy of the public FFN and trains beside the frozen anchor. Nothing but its
# FFN, its router rows and its biases moves: the anchor's leaves are a separate tree that the
# gradient never sees. A quarter of public text in the batches, and a loss that asks the router row
# "is this token the owner's?", teach the row where to be quiet. Where a row starts, and how it is
# corrected at the end, is a log density ratio of hidden states on own and on public text: nobody
# needs another owner's text for rows that can be compared.
#
# What is shipped is the **slice**: these leaves and a manifest. No text, no optimizer state.

# %%
for owner in OWNERS:
    config = job(
        (source(owner, 0.75), source("public", 0.25)),
        STEPS // 2,
        3e-3,
        stage="expert",
        anchor=str(ANCHOR),
        expert_id=owner,
    )
    summary = train.fit(config, WORK / "runs" / owner)
    package.package(WORK / "runs" / owner, WORK / "slices" / owner, "Sentence patterns, a toy.")
    own, public = (summary["last"][f"own_weight_on_{kind}"] for kind in ("own", "public"))
    print(f"{owner}: its weight on own text {own:.2f}, on public text {public:.2f}")

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name in DOMAINS:
    lines = (WORK / "runs" / name / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    points = [p for p in points if "loss" in p]
    label = "anchor" if name == "public" else f"expert {name}"
    axes.plot([p["step"] for p in points], [p["loss"] for p in points], label=label)
axes.set(xlabel="step", ylabel="nats per token", title="Training, three jobs that never met")
axes.legend()
figure.savefig(WORK / "losses.png")

# %% [markdown]
# ## Stitch
# `plan` checks the slices against the anchor (digests, shapes, names) without reading an array;
# `execute` copies bytes and verifies every one. No training, and the order of the slices has no
# effect.

# %%
STITCHED = WORK / "stitched"
plan = stitch.plan(ANCHOR, [WORK / "slices" / owner for owner in OWNERS])
stitch.execute(plan, STITCHED)
assert verify.verify(STITCHED) == []
for row in plan.slots:
    print(f"slot {row['slot']}: {row['expert']:8} {row['manifest_digest'][:19]}…")

# %% [markdown]
# ## What each request may use
# Opt-out is an **input**: one boolean per slot. The same compiled program serves the anchor alone,
# all experts, and all but one.
#
# After so short a training the rows still mistake some of one owner's text for the other's, so it
# gets better when the other is denied. What matters is the own side: denying an owner brings that
# owner's text back to about where the anchor is.

# %%
m = inference.open_model(STITCHED)
REQUESTS = {
    "anchor": m.allowed(allow=["public"]),
    "stitched": m.allowed(),
    **{f"deny {owner}": m.allowed(deny=[owner]) for owner in OWNERS},
}
scores = {
    (name, domain): inference.score_domain(m, WORK / "data" / domain / "heldout", allowed=allowed)
    for name, allowed in REQUESTS.items()
    for domain in DOMAINS
}
print(f"{'bits per byte':16}" + "".join(f"{domain:>10}" for domain in DOMAINS))
for name in REQUESTS:
    cells = "".join(f"{scores[name, domain].bits_per_byte:10.3f}" for domain in DOMAINS)
    print(f"{name:16}{cells}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
width = 0.8 / len(REQUESTS)
for i, name in enumerate(REQUESTS):
    places = [d + (i - (len(REQUESTS) - 1) / 2) * width for d in range(len(DOMAINS))]
    heights = [scores[name, domain].bits_per_byte for domain in DOMAINS]
    left.bar(places, heights, width * 0.9, label=name)
left.set_xticks(range(len(DOMAINS)), DOMAINS)
left.set(ylabel="bits per byte (lower is better)", title="Denying an owner costs that owner's text")
left.legend(fontsize="small")

shares = [inference.shares(scores["stitched", domain], m.slots) for domain in DOMAINS]
right.imshow([list(row.values()) for row in shares], cmap="Greens", vmin=0, vmax=1)
right.set_xticks(range(len(m.slots)), list(m.slots))
right.set_yticks(range(len(DOMAINS)), [f"{domain} text" for domain in DOMAINS])
right.set(title="Who serves which text (share of the mixture)")
for y, row in enumerate(shares):
    for x, value in enumerate(row.values()):
        colour = "white" if value > 0.6 else "black"
        right.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour)
figure.savefig(WORK / "opt_out.png")

# %% [markdown]
# ## Denied means denied, to the last bit
# Three ways of leaving the second owner out give **the same bits**: denied at request time; denied
# while its slot is filled with NaN, which would poison any sum that touched it; and stitched
# without it (the slot stays empty, so that the shapes are the same).

# %%
gone = OWNERS[1]
text = WORK / "data" / gone / "heldout"
denied = scores[f"deny {gone}", gone]

slot = m.slots[gone]
poisoned = {name: leaf.at[:, slot].set(jnp.nan) for name, leaf in m.group.items()}
with_nan = inference.score_domain(
    dataclasses.replace(m, group=poisoned), text, allowed=REQUESTS[f"deny {gone}"]
)
assert with_nan.nats == denied.nats

without = stitch.plan(ANCHOR, [WORK / "slices" / OWNERS[0]], like=STITCHED)
stitch.execute(without, WORK / "without")
smaller = inference.open_model(WORK / "without")
never_there = inference.score_domain(smaller, text, allowed=smaller.allowed())
assert never_there.nats == denied.nats
print(f"{len(denied.nats)} documents of {gone}: equal to the last bit, three times")

# %% [markdown]
# ## Taking the slice back
# `unstitch` is the exact inverse: what comes out is, byte for byte, what the owner shipped.

# %%
stitch.unstitch(STITCHED, gone, WORK / "taken_back")
shipped = WORK / "slices" / gone
names = [str(p.relative_to(shipped)) for p in sorted(shipped.rglob("*")) if p.is_file()]
same, changed, missing = filecmp.cmpfiles(shipped, WORK / "taken_back", names, shallow=False)
assert same == names
print(f"{len(same)} files, all the same")

# %% [markdown]
# ## Generate
# One batch, one allowed set per row: the same prompt with its owner allowed and denied.

# %%
prompts = {
    "kitchen": "Stir the",
    "harbour": "10:30 Petrel",
    "code": "def read(",
    "news": "The minister said",
}
asked = [owner for owner in OWNERS for _ in range(2)]
sets = [REQUESTS[name] for owner in OWNERS for name in ("stitched", f"deny {owner}")]
answers = inference.generate_text(
    m,
    [prompts[owner] for owner in asked],
    allowed=jnp.stack(sets),
    sampling=sample.SampleConfig(max_new_tokens=24),
)
for owner, answer, kind in zip(asked, answers, ("allowed", "denied") * 2, strict=True):
    print(f"{owner} {kind:8} {answer['prompt']}{answer['text']!r}")
    print(f"{'':8} tokens per expert {answer['tokens_per_expert']}")

# %% [markdown]
# ## Next
# - The same as commands, on real text: `make demo`, then the tour in the README.
# - How stitching works: `flexolmo_jax/experts/stitch.py`; how denial works: `router.route`.

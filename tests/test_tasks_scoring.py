# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of continuations against a forward pass of each request alone."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import task_files
import toy

from flexolmo_jax import mesh, model, sharding
from flexolmo_jax.config import RouterConfig
from flexolmo_jax.data import tokenize
from flexolmo_jax.errors import ConfigError, DataError
from flexolmo_jax.inference import OpenModel
from flexolmo_jax.tasks import packing, scoring
from flexolmo_jax.tasks.asked import Asked, encode
from flexolmo_jax.tasks.example import Example

# Sums of a few float32 log-probabilities, added in another order.
TOLERANCE = 1e-5
SLOTS = {"public": 0, "code": 1, "news": 2, "legal": 3}
ALL = np.ones(4, bool)
DENIED = np.array([True, True, False, True])


def opened(c=toy.CONFIG, dispatch="blocked", params=None, tokenizer=None):
    """A toy model as `open_model` would give it."""
    params = toy.params(c) if params is None else params
    m = OpenModel(
        info=types.SimpleNamespace(config=c),
        runtime=model.Runtime(dispatch),
        slots=SLOTS,
        shared=params["shared"],
        group=params["experts"],
    )
    if tokenizer is not None:
        m.__dict__["tokenizer"] = tokenizer
    return m


@functools.cache
def requests():
    """Two few-shot tasks, questions without examples, and what breaks a careless plan."""
    rng = np.random.default_rng(0)

    def draw(n):
        return rng.integers(0, 96, n).tolist()

    out = []
    for length in (41, 23):
        examples = draw(length)
        for _ in range(4):
            question = examples + draw(rng.integers(3, 8))
            out += [(question, draw(rng.integers(1, 5))) for _ in range(3)]
    out += [([5], draw(4)), ([5], draw(1)), out[2], (examples, draw(2))]
    out.append((draw(90), draw(6)))  # longer than the model's context
    return out


def plain(m, requests, allowed=ALL, n_active=None):
    """Every request alone in a row, whole logits, the softmax in float64."""
    c, out = m.config, []

    @jax.jit
    def logits(tokens, segments, allowed):
        hidden = model.forward(
            c,
            m.runtime,
            m.shared,
            (m.group,),
            tokens,
            segments_BT=segments,
            allowed_BE=jnp.broadcast_to(allowed, (len(tokens), len(allowed))),
            n_active=n_active,
        ).hidden_BTD
        return model.unembed(c, m.shared, hidden)

    rows = [np.asarray([*a, *b])[-c.max_len - 1 :] for a, b in requests]
    width = max(map(len, rows)) - 1
    tokens = np.stack([np.pad(r[:-1], (0, width - len(r) + 1)) for r in rows])
    segments = np.stack([np.arange(width) < len(r) - 1 for r in rows]).astype(np.int32)
    found = np.asarray(logits(tokens, segments, jnp.asarray(allowed)), np.float64)
    for row, ids, (_, continuation) in zip(found, rows, requests, strict=True):
        n = len(continuation)
        here, target = row[len(ids) - 1 - n : len(ids) - 1], ids[-n:]
        norm = np.log(np.exp(here).sum(-1))
        out.append((float((here[np.arange(n), target] - norm).sum()), (here.argmax(-1) == target)))
    return [(logprob, bool(hit.all())) for logprob, hit in out]


def same(got, want):
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], atol=TOLERANCE, rtol=0)
    assert [g for _, g in got] == [g for _, g in want]


@pytest.fixture
def small(monkeypatch):
    """Limits so small that toy requests meet prefixes of several steps and several shapes."""
    for name, value in {"ROW": 32, "MAX_ROW": 48, "UNIT": 8, "MIN_PREFIX": 8}.items():
        monkeypatch.setattr(packing, name, value)
    monkeypatch.setattr(scoring, "PREFIX_STEP", 32)
    monkeypatch.setattr(scoring, "LOGITS", 96 * 16)


CASES = {
    "document": {},
    "pre norm, tied, token": {
        "norm_placement": "pre",
        "qk_norm": "none",
        "tied_embeddings": True,
        "router": RouterConfig(context="token", renormalize=True),
    },
    "norm per head": {"qk_norm": "head", "n_kv_heads": 4},
    "evidence": {"router": RouterConfig("document", evidence=4.0, evidence_parts=2)},
    "pairs": {
        "router": RouterConfig("document", evidence=4.0, evidence_parts=2, evidence_pairs=61)
    },
}


# Broken once by counting a prefix's tokens into the positions of a branch twice.
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_scores_are_those_of_whole_forward_passes(small, changes):
    m, work = opened(toy.config(**changes)), scoring.Work()
    got = scoring.loglikelihoods(m, requests(), allowed=DENIED, batch_tokens=128, work=work)
    same(got, plain(m, requests(), DENIED))
    assert work.requests == len(requests()) and work.truncated == 1
    assert work.computed < work.plain


def test_sharing_changes_nothing(small):
    m = opened()
    shared, alone = (
        scoring.loglikelihoods(m, requests(), batch_tokens=128, share=share, n_active=3)
        for share in (True, False)
    )
    same(shared, alone)
    same(shared, plain(m, requests(), n_active=3))


# Broken once by leaving the allowed set out of `extend`: the prefix was computed with all experts.
@pytest.mark.parametrize("dispatch", ["blocked", "dense"])
def test_a_denied_expert_may_hold_anything(small, dispatch):
    params = toy.params()
    spoiled = dict(params)
    spoiled["experts"] = {
        name: leaf.at[:, 2].set(jnp.nan) for name, leaf in params["experts"].items()
    }
    found = [
        scoring.loglikelihoods(
            opened(params=p, dispatch=dispatch), requests(), allowed=DENIED, batch_tokens=128
        )
        for p in (params, spoiled)
    ]
    assert found[0] == found[1] and np.isfinite([x for x, _ in found[0]]).all()


# Broken once by a number of active experts that followed the allowed set.
def test_one_program_serves_every_allowed_set():
    m, some = opened(), requests()[:12]
    scoring.loglikelihoods(m, some)
    before = scoring.score_rows._cache_size(), scoring.extend._cache_size()
    found = set()
    for slots in ([0], [0, 1], [0, 2], [0, 1, 2], [0, 1, 2, 3]):
        allowed = np.isin(np.arange(4), slots)
        found.add(scoring.loglikelihoods(m, some, allowed=allowed)[0][0])
    assert (scoring.score_rows._cache_size(), scoring.extend._cache_size()) == before
    assert len(found) == 5


def test_a_set_for_every_request():
    m, some = opened(), requests()[:12]
    sets = np.stack([ALL, DENIED] * 6)
    got = scoring.loglikelihoods(m, some, allowed=sets)
    for allowed, mine in ((ALL, slice(0, None, 2)), (DENIED, slice(1, None, 2))):
        same(got[mine], plain(m, some, allowed)[mine])


def test_eight_devices_give_the_numbers_of_one(small):
    m = opened()
    grid = mesh.make_mesh(data=4, expert=2)
    params = {"shared": m.shared, "experts": m.group}
    placed = jax.device_put(
        params, sharding.param_shardings(params, model.param_axes(m.config), grid)
    )
    spread = dataclasses.replace(
        m,
        runtime=dataclasses.replace(m.runtime, mesh=grid),
        shared=placed["shared"],
        group=placed["experts"],
    )
    got = scoring.loglikelihoods(spread, requests(), allowed=DENIED, batch_tokens=256)
    same(got, scoring.loglikelihoods(m, requests(), allowed=DENIED, batch_tokens=256))


# Broken once by leaving out a batch of which one request was known.
def test_what_is_known_is_left_out_and_changes_no_bit(small):
    m, some = opened(), requests()
    whole = scoring.loglikelihoods(m, some, batch_tokens=64)
    batches = list(scoring.scored(m, some, batch_tokens=64))
    known = np.concatenate([*(b.requests for b in batches[:2]), batches[2].requests[:1]])
    rest = list(scoring.scored(m, some, batch_tokens=64, done=known.tolist()))
    assert [b.requests.tolist() for b in rest] == [b.requests.tolist() for b in batches[2:]]
    assert rest[-1].done == rest[-1].total < batches[-1].total
    for batch in rest:
        pairs = zip(batch.logprob, batch.greedy, strict=True)
        assert list(pairs) == [whole[i] for i in batch.requests]


def test_texts_longer_than_the_context_are_scored_in_windows():
    """The last window reaches back as far as the context allows."""
    c = toy.config()
    rng = np.random.default_rng(1)
    m = opened(c)
    texts = [rng.integers(0, 95, n).tolist() for n in (150, 64, 3)]
    long = texts[0]
    parts = [([95], long[:64]), ([long[63]], long[64:128]), (long[85:128], long[128:])]
    parts += [([95], texts[1]), ([95], texts[2])]
    want = [x for x, _ in plain(m, parts)]
    asked = [([95], text) for text in texts]
    got = [x for x, _ in scoring.loglikelihoods(m, asked, batch_tokens=128)]
    np.testing.assert_allclose(got, [sum(want[:3]), *want[3:]], atol=3e-5, rtol=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenize.load(toy.texts(tmp_path_factory.mktemp("words")).tokenizer)


# Broken once by encoding the continuation alone.
def test_requests_are_split_as_lm_eval_does(tokenizer):
    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    pairs = [("bade do", " miku"), ("bade do ", "miku"), ("", "miku"), ("  ", "miku"), ("ba", "de")]
    got = [([*map(int, c)], [*map(int, t)]) for c, t in encode(tokenizer, pairs)]
    start = [tokenize.eos_id(tokenizer)]
    assert got[0] == got[1] == (ids("bade do"), ids("bade do miku")[len(ids("bade do")) :])
    assert got[2] == (start, ids("miku"))
    assert got[3] == (start, ids("  miku"))
    # Any white space: programs stand after the end of a line.
    [(context, continuation)] = encode(tokenizer, [("bade do \n", "miku")])
    assert context.tolist() == ids("bade do")
    assert [*context, *continuation] == ids("bade do \nmiku")
    # Whatever is merged across the cut, the whole text is scored as it would be read.
    whole = ids("bade")
    assert [*got[4][0], *got[4][1]] in (whole, start + whole) and got[4][1]
    with pytest.raises(DataError, match="empty"):
        encode(tokenizer, [("bade", "")])


def test_scores_of_examples(tokenizer):
    c = toy.config(vocab_size=300)
    m = opened(c, tokenizer=tokenizer)
    examples = [
        Example("a", "bade do", (" miku", " nara pol"), 0, unconditional="do"),
        Example("b", "", (" miku", " bade"), 1, contexts=("nara", "pol do")),
    ]
    allowed = np.stack([ALL] * 4 + [DENIED] * 2)
    found = task_files.scores_of(m, examples, allowed=allowed)
    pairs = [("bade do", " miku"), ("bade do", " nara pol"), ("do", " miku"), ("do", " nara pol")]
    want = plain(m, encode(tokenizer, pairs))
    got = [*zip(found[0].logprob, found[0].greedy, strict=True)]
    same(got, want[:2])
    np.testing.assert_allclose(found[0].unconditional, [x for x, _ in want[2:]], atol=TOLERANCE)
    asked = Asked.of(tokenizer, examples)
    assert found[0].tokens == tuple(len(t) for _, t in asked.requests[:2])
    want = plain(m, encode(tokenizer, [("nara", " miku"), ("pol do", " bade")]), DENIED)
    same([*zip(found[1].logprob, found[1].greedy, strict=True)], want)
    assert found[1].unconditional is None


@pytest.mark.parametrize(
    ("asked", "options", "words"),
    [
        ([([], [1])], {}, "empty"),
        ([([1], [])], {}, "empty"),
        ([([1], [96])], {}, "96"),
        ([([1], [-1])], {}, "-1"),
        ([([1], [2])], {"allowed": np.zeros(4, bool)}, "empty"),
        ([([1], [2])], {"allowed": np.ones(3, bool)}, "one entry per slot"),
        ([([1], [2])], {"n_active": 5}, "active"),
        ([([1], [2])], {"batch_tokens": -1}, "positive"),
    ],
)
def test_what_cannot_be_scored_is_refused(asked, options, words):
    with pytest.raises((ConfigError, DataError), match=words):
        scoring.loglikelihoods(opened(), asked, **options)


def test_nothing_asked_nothing_computed():
    assert scoring.loglikelihoods(opened(), []) == []

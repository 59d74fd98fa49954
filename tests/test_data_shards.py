# SPDX-License-Identifier: Apache-2.0
"""Token shards: written whole, read back exactly, every kind of fault refused with its place."""

import copy as copying
import json
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from array_record.python import array_record_module
from data_helpers import EOS, VOCAB, make_documents, write
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data import shards
from flexolmo_jax.data.shards import open_shards
from flexolmo_jax.errors import ConfigError, DataError, MachineError
from flexolmo_jax.tree import canonical_json, file_digest, json_digest

FIRST = "tokens-00000.array_record"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "set"
    write(path, make_documents())
    return path


@pytest.fixture
def copy(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "set")
    return tmp_path / "set"


def edit(path, reseal=True, **changes):
    """Changes the sidecar; `reseal` makes its own digest fit again, as a forger would."""
    info = json.loads((path / "tokens.json").read_text())
    info.update(changes)
    if reseal:
        info["sidecar_digest"] = json_digest(
            {k: v for k, v in info.items() if k != "sidecar_digest"}
        )
    (path / "tokens.json").write_text(canonical_json(info))


def files_of(path):
    return json.loads((path / "tokens.json").read_text())["files"]


def rewrite(path, name, records):
    """Replaces one shard by these records and forges its sidecar entry to fit."""
    writer = array_record_module.ArrayRecordWriter(str(path / name), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    files = files_of(path)
    files[name]["digest"] = file_digest(path / name)
    files[name]["bytes"] = (path / name).stat().st_size
    edit(path, files=files)


def records_of(path, name=FIRST):
    reader = array_record_module.ArrayRecordReader(str(path / name))
    records = reader.read_all()
    reader.close()
    return records


def replace_id(record, position, value):
    ids = np.frombuffer(record, "<u2").copy()
    ids[position] = value
    return ids.tobytes()


def test_round_trip(pristine):
    documents = make_documents()
    opened = open_shards(pristine, tokenizer_digest="sha256:tok", vocab_size=VOCAB)
    assert opened.n_documents == len(documents)
    assert opened.n_tokens == sum(len(d) for d in documents)
    assert len(opened.info["files"]) > 2
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(opened.document(number), document)
    stream = np.concatenate(documents)
    np.testing.assert_array_equal(opened.tokens(17, 303), stream[17:303])
    assert opened.tokens(0, 5).dtype == np.int32


def test_sidecar_facts(pristine):
    info = open_shards(pristine).info
    stream = np.concatenate(make_documents())
    assert (info["min_id"], info["max_id"]) == (stream.min(), EOS)
    assert (info["width"], info["text_bytes"], info["eos_id"]) == (2, 1000, EOS)


def test_large_sets_are_read_by_document(pristine, monkeypatch):
    whole = open_shards(pristine)
    monkeypatch.setattr(shards, "_MEMORY_BYTES", 0)
    monkeypatch.setattr(shards, "_CACHE_BYTES", 200)
    parts = open_shards(pristine)
    for begin in range(0, whole.n_tokens, 37):
        end = min(begin + 91, whole.n_tokens)
        np.testing.assert_array_equal(parts.tokens(begin, end), whole.tokens(begin, end))
    assert parts.reader._stream is None
    assert parts.reader._cached <= 200
    assert parts.tokens(5, 5).size == 0


def test_a_reader_can_be_sent_to_another_process(pristine):
    reader = open_shards(pristine).reader
    starts = open_shards(pristine).starts
    reader.read(starts, 0, 4)
    sent = copying.deepcopy(reader)  # by its state, as a process pool sends its arguments
    np.testing.assert_array_equal(sent.read(starts, 0, 99), reader.read(starts, 0, 99))


def test_wide_ids(tmp_path):
    documents = [np.array([70_000, 3, 99_999])]
    info = write(tmp_path / "wide", documents, vocab_size=100_000, eos_id=99_999)
    assert info["width"] == 4
    np.testing.assert_array_equal(open_shards(tmp_path / "wide").document(0), documents[0])


def test_equal_documents_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, make_documents())
    for file in sorted(p.name for p in (tmp_path / "a").iterdir()):
        assert file_digest(tmp_path / "a" / file) == file_digest(tmp_path / "b" / file)


# --- what cannot be written


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "no tokens before"),
        ([EOS], "no tokens before"),
        ([1, 2], "not with the end-of-document id"),
        ([1, EOS, 2, EOS], "inside, at position 1"),
        ([1, VOCAB, EOS], r"id 300 at position 1 is not in 0\.\.299"),
        ([-1, EOS], r"id -1 at position 0"),
    ],
)
def test_documents_that_cannot_be_written(tmp_path, document, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "set", [np.array([1, EOS]), np.array(document, np.int64)])
    assert list(tmp_path.iterdir()) == []


def test_floats_and_nothing_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match="not a row of ids"):
        write(tmp_path / "set", [np.array([1.0, EOS])])
    with pytest.raises(DataError, match="no documents"):
        write(tmp_path / "set", [])


def test_an_existing_output_is_never_replaced(copy):
    with pytest.raises(ConfigError, match="output exists"):
        write(copy, make_documents())


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    def documents():
        yield from make_documents(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", documents())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_fault_of_the_machine(tmp_path):
    """A limit on file size stands for the disk; in a process of its own, as limits stay."""
    program = (
        "import sys, resource, numpy as np\n"
        "from flexolmo_jax.data.shards import write_shards\n"
        "from flexolmo_jax.errors import MachineError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "docs = [np.append(np.random.default_rng(0).integers(0, 60000, 400_000), 60_001)]\n"
        "try:\n"
        "    write_shards(sys.argv[1], docs, vocab_size=60_002, tokenizer_digest='t',\n"
        "                 eos_id=60_001, text_bytes=1)\n"
        "except MachineError as e:\n"
        "    sys.exit(e.exit_code)\n"
    )
    assert resource.RLIMIT_FSIZE >= 0
    command = [sys.executable, "-c", program, str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == MachineError.exit_code, done.stderr
    assert list(tmp_path.iterdir()) == []


# --- what cannot be opened: storage faults


def test_no_sidecar(copy):
    (copy / "tokens.json").unlink()
    with pytest.raises(DataError, match="no sidecar"):
        open_shards(copy)


@pytest.mark.parametrize("kind", ["truncated", "padded"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_changed_size(copy, kind, verify):
    file = copy / FIRST
    size = file.stat().st_size
    content = file.read_bytes()
    file.write_bytes(content[:-100] if kind == "truncated" else content + b"\0")
    offset = size - 100 if kind == "truncated" else size
    with pytest.raises(DataError, match=rf"{kind}.*{FIRST}, offset {offset}"):
        open_shards(copy, verify=verify)


def test_an_empty_shard_file(copy):
    (copy / FIRST).write_bytes(b"")
    with pytest.raises(DataError, match=f"truncated.*{FIRST}, offset 0"):
        open_shards(copy, verify=False)


def test_a_missing_shard(copy):
    (copy / FIRST).unlink()
    with pytest.raises(DataError, match=f"missing.*{FIRST}"):
        open_shards(copy, verify=False)


def test_a_linked_shard(copy, pristine):
    (copy / FIRST).unlink()
    (copy / FIRST).symlink_to(pristine / FIRST)
    with pytest.raises(DataError, match=f"not a plain file.*{FIRST}"):
        open_shards(copy)


def test_a_shard_that_the_sidecar_does_not_know(copy):
    shutil.copy(copy / FIRST, copy / "zzz.array_record")
    with pytest.raises(DataError, match=r"does not know.*zzz\.array_record"):
        open_shards(copy, verify=False)


def test_swapped_shards(copy):
    first, second = copy / FIRST, copy / "tokens-00001.array_record"
    first.rename(copy / "x")
    second.rename(first)
    (copy / "x").rename(second)
    with pytest.raises(DataError, match=FIRST):
        open_shards(copy)


def test_missing_and_altered_lengths(copy):
    file = copy / "document_lengths.npy"
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="lengths were altered"):
        open_shards(copy, verify=False)
    file.unlink()
    with pytest.raises(DataError, match="lengths are missing"):
        open_shards(copy, verify=False)


def test_lengths_with_objects_are_not_unpickled(copy):
    np.save(copy / "document_lengths.npy", np.array([{}], object), allow_pickle=True)
    edit(copy, document_lengths_digest=file_digest(copy / "document_lengths.npy"))
    with pytest.raises(DataError, match="cannot be read"):
        open_shards(copy, verify=False)


def test_lengths_that_contradict_the_sidecar(copy):
    lengths = np.load(copy / "document_lengths.npy", allow_pickle=False)
    short = lengths.copy()
    short[0], short[1] = 1, lengths[0] + lengths[1] - 1  # the sum still fits
    for changed in (lengths[:-1], lengths.astype(np.int32), lengths + 1, lengths * -1, short):
        np.save(copy / "document_lengths.npy", changed, allow_pickle=False)
        edit(copy, document_lengths_digest=file_digest(copy / "document_lengths.npy"))
        with pytest.raises(DataError, match="contradict the sidecar"):
            open_shards(copy, verify=False)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(pristine, tmp_path_factory, data):
    names = sorted(p.name for p in pristine.iterdir())
    folder = tmp_path_factory.mktemp("flip") / "set"
    shutil.copytree(pristine, folder)
    file = folder / data.draw(st.sampled_from(names))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(DataError):
        open_shards(folder)
    shutil.rmtree(folder)


# --- what cannot be opened: the wrong data


def test_another_tokenizer(pristine):
    with pytest.raises(DataError, match="another tokenizer"):
        open_shards(pristine, tokenizer_digest="sha256:other", verify=False)


def test_a_vocabulary_larger_than_the_model(pristine):
    open_shards(pristine, vocab_size=VOCAB + 1, verify=False)
    with pytest.raises(DataError, match=r"larger vocabulary.*at most 299"):
        open_shards(pristine, vocab_size=VOCAB - 1, verify=False)


def test_an_edited_sidecar(copy):
    edit(copy, reseal=False, text_bytes=1001)
    with pytest.raises(DataError, match="edited or damaged"):
        open_shards(copy, verify=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2 instead of 1"),
        ({"kind": "model"}, "kind 'tokens'"),
        ({"extra": 1}, "unknown keys: extra"),
        ({"width": 4}, "width 4, but a vocabulary of 300 needs 2"),
        ({"width": 3}, "width or files"),
        ({"width": "2"}, "width or files"),
        ({"tokens": -1}, "wrong type or range: tokens"),
        ({"tokens": 5}, "do not add up"),
        ({"documents": 5}, "do not add up"),
        ({"documents": 0}, "holds no documents"),
        ({"documents": True}, "wrong type or range: documents"),
        ({"files": {}}, "holds no documents"),
        ({"files": []}, "width or files"),
        ({"max_id": VOCAB}, "out of order"),
        ({"eos_id": VOCAB}, "out of order"),
        ({"document_lengths_file": "../x.npy"}, "document_lengths_file"),
        ({"tokenizer_digest": None}, "wrong type or range: tokenizer_digest"),
    ],
)
def test_a_forged_sidecar(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(DataError, match=message):
        open_shards(copy, verify=False)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_sidecar_that_is_not_one(copy, content):
    (copy / "tokens.json").write_bytes(content)
    with pytest.raises(DataError, match="sidecar"):
        open_shards(copy, verify=False)


def test_a_path_out_of_the_directory(copy):
    files = files_of(copy)
    files["../" + FIRST] = files.pop(FIRST)
    edit(copy, files=files)
    with pytest.raises(DataError, match="file name that is not allowed"):
        open_shards(copy, verify=False)


def test_a_faulty_file_entry(copy):
    for fault in ({"documents": 1}, 7, {**files_of(copy)[FIRST], "bytes": "9"}):
        edit(copy, files={**files_of(copy), FIRST: fault})
        with pytest.raises(DataError, match=f"faulty entry for {FIRST}"):
            open_shards(copy, verify=False)


def test_a_duplicate_shard(tmp_path):
    """The same documents twice, with everything in the sidecar made to fit."""
    documents = make_documents(6)
    per_file = sum(len(d) for d in documents)
    write(tmp_path / "set", documents + documents, shard_tokens=per_file)
    assert len(files_of(tmp_path / "set")) == 2
    with pytest.raises(DataError, match="duplicate"):
        open_shards(tmp_path / "set", verify=False)


def test_an_id_out_of_range(copy):
    records = records_of(copy)
    rewrite(copy, FIRST, [*records[:3], replace_id(records[3], 0, 40_000), *records[4:]])
    with pytest.raises(DataError, match=rf"id 40000 at position 0.*{FIRST}, record 3"):
        open_shards(copy)


def test_a_missing_end_of_document(copy):
    records = records_of(copy)
    rewrite(copy, FIRST, [*records[:2], replace_id(records[2], -1, 7), *records[3:]])
    with pytest.raises(DataError, match=rf"ends with id 7.*{FIRST}, record 2"):
        open_shards(copy)


def test_an_end_of_document_inside(copy):
    records = records_of(copy)
    rewrite(copy, FIRST, [replace_id(records[0], 0, EOS), *records[1:]])
    with pytest.raises(DataError, match=rf"inside, at position 0.*{FIRST}, record 0"):
        open_shards(copy)


def test_the_wrong_width(copy):
    """32-bit ids in files that the sidecar calls 16-bit."""
    wide = [np.frombuffer(r, "<u2").astype("<u4").tobytes() for r in records_of(copy)]
    rewrite(copy, FIRST, wide)
    with pytest.raises(DataError, match=rf"another length.*{FIRST}, record 0"):
        open_shards(copy)


def test_a_lost_or_torn_record(copy):
    records = records_of(copy)
    rewrite(copy, FIRST, records[:-1])
    with pytest.raises(DataError, match=rf"number of records.*{FIRST}"):
        open_shards(copy)
    rewrite(copy, FIRST, [*records[:-1], records[-1][:-1]])
    with pytest.raises(DataError, match=rf"another length.*record {len(records) - 1}"):
        open_shards(copy)


def test_swapped_records_of_one_length_are_found_by_the_digest(copy):
    records = records_of(copy)
    content = (copy / FIRST).read_bytes()
    writer = array_record_module.ArrayRecordWriter(str(copy / FIRST), "group_size:1")
    for record in [replace_id(records[0], 0, 5), *records[1:]]:
        writer.write(record)
    writer.close()
    assert len(content) == (copy / FIRST).stat().st_size
    with pytest.raises(DataError, match=rf"was altered.*{FIRST}"):
        open_shards(copy)


def test_bounds_that_do_not_hold(copy):
    edit(copy, min_id=0 if open_shards(copy).info["min_id"] else 1)
    with pytest.raises(DataError, match="range of the ids"):
        open_shards(copy)


def test_a_file_that_is_no_record_file(copy):
    size = files_of(copy)[FIRST]["bytes"]
    (copy / FIRST).write_bytes(b"\x07" * size)
    files = files_of(copy)
    files[FIRST]["digest"] = file_digest(copy / FIRST)
    edit(copy, files=files)
    with pytest.raises(DataError, match=FIRST):
        open_shards(copy)

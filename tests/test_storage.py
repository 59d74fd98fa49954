# SPDX-License-Identifier: Apache-2.0
"""Object storage by URL, against a server on loopback: s3:// and gs:// by one code path."""

import concurrent.futures
import shutil
import sys
import threading
import time
import traceback

import data_helpers
import expert_helpers
import numpy as np
import object_store
import pytest

from flexolmo_jax.data import remote_shards, shards
from flexolmo_jax.errors import (
    ConfigError,
    DataError,
    FlexOlmoError,
    MachineError,
    RefusedError,
)
from flexolmo_jax.experts import leafio, model_dir, model_info, regions, remote, stitch, verify
from flexolmo_jax.experts import slice as slices
from flexolmo_jax.storage import cache, client, output, urls

BOTH = pytest.mark.parametrize("scheme", urls.SCHEMES)


@pytest.fixture(scope="module")
def server():
    with object_store.running("bucket") as variables:
        yield variables


@pytest.fixture
def at(server, tmp_path, monkeypatch):
    """A place in the bucket that is this test's own, and a cache that is too."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return f"bucket/{tmp_path.name}"


def send(folder, url):
    """Uploads a directory file by file, as `aws s3 cp --recursive` would."""
    for name, data in expert_helpers.file_bytes(folder).items():
        client.write(f"{url}/{name}", data)
    return url


def flip(url):
    """Changes one bit of an object."""
    data = bytearray(client.read(url))
    data[len(data) // 2] ^= 1
    client.write(url, bytes(data))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("gs://bucket", "gs://bucket"),
        ("s3:/bucket/a", "s3://bucket/a"),  # what pathlib makes of it
        ("/tmp/s3/a", None),
        ("runs/a", None),
        ("C:/runs", None),
    ],
)
def test_urls_and_paths_are_told_apart(text, expected):
    assert urls.as_url(text) == expected


@pytest.mark.parametrize(
    "text", ["s4://bucket/a", "https://host/a", "s3://UPPER/a", "s3://bucket/../a", "s3://b/a//c"]
)
def test_urls_that_cannot_be_used_are_refused(text):
    with pytest.raises(ConfigError):
        urls.as_url(text)


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(ConfigError) as caught:
        urls.as_url("s3://AKIA:hush@bucket/a")
    assert "hush" not in str(caught.value) and "environment" in str(caught.value)


# Broken once by writing without mode="create": the second write replaced the first.
@BOTH
def test_objects_are_written_listed_and_read_by_range(scheme, at):
    url = f"{scheme}://{at}"
    assert client.list_objects(url) == {} and client.read(f"{url}/a") is None
    assert client.write(f"{url}/a", b"0123456789", create=True)
    assert not client.write(f"{url}/a", b"other", create=True)
    client.write(f"{url}/b/c", np.arange(4, dtype=np.uint8))
    entry = client.list_objects(url)["a"]
    assert entry.size == 10 and client.list_top(url)[1] == ["b"]
    assert client.read_range(f"{url}/a", 2, 5, entry.etag) == b"234"
    with pytest.raises(DataError, match=r"shorter|range"):
        client.read_range(f"{url}/a", 8, 12)
    client.write(f"{url}/a", b"9876543210")
    with pytest.raises(DataError, match="changed while"):
        client.read_range(f"{url}/a", 2, 5, entry.etag)
    client.delete_all(url)
    assert client.list_objects(url) == {}


@BOTH
def test_large_objects_travel_in_parts(scheme, at, monkeypatch):
    monkeypatch.setattr(client, "PART", 6 << 20)
    data = np.random.default_rng(0).bytes(14 << 20)
    client.write(f"{scheme}://{at}/large", data)
    assert b"".join(client.stream(f"{scheme}://{at}/large", len(data))) == data


@BOTH
def test_a_missing_bucket_is_named(scheme, at):
    for work in (client.list_objects, client.read, lambda url: client.write(url, b"")):
        with pytest.raises(ConfigError, match=f"no such bucket.*{scheme}://elsewhere"):
            work(f"{scheme}://elsewhere/a")


@BOTH
def test_no_network_is_told_within_seconds(scheme, at, monkeypatch):
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(client, "RETRIES", 4)  # All of them would take twenty seconds.
    monkeypatch.setenv("AWS_ENDPOINT_URL", nobody)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", nobody)
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"cannot be reached.*127\.0\.0\.1"):
        client.list_objects(f"{scheme}://{at}")
    assert time.monotonic() - began < 25


# Broken once with the server's text as `got`.
def test_refused_access_names_the_code_and_no_credential(at, monkeypatch):
    from obstore import exceptions

    answer = (
        "403 Forbidden status code: 403 <Error><Code>SignatureDoesNotMatch</Code>"
        f"<AWSAccessKeyId>{object_store.KEY}</AWSAccessKeyId>{object_store.SECRET}</Error>"
    )
    expected = pytest.raises(ConfigError, match=r"refuses access.*403 SignatureDoesNotMatch")
    with expected as caught, client._faults("s3://bucket/a"):
        raise exceptions.PermissionDeniedError(answer)
    shown = "".join(traceback.format_exception(caught.value))
    assert object_store.KEY not in shown.replace(answer, "") and caught.value.__suppress_context__
    assert object_store.SECRET not in str(caught.value)


def test_no_credentials_are_told(at, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    where = "No credentials: http://169.254.169.254/latest/api/token"
    with pytest.raises(ConfigError, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
        raise client._named("s3://bucket/a", RuntimeError(where))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An anchor, two slices, and the model of them, on disk."""
    root = tmp_path_factory.mktemp("made")
    anchor = expert_helpers.make_anchor(root / "anchor")
    for seed, name in enumerate(("code", "math"), 1):
        expert_helpers.make_slice(root / "slices" / name, anchor, name, seed)
    parts = [root / "slices" / name for name in ("code", "math")]
    stitch.execute(stitch.plan(root / "anchor", parts), root / "model")
    return root


@BOTH
def test_a_model_of_a_url_is_the_model(scheme, at, tmp_path, made):
    model = made / "model"
    url = send(model, f"{scheme}://{at}/model")
    assert verify.verify(url) == [] and verify.identity(url) == verify.identity(model)
    info, params, opened = model_dir.load_model(url)
    assert expert_helpers.leaf_equal(params, model_dir.load_model(model)[1])
    assert opened == tuple(info.slots)
    # And from parts of several places.
    anchor = send(made / "anchor", f"{scheme}://{at}/anchor")
    part = send(made / "slices/code", f"{scheme}://{at}/slices/code")
    plan = stitch.plan(anchor, [part, made / "slices/math"])
    stitch.execute(plan, tmp_path / "again")
    assert expert_helpers.file_bytes(tmp_path / "again") == expert_helpers.file_bytes(model)


# Broken once by copying every expert with the model.
def test_no_byte_of_an_expert_that_is_not_asked_for_is_read(at, tmp_path, made):
    model = made / "model"
    url = send(model, f"s3://{at}/model")
    client.delete_all(f"{url}/experts/math/params")
    _, params, opened = model_dir.load_model(url, experts=["public", "code"])
    _, expected, _ = model_dir.load_model(model, experts=["public", "code"])
    assert opened == ("public", "code") and expert_helpers.leaf_equal(params, expected)
    with pytest.raises(RefusedError, match=r"experts/math/params.*not there"):
        model_dir.load_model(url)


# Broken once by not comparing the digest of what arrives.
def test_a_flipped_bit_is_refused_with_the_name_of_its_object(at, tmp_path, made):
    model = made / "model"
    url = send(model, f"s3://{at}/model")
    name = "experts/code/params/w_up/0.0.0"
    flip(f"{url}/{name}")
    with pytest.raises(RefusedError, match=f"{url}/{name}"):
        model_dir.load_model(url)
    assert [p.path for p in verify.verify(url)] == [f"{url}/{name}"]
    # What was good when it was copied is still seen to be damaged by verify, which reads again.
    client.write(f"{url}/{name}", (model / name).read_bytes())
    model_dir.load_model(url)
    flip(f"{url}/{name}")
    assert [p.path for p in verify.verify(url)] == [f"{url}/{name}"]


def test_objects_that_no_list_names_are_refused(at, tmp_path, made):
    model = made / "model"
    url = send(model, f"s3://{at}/model")
    client.write(f"{url}/optimizer/state", b"x")
    with pytest.raises(RefusedError, match=r"leftover-state.*optimizer/state"):
        model_info.read_info(url)


def test_a_url_with_nothing_is_no_model(at):
    with pytest.raises(RefusedError, match="nothing under this URL"):
        model_info.read_info(f"s3://{at}/none")


def test_the_cache_is_filled_once_by_many(at, tmp_path, monkeypatch, made):
    model = made / "model"
    url, read = send(model, f"s3://{at}/model"), []
    original = client.read_range
    monkeypatch.setattr(client, "read_range", lambda u, *a: read.append(u) or original(u, *a))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: model_dir.load_model(url)[1], range(4)))
    assert len(read) == len(set(read))
    for params in loaded[1:]:
        assert expert_helpers.leaf_equal(params, loaded[0])


# Broken once by reading the hollow file: zeros, which are not the leaf.
def test_a_host_reads_only_the_regions_it_needs(at, tmp_path, monkeypatch, made):
    monkeypatch.setattr(remote, "LARGE", 256)
    model = made / "model"
    url = send(model, f"s3://{at}/model")
    checked = []
    original = cache.check
    monkeypatch.setattr(
        cache, "check", lambda w, *a: (None if a else checked.append(w.url)) or original(w, *a)
    )
    both = []
    for index in range(2):
        with remote.by_region(index, 2):
            piece, _ = slices.read_slice_info(f"{url}/experts/code")
        both.append(set(checked))
        checked.clear()
    large = {n for n, e in client.list_objects(f"{url}/experts/code").items() if e.size >= 256}
    assert both[0].isdisjoint(both[1])
    assert {u.rpartition("/code/")[2] for u in both[0] | both[1]} >= large - {"flexolmo.json"}
    name, entry = "w_up", piece.manifest["leaves"]["w_up"]
    whole = model_dir.load_model(model, experts=["code"])
    slot = whole[0].slots["code"]
    found = leafio.read_region(piece.path / "params", name, entry, ((1, 2), (2, 5), (0, 12)))
    np.testing.assert_array_equal(found, whole[1]["experts"][name][1:2, slot, 2:5])
    file = piece.path / "params/w_up/0.0.0"
    assert regions.source(file) and not any(file.read_bytes())
    # The version that was checked, or none.
    flip(f"{url}/experts/code/params/w_up/0.0.0")
    with pytest.raises(DataError, match="changed while"):
        leafio.read_region(piece.path / "params", name, entry, ((1, 2), (2, 5), (0, 12)))


def directory(folder, text):
    """Something to upload."""
    folder.mkdir(parents=True)
    for number in range(6):
        (folder / f"part-{number}").write_text(f"{text} {number}")
    (folder / "flexolmo.json").write_text(text)
    return folder


@BOTH
def test_an_output_appears_whole_and_is_never_replaced(scheme, at, tmp_path):
    url = f"{scheme}://{at}/out"
    with output.directory(url, "flexolmo.json") as local:
        directory(local, "one")
        assert client.list_objects(url) == {}
    assert len(client.list_objects(url)) == 7
    with pytest.raises(ConfigError, match="exists already"), output.directory(url, "flexolmo.json"):
        pytest.fail("the work must not begin")
    assert client.read(f"{url}/flexolmo.json") == b"one"
    with pytest.raises(KeyError), output.directory(f"{scheme}://{at}/failed", "flexolmo.json"):
        raise KeyError
    assert client.list_objects(f"{scheme}://{at}/failed") == {}


# Broken once by uploading the marker with the other files.
def test_an_upload_cut_off_is_no_model_and_can_go_on(at, tmp_path, monkeypatch, made):
    model = made / "model"
    url, original = f"s3://{at}/out", client.write

    def cut_off(where, data, **options):
        if where.endswith("tokenizer.json"):
            raise MachineError("cut off")
        return original(where, data, **options)

    monkeypatch.setattr(client, "write", cut_off)
    with pytest.raises(MachineError, match="cut off"):
        output.upload(model, url, "flexolmo.json")
    with pytest.raises(RefusedError, match="not finished"):
        model_info.read_info(url)
    monkeypatch.setattr(client, "write", original)
    other = directory(tmp_path / "other", "other")
    with pytest.raises(ConfigError, match="Another writer is filling"):
        output.upload(other, url, "flexolmo.json")
    output.upload(model, url, "flexolmo.json")
    assert verify.verify(url) == [] and output.CLAIM not in client.list_objects(url)


# Broken once without the claim: files of both were there.
@BOTH
def test_of_two_writers_one_wins_and_the_other_is_told(scheme, at, tmp_path):
    url, gate = f"{scheme}://{at}/out", threading.Barrier(2)

    def write(text):
        folder = directory(tmp_path / text, text)
        gate.wait()
        try:
            output.upload(folder, url, "flexolmo.json")
        except ConfigError as e:
            return str(e)
        return ""

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        told = dict(zip(("one", "two"), pool.map(write, ("one", "two")), strict=True))
    (winner,) = [text for text, error in told.items() if not error]
    (error,) = filter(None, told.values())
    assert "Another writer" in error
    found = {client.read(f"{url}/{name}").decode() for name in client.list_objects(url)}
    assert found == {winner, *(f"{winner} {i}" for i in range(6))}


def test_an_output_with_other_objects_is_refused(at):
    client.write(f"s3://{at}/out/mine", b"")
    url = f"s3://{at}/out"
    with pytest.raises(ConfigError, match="other objects"), output.directory(url, "flexolmo.json"):
        pytest.fail("the work must not begin")


@BOTH
def test_shards_of_a_url_are_the_same_stream(scheme, at, tmp_path):
    data_helpers.write(tmp_path / "set", data_helpers.make_documents())
    url = send(tmp_path / "set", f"{scheme}://{at}/set")
    here, there = shards.open_shards(tmp_path / "set"), shards.open_shards(url)
    assert there.n_tokens == here.n_tokens
    np.testing.assert_array_equal(there.tokens(0, 500), here.tokens(0, 500))
    assert remote_shards.find(f"{scheme}://{at}", "heldout") == {"set": url}


# Broken once by fetching all files when the set is opened.
def test_a_host_fetches_only_the_files_it_reads(at, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MEMORY_BYTES", 0)
    documents = data_helpers.make_documents()
    data_helpers.write(tmp_path / "set", documents)
    url = send(tmp_path / "set", f"s3://{at}/set")
    opened = shards.open_shards(url)
    assert len(opened.info["files"]) > 2 and not list(opened.path.glob("*.array_record"))
    np.testing.assert_array_equal(opened.document(0), documents[0])
    assert [p.name for p in opened.path.glob("*.array_record")] == list(opened.info["files"])[:1]
    last = list(opened.info["files"])[-1]
    flip(f"{url}/{last}")
    with pytest.raises(DataError, match=r"changed|altered") as caught:
        opened.document(len(documents) - 1)
    assert last in str(caught.value)
    with pytest.raises(DataError, match=f"altered.*{url}/{last}"):
        shards.open_shards(url).document(len(documents) - 1)


def test_shards_whose_files_do_not_fit_the_sidecar_are_refused(at, tmp_path):
    data_helpers.write(tmp_path / "set", data_helpers.make_documents())
    url = send(tmp_path / "set", f"s3://{at}/set")
    first = "tokens-00000.array_record"
    client.write(f"{url}/extra.array_record", b"")
    with pytest.raises(DataError, match=r"does not know.*extra"):
        shards.open_shards(url)
    client.delete(url, ["extra.array_record", first])
    with pytest.raises(DataError, match=f"missing.*{first}"):
        shards.open_shards(url)
    client.write(f"{url}/{first}", b"short")
    with pytest.raises(DataError, match=f"another size.*{first}"):
        shards.open_shards(url)
    client.delete(url, ["tokens.json"])
    with pytest.raises(DataError, match="no sidecar"):
        shards.open_shards(url)


def test_without_the_package_the_extra_is_named(at, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    client._open.cache_clear()
    with pytest.raises(FlexOlmoError, match=r"flexolmo-jax\[cloud\]"):
        client.list_objects(f"s3://{at}")
    client._open.cache_clear()


def test_the_cache_may_be_deleted_at_any_time(at, tmp_path, made):
    model = made / "model"
    url = send(model, f"s3://{at}/model")
    first = model_dir.load_model(url)[1]
    shutil.rmtree(cache.root())
    assert expert_helpers.leaf_equal(model_dir.load_model(url)[1], first)

# SPDX-License-Identifier: Apache-2.0
"""From slices on disk to a mesh. Broken once each: a budget that lets everything through, shards
cut at the wrong end of a row, a process that checks nothing, reading by the target alone."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading

import jax
import numpy as np
import pytest
from expert_helpers import CONFIG, make_anchor, make_slice, peak_memory

from flexolmo_jax import tree as trees
from flexolmo_jax.experts import leafio, loading, model_dir, stitch

P = jax.sharding.PartitionSpec
AXES = ("data", "expert", "model")


def grid(*shape):
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def named(mesh, *spec):
    return jax.sharding.NamedSharding(mesh, P(*spec))


def source(root, shape, slots=None, seed=0):
    """An array of a few slots, its parts on disk, and the same values in memory."""
    rng = np.random.default_rng(seed)
    one = (shape[0], *shape[2:]) if slots else shape
    whole, parts = np.zeros(shape, np.float32), []
    for slot in slots or [None]:
        values = rng.standard_normal(one).astype(np.float32)
        whole[:, slot] = values if slots else whole[:, slot]
        whole = whole if slots else values
        folder = root / f"{len(parts)}"
        table, _ = leafio.write_tree(folder, leafio.leaves_of({"w": values}))
        parts.append(loading.Part(folder, "w", table["w"], slot))
    return loading.Source(tuple(shape), np.dtype("float32"), tuple(parts)), whole


@pytest.fixture
def counted(monkeypatch):
    """Bytes that were read through leafio, one number per read."""
    reads, read = [], leafio._read

    def spy(file, start, out):
        reads.append(out.nbytes)
        return read(file, start, out)

    monkeypatch.setattr(leafio, "_read", spy)
    return reads


CASES = {
    "whole": ((4, 6, 8, 16), [0, 1, 3, 5], ()),
    "slots": ((4, 6, 8, 16), [0, 1, 3, 5], (None, "expert")),
    "inner": ((4, 6, 8, 16), [0, 1, 3, 5], (None, "expert", "model", "data")),
    "last alone": ((4, 6, 8, 16), [2], (None, None, None, ("data", "model"))),
    "indivisible": ((3, 2, 5, 16), [0, 1], (None, "expert", None, "data")),
    "no slot axis": ((8, 6, 16), None, (None, "model", "data")),
    "vector": ((16,), None, ("data",)),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(("block", "hosts"), [(16, 1), (16, 2), (leafio.BLOCK, 1)])
def test_every_sharding_gives_the_same_values(tmp_path, monkeypatch, kind, block, hosts):
    monkeypatch.setattr(leafio, "BLOCK", block)
    monkeypatch.setattr(loading, "crosses_hosts", lambda _: hosts > 1)
    shape, slots, spec = CASES[kind]
    made, whole = source(tmp_path, shape, slots)
    mesh = grid(2, 2, 2)
    wanted = named(mesh, *spec)

    def where(name, _):
        return wanted if name == "x" else None

    found = loading.spread(loading.place({"x": made, "plain": made}, where), where)
    assert found["x"].sharding == wanted and np.array_equal(found["x"], whole)
    assert isinstance(found["plain"], np.ndarray) and np.array_equal(found["plain"], whole)


def test_short_runs_are_read_in_long_ones_and_exchanged(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(leafio, "BLOCK", 64)
    monkeypatch.setattr(leafio, "RUN", 64)
    made, whole = source(tmp_path, (4, 2, 8, 16), [0, 1])
    mesh = grid(4, 2, 1)
    target = named(mesh, None, "expert", None, "data")
    assert loading.readable(made, target) is target  # One host reads through its page cache.
    monkeypatch.setattr(loading, "crosses_hosts", lambda _: True)
    by = loading.readable(made, target)
    assert by.is_equivalent_to(named(mesh, None, "expert", "data"), 4)
    read = loading.place({"x": made}, lambda *_: target)
    assert read["x"].sharding == by  # Nobody waits for another host before all have read.
    found = loading.spread(read, lambda *_: target)["x"]
    assert not read
    assert found.sharding == target and np.array_equal(found, whole)
    assert sum(counted) == whole.nbytes  # Each byte once, where cutting rows would read all of it
    counted.clear()
    monkeypatch.setattr(loading, "readable", lambda _, target: target)
    loading.place({"x": made}, lambda *_: target)
    assert sum(counted) == 4 * whole.nbytes
    # Where no dimension further out is divided, nothing moves.
    odd, values = source(tmp_path / "odd", (3, 2, 5, 16), [0, 1])
    assert np.array_equal(loading.place({"x": odd}, lambda *_: target)["x"], values)


def test_a_leaf_of_one_block_is_read_by_its_target(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "crosses_hosts", lambda _: True)
    made, _ = source(tmp_path, (4, 2, 8, 16), [0, 1])
    target = named(grid(4, 2, 1), None, "expert", None, "data")
    assert loading.readable(made, target) is target


def test_each_distinct_shard_is_read_once(tmp_path, counted):
    made, whole = source(tmp_path, (8, 16))
    for spec in ((), ("expert",), ("data", "expert"), (("data", "expert"),)):
        counted.clear()
        loading.place({"x": made}, lambda *_, s=spec: named(grid(2, 2, 2), *s))
        # Two halves of every row cannot be read apart: all of a block is.
        assert sum(counted) == whole.nbytes * (2 if spec == ("data", "expert") else 1)


def test_a_host_reads_only_the_shards_of_its_devices(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(leafio, "BLOCK", 64)
    monkeypatch.setattr(leafio, "RUN", 32)
    made, whole = source(tmp_path, (4, 8, 8, 16), list(range(8)))
    mesh = grid(2, 4, 1)
    target = named(mesh, None, "expert", "data")
    host = set(mesh.devices[1, 2:].reshape(-1))

    class Half(jax.sharding.NamedSharding):
        def addressable_devices_indices_map(self, global_shape):
            found = super().addressable_devices_indices_map(global_shape)
            return {d: i for d, i in found.items() if d in host}

    mine = Half(mesh, target.spec)
    regions = leafio.owners(made.shape, mine)
    assert len(regions) == 2
    for region in regions:
        want = whole[tuple(slice(*bounds) for bounds in region)]
        assert np.array_equal(made.read(region), want)
    assert sum(counted) == whole.nbytes // 4


def test_a_budget_is_kept_and_nobody_waits_for_ever():
    budget, held, most = loading.Budget(100), [0], [0]
    lock = threading.Lock()

    def work(size):
        with budget.hold(size):
            with lock:
                held[0] += min(size, 100)
                most[0] = max(most[0], held[0])
            threading.Event().wait(0.001)
            with lock:
                held[0] -= min(size, 100)

    sizes = [30, 70, 100, 5000, 1, 99, 50] * 6
    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert 60 < most[0] <= 100 and budget.free == 100


def test_beside_the_arrays_a_load_holds_the_budget(tmp_path, monkeypatch):
    """Devices of this machine hold their arrays in the same memory, so these are taken off."""
    monkeypatch.setattr(loading, "BUDGET", 8 << 20)
    config = CONFIG.replace(d_model=256, d_ffn=8192, n_layers=4)
    anchor = make_anchor(tmp_path / "anchor", config=config)
    piece = make_slice(tmp_path / "a", anchor, "a")
    stitch.execute(stitch.plan(anchor.path, [piece.path]), tmp_path / "m", link=True)
    mesh = grid(2, 2, 2)

    def sharding(name, shape):
        if name.startswith("shared"):
            return named(mesh)
        wide = [d for d, n in enumerate(shape) if n == 8192]
        return named(mesh, *["model" if d in wide else None for d in range(len(shape))])

    model_dir.load_model(anchor.path, sharding_fn=sharding)  # compiles
    with peak_memory() as grown:
        _, params, _ = model_dir.load_model(tmp_path / "m", sharding_fn=sharding)
    leaves = jax.tree.leaves(params)
    arrays = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards)
    largest = max(leaf.nbytes for leaf in leaves)
    assert largest == 64 << 20
    # A leaf held whole would be eight budgets; an allocator beside it keeps up to two.
    assert grown[0] < arrays + 6 * loading.BUDGET


WORKER = """
    import json, sys
    import jax, numpy as np
    from flexolmo_jax.errors import RefusedError
    from flexolmo_jax.experts import leafio, model_dir, onepass
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    address, index, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(address, 2, index)
    leafio.BLOCK = leafio.RUN = 256
    reads, checked, read, judge = [], [], leafio._read, onepass.judge

    def spy(file, start, out):
        reads.append(out.nbytes)
        return read(file, start, out)

    def looked(items, note=None):
        found = judge(items, note)
        checked.append(found.size)
        return found

    leafio._read, onepass.judge = spy, looked
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec

    def sharding(name, shape):
        # The last dimension that can be, which lies on disk in the shortest runs.
        wide = [d for d, n in enumerate(shape) if n % 4 == 0 and (d != 1 or "experts" not in name)]
        spec = ["data" if d == wide[-1] else None for d in range(len(shape))] if wide else []
        return jax.sharding.NamedSharding(mesh, P(*spec))

    try:
        _, params, _ = model_dir.load_model(path, sharding_fn=sharding, together=True)
    except RefusedError as e:
        print(json.dumps({"error": str(e)}), flush=True)
        raise SystemExit(0)
    loaded = sum(reads)
    _, plain, _ = model_dir.load_model(path, verify=False)
    same = all(
        np.array_equal(np.asarray(s.data), want[s.index])
        for leaf, want in zip(jax.tree.leaves(params), jax.tree.leaves(plain))
        for s in leaf.addressable_shards
    )
    print(json.dumps({"reads": loaded, "checked": checked[0], "same": same}))
"""


def two_processes(path):
    """What two processes of one mesh say after loading a model together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = textwrap.dedent(WORKER)
    command = [sys.executable, "-c", script, address]
    running = [
        subprocess.Popen(
            [*command, str(i), str(path)], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        for i in range(2)
    ]
    told = [process.communicate(timeout=240)[0].splitlines() for process in running]
    # The library that connects them writes lines of its own, whenever it likes.
    return [json.loads(next(x for x in lines if x.startswith("{"))) for lines in told]


def test_processes_of_one_mesh_share_the_reading_and_the_checking(tmp_path):
    config = CONFIG.replace(d_model=32, d_ffn=64, vocab_size=64)
    anchor = make_anchor(tmp_path / "anchor", config=config)
    pieces = [make_slice(tmp_path / n, anchor, n, i + 1).path for i, n in enumerate("ab")]
    stitch.execute(stitch.plan(anchor.path, pieces, slots=4), tmp_path / "m", link=True)
    _, plain, _ = model_dir.load_model(tmp_path / "m")
    filled = trees.nbytes(plain["shared"]) + trees.nbytes(plain["experts"]) * 3 // 4
    first, second = two_processes(tmp_path / "m")
    assert first["same"] and second["same"]
    # Half of the bytes each; small leaves, which every device holds, are read by both.
    for told in (first, second):
        assert told["reads"] < 0.6 * filled
    total = first["checked"] + second["checked"]
    assert 0.3 * total < first["checked"] < 0.7 * total
    assert filled < total < 2 * filled
    victim = pieces[1] / "params/w_up/0.0.0"
    victim.write_bytes(victim.read_bytes()[::-1])
    errors = [told["error"] for told in two_processes(tmp_path / "m")]
    assert any(str(victim) in e for e in errors)
    assert all("cannot be loaded" in e for e in errors)
    assert any("another process" in e for e in errors)

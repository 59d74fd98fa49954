# SPDX-License-Identifier: Apache-2.0
"""Counting what a compiled TPU program needs and does, on texts that the real compiler wrote.

`tests/golden/pods` holds such texts, trimmed to what is read (no libtpu is needed here); the
compiler itself is tested in `tests/pods`.
"""

import dataclasses
import gzip
import itertools
import types
from pathlib import Path

import jax
import pytest
import toy

from flexolmo_jax import mesh, metrics, programs
from flexolmo_jax.config import DataConfig, RunConfig
from flexolmo_jax.errors import CheckpointError, ConfigError
from flexolmo_jax.pods import axes, chips, hlo, memory, predict, work
from flexolmo_jax.pods import compile as compiling
from flexolmo_jax.pods.axes import Layout, Place

TEXTS = Path(__file__).parent / "golden" / "pods"
# What `layers.hlo` is: five layers x @ a, tanh, @ b under remat, and the gradient of a and b, for
# 65536 tokens on v5e:2x2 with mesh data 2 x expert 2; a is split (data, expert), b the other way.
L, D, F, TOKENS = 5, 1024, 4096, 65536


def golden(name):
    return gzip.decompress((TEXTS / f"{name}.hlo.gz").read_bytes()).decode()


def layout(name, slices=1, **shape):
    """A mesh over a topology whose devices are numbered along the last torus axis first."""
    topology = chips.parse(name, slices)
    cells = list(itertools.product(*(range(n) for n in topology.dims)))
    places = [
        Place(cell, core, part)
        for part in range(slices)
        for cell in cells
        for core in range(topology.chip.devices)
    ]
    return Layout(topology, shape, places)


# ---- Reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "elements", "size", "space"),
    [
        ("bf16[4,1024,2048]{2,1,0:T(8,128)(2,1)}", 4 * 1024 * 2048, 4 * 1024 * 2048 * 2, 0),
        ("bf16[1,16,64]{2,1,0:T(8,128)(2,1)S(1)}", 1024, 16 * 128 * 2, 1),
        ("f32[1024,2]{0,1:T(2,128)}", 2048, 2048 * 4, 0),
        ("pred[1024,1024]{0,1:T(8,128)(4,1)}", 1 << 20, 1 << 20, 0),
        ("s32[]{:T(128)}", 1, 4, 0),
        ("f8e4m3fn[8,128]", 1024, 1024, 0),
    ],
)
def test_an_array_has_its_padding_and_its_memory(text, elements, size, space):
    (array,) = hlo.arrays(text)
    assert (array.elements, array.size, array.space) == (elements, size, space)


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(CheckpointError, match="Not the text of a compiled program"):
        hlo.Module("hello")


def test_lines_that_a_kernel_breaks_are_read_as_one():
    module = hlo.Module(golden("splash"))
    calls = [i for i in module.computations[module.entry] if i.opcode == "custom-call"]
    names = [c.op_name.split("/")[-2] for c in calls if "pallas_call" in c.op_name]
    assert "splash_mha_fwd_residuals" in names


# ---- Work ------------------------------------------------------------------------------------


def test_loops_are_multiplied_out():
    """Two products forward, one again, four backward: 7 x 2 x tokens x D x F x layers / chips."""
    assert work.read(golden("layers")).flops == 7 * 2 * TOKENS * D * F * L / 4


def test_what_the_forward_pass_leaves_for_the_backward_pass():
    """The input of every layer, bfloat16, half the tokens on a chip."""
    assert work.read(golden("layers")).saved == L * TOKENS // 2 * D * 2


def test_collectives_are_counted_once_and_by_mesh_axis():
    done = work.read(golden("layers"))
    found = compiling.traffic(done, layout("v5e:2x2", data=2, expert=2, model=1))
    weights = D * F * L * 2 / 2
    # Each weight is gathered over data forward and backward; the gradient is scattered back.
    assert found["data"]["all-gather"] == 4 * weights
    assert found["data"]["reduce-scatter"] == 2 * weights
    # The hidden width is split over `expert`: sums of activations, forward and backward.
    assert found["expert"] == {"all-reduce": 2 * L * TOKENS / 2 * D * 2}


HEAD = "HloModule m, is_scheduled=true\n\n"


def program(body, *others):
    """A program of one device with other computations before its entry."""
    return HEAD + "\n\n".join([*others, "ENTRY %main (p: f32[8,128]) -> f32[8,128] {", body, "}"])


# Broken once: collectives that a shard_map asks for all have channel 1, and all but one vanished.
def test_collectives_of_one_channel_are_several_unless_a_chain_joins_them():
    line = (
        "%{name} = f32[128]{{0:T(128)}} all-gather(%p), channel_id={channel}, "
        "replica_groups={{{{0,1}}}}, dimensions={{0}}{more}"
    )
    chain = ', frontend_attributes={chain_id="7"}'

    def count(*lines):
        body = ("%p = f32[64]{0:T(128)} parameter(0)", *lines)
        return sum(
            len(u.collectives) for u in work.read(program("\n".join(f"  {x}" for x in body))).units
        )

    def gather(name, channel, more=""):
        return line.format(name=name, channel=channel, more=more)

    assert count(gather("a", 1), gather("b", 1)) == 2
    assert count(gather("a", 5), gather("b", 5)) == 1
    assert count(gather("a", 1, chain), gather("b", 1, chain)) == 1


@pytest.mark.parametrize(
    ("lines", "flops"),
    [
        # A plain product, 2·M·N·K.
        (
            "  %a = bf16[64,32]{1,0} parameter(0)\n  %b = bf16[32,16]{1,0} parameter(1)\n"
            "  ROOT %c = bf16[64,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
            2 * 64 * 16 * 32,
        ),
        # Five of them at once: the batch is a window that is strided and dilated.
        (
            "  %a = bf16[5,64,32]{2,1,0} parameter(0)\n  %b = bf16[5,32,16]{2,1,0} parameter(1)\n"
            "  ROOT %c = bf16[5,64,16]{2,1,0} convolution(%a, %b), "
            "window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf",
            2 * 5 * 64 * 16 * 32,
        ),
        (
            "  %a = bf16[5,64,32]{2,1,0} parameter(0)\n  %b = bf16[5,32,16]{2,1,0} parameter(1)\n"
            "  ROOT %c = bf16[5,64,16]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, "
            "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}",
            2 * 5 * 64 * 16 * 32,
        ),
    ],
)
def test_flops_of_products(lines, flops):
    assert work.read(program(lines)).flops == flops


def test_a_fusion_reads_slices_and_writes_updates():
    """A layer out of a stack of 16 and back: not the stack."""
    fused = (
        "%f (q.0: f32[16,8,128], q.1: s32[]) -> f32[16,8,128] {\n"
        "  %q.0 = f32[16,8,128]{2,1,0:T(8,128)} parameter(0)\n"
        "  %q.1 = s32[]{:T(128)} parameter(1)\n"
        "  %zero = s32[]{:T(128)} constant(0)\n"
        "  %s = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%q.0, %q.1, %zero, %zero), "
        "dynamic_slice_sizes={1,8,128}\n"
        "  ROOT %u = f32[16,8,128]{2,1,0:T(8,128)} "
        "dynamic-update-slice(%q.0, %s, %q.1, %zero, %zero)\n}"
    )
    body = (
        "  %p = f32[16,8,128]{2,1,0:T(8,128)} parameter(0)\n"
        "  %i = s32[]{:T(128)S(6)} parameter(1)\n"
        "  ROOT %x = f32[16,8,128]{2,1,0:T(8,128)} fusion(%p, %i), kind=kLoop, calls=%f"
    )
    (unit,) = work.read(program(body, fused)).units
    assert (unit.read, unit.written) == (8 * 128 * 4, 8 * 128 * 4)


@pytest.mark.parametrize(("step", "turns"), [(1, 8), (2, 4), (3, 3)])
def test_a_loop_that_was_unrolled_counts_in_larger_steps(step, turns):
    counter = "s32[]{:T(128)}"
    loop = (
        f"%c (c.0: (s32[])) -> pred[] {{\n  %c.0 = ({counter}) parameter(0)\n"
        f"  %n = {counter} constant(8)\n  %i = {counter} get-tuple-element(%c.0), index=0\n"
        "  ROOT %t = pred[] compare(%i, %n), direction=LT\n}",
        f"%b (b.0: (s32[])) -> (s32[]) {{\n  %b.0 = ({counter}) parameter(0)\n"
        f"  %j = {counter} get-tuple-element(%b.0), index=0\n"
        f"  %by = {counter} constant({step})\n  %k = {counter} add(%j, %by)\n"
        "  %x = f32[8,128]{1,0} broadcast(%j), dimensions={}\n"
        f"  ROOT %r = ({counter}) tuple(%k)\n}}",
    )
    body = (
        f"  %p = ({counter}) parameter(0)\n  ROOT %w = ({counter}) while(%p), condition=%c, body=%b"
    )
    done = work.read(program(body, *loop))
    assert [u.times for u in done.units if u.name == "x"] == [turns]


def test_a_loop_whose_turns_are_not_known_is_named():
    loop = (
        "%c (c.0: (s32[])) -> pred[] {\n  %c.0 = (s32[]{:T(128)}) parameter(0)\n"
        "  ROOT %t = pred[] constant(true)\n}",
        "%b (b.0: (s32[])) -> (s32[]) {\n  ROOT %b.0 = (s32[]{:T(128)}) parameter(0)\n}",
    )
    body = (
        "  %p = (s32[]{:T(128)}) parameter(0)\n"
        "  ROOT %w = (s32[]{:T(128)}) while(%p), condition=%c, body=%b"
    )
    assert work.read(program(body, *loop)).unknown_loops == ("w",)


# ---- Kernels ---------------------------------------------------------------------------------

# 2 rows, 8 heads, 4096 queries and keys of width 128, in blocks of 512: one product.
ATTENTION = 2 * 2 * 8 * 4096 * 4096 * 128 * (1 + 1 / 8) / 2


@pytest.mark.parametrize(
    ("name", "products"),
    [("splash", {"fwd": 2, "dkv": 4, "dq": 3}), ("splash_fused", {"fwd": 2, "dkv": 5})],
)
def test_attention_kernels_count_the_causal_half(name, products):
    done = work.read(golden(name))
    found = {u.kernel.split("_")[2]: u.flops for u in done.units if u.kernel}
    assert found == {kind: n * ATTENTION for kind, n in products.items()}
    assert not done.unknown_kernels


def test_a_grouped_product_counts_the_rows_that_groups_hold():
    """4096 rows of a buffer, of which an even load fills a quarter."""
    full = work.read(golden("ragged"))
    even = work.read(golden("ragged"), even_rows=1024)
    assert full.flops == 2 * 4096 * 1024 * 2048
    assert even.flops == full.flops / 4
    assert not full.unknown_kernels


def test_a_kernel_without_a_formula_is_named():
    body = (
        "  %p = f32[8,128]{1,0:T(8,128)} parameter(0)\n"
        '  ROOT %k = f32[8,128]{1,0:T(8,128)} custom-call(%p), custom_call_target="tpu_custom_call"'
        ', metadata={op_name="jit(f)/mystery/pallas_call"}'
    )
    assert work.read(program(body)).unknown_kernels == ("mystery",)


# ---- Axes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("{{0,1},{2,3}}", [0, 1]),
        ("[4,2]<=[8]", [0, 1]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [0, 2, 4, 6]),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", [0, 1]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
        ("", list(range(8))),
    ],
)
def test_groups_in_every_notation(text, first):
    assert axes.members(text, 8)[0] == first


def test_a_group_knows_its_mesh_axis_and_its_torus():
    over = layout("v5e:4x16", data=4, expert=16, model=1)
    data = over.span("mesh['axis_0'=4,'axis_1'=16] {'axis_0'}")
    expert = over.span("mesh['axis_0'=4,'axis_1'=16] {'axis_1'}")
    both = over.span("")
    assert (data.mesh, data.torus) == ("data", ((4, False),))
    # Sixteen chips in a row are closed to a ring on v5e, four are not.
    assert (expert.mesh, expert.torus) == ("expert", ((16, True),))
    assert (both.mesh, both.size) == ("data+expert", 64)


def test_a_permutation_knows_its_busiest_link():
    over = layout("v5e:2x16", data=2, expert=16, model=1)
    assert over.span("pairs:{{0,1},{1,2},{15,0}}").load == 1  # closed to a ring
    # Both go through the links between 2, 3 and 4.
    shared = over.span("pairs:{{0,4},{2,5}}")
    assert (shared.load, shared.mesh) == (2, "expert")
    assert over.span("pairs:{{0,4},{5,2}}").load == 1  # in opposite directions


def test_a_step_to_the_next_in_rows_has_links_of_its_own():
    """Sixteen devices in four rows: from the end of a row back and down, against the others."""
    over = layout("v5e:4x4", data=16, expert=1, model=1)
    pairs = ",".join(f"{{{i},{(i + 1) % 16}}}" for i in range(16))
    assert over.span(f"pairs:{{{pairs}}}").load == 1


def test_cores_of_one_chip_and_slices_are_seen():
    cores = layout("v4:2x2x1", data=4, expert=2, model=1)
    assert cores.span("{{0,1},{2,3},{4,5},{6,7}}").cores == 2
    parts = layout("v5e:2x2", slices=2, data=2, expert=4, model=1)
    span = parts.span("{{0,4},{1,5},{2,6},{3,7}}")
    assert (span.mesh, span.slices, span.torus) == ("data", 2, ())


# ---- Times -----------------------------------------------------------------------------------

LINK = 50e9  # v5e, one direction


def seconds(kind, over, groups, size):
    c = work.Collective(kind, groups, size, False)
    return predict.collective_seconds(c, over.span(groups), over.topology)


def test_time_of_collectives():
    ring = layout("v5e:1x16", data=16, expert=1, model=1)
    line = layout("v5e:1x4", data=4, expert=1, model=1)
    plane = layout("v5e:16x16", data=256, expert=1, model=1)
    size = 1e9
    assert seconds("all-gather", ring, "", size) == pytest.approx(size * 15 / 16 / (2 * LINK))
    assert seconds("all-gather", line, "", size) == pytest.approx(size * 3 / 4 / LINK)
    assert seconds("all-reduce", line, "", size) == pytest.approx(2 * size * 3 / 4 / LINK)
    # Two rings at once.
    assert seconds("all-gather", plane, "", size) == pytest.approx(size * 255 / 256 / (4 * LINK))
    # A quarter of the way round on average, in both directions.
    assert seconds("all-to-all", ring, "", size) == pytest.approx(size * 16 / 8 / LINK)
    pairs = "pairs:{{0,1},{1,2},{2,3}}"
    assert seconds("collective-permute", line, pairs, size) == pytest.approx(size / LINK)


def test_time_across_slices_is_that_of_the_network():
    over = layout("v5e:2x2", slices=2, data=8, expert=1, model=1)
    chip = over.topology.chip
    between = seconds("all-reduce", over, "{{0,4},{1,5},{2,6},{3,7}}", 1e9)
    assert between == pytest.approx(2 * 1e9 / 2 / chip.dcn_bytes_s)
    # Over slices and chips: each chip carries a quarter through the network.
    whole = seconds("all-reduce", over, "", 1e9)
    inside = 2 * 1e9 * 3 / 4 / (2 * LINK)
    assert whole == pytest.approx(2 * 1e9 / 4 / 2 / chip.dcn_bytes_s + inside)


def unit(**values):
    return work.Unit(**({"name": "u", "opcode": "fusion", "loop": "body", "times": 3} | values))


def test_a_unit_takes_the_longest_of_three():
    topology = chips.parse("v5e:2x2")
    chip = topology.chip
    by_work = unit(flops=1e12, read=1e6, cycles=1)
    by_cycles = unit(flops=1e12, cycles=15_000_000)
    assert predict.unit_seconds(by_work, topology)[1] == pytest.approx(1e12 / chip.flops)
    assert predict.unit_seconds(by_cycles, topology)[1] == pytest.approx(0.01, rel=0.01)
    # Without a product the compiler's cycles are the high end only.
    low, high = predict.unit_seconds(unit(read=819e6, cycles=15_000_000), topology)
    assert (low, high) == (pytest.approx(1e-3), pytest.approx(0.01, rel=0.01))
    assert predict.unit_seconds(unit(read=1e9, background=True), topology) == (0.0, 0.0)


def test_a_device_of_two_on_a_chip_has_half_of_it():
    topology = chips.parse("v4:2x2x1")
    low, _ = predict.unit_seconds(unit(flops=275e12), topology)
    assert low == pytest.approx(2.0)


@pytest.mark.parametrize(("overlapped", "low"), [(True, 3.0), (False, 6.0)])
def test_only_what_starts_early_hides(overlapped, low):
    over = layout("v5e:1x4", data=4, expert=1, model=1)
    size = LINK * 4 / 3  # one second
    exchange = work.Collective("all-gather", "", size, overlapped)
    units = (unit(flops=over.topology.chip.flops), unit(collectives=(exchange,)))
    times = predict.predict(work.Work(units, (), (), 0), over)
    assert (times.low, times.high) == (pytest.approx(low), pytest.approx(6.0))
    assert times.by_axis == {"data": pytest.approx(3.0)}


def test_early_collectives_hide_only_behind_their_own_loop():
    over = layout("v5e:1x4", data=4, expert=1, model=1)
    exchange = work.Collective("all-gather", "", LINK * 4 / 3, True)
    units = (unit(flops=over.topology.chip.flops), unit(loop="entry", collectives=(exchange,)))
    assert predict.predict(work.Work(units, (), (), 0), over).low == pytest.approx(6.0)


# ---- Memory ----------------------------------------------------------------------------------


def test_arguments_are_told_apart():
    grid = mesh.make_mesh(8)
    run = RunConfig(model=toy.config(n_slots=1, n_active=1), tokenizer="t")
    run = dataclasses.replace(run, data=DataConfig(batch_rows=8, seq_len=32))
    p = programs.training(run, run.model, grid)
    held = memory.arguments(p.arguments)
    sizes = {
        name: sum(memory._shard_bytes(x) for x in jax.tree.leaves(part))
        for name, part in p.arguments["state"].items()
    }
    frozen = sum(memory._shard_bytes(x) for x in jax.tree.leaves(p.arguments["frozen"]))
    assert held["optimizer"] == sizes["opt"] > 1.9 * sizes["params"]
    assert held["parameters"] == sizes["params"] + sizes["step"] + frozen
    # One row of 32 tokens per device: three numbers and two truth values each.
    assert held["data"] == 32 * (3 * 4 + 2)


def test_kinds_of_memory_add_up():
    topology = chips.parse("v4:2x2x1")
    held = {"parameters": 3.0, "optimizer": 6.0, "data": 1.0}
    m = memory.split(20.0, held, 4.0, topology)
    # Two devices on each chip.
    assert (m.parameters, m.optimizer, m.activations, m.temporaries) == (6, 12, 10, 12)
    assert m.total == 40 and m.fits


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 26.41G of 15.75G hbm. Exceeded hbm capacity by 10.66G. "
            "Total hbm usage >= 26.66G: reserved 258.00M program 26.41G",
            26.66,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (2.00T) exceeds available HBM (15.75G).",
            2048,
        ),
        ("INTERNAL: Mosaic failed to compile", None),
    ],
)
def test_what_a_refusal_says(message, gib):
    said = memory.refused(message)
    assert said is None if gib is None else said / 2**30 == pytest.approx(gib)


# ---- Chips -----------------------------------------------------------------------------------


def test_every_generation_has_a_peak_and_a_clock():
    for chip in chips.CHIPS.values():
        assert chip.flops == metrics.PEAK_FLOPS[chip.kind]
        assert 0.9e9 < chip.clock < 2.5e9
        assert chip.hbm_bytes_s > chip.links * chip.link_bytes_s


# Broken once by the peak of a whole chip for each of its devices.
@pytest.mark.parametrize(("kind", "of_a_chip"), [("TPU7x", 0.5), ("TPU v5p", 1.0), ("TPU v4", 1.0)])
def test_the_peak_of_a_device(kind, of_a_chip):
    peak, _ = metrics.peak_flops(types.SimpleNamespace(device_kind=kind))
    assert peak == of_a_chip * metrics.PEAK_FLOPS[kind]
    known = {chip.kind: chip.devices for chip in chips.CHIPS.values()}
    assert metrics.CHIP_DEVICES.items() <= known.items()


@pytest.mark.parametrize(
    ("text", "chips_", "devices"),
    [("v5p:4x4x8", 128, 128), ("v5e:4x4", 16, 16), ("v4:2x2x1", 4, 8), ("tpu7x:2x2x2", 8, 16)],
)
def test_topologies(text, chips_, devices):
    topology = chips.parse(text)
    assert (topology.name, topology.chips, topology.devices) == (text, chips_, devices)


@pytest.mark.parametrize(
    ("text", "slices", "word"),
    [
        ("v5x:4x4", 1, "did you mean"),
        ("v5e:4x4x4", 1, "another 2 lengths"),
        ("v5p:4x4", 1, "another 3 lengths"),
        ("v5e:4x0", 1, "Not the shape"),
        ("v5e", 1, "Not the shape"),
        ("v5e:4x4", 0, "without slices"),
    ],
)
def test_topologies_that_are_none(text, slices, word):
    with pytest.raises(ConfigError, match=word):
        chips.parse(text, slices)


def test_the_texts_are_small():
    assert sum(p.stat().st_size for p in TEXTS.iterdir()) < 20_000

# SPDX-License-Identifier: Apache-2.0
"""Plans of several owners: what each job may name, where things are handed over, our plan files."""

import dataclasses

import launch_samples as samples
import pytest
from launch_samples import job, plan_of

from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs import cost, launching, places, slices, stamps
from flexolmo_jax.jobs.plan import Resources, order

NEWS = Resources(bucket="gs://acme-news", identity="news@acme.iam.gserviceaccount.com")
CODE = Resources(bucket="s3://acme-code/team", identity="coders")


def owned(owner, resources, *command, **fields):
    return job(owner, *command, owner=owner, resources=resources, **fields)


@pytest.mark.parametrize(
    "text",
    [
        "gs://acme-news",
        "gs://acme-news/data/train",
        "--own=gs://acme-news/x",
        "experiments/expert.py:own=gs://acme-open/y,public=gs://acme-news/x",
        "GS://Acme-News/x",
        "gs:/acme-news/x",
        "gs:///acme-news/x",
        "s3://acme-news/x",
        "gs://%61cme-news/x",
        "https://storage.googleapis.com/acme-news/x",
        "https://acme-news.storage.googleapis.com/x",
        "http://127.0.0.1:9000/acme-news/x",
    ],
)
def test_no_spelling_of_a_bucket_gets_past(tmp_path, text):
    mine = owned("news", NEWS, "flexolmo", "train", text)
    order(plan_of(tmp_path, mine, owned("code", CODE)))
    for owner, resources in (("code", CODE), ("", Resources())):
        other = job("x", "flexolmo", "train", text, owner=owner, resources=resources)
        with pytest.raises(ConfigError, match="would see bucket of another owner"):
            order(plan_of(tmp_path, owned("news", NEWS), other))


@pytest.mark.parametrize(
    "text", ["gs://acme-newsletter/x", "gs://acme-news-2/x", "gs://old-acme-news/x", "acme-news.md"]
)
def test_longer_names_are_other_names(tmp_path, text):
    other = job("x", "flexolmo", "train", text, owner="code", resources=CODE)
    assert order(plan_of(tmp_path, owned("news", NEWS), other))


@pytest.mark.parametrize(
    "fields",
    [
        {"command": ("flexolmo", "--as", "news@acme.iam.gserviceaccount.com")},
        {"env": {"IDENTITY": "news@acme.iam.gserviceaccount.com"}},
        {"env": {"BUCKET": "acme-news"}},
        {"inputs": ("gs://acme-news/data",)},
        {"outputs": ("gs://acme-news/out",), "resources": dataclasses.replace(CODE, bucket="")},
        {"workdir": "gs://acme-news"},
        {"resources": dataclasses.replace(CODE, bucket="gs://acme-news/mine")},
        {"resources": dataclasses.replace(CODE, identity=NEWS.identity)},
        {"resources": dataclasses.replace(CODE, image="gs://acme-news/image")},
    ],
    ids=lambda f: "+".join(f),
)
def test_every_field_of_a_job_is_looked_at(tmp_path, fields):
    other = dataclasses.replace(owned("code", CODE), **fields)
    plan = plan_of(tmp_path, owned("news", NEWS), other)
    with pytest.raises(ConfigError, match=r"of another owner|outside the workdir"):
        order(plan)


def test_a_short_identity_is_no_word_of_a_command(tmp_path):
    stitch = job("stitch", "flexolmo", "stitch", "--deny", "coders")
    assert order(plan_of(tmp_path, owned("code", CODE), stitch))
    as_them = job("stitch", resources=Resources(identity="coders"))
    with pytest.raises(ConfigError, match="identity of another owner"):
        order(plan_of(tmp_path, owned("code", CODE), as_them))


def test_directories_of_a_cluster_are_buckets_too(tmp_path):
    mine = Resources(bucket="/disk/news")
    other = job("x", "cat", "/disk/code/../news/x", owner="code")
    with pytest.raises(ConfigError, match="bucket of another owner"):
        order(plan_of(tmp_path, owned("news", mine), other))
    fine = job("x", "cat", "/disk/newsletter/x", owner="code")
    assert order(plan_of(tmp_path, owned("news", mine), fine))


def test_nothing_is_handed_over_outside_the_exchange(tmp_path):
    anchor = job("anchor", outputs=("gs://x/anchor",), resources=Resources(bucket="gs://home"))
    at_home = dataclasses.replace(anchor, outputs=("gs://home/anchor",))
    reads = [
        owned("news", NEWS, "cat", "gs://x/anchor"),
        owned("news", NEWS, "cat", "gs://home/anchor"),
    ]
    order(plan_of(tmp_path, anchor, reads[0], exchange="gs://x"))
    with pytest.raises(ConfigError, match="outside the exchange"):
        order(plan_of(tmp_path, at_home, reads[1], exchange="gs://x"))


def test_what_a_job_writes_is_in_a_place_of_its_own(tmp_path):
    for path in ("gs://acme-news/run", "gs://x/slices/news", str(tmp_path / "log")):
        order(plan_of(tmp_path, owned("news", NEWS, outputs=(path,)), exchange="gs://x"))
    for path in ("gs://elsewhere/run", "gs://xx/run", "gs://x/../y", "gs://x"):
        with pytest.raises(ConfigError, match="outside the workdir"):
            order(plan_of(tmp_path, owned("news", NEWS, outputs=(path,)), exchange="gs://x"))


def test_two_spellings_of_an_output_are_one(tmp_path):
    two = [job("a", outputs=("gs://x/o",)), job("b", outputs=("gs://x//./o",))]
    with pytest.raises(ConfigError, match="same output"):
        order(plan_of(tmp_path, *two, exchange="gs://x"))


def test_paths_in_plain_words():
    assert places.plain("a=/x/y/../z,b=gs://b/q/./../r") == "a=/x/z,b=gs://b/r"
    assert places.plain("gs://b/../c") == "gs://b/../c"
    assert places.is_url("gs://b") and places.is_url("gs:/b") and not places.is_url("runs/x:y")


@pytest.mark.parametrize("reference", ["8x7b.py", "8x7b.py:tuning=false", "two.py", "two.py:on="])
def test_our_plans_are_sound(reference):
    plan = samples.plan_file(reference)
    jobs = {j.name: j for j in order(plan)}
    trains = [j for j in jobs.values() if j.owner and j.name.startswith("train:")]
    assert len(trains) == (7 if plan.name == "8x7b" else 2)
    assert len({j.resources.bucket for j in trains}) == len(trains)
    assert len({j.resources.identity for j in trains}) == len(trains)
    assert set(jobs["stitch"].needs) == {"package:anchor", *(f"package:{j.owner}" for j in trains)}
    assert ("train:router" in jobs) == ("tuning=false" not in reference)
    for j in jobs.values():
        assert all(places.is_inside(o, plan.exchange) for o in j.outputs if j.name[:4] == "pack")


def test_an_owner_swapped_for_another_is_seen():
    plan = samples.plan_file("8x7b.py")
    for mine in [j for j in plan.jobs if j.owner]:
        thief = dataclasses.replace(mine, owner="code" if mine.owner != "code" else "math")
        jobs = tuple(thief if j is mine else j for j in plan.jobs)
        with pytest.raises(ConfigError, match="of another owner"):
            order(dataclasses.replace(plan, jobs=jobs))


def test_an_anchor_that_exists_is_not_trained():
    plan = samples.plan_file("8x7b.py:anchor=gs://example-flexolmo-exchange/olmo")
    names = [j.name for j in order(plan)]
    assert "train:anchor" not in names and "package:anchor" not in names
    (train,) = [j for j in plan.jobs if j.name == "train:news"]
    assert not train.needs and "anchor=gs://example-flexolmo-exchange/olmo" in train.command[3]


def test_an_unknown_owner_of_the_table_is_named():
    with pytest.raises(ConfigError, match="did you mean 'news'"):
        samples.plan_file("8x7b.py:owners=newz")


@pytest.mark.parametrize(
    ("accelerator", "topology", "chips", "hosts", "vm"),
    [
        ("v5p", "2x2x1", 4, 1, "v5p-8"),
        ("v5p", "4x4x8", 128, 32, "v5p-256"),
        ("v5e", "1x1", 1, 1, "v5litepod-1"),
        ("v5e", "4x4", 16, 4, "v5litepod-16"),
        ("v6e", "16x16", 256, 64, "v6e-256"),
        ("v4", "2x2x2", 8, 2, "v4-16"),
    ],
)
def test_slices_in_the_clouds_words(accelerator, topology, chips, hosts, vm):
    j = job("a", resources=Resources(accelerator=accelerator, topology=topology, slices=2))
    assert (slices.chips(j), slices.hosts(j), slices.vm_type(j)) == (chips, hosts, vm)
    assert slices.processes(j) == 2 * hosts


@pytest.mark.parametrize("topology", ["", "4x4", "4x4x0", "4x4x-4", "4x4x4x4", "axbxc", "3x1x2"])
def test_topologies_that_do_not_exist(topology):
    with pytest.raises(ConfigError, match="topology"):
        slices.hosts(job("a", resources=samples.tpu(topology)))


def test_what_the_planner_is_told_does_not_change_a_job(tmp_path):
    a = job("a", resources=NEWS)
    assert stamps.job_digest(a) == stamps.job_digest(
        dataclasses.replace(a, planned=("--rows", "8"))
    )
    moved = dataclasses.replace(a, resources=dataclasses.replace(NEWS, zone="us-east5-a"))
    assert stamps.job_digest(a) != stamps.job_digest(moved)


def test_chip_hours_by_hand():
    c = cost.cost(50_000_000_000, 64, (4000.0, 5000.0))
    # 50e9 / 5000 / 3600 = 2778 chip-hours, on 64 chips 43.4 hours.
    assert c.chip_hours == pytest.approx((2777.8, 3472.2), abs=0.1)
    assert c.hours == pytest.approx((43.40, 54.25), abs=0.01)
    assert [cost.amount(n) for n in (1e12, 5e10, 38123, 1.234)] == [
        "1.0T",
        "50.0B",
        "38,123",
        "1.23",
    ]
    assert [cost.duration(h) for h in (5.06, 60)] == ["5.1 h", "2.5 days"]


def test_owners_are_selected_by_name(tmp_path):
    plan = plan_of(tmp_path, owned("news", NEWS), owned("code", CODE), job("stitch"))
    assert [j.name for j in launching.select(plan, ["news", "nobody"])] == ["news", "stitch"]
    with pytest.raises(ConfigError, match="did you mean 'news'"):
        launching.select(plan, ["newz"])

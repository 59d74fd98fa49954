# SPDX-License-Identifier: Apache-2.0
"""What the pages say: commands parse, paths are made before they are used, links lead somewhere."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from flexolmo_jax import configfile
from flexolmo_jax.cli import main as cli
from flexolmo_jax.errors import ConfigError
from flexolmo_jax.jobs import launching

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch" / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), LAUNCH])
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Paths in the commands of the tour; made by an option of one command, used by those of others.
MAKES = ("--out", "--workdir", "--json", "--scores")
PATH = re.compile(r"runs/[\w./-]+")
# What `make demo` leaves behind, as far as the tour uses it.
FROM_THE_DEMO = {"runs/demo/data", "runs/demo/tokenizer.json", "runs/demo/data/wiki"}


def blocks(text):
    """Contents of the fenced shell blocks."""
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def commands(text):
    """Lines that call the program, in blocks and in running text, as argument lists."""
    lines = [line for block in blocks(text) for line in block.splitlines()]
    inside = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [shlex.split(line, comments=True) for line in [*lines, *inside]]
    # Of the usual environment, or of the one that has the TPU compiler.
    programs = ("flexolmo", ".venv-pods/bin/flexolmo")
    # In running text a bare `flexolmo train` is a name, not a call.
    return [words for words in found if words[:1] and words[0] in programs and len(words) > 2]


def tour():
    """Commands of the tour of the demo's parts; `imported` is the tour with another's anchor."""
    return [words for words in marked() if not any("runs/smol" in word for word in words)]


def imported():
    return [words for words in marked() if words not in tour()]


def marked():
    found = list(re.findall(r"<!-- tour -->\n```sh\n(.*?)```", README, re.DOTALL))
    return [shlex.split(line) for line in "".join(found).splitlines()]


def test_the_tour_meets_every_step():
    met = [words[1] for words in tour()]
    order = ["prepare", "train", "package", "stitch", "verify", "eval", "generate", "unstitch"]
    assert list(dict.fromkeys(met)) == order
    assert all(words[0] == "flexolmo" for words in tour())
    assert any("--deny" in words for words in tour())
    met = [words[1] for words in imported()]
    order = ["import", "eval", "prepare", "train", "package", "stitch", "export"]
    assert list(dict.fromkeys(met)) == order


@pytest.mark.parametrize("words", commands(README), ids=lambda words: " ".join(words[1:])[:60])
def test_commands_of_the_readme_parse(words):
    command, _, args = cli.parse(words[1:])
    if command == "train":
        config = configfile.load_run_config(args.config, args.overrides)
        assert config.optim.warmup_steps < config.optim.last_step
    if command == "launch":
        configfile.load_function(args.plan, "get_plan")


@pytest.mark.parametrize(
    "words", commands(LAUNCH.read_text(encoding="utf-8")), ids=lambda w: " ".join(w[1:])[:60]
)
def test_commands_of_the_launch_page_parse(words):
    command, _, args = cli.parse(words[1:])
    if command == "launch":
        plan = configfile.load_function(args.plan, "get_plan")()
        jobs = launching.select(plan, args.owners)
        assert launching.make_backend(args.backend, plan, jobs, args.cluster, args.given)


def test_an_owner_may_write_no_folder_that_only_starts_like_its_own():
    """Broken once by a bare prefix: slices/news covers slices/news2, another owner's."""
    rules = re.findall(r'startsWith\("([^"]*)"\)', LAUNCH.read_text(encoding="utf-8"))
    assert rules and all("/slices/" in rule and rule.endswith("/") for rule in rules)


def test_the_launch_page_lists_every_setting():
    text = LAUNCH.read_text(encoding="utf-8")
    lines = {
        kind: re.search(rf"^\| {kind} \| `.*$", text, re.MULTILINE) for kind in launching.REMOTE
    }
    for kind, known in launching.REMOTE_KNOWN.items():
        found = lines[kind]
        assert found is not None
        for name in known:
            assert f"`{name}`" in found[0], (kind, name)


@pytest.mark.parametrize(
    "line", ["flexolmo stich --anchor a", "flexolmo stitch --anchr a", "flexolmo eval --tasks bpb"]
)
def test_a_wrong_command_would_be_seen(line):
    (words,) = commands(f"```sh\n{line}\n```")
    with pytest.raises(ConfigError):
        cli.parse(words[1:])


def unmade(steps, there):
    """Paths that a command uses before any has made them."""
    there, missing = set(there), []
    for words in steps:
        makes = {after for word, after in itertools.pairwise(words) if word in MAKES}
        text = " ".join(w for w in words if w not in makes)
        for path in PATH.findall(text):
            inside = any(path == p or p.startswith(path + "/") for p in there)
            missing += [] if inside else [path]
        there |= makes
    return missing


def test_the_tour_uses_only_what_is_there():
    assert unmade(tour(), FROM_THE_DEMO) == []
    assert unmade(reversed(tour()), FROM_THE_DEMO)
    assert unmade(imported(), set()) == []


def test_what_the_tour_takes_from_the_demo_is_made_by_it(tmp_path):
    plan = configfile.load_function(
        f"{ROOT}/experiments/plans/demo.py:workdir={tmp_path}", "get_plan"
    )()
    made = {o.removeprefix(f"{tmp_path}/") for job in plan.jobs for o in job.outputs}
    for path in FROM_THE_DEMO:
        name = path.removeprefix("runs/demo/")
        assert any(o == name or o.startswith(name + "/") for o in made), path


def test_every_command_is_named_in_the_readme():
    for command in cli.available():
        assert re.search(rf"\b{command}\b", README), command


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    quoted = [q for page in PAGES for q in re.findall(r"`([^`\n]+)`", page.read_text())]
    lines = [
        line for page in PAGES for block in blocks(page.read_text()) for line in block.splitlines()
    ]
    called = {m[1] for text in [*quoted, *lines] if (m := re.match(r"make ([\w./-]+)", text))}
    assert {"demo", "test", ".venv-pods/.installed"} <= called
    for target in called:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_the_compiler_stays_out_of_the_usual_environment():
    """Where it is installed every import of jax looks for a TPU."""
    planned = [words for words in commands(README) if words[1] == "plan"]
    assert planned and {words[0] for words in planned} == {".venv-pods/bin/flexolmo"}
    found = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
    assert not any(re.search(r"^pip install.*\btpu\b", text, re.MULTILINE) for text in found)


def test_sentences_of_the_readmes_lists_begin_with_a_capital():
    assert not re.findall(r"^- \*\*[^*\n]+\.\*\* [a-z].*", README, re.MULTILINE)


def anchors(text):
    """Ids of the headings of a page, as hosts of Markdown make them."""
    heads = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


def broken_links(page, text):
    out = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path) if path else page
        if not where.exists() or (
            anchor and anchor not in anchors(where.read_text(encoding="utf-8"))
        ):
            out.append(target)
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_would_be_seen():
    text = "[a](nowhere.md) [b](README.md#no-such-head) [c](README.md#names) [d](https://x.y)"
    assert broken_links(ROOT / "README.md", text) == ["nowhere.md", "README.md#no-such-head"]


# Files of the repository that a page names in code style must exist too.
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:flexolmo_jax|tests|experiments|docs|launch)/[\w./-]+)`", text)
    assert [n for n in named if not (ROOT / n).exists()] == []


ABSOLUTE = re.compile(r"""(?<![\w.:/}$])/(?:home|root|work|tmp|usr|opt|mnt|Users|var)/\w""")
REGISTRY = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|conda\.anaconda")


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "docs").glob("*.svg")], ids=lambda p: p.name)
def test_pages_have_a_licence_line_and_no_paths_of_a_machine(page):
    text = page.read_text(encoding="utf-8")
    assert "SPDX-License-Identifier: Apache-2.0" in "".join(text.splitlines(keepends=True)[:2])
    assert not ABSOLUTE.search(text) and not REGISTRY.search(text)


def test_the_format_page_lists_every_key():
    from flexolmo_jax.experts import manifest

    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    for key in {*manifest.SLICE_KEYS, *manifest.MODEL_KEYS}:
        assert f"`{key}`" in text, key


def test_the_picture_is_self_contained_and_follows_the_theme():
    text = (ROOT / "docs" / "idea.svg").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "<title" in text
    assert not re.search(r"<script|<image|href=|url\(", text)

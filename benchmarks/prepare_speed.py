# SPDX-License-Identifier: Apache-2.0
"""Bytes and documents per second of `flexolmo prepare`: in memory, in one process, and by Beam.

Writes the installed corpora as .jsonl files, then prepares all splits of them by each way in a
process of its own, several rounds in turn, and prints the median, the range and the CPU time. All
ways but the first must leave the same shards.

make .venv-beam/.installed
.venv-beam/bin/python benchmarks/prepare_speed.py --workdir runs/prepare-speed
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from flexolmo_jax.data import corpora, tokenize
from flexolmo_jax.data.corpora import Document
from flexolmo_jax.data.prepare import train_tokenizer
from flexolmo_jax.errors import AssetError, ConfigError
from flexolmo_jax.results import write_json


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of preparing: its name, the options that ask for it, and its environment."""

    name: str
    options: tuple[str, ...]
    one_thread: bool = False


DOMAINS = [*corpora.PUBLIC, *corpora.CLOSED, *corpora.UNSEEN]
ONE = "RAYON_NUM_THREADS"
WAYS = (
    Way("in memory", ()),
    Way("in memory, one thread", (), True),
    Way("local", ("--runner", "local")),
    Way("local, one thread", ("--runner", "local"), True),
    Way("local, exact copies only", ("--runner", "local", "--dedup", "exact")),
    Way("direct, 1 worker", ("--runner", "direct", "--workers", "1")),
    Way("direct, 1 worker, one thread", ("--runner", "direct", "--workers", "1"), True),
    Way("direct, 2 workers", ("--runner", "direct", "--workers", "2")),
)


def write_text(folder: Path, files: int, copies: int, domains: list[str]) -> dict[str, int]:
    """The corpora as files; `copies` times, every further time with a mark on each word."""
    texts: list[str] = []
    for domain in domains:
        try:
            texts += [e.text for part in corpora.parts(domain).values() for e in part]
        except AssetError:
            print(f"without {domain}, which is not installed")
    for copy in range(1, copies):
        # Other words, so that no copy is near another.
        texts += [" ".join(f"{w}{copy}" for w in t.split()) for t in texts[: len(texts) // copy]]
    folder.mkdir(parents=True)
    for number in range(files):
        with open(folder / f"{number:03}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": t}) + "\n" for t in texts[number::files])
    size = sum(len(t.encode()) for t in texts)
    return {"documents": len(texts), "text_bytes": size, "files": files}


def measure(way: Way, text: Path, tokenizer: Path, out: Path) -> dict[str, float]:
    """Runs one way; seconds on the wall, and of CPU over all its processes."""
    command = [sys.executable, "-m", "flexolmo_jax", "prepare", "--source", str(text)]
    command += ["--tokenizer", str(tokenizer), "--split", "all", "--out", str(out)]
    command += [*way.options, "--json", f"{out}.json"]
    environment = {**os.environ, **({ONE: "1"} if way.one_thread else {})}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with open(f"{out}.log", "w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu}


def shards_of(out: Path) -> dict[str, str]:
    """Name to digest of the record files."""
    info = json.loads((out / "tokens.json").read_text())
    return {name: item["digest"] for name, item in info["files"].items()}


def main() -> None:
    """Writes text, measures, prints a table and the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="made anew; must not exist")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--copies", type=int, default=1, help="times the text, in other words")
    parser.add_argument("--domains", nargs="*", default=DOMAINS)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--only", nargs="*", default=[w.name for w in WAYS])
    args = parser.parse_args()
    if args.workdir.exists():
        raise SystemExit(str(ConfigError("The workdir exists", where=args.workdir)))
    text = args.workdir / "text"
    facts = write_text(text, args.files, args.copies, args.domains)
    train_tokenizer([Document(t, str(i)) for i, t in enumerate(sample(text))], args.vocab, text)
    tokenizer = (text / "tokenizer.json").rename(args.workdir / "tokenizer.json")
    size = facts["text_bytes"] / 1e6
    print(f"{facts['documents']:,} documents, {size:.1f} MB of text in {args.files} files")
    ways = [w for w in WAYS if w.name in args.only]
    times: dict[str, list[dict[str, float]]] = {w.name: [] for w in ways}
    results: dict[str, dict[str, str]] = {}
    for number in range(args.rounds):
        for way in ways:
            out = args.workdir / "out"
            times[way.name].append(measure(way, text, tokenizer, out))
            results[way.name] = shards_of(out)
            shutil.rmtree(out)
            last = times[way.name][-1]
            print(f"round {number + 1}: {way.name}: {last['wall_s']:.1f} s", flush=True)
    rows = [row(w.name, times[w.name], facts) for w in ways]
    same = [results[w.name] for w in ways if "--runner" in w.options and "exact" not in w.options]
    print_table(rows)
    print(f"shards of the local and the Beam ways are equal: {all(s == same[0] for s in same)}")
    write_json(
        args.workdir / "result.json",
        {
            "facts": facts,
            "tokenizer": tokenize.digest(tokenizer),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
            "load": os.getloadavg(),
            "versions": {n: version(n) for n in ("apache-beam", "tokenizers", "numpy")},
            "rows": rows,
        },
    )


def version(name: str) -> str:
    """Of an installed package, or nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def sample(text: Path, limit: int = 4_000_000) -> list[str]:
    """Some megabytes to train the tokenizer on, the first lines of each file."""
    out: list[str] = []
    for file in sorted(text.glob("*.jsonl")):
        size = 0
        with open(file, encoding="utf-8") as f:
            for line in f:
                out.append(json.loads(line)["text"])
                size += len(line)
                if size > limit // 16:
                    break
    return out


def row(name: str, times: list[dict[str, float]], facts: dict[str, int]) -> dict[str, object]:
    """Median and range of one way."""
    walls = sorted(t["wall_s"] for t in times)
    wall = statistics.median(walls)
    return {
        "way": name,
        "wall_s": wall,
        "least_s": walls[0],
        "most_s": walls[-1],
        "cpu_s": statistics.median(t["cpu_s"] for t in times),
        "mb_per_s": facts["text_bytes"] / 1e6 / wall,
        "documents_per_s": facts["documents"] / wall,
    }


def print_table(rows: list[dict[str, object]]) -> None:
    """The rows as Markdown."""
    print("| way | wall, s (range) | CPU, s | MB/s | documents/s |")
    print("| --- | --- | --- | --- | --- |")
    for r in rows:
        print(
            f"| {r['way']} | {r['wall_s']:.1f} ({r['least_s']:.1f} to {r['most_s']:.1f}) "
            f"| {r['cpu_s']:.1f} | {r['mb_per_s']:.2f} | {r['documents_per_s']:,.0f} |"
        )


if __name__ == "__main__":
    main()

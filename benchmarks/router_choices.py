# SPDX-License-Identifier: Apache-2.0
"""What a study's finished experts do on tuning text with other router rows and biases.

.venv/bin/python benchmarks/router_choices.py --study runs/study --margin 0 0.25 0.5 0.75
.venv/bin/python benchmarks/router_choices.py --study runs/study --rows 0 0.5 1

Nothing is trained again: rows and biases are the last thing that a finished expert gets. `--margin`
lowers the biases by so many nats more than the recipe did, `--rows` multiplies the rows that it
left. A study of `--suite main` whose experts are there is enough; held-out text is not opened.
"""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flexolmo_jax.errors import FlexOlmoError
from flexolmo_jax.experts import model_dir
from flexolmo_jax.inference import token_bytes
from flexolmo_jax.study import design, judge, weights
from flexolmo_jax.study.jobs import Layout
from flexolmo_jax.study.scorer import Scorer, read_text

ROWS = 24


def changed(m: judge.Mixture, rows: float, margin: float) -> judge.Mixture:
    """The same experts, their rows multiplied and their effective biases lowered."""
    bias = m.group["bias"].astype(np.float64)
    lowered = np.logaddexp(0.0, bias) + margin  # Effective biases are -softplus of the raw ones.
    bias[:, 1:] = (lowered + np.log(-np.expm1(-lowered)))[:, 1:]
    new = {"router": rows * m.group["router"], "bias": bias}
    new = {name: x.astype(m.group[name].dtype) for name, x in new.items()}
    return m.replace(group=weights.with_rows(m.group, new))


def main() -> None:
    """Prints one line for each pair of choices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, required=True, help="folder of a study")
    parser.add_argument("--suite", default="main")
    parser.add_argument("--recipe", default="ours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--rows", type=float, nargs="+", default=[1.0])
    parser.add_argument("--margin", type=float, nargs="+", default=[0.0])
    a = parser.parse_args()
    study = design.read(a.study, a.suite)
    if a.recipe not in study.recipes:
        parser.error(f"--recipe is among {', '.join(study.recipes)}")
    layout = Layout(a.study.resolve(), study)
    info, anchor, _ = model_dir.load_model(layout.anchor)
    size = token_bytes(info)
    texts = {
        d: read_text(layout.data(d, "tuning"), size, rows=ROWS, seq_len=study.seq_len)
        for d in study.domains
    }
    scorer = Scorer(info.config, texts)
    base = scorer.bits(scorer.losses(anchor["shared"], anchor["experts"]))
    m = judge.stitched(layout, a.recipe, a.seed)
    owners = tuple(study.owners)

    def change(bits: Mapping[str, float]) -> dict[str, float]:
        return {d: 100 * (bits[d] / base[d] - 1) for d in bits}

    def line(m: judge.Mixture) -> str:
        bits = scorer.bits(m.losses(scorer, a.active))
        one = change(scorer.bits(m.losses(scorer, 1, domains=study.public)))
        left = {}
        for gone in owners:
            allowed = [True, *(o != gone for o in owners)]
            found = change(scorer.bits(m.losses(scorer, a.active, allowed=allowed)))
            left |= {f"{d} without {gone}": x for d, x in found.items()}
        worst = max(left, key=lambda name: left[name])
        closed = np.mean([bits[w.domain] for w in study.owners.values()])
        public = np.mean([change(bits)[d] for d in study.public])
        return (
            f"{np.mean(list(bits.values())):.4f} | {closed:.4f} | {public:+.2f} % | "
            f"{np.mean(list(one.values())):+.2f} % | {left[worst]:+.2f} % ({worst})"
        )

    print("| rows | margin | mean of all | closed | public | one active | worst after one left |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rows, margin in itertools.product(a.rows, a.margin):
        print(f"| {rows:g} | {margin:g} | {line(changed(m, rows, margin))} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except FlexOlmoError as e:
        raise SystemExit(str(e)) from e

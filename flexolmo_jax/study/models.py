# SPDX-License-Identifier: Apache-2.0
"""The parts of a study that are no training: directories to start from, models in between."""

from flexolmo_jax.experts import embedders, package, stitch
from flexolmo_jax.study import parts, proxies, starts
from flexolmo_jax.study.jobs import Layout

# Active experts of mixtures that are trained; what is scored chooses its own.
N_ACTIVE = 2


def make_starts(layout: Layout) -> dict:
    """Writes what trainings of all seeds start from (see `starts`), and each owner's proxies."""
    study, anchor = layout.study, layout.anchor
    public = [layout.data(d, "train") for d in study.public]
    for name, recipe in layout.anchors.items():
        starts.agreed(anchor, layout.start(name), recipe, public)
    names = tuple(study.owners)
    starts.upcycled(anchor, layout.start("union"), names, n_active=N_ACTIVE, seed=0)
    for owner, whose in study.owners.items():
        if whose.of > 1:
            domain, out = layout.data(whose.domain, "train"), layout.own(owner) / "train"
            parts.write(whose, domain, out, anchor / "tokenizer.json")
    found = {}
    if any(recipe.tuned for recipe in study.recipes.values()):
        for owner in study.owners:
            found[owner] = proxies.write(
                layout.own(owner) / "train",
                public,
                layout.start("proxies") / owner / "train",
                tokenizer=anchor / "tokenizer.json",
                embedder=embedders.get_embedder("hashed"),
                budget=study.proxy_tokens,
            )
    return {"proxies": found}


def make_models(layout: Layout, seed: int) -> dict:
    """Packages and stitches the experts whose router is tuned, and assembles BTX."""
    study, made = layout.study, {}
    for name, recipe in study.recipes.items():
        if not recipe.tuned:
            continue
        slices = [layout.model(f"{name}-{o}", seed) for o in study.owners]
        for owner, out in zip(study.owners, slices, strict=True):
            package.package(layout.run(name, owner, seed), out)
        plan = stitch.plan(layout.anchor_of(name), slices, active=len(slices) + 1)
        stitch.execute(plan, layout.model(name, seed))
        made[name] = str(layout.model(name, seed))
    if study.rivals:
        dense = {o: layout.run("dense", o, seed) for o in study.owners}
        out = layout.model("btx", seed)
        starts.branch_train_mix(layout.anchor, out, dense, n_active=N_ACTIVE, seed=seed)
        made["btx"] = str(out)
    return made

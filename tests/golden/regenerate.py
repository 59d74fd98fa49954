# SPDX-License-Identifier: Apache-2.0
"""What the golden files hold, and the command that writes them: python -m tests.golden.regenerate

A change of these files is a change of what users get: read the difference before committing it.

  shardings.txt  each parameter on a few meshes: shape, partition and bytes on one chip
  numbers.json   logits, losses of three steps and initial parameters at toy size
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # For `toy`, as in every test.

import toy  # noqa: E402

from experiments import common  # noqa: E402
from flexolmo_jax import mesh, model, optim, sharding, stages, step, tree  # noqa: E402
from flexolmo_jax.config import ModelConfig, OptimConfig  # noqa: E402

COMMAND = "python -m tests.golden.regenerate"
SHARDINGS, NUMBERS = HERE / "shardings.txt", HERE / "numbers.json"
# Model size to (pod, mesh as (data, expert, model)). Five slots do not divide over an expert axis
# of 2; on 256 chips of v6e the rows of a batch do not suffice for everyone, so F is split as well.
LAYOUTS = {
    "tiny": [("8 devices", (8, 1, 1)), ("8 devices", (2, 2, 2))],
    "1b": [("4 v5p", (4, 1, 1)), ("16 v5e", (16, 1, 1))],
    "7b": [
        *(("4 v5p", (4, 1, 1)), ("16 v5e", (16, 1, 1)), ("128 v5p", (128, 1, 1))),
        *(("256 v6e", (256, 1, 1)), ("256 v6e", (64, 1, 4))),
    ],
    "8x1b": [
        *(("4 v5p", (4, 1, 1)), ("4 v5p", (1, 4, 1)), ("16 v5e", (2, 8, 1))),
        *(("128 v5p", (128, 1, 1)), ("128 v5p", (16, 8, 1)), ("256 v6e", (32, 8, 1))),
    ],
    "8x7b": [
        *(("128 v5p", (128, 1, 1)), ("128 v5p", (16, 8, 1))),
        *(("256 v6e", (256, 1, 1)), ("256 v6e", (32, 8, 1)), ("256 v6e", (16, 4, 4))),
    ],
}
OPTIM = OptimConfig(peak_lr=3e-3, total_steps=4, warmup_steps=0, router_label_loss=0.3)


def shardings() -> str:
    """One table per size, pod and mesh."""
    sizes = {**common.sizes(), **common.stitched_sizes()}
    tables = []
    for size, places in LAYOUTS.items():
        c = ModelConfig(**sizes[size])
        leaves, axes = model.abstract_params(c), model.param_axes(c)
        for pod, shape in places:
            grid = AbstractMesh(shape, mesh.AXES, axis_types=(AxisType.Auto,) * 3)
            placed = tree.flatten(sharding.param_shardings(leaves, axes, grid))
            rows = [_row(n, leaf, placed[n]) for n, leaf in tree.flatten(leaves).items()]
            rows.append(("total", "", "", f"{sum(row[3] for row in rows):_}"))
            rows = [
                (*row[:3], row[3] if isinstance(row[3], str) else f"{row[3]:_}") for row in rows
            ]
            title = f"{c.n_slots} slots; {pod}: " + " ".join(
                f"{a}={n}" for a, n in zip(mesh.AXES, shape, strict=True)
            )
            tables.append(f"{size}, {title}; float32 bytes per chip\n{_table(rows)}\n")
    return "\n".join(tables)


def _row(name, leaf, placed):
    local = placed.shard_shape(leaf.shape)
    spec = ", ".join(_axes(axes) for axes in placed.spec)
    shape = "x".join(map(str, leaf.shape))
    return name, shape, spec, int(np.prod(local)) * leaf.dtype.itemsize


def _axes(axes):
    """A partition of one dimension: "-" for none, "data+expert" for two axes."""
    return "-" if axes is None else "+".join([axes] if isinstance(axes, str) else axes)


def _table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join((*(row[i].ljust(widths[i]) for i in range(3)), row[3].rjust(widths[3])))
        for row in rows
    )


def numbers() -> dict:
    """Figures that any unmeant change of the arithmetic moves."""
    return {
        "logits": logits(),
        "anchor steps": steps("anchor"),
        "expert steps": steps("expert"),
        "initial": initial(),
        "initial constants": constants(),
    }


def logits() -> list[list[float]]:
    """The first three logits of the last real token of each row."""
    batch, params = toy.batch(), toy.params()
    run = model.Runtime("blocked")

    @jax.jit
    def forward(params):
        groups = (params["experts"],)
        out = model.forward(
            toy.CONFIG,
            run,
            params["shared"],
            groups,
            batch["tokens"],
            segments_BT=batch["segments"],
        )
        return model.unembed(toy.CONFIG, params["shared"], out.hidden_BTD)

    last = np.sum(np.asarray(batch["segments"]) > 0, axis=1) - 1
    return np.asarray(forward(params), float)[np.arange(len(last)), last, :3].tolist()


def steps(stage: str) -> list[dict[str, float]]:
    """Loss and gradient norm of three optimizer steps."""
    anchor = toy.params(toy.config(n_slots=1, n_active=1))
    c = stages.stage_model(stage, toy.CONFIG)
    if stage == "anchor":
        params, frozen = stages.split("anchor", anchor)
    else:
        row = np.random.default_rng(5).standard_normal((c.n_layers, c.d_model))
        params = {"expert": stages.upcycle(anchor, row, -2.0, jax.random.key(0))}
        frozen = {"shared": anchor["shared"], "public": anchor["experts"]}
    tx = optim.make_optimizer(OPTIM, params)
    state = {"params": params, "opt": tx.init(params), "step": jnp.int32(0)}
    run = functools.partial(step.train_step, c, model.Runtime("dense"), stage, OPTIM, tx)
    run, out = jax.jit(run), []
    for seed in range(3):
        state, metrics = run(state, frozen, toy.batch(seed=seed))
        out.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
    return out


@functools.cache
def initial_params():
    """The parameters that a run with seed 7 starts from."""
    return jax.device_get(
        jax.jit(lambda: model.init_params(toy.CONFIG, jax.random.key(7)))(),
    )


def initial() -> dict[str, list[float]]:
    """First, middle and last value of each leaf that is drawn."""
    drawn = {n: x for n, x in tree.flatten(initial_params()).items() if np.ptp(x)}
    return {n: [float(x.flat[i]) for i in (0, x.size // 2, -1)] for n, x in drawn.items()}


def constants() -> dict[str, str]:
    """Digest of each leaf that starts constant: the only ones equal to the bit on any machine."""
    fixed = {n: x for n, x in tree.flatten(initial_params()).items() if not np.ptp(x)}
    return {n: tree.leaf_digest(x) for n, x in fixed.items()}


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    SHARDINGS.write_text(shardings())
    NUMBERS.write_text(json.dumps(numbers(), indent=1) + "\n")
    print(f"written: {SHARDINGS.name}, {NUMBERS.name}")

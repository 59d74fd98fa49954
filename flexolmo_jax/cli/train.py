# SPDX-License-Identifier: Apache-2.0
"""Train one job: an anchor, or one owner's expert beside a frozen anchor.

Resumes by itself from the workdir. On a pod the same command runs on every host. Every value of the
configuration can be overridden:

  flexolmo train --config experiments/expert.py:size=tiny,expert=code --workdir W \\
      --config.optim.peak_lr=3e-4 --config.data.sources.0.weight=2
"""

import argparse
from typing import Any

from flexolmo_jax import configfile
from flexolmo_jax.storage import urls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `flexolmo train`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="an experiment file with its argument, such as experiments/anchor.py:size=tiny",
    )
    parser.add_argument(
        "--workdir", required=True, type=urls.location, help="state and results of this job"
    )
    parser.add_argument(
        "--config.KEY",
        dest="overrides",
        action="append",
        default=[],
        metavar="VALUE",
        help="replace one value of the configuration (any number of times)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains until the job is done, and returns its summary."""
    config = configfile.load_run_config(args.config, args.overrides)
    # Imported here: a wrong configuration is reported before JAX starts.
    from flexolmo_jax import distributed, train

    with distributed.session() as first:
        if not first:
            args.json = None
        return train.fit(config, args.workdir)

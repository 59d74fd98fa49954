# SPDX-License-Identifier: Apache-2.0
"""`python -m flexolmo_jax` is the program `flexolmo`."""

import sys

from flexolmo_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Tests that run the TPU compiler (`make test-pods`): no TPU, but the package libtpu.

Run with `--confcutdir=tests/pods`, so that the settings of the other tests (eight fake devices,
programs without optimisation) do not reach the compiler.
"""

import importlib.util
import os

from flexolmo_jax.pods import process

# Before any test imports JAX.
os.environ.update(process.environment())
# A test reads what the compiler warns of.
os.environ.update(TPU_MIN_LOG_LEVEL="1", TPU_STDERR_LOG_LEVEL="1", TF_CPP_MIN_LOG_LEVEL="1")
os.environ.pop("XLA_FLAGS", None)

if importlib.util.find_spec("libtpu") is None:
    collect_ignore_glob = ["test_*.py"]

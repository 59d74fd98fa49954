# SPDX-License-Identifier: Apache-2.0
"""Every test runs with eight fake CPU devices, so that meshes of every shape can be made.

Nearly all time would go into compilation, so programs are compiled without optimization (a test
of what users compile asks for it) and a program that a test compiles again is read from disk.

Set FLEXOLMO_TEST_PLATFORM=device to run the tests marked `accelerator` on a real device instead.
"""

import os
import shutil
import tempfile

import jax
import pytest

FAKE_DEVICES = 8
ON_DEVICE = os.environ.get("FLEXOLMO_TEST_PLATFORM") == "device"

# The second update raises if something already used a device, as array work at import time would.
if not ON_DEVICE:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", FAKE_DEVICES)
    # Through the environment, so that processes which tests start compute the same bits.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    # Of this process alone: the cache is not made for writers at the same time.
    COMPILED = tempfile.mkdtemp(prefix="compiled-")
    jax.config.update("jax_compilation_cache_dir", COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_unconfigure():
    """Removes the compiled programs."""
    if not ON_DEVICE:
        shutil.rmtree(COMPILED, ignore_errors=True)


def pytest_configure():
    """Starts the backend now: a wrong setting must stop the run, not fail tests at random."""
    if not ON_DEVICE and jax.device_count() != FAKE_DEVICES:
        raise pytest.UsageError(f"{FAKE_DEVICES} fake devices wanted, JAX has {jax.devices()}")


def pytest_collection_modifyitems(items):
    """On a real device only the tests made for one run."""
    if ON_DEVICE:
        skip = pytest.mark.skip(reason="not marked accelerator")
        for item in items:
            if "accelerator" not in item.keywords:
                item.add_marker(skip)

# SPDX-License-Identifier: Apache-2.0
"""Every test runs with eight fake CPU devices, so that meshes of every shape can be made.

Nearly all time would go into compilation, so programs are compiled without optimization and by
XLA's older emitters (a test of what users compile asks for theirs), and a program that a test
compiles again is read from disk.

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
    # Without the fusion emitters (MLIR) a gradient compiles in a quarter of the time.
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )
    # Of this process alone: the cache is not made for writers at the same time.
    COMPILED = tempfile.mkdtemp(prefix="compiled-")
    jax.config.update("jax_compilation_cache_dir", COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_a_file():
    """Lets go of compiled programs when a file is done.

    Each has mappings of its own (`/proc/self/maps`); the kernel allows a process 65,530
    (`vm.max_map_count`), and XLA crashes past them. Half of a whole run came to 56,000.
    """
    yield
    jax.clear_caches()


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

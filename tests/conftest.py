# SPDX-License-Identifier: Apache-2.0
"""Every test runs with eight fake CPU devices, so that meshes of every shape can be made.

Set FLEXOLMO_TEST_PLATFORM=device to run the tests marked `accelerator` on a real device instead.
"""

import os

import jax
import pytest

FAKE_DEVICES = 8
ON_DEVICE = os.environ.get("FLEXOLMO_TEST_PLATFORM") == "device"

# The second update raises if something already used a device, as array work at import time would.
if not ON_DEVICE:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", FAKE_DEVICES)


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

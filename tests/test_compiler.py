# SPDX-License-Identifier: Apache-2.0
"""Options that travel with a training step."""

import types

import jax

from flexolmo_jax import compiler


def test_options_by_device():
    """Other platforms know none of them; a kind without a measured limit keeps the default."""
    assert compiler.options(jax.devices("cpu")[0]) is None

    def limit(kind):
        device = types.SimpleNamespace(platform="tpu", device_kind=kind)
        found = compiler.options(device) or {}
        assert found.items() >= compiler.OVERLAP.items()
        return found.get("xla_tpu_scoped_vmem_limit_kib")

    assert limit("TPU v5") == "65536"
    assert limit("TPU v5 lite") == "65536"
    assert limit("TPU v6 lite") == "98304"
    assert limit("TPU v4") is None

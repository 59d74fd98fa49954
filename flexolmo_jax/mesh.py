# SPDX-License-Identifier: Apache-2.0
"""The device mesh: three named axes that are always present, also with size 1."""

from collections.abc import Sequence

import jax
import numpy as np

from flexolmo_jax.errors import ConfigError

AXES = ("data", "expert", "model")
# Rows of a batch are spread over both: leaving the batch off the expert axis would make every
# device of that axis compute the same attention.
BATCH_AXES = ("data", "expert")


def make_mesh(
    data: int = 0, expert: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Builds the mesh; `data=0` takes all devices that the other axes leave.

    Axis types are stated (Auto) because the default of `jax.make_mesh` differs between versions.

    Raises:
      ConfigError: the shape does not use the devices exactly.
    """
    devices = list(jax.devices() if devices is None else devices)
    data = data or max(1, len(devices) // (expert * model))
    if data * expert * model != len(devices):
        raise ConfigError(
            "The mesh does not fit the devices",
            got=f"data={data} x expert={expert} x model={model} = {data * expert * model}",
            expected=f"{len(devices)} devices",
            where="exec.mesh_data, exec.mesh_expert, exec.mesh_model",
        )
    grid = np.asarray(devices).reshape(data, expert, model)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)

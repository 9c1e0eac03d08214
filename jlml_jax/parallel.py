"""The device mesh and what lies on it: replicated state, batches sharded over the axis "batch"."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlml_jax.errors import UserError

BATCH_AXIS = "batch"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis over `devices`, by default all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def check_batch_size(batch_size: int, mesh: Mesh, field: str) -> None:
    """Refuses a global batch that the mesh's devices do not divide."""
    if batch_size < 1 or batch_size % mesh.size:
        lower = batch_size // mesh.size * mesh.size or mesh.size
        raise UserError(f"{field}={batch_size} does not divide over {mesh.size} devices; "
                        f"use a multiple of {mesh.size}, such as {lower}")


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree of host or device arrays, the same in every process, on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def process_slice(batch_size: int) -> slice:
    """This process's rows of a global batch."""
    local = batch_size // jax.process_count()
    return slice(jax.process_index() * local, (jax.process_index() + 1) * local)


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Makes global arrays, sharded over the batch axis, from each process's rows of them (NumPy, [b, ...])."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXIS))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), tree)

"""The device mesh and where each array lies on it."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp')


def make_mesh() -> Mesh:
  """All devices present as a mesh of axes 'data' and 'fsdp', the latter of size 1.

  Returns:
    A mesh whose axes are left to the compiler (Auto).
  """
  return jax.make_mesh((jax.device_count(), 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device has whole: the state.

  Args:
    mesh: the devices.

  Returns:
    A sharding for arrays of any rank.
  """
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first axis over all devices.

  Args:
    mesh: the devices.

  Returns:
    A sharding for arrays of rank 1 and more.
  """
  return NamedSharding(mesh, PartitionSpec(AXES))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts this process's share of a global batch on its devices.

  Args:
    batch: arrays [local batch, ...]; each process gives its own share.
    mesh: the mesh.

  Returns:
    Global arrays, sharded by their first axis.
  """
  sharding = over_batch(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def require_divisible(batch_size: int, mesh: Mesh, name: str) -> None:
  """Raises ValueError unless a batch can be split evenly over the devices.

  Args:
    batch_size: global.
    mesh: the devices.
    name: of the setting, for the message.

  Raises:
    ValueError: if it cannot.
  """
  devices = math.prod(mesh.shape.values())
  if batch_size % devices:
    raise ValueError(
      f'{name}={batch_size} cannot be split over {devices} devices: take a multiple of {devices}.'
    )

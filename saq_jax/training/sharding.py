"""The device mesh and where each array lies on it."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from saq_jax._paths import PyTree

AXES = ('data', 'fsdp')
_FSDP = 'fsdp'


def make_mesh(fsdp: int = 1) -> Mesh:
  """All devices present as a mesh of axes 'data' and 'fsdp'.

  Args:
    fsdp: the length of the second axis, along which parameters and optimizer state are cut.

  Returns:
    A mesh whose axes are left to the compiler (Auto).

  Raises:
    ValueError: if it does not divide the number of devices.
  """
  count = jax.device_count()
  if count % fsdp:
    raise ValueError(f'{count} devices cannot be cut into groups of {fsdp}: take a divisor.')
  return jax.make_mesh((count // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device has whole.

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


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where parameters and optimizer state lie: cut along 'fsdp' where they are large enough.

  Attributes:
    mesh: the devices.
    min_shard: arrays of fewer elements are whole on every device.
  """

  mesh: Mesh
  min_shard: int = 2**14

  @property
  def cuts(self) -> bool:
    """Whether anything is cut."""
    return self.mesh.shape[_FSDP] > 1

  def axis(self, x: Any) -> int | None:
    """The axis along which an array is cut: the longest that the devices divide, the last of those.

    Args:
      x: an array, or anything with a shape.

    Returns:
      Its number; None for an array that is whole on every device.

    Example:
      >>> layout = Layout(make_mesh(jax.device_count()), min_shard=16)
      >>> layout.axis(np.zeros((3, 3, 8 * jax.device_count()))) == (2 if layout.cuts else None)
      True
    """
    shape, parts = np.shape(x), self.mesh.shape[_FSDP]
    fit = [i for i, n in enumerate(shape) if n and n % parts == 0]
    if not self.cuts or math.prod(shape) < self.min_shard or not fit:
      return None
    return max(fit, key=lambda i: (shape[i], i))

  def spec(self, x: Any) -> PartitionSpec:
    """How an array is cut.

    Args:
      x: an array, or anything with a shape.

    Returns:
      The names of the mesh's axes for those of the array.
    """
    axis = self.axis(x)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, _FSDP)

  def shardings(self, tree: PyTree) -> PyTree:
    """The sharding of each array of a state.

    Args:
      tree: arrays, or anything with shapes.

    Returns:
      A tree of shardings like it.
    """
    return jax.tree.map(lambda x: NamedSharding(self.mesh, self.spec(x)), tree)

  def spread(self, tree: PyTree) -> PyTree:
    """Cuts arrays inside jit: gradients then come as sums of pieces, not of wholes.

    Args:
      tree: arrays.

    Returns:
      The same values, each device with its part.
    """
    return jax.lax.with_sharding_constraint(tree, self.shardings(tree)) if self.cuts else tree

  def whole(self, tree: PyTree) -> PyTree:
    """Brings arrays together on every device, inside jit.

    Args:
      tree: arrays.

    Returns:
      The same values.
    """
    return jax.lax.with_sharding_constraint(tree, replicated(self.mesh)) if self.cuts else tree


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


def require_divisible(batch_size: int, mesh: Mesh, name: str, parts: int = 1) -> None:
  """Raises ValueError unless a batch can be split evenly over the devices.

  Args:
    batch_size: global.
    mesh: the devices.
    name: of the setting, for the message.
    parts: that each device's share is cut into again.

  Raises:
    ValueError: if it cannot.
  """
  devices = math.prod(mesh.shape.values())
  if batch_size % (devices * parts):
    each = f' in {parts} parts each' if parts > 1 else ''
    raise ValueError(
      f'{name}={batch_size} cannot be split over {devices} devices{each}: take a multiple of '
      f'{devices * parts}.'
    )

"""Gradients over a mapped axis: each device's own, or the mean, never a sum behind our back."""

from typing import Any

import jax
from jax import Array

from saq_jax._paths import PyTree

AxisName = str | tuple[str, ...]


def mean(tree: PyTree, axis_name: AxisName | None) -> PyTree:
  """The mean over a mapped axis, as one collective; the tree itself where there is none."""
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def shared(tree: PyTree, axis_name: AxisName | None) -> PyTree:
  """The mean over a mapped axis, with which each device can go on as its own."""
  if axis_name is None:
    return tree
  own = _varies(jax.lax.axis_index(axis_name), axis_name)
  common = mean(tree, axis_name)
  return jax.tree.map(lambda x: _as_varying(x, axis_name), common) if own else common


def own(tree: PyTree, axis_name: AxisName) -> PyTree:
  """Marks what all devices of `jax.shard_map` share as each one's own, as `per_device` needs it."""
  return jax.tree.map(lambda x: _as_varying(x, axis_name), tree)


def like(example: Array, tree: PyTree) -> PyTree:
  """Types a tree as what varies where an array does."""
  return own(tree, _varying(example))


def alike(example: PyTree, axis_name: AxisName | None, found: Any) -> Any:
  """Types (updates, state) as what varies where the example does, so that two branches agree.

  Over `axis_name` all but `state.aux` is a mean, and the same on all devices.
  """
  updates, state = found
  names = _varying(jax.tree.leaves(example)[0])
  averaged = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
  rest = tuple(name for name in names if name not in averaged)
  common = own((updates, state._replace(aux=None)), rest)
  return common[0], common[1]._replace(aux=own(state.aux, names))


def per_device(
  updates: PyTree, params: PyTree, axis_name: AxisName | None
) -> tuple[PyTree, PyTree]:
  """Marks params as each device's own, so that no gradient is summed behind our back.

  In `jax.shard_map` the gradient with respect to a value that is the same on all devices is
  summed over them by JAX itself: it would come out N times too large.
  """
  if axis_name is None or not _varies(jax.lax.axis_index(axis_name), axis_name):
    return updates, params
  if not all(_varies(g, axis_name) for g in jax.tree.leaves(updates)):
    raise ValueError(
      f'axis_name={axis_name!r}: each device must give its own gradient, but this one is the same '
      f'on all: it was averaged, or JAX has summed it over {axis_name!r}. Before jax.grad, mark '
      f"params as varying: params = jax.lax.pcast(params, {axis_name!r}, to='varying')."
    )
  return updates, jax.tree.map(lambda x: _as_varying(x, axis_name), params)


def _varies(x: Array, axis_name: AxisName) -> bool:
  """Whether a value inside `jax.shard_map` may differ along every one of the axes."""
  return not _common(x, axis_name)


def _as_varying(x: Array, axis_name: AxisName) -> Array:
  """`x`, typed as one that may differ between the devices of the axes."""
  common = _common(x, axis_name)
  return jax.lax.pcast(x, common, to='varying') if common else x


def _common(x: Array, axis_name: AxisName) -> tuple[str, ...]:
  """Those of the axes along which `x` is typed as the same on all devices."""
  names = (axis_name,) if isinstance(axis_name, str) else axis_name
  return tuple(name for name in names if name not in _varying(x))


def _varying(x: Array) -> tuple[str, ...]:
  """The axes of `jax.shard_map` along which `x` is typed as one that may differ."""
  kind = jax.typeof(x)
  # JAX 0.10 renamed `vma`. Were a default put here, the next renaming would go unseen.
  return tuple(kind.vma if hasattr(kind, 'vma') else kind.manual_axis_type.varying)

"""Landscapes: the loss along random, filter-normalised directions through trained weights."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from saq_jax import _checks as checks
from saq_jax._paths import PyTree
from saq_jax.perturbation import mask_tree, perturbed_by_default, ratio, wide

LossSum = Callable[[PyTree, Any], tuple[Array, Array]]
OnStep = Callable[[int, int], None]


def filter_normalized(
  key: Array, z: PyTree, mask: Callable[[str], bool] = perturbed_by_default
) -> PyTree:
  r"""A random direction, each filter of which is as long as that of the weights:

      d_f = |z_f| n_f / |n_f|,   n_f of independent standard normal numbers.

  A filter f is what makes one output: an entry of the last axis of a kernel, as Flax has them.
  Biases, the parameters of norms and all else of fewer than two axes stay where they are, as in
  the authors' code; so do the leaves that the mask leaves out. A step of 1 then is as large as the
  weights, whatever their size: networks whose norms or ReLUs hide a scale can be compared.

  Args:
    key: a JAX random key.
    z: the quantized parameters, `quantize(params)`.
    mask: of a leaf's path, whether it is moved; that of `saq` by default.

  Returns:
    A tree like z, in float32 or better.

  Raises:
    ValueError: if the mask chooses no leaf.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> z = {'kernel': jnp.array([[3.0, 0.0], [4.0, 0.0]]), 'bias': jnp.ones(2)}
    >>> d = filter_normalized(jax.random.key(0), z)
    >>> jnp.linalg.norm(d['kernel'], axis=0).round(4), d['bias']
    (Array([5., 0.], dtype=float32), Array([0., 0.], dtype=float32))

  References:
    Visualizing the Loss Landscape of Neural Nets, arXiv 1712.09913.
  """
  leaves, structure = jax.tree.flatten(wide(z))
  moved = jax.tree.leaves(mask_tree(mask, z))
  keys = jax.random.split(key, len(leaves))
  directions = [
    _filters(k, leaf) if m and leaf.ndim > 1 else jnp.zeros_like(leaf)
    for k, leaf, m in zip(keys, leaves, moved)
  ]
  return jax.tree.unflatten(structure, directions)


def landscape_1d(
  loss_fn: LossSum,
  z: PyTree,
  batches: Sequence[Any],
  direction: PyTree,
  radii: Sequence[float] | np.ndarray,
  *,
  on_step: OnStep | None = None,
) -> np.ndarray:
  r"""The mean loss along a line, `L(z + a d)`.

  Args:
    loss_fn: (z, batch) -> (sum of the losses of the batch's examples, their number). A padded
      example counts in neither. Hashable; compiled once for it and each shape of a batch, so pass
      the same function again.
    z: the quantized parameters, `quantize(params)`; what is added to them is not rounded.
    batches: the whole split, gone through once a point; batches may differ in size.
    direction: d, a tree like z: of `filter_normalized`, a gradient, or an eigenvector.
    radii: the a, in units of d.
    on_step: called after each point with (points done, points); may raise to stop.

  Returns:
    float64 [len(radii)].

  Raises:
    ValueError: if there is no batch, radii are not a list of finite numbers, or the direction has
      another structure than z.

  Example:
    >>> import jax.numpy as jnp
    >>> def loss_sum(z, batch):
    ...   return jnp.sum((z - batch) ** 2), len(batch)
    >>> landscape_1d(loss_sum, jnp.array(1.0), [jnp.zeros(3)], jnp.array(2.0), [-1, 0, 1])
    array([1., 1., 9.])
  """
  steps = _checked(radii)
  return _losses(loss_fn, z, batches, (direction,), [(a,) for a in steps], on_step)


def landscape_2d(
  loss_fn: LossSum,
  z: PyTree,
  batches: Sequence[Any],
  directions: tuple[PyTree, PyTree],
  radii: Sequence[float] | np.ndarray,
  *,
  on_step: OnStep | None = None,
) -> np.ndarray:
  r"""The mean loss in a plane, `L(z + a d + b e)`.

  Args:
    loss_fn: as in `landscape_1d`.
    z: as there.
    batches: as there.
    directions: d and e, each a tree like z.
    radii: the a, and the b likewise.
    on_step: as in `landscape_1d`.

  Returns:
    float64 [len(radii), len(radii)]: a runs along the first axis, b along the second.

  Raises:
    ValueError: as `landscape_1d`, or if there are not two directions.

  Example:
    >>> import jax.numpy as jnp
    >>> def loss_sum(z, batch):
    ...   return jnp.sum((z - batch) ** 2), len(batch)
    >>> along = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
    >>> landscape_2d(loss_sum, jnp.zeros(2), [jnp.zeros((1, 2))], along, [0, 1])
    array([[0., 4.],
           [1., 5.]])

  References:
    Visualizing the Loss Landscape of Neural Nets, arXiv 1712.09913.
  """
  if len(directions) != 2:
    raise ValueError(f'landscape_2d takes two directions, and was given {len(directions)}.')
  steps = _checked(radii)
  points = list(itertools.product(steps, steps))
  losses = _losses(loss_fn, z, batches, tuple(directions), points, on_step)
  return losses.reshape(len(steps), len(steps))


def _filters(key: Array, leaf: Array) -> Array:
  """Random filters of the norms of the filters of a kernel."""
  axes = tuple(range(leaf.ndim - 1))
  d = jax.random.normal(key, leaf.shape, leaf.dtype)
  wanted, found = (jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (leaf, d))
  return d * ratio(wanted, found)


def _checked(radii: Sequence[float] | np.ndarray) -> list[float]:
  """The radii as numbers; ValueError if they are none."""
  values = np.asarray(radii, np.float64)
  if values.ndim != 1 or not values.size or not np.isfinite(values).all():
    raise ValueError(f'radii={radii!r}: give a list of finite numbers, at least one.')
  return values.tolist()


def _losses(
  loss_fn: LossSum,
  z: PyTree,
  batches: Sequence[Any],
  directions: tuple[PyTree, ...],
  points: Sequence[tuple[float, ...]],
  on_step: OnStep | None,
) -> np.ndarray:
  """The mean loss at each point."""
  if not batches:
    raise ValueError('a landscape needs at least one batch.')
  for direction in directions:
    mend = 'make it by filter_normalized(key, z)'
    checks.require_same_structure('the direction', direction, z, mend)
  losses = np.zeros(len(points))
  for i, point in enumerate(points):
    # All batches are under way before the first is waited for.
    sums = [_batch_sums(loss_fn, z, directions, np.asarray(point), batch) for batch in batches]
    total, count = np.asarray(jax.device_get(sums), np.float64).sum(0).tolist()
    losses[i] = total / count if count else np.nan
    if on_step is not None:
      on_step(i + 1, len(points))
  return losses


@functools.partial(jax.jit, static_argnums=0)
def _batch_sums(
  loss_fn: LossSum, z: PyTree, directions: tuple[PyTree, ...], point: Array, batch: Any
) -> tuple[Array, Array]:
  """The sum of the losses of a batch at a point of a line or plane, and their number."""

  def moved(x: Array, *along: Array) -> Array:
    return x + sum(a.astype(x.dtype) * d.astype(x.dtype) for a, d in zip(point, along))

  return loss_fn(jax.tree.map(moved, wide(z), *directions), batch)

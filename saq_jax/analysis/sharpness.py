"""Sharpness: how the loss of a quantized network changes after one gradient step uphill."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from saq_jax._paths import PyTree
from saq_jax.perturbation import mask_tree, perturb, perturbed_by_default

ValueAndGrad = Callable[[PyTree, Any], tuple[tuple[Array, Array], PyTree]]


class Sharpness(NamedTuple):
  """The loss over a split, and over the same split one ascent step away.

  Attributes:
    rise: `perturbed_loss - loss`, the figure that is called the sharpness.
    loss: the mean loss at z.
    perturbed_loss: the mean loss at z + eps.
    grad_norm: |g|, over the perturbed leaves; |T g| where eta is given.
  """

  rise: Array
  loss: Array
  perturbed_loss: Array
  grad_norm: Array


def sharpness(
  value_and_grad_fn: ValueAndGrad,
  z: PyTree,
  batches: Sequence[Any],
  rho: float | Array,
  *,
  mask: Callable[[str], bool] = perturbed_by_default,
  eta: float | None = None,
) -> Sharpness:
  r"""The sharpness of the SAQ authors' code, over a whole split:

      g = grad L(z),   eps = rho g / |g|,   sharpness = L(z + eps) - L(z),   L the mean loss.

  A pure function: jit and vmap apply. The loss is taken by one and the same function at both
  points, so that rounding is alike in both. Without `eta` the radius is not scaled by the weights:
  compare networks of one architecture and one parametrisation. With it the step is that of ASAM,

      eps = rho T^2 g / |T g|,   T = |z| + eta,

  which at eta = 0 is alike for networks that differ only in scales which cancel, as of two layers
  with a ReLU between; a small eta keeps weights of zero movable. Where activations are quantized,
  the gradient is the straight-through one and need not ascend: the rise may then be below 0.

  Args:
    value_and_grad_fn: (z, batch) -> ((sum of the losses of the batch's examples, their number),
      gradient of that sum with respect to z): `jax.value_and_grad(..., has_aux=True)`. A padded
      example counts neither in the sum nor in the number.
    z: the quantized parameters, `quantize(params)`.
    batches: the whole split, once; batches may differ in size.
    rho: the radius, at least 0.
    mask: of a leaf's path, whether it is shifted and counted in |g|; that of `saq` by default.
    eta: of ASAM, at least 0 (0.01 there); None for the plain step.

  Returns:
    Scalars; all but `rise` show what it is made of. A zero gradient gives a rise of 0.

  Raises:
    ValueError: if there is no batch, or eta is not a finite number that is at least 0.

  Example:
    >>> import jax.numpy as jnp
    >>> def loss_sum(z, batch):
    ...   return 0.5 * jnp.sum((z - batch) ** 2), len(batch)
    >>> fn = jax.value_and_grad(loss_sum, has_aux=True)
    >>> found = sharpness(fn, jnp.array(3.0), [jnp.array([0.0, 1.0]), jnp.array([2.0])], rho=0.5)
    >>> float(found.rise)  # mean gradient 2: 0.5 * 2 + 0.5 ** 2 / 2
    1.125

  References:
    Sharpness-aware Quantization for Deep Neural Networks, arXiv 2111.12273, its first code.
    ASAM: Adaptive Sharpness-Aware Minimization, arXiv 2102.11600.
  """
  if not batches:
    raise ValueError('sharpness needs at least one batch.')
  if eta is not None and not 0 <= eta < float('inf'):
    raise ValueError(f'sharpness(eta={eta!r}): must be a finite number, at least 0, or None.')
  loss, g = mean_gradient(value_and_grad_fn, z, batches)
  moved, norm = perturb(z, g, rho, mask_tree(mask, z), eta)
  perturbed_loss, _ = mean_gradient(value_and_grad_fn, moved, batches)
  return Sharpness(perturbed_loss - loss, loss, perturbed_loss, norm)


def mean_gradient(
  value_and_grad_fn: ValueAndGrad, z: PyTree, batches: Sequence[Any]
) -> tuple[Array, PyTree]:
  """The mean loss over all batches and its gradient, of which two are in memory at once.

  Args:
    value_and_grad_fn: as in `sharpness`, like the others.
    z: the quantized parameters.
    batches: at least one.

  Returns:
    The loss, and a tree like z.
  """
  (total, count), g = value_and_grad_fn(z, batches[0])
  for batch in batches[1:]:
    (more, examples), here = value_and_grad_fn(z, batch)
    total, count, g = total + more, count + examples, jax.tree.map(jnp.add, g, here)
  return total / count, jax.tree.map(lambda d: d / count, g)

"""Curvature: the largest eigenvalues of the loss's Hessian and its trace, without forming it.

The Hessian is only ever multiplied by a vector, as the gradient of an inner product,

    H v = grad_z <grad L(z), v>,

one batch at a time: two to three gradients of work, and the memory of one batch. Sums are in
float32 or better; a network that computes in bfloat16 should be made to compute in float32 first.

Where activations are quantized, the loss itself is flat between the thresholds of rounding and
jumps at them. The Hessian here is then the straight-through one: that of the loss in which every
quantizer Q is replaced, about its input x0, by the line

    Q(x) ~ Q(x0) + m (x - x0),   m = 1 inside the clip and 0 outside,   x0 and m held fixed,

whose gradient at z is the straight-through gradient. It is symmetric for weights, biases and
norms, which the default mask chooses. It is not for the learnable scales of quantizers, whose
published gradients are those of no function: a mask that includes them is answered for the
symmetric part, and `Eigenvalues.asymmetry` says what was left out. Jumps, and kinks of ReLU, are
seen by neither eigenvalues nor trace: a landscape (`saq_jax.analysis.landscape`) shows them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from saq_jax import _checks as checks
from saq_jax._paths import PyTree
from saq_jax.analysis.sharpness import ValueAndGrad
from saq_jax.perturbation import mask_tree, perturbed_by_default, wide

OnStep = Callable[[int, int], None]


class Eigenvalues(NamedTuple):
  """Eigenvalues of a Hessian, each with what bounds its error.

  Attributes:
    values: the largest first, float64 [count].
    residuals: bounds on |H v - value v|, float64 [count]: an eigenvalue lies within this distance
      of the value. Take more steps where it is too large.
    vectors: a tree like z for each value, of norm 1; zero in the leaves that are not looked at.
    asymmetry: |P - P'| / |P| of P, the Hessian between the vectors tried; rounding if symmetric.
    steps: products with the Hessian that were taken.
  """

  values: np.ndarray
  residuals: np.ndarray
  vectors: list[PyTree]
  asymmetry: float
  steps: int


class Trace(NamedTuple):
  """An estimate of the trace of a Hessian, and its standard error from the scatter of samples."""

  mean: float
  standard_error: float


def hessian_eigenvalues(
  value_and_grad_fn: ValueAndGrad,
  z: PyTree,
  batches: Sequence[Any],
  count: int = 5,
  *,
  steps: int = 40,
  key: Array,
  mask: Callable[[str], bool] = perturbed_by_default,
  on_step: OnStep | None = None,
) -> Eigenvalues:
  r"""The largest eigenvalues of the Hessian of the mean loss, by Lanczos iteration:

      H q_k = b_(k-1) q_(k-1) + a_k q_k + b_k q_(k+1),   values: the largest of tridiag(b, a, b)

  from a random q_1, each vector orthogonalised twice against all before it. Largest by algebraic
  value: 1 comes before -2. Where the vectors span an invariant subspace, the iteration begins
  anew beside it, so that repeated eigenvalues are found as often as they are; it ends early where
  nothing but one repeated eigenvalue is left, as in a Hessian of zeros, or every dimension is
  used. What is found is an eigenvalue, to its residual; with few steps a larger one can be missed.
  Not for use under `jax.jit`. What `z` of a network with quantized activations is answered with,
  the module says.

  Args:
    value_and_grad_fn: as in `sharpness`: (z, batch) -> ((sum of losses, number of examples),
      gradient of that sum), `jax.value_and_grad(..., has_aux=True)`. Compiled once for it and
      each shape of a batch, so pass the same function again.
    z: the quantized parameters, `quantize(params)`.
    batches: the whole split, gone through once a step; may differ in size.
    count: of eigenvalues.
    steps: products with the Hessian, at most; as many vectors of the size of z are held.
    key: of the first vector.
    mask: of a leaf's path, whether the Hessian is of it; that of `saq` by default.
    on_step: called after each product with (products taken, `steps`); may raise to stop.

  Returns:
    `Eigenvalues`, as NumPy arrays.

  Raises:
    ValueError: if there is no batch, or count is below 1 or above steps or the parameters.
    FloatingPointError: if a product is not finite.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> def loss_sum(z, batch):
    ...   return 0.5 * jnp.sum(batch * z**2), len(batch)  # Hessian: diagonal, the batch's mean
    >>> fn = jax.value_and_grad(loss_sum, has_aux=True)
    >>> batches = [jnp.array([[1.0, 7.0, -5.0], [3.0, 9.0, -5.0]])]
    >>> found = hessian_eigenvalues(fn, jnp.ones(3), batches, count=2, key=jax.random.key(0))
    >>> [round(float(value), 4) for value in found.values], found.steps
    ([8.0, 2.0], 3)

  References:
    PyHessian: Neural networks through the lens of the Hessian, arXiv 1912.07145.
    Parlett, The Symmetric Eigenvalue Problem (SIAM, 1998), chapters 6 and 13.
  """
  checks.require_count('hessian_eigenvalues', 'count', count)
  hessian = _Hessian(value_and_grad_fn, z, batches, mask)
  if count > min(steps, hessian.size):
    most = f'at most steps={steps}, and at most the number of parameters, {hessian.size}'
    raise ValueError(f'hessian_eigenvalues(count={count}): must be {most}.')
  with jax.default_matmul_precision('highest'):
    basis, projected, outside, taken = _lanczos(hessian, count, steps, key, on_step)
    symmetric = (projected + projected.T) / 2
    values, weights = (found[..., : -count - 1 : -1] for found in np.linalg.eigh(symmetric))
    vectors = [hessian.tree(v) for v in jnp.asarray(weights.T, basis.dtype) @ basis]
  residuals = np.linalg.norm((projected - symmetric) @ weights, axis=0) + outside @ abs(weights)
  asymmetry = np.linalg.norm(projected - projected.T) / (np.linalg.norm(projected) or 1.0)
  return Eigenvalues(values, residuals, vectors, float(asymmetry), taken)


def hessian_trace(
  value_and_grad_fn: ValueAndGrad,
  z: PyTree,
  batches: Sequence[Any],
  samples: int = 100,
  *,
  key: Array,
  mask: Callable[[str], bool] = perturbed_by_default,
  on_step: OnStep | None = None,
) -> Trace:
  r"""The trace of the Hessian of the mean loss, by Hutchinson's estimator:

      tr H = E[v' H v],   v of independent signs, +1 or -1.

  The variance of a sample is `2 sum_(i != j) H_ij^2`: none for a diagonal Hessian.

  Args:
    value_and_grad_fn: as in `hessian_eigenvalues`.
    z: as there.
    batches: as there, gone through once a sample.
    samples: how many v, at least 2.
    key: of the signs.
    mask: as there.
    on_step: called after each sample with (samples taken, `samples`); may raise to stop.

  Returns:
    `Trace`, of Python numbers.

  Raises:
    ValueError: if there is no batch, or samples is below 2.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> fn = jax.value_and_grad(lambda z, x: (jnp.sum(x * z**2) / 2, len(x)), has_aux=True)
    >>> batches = [jnp.array([[1.0, 7.0, -5.0], [3.0, 9.0, -5.0]])]
    >>> hessian_trace(fn, jnp.ones(3), batches, 2, key=jax.random.key(0))
    Trace(mean=5.0, standard_error=0.0)

  References:
    Hutchinson, Communications in Statistics 19 (1990); PyHessian, arXiv 1912.07145.
  """
  checks.require_count('hessian_trace', 'samples', samples)
  if samples < 2:
    raise ValueError(f'hessian_trace(samples={samples}): a standard error takes at least 2.')
  hessian = _Hessian(value_and_grad_fn, z, batches, mask)
  found = np.zeros(samples)
  with jax.default_matmul_precision('highest'):
    for i in range(samples):
      v = jax.random.rademacher(jax.random.fold_in(key, i), (hessian.size,), hessian.dtype)
      found[i] = jnp.vdot(v, hessian(v))
      if on_step is not None:
        on_step(i + 1, samples)
  return Trace(float(found.mean()), float(found.std(ddof=1) / samples**0.5))


class _Hessian:
  """The Hessian of the mean loss as a function of flat vectors, those of the masked leaves."""

  def __init__(
    self, fn: ValueAndGrad, z: PyTree, batches: Sequence[Any], mask: Callable[[str], bool]
  ) -> None:
    if not batches:
      raise ValueError('a Hessian needs at least one batch.')
    self._fn, self._z, self._batches = fn, wide(z), batches
    self._chosen = tuple(jax.tree.leaves(mask_tree(mask, z)))
    flat = jax.eval_shape(lambda tree: _flat(self._chosen, tree)[0], self._z)
    self.size, self.dtype = flat.size, flat.dtype

  def __call__(self, v: Array) -> Array:
    """`H v`."""
    total, count = _batch_product(self._fn, self._chosen, self._z, self._batches[0], v)
    for batch in self._batches[1:]:
      more, examples = _batch_product(self._fn, self._chosen, self._z, batch, v)
      total, count = total + more, count + examples
    return total / count

  def tree(self, v: Array) -> PyTree:
    """A flat vector as a tree like z, zero in the other leaves."""
    return _replaced(self._chosen, jax.tree.map(jnp.zeros_like, self._z), v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_product(
  fn: ValueAndGrad, chosen: tuple[bool, ...], z: PyTree, batch: Any, v: Array
) -> tuple[Array, Array]:
  """The product with the Hessian of the sum of a batch's losses, and the number of those."""

  # Forward-mode derivatives do not pass the quantizers' custom_vjp; a difference of gradients
  # would see the jumps, and grow without limit as the distance falls.
  def slope(flat: Array) -> tuple[Array, Array]:
    (_, count), g = fn(_replaced(chosen, z, flat), batch)
    return jnp.vdot(_flat(chosen, g)[0], v), count

  return jax.grad(slope, has_aux=True)(_flat(chosen, z)[0])


def _flat(chosen: tuple[bool, ...], tree: PyTree) -> tuple[Array, Callable[[Array], list[Array]]]:
  """The chosen leaves as one vector, and the function that makes leaves of it again."""
  return ravel_pytree([leaf for leaf, here in zip(jax.tree.leaves(tree), chosen) if here])


def _replaced(chosen: tuple[bool, ...], tree: PyTree, flat: Array) -> PyTree:
  """The tree with its chosen leaves taken from a vector."""
  new = iter(_flat(chosen, tree)[1](flat))
  leaves, structure = jax.tree.flatten(tree)
  leaves = [next(new) if here else leaf for leaf, here in zip(leaves, chosen)]
  return jax.tree.unflatten(structure, leaves)


def _lanczos(
  hessian: _Hessian, count: int, steps: int, key: Array, on_step: OnStep | None
) -> tuple[Array, np.ndarray, np.ndarray, int]:
  """Orthonormal rows Q, `Q H Q'`, the norm of what each `H q` has outside Q, and the products."""
  most = min(steps, hessian.size)
  basis = jnp.zeros((most, hessian.size), hessian.dtype)
  projected, outside = np.zeros((most, most)), np.zeros(most)
  tolerance, scale, first = 100 * jnp.finfo(hessian.dtype).eps, 0.0, True
  new = _beside(basis, jax.random.fold_in(key, 0))
  for k in range(most):
    basis = _with_row(basis, k, new)
    product = hessian(new)
    rest, projected[:, k] = _split(basis, product)
    beta, taken = float(jnp.linalg.norm(rest)), k + 1
    if not np.isfinite(beta):
      raise FloatingPointError(f'the product with the Hessian of step {k + 1} is not finite.')
    scale = max(scale, float(jnp.linalg.norm(product)))
    if on_step is not None:
      on_step(taken, steps)
    if beta > tolerance * scale and taken < most:
      projected[k + 1, k], first, new = beta, False, rest / beta
      continue
    outside[k] = beta
    # A random vector is an eigenvector only where all that is left is one eigenspace.
    if first or taken == most:
      break
    first, new = True, _beside(basis, jax.random.fold_in(key, taken))
  for i in range(taken, count):
    basis = _with_row(basis, i, _beside(basis, jax.random.fold_in(key, i)))
    projected[i, i], outside[i] = projected[k, k], outside[k]
  used = max(taken, count)
  return basis[:used], projected[:used, :used], outside[:used], taken


@jax.jit
def _split(basis: Array, w: Array) -> tuple[Array, Array]:
  """What a vector has outside the rows of a basis, and its products with them."""
  coefficients = basis @ w
  rest = w - coefficients @ basis
  again = basis @ rest  # Rounding leaves some of it the first time.
  return rest - again @ basis, coefficients + again


@functools.partial(jax.jit, donate_argnums=0)
def _with_row(basis: Array, k: int, row: Array) -> Array:
  """The basis with its k-th row replaced."""
  return basis.at[k].set(row)


def _beside(basis: Array, key: Array) -> Array:
  """A random unit vector that is orthogonal to the rows of a basis."""
  v = jax.random.normal(key, basis.shape[1:], basis.dtype)
  rest, _ = _split(basis, v)
  return rest / jnp.linalg.norm(rest)

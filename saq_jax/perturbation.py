"""The perturbation of sharpness-aware training: which leaves it moves, and by how much."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from saq_jax import _checks as checks
from saq_jax._paths import PyTree, is_quant_scale, leaf_names, map_named

Mask = Callable[[str], bool] | PyTree


def perturbed_by_default(path: str) -> bool:
  """The default mask: every leaf but the learnable scales of quantizers.

  By this package's convention those are under 'scales' (weights) or named 'quant_scale'
  (activations). Weights, biases and the affine parameters of norms are perturbed.

  Args:
    path: of a leaf of params, its keys joined by '/'.

  Returns:
    Whether it is perturbed.
  """
  return not is_quant_scale(path)


@dataclasses.dataclass(frozen=True)
class Only:
  r"""A mask that perturbs only the leaves which a pattern matches; see `only`.

  Attributes:
    patterns: regular expressions, each of which must match the whole path of some leaf.
    among: another mask, whose leaves it chooses from.
  """

  patterns: tuple[str, ...]
  among: Callable[[str], bool] = perturbed_by_default

  def __call__(self, path: str) -> bool:
    """Whether a leaf is perturbed.

    Args:
      path: of the leaf.

    Returns:
      True if a pattern matches it and `among` has it.
    """
    matched = any(re.fullmatch(pattern, path) for pattern in self.patterns)
    return matched and self.among(path)

  def require_matches(self, paths: Sequence[str]) -> None:
    """Refuses a pattern that matches nothing.

    Args:
      paths: of all leaves.

    Raises:
      ValueError: for a pattern that matches none; the message has the nearest paths.
    """
    for pattern in self.patterns:
      if not any(re.fullmatch(pattern, path) for path in paths):
        plain = re.sub(r'[\\^$.*+?()\[\]{}|]', '', pattern)
        near = difflib.get_close_matches(plain, paths, n=3, cutoff=0.0)
        raise ValueError(
          f'only({pattern!r}) matches no leaf, so nothing of it would be perturbed. The nearest '
          f'paths are: {", ".join(map(repr, near)) or "none, the tree is empty"}.'
        )


def only(*patterns: str, among: Callable[[str], bool] = perturbed_by_default) -> Only:
  r"""A mask for `saq`: perturbs the leaves that a pattern matches, and no others.

  With the norms alone it is SAM-ON (arXiv 2306.04226). It saves memory and elementwise work, but
  no gradient: the second one is of all leaves.

  Args:
    *patterns: regular expressions that match the whole path of a leaf of params.
    among: the mask to choose from; the default leaves out the scales of quantizers.

  Returns:
    The mask. `saq` raises ValueError where one of the patterns matches nothing.

  Raises:
    ValueError: without a pattern, or for one that is no regular expression.

  Example:
    >>> mask = only(r'model/.*norm\d*/(scale|bias)')
    >>> mask('model/block_0/norm1/scale'), mask('model/block_0/fc1/kernel')
    (True, False)
  """
  if not patterns:
    raise ValueError('only() needs a pattern: name the leaves to perturb.')
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f'only({pattern!r}): not a regular expression: {error}.') from None
  return Only(patterns, among)


def mask_tree(mask: Mask | None, params: PyTree) -> PyTree:
  """One bool a leaf of params.

  Args:
    mask: a function of the leaf's path, a tree of bools, or None for `perturbed_by_default`.
    params: the tree.

  Returns:
    A tree of bools like params.

  Raises:
    ValueError: if a tree of bools has another structure, a pattern of `only` matches nothing, or
      no leaf is chosen.
  """
  if mask is None:
    mask = perturbed_by_default
  if isinstance(mask, Only):
    mask.require_matches(leaf_names(params))
  if callable(mask):
    chosen = map_named(lambda path, _: bool(mask(path)), params)
  else:
    checks.require_same_structure('saq(mask=...)', mask, params, 'give one bool a leaf of params')
    chosen = jax.tree.map(bool, mask)
  if not any(jax.tree.leaves(chosen)):
    raise ValueError(
      'saq(mask=...) chooses no leaf, so nothing would be perturbed. The paths are '
      f'{", ".join(leaf_names(params)[:4])}, ...'
    )
  return chosen


def draw_tensors(key: Array, tree: PyTree, probability: float) -> PyTree:
  """Draws which tensors are perturbed in a step: ESAM's stochastic weight perturbation.

  Each leaf's perturbation is multiplied by b / beta, `b ~ Bernoulli(beta)`, so that its mean is
  what it was (arXiv 2110.03141).

  Args:
    key: a JAX random key.
    tree: whose leaves are drawn for.
    probability: beta, above 0 and at most 1.

  Returns:
    A tree of scalars like it, each 0 or 1 / beta.
  """
  leaves, structure = jax.tree.flatten(tree)
  drawn = jax.random.bernoulli(key, probability, (len(leaves),))
  return jax.tree.unflatten(structure, list(drawn.astype(float) / probability))


def perturb(
  point: PyTree,
  direction: PyTree,
  radius: float | Array,
  mask: PyTree,
  eta: float | None = None,
  factors: PyTree | None = None,
) -> tuple[PyTree, Array]:
  """Adds `eps = rho d/|d|` to the masked leaves of a point; 0 where d is 0.

  Args:
    point: a tree of floating arrays.
    direction: d, a tree like it.
    radius: rho.
    mask: one bool a leaf: which are moved, and counted in the norm.
    eta: of ASAM's scaling, `eps = rho T^2 d/|T d|` with `T = |point| + eta`; None for none.
    factors: one number a leaf that its eps is multiplied by; the norm is taken without them.

  Returns:
    The moved point, and the norm that was divided by, in float32 or better.
  """

  def scaled(x: Array, d: Array) -> Array:
    return d if eta is None else (jnp.abs(x) + eta) * d

  point_wide, d = wide(point), wide(direction)
  steps = jax.tree.map(lambda m, x, d: scaled(x, d) if m else None, mask, point_wide, d)
  norm = optax.tree.norm(steps)
  scale = ratio(radius, norm)
  if factors is None:
    factors = jax.tree.map(lambda _: 1.0, point)

  def add(m: bool, x: Array, wide: Array, d: Array, factor: Array) -> Array:
    eps = scale * jnp.asarray(factor, wide.dtype) * scaled(wide, scaled(wide, d))
    return (wide + eps).astype(x.dtype) if m else x

  return jax.tree.map(add, mask, point, point_wide, d, factors), norm


def ratio(a: float | Array, b: Array) -> Array:
  """`a / b`; 0 where b is zero.

  Args:
    a: any number.
    b: what divides it.

  Returns:
    A scalar.
  """
  return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def wide(tree: PyTree) -> PyTree:
  """The tree in float32 or, where a leaf is wider, its own dtype.

  Args:
    tree: floating arrays.

  Returns:
    A tree like it.
  """
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)), tree)

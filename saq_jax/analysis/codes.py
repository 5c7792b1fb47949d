"""What rounding does to a perturbation and to a gradient: the weaknesses of cases 1 and 2."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from saq_jax._paths import PyTree, named_leaves
from saq_jax.oscillation import fraction, weight_codes
from saq_jax.perturbation import mask_tree, perturb, perturbed_by_default
from saq_jax.weights import WeightQuantizer


class Flips(NamedTuple):
  """How many integer codes differ between two points.

  Attributes:
    fraction: of all quantized weights, from 0 to 1.
    by_path: the same of each quantized leaf.
  """

  fraction: Array
  by_path: dict[str, Array]


class Diminishment(NamedTuple):
  """What is left of a perturbation that is added before rounding.

  Attributes:
    flips: the codes that it changes.
    added: |eps|, over the quantized leaves: what was to be added.
    seen: |Q(w + eps) - Q(w)|, over the same leaves: what the loss sees of it.
  """

  flips: Flips
  added: Array
  seen: Array


class Mismatch(NamedTuple):
  """The angle between a gradient at the quantized weights and its pullback.

  Attributes:
    cosine: over all quantized leaves together; 0 where either is zero.
    degrees: the angle, from 0 to 180; 90 where either is zero.
    by_path: the angle of each quantized leaf, in degrees.
  """

  cosine: Array
  degrees: Array
  by_path: dict[str, Array]


def flipped_codes(quantize: WeightQuantizer, params: PyTree, moved_params: PyTree) -> Flips:
  """Counts the weights whose integer code changes from one point to another.

  Args:
    quantize: of the parameters.
    params: {'model': tree, 'scales': {path: scale}}, latent weights.
    moved_params: the same tree elsewhere; scales that differ change codes as well.

  Returns:
    The fractions, in all and of each quantized leaf.

  Raises:
    ValueError: if nothing is quantized.

  Example:
    >>> import jax.numpy as jnp
    >>> from saq_jax import LSQ, QuantRule, weight_quantizer
    >>> quantize = weight_quantizer([QuantRule('w', LSQ(bits=2))])
    >>> one, two = (
    ...   {'model': {'w': jnp.array(w)}, 'scales': {'w': jnp.array(0.5)}}
    ...   for w in ([0.2, 0.1, -0.6, 0.4], [0.3, 0.2, -0.6, 0.3])
    ... )
    >>> float(flipped_codes(quantize, one, two).fraction)  # 0.25 is where 0 becomes 1
    0.25
  """
  before, after = weight_codes(quantize, params), weight_codes(quantize, moved_params)
  changed = {path: before[path] != after[path] for path in before}
  return Flips(fraction(changed), {path: fraction(flags) for path, flags in changed.items()})


def diminishment(
  quantize: WeightQuantizer,
  params: PyTree,
  direction: PyTree,
  rho: float | Array,
  *,
  mask: Callable[[str], bool] = perturbed_by_default,
) -> Diminishment:
  r"""What becomes of a perturbation that is added before rounding, as in Case 2.

      eps = rho p/|p|,   seen = |Q(w + eps) - Q(w)|   (arXiv 2111.12273, Case 2)

  with p the gradient on the latent weights. A small eps leaves most codes as they are, and moves
  the others by a whole step of the grid: what the loss sees is sparse, and its norm is not rho. In
  Case 3 eps is added after rounding, and the loss sees all of it.

  Args:
    quantize: of the parameters.
    params: {'model': tree, 'scales': {path: scale}}, latent weights.
    direction: p, a tree like params; its length does not count.
    rho: the radius, at least 0, over all leaves of the mask.
    mask: of a leaf's path, whether it is shifted and counted in |p|; that of `saq` by default.

  Returns:
    The codes that change, and the norms of what was added and of what is seen, over the quantized
    leaves. Biases and norms take their share of rho, so `added` may be below it.

  Raises:
    ValueError: if nothing is quantized, or the mask chooses no leaf.

  Example:
    >>> import jax.numpy as jnp
    >>> from saq_jax import LSQ, QuantRule, weight_quantizer
    >>> quantize = weight_quantizer([QuantRule('w', LSQ(bits=2))])
    >>> params = {'model': {'w': jnp.array([0.2, 0.0])}, 'scales': {'w': jnp.array(0.5)}}
    >>> p = {'model': {'w': jnp.array([3.0, 4.0])}, 'scales': {'w': jnp.array(0.0)}}
    >>> found = diminishment(quantize, params, p, 0.1)  # eps = (0.06, 0.08)
    >>> float(found.flips.fraction), float(found.seen)
    (0.5, 0.5)
  """
  moved, _ = perturb(params, direction, rho, mask_tree(mask, params))
  return Diminishment(
    flipped_codes(quantize, params, moved),
    _distance(quantize, params, moved),
    _distance(quantize, quantize(params), quantize(moved)),
  )


def mismatch(quantize: WeightQuantizer, params: PyTree, g_q: PyTree) -> Mismatch:
  r"""The angle by which the straight-through estimator turns a gradient, as in Case 1.

      g_w = pullback(g_q),   angle = arccos <g_q, g_w> / (|g_q| |g_w|)   (arXiv 2111.12273, Case 1)

  Case 1 perturbs the quantized weights along g_w, though the loss ascends along g_q. Where the
  pullback is the identity the two are one. A clip, which stops the gradient of the weights beyond
  it, turns a leaf's gradient. A factor that is one number for a leaf, as the 1/std of a weight
  normalisation, turns the gradient of all leaves together, but not that leaf's own.

  Args:
    quantize: of the parameters.
    params: {'model': tree, 'scales': {path: scale}}, latent weights.
    g_q: the gradient at `quantize(params)`, a tree like params.

  Returns:
    Cosine and angle over all quantized leaves, and the angle of each.

  Raises:
    ValueError: if nothing is quantized.

  Example:
    >>> import jax.numpy as jnp
    >>> from saq_jax import LSQ, QuantRule, weight_quantizer
    >>> quantize = weight_quantizer([QuantRule('w', LSQ(bits=2))])
    >>> params = {'model': {'w': jnp.array([0.2, 7.0])}, 'scales': {'w': jnp.array(0.5)}}
    >>> g_q = {'model': {'w': jnp.array([1.0, 1.0])}, 'scales': {'w': jnp.array(0.0)}}
    >>> round(float(mismatch(quantize, params, g_q).degrees), 3)  # the second is clipped
    45.0
  """
  (g_w,) = jax.vjp(quantize, params)[1](g_q)
  ours, theirs = _quantized(quantize, params, g_q), _quantized(quantize, params, g_w)
  by_path = {path: _angle(ours[path], theirs[path]) for path in ours}
  angle = _angle(ours, theirs)
  return Mismatch(jnp.cos(angle), jnp.degrees(angle), jax.tree.map(jnp.degrees, by_path))


def _quantized(quantize: WeightQuantizer, params: PyTree, tree: PyTree) -> dict[str, Array]:
  """The leaves of a tree like params that are quantized there, in float32 or better."""
  leaves = named_leaves(tree['model'])
  return {
    path: leaves[path].astype(jnp.promote_types(leaves[path].dtype, jnp.float32))
    for path in weight_codes(quantize, params)
  }


def _distance(quantize: WeightQuantizer, one: PyTree, two: PyTree) -> Array:
  """The norm of the difference of two trees like params, over the quantized leaves."""
  a, b = _quantized(quantize, one, one), _quantized(quantize, one, two)
  return optax.tree.norm(jax.tree.map(jnp.subtract, a, b))


def _angle(one: PyTree, two: PyTree) -> Array:
  """The angle in radians, by Kahan's formula, which is exact near 0 too; pi/2 if one is zero."""
  a, b = (optax.tree.norm(tree) for tree in (one, two))
  apart = jax.tree.map(lambda x, y: x * b - y * a, one, two)
  along = jax.tree.map(lambda x, y: x * b + y * a, one, two)
  angle = 2 * jnp.arctan2(optax.tree.norm(apart), optax.tree.norm(along))
  return jnp.where((a == 0) | (b == 0), jnp.pi / 2, angle)

"""Which steps take the second gradient, and of which examples it is taken."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from saq_jax import _checks as checks

_CHOICE = 0x525354  # sets its draws apart from others of the same seed and step


class When(NamedTuple):
  """Says which steps take the second gradient.

  Attributes:
    init: () -> what it remembers, a tree of arrays or None.
    choose: (step, squared norm of g, memory) -> (whether, new memory).
  """

  init: Callable[[], Any]
  choose: Callable[[Array, Array, Any], tuple[Array, Any]]


def every(k: int) -> When:
  """Takes the second gradient in the steps t with `t mod k = 0`, the first one among them (ours).

  Args:
    k: at least 1; 1 is every step.

  Returns:
    For `sometimes`.

  Raises:
    ValueError: if k is not a whole number, at least 1.

  Example:
    >>> [bool(every(3).choose(t, 1.0, None)[0]) for t in range(5)]
    [True, False, False, True, False]
  """
  checks.require_count('every', 'k', k)
  return When(lambda: None, lambda step, _, memory: (jnp.asarray(step) % k == 0, memory))


def at_random(probability: float | optax.Schedule, seed: int = 0) -> When:
  """Takes the second gradient in a step with a probability (RST, arXiv 2203.09962).

  Args:
    probability: from 0 to 1, or an optax schedule of it by the step.
    seed: of the draws, with the step; those of `saq(tensors=...)` of the same seed are others.

  Returns:
    For `sometimes`.

  Raises:
    ValueError: if the probability is outside 0 to 1.

  Example:
    >>> bool(at_random(1.0).choose(jnp.array(7), 1.0, None)[0])
    True
  """
  if not callable(probability) and not 0 <= probability <= 1:
    raise ValueError(f'at_random(probability={probability!r}): must be from 0 to 1.')

  def choose(step: Array, _: Array, memory: Any) -> tuple[Array, Any]:
    p = probability(step) if callable(probability) else probability
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _CHOICE), step)
    return jax.random.bernoulli(key, p), memory

  return When(lambda: None, choose)


def where_steep(
  total_steps: int, *, first: float = 1.0, last: float = -1.0, decay: float = 0.9
) -> When:
  r"""Takes the second gradient where the first is long for its kind (AE-SAM, arXiv 2304.14647).

      mu <- decay mu + (1 - decay) |g|^2
      var <- decay var + (1 - decay) (|g|^2 - mu)^2
      taken where |g|^2 >= mu + c sqrt(var),   c = first + (last - first) t / T

  The defaults are the authors': rarely at the start, mostly at the end. mu begins as the first
  |g|^2 and var as 0 (ours), so that the first step takes it.

  Args:
    total_steps: T, at least 1.
    first: the threshold c at the start, in deviations.
    last: at the end.
    decay: from 0 to below 1.

  Returns:
    For `sometimes`. Where each device has its own g, |g|^2 is the mean of theirs.

  Raises:
    ValueError: for a total below 1 or a decay outside [0, 1).

  Example:
    >>> when = where_steep(100)
    >>> taken, memory = when.choose(jnp.array(0), jnp.array(4.0), when.init())
    >>> bool(taken), float(memory[0])
    (True, 4.0)
  """
  checks.require_count('where_steep', 'total_steps', total_steps)
  checks.require_decay('where_steep', decay)

  def init() -> tuple[Array, Array]:
    return jnp.zeros((), float), jnp.zeros((), float)

  def choose(step: Array, square: Array, memory: Any) -> tuple[Array, Any]:
    begin = jnp.asarray(step) == 0
    mean, var = memory
    mean = jnp.where(begin, square, decay * mean + (1 - decay) * square).astype(float)
    var = jnp.where(begin, 0.0, decay * var + (1 - decay) * (square - mean) ** 2).astype(float)
    threshold = first + (last - first) * step / total_steps
    return square >= mean + threshold * jnp.sqrt(var), (mean, var)

  return When(init, choose)


def hardest(clean: Array, perturbed: Array, fraction: float, groups: int = 1) -> Array:
  """The examples whose loss a perturbation raises most (ESAM's SDS, arXiv 2110.03141).

  A second gradient of these alone costs their part of a whole one, and the forward pass that
  finds them. There are always `ceil(fraction B)` of them, so that shapes are static.

  Args:
    clean: [B], the losses of a batch at z.
    perturbed: [B], the same at z + eps.
    fraction: gamma, above 0 and at most 1.
    groups: that the batch is cut into, such as devices, each of which gives its own part.

  Returns:
    int32 [groups, n], places in each group, those of the largest `perturbed - clean` first; of
    equal ones the earlier.

  Raises:
    ValueError: for a fraction outside (0, 1].

  Example:
    >>> hardest(jnp.zeros(4), jnp.array([0.1, 0.4, 0.2, 0.3]), 0.5)
    Array([[1, 3]], dtype=int32)
  """
  checks.require_fraction('hardest', 'fraction', fraction)
  rise = (perturbed - clean).reshape(groups, -1)
  # 0.07 of 100 is 7, though the product of these floats is a little more.
  count = max(1, math.ceil(round(fraction * rise.shape[1], 6)))
  return jax.lax.top_k(rise, count)[1]

r"""What makes SAQ cheaper: links for the slot of `saq` in a chain that take fewer gradients.

With `g = grad L(z)` at `z = quantize(params)` and `g2` the second gradient, at the perturbed point:

    strategy              a step takes                    costs, in gradients    memory
    `sometimes(every(k))` g2 in every k-th step           1 + 1/k                none
    `sometimes(at_random)`g2 with probability p           1 + p                  none
    `sometimes(where_steep)` g2 where |g| is high         1 + the part of steps  two numbers
    `looksam`             g2 in every k-th step           1 + 1/k                a copy of params
    `along_momentum`      a gradient at the moved point   1                      a copy of params

A gradient that a step does not need is not computed (`jax.lax.cond`). Under `jax.vmap`, where the
choice differs between the mapped runs, JAX computes both.

    >>> import jax, jax.numpy as jnp, optax
    >>> from saq_jax import LSQ, QuantRule, every, qat, saq, sometimes, weight_quantizer
    >>> quantize = weight_quantizer([QuantRule('w', LSQ(bits=4))])
    >>> params = quantize.init({'w': jnp.array([0.3, -0.7])})
    >>> loss = lambda z: jnp.sum((z['model']['w'] - 1.0) ** 2)
    >>> slot = sometimes(saq(quantize, rho=0.05), qat(quantize), every(5))
    >>> tx = optax.chain(slot, optax.sgd(0.1))
    >>> state = tx.init(params)
    >>> g = jax.grad(loss)(quantize(params))
    >>> updates, state = tx.update(g, state, params, grad_fn=jax.grad(loss))
    >>> float(state[0].second)
    1.0
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from saq_jax import _axes as axes
from saq_jax import _checks as checks
from saq_jax._paths import PyTree
from saq_jax.perturbation import ratio, wide
from saq_jax.transform import SAQState


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
    seed: of the draws: step t draws with the key `fold_in(key(seed), t)`.

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
    return jax.random.bernoulli(jax.random.fold_in(jax.random.key(seed), step), p), memory

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
  _require_decay('where_steep', decay)

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


def sometimes(
  sharp: optax.GradientTransformationExtraArgs,
  plain: optax.GradientTransformationExtraArgs,
  when: When,
  *,
  axis_name: axes.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`sharp` in the steps that `when` chooses, `plain` in the others.

  Args:
    sharp: `saq(...)`.
    plain: `qat(...)` of the same `quantize` and axis.
    when: `every`, `at_random` or `where_steep`.
    axis_name: as in `saq`, where each device gives its own gradient.

  Returns:
    A link like `sharp`, with its state; `memory` holds what `when` remembers. In a step without the
    second gradient `second` and `rho` are 0 and `aux` holds zeros.

  Raises:
    ValueError: in update if params or grad_fn is missing.

  Example:
    >>> import jax.numpy as jnp
    >>> from saq_jax import every, qat, saq, sometimes
    >>> slot = sometimes(saq(lambda p: p, rho=0.05), qat(lambda p: p), every(5))
    >>> int(slot.init(jnp.ones(3)).step)
    0
  """

  def init_fn(params: PyTree) -> SAQState:
    return sharp.init(params)._replace(memory=when.init())

  def update_fn(
    updates: PyTree,
    state: SAQState,
    params: PyTree | None = None,
    *,
    grad_fn: Callable[[PyTree], Any] | None = None,
    **extra: Any,
  ) -> tuple[PyTree, SAQState]:
    del extra
    _require_call(updates, params, grad_fn)
    square = axes.mean(optax.tree.norm(wide(updates), squared=True), axis_name)
    taken, memory = when.choose(state.step, square, state.memory)
    bare = state._replace(aux=None, memory=None)
    updates, new = _either(
      taken,
      lambda: sharp.update(updates, bare, params, grad_fn=grad_fn),
      lambda: plain.update(updates, bare, params),
      (updates, axis_name),
    )
    return updates, new._replace(memory=memory)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def looksam(
  sharp: optax.GradientTransformationExtraArgs,
  plain: optax.GradientTransformationExtraArgs,
  k: int = 5,
  alpha: float = 0.2,
  *,
  axis_name: axes.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""LookSAM (arXiv 2203.02714) in the space of the quantized weights.

      t mod k = 0:  v = g2 - (<g, g2> / |g|^2) g,     returned: what `sharp` returns
      between:      u = g + alpha (|g| / |v|) v,      returned: pullback(u)

  g and g2 are gradients at quantized weights, as in case 3, so that what is carried over is not
  changed by the straight-through estimator of the step it was found in (ours; the paper has no
  quantizer). Norms are over all leaves, in float32 or better. Where g or v is 0, so is its term.

  Args:
    sharp: `saq(...)`.
    plain: `qat(...)` of the same `quantize` and axis.
    k: at least 1. The paper takes 5, and 10 with alpha 0.7.
    alpha: at least 0.
    axis_name: as in `saq`; v is then that of the mean gradients, which a full step takes one more
      collective for.

  Returns:
    A link like `sharp`; `memory` of its state holds v, a copy of params in size.

  Raises:
    ValueError: for a k below 1 or an alpha below 0; in update if params or grad_fn is missing.

  Example:
    >>> import jax.numpy as jnp
    >>> from saq_jax import looksam, qat, saq
    >>> slot = looksam(saq(lambda p: p, rho=0.05), qat(lambda p: p), k=5, alpha=0.2)
    >>> slot.init({'w': jnp.ones(3)}).memory
    {'w': Array([0., 0., 0.], dtype=float32)}
  """
  checks.require_count('looksam', 'k', k)
  checks.require_at_least_zero('alpha', alpha)

  def init_fn(params: PyTree) -> SAQState:
    return sharp.init(params)._replace(memory=jax.tree.map(jnp.zeros_like, params))

  def update_fn(
    updates: PyTree,
    state: SAQState,
    params: PyTree | None = None,
    *,
    grad_fn: Callable[[PyTree], Any] | None = None,
    **extra: Any,
  ) -> tuple[PyTree, SAQState]:
    del extra
    _require_call(updates, params, grad_fn)
    bare = state._replace(aux=None, memory=None)

    def full() -> tuple[PyTree, SAQState]:
      seen = _Seen(grad_fn)
      sharp_grad, new = sharp.update(updates, bare, params, grad_fn=seen)
      g, g2 = axes.mean((updates, seen.gradient(params)), axis_name)
      along = ratio(optax.tree.vdot(wide(g), wide(g2)), optax.tree.norm(wide(g), squared=True))
      v = jax.tree.map(lambda b, a: (b - along * a).astype(b.dtype), g2, g)
      return sharp_grad, new._replace(memory=v)

    def reuse() -> tuple[PyTree, SAQState]:
      g, v = axes.mean(updates, axis_name), state.memory
      factor = alpha * ratio(optax.tree.norm(wide(g)), optax.tree.norm(wide(v)))
      u = jax.tree.map(lambda a, b: (a + factor * b).astype(a.dtype), g, v)
      clean, _ = plain.update(updates, bare, params)
      sharp_grad, new = plain.update(_own(u, axis_name), bare, params)
      cosine = ratio(optax.tree.vdot(wide(sharp_grad), wide(clean)), optax.tree.norm(wide(clean)))
      cosine = ratio(cosine, new.sharp_grad_norm).astype(float)
      return sharp_grad, new._replace(cosine=cosine, memory=v)

    return _either(state.step % k == 0, full, reuse, (updates, axis_name))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def along_momentum(
  sharp: optax.GradientTransformationExtraArgs,
  decay: float = 0.9,
  *,
  axis_name: axes.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SAQ with one gradient a step: the perturbation follows the gradients of earlier steps.

      eps = rho m / |m|,   g = grad L(quantize(params) + eps),   returned: pullback(g)
      m <- decay m + (1 - decay) g

  m lives in the space of the quantized weights, and a step's only gradient is taken at the
  perturbed point. It is the idea of Momentum-SAM (arXiv 2401.12033), whose momentum is the
  optimizer's and in the space of the latent weights; m, and its place, are ours. Case 1 or 2 of
  `sharp` sends m through the pullback first.

  The gradient that is passed as updates is not used: under `jax.jit` it is not computed either,
  if nothing else of it is. `jax.tree.map(jnp.zeros_like, params)` will do.

  Args:
    sharp: `saq(...)`.
    decay: from 0 to below 1.
    axis_name: as in `saq`; m is the mean over the devices.

  Returns:
    A link like `sharp`; `memory` of its state holds m, a copy of params in size. `second` is 0;
    `cosine` is that of the gradient returned and the pullback of m. The first step has eps = 0.

  Raises:
    ValueError: for a decay outside [0, 1); in update if params or grad_fn is missing.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from saq_jax import along_momentum, saq
    >>> loss, params = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
    >>> slot = along_momentum(saq(lambda w: w, rho=5.0), decay=0.5)
    >>> state = slot.init(params)
    >>> for _ in range(2):
    ...   g, state = slot.update(jnp.zeros(2), state, params, grad_fn=jax.grad(loss))
    >>> g  # at params + 5 (0.6, 0.8)
    Array([12., 16.], dtype=float32)
  """
  _require_decay('along_momentum', decay)

  def init_fn(params: PyTree) -> SAQState:
    return sharp.init(params)._replace(memory=jax.tree.map(jnp.zeros_like, params))

  def update_fn(
    updates: PyTree,
    state: SAQState,
    params: PyTree | None = None,
    *,
    grad_fn: Callable[[PyTree], Any] | None = None,
    **extra: Any,
  ) -> tuple[PyTree, SAQState]:
    del extra
    _require_call(updates, params, grad_fn)
    m, seen = state.memory, _Seen(grad_fn)
    bare = state._replace(aux=None, memory=None)
    sharp_grad, new = sharp.update(_own(m, axis_name), bare, params, grad_fn=seen)
    g = axes.mean(seen.gradient(params), axis_name)
    m = jax.tree.map(lambda a, b: (decay * a + (1 - decay) * b).astype(a.dtype), m, g)
    return sharp_grad, new._replace(second=jnp.zeros_like(new.second), memory=m)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
  count = -int(-fraction * rise.shape[1] // 1)
  return jax.lax.top_k(rise, count)[1]


class _Seen:
  """`grad_fn`, which keeps what it returned."""

  def __init__(self, grad_fn: Callable[[PyTree], Any] | None) -> None:
    assert grad_fn is not None
    self._grad_fn, self._out = grad_fn, None

  def __call__(self, point: PyTree) -> Any:
    self._out = self._grad_fn(point)
    return self._out

  def gradient(self, params: PyTree) -> PyTree:
    """The gradient, without what may have come beside it."""
    assert self._out is not None
    alone = jax.tree.structure(self._out) == jax.tree.structure(params)
    return self._out if alone else self._out[0]


def _either(
  taken: Array,
  full: Callable[[], tuple[PyTree, SAQState]],
  plain: Callable[[], tuple[PyTree, SAQState]],
  example: tuple[PyTree, axes.AxisName | None],
) -> tuple[PyTree, SAQState]:
  """One of two updates, of which only that one is computed; `plain` lacks the aux of `full`."""
  _, shapes = jax.eval_shape(full)

  def without() -> tuple[PyTree, SAQState]:
    updates, new = plain()
    aux = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes.aux)
    return updates, new._replace(aux=aux)

  alike = functools.partial(axes.alike, *example)
  return jax.lax.cond(taken, lambda: alike(full()), lambda: alike(without()))


def _own(tree: PyTree, axis_name: axes.AxisName | None) -> PyTree:
  """What all devices share, as each one's own."""
  return tree if axis_name is None else axes.own(tree, axis_name)


def _require_decay(who: str, decay: float) -> None:
  if not 0 <= decay < 1:
    raise ValueError(f'{who}(decay={decay!r}): must be at least 0 and below 1.')


def _require_call(updates: PyTree, params: PyTree | None, grad_fn: Any) -> None:
  """Raises ValueError for what `saq` would refuse in a full step, in any step."""
  checks.check_trees(updates, params)
  checks.require_grad_fn(grad_fn)

r"""What makes SAQ cheaper: links for the slot of `saq` in a chain that take fewer gradients.

With `g = grad L(z)` at `z = quantize(params)` and `g2` the second gradient, at the perturbed point:

    strategy                  a step takes                    gradients          memory
    sometimes(every(k))       g2 in every k-th step           1 + 1/k            none
    sometimes(at_random(p))   g2 with probability p           1 + p              none
    sometimes(where_steep(T)) g2 where |g| is high            1 + those steps    two numbers
    looksam(k)                g2 in every k-th step           1 + 1/k            a copy of params
    along_momentum            one, at the perturbed point     1                  a copy of params

A gradient that a step does not need is not computed (`jax.lax.cond`). Under `jax.vmap`, where the
choice differs between the mapped runs, JAX computes both. Where the caller knows the choice, as
with `every`, `tx.update(..., taken=True)` or `taken=False` compiles that step alone: on CPUs XLA
takes more than twice as long for a convolution inside of a `cond`.

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
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from saq_jax import _axes as axes
from saq_jax import _checks as checks
from saq_jax._paths import PyTree
from saq_jax.choices import When
from saq_jax.perturbation import ratio, wide
from saq_jax.transform import SAQState

_ROUNDED = 1e-6  # of a gradient in float32, what is left of it where all of it is taken away


def sometimes(
  sharp: optax.GradientTransformationExtraArgs,
  plain: optax.GradientTransformationExtraArgs,
  when: When,
  *,
  axis_name: axes.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`sharp` in the steps that `when` chooses, `plain` in the others.

  With `accumulate_clean_grad` the gradient of `sharp` is about twice as long as that of `plain`.

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
    taken: bool | None = None,
    **extra: Any,
  ) -> tuple[PyTree, SAQState]:
    del extra
    _require_call(updates, params, grad_fn)
    square = axes.mean(optax.tree.norm(wide(updates), squared=True), axis_name)
    chosen, memory = when.choose(state.step, square, state.memory)
    bare = state._replace(aux=None, memory=None)
    updates, new = _either(
      chosen if taken is None else taken,
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
  quantizer). Norms are over all leaves, in float32 or better. Where g is 0, so is its term; v is 0
  where rho is, and where it is below 1e-6 of g2, which is rounding.

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
    taken: bool | None = None,
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
      # Without a perturbation v is what rounding left of g2 - g, which `reuse` would make long.
      length, whole = optax.tree.norm(wide(v)), optax.tree.norm(wide(g2))
      moved = (new.rho > 0) & ~(length <= _ROUNDED * whole)  # a NaN stays a NaN
      v = jax.tree.map(lambda x: jnp.where(moved, x, 0).astype(x.dtype), v)
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

    chosen = state.step % k == 0 if taken is None else taken
    return _either(chosen, full, reuse, (updates, axis_name))

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

  `sharp` is without `accumulate_clean_grad`, as there is no clean gradient to add.

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
  checks.require_decay('along_momentum', decay)

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
  taken: Array | bool,
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
  if isinstance(taken, bool):
    return alike(full()) if taken else alike(without())
  return jax.lax.cond(taken, lambda: alike(full()), lambda: alike(without()))


def _own(tree: PyTree, axis_name: axes.AxisName | None) -> PyTree:
  """What all devices share, as each one's own."""
  return tree if axis_name is None else axes.own(tree, axis_name)


def _require_call(updates: PyTree, params: PyTree | None, grad_fn: Any) -> None:
  """Raises ValueError for what `saq` would refuse in a full step, in any step."""
  checks.check_trees(updates, params)
  checks.require_grad_fn(grad_fn)

"""`saq` and `qat`: optax transformations that turn a gradient at quantized weights into a step.

With `z = quantize(params)`, `g` the gradient of the loss at `z`, `pullback` the vjp of `quantize`
at `params` and `p = pullback(g)`, the three cases are (arXiv 2111.12273):

    case   perturbation eps   second gradient g2 at      returned
    1      rho p/|p|          quantize(params) + eps     pullback(g2)
    2      rho p/|p|          quantize(params + eps)     the pullback at params + eps, of g2
    3      rho g/|g|          quantize(params) + eps     pullback(g2)

Nothing here knows of layers or bits: `quantize` is any differentiable function whose result has
the structure of its argument. With the identity all three cases are SAM (arXiv 2010.01412).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from saq_jax import _axes as axes
from saq_jax import _checks as checks
from saq_jax._paths import PyTree
from saq_jax.perturbation import Mask, draw_tensors, mask_tree, perturb, ratio, wide

Quantize = Callable[[PyTree], PyTree]


class SAQState(NamedTuple):
  """The state of `saq` and `qat`, whose fields are there to be plotted.

  Attributes:
    step: steps taken, int32.
    rho: the radius used in the last step.
    grad_norm: the norm that the last perturbation was divided by (over the perturbed leaves;
      |T g| if adaptive). For `qat` the norm of the gradient returned.
    sharp_grad_norm: the norm of the gradient returned.
    cosine: between the gradient returned and `pullback(g)`, the one that `qat` returns; 0 where
      either is zero. With sync_perturbation=False it, like grad_norm, is the mean of each
      device's own.
    second: whether the step took a second gradient, 0 or 1, float32; where several groups of
      examples decide for themselves (`saq_jax.strategies`), the part of them that did.
    aux: what `grad_fn` returned beside the second gradient if `has_aux`, else None. None before
      the first step.
    memory: what a strategy carries from step to step; None for `saq` and `qat` alone.
  """

  step: Array
  rho: Array
  grad_norm: Array
  sharp_grad_norm: Array
  cosine: Array
  second: Array
  aux: Any = None
  memory: Any = None


def saq(
  quantize: Quantize,
  rho: float | optax.Schedule = 0.05,
  *,
  case: int = 3,
  mask: Mask | None = None,
  adaptive: bool = False,
  eta: float = 0.01,
  tensors: float = 1.0,
  seed: int = 0,
  accumulate_clean_grad: bool = False,
  axis_name: axes.AxisName | None = None,
  sync_perturbation: bool = True,
  has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Sharpness-aware quantization as a link of an optax chain.

  It takes the clean gradient `g = grad L(quantize(params))` as its updates and returns the
  sharpness-aware gradient with respect to `params`; an optimizer follows it in the chain. Case 3:

      eps = rho g / |g|,   g2 = grad L(quantize(params) + eps),   returned: pullback(g2)

  (see the module for cases 1 and 2). `|.|` is one L2 norm over all perturbed leaves, taken in
  float32 or better. A zero gradient gives eps = 0; a NaN stays a NaN. Every step costs exactly
  one call of `grad_fn`, beside the clean gradient; `saq_jax.strategies` has what costs less.

  Args:
    quantize: params -> params, same structure, differentiable; e.g. a `WeightQuantizer`.
    rho: the radius of the perturbation, at least 0, or an optax schedule of the step count.
    case: 1, 2 or 3. The paper proposes 3 as SAQ.
    mask: which leaves are perturbed and counted in the norm: a function of the leaf's path
      ('model/stem/kernel'), such as `only(...)`, or a tree of bools like params. Default: all but
      the learnable scales of quantizers.
    adaptive: ASAM (arXiv 2102.11600): `eps = rho T^2 g / |T g|` with `T = |w| + eta`, w being
      what is perturbed: the quantized weights in cases 1 and 3, the latent ones in case 2. Here
      T is taken for every perturbed leaf, biases and norms too.
    eta: at least 0; used if adaptive.
    tensors: beta of ESAM's stochastic weight perturbation (arXiv 2110.03141): in each step a
      leaf is perturbed with this probability, above 0 and at most 1, its eps divided by it.
    seed: of that draw, with the step.
    accumulate_clean_grad: return pullback(g) + pullback(g2), as the authors' later code does.
    axis_name: a mapped axis (`jax.shard_map`) over which the batch is split, or a tuple of them.
      `updates` and what `grad_fn` returns are then each device's own, and the result is their
      mean. Not needed under plain `jax.jit`, where the gradient is global.
    sync_perturbation: with axis_name, whether eps comes from the mean gradient (one more
      collective) or from each device's own ("m-sharpness", as in the authors' code).
    has_aux: `grad_fn` returns (gradient, aux), as `jax.grad(..., has_aux=True)`; aux is left in
      the state. Take it out with `state._replace(aux=None)` where the state must keep its
      structure (`jax.lax.scan`, a step that is compiled once). With axis_name it is each
      device's own.

  Returns:
    A `GradientTransformationExtraArgs` with a `SAQState`, whose update needs `params` and
    `grad_fn`:  `tx.update(g, state, params, grad_fn=jax.grad(loss))`, where `loss` takes z.

  Raises:
    ValueError: at construction for a rho or eta below 0 or not finite, tensors outside (0, 1],
      another case, or sync_perturbation=False without axis_name; in init for a mask that fits no
      leaf; in update if params or grad_fn is missing, or
      the gradient has not the structure of params.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from saq_jax import LSQ, QuantRule, saq, weight_quantizer
    >>> quantize = weight_quantizer([QuantRule('w', LSQ(bits=4))])
    >>> params = quantize.init({'w': jnp.array([0.3, -0.7])})
    >>> loss = lambda z: jnp.sum((z['model']['w'] - 1.0) ** 2)
    >>> tx = optax.chain(saq(quantize, rho=0.05), optax.sgd(0.1))
    >>> state = tx.init(params)
    >>> g = jax.grad(loss)(quantize(params))
    >>> updates, state = tx.update(g, state, params, grad_fn=jax.grad(loss))
    >>> params = optax.apply_updates(params, updates)

  References:
    Sharpness-aware Quantization for Deep Neural Networks, arXiv 2111.12273.
    Sharpness-Aware Minimization, arXiv 2010.01412; ASAM, arXiv 2102.11600.
  """
  checks.require_static(
    quantize=quantize,
    case=case,
    adaptive=adaptive,
    accumulate_clean_grad=accumulate_clean_grad,
    sync_perturbation=sync_perturbation,
    has_aux=has_aux,
  )
  checks.require_fraction('saq', 'tensors', tensors)
  if case not in (1, 2, 3):
    raise ValueError(f'saq(case={case!r}): case must be 1, 2 or 3 (3 is SAQ).')
  if not callable(rho):
    checks.require_at_least_zero('rho', rho)
  checks.require_at_least_zero('eta', eta)
  if not sync_perturbation and axis_name is None:
    raise ValueError('saq(sync_perturbation=False) needs axis_name: the axis not to average over.')

  def update_fn(
    updates: PyTree,
    state: SAQState,
    params: PyTree | None = None,
    *,
    grad_fn: Callable[[PyTree], Any] | None = None,
    **extra: Any,
  ) -> tuple[PyTree, SAQState]:
    del extra
    checks.require_grad_fn(grad_fn)
    assert grad_fn is not None
    checks.check_trees(updates, params)
    own, params = axes.per_device(updates, params, axis_name)
    g = axes.shared(own, axis_name) if sync_perturbation else own
    radius = jnp.asarray(rho(state.step) if callable(rho) else rho, float)
    z, pullback = jax.vjp(quantize, params)
    (p,) = pullback(g)
    point, direction = params if case == 2 else z, g if case == 3 else p
    # An array, as optax.inject_hyperparams makes of it, is not known to be 1.
    all_of_them = not isinstance(tensors, Array) and tensors == 1
    factors = None if all_of_them else draw_tensors(_key(seed, state), params, tensors)
    perturbed, norm = perturb(
      point, direction, radius, mask_tree(mask, params), eta if adaptive else None, factors
    )
    if case == 2:
      perturbed, pullback = jax.vjp(quantize, perturbed)
    g2, aux = checks.split_second(grad_fn(perturbed), has_aux, params)
    (sharp,) = pullback(g2)
    if accumulate_clean_grad:
      sharp = jax.tree.map(jnp.add, sharp, p)
    state = state._replace(second=jnp.ones((), float), aux=aux)
    return _finish(state, sharp, p, radius, norm, axis_name, sync_perturbation)

  def init_fn(params: PyTree) -> SAQState:
    mask_tree(mask, params)  # so that what it refuses is said at once
    return _init(params)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def qat(
  quantize: Quantize, *, axis_name: axes.AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
  """Plain quantization-aware training in the chain slot of `saq`: returns `pullback(g)`.

  Args:
    quantize: as in `saq`.
    axis_name: as in `saq`: `updates` is each device's own, and the mean is returned.

  Returns:
    A transformation with a `SAQState` in which rho is 0. It calls no `grad_fn`, and accepts one,
    so that it can stand wherever `saq` stands.

  Raises:
    ValueError: in update if params is missing or the gradient has not its structure.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from saq_jax import LSQ, QuantRule, qat, weight_quantizer
    >>> quantize = weight_quantizer([QuantRule('w', LSQ(bits=4))])
    >>> params = quantize.init({'w': jnp.array([0.3, -0.7])})
    >>> tx = optax.chain(qat(quantize), optax.sgd(0.1))
    >>> g = jax.grad(lambda z: jnp.sum(z['model']['w'] ** 2))(quantize(params))
    >>> updates, state = tx.update(g, tx.init(params), params)
  """

  def update_fn(
    updates: PyTree, state: SAQState, params: PyTree | None = None, **extra: Any
  ) -> tuple[PyTree, SAQState]:
    del extra
    checks.check_trees(updates, params)
    g, params = axes.per_device(updates, params, axis_name)
    (p,) = jax.vjp(quantize, params)[1](g)
    p = axes.mean(p, axis_name)
    state = state._replace(second=jnp.zeros((), float), aux=None)
    return _finish(state, p, p, jnp.zeros(()), optax.tree.norm(wide(p)), None, True)

  return optax.GradientTransformationExtraArgs(_init, update_fn)


def _init(params: PyTree) -> SAQState:
  """The state before the first step."""
  del params
  # One buffer a field: a buffer in two fields could not be donated.
  return SAQState(jnp.zeros((), jnp.int32), *(jnp.zeros((), float) for _ in range(5)))


def _key(seed: int, state: SAQState) -> Array:
  """The key of a step's draws."""
  return jax.random.fold_in(jax.random.key(jnp.asarray(seed, jnp.uint32)), state.step)


def _finish(
  state: SAQState,
  sharp: PyTree,
  clean: PyTree,
  radius: Array,
  norm: Array,
  axis_name: axes.AxisName | None,
  same_clean: bool,
) -> tuple[PyTree, SAQState]:
  """The mean over devices, where there are several, and the new state.

  `same_clean`: `clean` is the same on all devices, so that the cosine is that of the means.
  """
  own, clean = wide(sharp), wide(clean)
  cosine = ratio(optax.tree.vdot(own, clean), optax.tree.norm(clean))
  if not same_clean:
    cosine = ratio(cosine, optax.tree.norm(own))
  sharp, norm, cosine = axes.mean((sharp, norm, cosine), axis_name)
  sharp_norm = optax.tree.norm(wide(sharp))
  if same_clean:
    cosine = ratio(cosine, sharp_norm)
  return sharp, state._replace(
    step=optax.safe_increment(state.step),
    rho=radius.astype(float),
    grad_norm=norm.astype(float),
    sharp_grad_norm=sharp_norm.astype(float),
    cosine=cosine.astype(float),
  )

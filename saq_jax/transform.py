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
from saq_jax._paths import PyTree, is_quant_scale, leaf_names, map_named

Mask = Callable[[str], bool] | PyTree
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
    aux: what `grad_fn` returned beside the second gradient if `has_aux`, else None. None before
      the first step.
  """

  step: Array
  rho: Array
  grad_norm: Array
  sharp_grad_norm: Array
  cosine: Array
  aux: Any = None


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


def saq(
  quantize: Quantize,
  rho: float | optax.Schedule = 0.05,
  *,
  case: int = 3,
  mask: Mask | None = None,
  adaptive: bool = False,
  eta: float = 0.01,
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
  one call of `grad_fn`, beside the clean gradient.

  Args:
    quantize: params -> params, same structure, differentiable; e.g. a `WeightQuantizer`.
    rho: the radius of the perturbation, at least 0, or an optax schedule of the step count.
    case: 1, 2 or 3. The paper proposes 3 as SAQ.
    mask: which leaves are perturbed and counted in the norm: a function of the leaf's path
      ('model/stem/kernel') or a tree of bools like params. Default: `perturbed_by_default`.
    adaptive: ASAM (arXiv 2102.11600): `eps = rho T^2 g / |T g|` with `T = |w| + eta`, w being
      what is perturbed: the quantized weights in cases 1 and 3, the latent ones in case 2. Here
      T is taken for every perturbed leaf, biases and norms too.
    eta: at least 0; used if adaptive.
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
    ValueError: at construction for a rho or eta below 0 or not finite, another case, or
      sync_perturbation=False without axis_name; in update if params or grad_fn is missing, or
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
    if grad_fn is None:
      raise ValueError(
        'saq needs grad_fn: call tx.update(g, state, params, grad_fn=jax.grad(loss)). Wrappers '
        'that drop extra arguments, as TrainState.apply_gradients does, cannot be used.'
      )
    checks.check_trees(updates, params)
    own, params = axes.per_device(updates, params, axis_name)
    g = axes.shared(own, axis_name) if sync_perturbation else own
    radius = jnp.asarray(rho(state.step) if callable(rho) else rho, float)
    z, pullback = jax.vjp(quantize, params)
    (p,) = pullback(g)
    point = params if case == 2 else z
    perturbed, norm = perturb(
      point, g if case == 3 else p, radius, mask_tree(mask, params), eta if adaptive else None
    )
    if case == 2:
      perturbed, pullback = jax.vjp(quantize, perturbed)
    g2, aux = checks.split_second(grad_fn(perturbed), has_aux, params)
    (sharp,) = pullback(g2)
    if accumulate_clean_grad:
      sharp = jax.tree.map(jnp.add, sharp, p)
    return _finish(state, sharp, p, radius, norm, aux, axis_name, sync_perturbation)

  return optax.GradientTransformationExtraArgs(_init, update_fn)


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
    return _finish(state, p, p, jnp.zeros(()), optax.tree.norm(_wide(p)), None, None, True)

  return optax.GradientTransformationExtraArgs(_init, update_fn)


def _init(params: PyTree) -> SAQState:
  """The state before the first step."""
  del params
  # One buffer a field: a buffer in two fields could not be donated.
  return SAQState(jnp.zeros((), jnp.int32), *(jnp.zeros((), float) for _ in range(4)))


def perturb(
  point: PyTree, direction: PyTree, radius: float | Array, mask: PyTree, eta: float | None = None
) -> tuple[PyTree, Array]:
  """Adds `eps = rho d/|d|` to the masked leaves of a point; 0 where d is 0.

  Args:
    point: a tree of floating arrays.
    direction: d, a tree like it.
    radius: rho.
    mask: one bool a leaf: which are moved, and counted in the norm.
    eta: of ASAM's scaling, `eps = rho T^2 d/|T d|` with `T = |point| + eta`; None for none.

  Returns:
    The moved point, and the norm that was divided by, in float32 or better.
  """

  def scaled(x: Array, d: Array) -> Array:
    return d if eta is None else (jnp.abs(x) + eta) * d

  point_wide, d = _wide(point), _wide(direction)
  steps = jax.tree.map(lambda m, x, d: scaled(x, d) if m else None, mask, point_wide, d)
  norm = optax.tree.norm(steps)
  ratio = _ratio(radius, norm)

  def add(m: bool, x: Array, wide: Array, d: Array) -> Array:
    return (wide + ratio * scaled(wide, scaled(wide, d))).astype(x.dtype) if m else x

  return jax.tree.map(add, mask, point, point_wide, d), norm


def _finish(
  state: SAQState,
  sharp: PyTree,
  clean: PyTree,
  radius: Array,
  norm: Array,
  aux: Any,
  axis_name: axes.AxisName | None,
  same_clean: bool,
) -> tuple[PyTree, SAQState]:
  """The mean over devices, where there are several, and the new state.

  `same_clean`: `clean` is the same on all devices, so that the cosine is that of the means.
  """
  wide, clean = _wide(sharp), _wide(clean)
  cosine = _ratio(optax.tree.vdot(wide, clean), optax.tree.norm(clean))
  if not same_clean:
    cosine = _ratio(cosine, optax.tree.norm(wide))
  sharp, norm, cosine = axes.mean((sharp, norm, cosine), axis_name)
  sharp_norm = optax.tree.norm(_wide(sharp))
  if same_clean:
    cosine = _ratio(cosine, sharp_norm)
  return sharp, SAQState(
    step=optax.safe_increment(state.step),
    rho=radius.astype(float),
    grad_norm=norm.astype(float),
    sharp_grad_norm=sharp_norm.astype(float),
    cosine=cosine.astype(float),
    aux=aux,
  )


def _ratio(a: float | Array, b: Array) -> Array:
  """`a / b`; 0 where b is zero."""
  return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def _wide(tree: PyTree) -> PyTree:
  """The tree in float32 or, where a leaf is wider, its own dtype."""
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)), tree)


def mask_tree(mask: Mask | None, params: PyTree) -> PyTree:
  """One bool a leaf of params.

  Args:
    mask: a function of the leaf's path, a tree of bools, or None for `perturbed_by_default`.
    params: the tree.

  Returns:
    A tree of bools like params.

  Raises:
    ValueError: if a tree of bools has another structure, or no leaf is chosen.
  """
  if mask is None:
    mask = perturbed_by_default
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

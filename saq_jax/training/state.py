"""What training carries from step to step, and how it begins."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import Array

from saq_jax._paths import PyTree, is_quant_scale
from saq_jax.layers import calibrate
from saq_jax.training.bounds import ConfigError
from saq_jax.training.network import Network


@flax.struct.dataclass
class TrainState:
  """The state of one training run; all of it is arrays, so that it is saved as it is.

  Attributes:
    step: steps taken, int32.
    seed: of the run, uint32: with the step it gives the key of the step's random numbers.
    params: {'model': tree, 'scales': {path: scale}}, the latent weights, float32.
    batch_stats: running statistics of the norms; empty where there are none.
    opt_state: of the optax chain, that of `saq` or `qat` first.
  """

  step: Array
  seed: Array
  params: PyTree
  batch_stats: PyTree
  opt_state: Any


def variables(params: PyTree, batch_stats: PyTree) -> dict[str, PyTree]:
  """What `model.apply` takes, of parameters that are quantized already.

  Args:
    params: {'model': tree, 'scales': {...}}, quantized.
    batch_stats: running statistics.

  Returns:
    {'params': tree, 'batch_stats': tree}.
  """
  return {'params': params['model'], 'batch_stats': batch_stats}


def new_state(
  network: Network, tx: optax.GradientTransformation, seed: int | Array, images: Array
) -> TrainState:
  """Begins from random weights.

  Args:
    network: the network to train.
    tx: the whole chain.
    seed: of the weights and of all later random numbers of the run.
    images: a batch as the model takes it, for its shape.

  Returns:
    The state at step 0.
  """
  seed = jnp.asarray(seed, jnp.uint32)
  fresh = network.model.init(jax.random.key(seed), jnp.zeros_like(images[:1]), train=False)
  params = network.quantize.init(fresh['params'])
  return _at_step_0(tx, seed, params, fresh.get('batch_stats', {}))


def state_from_weights(
  network: Network,
  tx: optax.GradientTransformation,
  seed: int | Array,
  images: Array,
  model_params: PyTree,
  batch_stats: PyTree,
  scales: dict[str, Array] | None = None,
  *,
  fresh: frozenset[str] = frozenset(),
) -> TrainState:
  """Begins from given weights, with the scales found from them and from one batch.

  Scales of weights come from the weights; those of activations from the batch, in one forward
  pass with the quantized weights. Scales that the given weights have already are kept, and those
  that the model has not are left out.

  Args:
    network: the network to train.
    tx: the whole chain.
    seed: as in `new_state`.
    images: one batch as the model takes it, to calibrate with.
    model_params: weights by path, of the same model, quantized or not.
    batch_stats: its running statistics.
    scales: its scales of weights, by path, where it has any.
    fresh: paths ('params/fc/kernel') that are not given and begin as in `new_state`: a new head.

  Returns:
    The state at step 0.

  Raises:
    ConfigError: if a weight is missing, unknown or of another shape; the message has the names.
  """
  begin = new_state(network, tx, seed, images)
  given = traverse_util.flatten_dict({'params': model_params, 'batch_stats': batch_stats}, sep='/')
  wanted = traverse_util.flatten_dict(variables(begin.params, begin.batch_stats), sep='/')
  _require_fitting(given, {p: x for p, x in wanted.items() if p not in fresh})
  given = {p: _at_least(x, wanted[p].dtype) for p, x in given.items() if p in wanted}
  merged = traverse_util.unflatten_dict(wanted | given, sep='/')
  stats = merged.get('batch_stats', {})
  params = network.quantize.init(merged['params'])
  found = params['scales']
  kept_scales = {p: _at_least(s, found[p].dtype) for p, s in (scales or {}).items() if p in found}
  _require_fitting(found | kept_scales, found)
  params['scales'] |= kept_scales
  seen = variables(network.quantize(params), stats)
  # Running statistics may not fit quantized weights; without any, dropout is better left out.
  calibrated = calibrate(network.model, seen, images, into=params['model'], train=bool(stats))
  kept = {path: x for path, x in given.items() if is_quant_scale(path)}
  model = traverse_util.flatten_dict({'params': calibrated}, sep='/') | kept
  params['model'] = traverse_util.unflatten_dict(model, sep='/')['params']
  return _at_step_0(tx, begin.seed, params, stats)


def _at_step_0(
  tx: optax.GradientTransformation, seed: Array, params: PyTree, batch_stats: PyTree
) -> TrainState:
  try:
    opt_state = tx.init(params)
  except ValueError as error:  # a mask that fits no leaf
    raise ConfigError(str(error)) from error
  return TrainState(jnp.zeros((), jnp.int32), seed, params, batch_stats, opt_state)


def _at_least(x: Array, dtype: jnp.dtype) -> Array:
  """An array of a dtype, or of its own where that is wider, as float64 is where JAX has it."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, dtype))


def _require_fitting(given: dict[str, Array], wanted: dict[str, Array]) -> None:
  """Raises ConfigError unless the given weights are those that the model has."""
  missing = [p for p in wanted if p not in given and not is_quant_scale(p)]
  extra = [p for p in given if p not in wanted and not is_quant_scale(p)]
  shapes = [
    f'{p} {given[p].shape} for {wanted[p].shape}'
    for p in given
    if p in wanted and given[p].shape != wanted[p].shape
  ]
  found = {'missing': missing, 'unknown': extra, 'of another shape': shapes}
  if any(found.values()):
    listed = '; '.join(f'{what}: {", ".join(names[:4])}' for what, names in found.items() if names)
    raise ConfigError(f'the weights do not fit the model. {listed}.')

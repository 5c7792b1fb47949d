"""How a run begins: from random weights, or from given ones with scales found by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from saq_jax._paths import named_leaves
from saq_jax.training.bounds import ConfigError
from saq_jax.training.build import build_optimizer, build_slot
from saq_jax.training.config import ModelConfig, QuantConfig, SAQConfig, StageConfig
from saq_jax.training.network import FLOATING, build_network
from saq_jax.training.state import new_state, state_from_weights

SMALL = ModelConfig(depth=8, width=4)
QUANTIZED = build_network(SMALL, QuantConfig(), num_classes=5)
FLOAT = build_network(SMALL, FLOATING, num_classes=5)
TX = optax.chain(
  build_slot(QUANTIZED, SAQConfig(), 1), build_optimizer(StageConfig(clip_norm=1.0), 1)[0]
)
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(6, 8, 8, 2)), jnp.float32)
FIRST = 'layer1_0/conv1/input/quant_scale'


@pytest.fixture(scope='module')
def weights():
  """Parameters and statistics of a float network, none of them as a fresh one has them."""
  start = jax.eval_shape(functools.partial(new_state, FLOAT, TX, 0), IMAGES)

  def draw(s):
    return jnp.asarray(RNG.normal(size=s.shape), jnp.float32)

  return jax.tree.map(draw, start.params['model']), jax.tree.map(draw, start.batch_stats)


def begin(model_params, batch_stats, network=QUANTIZED, images=IMAGES, seed=3):
  return state_from_weights(network, TX, seed, images, model_params, batch_stats)


@functools.cache
def jitted():
  return jax.jit(begin)


def changed(tree, path, value=None):
  """The tree with a leaf put in, or taken out."""
  flat = traverse_util.flatten_dict(tree, sep='/')
  flat.pop(path, None)
  flat |= {} if value is None else {path: value}
  return traverse_util.unflatten_dict(flat, sep='/')


def first_clip(path, kernel):
  """Of LIQ: 1 where weights are normalised, 0.8 of the largest weight of the last layer."""
  return 0.8 * np.abs(kernel).max() if path == 'fc/kernel' else 1.0


# Random weights.


def test_new_state():
  state = jax.jit(functools.partial(new_state, QUANTIZED, TX))(7, IMAGES)
  assert (int(state.step), state.step.dtype) == (0, jnp.int32)
  assert (int(state.seed), state.seed.dtype) == (7, jnp.uint32)
  model = named_leaves(state.params['model'])
  scales = state.params['scales']
  assert set(scales) == {path for path in model if path.endswith('kernel')}
  for path, scale in scales.items():
    np.testing.assert_allclose(scale, first_clip(path, model[path]), rtol=1e-6)
  for path, x in model.items():
    assert x.dtype == jnp.float32
    if path.endswith(('quant_scale', 'scale', 'bias')):
      np.testing.assert_array_equal(x, np.zeros(x.shape) if path.endswith('bias') else 1.0)
    else:
      assert np.std(x) > 0.01
  for path, x in named_leaves(state.batch_stats).items():
    np.testing.assert_array_equal(x, float(path.endswith('var')))
  assert int(state.opt_state[0].step) == 0
  for leaf in jax.tree.leaves(state.opt_state):
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_random_weights_are_a_function_of_the_seed_alone():
  make = jax.jit(functools.partial(new_state, QUANTIZED, TX))
  one, same, other = make(1, IMAGES), make(1, 5 - 2 * IMAGES), make(2, IMAGES)
  jax.tree.map(np.testing.assert_array_equal, one, same)
  stem, another = (s.params['model']['conv']['kernel'] for s in (one, other))
  assert np.mean(stem != another) > 0.9


def test_many_seeds_at_once():
  def last_kernel(seed):
    return new_state(FLOAT, TX, seed, IMAGES).params['model']['fc']['kernel']

  kernels = jax.jit(jax.vmap(last_kernel))(jnp.arange(2))
  np.testing.assert_array_equal(kernels[1], jax.jit(last_kernel)(1))
  assert np.mean(kernels[0] != kernels[1]) > 0.9


# Given weights.


def test_given_weights_are_kept_bit_for_bit(weights):
  state = jitted()(*weights)
  model = named_leaves(state.params['model'])
  for path, x in named_leaves(weights[0]).items():
    np.testing.assert_array_equal(model.pop(path), x)
  # What was not given: a clip for each of eight convolutions and the last layer.
  assert len(model) == 9
  assert all(path.endswith('/input/quant_scale') for path in model)
  jax.tree.map(np.testing.assert_array_equal, state.batch_stats, weights[1])
  assert (int(state.step), int(state.seed)) == (0, 3)
  momentum = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (3, 3, 4, 4)]
  assert len(momentum) == 2


def test_scales_of_given_weights(weights):
  scales = jitted()(*weights).params['scales']
  kernels = {path: x for path, x in named_leaves(weights[0]).items() if path.endswith('kernel')}
  assert scales.keys() == kernels.keys()
  for path, kernel in kernels.items():
    np.testing.assert_allclose(scales[path], first_clip(path, kernel), rtol=1e-6)


def scale_by_hand(params):
  """0.8 max of the first quantized input: stem at 8 bits, then a norm by the batch, a ReLU."""
  kernel = np.asarray(params['conv']['kernel'], np.float64)
  kernel = (kernel - kernel.mean()) / kernel.std(ddof=1)
  kernel = 2 * np.rint((np.clip(kernel, -1, 1) + 1) / 2 * 255) / 255 - 1
  x = np.pad(np.asarray(IMAGES, np.float64), [(0, 0), (1, 1), (1, 1), (0, 0)])
  windows = [x[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3)]
  x = np.sum(windows, axis=0)
  norm = params['layer1_0']['bn1']
  x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
  return 0.8 * np.max(x * norm['scale'] + norm['bias'])


def test_first_clip_of_an_activation_by_hand(weights):
  model = named_leaves(jitted()(*weights).params['model'])
  np.testing.assert_allclose(model[FIRST], scale_by_hand(weights[0]), rtol=1e-5)


def test_a_scale_that_was_given_is_kept(weights):
  last = 'fc/input/quant_scale'
  params = changed(weights[0], last, jnp.float32(7.25))
  model = named_leaves(jitted()(params, weights[1]).params['model'])
  assert model[last] == 7.25
  np.testing.assert_allclose(model[FIRST], scale_by_hand(weights[0]), rtol=1e-5)


def test_scales_of_weights_that_were_given_are_kept_and_seen_in_calibration(weights):
  kept = {'layer2_0/conv1/kernel': jnp.float32(1.25), 'of/another/model': jnp.float32(9.0)}
  state = jax.jit(lambda *given: state_from_weights(QUANTIZED, TX, 3, IMAGES, *given, scales=kept))(
    *weights
  )
  found = jitted()(*weights).params
  assert float(state.params['scales']['layer2_0/conv1/kernel']) == 1.25
  others = found['scales'].keys() - kept.keys()
  assert all(state.params['scales'][path] == found['scales'][path] for path in others)
  assert state.params['scales'].keys() == found['scales'].keys()
  behind = 'layer2_0/conv2/input/quant_scale'
  assert named_leaves(state.params['model'])[behind] != named_leaves(found['model'])[behind]
  wrong = {'fc/kernel': jnp.ones(3)}
  with pytest.raises(ConfigError, match=r'another shape: fc/kernel \(3,\) for \(\)'):
    jax.eval_shape(
      lambda *given: state_from_weights(QUANTIZED, TX, 3, IMAGES, *given, scales=wrong), *weights
    )


def test_scales_that_the_model_has_not_are_left_out(weights):
  params = changed(weights[0], FIRST, jnp.float32(7.25))
  state = jax.jit(functools.partial(begin, network=FLOAT))(params, weights[1])
  assert named_leaves(state.params['model']).keys() == named_leaves(weights[0]).keys()
  assert state.params['scales'] == {}


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('layer2_0/conv1/kernel', None, 'missing: params/layer2_0/conv1/kernel'),
    ('layer9_0/conv1/kernel', np.ones(3), 'unknown: params/layer9_0/conv1/kernel'),
    ('fc/bias', np.ones(6), r'another shape: params/fc/bias \(6,\) for \(5,\)'),
    (FIRST, np.ones(2), rf'another shape: params/{FIRST} \(2,\) for \(\)'),
  ],
  ids=['missing', 'unknown', 'shape', 'scale'],
)
def test_weights_that_do_not_fit(weights, path, value, message):
  params = changed(weights[0], path, value)
  with pytest.raises(ConfigError, match=message):
    jax.eval_shape(begin, params, weights[1])


def test_statistics_that_do_not_fit(weights):
  with pytest.raises(ConfigError, match='missing: batch_stats/bn/mean'):
    jax.eval_shape(begin, weights[0], changed(weights[1], 'bn/mean'))


def test_all_that_does_not_fit_is_named(weights):
  params = changed(changed(weights[0], 'bn/scale'), 'norm/scale', np.ones(16))
  with pytest.raises(ConfigError, match='missing: params/bn/scale; unknown: params/norm/scale'):
    jax.eval_shape(begin, params, weights[1])


def test_the_same_twice_and_with_memory_of_another_call(weights):
  one = jitted()(*weights)
  jitted()(jax.tree.map(jnp.ones_like, weights[0]), weights[1])
  jax.tree.map(np.testing.assert_array_equal, one, jitted()(*weights))

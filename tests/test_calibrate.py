"""`calibrate` against activation scales found by hand, layer by layer, in NumPy."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saq_jax import LIQ, LSQ, DoReFa
from saq_jax._paths import named_leaves
from saq_jax.layers import BatchNorm, Conv, Dense, Einsum, calibrate

RNG = np.random.default_rng(1)
X = RNG.normal(size=(16, 5)).astype(np.float32)


class Net(nn.Module):
  """Plain, then at 3 bits by LSQ, then at 2 bits by LIQ."""

  dense: Any = Dense

  @nn.compact
  def __call__(self, x, *, train=True):
    x = Dense(6, name='first')(x)
    x = nn.relu(BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x))
    x = self.dense(6, input_quantizer=LSQ(bits=3, signed=False), name='second')(x)
    return self.dense(3, input_quantizer=LIQ(bits=2, signed=False), name='third')(nn.relu(x))


@pytest.fixture(scope='module')
def variables():
  """Random numbers everywhere; the scales and the running statistics fit nothing."""
  shapes = jax.eval_shape(Net().init, jax.random.key(0), X)
  return jax.tree.map(lambda s: 3 + RNG.normal(size=s.shape).astype(np.float32), shapes)


def scales_by_hand(variables, quantized=True, train=True):
  """2 mean|x| / sqrt(Q_p) of the second layer's input, 0.8 max|x| of the third's."""
  p, stats = variables['params'], variables['batch_stats']['norm']
  x = X @ np.float64(p['first']['kernel']) + p['first']['bias']
  mean, var = (x.mean(0), x.var(0)) if train else (stats['mean'], stats['var'])
  x = (x - mean) / np.sqrt(var + 1e-5) * p['norm']['scale'] + p['norm']['bias']
  x = np.maximum(x, 0)
  second = 2 * x.mean() / 7**0.5
  if quantized:
    x = second * np.rint(np.clip(x / second, 0, 7))
  x = np.maximum(x @ p['second']['kernel'] + p['second']['bias'], 0)
  return {'second/input/quant_scale': second, 'third/input/quant_scale': 0.8 * x.max()}


def check(params, wanted_scales, other):
  """The scales are those wanted, and all else is bit for bit what it was."""
  got, was = named_leaves(params), named_leaves(other)
  assert got.keys() == was.keys()
  for path, x in got.items():
    if path in wanted_scales:
      np.testing.assert_allclose(x, wanted_scales[path], rtol=1e-5, err_msg=path)
      assert x.dtype == jnp.float32
    else:
      np.testing.assert_array_equal(x, was[path])


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
def test_each_scale_is_that_of_its_layers_input(variables, train, wrap):
  want = scales_by_hand(variables, train=train)
  unquantized = scales_by_hand(variables, quantized=False, train=train)
  # The second layer's rounding is seen by the third.
  third = 'third/input/quant_scale'
  assert abs(want[third] / unquantized[third] - 1) > 1e-3
  params = wrap(lambda v: calibrate(Net(), v, X, train=train))(variables)
  check(params, want, variables['params'])


def test_the_variables_stay_as_they_are(variables):
  before = jax.tree.map(np.copy, variables)
  calibrate(Net(), variables, X, train=True)
  assert jax.tree.structure(variables) == jax.tree.structure(before)
  jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_into_other_parameters(variables):
  latent = jax.tree.map(lambda x: x + 1, variables['params'])
  params = calibrate(Net(), variables, X, into=latent, train=True)
  check(params, scales_by_hand(variables), latent)


def test_a_rematerialised_module(variables):
  params = calibrate(Net(nn.remat(Dense)), variables, X, train=True)
  check(params, scales_by_hand(variables), variables['params'])


def test_calibrating_twice_changes_nothing_more(variables):
  params = calibrate(Net(), variables, X, train=True)
  again = calibrate(Net(), variables | {'params': params}, X, train=True)
  check(again, scales_by_hand(variables), variables['params'])


def test_a_quantizer_without_a_scale_has_nothing_to_find():
  layer = Dense(2, input_quantizer=DoReFa(bits=2, signed=False))
  variables = layer.init(jax.random.key(0), X)
  check(calibrate(layer, variables, X), {}, variables['params'])
  assert set(variables['params']) == {'kernel', 'bias'}


def test_both_operands_of_an_einsum():
  layer = Einsum('bi,ci->bc', LSQ(bits=3), LIQ(bits=4))
  y = 2 * X[::2]
  stale = {'quant_scale': np.float32(9)}
  params = calibrate(layer, {'params': {'lhs': stale, 'rhs': stale}}, X, y)
  np.testing.assert_allclose(params['lhs']['quant_scale'], 2 * np.abs(X).mean() / 3**0.5, rtol=1e-6)
  np.testing.assert_allclose(params['rhs']['quant_scale'], 0.8 * np.abs(y).max(), rtol=1e-6)


def test_one_scale_a_channel():
  layer = Conv(2, (1, 1), input_quantizer=LIQ(bits=4, axis=-1))
  x = RNG.normal(size=(2, 3, 3, 4)).astype(np.float32) * np.arange(1, 5, dtype=np.float32)
  params = calibrate(layer, layer.init(jax.random.key(0), jnp.zeros_like(x)), x)
  want = 0.8 * np.abs(x).max((0, 1, 2), keepdims=True)
  np.testing.assert_allclose(params['input']['quant_scale'], want, rtol=1e-6)


def test_bfloat16_activations_give_float32_scales():
  layer = Dense(2, dtype=jnp.bfloat16, input_quantizer=LIQ(bits=4))
  x = jnp.asarray(X, jnp.bfloat16)
  params = calibrate(layer, layer.init(jax.random.key(0), x), 2 * x)
  scale = params['input']['quant_scale']
  assert scale.dtype == jnp.float32
  np.testing.assert_allclose(scale, 1.6 * np.abs(x.astype(jnp.float32)).max(), rtol=1e-6)


def test_an_apply_that_may_change_everything_computes_with_the_scales_it_has(variables):
  plain, _ = Net().apply(variables, X, mutable=['batch_stats'])
  free, _ = Net().apply(variables, X, mutable=True)
  np.testing.assert_array_equal(plain, free)

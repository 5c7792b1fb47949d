"""Weight quantization of Linen, NNX and dataclass trees: rules, scales, pullback, misuse."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from saq_jax import LIQ, LSQ, PACT, DoReFa, QuantRule, weight_quantizer


class Net(nn.Module):
  """Two layers and a head."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), name='stem')(x))
    x = nn.BatchNorm(use_running_average=True, name='norm')(x)
    x = nn.relu(nn.Dense(5, name='body')(x.mean((1, 2))))
    return nn.Dense(3, name='head')(x)


@pytest.fixture(scope='module')
def net():
  return Net().init(jax.random.key(0), jnp.ones((1, 6, 6, 2)))['params']


def lsq(x, s, high, ct):
  """LSQ with signed codes, per tensor, again in NumPy: value, gradients of x and s."""
  x, s, ct = (np.asarray(t, np.float64) for t in (x, s, ct))
  v, low = x / s, -high - 1
  inside = (v > low) & (v < high)
  slope = np.where(inside, np.rint(v) - v, np.clip(v, low, high))
  d_s = (ct * slope).sum() / np.sqrt(x.size * high)
  return s * np.rint(np.clip(v, low, high)), np.where(inside, ct, 0), d_s


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def like(tree, seed=1):
  """Random numbers of a tree's shapes and dtypes."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda t: jnp.asarray(rng.standard_normal(t.shape), t.dtype), tree)


MIXED = weight_quantizer(
  [
    QuantRule(r'(stem|head)/kernel', LSQ(bits=8)),
    QuantRule(r'.*/kernel', LSQ(bits=3)),
  ]
)


# Linen.


def test_a_linen_tree_is_quantized_by_the_first_rule_that_matches(net):
  assert MIXED.assign(net) == {
    'body/kernel': LSQ(bits=3),
    'head/kernel': LSQ(bits=8),
    'stem/kernel': LSQ(bits=8),
  }
  params = MIXED.init(net)
  assert params['model'] is net
  assert set(params['scales']) == {'stem/kernel', 'body/kernel', 'head/kernel'}
  z = MIXED(params)
  for layer, high in (('stem', 127), ('body', 3), ('head', 127)):
    scale = params['scales'][f'{layer}/kernel']
    close(scale, 2 * np.abs(net[layer]['kernel']).mean() / np.sqrt(high))
    close(z['model'][layer]['kernel'], lsq(net[layer]['kernel'], scale, high, 1)[0])
    assert z['model'][layer]['bias'] is net[layer]['bias']
  assert z['model']['norm'] == net['norm']
  assert z['scales'] == params['scales']


def test_the_pullback_is_straight_through_to_weights_and_scales(net):
  params = MIXED.init(net)
  for layer, high in (('stem', 127), ('body', 3), ('head', 127)):  # clips a part of each
    params['scales'][f'{layer}/kernel'] = jnp.abs(net[layer]['kernel']).max() / (1.5 * high)
  z, pullback = jax.vjp(MIXED, params)
  ct = like(z)
  (grads,) = pullback(ct)
  assert jax.tree.structure(grads) == jax.tree.structure(params)
  for layer, high in (('stem', 127), ('body', 3), ('head', 127)):
    name, c = f'{layer}/kernel', ct['model'][layer]['kernel']
    _, d_x, d_s = lsq(net[layer]['kernel'], params['scales'][name], high, c)
    close(grads['model'][layer]['kernel'], d_x)
    # The scales are handed on as they are, so what comes for them is added.
    close(grads['scales'][name], d_s + ct['scales'][name])
    close(grads['model'][layer]['bias'], ct['model'][layer]['bias'])
    assert 0 < (d_x == 0).sum() < d_x.size
  close(grads['model']['norm']['scale'], ct['model']['norm']['scale'])


def test_the_gradient_of_a_loss_reaches_latent_weights_through_the_model(net):
  params, images = MIXED.init(net), like(jnp.zeros((2, 6, 6, 2)))
  stats = {'norm': {'mean': jnp.zeros(4), 'var': jnp.ones(4)}}

  def loss(z):
    return (Net().apply({'params': z['model'], 'batch_stats': stats}, images) ** 2).sum()

  at_z = jax.grad(loss)(MIXED(params))
  through = jax.grad(lambda p: loss(MIXED(p)))(params)
  body, scale = net['body']['kernel'], params['scales']['body/kernel']
  _, d_x, d_s = lsq(body, scale, 3, at_z['model']['body']['kernel'])
  assert np.abs(d_x).max() > 0
  close(through['model']['body']['kernel'], d_x)
  close(through['scales']['body/kernel'], d_s)


# Other trees.


class NNXNet(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Linear(3, 4, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
    self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x)
    for block in self.blocks:
      x = block(x)
    return self.norm(x)


def test_an_nnx_state_has_the_same_paths_and_merges_after_quantization():
  graph, state, rest = nnx.split(NNXNet(nnx.Rngs(0)), nnx.Param, ...)
  quantize = weight_quantizer(
    [QuantRule(r'stem/kernel', LSQ(bits=8)), QuantRule(r'blocks/\d+/kernel', LSQ(bits=2))]
  )
  assert list(quantize.assign(state)) == ['blocks/0/kernel', 'blocks/1/kernel', 'stem/kernel']
  params, x = quantize.init(state), like(jnp.zeros((7, 3)))
  z = quantize(params)
  assert jax.tree.structure(z) == jax.tree.structure(params)
  kernels = [np.asarray(z['model']['blocks'][i]['kernel'][...]) for i in (0, 1)]
  for i, kernel in enumerate(kernels):
    want = lsq(state['blocks'][i]['kernel'][...], params['scales'][f'blocks/{i}/kernel'], 1, 1)[0]
    close(kernel, want)
  by_hand = np.asarray(x) @ z['model']['stem']['kernel'][...] @ kernels[0] @ kernels[1]
  close(nnx.merge(graph, z['model'], rest)(x), by_hand / np.sqrt(1 + 1e-5))

  def loss(p):
    return (nnx.merge(graph, quantize(p)['model'], rest)(x) ** 2).sum()

  grads = jax.jit(jax.grad(loss))(params)
  assert jax.tree.structure(grads) == jax.tree.structure(params)
  for name in params['scales']:
    assert grads['scales'][name] != 0
  assert np.any(grads['model']['blocks'][1]['kernel'][...] != 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
  weight: jax.Array
  bias: jax.Array | None
  size: int = dataclasses.field(metadata={'static': True}, default=3)


def test_a_dataclass_tree_is_named_by_its_attributes():
  model = {'layers': [Linear(like(jnp.zeros((4, 3))), jnp.ones(3)), Linear(jnp.eye(3), None)]}
  quantize = weight_quantizer([QuantRule(r'layers/0/weight', LSQ(bits=4))])
  params = quantize.init(model)
  z = quantize(params)['model']['layers']
  assert isinstance(z[0], Linear)
  close(z[0].weight, lsq(model['layers'][0].weight, params['scales']['layers/0/weight'], 7, 1)[0])
  assert z[1].weight is model['layers'][1].weight
  assert z[1].bias is None


# Scales.


def test_quantizers_that_learn_nothing_have_no_scale(net):
  quantize = weight_quantizer(
    [
      QuantRule(r'stem/kernel', DoReFa(bits=4)),
      QuantRule(r'head/kernel', LSQ(bits=None)),
      QuantRule(r'.*/kernel', PACT(bits=4)),
    ]
  )
  params = quantize.init(net)
  assert set(params['scales']) == {'body/kernel'}
  z = quantize(params)['model']
  assert z['head']['kernel'] is net['head']['kernel']
  t = np.tanh(np.asarray(net['stem']['kernel'], np.float64))
  close(z['stem']['kernel'], 2 * np.rint((t / np.abs(t).max() + 1) * 7.5) / 15 - 1)


@pytest.mark.parametrize(('axis', 'shape'), [(-1, (1, 1, 1, 4)), (2, (1, 1, 2, 1)), (None, ())])
def test_scales_per_channel_keep_the_rank(net, axis, shape):
  quantize = weight_quantizer([QuantRule(r'stem/kernel', LIQ(bits=4, axis=axis))])
  scale = quantize.init(net)['scales']['stem/kernel']
  assert scale.shape == shape
  others = None if axis is None else tuple(i for i in range(4) if i != axis % 4)
  close(scale.ravel(), 0.8 * np.abs(net['stem']['kernel']).max(others).ravel())


@pytest.mark.parametrize(('shape', 'fan_in'), [((16, 3), 16), ((3, 3, 4, 5), 36), ((6,), 1)])
def test_an_all_zero_leaf_gets_the_scale_of_its_fan_in(shape, fan_in):
  quantize = weight_quantizer([QuantRule('kernel', LSQ(bits=4))])
  params = quantize.init({'kernel': jnp.zeros(shape, jnp.bfloat16)})
  scale = params['scales']['kernel']
  assert scale.dtype == jnp.float32
  np.testing.assert_allclose(scale, 2 * fan_in**-0.5 / np.sqrt(7), rtol=5e-3)
  z, pullback = jax.vjp(quantize, params)
  assert z['model']['kernel'].dtype == jnp.bfloat16
  assert not np.any(z['model']['kernel'])
  (grads,) = pullback(jax.tree.map(jnp.ones_like, z))
  np.testing.assert_array_equal(grads['model']['kernel'], np.ones(shape))


# Transformations.


def test_shapes_are_enough_to_assign_and_everything_runs_under_jit(net):
  shapes = jax.eval_shape(lambda: net)
  assert MIXED.assign(shapes) == MIXED.assign(net)
  params = MIXED.init(net)
  assert jax.eval_shape(MIXED.init, net) == jax.eval_shape(lambda: params)
  assert jax.eval_shape(MIXED, params) == jax.eval_shape(lambda: params)
  jax.tree.map(close, jax.jit(MIXED.init)(net), params)
  jax.tree.map(close, jax.jit(MIXED)(params), MIXED(params))
  static = jax.jit(lambda quantize, p: quantize(p), static_argnums=0)
  jax.tree.map(close, static(MIXED, params), MIXED(params))
  assert hash(MIXED) == hash(weight_quantizer(list(MIXED.rules)))


# Misuse.


def test_a_rule_that_matches_nothing_names_the_nearest_paths(net):
  quantize = weight_quantizer([QuantRule(r'steam/kernel', LSQ(bits=4))])
  with pytest.raises(ValueError, match=r"'steam/kernel'\) matches no leaf.*are: 'stem/kernel'"):
    quantize.assign(net)
  for part in ('kernel', 'stem', 'stem/kern'):  # the whole path must match
    with pytest.raises(ValueError, match='matches no leaf'):
      weight_quantizer([QuantRule(part, LSQ(bits=4))]).init(net)
  with pytest.raises(ValueError, match='the tree is empty'):
    quantize.init({})


def test_a_rule_in_the_shadow_of_another_is_refused(net):
  quantize = weight_quantizer(
    [QuantRule(r'.*/kernel', LSQ(bits=4)), QuantRule(r'head/kernel', LSQ(bits=8))]
  )
  with pytest.raises(ValueError, match=r"'head/kernel'\) gets no leaf.*earlier rule"):
    quantize.init(net)


def test_leaves_that_are_not_floating_are_refused():
  tree = {'kernel': jnp.ones(3), 'steps': jnp.zeros(3, jnp.int32)}
  with pytest.raises(ValueError, match=r"'steps', which is int32"):
    weight_quantizer([QuantRule('.*', LSQ(bits=4))]).init(tree)
  assert set(weight_quantizer([QuantRule('k.*', LSQ(bits=4))]).init(tree)['scales']) == {'kernel'}


def test_malformed_rules_are_refused():
  with pytest.raises(ValueError, match='not a regular expression'):
    QuantRule(r'(stem', LSQ(bits=4))
  for other in (LSQ, 4, None):
    with pytest.raises(TypeError, match='must be a quantizer'):
      QuantRule('stem', other)
  with pytest.raises(ValueError, match='one or more QuantRule, not'):
    weight_quantizer([])


def test_params_that_init_did_not_make_are_refused(net):
  params = MIXED.init(net)
  for wrong in (net, {'model': net}, {**params, 'opt': 1}, (net, params['scales'])):
    with pytest.raises(ValueError, match=r"takes \{'model': \.\.\., 'scales': \.\.\.\}"):
      MIXED(wrong)
  del params['scales']['body/kernel']
  with pytest.raises(ValueError, match="no scale for 'body/kernel'"):
    MIXED(params)


def test_an_attribute_called_value_keeps_its_name():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass
  class Attention:
    query: jax.Array
    value: jax.Array

  tree = {'attention': Attention(jnp.ones(4), jnp.ones(4))}
  quantize = weight_quantizer([QuantRule(r'.*/value', LSQ(bits=4))])
  assert list(quantize.assign(tree)) == ['attention/value']


def test_two_leaves_of_one_name_are_refused():
  tree = {'a/b': jnp.array([100.0]), 'a': {'b': jnp.array([0.01])}}
  with pytest.raises(ValueError, match="two leaves of the tree are called 'a/b'"):
    weight_quantizer([QuantRule('a/b', LSQ(bits=4))]).init(tree)


def test_init_twice_and_what_is_no_rule_are_refused():
  quantize = weight_quantizer([QuantRule('.*w', LSQ(bits=4))])
  with pytest.raises(ValueError, match='have their scales already'):
    quantize.init(quantize.init({'w': jnp.ones(3)}))
  with pytest.raises(ValueError, match='one or more QuantRule, not'):
    weight_quantizer([('w', LSQ(bits=4))])
  rule = QuantRule('w', LSQ(bits=4))
  assert weight_quantizer(rule) == weight_quantizer([rule])

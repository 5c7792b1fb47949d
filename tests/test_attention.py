"""Attention's products against NumPy's, on both paths, and what is dropped in training."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_transformers import InNumpy

from saq_jax import LSQ
from saq_jax.attention import (
  DotProductAttention,
  Mlp,
  SelfAttention,
  StochasticDepth,
  layer_norm,
  with_sign,
)

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
ACT, PROBS = LSQ(bits=4), LSQ(bits=5, signed=False)
SCALES = {
  'scores': {'lhs': {'quant_scale': 0.3}, 'rhs': {'quant_scale': 0.2}},
  'mix': {'lhs': {'quant_scale': 0.02}, 'rhs': {'quant_scale': 0.4}},
}


def draw(*shape, dtype=np.float64):
  return jnp.asarray(RNG.normal(size=shape), dtype)


def lsq(x, scale, low, high):
  return scale * np.rint(np.clip(x / scale, low, high))


def attend(q, k, v, bias, quantized):
  """[N, heads, d] each, one head after the other, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  if quantized:
    q, k, v = (lsq(x, s, -8, 7) for x, s in ((q, 0.3), (k, 0.2), (v, 0.4)))
  out = np.empty_like(q)
  for h in range(q.shape[1]):
    a = np.exp(q[:, h] @ k[:, h].T / np.sqrt(q.shape[2]) + bias[h])
    a = a / a.sum(1, keepdims=True)
    out[:, h] = (lsq(a, 0.02, 0, 31) if quantized else a) @ v[:, h]
  return out


def without_fusion(method, args, kwargs, context):
  """The interceptor with which the cost of the products is found."""
  if isinstance(context.module, DotProductAttention):
    return context.module.unfused(*args, **kwargs)
  return method(*args, **kwargs)


@pytest.mark.parametrize('quantized', [False, True], ids=['float', 'quantized'])
@pytest.mark.parametrize(
  ('batch', 'bias_shape'),
  [((), None), ((3,), None), ((3,), (2,)), ((2, 3), None), ((2, 3), (2,)), ((2, 3), (3, 2))],
  ids=str,
)
def test_attention_is_that_of_numpy(batch, bias_shape, quantized):
  with jax.enable_x64(True):
    q, k, v = (draw(*batch, 5, 2, 4) for _ in range(3))
    bias = None if bias_shape is None else draw(*bias_shape, 5, 5)
    layer = DotProductAttention(ACT, PROBS) if quantized else DotProductAttention()
    variables = {'params': SCALES} if quantized else {}
    got = layer.apply(variables, q, k, v, bias, train=True)
    with nn.intercept_methods(without_fusion):
      unfused = layer.apply(variables, q, k, v, bias, train=True)
    whole = np.broadcast_to(0.0 if bias is None else bias, (*batch, 2, 5, 5))
    for i in np.ndindex(*batch):
      want = attend(q[i], k[i], v[i], whole[i], quantized)
      np.testing.assert_allclose(unfused[i], want, rtol=1e-10, atol=1e-12)
      # The fused product's softmax is in float32 always.
      np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)
    assert got.shape == q.shape


def test_both_paths_have_the_same_gradients():
  q, k, v, ct = (draw(2, 5, 2, 4, dtype=np.float32) for _ in range(4))
  bias = draw(2, 5, 5, dtype=np.float32)

  def loss(*operands):
    return jnp.sum(DotProductAttention().apply({}, *operands, train=True) * ct)

  grads = functools.partial(jax.grad(loss, (0, 1, 2, 3)), q, k, v, bias)
  fused = grads()
  with nn.intercept_methods(without_fusion):
    unfused = grads()
  for got, want in zip(fused, unfused, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ('layer', 'train', 'fused'),
  [
    (DotProductAttention(), True, True),
    (DotProductAttention(LSQ(bits=None), LSQ(bits=None, signed=False)), True, True),
    (DotProductAttention(dropout=0.5), False, True),
    (DotProductAttention(dropout=0.5), True, False),
    (DotProductAttention(ACT), False, False),
    (DotProductAttention(None, PROBS), False, False),
  ],
)
def test_when_the_fused_product_is_used(monkeypatch, layer, train, fused):
  seen = []

  def spy(q, k, v, bias, *, implementation):
    del k, v, bias
    seen.append(implementation)
    return q

  monkeypatch.setattr(jax.nn, 'dot_product_attention', spy)
  layer = layer.clone(implementation='cudnn')
  q = jnp.ones((1, 3, 2, 4))
  variables = layer.init({'params': KEY, 'dropout': KEY}, q, q, q, train=train)
  # Parameters are made by a fused product that any machine has.
  assert seen == ([None] if fused else [])
  layer.apply(variables, q, q, q, train=train, rngs={'dropout': KEY})
  assert seen[1:] == (['cudnn'] if fused else [])


@pytest.mark.parametrize(('implementation', 'dtype'), [('cudnn', 'bfloat16'), (None, 'float32')])
def test_the_bias_of_the_fused_product(monkeypatch, implementation, dtype):
  def spy(q, k, v, bias, *, implementation):
    del k, v, implementation
    # One batch axis; cuDNN adds what has the dtype of its operands.
    assert (q.shape, bias.shape, bias.dtype) == ((6, 4, 2, 8), (6, 2, 4, 4), dtype)
    return q

  monkeypatch.setattr(jax.nn, 'dot_product_attention', spy)
  q, bias = jnp.ones((2, 3, 4, 2, 8), jnp.bfloat16), jnp.zeros((3, 2, 4, 4))
  layer = DotProductAttention(implementation=implementation)
  assert layer.apply({}, q, q, q, bias, train=True).shape == q.shape


def one_hot_values(dtype=np.float32):
  """Queries, keys, and values with which attention gives its probabilities."""
  q, k = (draw(1, 16, 1, 4, dtype=dtype) for _ in range(2))
  logits = np.einsum('qd,kd->qk', *(np.asarray(x[0, :, 0], np.float64) for x in (q, k))) / 2
  a = np.exp(logits)
  return q, k, jnp.eye(16, dtype=dtype)[None, :, None], a / a.sum(1, keepdims=True)


def test_dropout_of_probabilities_comes_before_their_rounding():
  q, k, v, a = one_hot_values()
  layer = DotProductAttention(None, PROBS, dropout=0.25)
  variables = {'params': {'mix': {'lhs': {'quant_scale': jnp.float32(0.02)}}}}
  y = layer.apply(variables, q, k, v, train=True, rngs={'dropout': KEY})[0, :, 0]
  want = lsq(a / 0.75, 0.02, 0, 31)
  dropped = (np.asarray(y) == 0) & (want > 0)
  np.testing.assert_allclose(y, np.where(dropped, 0, want), rtol=1e-5)
  assert 0.1 < dropped.sum() / (want > 0).sum() < 0.4


def test_dropout_of_probabilities_keeps_the_mean():
  q, k, v, a = one_hot_values()
  layer = DotProductAttention(dropout=0.25)

  def run(key):
    return layer.apply({}, q, k, v, train=True, rngs={'dropout': key})[0, :, 0]

  many = jax.jit(jax.vmap(run))(jax.random.split(KEY, 4000))
  # The deviation of a mean of n is a sqrt(p / (1 - p) / n).
  assert np.max(np.abs(np.mean(many, 0) - a) / (a * np.sqrt(1 / 3 / 4000))) < 5
  np.testing.assert_array_equal(run(KEY), run(KEY))


def test_bfloat16_probabilities_are_rounded_once():
  q, k, v, _ = one_hot_values(jnp.bfloat16)
  wide = [np.asarray(x[0, :, 0].astype(jnp.float32), np.float64) for x in (q, k)]
  a = np.exp(wide[0] @ wide[1].T / 2)
  a = a / a.sum(1, keepdims=True)
  params = {'mix': {'lhs': {'quant_scale': jnp.float32(0.003)}}}
  layer = DotProductAttention(None, LSQ(bits=8, signed=False))
  y = layer.apply({'params': params}, q, k, v, train=False)
  assert y.dtype == jnp.bfloat16
  want = jnp.asarray(lsq(a, 0.003, 0, 255), jnp.bfloat16)
  np.testing.assert_array_equal(y[0, :, 0], want)


def test_self_attention_in_numpy_with_a_bias():
  with jax.enable_x64(True):
    layer, x, bias = SelfAttention(2, ACT), draw(3, 5, 6), draw(2, 5, 5)
    variables = layer.init(KEY, x, train=False)
    params = jax.tree.map(lambda s: s * 1.1, variables['params'])
    got = layer.apply({'params': params}, x, bias, train=False)
    # The reference names a module; this one is the whole tree.
    want = InNumpy({'attn': params}, 4).attention(np.asarray(x), 'attn', 2, np.asarray(bias))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert np.std(want) > 1e-5


def test_self_attention_has_one_scale_for_the_input_of_three_layers():
  params = SelfAttention(2, ACT).init(KEY, jnp.ones((1, 5, 6)), train=False)['params']
  assert set(params) == {'input', 'q', 'k', 'v', 'product', 'proj'}
  assert {name for name in 'qkv' if 'input' in params[name]} == set()
  assert set(params['proj']) == {'kernel', 'bias', 'input'}


def test_heads_that_do_not_divide_the_channels():
  with pytest.raises(ValueError, match='heads=4: must divide the 6 channels'):
    SelfAttention(4).init(KEY, jnp.ones((1, 5, 6)), train=False)


@pytest.mark.parametrize('layer', [SelfAttention(2, dropout=0.5), Mlp(8, dropout=0.5)], ids=type)
def test_dropout_of_layers(layer):
  x = draw(2, 40, 4, dtype=np.float32)
  params = jax.tree.map(lambda s: s * 50, layer.init(KEY, x, train=False))
  run = functools.partial(layer.apply, params, x, train=True)
  y = run(rngs={'dropout': KEY})
  np.testing.assert_array_equal(y, run(rngs={'dropout': KEY}))
  assert np.any(y != run(rngs={'dropout': jax.random.key(1)}))
  assert 0.3 < np.mean(y == 0) < 0.7
  assert not np.any(layer.apply(params, x, train=False) == 0)


def test_signs():
  assert with_sign(None, True) is None
  assert with_sign(LSQ(bits=3, signed=False, grad_scale=1.0), True) == LSQ(bits=3, grad_scale=1.0)


def test_layer_norm_of_numbers_far_from_zero():
  x = 1000 + draw(4, 64, dtype=np.float32)
  wide = np.asarray(x, np.float64)
  want = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
  norm = layer_norm(1e-6, None, name='norm')
  got = norm.apply(norm.init(KEY, x), x)
  # What is left is the rounding of the mean, 3e-5; the mean of squares is known to 0.06 only.
  np.testing.assert_allclose(got, want, atol=2e-4)


# Stochastic depth.

X = RNG.normal(size=(6, 3, 2)).astype(np.float32)


def test_stochastic_depth_drops_whole_examples_and_scales_the_others():
  layer = StochasticDepth(0.25)

  def run(key):
    return layer.apply({}, X, train=True, rngs={'dropout': key})

  many = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, 4000)))
  kept = many[..., 0, 0] != 0
  np.testing.assert_allclose(many, np.where(kept[..., None, None], X / 0.75, 0), rtol=1e-6)
  # Each example by itself, three times out of four: within five deviations.
  assert np.max(np.abs(kept.mean(0) - 0.75)) < 5 * np.sqrt(0.25 * 0.75 / 4000)
  assert abs(np.corrcoef(kept.T)[0, 1]) < 5 / np.sqrt(4000)
  np.testing.assert_array_equal(run(KEY), run(KEY))


@pytest.mark.parametrize(('rate', 'train'), [(0.0, True), (0.5, False)])
def test_stochastic_depth_that_drops_nothing_needs_no_key(rate, train):
  np.testing.assert_array_equal(StochasticDepth(rate).apply({}, X, train=train), X)


@pytest.mark.parametrize('rate', [-0.1, 1.0, 2.0])
def test_an_impossible_rate(rate):
  with pytest.raises(ValueError, match=f'rate={rate}'):
    StochasticDepth(rate).apply({}, X, train=False)

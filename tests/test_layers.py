"""The layers against NumPy's products of inputs that are quantized by formulas written out here."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saq_jax import LIQ, LSQ, DoReFa
from saq_jax._paths import named_leaves
from saq_jax.layers import ActQuant, BatchNorm, Conv, Dense, Einsum

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 7, 6, 2)).astype(np.float32)
KEY = jax.random.key(0)
UNSIGNED = LSQ(bits=3, signed=False)


def lsq(x, scale, low, high):
  return scale * np.rint(np.clip(np.asarray(x, np.float64) / scale, low, high))


def liq(x, clip, bits):
  n = 2**bits - 1
  return clip * np.rint(np.clip(np.asarray(x, np.float64) / clip, 0, 1) * n) / n


def convolve(x, kernel, stride, pad):
  """A convolution [B, H, W, C], [h, w, C, K] as a sum over the kernel's entries."""
  x = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
  h, w = kernel.shape[:2]
  rows, columns = ((x.shape[a] - n) // stride + 1 for a, n in ((1, h), (2, w)))
  out = 0.0
  for i in range(h):
    for j in range(w):
      window = x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
      out = out + window @ kernel[i, j]
  return out


def close(got, want, rtol=2e-6):
  np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.max(np.abs(want)))


# Products.


def test_conv_is_the_convolution_of_the_quantized_input():
  layer = Conv(5, (3, 3), strides=2, padding=1, input_quantizer=UNSIGNED)
  variables = layer.init(KEY, X)
  kernel, bias = (np.asarray(variables['params'][name]) for name in ('kernel', 'bias'))
  bias = bias + np.arange(5)
  scale = 0.3
  params = {'kernel': kernel, 'bias': bias, 'input': {'quant_scale': jnp.float32(scale)}}
  want = convolve(lsq(X, scale, 0, 7), kernel, 2, 1) + bias
  close(layer.apply({'params': params}, X), want)


def test_dense_is_the_product_of_the_quantized_input():
  layer = Dense(4, input_quantizer=LIQ(bits=2, signed=False))
  params = layer.init(KEY, X)['params'] | {'input': {'quant_scale': jnp.float32(0.9)}}
  want = liq(X, 0.9, 2) @ np.asarray(params['kernel'])
  close(layer.apply({'params': params}, X), want)


def test_a_dense_layer_whose_input_is_quantized_leaves_it_as_it_is():
  layer = Dense(4, input_quantizer=LIQ(bits=2, signed=False), input_is_quantized=True)
  variables, wanted = layer.init(KEY, X), nn.Dense(4).init(KEY, X)
  jax.tree.map(np.testing.assert_array_equal, variables, wanted)
  program = jax.make_jaxpr(layer.apply)(variables, X)
  assert str(program) == str(jax.make_jaxpr(nn.Dense(4).apply)(wanted, X))


def test_a_quantizer_without_a_scale():
  layer = Dense(4, use_bias=False, input_quantizer=DoReFa(bits=2, signed=False))
  variables = layer.init(KEY, X)
  close(layer.apply(variables, X), liq(X, 1.0, 2) @ np.asarray(variables['params']['kernel']))


def test_einsum_quantizes_each_operand_by_its_own_quantizer():
  q, k = X[:, 0], X[:, 1]
  layer = Einsum('bic,bjc->bij', LSQ(bits=4), UNSIGNED)
  params = {'lhs': {'quant_scale': jnp.float32(0.2)}, 'rhs': {'quant_scale': jnp.float32(0.5)}}
  want = lsq(q, 0.2, -8, 7) @ lsq(k, 0.5, 0, 7).transpose(0, 2, 1)
  close(layer.apply({'params': params}, q, k), want)


@pytest.mark.parametrize('side', ['lhs', 'rhs'])
def test_einsum_with_one_quantizer(side):
  layer = Einsum('bic,bjc->bij', **{f'{side}_quantizer': UNSIGNED})
  params = {side: {'quant_scale': jnp.float32(0.4)}}
  q, k = (lsq(x, 0.4, 0, 7) if name == side else x for name, x in (('lhs', X[0]), ('rhs', X[1])))
  close(layer.apply({'params': params}, X[0], X[1]), q @ k.transpose(0, 2, 1))


def test_gradients_of_the_scale_the_weights_and_the_input():
  layer = Dense(4, use_bias=False, input_quantizer=LIQ(bits=2, signed=False))
  params = layer.init(KEY, X)['params'] | {'input': {'quant_scale': jnp.float32(0.9)}}
  ct, kernel = RNG.normal(size=(*X.shape[:-1], 4)), np.asarray(params['kernel'], np.float64)
  grads, d_x = jax.grad(
    lambda p, x: jnp.sum(layer.apply({'params': p}, x) * ct.astype(np.float32)), (0, 1)
  )(params, jnp.asarray(X))
  v, back = X / 0.9, ct @ kernel.T
  inside = (v >= 0) & (v <= 1)
  d_clip = np.rint(np.clip(v, 0, 1) * 3) / 3 - np.where(inside, v, 0)
  close(grads['input']['quant_scale'], np.sum(back * d_clip), 1e-5)
  close(grads['kernel'], np.einsum('bhwi,bhwo->io', liq(X, 0.9, 2), ct), 1e-5)
  close(d_x, np.where(inside, back, 0))


def test_what_multiplies_gets_the_quantized_input():
  seen = []

  def spy(multiply, x, *rest, **options):
    seen.append(x)
    return multiply(x, *rest, **options)

  conv_fn = functools.partial(spy, jax.lax.conv_general_dilated)
  dot_fn = functools.partial(spy, jax.lax.dot_general)
  conv = Conv(2, (1, 1), input_quantizer=UNSIGNED, conv_general_dilated=conv_fn)
  dense = Dense(2, input_quantizer=UNSIGNED, dot_general=dot_fn)
  params = {'bias': jnp.zeros(2), 'input': {'quant_scale': jnp.float32(0.3)}}
  conv.apply({'params': params | {'kernel': jnp.ones((1, 1, 2, 2))}}, X)
  dense.apply({'params': params | {'kernel': jnp.ones((2, 2))}}, X)
  assert len(seen) == 2
  for x in seen:
    close(x, lsq(X, 0.3, 0, 7))


# Parameters and cost.


@pytest.mark.parametrize('quantizer', [None, LSQ(bits=None), DoReFa(bits=None)], ids=str)
@pytest.mark.parametrize(
  ('ours', 'plain'),
  [(Conv, nn.Conv), (Dense, nn.Dense)],
  ids=['conv', 'dense'],
)
def test_without_a_bit_width_a_layer_is_the_plain_one(ours, plain, quantizer):
  sizes = {'kernel_size': (3, 3)} if plain is nn.Conv else {}
  layer, other = ours(4, **sizes, input_quantizer=quantizer), plain(4, **sizes)
  variables = layer.init(KEY, X)
  wanted = other.init(KEY, X)
  assert jax.tree.structure(variables) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, variables, wanted)
  program = jax.make_jaxpr(layer.apply)(variables, X)
  assert str(program) == str(jax.make_jaxpr(other.apply)(wanted, X))


def test_einsum_without_bit_widths_is_the_plain_one():
  layer = Einsum('bic,bjc->bij', LSQ(bits=None))
  plain = jax.make_jaxpr(lambda _, q, k: jnp.einsum('bic,bjc->bij', q, k))({}, X[0], X[1])
  assert layer.init(KEY, X[0], X[1]) == {}
  assert str(jax.make_jaxpr(layer.apply)({}, X[0], X[1])) == str(plain)


def test_paths_of_the_parameters():
  conv = Conv(2, (1, 1), input_quantizer=UNSIGNED).init(KEY, X)
  dense = Dense(2, use_bias=False, input_quantizer=UNSIGNED).init(KEY, X)
  einsum = Einsum('bic,bjc->bij', UNSIGNED, UNSIGNED).init(KEY, X[0], X[1])
  alone = ActQuant(UNSIGNED).init(KEY, X)
  assert set(named_leaves(conv)) == {f'params/{n}' for n in ('kernel', 'bias', 'input/quant_scale')}
  assert set(named_leaves(dense)) == {'params/kernel', 'params/input/quant_scale'}
  assert set(named_leaves(einsum)) == {'params/lhs/quant_scale', 'params/rhs/quant_scale'}
  assert set(named_leaves(alone)) == {'params/quant_scale'}


def test_init_finds_the_scale_from_its_batch():
  dense = Dense(2, input_quantizer=UNSIGNED)
  for x, want in ((X, 2 * np.mean(np.abs(X)) / 7**0.5), (np.zeros_like(X), 1.0)):
    close(dense.init(KEY, x)['params']['input']['quant_scale'], want)


def test_bfloat16_computes_with_float32_parameters():
  layer = Dense(4, dtype=jnp.bfloat16, input_quantizer=UNSIGNED)
  x = jnp.asarray(X, jnp.bfloat16)
  params = layer.init(KEY, x)['params']
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  params = params | {'input': {'quant_scale': jnp.float32(0.25)}}
  y = layer.apply({'params': params}, x)
  kernel = np.asarray(params['kernel'].astype(jnp.bfloat16), np.float64)
  assert y.dtype == jnp.bfloat16
  # Multiples of 1/4 up to 7/4 are exact in bfloat16: what is left is the rounding of the result.
  close(y.astype(jnp.float32), lsq(x.astype(jnp.float32), 0.25, 0, 7) @ kernel, 2**-8)


# Batch normalisation.

STATS = {'mean': np.float32([0.5, -1.0]), 'var': np.float32([2.0, 0.7])}
AFFINE = {'scale': np.float32([1.5, 0.5]), 'bias': np.float32([0.1, -0.2])}
MEAN, VAR = X.mean((0, 1, 2), np.float64), X.var((0, 1, 2), np.float64)


@pytest.mark.parametrize('momentum', [0.9, 0.6])
def test_batch_norm_in_training(momentum):
  norm = BatchNorm(use_running_average=False, momentum=momentum, epsilon=1e-5)
  variables = {'params': AFFINE, 'batch_stats': STATS}
  y, moved = norm.apply(variables, X, mutable=['batch_stats'])
  n = X.size // 2
  close(y, (X - MEAN) / np.sqrt(VAR + 1e-5) * AFFINE['scale'] + AFFINE['bias'])
  stats = moved['batch_stats']
  close(stats['mean'], momentum * STATS['mean'] + (1 - momentum) * MEAN)
  close(stats['var'], momentum * STATS['var'] + (1 - momentum) * VAR * n / (n - 1), 1e-6)


def test_batch_norm_in_evaluation_uses_the_running_statistics_and_leaves_them():
  variables = {'params': AFFINE, 'batch_stats': STATS}
  y, moved = BatchNorm().apply(variables, X, use_running_average=True, mutable=['batch_stats'])
  close(y, (X - STATS['mean']) / np.sqrt(STATS['var'] + 1e-5) * AFFINE['scale'] + AFFINE['bias'])
  jax.tree.map(np.testing.assert_array_equal, moved['batch_stats'], STATS)


@pytest.mark.parametrize('frozen', [False, True])
def test_batch_norm_begins_with_mean_0_and_variance_1(frozen):
  stats = BatchNorm(use_running_average=frozen).init(KEY, X)['batch_stats']
  np.testing.assert_array_equal(stats['mean'], np.zeros(2))
  np.testing.assert_array_equal(stats['var'], np.ones(2))


def test_batch_norm_of_a_single_value_a_channel_is_finite():
  norm = BatchNorm(use_running_average=False, momentum=0.9)
  _, moved = norm.apply({'params': AFFINE, 'batch_stats': STATS}, X[0, 0, :1], mutable=True)
  close(moved['batch_stats']['var'], 0.9 * STATS['var'])


def test_batch_norm_counts_what_a_mask_leaves():
  norm = BatchNorm(use_running_average=False, momentum=0.9)
  mask = np.arange(6)[None, None, :, None] < 4
  variables = {'params': AFFINE, 'batch_stats': STATS}
  _, moved = norm.apply(variables, X, mask=mask, mutable=['batch_stats'])
  want = 0.9 * STATS['var'] + 0.1 * X[:, :, :4].var((0, 1, 2), ddof=1)
  close(moved['batch_stats']['var'], want, 1e-6)

"""Depthwise convolutions: sums of shifted products on a CPU, XLA's own convolution elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saq_jax.layers import Conv

RNG = np.random.default_rng(0)


def both(size, channels, kernel, **fields):
  """Our layer, and XLA's convolution of the same, as functions of (images, kernel)."""
  ours = Conv(channels, kernel, feature_group_count=channels, use_bias=False, **fields)
  padding = fields.get('padding', 'SAME')
  pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding
  strides = (fields.get('strides', 1),) * 2

  def layer(x, k):
    return ours.apply({'params': {'kernel': k}}, x)

  def xla(x, k):
    layout = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      x, k, strides, pads, dimension_numbers=layout, feature_group_count=channels
    )

  x = jnp.asarray(RNG.normal(size=(2, *size, channels)))
  return layer, xla, x, jnp.asarray(RNG.normal(size=(*kernel, 1, channels)))


@pytest.mark.parametrize(
  ('size', 'kernel', 'fields'),
  [
    ((7, 6), (3, 3), {'padding': 1}),
    ((7, 6), (3, 3), {'padding': 1, 'strides': 2}),
    ((8, 8), (3, 3), {'padding': 'SAME', 'strides': 2}),
    ((7, 9), (3, 3), {'padding': 'SAME', 'strides': 2}),
    ((7, 7), (5, 3), {'padding': 'VALID'}),
    ((6, 6), (2, 2), {'padding': 'SAME', 'strides': 3}),
  ],
)
def test_values_and_gradients_are_those_of_xlas_convolution(size, kernel, fields):
  with jax.enable_x64(True):
    layer, xla, x, k = both(size, 4, kernel, **fields)
    want = xla(x, k)
    np.testing.assert_allclose(layer(x, k), want, rtol=1e-12, atol=1e-12)
    weight = jnp.asarray(RNG.normal(size=want.shape))
    for argument in (0, 1):
      ours, theirs = (
        jax.jit(jax.grad(lambda x, k, f=f: jnp.sum(weight * f(x, k)), argument))(x, k)
        for f in (layer, xla)
      )
      np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


def lowered(fn, platform, *args):
  return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_it_is_compiled_for_decides():
  layer, _, x, k = both((8, 8), 4, (3, 3), padding=1)
  assert 'stablehlo.convolution' not in lowered(layer, 'cpu', x, k)
  for platform in ('cuda', 'tpu'):
    assert 'stablehlo.convolution' in lowered(layer, platform, x, k)


@pytest.mark.parametrize(
  'fields',
  [
    {'feature_group_count': 1},
    {'feature_group_count': 2},
    {'feature_group_count': 4, 'features': 8},
    {'feature_group_count': 4, 'kernel_dilation': 2},
  ],
)
def test_other_convolutions_stay_xlas(fields):
  fields = {'features': 4, **fields}
  layer, x = Conv(kernel_size=(3, 3), **fields), jnp.ones((2, 8, 8, 4))
  variables = layer.init(jax.random.key(0), x)
  assert 'stablehlo.convolution' in lowered(layer.apply, 'cpu', variables, x)

"""PreResNet against its counts by hand and a forward pass written in jax.lax alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saq_jax import LIQ, LSQ
from saq_jax._paths import named_leaves
from saq_jax.models.preresnet import PreResNet

RNG = np.random.default_rng(0)
QUANTIZED = {'act': LIQ(bits=3, signed=False), 'last_act': LIQ(bits=5, signed=False)}


def shapes(model, size, channels=3):
  """Names and shapes of the variables, without computing."""
  x = jnp.zeros((2, size, size, channels))
  return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)


def random_variables(model, size, channels):
  """Random numbers for every parameter and running statistic, positive where they must be."""

  def draw(path, s):
    x = RNG.normal(size=s.shape)
    name = path.rsplit('/', 1)[-1]
    if name == 'kernel':
      x = x / np.sqrt(x[..., 0].size)
    return jnp.asarray({'var': 0.5 + x**2, 'quant_scale': 1.5}.get(name, x), float)

  found = shapes(model, size, channels)
  leaves = [draw(path, s) for path, s in named_leaves(found).items()]
  return jax.tree.unflatten(jax.tree.structure(found), leaves)


def parameter_count(depth, width, channels, classes):
  """Of the architecture in He et al. (arXiv 1603.05027), convolutions without biases."""
  count, c_in = 9 * channels * width, width
  for stage in range(3):
    c = width * 2**stage
    for block in range((depth - 2) // 6):
      count += 2 * c_in + 9 * c_in * c + 2 * c + 9 * c * c
      count += c_in * c if block == 0 and stage > 0 else 0
      c_in = c
  return count + 2 * c_in + c_in * classes + classes


def reference(variables, x, depth, n, last_n):
  """The forward pass in evaluation mode; n levels above zero (None: floating)."""
  p, stats = (named_leaves(variables[name]) for name in ('params', 'batch_stats'))

  def quantize(x, n, name):
    if n is None:
      return x
    clip = p[f'{name}/input/quant_scale']
    return clip * jnp.round(jnp.minimum(jnp.maximum(x / clip, 0), 1) * n) / n

  def norm_relu(x, name):
    x = (x - stats[f'{name}/mean']) / jnp.sqrt(stats[f'{name}/var'] + 1e-5)
    return jnp.maximum(x * p[f'{name}/scale'] + p[f'{name}/bias'], 0)

  def conv(x, name, stride=1, n=n):
    kernel = p[f'{name}/kernel']
    pad = (kernel.shape[0] // 2,) * 2
    layout = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      quantize(x, n, name), kernel, (stride,) * 2, (pad, pad), dimension_numbers=layout
    )

  x = conv(x, 'conv', n=None)
  for stage in (1, 2, 3):
    for i in range((depth - 2) // 6):
      name, stride = f'layer{stage}_{i}', 2 if stage > 1 and i == 0 else 1
      y = norm_relu(x, f'{name}/bn1')
      shortcut = y if i == 0 else x
      if f'{name}/downsample/kernel' in p:
        shortcut = conv(shortcut, f'{name}/downsample', stride)
      y = norm_relu(conv(y, f'{name}/conv1', stride), f'{name}/bn2')
      x = shortcut + conv(y, f'{name}/conv2')
  x = norm_relu(x, 'bn').mean((1, 2))
  return quantize(x, last_n, 'fc') @ p['fc/kernel'] + p['fc/bias']


@pytest.mark.parametrize(
  ('settings', 'n', 'last_n'),
  [({}, None, None), (QUANTIZED, 7, 31), ({'last_act': QUANTIZED['last_act']}, None, 31)],
  ids=['float', 'quantized', 'last'],
)
def test_forward_pass(settings, n, last_n):
  with jax.enable_x64(True):
    model = PreResNet(num_classes=5, depth=14, width=4, **settings)
    variables = random_variables(model, 8, 2)
    x = jnp.asarray(RNG.normal(size=(3, 8, 8, 2)))
    got = jax.jit(functools.partial(model.apply, train=False))(variables, x)
    want = jax.jit(functools.partial(reference, depth=14, n=n, last_n=last_n))(variables, x)
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert np.std(want) > 0.01


@pytest.mark.parametrize(
  ('depth', 'width', 'channels', 'classes'), [(20, 16, 3, 100), (8, 4, 1, 10)]
)
def test_number_of_parameters(depth, width, channels, classes):
  def count(model, name):
    return sum(x.size for x in jax.tree.leaves(shapes(model, 32, channels)[name]))

  model = PreResNet(num_classes=classes, depth=depth, width=width)
  wanted = parameter_count(depth, width, channels, classes)
  assert count(model, 'params') == wanted
  # A clip for each quantized convolution, the two of the shortcuts, and the last layer.
  assert count(model.clone(**QUANTIZED), 'params') == wanted + (depth - 2) + 2 + 1
  # A mean and a variance beside each scale and bias of a norm.
  found = named_leaves(shapes(model, 32, channels)['params'])
  affine = sum(x.size for path, x in found.items() if 'bn' in path)
  assert count(model, 'batch_stats') == affine


def test_number_of_parameters_of_the_published_network():
  # Stem, the three stages, last norm, last layer.
  assert parameter_count(20, 16, 3, 100) == 432 + 14_016 + 51_552 + 205_504 + 128 + 6_500


def test_names_of_all_parameters():
  model = PreResNet(num_classes=10, depth=8, width=4, act=LSQ(bits=4), last_act=LSQ(bits=8))
  norm, conv = ('bias', 'scale'), ('kernel', 'input/quant_scale')
  layers = {'conv': ('kernel',), 'bn': norm, 'fc': ('kernel', 'bias', 'input/quant_scale')}
  for stage in ('layer1_0', 'layer2_0', 'layer3_0'):
    layers |= {f'{stage}/bn1': norm, f'{stage}/bn2': norm}
    layers |= {f'{stage}/conv1': conv, f'{stage}/conv2': conv}
  layers |= {'layer2_0/downsample': conv, 'layer3_0/downsample': conv}
  found = shapes(model, 8)
  assert set(named_leaves(found['params'])) == {f'{a}/{b}' for a in layers for b in layers[a]}
  norms = [name for name, leaves in layers.items() if leaves == norm]
  stats = {f'{name}/{x}' for name in norms for x in ('mean', 'var')}
  assert set(named_leaves(found['batch_stats'])) == stats


@pytest.mark.parametrize(('size', 'sizes'), [(32, (32, 16, 8)), (8, (8, 4, 2))])
def test_shapes(size, sizes):
  model = PreResNet(num_classes=7, depth=14, width=4)
  x = jnp.zeros((2, size, size, 3))
  apply = functools.partial(model.apply, train=False, capture_intermediates=True)
  logits, state = jax.eval_shape(apply, shapes(model, size), x)
  assert logits.shape == (2, 7)
  for stage, side in enumerate(sizes):
    for block in range(2):
      (out,) = state['intermediates'][f'layer{stage + 1}_{block}']['__call__']
      assert out.shape == (2, side, side, 4 * 2**stage)


@pytest.mark.parametrize('depth', [2, 7, 18, 21, -4])
def test_an_impossible_depth(depth):
  with pytest.raises(ValueError, match=rf'depth={depth}\).*6 n \+ 2'):
    shapes(PreResNet(num_classes=10, depth=depth), 8)


def test_bits_none_everywhere_is_the_plain_network():
  none = {'act': LIQ(bits=None, signed=False), 'last_act': LSQ(bits=None)}
  plain = PreResNet(num_classes=3, depth=8, width=4)
  found, x = shapes(plain, 8), jnp.zeros((2, 8, 8, 3))

  def program(model):
    return str(jax.make_jaxpr(functools.partial(model.apply, train=False))(found, x))

  assert jax.tree.structure(shapes(plain.clone(**none), 8)) == jax.tree.structure(found)
  assert program(plain.clone(**none)) == program(plain)
  assert 'round' not in program(plain)


def test_bfloat16_is_close_to_float32():
  model = PreResNet(num_classes=5, depth=8, width=8)
  variables = random_variables(model, 8, 3)
  half = model.clone(dtype=jnp.bfloat16)
  x = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes(half, 8))} == {jnp.dtype('float32')}
  forward = [jax.jit(functools.partial(m.apply, train=False)) for m in (model, half)]
  want, got = (fn(variables, x) for fn in forward)
  assert got.dtype == jnp.bfloat16
  error = np.linalg.norm(got.astype(jnp.float32) - want) / np.linalg.norm(want)
  # Rounding to 8 bits, about ten times in a row.
  assert 1e-5 < error < 10 * 2**-8

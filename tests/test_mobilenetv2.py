"""Both MobileNetV2 against published counts and a forward pass of shifted sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_layers import Layers, check_remat, program, random_variables, shapes

from saq_jax import LIQ, LSQ
from saq_jax._paths import named_leaves
from saq_jax.models import mobilenetv2
from saq_jax.models.mobilenetv2 import InvertedResidual, MobileNetV2, MobileNetV2Cifar

RNG = np.random.default_rng(0)
QUANTIZED = {
  'act': LIQ(bits=3, signed=False),
  'last_act': LIQ(bits=5, signed=False),
  'first_act': LIQ(bits=4, signed=False),  # The model makes it signed.
}
LEVELS = {'n': 7, 'last_n': 31, 'first_n': 15}
# (expansion, channels, blocks, stride) from the paper's table 2.
STAGES = [
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
]


def blocks(small_images):
  """(name, expansion, output channels, stride) of all 17."""
  found = []
  for stage, (expansion, channels, count, stride) in enumerate(STAGES, 1):
    for i in range(count):
      name = f'layers_{len(found)}' if small_images else f'layer{stage}_{i}'
      halves = i == 0 and not (small_images and stage == 2)
      found.append((name, expansion, channels, stride if halves else 1))
  return found


def reference_block(layers, x, at, stride, *, small_images=False, same=False):
  most = np.inf if small_images else 6.0
  y = x
  if f'{at}conv1/kernel' in layers.p:
    y = layers.relu(layers.norm(layers.conv(y, f'{at}conv1'), f'{at}bn1'), most)
  y = layers.conv(y, f'{at}conv2', stride, groups=y.shape[-1], same=same)
  y = layers.relu(layers.norm(y, f'{at}bn2'), most)
  y = layers.norm(layers.conv(y, f'{at}conv3'), f'{at}bn3')
  if f'{at}shortcut_conv/kernel' in layers.p:
    x = layers.norm(layers.conv(x, f'{at}shortcut_conv'), f'{at}shortcut_bn')
  return x + y if stride == 1 and x.shape == y.shape else y


def reference(layers, x, small_images, same=False):
  most = np.inf if small_images else 6.0
  x = layers.conv(x, 'conv1', 1 if small_images else 2, first=True, same=same)
  x = layers.relu(layers.norm(x, 'bn1'), most)
  for name, _, _, stride in blocks(small_images):
    x = reference_block(layers, x, f'{name}/', stride, small_images=small_images, same=same)
  x = layers.relu(layers.norm(layers.conv(x, 'conv2'), 'bn2'), most)
  return layers.last(x, 'linear' if small_images else 'fc')


@pytest.mark.parametrize(
  ('family', 'size', 'settings', 'levels', 'same'),
  [
    (MobileNetV2, 33, {'norm_eps': 1e-3}, {'eps': 1e-3}, False),
    (MobileNetV2, 36, {'padding': 'same', **QUANTIZED}, LEVELS, True),
    (MobileNetV2Cifar, 16, QUANTIZED, LEVELS, False),
  ],
  ids=['float', 'same-quantized', 'cifar-quantized'],
)
def test_forward_pass(family, size, settings, levels, same):
  with jax.enable_x64(True):
    model = family(num_classes=5, **settings)
    variables = random_variables(model, size)
    x = RNG.normal(size=(3, size, size, 3))
    got = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  want = reference(Layers(variables, **levels), x, family is MobileNetV2Cifar, same)
  np.testing.assert_allclose(got, want, rtol=1e-9)
  assert np.std(want) > 0.01


@pytest.mark.parametrize('padding', ['torch', 'same'])
@pytest.mark.parametrize('strides', [1, 2])
def test_depthwise_kernels_get_their_gradient(strides, padding):
  """Against the gradient of shifted sums."""
  with jax.enable_x64(True):
    block = InvertedResidual(
      features=3,
      expansion=2,
      strides=strides,
      small_images=False,
      padding=1 if padding == 'torch' else 'SAME',
      act=None,
      train=False,
      norm_eps=1e-5,
      dtype=None,
    )
    x = jnp.asarray(RNG.normal(size=(2, 6, 6, 3)))
    first = block.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda v: jnp.asarray(1 + 0.1 * RNG.random(v.shape)), first)
    kernel = 0.2 * RNG.random((3, 3, 1, 6))  # Such that no ReLU6 shuts a channel off.

    def with_kernel(kernel):
      params = {**variables['params'], 'conv2': {'kernel': kernel}}
      return {**variables, 'params': params}

    def loss(kernel):
      return jnp.sum(jnp.sin(block.apply(with_kernel(kernel), x)))

    def reference_loss(kernel):
      layers = Layers(with_kernel(kernel), xp=jnp)
      return jnp.sum(jnp.sin(reference_block(layers, x, '', strides, same=padding == 'same')))

    got, want = jax.grad(loss)(kernel), jax.grad(reference_loss)(kernel)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
  assert np.all(np.any(np.abs(want) > 1e-3, axis=(0, 1)))


def test_number_of_parameters():
  def count(model, kind='params'):
    return sum(x.size for x in jax.tree.leaves(shapes(model, 32)[kind]))

  assert count(MobileNetV2(num_classes=1000)) == 3504872
  # Against the one for ImageNet: another first convolution in the first block with its norm, and
  # shortcuts of a convolution and a norm where stages of stride 1 begin.
  more = 32 * 32 + 2 * 32 + (32 * 16 + 16 * 24 + 64 * 96 + 160 * 320) + 2 * (16 + 24 + 96 + 320)
  fewer = 900 * 1281
  assert count(MobileNetV2Cifar(num_classes=100)) == 3504872 + more - fewer
  # A clip for each of 51 convolutions after the first one, for that one and for the last layer.
  assert count(MobileNetV2(num_classes=1000, **QUANTIZED)) == 3504872 + 51 + 1 + 1


@pytest.mark.parametrize(
  ('family', 'small_images'), [(MobileNetV2, False), (MobileNetV2Cifar, True)]
)
def test_names_of_all_parameters(family, small_images):
  model = family(num_classes=10, act=LSQ(bits=4), last_act=LSQ(bits=8))
  norm, conv = ('bias', 'scale'), ('kernel', 'input/quant_scale')
  layers = {'conv1': ('kernel',), 'bn1': norm, 'conv2': conv, 'bn2': norm}
  layers['linear' if small_images else 'fc'] = ('kernel', 'bias', 'input/quant_scale')
  c_in = 32
  for name, expansion, c, stride in blocks(small_images):
    for k in (1, 2, 3) if small_images or expansion > 1 else (2, 3):
      layers |= {f'{name}/conv{k}': conv, f'{name}/bn{k}': norm}
    if small_images and stride == 1 and c != c_in:
      layers |= {f'{name}/shortcut_conv': conv, f'{name}/shortcut_bn': norm}
    c_in = c
  found = shapes(model, 32)
  assert set(named_leaves(found['params'])) == {f'{a}/{b}' for a in layers for b in layers[a]}
  norms = [name for name, leaves in layers.items() if leaves == norm]
  assert set(named_leaves(found['batch_stats'])) == {
    f'{name}/{x}' for name in norms for x in ('mean', 'var')
  }


@pytest.mark.parametrize(
  ('model', 'size', 'sides'),
  [
    (MobileNetV2(num_classes=7), 224, (112, 56, 28, 14, 14, 7, 7)),
    (MobileNetV2(num_classes=7, padding='same'), 36, (18, 9, 5, 3, 3, 2, 2)),
    (MobileNetV2Cifar(num_classes=7), 32, (32, 32, 16, 8, 8, 4, 4)),
  ],
  ids=['imagenet', 'same', 'cifar'],
)
def test_shapes(model, size, sides):
  x = jnp.zeros((2, size, size, 3))
  apply = functools.partial(model.apply, train=False, capture_intermediates=True)
  logits, state = jax.eval_shape(apply, shapes(model, size), x)
  assert logits.shape == (2, 7)
  stages = [side for side, (_, _, count, _) in zip(sides, STAGES) for _ in range(count)]
  small_images = isinstance(model, MobileNetV2Cifar)
  for side, (name, _, channels, _) in zip(stages, blocks(small_images), strict=True):
    (out,) = state['intermediates'][name]['__call__']
    assert out.shape == (2, side, side, channels)


def test_an_unknown_padding():
  with pytest.raises(ValueError, match=r"padding='valid'\).*'torch' or 'same'"):
    shapes(MobileNetV2(num_classes=10, padding='valid'), 32)


@pytest.mark.parametrize('family', [MobileNetV2, MobileNetV2Cifar])
def test_bits_none_everywhere_is_the_plain_network(family):
  none = dict.fromkeys(('act', 'first_act'), LIQ(bits=None)) | {'last_act': LSQ(bits=None)}
  plain = family(num_classes=3)
  found = shapes(plain, 32)
  assert jax.tree.structure(shapes(plain.clone(**none), 32)) == jax.tree.structure(found)
  assert program(plain.clone(**none), found, 32) == program(plain, found, 32)
  assert 'round' not in program(plain, found, 32)


@pytest.mark.parametrize('family', [MobileNetV2, MobileNetV2Cifar])
def test_dtype_is_that_of_the_computation_alone(family):
  model = family(num_classes=3, dtype=jnp.bfloat16, **QUANTIZED)
  found, x = shapes(model, 32), jnp.zeros((2, 32, 32, 3))
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype('float32')}
  apply = functools.partial(model.apply, train=False)
  assert jax.eval_shape(apply, found, x).dtype == jnp.bfloat16


# Three blocks of three convolutions; the first one for ImageNet has two, and on small images the
# first two have a shortcut's.
@pytest.mark.parametrize(('family', 'more'), [(MobileNetV2, 8), (MobileNetV2Cifar, 11)])
def test_remat_changes_nothing_but_memory(family, more, monkeypatch):
  # The first two stages alone: the whole network takes a minute to compile.
  monkeypatch.setattr(mobilenetv2, '_BLOCKS', (1, 2))
  with jax.enable_x64(True):
    check_remat(family(num_classes=5, **QUANTIZED), 16, more)

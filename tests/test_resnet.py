"""ResNet against its published counts and a forward pass of shifted sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_layers import Layers, check_remat, program, random_variables, shapes

from saq_jax import LIQ, LSQ
from saq_jax._paths import named_leaves
from saq_jax.models import resnet
from saq_jax.models.resnet import ResNet

RNG = np.random.default_rng(0)
QUANTIZED = {
  'act': LIQ(bits=3, signed=False),
  'last_act': LIQ(bits=5, signed=False),
  'first_act': LIQ(bits=4, signed=False),  # The model makes it signed.
}


def reference(layers, x, blocks, bottleneck):
  x = layers.norm(layers.conv(x, 'conv1', 2, first=True), 'bn1')
  x = layers.max_pool(layers.relu(x))
  for stage in range(4):
    for i in range(blocks[stage]):
      at, stride = f'layer{stage + 1}_{i}', 2 if stage > 0 and i == 0 else 1
      strides = (1, stride, 1) if bottleneck else (stride, 1)
      y = x
      for k in range(len(strides)):
        y = layers.conv(y, f'{at}/conv{k + 1}', strides[k])
        y = layers.norm(y, f'{at}/bn{k + 1}')
        y = layers.relu(y) if k + 1 < len(strides) else y
      if i == 0 and (stage > 0 or bottleneck):
        x = layers.norm(layers.conv(x, f'{at}/downsample_conv', stride), f'{at}/downsample_bn')
      x = layers.relu(x + y)
  return layers.last(x, 'fc')


@pytest.mark.parametrize(
  ('depth', 'blocks', 'size', 'settings', 'levels'),
  [
    (18, (2, 2, 2, 2), 36, {'norm_eps': 1e-3}, {'eps': 1e-3}),
    (18, (2, 2, 2, 2), 33, QUANTIZED, {'n': 7, 'last_n': 31, 'first_n': 15}),
    (50, (3, 4, 6, 3), 33, QUANTIZED, {'n': 7, 'last_n': 31, 'first_n': 15}),
  ],
  ids=['18', '18-quantized', '50-quantized'],
)
def test_forward_pass(depth, blocks, size, settings, levels):
  with jax.enable_x64(True):
    model = ResNet(num_classes=5, depth=depth, width=4, **settings)
    variables = random_variables(model, size)
    x = RNG.normal(size=(3, size, size, 3))
    got = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  want = reference(Layers(variables, **levels), x, blocks, bottleneck=depth >= 50)
  np.testing.assert_allclose(got, want, rtol=1e-9)
  assert np.std(want) > 0.01


@pytest.mark.parametrize(
  ('depth', 'published'),
  [(18, 11689512), (34, 21797672), (50, 25557032), (101, 44549160), (152, 60192808)],
)
def test_number_of_parameters_is_the_published_one(depth, published):
  model = ResNet(num_classes=1000, depth=depth)
  assert sum(x.size for x in jax.tree.leaves(shapes(model, 64)['params'])) == published


def test_names_of_all_parameters():
  model = ResNet(num_classes=10, depth=50, width=4, act=LSQ(bits=4), last_act=LSQ(bits=8))
  norm, conv = ('bias', 'scale'), ('kernel', 'input/quant_scale')
  layers = {'conv1': ('kernel',), 'bn1': norm, 'fc': ('kernel', 'bias', 'input/quant_scale')}
  for stage, blocks in enumerate((3, 4, 6, 3), 1):
    for i in range(blocks):
      for k in (1, 2, 3):
        layers |= {f'layer{stage}_{i}/conv{k}': conv, f'layer{stage}_{i}/bn{k}': norm}
    layers |= {f'layer{stage}_0/downsample_conv': conv, f'layer{stage}_0/downsample_bn': norm}
  found = shapes(model, 32)
  assert set(named_leaves(found['params'])) == {f'{a}/{b}' for a in layers for b in layers[a]}
  norms = [name for name, leaves in layers.items() if leaves == norm]
  assert set(named_leaves(found['batch_stats'])) == {
    f'{name}/{x}' for name in norms for x in ('mean', 'var')
  }
  # Basic blocks have two convolutions, and the first stage needs no convolution to begin.
  basic = named_leaves(shapes(model.clone(depth=18, first_act=LSQ(bits=8)), 32)['params'])
  assert 'conv1/input/quant_scale' in basic
  assert not [path for path in basic if 'conv3' in path or path.startswith('layer1_0/downsample')]


@pytest.mark.parametrize(('size', 'sizes'), [(224, (56, 28, 14, 7)), (40, (10, 5, 3, 2))])
@pytest.mark.parametrize(('depth', 'wider'), [(18, 1), (50, 4)])
def test_shapes(size, sizes, depth, wider):
  model = ResNet(num_classes=7, depth=depth)
  x = jnp.zeros((2, size, size, 3))
  apply = functools.partial(model.apply, train=False, capture_intermediates=True)
  logits, state = jax.eval_shape(apply, shapes(model, size), x)
  assert logits.shape == (2, 7)
  for stage, side in enumerate(sizes):
    for block in range(2):
      (out,) = state['intermediates'][f'layer{stage + 1}_{block}']['__call__']
      assert out.shape == (2, side, side, wider * 64 * 2**stage)


@pytest.mark.parametrize('depth', [20, 0, -18])
def test_an_impossible_depth(depth):
  with pytest.raises(ValueError, match=rf'depth={depth}\).*18, 34, 50, 101, 152'):
    shapes(ResNet(num_classes=10, depth=depth), 32)


def test_bits_none_everywhere_is_the_plain_network():
  none = dict.fromkeys(('act', 'first_act'), LIQ(bits=None)) | {'last_act': LSQ(bits=None)}
  plain = ResNet(num_classes=3, depth=18, width=4)
  found = shapes(plain, 32)
  assert jax.tree.structure(shapes(plain.clone(**none), 32)) == jax.tree.structure(found)
  assert program(plain.clone(**none), found, 32) == program(plain, found, 32)
  assert 'round' not in program(plain, found, 32)


def test_dtype_is_that_of_the_computation_alone():
  model = ResNet(num_classes=3, depth=18, width=4, dtype=jnp.bfloat16, **QUANTIZED)
  found, x = shapes(model, 32), jnp.zeros((2, 32, 32, 3))
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype('float32')}
  apply = functools.partial(model.apply, train=False)
  assert jax.eval_shape(apply, found, x).dtype == jnp.bfloat16


def test_remat_changes_nothing_but_memory(monkeypatch):
  # One block a stage, for the time of compilation.
  monkeypatch.setitem(resnet._BLOCKS, 18, (1, 1, 1, 1))
  with jax.enable_x64(True):
    check_remat(ResNet(num_classes=5, depth=18, width=2, **QUANTIZED), 32, more=4 * 2 + 3)

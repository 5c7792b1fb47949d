"""Costs against the paper's figures and against sums done by hand."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from saq_jax import LIQ, LSQ, DoReFa, QuantRule, weight_quantizer
from saq_jax.analysis.cost import ModelSize, ProductCost, model_size, product_costs
from saq_jax.layers import Conv, Dense, Einsum
from saq_jax.models.mobilenetv2 import MobileNetV2, MobileNetV2Cifar
from saq_jax.models.preresnet import PreResNet
from saq_jax.models.resnet import ResNet
from saq_jax.models.swin import Swin
from saq_jax.models.vit import ViT


class TinyNet(nn.Module):
  """A stem, a grouped convolution, attention and a head on 8x8x3 images."""

  act: LSQ | None = None
  scores: LSQ | None = None

  @nn.compact
  def __call__(self, x, *, train):
    del train
    x = Conv(8, (3, 3), name='stem')(x)
    conv = functools.partial(Conv, 16, (3, 3), strides=2, padding=1, input_quantizer=self.act)
    x = conv(feature_group_count=4, use_bias=False, name='grouped')(x)
    x = x.reshape(x.shape[0], 16, 16)
    scores = Einsum('...id,...jd->...ij', self.act, self.act, name='scores')(x, x)
    x = Einsum('bij, bjd -> bid', self.scores, self.act, name='mix')(scores, x)
    return Dense(10, input_quantizer=self.act, name='head')(x[:, 0])


def preresnet20(bits):
  act = LIQ(bits=bits, signed=False) if bits else None
  last = LIQ(bits=8, signed=False) if bits else None
  return PreResNet(num_classes=100, depth=20, act=act, last_act=last)


def rules(ends, bits):
  return weight_quantizer(
    [
      QuantRule(ends, LIQ(bits=8)),
      QuantRule(r'.*/kernel', LIQ(bits=bits)),
    ]
  )


def quantized(family, classes, bits):
  """A network of LIQ quantizers between 8-bit ends, and the quantizer of its weights."""
  act, last_act = LIQ(bits=bits, signed=False), LIQ(bits=8, signed=False)
  model = family(num_classes=classes, act=act, last_act=last_act)
  return model, rules(f'({model.first_kernel}|{model.last_kernel})', bits)


def bops(*args, **kwargs):
  return sum(cost.bops for cost in product_costs(*args, **kwargs))


def shapes(model, *image):
  x = jnp.zeros((1, *image))
  return jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))


@pytest.mark.parametrize(
  ('bits', 'published', 'exact'), [(4, 674.6, 674643968), (3, 392.1, 392052736)]
)
def test_preresnet20_costs_what_the_paper_says(bits, published, exact):
  total = bops(preresnet20(bits), (32, 32, 3), rules('(conv|fc)/kernel', bits))
  assert total == exact
  assert round(total / 1e6, 1) == published


# From the tables of ziplab/SAQ.
@pytest.mark.parametrize(
  ('family', 'size', 'classes', 'bits', 'unit', 'published', 'exact'),
  [
    (MobileNetV2Cifar, 32, 100, 4, 1e6, 1508.9, 1508933632),
    (MobileNetV2Cifar, 32, 100, 3, 1e6, 877.1, 877131776),
    (ResNet, 224, 1000, 4, 1e9, 34.7, 34714419200),
    (ResNet, 224, 1000, 2, 1e9, 14.4, 14367850496),
  ],
)
def test_larger_networks_cost_what_the_paper_says(
  family, size, classes, bits, unit, published, exact
):
  model, quantize = quantized(family, classes, bits)
  total = bops(model, (size, size, 3), quantize)
  assert total == exact
  assert round(total / unit, 1) == published


def test_mobilenetv2_costs_what_it_does_by_hand():
  """The table says 5.3G: 5.394G cut off, or 5.312G without the last layer.

  Its other figures are rounded, and the last layer counts in them.
  """
  model, quantize = quantized(MobileNetV2, 1000, 4)
  costs = product_costs(model, (224, 224, 3), quantize)
  # Expansion, depthwise and reduction of each block, from the paper's table 2.
  macs, c_in, side = [], 32, 112
  stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
  for t, c, n, s in [*stages, (6, 160, 3, 2), (6, 320, 1, 1)]:
    for i in range(n):
      macs += [c_in * t * c_in * side**2] if t > 1 else []
      side //= s if i == 0 else 1
      macs += [9 * t * c_in * side**2, t * c_in * c * side**2]
      c_in = c
  macs += [320 * 1280 * side**2]
  ends = [9 * 3 * 32 * 112**2, 1280 * 1000]
  assert [cost.macs for cost in costs] == [ends[0], *macs, ends[1]]
  total = sum(cost.bops for cost in costs)
  assert total == 16 * sum(macs) + 64 * sum(ends) == 5394053120
  assert math.floor(total / 1e8) / 10 == round((total - costs[-1].bops) / 1e9, 1) == 5.3


def transformer_bits(model):
  """4 bits, and 8 in the first and the last layer, given to any Transformer."""
  act = {'act': LSQ(bits=4), 'last_act': LSQ(bits=8), 'first_act': LSQ(bits=7)}
  return model.clone(**act), rules(f'{model.first_kernel}|{model.last_kernel}', 4)


# cuDNN's product cannot be traced without a GPU, and need not be.
@pytest.mark.parametrize('fields', [{}, {'implementation': 'cudnn'}, {'remat': True}], ids=str)
def test_vit_ti_costs_what_it_does_by_hand(fields):
  model = ViT.of_size('Ti', 1000, **fields)
  n, c, depth = 1 + 14**2, 192, 12
  ends = 14**2 * 16**2 * 3 * c, 1000 * c
  # q, k, v, proj; fc1 and fc2; the product of q and k, and that of the probabilities and v.
  inner = depth * (4 * n * c**2 + 2 * 4 * n * c**2 + 2 * n**2 * c)
  plain = product_costs(model, (224, 224, 3), None)
  assert sum(cost.macs for cost in plain) == sum(ends) + inner
  assert {(cost.weight_bits, cost.act_bits) for cost in plain} == {(32, 32)}
  assert len(plain) == 2 + depth * 8
  quantized, quantize = transformer_bits(model)
  want = ends[0] * 8 * 7 + ends[1] * 8 * 8 + inner * 4 * 4
  assert bops(quantized, (224, 224, 3), quantize) == want


@pytest.mark.parametrize('quantized', [False, True])
def test_attention_costs_the_bits_of_its_operands(quantized):
  model, quantize = transformer_bits(ViT(num_classes=5, patch=4, width=12, depth=1, heads=3))
  model = model if quantized else model.clone(act=None, last_act=None, first_act=None)
  costs = {cost.path: cost for cost in product_costs(model, (8, 8, 3), quantize)}
  bits = 4 if quantized else 32
  for name in 'qkv':
    path = f'block_0/attn/{name}'
    assert costs[path] == ProductCost(path, 5 * 12 * 12, 4, bits)
  for name in ('scores', 'mix'):
    path = f'block_0/attn/product/{name}'
    assert costs[path] == ProductCost(path, 5 * 5 * 12, bits, bits)


def test_swin_costs_what_it_does_by_hand():
  # Maps of 10x10 and, merged, 5x5; windows of 4: 12x12 and 8x8 with what is padded.
  model = Swin(num_classes=7, width=8, depths=(2, 1), heads=(2, 2), window=4)
  ends = 10**2 * 4**2 * 3 * 8, 7 * 16
  inner = 5**2 * 32 * 16
  for blocks, side, padded, c in ((2, 10, 12, 8), (1, 5, 8, 16)):
    inner += blocks * (4 * padded**2 * c**2 + 2 * 4 * side**2 * c**2 + 2 * padded**2 * 4**2 * c)
  plain = product_costs(model, (40, 40, 3), None)
  assert sum(cost.macs for cost in plain) == sum(ends) + inner
  quantized, quantize = transformer_bits(model)
  want = ends[0] * 8 * 7 + ends[1] * 8 * 8 + inner * 4 * 4
  assert bops(quantized, (40, 40, 3), quantize) == want


def test_a_product_beside_a_transformer_is_found_and_named():
  class Beside(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      x = ViT(num_classes=5, patch=4, width=12, depth=1, heads=3)(x, train=train)
      return nn.Dense(3, name='stray')(x)

  with pytest.raises(ValueError, match=r'The difference is outside of the layers, in /\w+/stray\.'):
    product_costs(Beside(), (8, 8, 3), None)


def test_full_precision_counts_32_bits_on_both_sides():
  costs = product_costs(preresnet20(None), (32, 32, 3), None)
  assert {(cost.weight_bits, cost.act_bits) for cost in costs} == {(32, 32)}
  # By hand: stem, three stages of six 3x3 convolutions, two shortcuts, the head.
  stages = [6 * 9 * 16 * 16 * 32**2]
  stages += [9 * 16 * 32 * 16**2 + 5 * 9 * 32 * 32 * 16**2 + 16 * 32 * 16**2]
  stages += [9 * 32 * 64 * 8**2 + 5 * 9 * 64 * 64 * 8**2 + 32 * 64 * 8**2]
  macs = 9 * 3 * 16 * 32**2 + sum(stages) + 64 * 100
  assert sum(cost.macs for cost in costs) == macs
  assert sum(cost.bops for cost in costs) == 1024 * macs


def test_layers_of_a_small_net_cost_what_they_do_by_hand():
  act, scores = LSQ(bits=4, signed=False), LSQ(bits=6, signed=False)
  costs = product_costs(TinyNet(act, scores), (8, 8, 3), rules('stem/kernel', 2))
  assert costs == (
    ProductCost('stem', 9 * 3 * 8 * 8 * 8, 8, 8),
    ProductCost('grouped', 9 * (8 // 4) * 16 * 4 * 4, 2, 4),
    ProductCost('scores', 16 * 16 * 16, 4, 4),
    ProductCost('mix', 16 * 16 * 16, 6, 4),
    ProductCost('head', 16 * 10, 2, 4),
  )
  assert costs[1].bops == 4608 * 8


def test_only_the_images_count_image_bits():
  quantize = rules('stem/kernel', 2)
  act_bits = [c.act_bits for c in product_costs(TinyNet(), (8, 8, 3), quantize, image_bits=6)]
  assert act_bits == [6, 32, 32, 32, 32]
  unquantized_stem = weight_quantizer([QuantRule('(grouped|head)/kernel', LSQ(bits=4))])
  costs = product_costs(TinyNet(), (8, 8, 3), unquantized_stem)
  assert (costs[0].weight_bits, costs[0].act_bits) == (32, 32)


def test_quantizers_without_bits_count_as_none():
  plain = LSQ(bits=None)
  quantize = weight_quantizer([QuantRule('.*/kernel', plain)])
  costs = product_costs(TinyNet(plain, plain), (8, 8, 3), quantize)
  assert costs == product_costs(TinyNet(), (8, 8, 3), None)


def test_a_layer_called_twice_counts_twice():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      layer = Dense(4, name='layer')
      return layer(layer(x))

  assert product_costs(Twice(), (4,), None) == (ProductCost('layer', 16, 32, 32),) * 2


@pytest.mark.parametrize(('equation', 'left', 'right', 'macs'), [
  ('ij,jk->ik', (2, 3), (3, 5), 30),
  ('ij,jk', (2, 3), (3, 5), 30),
  ('bqhd,bkhd->bhqk', (1, 5, 2, 3), (1, 7, 2, 3), 5 * 7 * 2 * 3),
  ('...d,de...->...e', (4, 3), (3, 2, 4), 24),
])  # fmt: skip
def test_einsums(equation, left, right, macs):
  class Product(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      return Einsum(equation, name='product')(jnp.ones(left) * x.sum(), jnp.ones(right))

  assert [cost.macs for cost in product_costs(Product(), (1,), None)] == [macs]


def test_products_outside_of_the_layers_are_an_error():
  class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      return nn.Dense(2, name='stray')(Dense(4, name='layer')(x))

  with pytest.raises(ValueError, match=r'multiplies 20 times.* 12 times.*stray'):
    product_costs(Mixed(), (3,), None)


def test_a_lifted_loop_is_an_error():
  class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return Dense(4, name='layer')(x), None

  class Loop(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      loop = nn.scan(Cell, variable_axes={'params': 0}, split_rngs={'params': True}, length=5)
      return loop(name='loop')(x, None)[0]

  with pytest.raises(ValueError, match=r'80 times.*lifted loop'):
    product_costs(Loop(), (4,), None)


def test_a_rule_without_a_parameter_is_an_error():
  quantize = weight_quantizer([QuantRule('nothing', LSQ(bits=4))])
  with pytest.raises(ValueError, match='matches no leaf'):
    product_costs(TinyNet(), (8, 8, 3), quantize)
  with pytest.raises(ValueError, match='matches no leaf'):
    model_size(shapes(TinyNet(), 8, 8, 3)['params'], {}, quantize)


def test_size_of_preresnet20_by_hand():
  variables = shapes(preresnet20(4), 32, 32, 3)
  params, stats = variables['params'], variables['batch_stats']
  inner = 6 * 9 * 16 * 16 + 9 * 16 * 32 + 5 * 9 * 32 * 32 + 16 * 32
  inner += 9 * 32 * 64 + 5 * 9 * 64 * 64 + 32 * 64
  ends = 9 * 3 * 16 + 64 * 100
  # Norms: two a block, over its input's and its own channels, and the last one.
  channels = 6 * 16 + (16 + 5 * 32) + (32 + 5 * 64) + 64
  weight_scales, act_scales = 22, 21
  size = model_size(params, stats, rules('(conv|fc)/kernel', 4))
  assert size.quantized_bits == 4 * inner + 8 * ends
  assert size.float_bits == 32 * (4 * channels + 100 + weight_scales + act_scales)
  assert size.parameters == inner + ends + 2 * channels + 100
  plain = model_size(shapes(preresnet20(None), 32, 32, 3)['params'], stats, None)
  assert (plain.quantized_bits, plain.parameters) == (0, size.parameters)
  assert plain.bits == 32 * (size.parameters + 2 * channels)


def test_size_counts_scales_of_each_channel_and_none_where_none_is_learnt():
  params = {'a': jnp.zeros((3, 5)), 'b': jnp.zeros((7,)), 'c': jnp.zeros(2)}
  quantize = weight_quantizer(
    [QuantRule('a', LSQ(bits=3, axis=-1)), QuantRule('b', DoReFa(bits=2)),
     QuantRule('c', LSQ(bits=None))]
  )  # fmt: skip
  size = model_size(params, None, quantize)
  assert size == ModelSize(parameters=24, quantized_bits=45 + 14, float_bits=32 * (5 + 2))
  assert size.bits == 283
  assert size.bytes == math.ceil(283 / 8)

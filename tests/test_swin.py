"""Swin against a forward pass in NumPy that knows no shift, only which pixels are neighbours."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_transformers import (
  ACT,
  FIRST,
  KEY,
  LAST,
  QUANTIZED,
  InNumpy,
  random_params,
  shapes,
  signs,
)

from saq_jax import LSQ
from saq_jax._paths import map_named, named_leaves
from saq_jax.layers import calibrate
from saq_jax.models.swin import Swin, resize_relative_bias
from saq_jax.models.windows import in_windows

RNG = np.random.default_rng(0)
# Maps of 10x14 (padded to 12x16, and shifted), 5x7 (merged to 3x4) and 3x4 (a window of 3, padded).
DEEP = Swin(num_classes=5, patch=2, width=4, depths=(2, 2, 2), heads=(2, 2, 4), window=4)
SMALL = DEEP.clone(depths=(2, 1), heads=(2, 2), window=2)
IMAGE = (20, 28, 3)
TINY_IMAGE = (12, 12, 3)
X = RNG.normal(size=(2, *IMAGE)).astype(np.float32)
TINY_X = RNG.normal(size=(3, *TINY_IMAGE)).astype(np.float32)


def window_attention(net, x, name, heads, window, shifted):
  """Attention [B, H, W, C], for each set of pixels that share a window, wherever they are."""
  height, width = x.shape[1:3]
  whole = min(height, width) <= window
  window = min(height, width) if whole else window
  # Windows that hang over the map's upper and left edge hold the pixels there alone.
  start = window // 2 if shifted and not whole else 0
  rows, columns = (-(-n // window) * window for n in (height, width))
  padded = np.zeros((len(x), rows, columns, x.shape[3]))
  padded[:, :height, :width] = x
  members = {}
  for r in range(rows):
    for c in range(columns):
      members.setdefault(((r - start) // window, (c - start) // window), []).append((r, c))
  table, out = net.p[f'{name}/relative_bias'], np.zeros_like(padded)
  for pixels in members.values():
    r, c = np.array(pixels).T
    apart = (r[:, None] - r + window - 1) * (2 * window - 1) + c[:, None] - c + window - 1
    bias = np.moveaxis(table[apart], -1, 0)
    out[:, r, c] = net.attention(padded[:, r, c], name, heads, bias)
  return out[:, :height, :width]


def merge(net, x, name, eps):
  """Patch merging [B, H, W, C], one square after the other."""
  batch, height, width, channels = x.shape
  out = np.zeros((batch, -(-height // 2), -(-width // 2), 4 * channels))
  for row in range(height):
    for column in range(width):
      place = row % 2 + 2 * (column % 2)
      part = slice(place * channels, (place + 1) * channels)
      out[:, row // 2, column // 2, part] = x[:, row, column]
  return net.dense(net.norm(out, f'{name}/norm', eps), f'{name}/reduction')


def reference(model, params, images, quantized):
  """The forward pass in float64."""
  net = InNumpy(params, ACT.bits if quantized else None)
  eps = model.norm_eps
  x = net.patches(images, model.patch, FIRST.bits if quantized else None)
  x = net.norm(x, 'patch_norm', eps)
  for stage, depth in enumerate(model.depths):
    if stage:
      x = merge(net, x, f'merge{stage - 1}', eps)
    for i in range(depth):
      name = f'stage{stage}_{i}'
      y = net.norm(x, f'{name}/norm1', eps)
      heads = model.heads[stage]
      x = x + window_attention(net, y, f'{name}/attn', heads, model.window, i % 2 == 1)
      x = x + net.mlp(net.norm(x, f'{name}/norm2', eps), f'{name}/mlp')
  x = net.norm(x, 'norm', eps).mean((1, 2))
  return net.dense(x, 'head', LAST.bits if quantized else None)


@pytest.mark.parametrize('quantized', [False, True], ids=['float', 'quantized'])
def test_forward_pass(quantized):
  with jax.enable_x64(True):
    model = DEEP.clone(**QUANTIZED) if quantized else DEEP
    params = random_params(model, *IMAGE)
    images = X.astype(np.float64)
    got = jax.jit(functools.partial(model.apply, train=False))({'params': params}, images)
    want = reference(model, params, images, quantized)
    # The fused attention's softmax is in float32 always.
    np.testing.assert_allclose(got, want, rtol=1e-9 if quantized else 1e-5, atol=1e-6)
    assert np.max(np.abs(want[0] - want[1])) > 0.05


@pytest.mark.parametrize(
  ('size', 'count'), [('T', 28_288_354), ('S', 49_606_258), ('B', 87_768_224)]
)
def test_published_numbers_of_parameters(size, count):
  found = shapes(Swin.of_size(size, 1000), 224, 224, 3)['params']
  assert sum(x.size for x in jax.tree.leaves(found)) == count


def test_sizes():
  want = Swin(num_classes=10, width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=12)
  assert Swin.of_size('B', 10, window=12) == want
  with pytest.raises(ValueError, match=r"of_size\('L'\): take one of T, S, B"):
    Swin.of_size('L', 10)


@pytest.mark.parametrize('remat', [False, True])
def test_names_of_all_parameters(remat):
  layer, norm, scale = ('kernel', 'bias'), ('scale', 'bias'), ('quant_scale',)
  quantized = (*layer, 'input/quant_scale')
  names = {'patch_embed/': quantized, 'patch_norm/': norm, 'norm/': norm, 'head/': quantized}
  names |= {'merge0/norm/': norm, 'merge0/reduction/': ('kernel', 'input/quant_scale')}
  for block in ('stage0_0', 'stage0_1', 'stage1_0'):
    names |= {f'{block}/norm1/': norm, f'{block}/norm2/': norm, f'{block}/attn/input/': scale}
    names |= {f'{block}/attn/{name}/': layer for name in 'qkv'}
    names |= {f'{block}/attn/': ('relative_bias',)}
    names |= {f'{block}/{name}/': quantized for name in ('attn/proj', 'mlp/fc1', 'mlp/fc2')}
    product = ('scores/lhs', 'scores/rhs', 'mix/lhs', 'mix/rhs')
    names |= {f'{block}/attn/product/{name}/': scale for name in product}
  found = shapes(SMALL.clone(remat=remat, **QUANTIZED), *TINY_IMAGE)
  assert set(found) == {'params'}
  assert set(named_leaves(found['params'])) == {a + b for a in names for b in names[a]}
  for name in (SMALL.first_kernel, SMALL.last_kernel):
    assert sum(bool(re.fullmatch(name, x)) for x in named_leaves(found['params'])) == 1


@pytest.mark.parametrize('given', [True, False])
def test_the_model_sets_the_signs(given):
  quantizers = {name: LSQ(bits=4, signed=given) for name in QUANTIZED}
  found = signs(SMALL.clone(**quantizers), *TINY_IMAGE)
  unsigned = {name for name, signed in found.items() if not signed}
  blocks = ('stage0_0', 'stage0_1', 'stage1_0')
  assert unsigned == {f'{block}/attn/product/mix/lhs' for block in blocks}
  assert len(found) == 3 * 8 + 1 + 2


def test_bits_none_everywhere_is_the_plain_network():
  none = {name: LSQ(bits=None, signed=False) for name in QUANTIZED}
  found = shapes(SMALL, *TINY_IMAGE)

  def program(model):
    return str(jax.make_jaxpr(functools.partial(model.apply, train=True))(found, TINY_X))

  assert jax.tree.structure(shapes(SMALL.clone(**none), *TINY_IMAGE)) == jax.tree.structure(found)
  assert program(SMALL.clone(**none)) == program(SMALL)
  assert 'round' not in program(SMALL)


@functools.partial(jax.jit, static_argnums=0)
def grads_and_logits(model, params):
  def loss(params):
    logits = model.apply({'params': params}, TINY_X, train=True)
    return jnp.sum(jnp.sin(logits)), logits

  return jax.grad(loss, has_aux=True)(params)


def test_remat_changes_no_value_and_no_gradient_and_every_parameter_learns():
  model = SMALL.clone(**QUANTIZED)
  params = random_params(model, *TINY_IMAGE)
  plain = grads_and_logits(model, params)
  again = grads_and_logits(model.clone(remat=True), params)
  for got, want in zip(*map(jax.tree.leaves, (again, plain)), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  for name, grad in named_leaves(plain[0]).items():
    # A row of a kernel stays where its input rounds to zero in all of the few examples.
    # The bias of keys adds the same to all of a query's logits, which a softmax takes away: where
    # no key is clipped, as in the last stage, its gradient is rounding.
    least = 0.6 if name.endswith('kernel') else 0.95
    assert name == 'stage1_0/attn/k/bias' or np.mean(grad != 0) > least, name
    assert np.all(np.isfinite(grad)), name


def test_calibration_finds_all_scales_in_one_pass_also_with_remat():
  model = SMALL.clone(**QUANTIZED)
  params = random_params(model, *TINY_IMAGE)

  def find(model):
    run = jax.jit(lambda p: calibrate(model, {'params': p}, TINY_X, train=False))
    return named_leaves(run(params))

  found, before = find(model), named_leaves(params)
  moved = {name for name in found if np.any(found[name] != before[name])}
  assert moved == {name for name in found if name.endswith('quant_scale')}
  for name, x in find(model.clone(remat=True)).items():
    np.testing.assert_allclose(x, found[name], rtol=1e-5, err_msg=name)


def test_what_is_dropped_follows_the_key():
  plain = SMALL.clone(depths=(1, 1))
  model = plain.clone(dropout=0.2, attn_dropout=0.2, drop_path=0.2)
  variables = {'params': random_params(model, *TINY_IMAGE)}
  run = jax.jit(lambda key: model.apply(variables, TINY_X, train=True, rngs={'dropout': key}))
  np.testing.assert_array_equal(run(KEY), run(KEY))
  assert np.any(run(KEY) != run(jax.random.key(1)))
  want, got = (
    jax.jit(functools.partial(m.apply, train=False))(variables, TINY_X) for m in (plain, model)
  )
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('bits', [None, 8])
def test_bfloat16_is_close_to_float32(bits):
  model = SMALL.clone(act=LSQ(bits=bits), last_act=LSQ(bits=bits))
  half = model.clone(dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(shapes(half, *TINY_IMAGE))} == {jnp.dtype('float32')}
  params = random_params(model, *TINY_IMAGE)
  # A grid that is as fine as 8 bits allow, so that few codes change.
  params = map_named(lambda name, x: x / 12 if 'quant_scale' in name else x, params)
  forward = [jax.jit(functools.partial(m.apply, train=False)) for m in (model, half)]
  want, got = (fn({'params': params}, TINY_X) for fn in forward)
  assert got.dtype == jnp.bfloat16
  error = np.linalg.norm(got.astype(jnp.float32) - want) / np.linalg.norm(want)
  # Rounding to 8 bits, many times in a row; it also changes a few codes.
  assert 1e-4 < error < (0.03 if bits is None else 0.1)


# Windows and sizes.


@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize(('height', 'width', 'window'), [(6, 6, 3), (7, 10, 4), (3, 9, 4)])
def test_windows_are_put_back_where_they_were(height, width, window, shifted):
  x = RNG.normal(size=(2, height, width, 3))
  windows, mask, put_back = in_windows(jnp.asarray(x), window, shifted)
  np.testing.assert_array_equal(put_back(windows), jnp.asarray(x))
  assert windows.shape[2] == min(window, height) ** 2
  assert (mask is None) == (not shifted or height <= window)


def test_another_size_takes_the_same_parameters_unless_a_window_shrinks():
  variables = shapes(SMALL, *TINY_IMAGE)
  apply = functools.partial(SMALL.apply, train=False)
  assert jax.eval_shape(apply, variables, jnp.zeros((1, 20, 28, 3))).shape == (1, 5)
  message = 'relative positions has 9 rows, and a window of 1x1 pixels asks for 1.*loaded'
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(apply, variables, jnp.zeros((1, 4, 4, 3)))


def test_impossible_networks():
  with pytest.raises(ValueError, match=r'9x12 pixels: patches of patch=2'):
    shapes(SMALL, 9, 12, 3)
  with pytest.raises(ValueError, match=r'depths=\(2, 1\), heads=\(2,\)\): of different lengths'):
    shapes(SMALL.clone(heads=(2,)), *TINY_IMAGE)


# The table is (7 i^2 + 3 i mod 11) / 4 at i = 0, 1, ..., 24; the result is that of PyTorch 2.14.1,
# torch.nn.functional.interpolate(..., mode='bicubic', antialias=True).
RECORDED = [
  1.06142, 1.106744, 1.031953, 0.724669, 1.271942, 1.136208, 0.525621, 0.910125, 1.378166,
]  # fmt: skip


def test_a_recorded_table_of_relative_positions():
  i = np.arange(25)
  table = ((7 * i**2 + 3 * i) % 11 / 4).astype(np.float32)
  got = resize_relative_bias(np.stack([table, 3 * table], axis=-1), 2)
  np.testing.assert_allclose(got, np.outer(RECORDED, [1, 3]), atol=6e-6)
  same = resize_relative_bias(table[:, None], 3)
  np.testing.assert_array_equal(same, table[:, None])


def test_a_table_that_is_no_square():
  with pytest.raises(ValueError, match='26 entries are not those of a square'):
    resize_relative_bias(jnp.zeros((26, 2)), 4)

"""ViT against a forward pass in NumPy, counts of published networks, and recorded resamplings."""

import functools
import re

import flax.linen as nn
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

from saq_jax import LIQ, LSQ, DoReFa
from saq_jax._paths import map_named, named_leaves
from saq_jax.attention import StochasticDepth
from saq_jax.layers import calibrate
from saq_jax.models.vit import ViT, resize_grid, resize_position_embedding

RNG = np.random.default_rng(0)
TINY = ViT(num_classes=5, patch=4, width=12, depth=2, heads=3)
SMALL = TINY.clone(width=6, depth=1, heads=2)
IMAGE = (8, 12, 3)
X = RNG.normal(size=(4, *IMAGE)).astype(np.float32)


def reference(model, params, images, quantized):
  """The forward pass in float64."""
  net = InNumpy(params, ACT.bits if quantized else None)
  last = LAST.bits if quantized else None
  x = net.patches(images, model.patch, FIRST.bits if quantized else None)
  x = x.reshape(len(x), -1, model.width)
  tokens = ['cls_token', 'dist_token'] if model.distilled else ['cls_token']
  first = [np.repeat(net.p[name], len(x), axis=0) for name in tokens]
  x = np.concatenate([*first, x], axis=1) + net.p['pos_embed']
  for i in range(model.depth):
    y = net.norm(x, f'block_{i}/norm1', model.norm_eps)
    x = x + net.attention(y, f'block_{i}/attn', model.heads)
    x = x + net.mlp(net.norm(x, f'block_{i}/norm2', model.norm_eps), f'block_{i}/mlp')
  x = net.norm(x, 'norm', model.norm_eps)
  logits = net.dense(x[:, 0], 'head', last)
  return (logits + net.dense(x[:, 1], 'head_dist', last)) / 2 if model.distilled else logits


@pytest.mark.parametrize(
  ('quantized', 'distilled', 'train'),
  [(False, False, False), (True, False, False), (False, True, False), (True, True, True)],
)
def test_forward_pass(quantized, distilled, train):
  with jax.enable_x64(True):
    model = TINY.clone(distilled=distilled, **(QUANTIZED if quantized else {}))
    params = random_params(model, *IMAGE)
    apply = functools.partial(model.apply, train=train)
    got = jax.jit(apply)({'params': params}, X.astype(np.float64))
    want = reference(model, params, X.astype(np.float64), quantized)
    # The fused attention's softmax is in float32 always.
    np.testing.assert_allclose(got, want, rtol=1e-9 if quantized else 1e-5, atol=1e-6)
    assert np.all(np.std(want, axis=0) > 0.05)


@pytest.mark.parametrize(
  ('size', 'fields', 'count'),
  [
    ('Ti', {}, 5_717_416),
    ('S', {}, 22_050_664),
    ('B', {}, 86_567_656),
    ('L', {}, 304_326_632),
    ('B', {'patch': 32}, 88_224_232),
    ('Ti', {'distilled': True}, 5_910_800),
    ('S', {'distilled': True}, 22_436_432),
    ('B', {'distilled': True}, 87_338_192),
  ],
)
def test_published_numbers_of_parameters(size, fields, count):
  model = ViT.of_size(size, 1000, **fields)
  found = shapes(model, 224, 224, 3)['params']
  assert sum(x.size for x in jax.tree.leaves(found)) == count


def test_sizes():
  assert ViT.of_size('S', 10, depth=3) == ViT(num_classes=10, width=384, depth=3, heads=6)
  with pytest.raises(ValueError, match=r"of_size\('H'\): take one of Ti, S, B, L"):
    ViT.of_size('H', 10)


@pytest.mark.parametrize('remat', [False, True])
def test_names_of_all_parameters(remat):
  layer, norm, scale = ('kernel', 'bias'), ('scale', 'bias'), ('quant_scale',)
  quantized = (*layer, 'input/quant_scale')
  names = {'': ('cls_token', 'dist_token', 'pos_embed'), 'norm/': norm}
  names |= {f'{name}/': quantized for name in ('patch_embed', 'head', 'head_dist')}
  for block in ('block_0', 'block_1'):
    names |= {f'{block}/norm1/': norm, f'{block}/norm2/': norm, f'{block}/attn/input/': scale}
    names |= {f'{block}/attn/{name}/': layer for name in 'qkv'}
    names |= {f'{block}/{name}/': quantized for name in ('attn/proj', 'mlp/fc1', 'mlp/fc2')}
    product = ('scores/lhs', 'scores/rhs', 'mix/lhs', 'mix/rhs')
    names |= {f'{block}/attn/product/{name}/': scale for name in product}
  found = shapes(TINY.clone(distilled=True, remat=remat, **QUANTIZED), *IMAGE)
  assert set(found) == {'params'}
  assert set(named_leaves(found['params'])) == {a + b for a in names for b in names[a]}
  for name, wanted in ((TINY.first_kernel, 1), (TINY.last_kernel, 2)):
    assert sum(bool(re.fullmatch(name, x)) for x in named_leaves(found['params'])) == wanted


@pytest.mark.parametrize('given', [True, False])
def test_the_model_sets_the_signs(given):
  quantizers = {name: LSQ(bits=4, signed=given) for name in QUANTIZED}
  found = signs(SMALL.clone(distilled=True, **quantizers), *IMAGE)
  assert {name for name, signed in found.items() if not signed} == {'block_0/attn/product/mix/lhs'}
  assert len(found) == 8 + 3


def test_bits_none_everywhere_is_the_plain_network():
  none = {name: LIQ(bits=None) for name in QUANTIZED}
  found = shapes(TINY, *IMAGE)

  def program(model):
    return str(jax.make_jaxpr(functools.partial(model.apply, train=True))(found, X))

  assert jax.tree.structure(shapes(TINY.clone(**none), *IMAGE)) == jax.tree.structure(found)
  assert program(TINY.clone(**none)) == program(TINY)
  assert 'round' not in program(TINY)


@functools.partial(jax.jit, static_argnums=0)
def grads_and_logits(model, params, key):
  def loss(params):
    logits = model.apply({'params': params}, X, train=True, rngs={'dropout': key})
    return jnp.sum(jnp.sin(logits)), logits

  return jax.grad(loss, has_aux=True)(params)


def test_remat_changes_no_value_and_no_gradient_and_every_parameter_learns():
  # With dropout: the second forward pass must drop what the first one did.
  model = TINY.clone(distilled=True, dropout=0.1, attn_dropout=0.1, drop_path=0.1, **QUANTIZED)
  params = random_params(model, *IMAGE)
  plain = grads_and_logits(model, params, KEY)
  again = grads_and_logits(model.clone(remat=True), params, KEY)
  for got, want in zip(*map(jax.tree.leaves, (again, plain)), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  for name, grad in named_leaves(plain[0]).items():
    # A row of a kernel stays where its input rounds to zero in all of the few examples.
    assert np.mean(grad != 0) > (0.6 if name.endswith('kernel') else 0.95), name
    assert np.all(np.isfinite(grad)), name


def test_remat_is_in_the_program():
  def program(model):
    grad = jax.grad(lambda p: model.apply(p, X, train=True).sum())
    return str(jax.make_jaxpr(grad)(shapes(SMALL, *IMAGE)))

  assert 'remat' not in program(SMALL)
  assert 'remat' in program(SMALL.clone(remat=True))


def test_calibration_finds_all_scales_in_one_pass_also_with_remat():
  model = TINY.clone(distilled=True, **QUANTIZED)
  params = random_params(model, *IMAGE)

  def find(model):
    run = jax.jit(lambda p: calibrate(model, {'params': p}, X, train=False))
    return named_leaves(run(params))

  found, before = find(model), named_leaves(params)
  moved = {name for name in found if np.any(found[name] != before[name])}
  assert moved == {name for name in found if name.endswith('quant_scale')}
  for name, x in find(model.clone(remat=True)).items():
    np.testing.assert_allclose(x, found[name], rtol=1e-5, err_msg=name)
  # By hand: the images, and the first block's input, which a norm gives.
  first = 2 * np.mean(np.abs(X)) / 31**0.5
  np.testing.assert_allclose(found['patch_embed/input/quant_scale'], first, rtol=1e-5)
  net = InNumpy(params | {'patch_embed': params['patch_embed'] | {'input': {'quant_scale': first}}})
  x = net.patches(X, 4, FIRST.bits).reshape(4, 6, 12)
  tokens = [np.repeat(net.p[name], 4, axis=0) for name in ('cls_token', 'dist_token')]
  x = net.norm(np.concatenate([*tokens, x], axis=1) + net.p['pos_embed'], 'block_0/norm1', 1e-6)
  want = 2 * np.mean(np.abs(x)) / 7**0.5
  np.testing.assert_allclose(found['block_0/attn/input/quant_scale'], want, rtol=1e-4)


def test_a_quantizer_without_scales():
  model = SMALL.clone(act=DoReFa(bits=4))
  assert not [x for x in named_leaves(shapes(model, *IMAGE)['params']) if 'quant_scale' in x]
  assert [x.shape for x in jax.tree.leaves(jax.eval_shape(
    functools.partial(model.apply, train=False), shapes(model, *IMAGE), X
  ))] == [(4, 5)]  # fmt: skip


@pytest.mark.parametrize('name', ['dropout', 'attn_dropout', 'drop_path'])
def test_what_is_dropped_follows_the_key(name):
  model = SMALL.clone(depth=2, **{name: 0.5})
  variables = {'params': random_params(model, *IMAGE)}
  run = jax.jit(lambda key: model.apply(variables, X, train=True, rngs={'dropout': key}))
  np.testing.assert_array_equal(run(KEY), run(KEY))
  assert np.any(run(KEY) != run(jax.random.key(1)))
  want = SMALL.clone(depth=2).apply(variables, X, train=False)
  np.testing.assert_allclose(model.apply(variables, X, train=False), want, rtol=1e-5)
  with pytest.raises(Exception, match='dropout'):
    model.apply(variables, X, train=True)


def test_drop_path_grows_linearly_over_depth():
  rates = []

  def look(method, args, kwargs, context):
    if isinstance(context.module, StochasticDepth):
      rates.append(context.module.rate)
    return method(*args, **kwargs)

  with nn.intercept_methods(look):
    shapes.__wrapped__(SMALL.clone(depth=5, drop_path=0.2), *IMAGE)
    shapes.__wrapped__(SMALL.clone(depth=1, drop_path=0.2), *IMAGE)
  want = [0, 0, 0.05, 0.05, 0.1, 0.1, 0.15, 0.15, 0.2, 0.2, 0, 0]
  np.testing.assert_allclose(rates, want, atol=1e-12)


@pytest.mark.parametrize('bits', [None, 8])
def test_bfloat16_is_close_to_float32(bits):
  model = TINY.clone(act=LSQ(bits=bits), last_act=LSQ(bits=bits))
  half = model.clone(dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(shapes(half, *IMAGE))} == {jnp.dtype('float32')}
  params = random_params(model, *IMAGE)
  # A grid that is as fine as 8 bits allow, so that few codes change.
  params = map_named(lambda name, x: x / 12 if 'quant_scale' in name else x, params)
  forward = [jax.jit(functools.partial(m.apply, train=False)) for m in (model, half)]
  want, got = (fn({'params': params}, X) for fn in forward)
  assert got.dtype == jnp.bfloat16
  error = np.linalg.norm(got.astype(jnp.float32) - want) / np.linalg.norm(want)
  # Rounding to 8 bits, many times in a row; it also changes a few codes.
  assert 1e-4 < error < (0.03 if bits is None else 0.1)


# Sizes of images.


def test_patches_that_do_not_tile():
  with pytest.raises(ValueError, match=r'8x10 pixels: patches of patch=4'):
    shapes(SMALL, 8, 10, 3)


@pytest.mark.parametrize(
  ('at_first', 'then', 'old'), [((8, 8), (8, 12), '2x2'), ((8, 12), (12, 12), '6')]
)
def test_another_size_than_that_of_the_position_embedding(at_first, then, old):
  message = f'that of {old} patches, and these images have {then[0] // 4}x{then[1] // 4}.*loaded'
  variables = shapes(SMALL, *at_first, 3)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(functools.partial(SMALL.apply, train=False), variables, jnp.zeros((1, *then, 3)))


# The grid is (7 i^2 + 3 i mod 11) / 4 at i = 0, 1, ...; the results are those of timm 1.0.31,
# timm.layers.pos_embed.resample_abs_pos_embed, on PyTorch 2.14.1.
RECORDED = {
  (2, 3): [1.907705, 0.354735, 1.560193, 0.354735, 1.907705, 0.52488],
  (5, 4): [
    2.758484, 1.025103, 0.523135, 1.56727, 1.990157, 0.844259, 0.692873, 1.630903, 0.75, 0.697381,
    1.029934, 1.539179, 0.265441, 1.422726, 1.502142, 0.453901, 0.085856, 1.921497, 1.777181,
    -0.256618,
  ],
}  # fmt: skip


def pattern(count):
  i = np.arange(count)
  return ((7 * i**2 + 3 * i) % 11 / 4).astype(np.float32)


@pytest.mark.parametrize('grid', RECORDED)
def test_recorded_position_embeddings(grid):
  table = np.stack([pattern(10), -2 * pattern(10)], axis=-1)[None]
  got = resize_position_embedding(table, grid, prefix=1)
  assert got.shape == (1, 1 + len(RECORDED[grid]), 2)
  np.testing.assert_array_equal(got[:, :1], table[:, :1])
  np.testing.assert_allclose(got[0, 1:, 0], RECORDED[grid], atol=3e-6)
  np.testing.assert_allclose(got[0, 1:, 1], -2 * np.array(RECORDED[grid]), atol=6e-6)


def test_prefix_and_an_equal_grid_stay_as_they_are():
  table = RNG.normal(size=(1, 2 + 16, 3)).astype(np.float32)
  np.testing.assert_array_equal(resize_position_embedding(table, (4, 4), prefix=2), table)
  moved = resize_position_embedding(jnp.asarray(table, jnp.bfloat16), (2, 8), prefix=2)
  assert moved.dtype == jnp.bfloat16
  np.testing.assert_array_equal(moved[:, :2], jnp.asarray(table[:, :2], jnp.bfloat16))


def test_constants_stay_constant():
  np.testing.assert_allclose(
    resize_grid(jnp.full((49, 2), 3.0), (5, 9)), np.full((45, 2), 3.0), 2e-6
  )


def test_a_grid_that_is_no_square():
  with pytest.raises(ValueError, match='18 entries are not those of a square'):
    resize_position_embedding(jnp.zeros((1, 19, 2)), (3, 3), prefix=1)


def test_a_resized_network_runs():
  params = random_params(SMALL, 8, 8, 3)
  params = params | {'pos_embed': resize_position_embedding(params['pos_embed'], (2, 3), prefix=1)}
  assert SMALL.apply({'params': params}, X, train=False).shape == (4, 5)

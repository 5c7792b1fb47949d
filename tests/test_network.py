"""From settings to a network of each family: what is built, what is refused, what is shifted."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from saq_jax import LIQ, LSQ
from saq_jax._paths import is_embedding, is_norm, named_leaves
from saq_jax.layers import ActQuant
from saq_jax.models import resnet, swin, vit
from saq_jax.models.mobilenetv2 import MobileNetV2, MobileNetV2Cifar
from saq_jax.models.preresnet import PreResNet
from saq_jax.models.resnet import ResNet
from saq_jax.models.swin import Swin
from saq_jax.models.vit import ViT
from saq_jax.training.bounds import ConfigError
from saq_jax.training.build import build_optimizer, build_slot
from saq_jax.training.config import ModelConfig, QuantConfig, SAQConfig, StageConfig
from saq_jax.training.families import READS, RESNET_DEPTHS, SIZES, check_model
from saq_jax.training.network import FLOATING, build_network
from saq_jax.training.state import new_state
from saq_jax.training.step import StepConfig, train_step

FAMILIES = {
  'preresnet': (ModelConfig(), PreResNet, 32),
  'resnet': (ModelConfig(name='resnet'), ResNet, 64),
  'mobilenetv2': (ModelConfig(name='mobilenetv2'), MobileNetV2, 64),
  'mobilenetv2_cifar': (ModelConfig(name='mobilenetv2_cifar'), MobileNetV2Cifar, 32),
  'vit': (ModelConfig(name='vit', size='Ti', depth=2), ViT, 32),
  'deit': (ModelConfig(name='deit', size='Ti', depth=2, distilled=True), ViT, 32),
  'swin': (ModelConfig(name='swin', size='T'), Swin, 32),
}
QUANT = QuantConfig(weights='lsq', acts='lsq', first_act_bits=8, lsq_init='least_squares')


def shapes(network, size):
  images = jnp.zeros((1, size, size, 3))
  return jax.eval_shape(lambda: network.model.init(jax.random.key(0), images, train=False))


def test_every_family_is_looked_at_here():
  assert FAMILIES.keys() == READS.keys()


@pytest.mark.parametrize('family', FAMILIES)
def test_each_family_is_built_with_its_settings(family):
  config, kind, size = FAMILIES[family]
  network = build_network(config, QUANT, 10)
  assert type(network.model) is kind
  params = shapes(network, size)['params']
  chosen = network.quantize.assign(params)
  quantizer = functools.partial(LSQ, init_by='least_squares')
  first, last = (
    [p for p in chosen if re.fullmatch(pattern, p)]
    for pattern in (network.model.first_kernel, network.model.last_kernel)
  )
  assert len(first) == 1
  assert len(last) == (2 if family == 'deit' else 1)
  for path, found in chosen.items():
    assert found == quantizer(bits=8 if path in first + last else 4)
  assert set(chosen) == {p for p in named_leaves(params) if p.endswith('/kernel')}
  # Each layer has a scale of its input; in attention q, k and v share one.
  scales = [p.removesuffix('/quant_scale') for p in named_leaves(params) if 'quant_scale' in p]
  shared = ('/attn/q', '/attn/k', '/attn/v')
  own = [f'{p.removesuffix("/kernel")}/input' for p in chosen]
  own = {p for p in own if not p.removesuffix('/input').endswith(shared)}
  assert own <= set(scales)
  assert {p for p in set(scales) - own if 'attn' not in p} == set()


@pytest.mark.parametrize('family', FAMILIES)
def test_signs_of_activations(family):
  """Images and what transformers multiply may be negative; what follows a ReLU or softmax not."""
  config, _, size = FAMILIES[family]
  network = build_network(config, QUANT, 10)
  found = {}

  def note(next_fn, args, kwargs, context):
    if isinstance(context.module, ActQuant):
      found['/'.join(context.module.path)] = context.module.quantizer.signed
    return next_fn(*args, **kwargs)

  with nn.intercept_methods(note):
    shapes(network, size)
  first = network.model.first_kernel.replace('kernel', 'input')
  assert found[first] is True
  transformer = family in ('vit', 'deit', 'swin')
  for path, signed in found.items():
    if path != first:
      assert signed == (transformer and not path.endswith('mix/lhs')), path


def test_full_precision_has_no_scales():
  for config, _, size in FAMILIES.values():
    params = shapes(build_network(config, FLOATING, 10), size)['params']
    assert not [path for path in named_leaves(params) if 'quant_scale' in path]


@pytest.mark.parametrize('family', FAMILIES)
def test_settings_reach_the_model(family):
  config, _, _ = FAMILIES[family]
  config = dataclasses.replace(config, norm_eps=1e-3, remat=True, dtype='bfloat16')
  model = build_network(config, QuantConfig(), 10).model
  assert (model.norm_eps, model.remat, model.dtype) == (1e-3, True, jnp.bfloat16)
  if 'dropout' in READS[family]:
    drops = {'dropout': 0.1, 'attn_dropout': 0.2, 'drop_path': 0.3}
    model = build_network(dataclasses.replace(config, **drops), QuantConfig(), 10).model
    assert {name: getattr(model, name) for name in drops} == drops


def test_defaults_are_the_families_own():
  assert build_network(FAMILIES['vit'][0], QUANT, 10).model.norm_eps == 1e-6
  assert build_network(FAMILIES['resnet'][0], QUANT, 10).model.norm_eps == 1e-5
  assert build_network(ModelConfig(name='mobilenetv2'), QUANT, 10).model.padding == 'torch'
  assert build_network(ModelConfig(), QuantConfig(), 10).model.act == LIQ(bits=4, signed=False)
  model = build_network(ModelConfig(name='vit', size='B'), QUANT, 10).model
  assert (model.width, model.depth, model.heads, model.patch) == (768, 12, 12, 16)


@pytest.mark.parametrize(
  ('model', 'words'),
  [
    (ModelConfig(name='resnet', depth=19), r'depth=19: a ResNet has 18, 34'),
    (ModelConfig(depth=9), r'depth=9: must be 6 n \+ 2'),
    (ModelConfig(name='vit'), r"size=None: vit has the sizes 'Ti', 'S', 'B', 'L'"),
    (ModelConfig(name='swin', size='L'), r"size='L': swin has the sizes 'T', 'S', 'B'"),
    (ModelConfig(name='resnet', width=8), r'width=8: resnet does not read it; it reads depth'),
    (ModelConfig(name='vit', size='B', distilled=True), r'distilled=True: vit does not read it'),
    (ModelConfig(dropout=0.1), r'dropout=0\.1: preresnet does not read it'),
    (ModelConfig(name='mobilenetv2_cifar', padding='same'), r"padding='same'.*does not read it"),
  ],
)
def test_settings_that_a_family_does_not_read_are_refused(model, words):
  with pytest.raises(ConfigError, match=f'config.model.{words}'):
    check_model(model)


def test_the_sizes_that_settings_may_name_are_those_of_the_models():
  """They are written twice, so that a setting is refused before a network is imported."""
  assert SIZES['vit'] == tuple(vit.SIZES)
  assert SIZES['swin'] == tuple(swin.SIZES)
  assert set(SIZES['deit']) < set(vit.SIZES)
  assert tuple(resnet._BLOCKS) == RESNET_DEPTHS


@pytest.mark.parametrize('family', ['resnet', 'vit', 'deit', 'swin'])
def test_which_leaves_are_norms_and_embeddings(family):
  config, _, size = FAMILIES[family]
  params = shapes(build_network(config, FLOATING, 10), size)['params']
  leaves = named_leaves(params)
  # A norm is a module with a 'scale'; an embedding is neither of a norm nor beside a kernel.
  norms = {p.removesuffix('/scale') for p in leaves if p.endswith('/scale')}
  products = {p.removesuffix('/kernel') for p in leaves if p.endswith('/kernel')}
  assert {p for p in leaves if is_norm(f'model/{p}')} == {
    p for p in leaves if p.rpartition('/')[0] in norms
  }
  assert {p for p in leaves if is_embedding(f'model/{p}')} == {
    p for p in leaves if p.rpartition('/')[0] not in norms | products
  }


def test_norms_and_embeddings_can_be_left_unshifted():
  """The norm of the perturbation counts exactly the leaves that are shifted."""
  config, _, _ = FAMILIES['deit']
  network = build_network(dataclasses.replace(config, width=24, heads=2, depth=1), QUANT, 4)
  optimizer, _ = build_optimizer(StageConfig(), 1.0)
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  norms = {}
  for left_out in ('', 'norms', 'embeddings'):
    settings = {f'perturb_{left_out}': False} if left_out else {}
    slot = build_slot(network, SAQConfig(rho=0.1, **settings), 1.0)
    state = jax.jit(functools.partial(new_state, network, optax.chain(slot, optimizer), 0))(images)
    g = jax.tree.map(jnp.ones_like, state.params)
    z = network.quantize(state.params)

    def grad_fn(point, z=z, left_out=left_out):
      moved = {p: bool(jnp.any(x != named_leaves(z)[p])) for p, x in named_leaves(point).items()}
      for path, shifted in moved.items():
        group = 'norms' if is_norm(path) else 'embeddings' if is_embedding(path) else 'products'
        scale = 'quant_scale' in path or path.startswith('scales')
        assert shifted == (not scale and group != left_out), path
      return jax.tree.map(jnp.ones_like, point), None

    _, after = slot.update(g, slot.init(state.params), state.params, grad_fn=grad_fn)
    norms[left_out] = float(after.grad_norm)
  assert norms['norms'] < norms['']
  assert norms['embeddings'] < norms['']


def test_both_passes_drop_the_same_units():
  """With rho = 0 the second pass is the first one again, dropout included."""
  config = dataclasses.replace(FAMILIES['vit'][0], width=24, heads=2, depth=1, dropout=0.5)
  network = build_network(dataclasses.replace(config, attn_dropout=0.3, drop_path=0.5), QUANT, 4)
  slot = build_slot(network, SAQConfig(rho=0.0), 1.0)
  optimizer, lr = build_optimizer(StageConfig(lr=0.0, scale_lr=0.0, schedule='constant'), 1.0)
  tx = optax.chain(slot, optimizer)
  state = jax.jit(functools.partial(new_state, network, tx, 0))(jnp.ones((2, 32, 32, 3)))
  batch = {
    'image': jax.random.randint(jax.random.key(1), (2, 32, 32, 3), 0, 255).astype(jnp.uint8),
    'label': jnp.array([0, 1]),
  }
  step = jax.jit(
    functools.partial(
      train_step, network=network, tx=tx, lr=lr, config=StepConfig((0.5,), (0.5,), 0, False)
    )
  )
  state, first = step(state, batch)
  _, second = step(state, batch)
  for metrics in (first, second):
    assert metrics['loss'] == metrics['loss_perturbed']
  assert first['loss'] != second['loss']  # another step drops other units

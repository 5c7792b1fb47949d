"""Two whole SAQ steps, W4A4, of the authors' larger networks, against their algorithm in PyTorch.

`make_authors_record` made the recorded figures, in float64.
"""

import functools

import authors_networks as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from saq_jax import LIQ, QuantRule, weight_quantizer
from saq_jax._paths import named_leaves
from saq_jax.models.mobilenetv2 import MobileNetV2, MobileNetV2Cifar
from saq_jax.models.resnet import ResNet
from saq_jax.training.build import build_optimizer, build_slot
from saq_jax.training.config import SAQConfig, StageConfig
from saq_jax.training.network import Network
from saq_jax.training.state import TrainState
from saq_jax.training.step import StepConfig, train_on

MODELS = {
  'resnet18': functools.partial(ResNet, depth=18),
  'resnet50': functools.partial(ResNet, depth=50),
  'mobilenetv2': MobileNetV2,
  'mobilenetv2_cifar': MobileNetV2Cifar,
}
LOSS_RTOL, CHANGE_RTOL = 1e-11, 1e-8


def network_of(case):
  """W4A4 between ends of 8 bits."""
  model = MODELS[case](
    num_classes=nets.CLASSES,
    act=LIQ(bits=4, signed=False),
    last_act=LIQ(bits=8, signed=False),
  )
  rules = [
    QuantRule(model.first_kernel, LIQ(bits=8, normalize=True)),
    QuantRule(model.last_kernel, LIQ(bits=8)),
    QuantRule(r'.*/kernel', LIQ(bits=4, normalize=True)),
  ]
  return Network(model, weight_quantizer(rules))


def shapes_of(case, network):
  """Of our variables by kind and path: {('model', path): shape}."""
  size = nets.SIZES[case]
  x = jnp.zeros((1, size, size, 3))
  found = jax.eval_shape(lambda: network.model.init(jax.random.key(0), x, train=False))
  scales = jax.eval_shape(network.quantize.init, found['params'])['scales']
  kinds = {'model': found['params'], 'scales': scales, 'batch_stats': found['batch_stats']}
  return {(k, path): x.shape for k, tree in kinds.items() for path, x in named_leaves(tree).items()}


def first_values(case, record, shapes):
  """(params, batch_stats) as both sides begin."""
  flat = {'model': {}, 'scales': {}, 'batch_stats': {}}
  for name in record[f'{case}/names']:
    if place := nets.our_path(name):
      value = nets.first_value(case, name, nets.their_shape(shapes[place]))
      flat[place[0]][place[1]] = jnp.asarray(nets.our_layout(value).reshape(shapes[place]))
  model, stats = (traverse_util.unflatten_dict(flat[k], sep='/') for k in ('model', 'batch_stats'))
  return {'model': model, 'scales': flat['scales']}, stats


def train(case, network, params, stats):
  """The state after all steps, and the metrics of each."""
  saq_config = SAQConfig(rho=0.4, perturb_act_scales=True, batch_stats_from_both=True)
  recipe = StageConfig(lr=0.01, scale_lr=0.01, weight_decay=1e-4, schedule='constant')
  optimizer, lr = build_optimizer(recipe, steps_per_epoch=1)
  tx = optax.chain(build_slot(network, saq_config, steps_per_epoch=1), optimizer)
  config = StepConfig(mean=(0.0,), std=(1.0,), batch_stats_from_both=True)
  step = jax.jit(functools.partial(train_on, network=network, tx=tx, lr=lr, config=config))
  zero = jnp.zeros((), jnp.int32)
  state, metrics = TrainState(zero, zero, params, stats, tx.init(params)), []
  for t in range(nets.STEPS):
    images, labels = nets.batch(case, t)
    state, figures = step(state, jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.asarray(labels))
    metrics.append(figures)
  return state, metrics


@pytest.mark.parametrize('case', MODELS)
def test_two_steps_are_those_of_the_authors_algorithm(case):
  record = np.load(nets.RECORD)
  with jax.enable_x64(True):
    network = network_of(case)
    shapes = shapes_of(case, network)
    params, stats = first_values(case, record, shapes)
    state, metrics = train(case, network, params, stats)
  for what in ('loss', 'loss_perturbed', 'grad_norm'):
    got = [m[what] for m in metrics]
    np.testing.assert_allclose(got, record[f'{case}/{what}'], rtol=LOSS_RTOL, err_msg=what)
  begin = named_leaves(params | {'batch_stats': stats})
  end = named_leaves(state.params | {'batch_stats': state.batch_stats})
  for name, (norm, along) in zip(record[f'{case}/names'], record[f'{case}/changes']):
    if place := nets.our_path(name):
      path = '/'.join(place)
      change = np.asarray(end[path]) - np.asarray(begin[path])
      d = nets.our_layout(nets.direction(case, name, nets.their_shape(change.shape)))
      ours = np.linalg.norm(change), np.sum(change * d.reshape(change.shape))
      np.testing.assert_allclose(ours, (norm, along), rtol=0, atol=CHANGE_RTOL * norm, err_msg=name)
      assert norm > 0, name


@pytest.mark.parametrize('case', MODELS)
def test_every_tensor_of_either_side_is_compared(case):
  names = np.load(nets.RECORD)[f'{case}/names']
  places = {name: nets.our_path(name) for name in names}
  assert [n for n, place in places.items() if place is None] == ['conv1.activation_clip_value']
  found = [place for place in places.values() if place is not None]
  assert len(found) == len(set(found))
  assert set(found) == shapes_of(case, network_of(case)).keys()

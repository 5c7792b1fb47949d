"""Steps that see a part of the batch, or take one gradient, against their gradients written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import one_device
from small_network import NETWORK, make_batch, normalized, start, written_out

from saq_jax._paths import is_quant_scale, named_leaves
from saq_jax.training.build import build_slot
from saq_jax.training.config import SAQConfig
from saq_jax.training.gradients import first_part
from saq_jax.training.passes import Groups
from saq_jax.training.sharding import make_mesh, over_batch, replicated
from saq_jax.training.step import StepConfig, train_on
from saq_jax.training.strategy_config import StrategyConfig

RHO, LR = 0.5, 0.1
SGD = optax.sgd(LR)
GRADIENT = jax.jit(jax.grad(written_out, has_aux=True))


def parts_of(**strategy):
  slot = build_slot(NETWORK, SAQConfig(rho=RHO), 1.0, StrategyConfig(**strategy), total_steps=10)
  return slot, {'tx': optax.chain(slot, SGD), 'lr': lambda _: LR, 'network': NETWORK}


def examples(size=16):
  batch = make_batch(size)
  return jnp.asarray(normalized(batch['image']), jnp.float32), jnp.asarray(batch['label'])


def moved_point(z, d):
  """z + rho d / |d|, the scales left out."""
  square = [np.sum(x**2) for path, x in named_leaves(d).items() if not is_quant_scale(path)]
  point = jax.tree.map(lambda x, d: x + RHO * d / np.sqrt(np.sum(square)), z, d)
  point['model']['fc']['input'], point['scales'] = z['model']['fc']['input'], z['scales']
  return point


def stepped(parts, state, mesh=None, steps=1, **settings):
  mesh = mesh or one_device()
  config = StepConfig((0.4,), (0.3,), shards=mesh.size, **settings)
  split = over_batch(mesh)
  step = jax.jit(
    functools.partial(train_on, config=config, **parts),
    in_shardings=(replicated(mesh), split, split),
    out_shardings=replicated(mesh),
  )
  metrics = None
  for _ in range(steps):
    state, metrics = step(state, *examples())
  return jax.device_get((state, metrics))


def assert_stepped(state, new, z, g2, rtol=2e-4):
  (sharp,) = jax.vjp(NETWORK.quantize, state.params)[1](g2)
  old, after = named_leaves(state.params), named_leaves(new.params)
  for path, g in named_leaves(sharp).items():
    np.testing.assert_allclose(after[path], old[path] - LR * g, rtol, atol=1e-5, err_msg=path)


@pytest.mark.parametrize('devices', [1, 8])
def test_the_second_gradient_is_that_of_the_hardest_examples(devices):
  _, parts = parts_of()
  mesh = one_device() if devices == 1 else make_mesh()
  state, (images, labels) = start(parts), examples()
  new, metrics = stepped(parts, state, mesh, second_examples=0.4)
  z = NETWORK.quantize(state.params)
  g, (_, clean, found) = GRADIENT(z, None, images, labels)
  point = moved_point(z, g)
  _, (_, perturbed, _) = GRADIENT(point, None, images, labels)
  rise = np.asarray(perturbed - clean).reshape(devices, -1)
  count = int(np.ceil(0.4 * rise.shape[1]))
  chosen = np.argsort(-rise, axis=1)[:, :count] + (np.arange(devices) * rise.shape[1])[:, None]
  assert chosen.size < 16
  g2, _ = GRADIENT(point, None, images[chosen.ravel()], labels[chosen.ravel()])
  assert_stepped(state, new, z, g2)
  np.testing.assert_allclose(metrics['loss'], clean.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['loss_perturbed'], perturbed.mean(), rtol=1e-5)
  # Running statistics are those of the whole batch at z.
  np.testing.assert_allclose(
    new.batch_stats['bn']['mean'], 0.1 * found['bn']['mean'], rtol=1e-4, atol=1e-7
  )


@pytest.mark.parametrize('devices', [1, 8])
def test_the_perturbation_may_be_that_of_a_part_of_the_batch(devices):
  _, parts = parts_of()
  mesh = one_device() if devices == 1 else make_mesh()
  state, (images, labels) = start(parts), examples()
  new, metrics = stepped(parts, state, mesh, first_examples=0.5)
  some = np.arange(16).reshape(devices, -1)[:, : 8 // devices].ravel()
  z = NETWORK.quantize(state.params)
  g, (_, clean, _) = GRADIENT(z, None, images[some], labels[some])
  point = moved_point(z, g)
  g2, (_, perturbed, found) = GRADIENT(point, None, images, labels)
  assert_stepped(state, new, z, g2)
  np.testing.assert_allclose(metrics['loss'], clean.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['loss_perturbed'], perturbed.mean(), rtol=1e-5)
  # Only the second pass sees the whole batch.
  np.testing.assert_allclose(
    new.batch_stats['bn']['mean'], 0.1 * found['bn']['mean'], rtol=1e-4, atol=1e-7
  )


def test_at_least_one_example_of_each_share_is_taken():
  assert first_part(np.arange(16), 0.01, 4).tolist() == [0, 4, 8, 12]
  assert first_part(np.arange(16), 1.0, 4).tolist() == list(range(16))


def test_along_the_momentum_a_step_takes_one_gradient():
  _, parts = parts_of(name='momentum', decay=0.5)
  state, (images, labels) = start(parts), examples()
  middle, _ = stepped(parts, state, first_examples=0.0)
  new, metrics = stepped(parts, state, steps=2, first_examples=0.0)
  z0, z1 = (NETWORK.quantize(s.params) for s in (state, middle))
  first, _ = GRADIENT(z0, None, images, labels)
  assert_stepped(state, middle, z0, first)
  second, (right, losses, _) = GRADIENT(moved_point(z1, first), None, images, labels)
  assert_stepped(middle, new, z1, second)
  np.testing.assert_allclose(metrics['loss'], losses.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['accuracy'], right.mean())
  assert 'loss_perturbed' not in metrics
  assert metrics['second'] == 0
  # A forward and a backward pass: as many convolutions as plain training has.
  assert convolutions(parts, first_examples=0.0) == convolutions(plain())


def plain():
  slot = build_slot(NETWORK, None, 1.0)
  return {'tx': optax.chain(slot, SGD), 'lr': lambda _: LR, 'network': NETWORK}


def convolutions(parts, **settings):
  config = StepConfig((0.4,), (0.3,), **settings)
  step = jax.jit(functools.partial(train_on, config=config, **parts))
  return step.lower(start(parts), *examples()).as_text().count('stablehlo.convolution')


def test_a_full_step_has_twice_the_convolutions():
  assert convolutions(parts_of()[1]) == 2 * convolutions(plain())


def test_statistics_of_both_passes_where_the_second_was_skipped():
  _, parts = parts_of(name='interval', period=2)
  state, (images, labels) = start(parts), examples()
  middle, first = stepped(parts, state, batch_stats_from_both=True)
  new, second = stepped(parts, state, steps=2, batch_stats_from_both=True)
  assert (first['second'], second['second']) == (1, 0)
  _, (_, _, found) = GRADIENT(NETWORK.quantize(middle.params), None, images, labels)
  want = 0.9 * middle.batch_stats['bn']['mean'] + 0.1 * found['bn']['mean']
  np.testing.assert_allclose(new.batch_stats['bn']['mean'], want, rtol=1e-4, atol=1e-7)
  z = NETWORK.quantize(state.params)
  g, (_, _, clean) = GRADIENT(z, None, images, labels)
  _, (_, _, after) = GRADIENT(moved_point(z, g), None, images, labels)
  want = 0.9 * 0.1 * clean['bn']['mean'] + 0.1 * after['bn']['mean']
  np.testing.assert_allclose(middle.batch_stats['bn']['mean'], want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('name', ['interval', 'looksam', 'momentum', 'adaptive', 'random'])
def test_strategies_go_with_a_perturbation_a_device(name):
  """On one device that has one group of the whole batch, it is the plain strategy."""
  slot, parts = parts_of(name=name, **({'period': 2} if name in ('interval', 'looksam') else {}))
  first = {'first_examples': 0.0} if name == 'momentum' else {}
  state, mesh = start(parts), one_device()
  want, metrics = stepped(parts, state, steps=3, **first)
  grouped = parts | {'groups': Groups(slot, SGD, mesh)}
  new, again = stepped(grouped, state, steps=3, **first)
  for name, x in metrics.items():
    np.testing.assert_allclose(again[name], x, rtol=1e-3, atol=1e-5, err_msg=name)
  after = named_leaves(new.params)
  for path, x in named_leaves(want.params).items():
    np.testing.assert_allclose(after[path], x, rtol=1e-3, atol=1e-4, err_msg=path)
  # Over eight, each with its own, it runs and keeps its types.
  eight = parts | {'groups': Groups(slot, SGD, make_mesh())}
  new, metrics = stepped(eight, state, make_mesh(), steps=2, **first)
  assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
  assert np.isfinite(list(metrics.values())).all()

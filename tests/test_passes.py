"""Gradients in parts and by groups, against independent loops over the examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import one_device
from small_network import CLASSES, NETWORK, make_batch, normalized, start, written_out

from saq_jax import LSQ, QuantRule, weight_quantizer
from saq_jax._paths import is_quant_scale, named_leaves
from saq_jax.models.vit import ViT
from saq_jax.training.build import build_slot
from saq_jax.training.config import SAQConfig
from saq_jax.training.network import Network
from saq_jax.training.passes import Groups, in_parts
from saq_jax.training.sharding import make_mesh, over_batch, replicated
from saq_jax.training.state import new_state
from saq_jax.training.step import StepConfig, train_on

RHO = 0.5
CONFIG = StepConfig((0.4,), (0.3,))
SGD = optax.sgd(1.0)


def parts_of(network, saq=True):
  slot = build_slot(network, SAQConfig(rho=RHO) if saq else None, 1.0)
  return slot, {'tx': optax.chain(slot, SGD), 'lr': lambda _: 1.0, 'network': network}


def sharp_gradient(params, images, labels):
  """SAQ's gradient of these examples alone, written out again."""
  z, pullback = jax.vjp(NETWORK.quantize, params)
  gradient = jax.grad(written_out, has_aux=True)
  g, _ = gradient(z, None, images, labels)
  moved = {p: x for p, x in named_leaves(g).items() if not is_quant_scale(p)}
  norm = np.sqrt(sum(np.sum(np.square(x)) for x in moved.values()))
  point = jax.tree.map(lambda x, d: x + RHO * d / norm, z, g)
  point['model']['fc']['input'], point['scales'] = z['model']['fc']['input'], z['scales']
  g2, _ = gradient(point, None, images, labels)
  return pullback(g2)[0], norm


def grouped(size, mesh, **how):
  slot, parts = parts_of(NETWORK)
  state, batch = start(parts), make_batch(16)
  images = jnp.asarray(normalized(batch['image']), jnp.float32)
  step = functools.partial(
    train_on, config=CONFIG, groups=Groups(slot, SGD, mesh, size), **parts, **how
  )
  split = over_batch(mesh)
  compiled = jax.jit(
    step,
    in_shardings=(replicated(mesh), split, split),
    out_shardings=replicated(mesh),
  )
  new, metrics = compiled(state, images, batch['label'])
  # Else a second step would be compiled again, and no checkpoint of it could be read.
  assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
  return state, images, batch['label'], jax.device_get((new, metrics))


@pytest.mark.parametrize(
  ('size', 'devices'), [(None, 8), (None, 1), (4, 1), (1, 8), (2, 1)], ids=str
)
def test_a_perturbation_a_group_is_an_independent_loop_over_the_groups(size, devices):
  mesh = make_mesh() if devices == 8 else one_device()
  state, images, labels, (new, metrics) = grouped(size, mesh)
  length = size or 16 // devices
  found = [
    sharp_gradient(state.params, images[i : i + length], labels[i : i + length])
    for i in range(0, 16, length)
  ]
  mean = jax.tree.map(lambda *x: sum(x) / len(x), *[g for g, _ in found])
  old, after = named_leaves(state.params), named_leaves(new.params)
  for path, g in named_leaves(mean).items():
    np.testing.assert_allclose(after[path], old[path] - g, rtol=2e-4, atol=3e-5, err_msg=path)
  np.testing.assert_allclose(metrics['grad_norm'], np.mean([n for _, n in found]), rtol=1e-4)
  flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(mean)])
  np.testing.assert_allclose(metrics['sharp_grad_norm'], np.linalg.norm(flat), rtol=1e-4)


def test_groups_may_be_added_up_from_parts():
  # Without norms over the batch, and with any number of devices, the parts do not show.
  network, mesh = small_vit(), make_mesh()
  slot, parts = parts_of(network)
  images = np.random.default_rng(2).normal(size=(32, 8, 8, 3)).astype(np.float32)
  labels = np.arange(32, dtype=np.int32) % CLASSES
  state = new_state(network, parts['tx'], 0, images)
  split = over_batch(mesh)

  def after(accumulate):
    config = StepConfig((0.4,), (0.3,), accumulate=accumulate, shards=8)
    step = jax.jit(
      functools.partial(train_on, config=config, groups=Groups(slot, SGD, mesh, 2), **parts),
      in_shardings=(replicated(mesh), split, split),
      out_shardings=replicated(mesh),
    )
    return jax.device_get(step(state, images, labels)[0].params)

  whole, added = after(1), named_leaves(after(2))
  for path, x in named_leaves(whole).items():
    np.testing.assert_allclose(added[path], x, rtol=1e-4, atol=1e-5, err_msg=path)


def test_groups_differ_from_one_perturbation():
  _, _, _, (_, one) = grouped(16, one_device())
  _, _, _, (_, many) = grouped(4, one_device())
  assert abs(one['sharp_grad_norm'] - many['sharp_grad_norm']) > 1e-3


# Gradients added up from parts.


def small_vit():
  """A network without norms over the batch."""
  # By default LSQ's gradient scale counts the examples that go through together.
  act = LSQ(bits=4, grad_scale='feature')
  acts = {'act': act, 'last_act': act, 'first_act': act}
  model = ViT(num_classes=CLASSES, patch=4, width=8, depth=1, heads=2, **acts)
  return Network(model, weight_quantizer([QuantRule('.*kernel', LSQ(bits=4))]))


@pytest.mark.parametrize('saq', [False, True], ids=['qat', 'saq'])
@pytest.mark.parametrize(('count', 'devices'), [(2, 8), (4, 1)])
def test_accumulated_gradients_are_those_of_the_whole_batch(count, devices, saq):
  network = small_vit()
  mesh = make_mesh() if devices == 8 else one_device()
  _, parts = parts_of(network, saq)
  rng = np.random.default_rng(1)
  images = rng.normal(size=(16, 8, 8, 3)).astype(np.float32)
  labels = rng.integers(0, CLASSES, 16).astype(np.int32)
  state = new_state(network, parts['tx'], 0, images)
  split = over_batch(mesh)

  def after(accumulate):
    config = StepConfig((0.4,), (0.3,), accumulate=accumulate, shards=devices)
    step = jax.jit(
      functools.partial(train_on, config=config, **parts),
      in_shardings=(replicated(mesh), split, split),
      out_shardings=replicated(mesh),
    )
    new, metrics = step(state, images, labels)
    return jax.device_get((new.params, metrics))

  (whole, metrics), (added, again) = after(1), after(count)
  for name, x in metrics.items():
    np.testing.assert_allclose(again[name], x, rtol=1e-4, atol=1e-6, err_msg=name)
  added = named_leaves(added)
  for path, x in named_leaves(whole).items():
    np.testing.assert_allclose(added[path], x, rtol=1e-4, atol=1e-5, err_msg=path)


def test_the_parts_of_a_batch_have_pieces_of_every_share():
  parts = np.asarray(in_parts(np.arange(24), 3, 2))
  assert parts.tolist() == [
    [0, 1, 2, 3, 12, 13, 14, 15],
    [4, 5, 6, 7, 16, 17, 18, 19],
    [8, 9, 10, 11, 20, 21, 22, 23],
  ]
  assert sorted(np.ravel(parts)) == list(range(24))

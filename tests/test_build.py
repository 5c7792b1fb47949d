"""What is built from settings: rules, schedules and optimizers against formulas in NumPy."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saq_jax import LIQ, LSQ, PACT, DoReFa, QuantRule, saq, weight_quantizer
from saq_jax._paths import map_named, named_leaves
from saq_jax.training.build import build_optimizer, build_slot, total_steps
from saq_jax.training.config import ModelConfig, QuantConfig, SAQConfig, StageConfig
from saq_jax.training.network import FLOATING, Network, build_network

SMALL = ModelConfig(depth=8, width=4)
BITS = QuantConfig(bits=3, act_bits=4, first_bits=6, last_bits=7)
RNG = np.random.default_rng(0)


def model_shapes(network):
  make = functools.partial(network.model.init, train=False)
  return jax.eval_shape(make, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))['params']


# Networks.


def test_quantizer_of_each_weight():
  network = build_network(SMALL, BITS, num_classes=10)
  blocks = [f'layer{i}_0/{conv}' for i in (1, 2, 3) for conv in ('conv1', 'conv2')]
  blocks += ['layer2_0/downsample', 'layer3_0/downsample']
  want = {f'{name}/kernel': LIQ(bits=3, normalize=True) for name in blocks}
  want |= {'conv/kernel': LIQ(bits=6, normalize=True), 'fc/kernel': LIQ(bits=7)}
  assert network.quantize.assign(model_shapes(network)) == want
  assert network.model.act == LIQ(bits=4, signed=False)
  assert network.model.last_act == LIQ(bits=7, signed=False)


def test_the_defaults_are_8_4_and_8_bits():
  quant = QuantConfig()
  assert (quant.first_bits, quant.bits, quant.act_bits, quant.last_bits) == (8, 4, 4, 8)


@pytest.mark.parametrize(
  ('name', 'kind'), [('lsq', LSQ), ('liq', LIQ), ('pact', PACT), ('dorefa', DoReFa)]
)
def test_quantizers_by_name(name, kind):
  network = build_network(SMALL, dataclasses.replace(BITS, weights=name), num_classes=10)
  chosen = network.quantize.assign(model_shapes(network)).values()
  assert {(type(q), q.signed) for q in chosen} == {(kind, True)}
  assert type(network.model.act) is LIQ
  network = build_network(SMALL, dataclasses.replace(BITS, acts=name), num_classes=10)
  assert network.model.act == kind(bits=4, signed=False)
  assert {type(q) for q in network.quantize.assign(model_shapes(network)).values()} == {LIQ}


def test_floating_is_the_identity_without_scales():
  network = build_network(SMALL, FLOATING, num_classes=10)
  model = jax.tree.map(lambda s: RNG.normal(size=s.shape), model_shapes(network))
  params = network.quantize.init(model)
  assert not [path for path in named_leaves(params) if 'scales' in path or 'quant_scale' in path]
  jax.tree.map(np.testing.assert_array_equal, network.quantize(params)['model'], model)


def test_networks_of_equal_settings_are_equal_and_hash_alike():
  one, two = (build_network(SMALL, BITS, num_classes=10) for _ in range(2))
  assert (one, hash(one)) == (two, hash(two))
  assert one != build_network(SMALL, FLOATING, num_classes=10)


@pytest.mark.parametrize('name', ['float32', 'bfloat16'])
def test_dtype_of_the_computation_and_of_the_parameters(name):
  network = build_network(dataclasses.replace(SMALL, dtype=name), BITS, num_classes=10)
  make = functools.partial(network.model.init_with_output, train=False)
  logits, variables = jax.eval_shape(make, jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
  assert (logits.shape, logits.dtype) == ((2, 10), jnp.dtype(name))
  assert {s.dtype for s in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


# Schedules.


def test_cosine_after_a_linear_rise():
  stage = StageConfig(epochs=5, lr=0.3, schedule='cosine', warmup_epochs=1)
  _, lr = build_optimizer(stage, steps_per_epoch=4)
  for step in range(21):
    want = (step + 1) / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 16)) / 2
    np.testing.assert_allclose(lr(step), 0.3 * want, rtol=1e-5, atol=1e-8)


def test_steps_at_the_milestones():
  stage = StageConfig(epochs=10, lr=0.3, schedule='step', milestones=(4, 6.5), warmup_epochs=1)
  _, lr = build_optimizer(stage, steps_per_epoch=2)
  want = [0.15, 0.3, *[0.3] * 6, *[0.03] * 5, *[0.003] * 7]
  np.testing.assert_allclose([lr(step) for step in range(20)], want, rtol=1e-5)


def test_constant():
  _, lr = build_optimizer(StageConfig(lr=0.3, schedule='constant'), steps_per_epoch=2.5)
  assert lr(0) == lr(10_000) == 0.3


@pytest.mark.parametrize(('epochs', 'per_epoch', 'want'), [(3, 2.5, 8), (0.5, 10, 5), (0.01, 2, 1)])
def test_number_of_steps(epochs, per_epoch, want):
  assert total_steps(StageConfig(epochs=epochs), per_epoch) == want


# Optimizers.

LAYER = {'kernel': RNG.normal(size=(2, 3)), 'bias': RNG.normal(size=3)}
PARAMS = {
  'model': {'a': LAYER | {'input': {'quant_scale': RNG.normal()}}},
  'scales': {'a/kernel': 0.05},  # Which clips some of the kernel.
}
SCALES = {'model/a/input/quant_scale', 'scales/a/kernel'}


def train(stage, steps_per_epoch, steps=4):
  """Parameters after each step, from fixed gradients, and those gradients; in float64."""
  with jax.enable_x64(True):
    optimizer, _ = build_optimizer(stage, steps_per_epoch)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    rng, grads, trail = np.random.default_rng(1), [], []
    for _ in range(steps):
      g = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), PARAMS)
      updates, state = optimizer.update(jax.tree.map(jnp.asarray, g), state, params)
      params = optax.apply_updates(params, updates)
      grads.append(named_leaves(g))
      trail.append(named_leaves(jax.tree.map(np.asarray, params)))
  return trail, grads


@pytest.mark.parametrize('decay', ['all', 'kernels'])
def test_sgd_is_pytorchs(decay):
  rates = {'lr': 0.3, 'scale_lr': 0.07, 'schedule': 'step', 'milestones': (2,)}
  stage = StageConfig(**rates, momentum=0.8, weight_decay=0.2, decay=decay)
  trail, grads = train(stage, steps_per_epoch=1)
  for path, p in named_leaves(PARAMS).items():
    decayed = 0.2 if decay == 'all' or path == 'model/a/kernel' else 0.0
    top, buffer = 0.07 if path in SCALES else 0.3, 0.0
    for step in range(4):
      g = grads[step][path] + decayed * p
      buffer = 0.8 * buffer + g
      p = p - top * (1 if step < 2 else 0.1) * (g + 0.8 * buffer)
      np.testing.assert_allclose(trail[step][path], p, rtol=1e-7, atol=1e-9, err_msg=path)


@pytest.mark.parametrize('decay', ['all', 'kernels'])
def test_adamw_is_its_formula(decay):
  rates = {'lr': 0.3, 'scale_lr': 0.07, 'schedule': 'constant'}
  stage = StageConfig(**rates, optimizer='adamw', weight_decay=0.2, decay=decay)
  trail, grads = train(stage, steps_per_epoch=1)
  for path, p in named_leaves(PARAMS).items():
    decayed = 0.2 if decay == 'all' or path == 'model/a/kernel' else 0.0
    m = v = 0.0
    for step in range(4):
      g = grads[step][path]
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
      m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
      p = p - (0.07 if path in SCALES else 0.3) * (m_hat / (np.sqrt(v_hat) + 1e-8) + decayed * p)
      np.testing.assert_allclose(trail[step][path], p, rtol=1e-7, atol=1e-9, err_msg=path)


# Perturbation.

NETWORK = Network(nn.Dense(3), weight_quantizer([QuantRule('a/kernel', LSQ(bits=4))]))


def slot_step(*links, steps=1):
  """A chain's updates and states, and the points of the second gradients; gradients 1, 2, ..."""
  tx = optax.chain(*links)
  params = jax.tree.map(lambda x: jnp.asarray(x, float), PARAMS)
  state, out, seen = tx.init(params), [], []
  values = iter(range(1, 20))
  g = jax.tree.map(lambda x: jnp.full(x.shape, next(values), float), params)

  def grad_fn(z):
    seen.append(named_leaves(z))
    return g, 'aux'

  for _ in range(steps):
    updates, state = tx.update(g, state, params, grad_fn=grad_fn)
    out.append((named_leaves(updates), state))
  return out, seen, named_leaves(g), named_leaves(NETWORK.quantize(params))


@pytest.mark.parametrize('of_weights', [False, True])
@pytest.mark.parametrize('of_acts', [False, True])
def test_which_scales_are_perturbed(of_weights, of_acts):
  """In case 2, where the weights are quantized, with their scales, after the shift."""
  config = SAQConfig(rho=0.5, case=2, perturb_weight_scales=of_weights, perturb_act_scales=of_acts)
  [(_, (slot,))], (point,), g, _ = slot_step(build_slot(NETWORK, config, 1))
  params = jax.tree.map(lambda x: jnp.asarray(x, float), PARAMS)
  _, pullback = jax.vjp(NETWORK.quantize, params)
  p = named_leaves(pullback(map_named(lambda path, _: jnp.asarray(g[path]), params))[0])
  left_out = {p for p, on in zip(sorted(SCALES), (of_acts, of_weights), strict=True) if not on}
  assert all(np.any(p[path] != 0) for path in SCALES)
  norm = np.sqrt(sum(np.sum(x**2) for path, x in p.items() if path not in left_out))
  np.testing.assert_allclose(slot.grad_norm, norm, rtol=1e-6)
  shifted = map_named(lambda at, x: x + (0 if at in left_out else 0.5 * p[at] / norm), params)
  want = named_leaves(NETWORK.quantize(shifted))
  for path, x in point.items():
    np.testing.assert_allclose(x, want[path], rtol=1e-5, err_msg=path)


def test_rho_is_0_during_its_warm_up():
  slot = build_slot(NETWORK, SAQConfig(rho=0.3, warmup_epochs=1.5), steps_per_epoch=2)
  out, seen, _, z = slot_step(slot, steps=5)
  np.testing.assert_allclose([slot.rho for _, (slot,) in out], [0, 0, 0, 0.3, 0.3], rtol=1e-6)
  shifts = [math.sqrt(sum(np.sum((point[p] - z[p]) ** 2) for p in z)) for point in seen]
  np.testing.assert_allclose(shifts, [0, 0, 0, 0.3, 0.3], rtol=1e-4)


@pytest.mark.parametrize(
  ('name', 'value'), [('case', 1), ('case', 2), ('adaptive', True), ('accumulate_clean_grad', True)]
)
def test_settings_that_reach_saq_as_they_are(name, value):
  chosen = {'rho': 0.5, 'eta': 0.3, name: value}
  slots = [build_slot(NETWORK, SAQConfig(**x), 1) for x in (chosen, {'rho': 0.5, 'eta': 0.3})]
  runs = [slot_step(slot) for slot in (*slots, saq(NETWORK.quantize, has_aux=True, **chosen))]
  got, default, want = (
    np.hstack([np.ravel(x) for tree in (updates, point) for x in tree.values()])
    for [(updates, _)], [point], _, _ in runs
  )
  np.testing.assert_array_equal(got, want)
  assert np.any(got != default)


@pytest.mark.parametrize('case', [None, 1, 2, 3])
@pytest.mark.parametrize('clip_norm', [0.25, 1e4])
def test_clipping_acts_on_the_gradient_after_the_perturbation(case, clip_norm):
  config = None if case is None else SAQConfig(rho=0.5, case=case)
  [(sharp, _)], plain_points, _, _ = slot_step(build_slot(NETWORK, config, 1))
  plain = {'momentum': 0.0, 'weight_decay': 0.0, 'schedule': 'constant'}
  optimizer, _ = build_optimizer(StageConfig(lr=0.5, scale_lr=0.1, clip_norm=clip_norm, **plain), 1)
  [(updates, (slot, _))], points, _, _ = slot_step(build_slot(NETWORK, config, 1), optimizer)
  # What saq sees is not clipped; what it returns is, over weights and scales together.
  norm = np.sqrt(sum(np.sum(x**2) for x in sharp.values()))
  np.testing.assert_allclose(slot.sharp_grad_norm, norm, rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, points, plain_points)
  for path, x in updates.items():
    want = -(0.1 if path in SCALES else 0.5) * sharp[path] * min(1, clip_norm / norm)
    np.testing.assert_allclose(x, want, rtol=1e-5)

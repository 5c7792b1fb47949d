"""Training and evaluation steps against a small network's loss that is written out again."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_network import (
  AUGMENTED,
  NETWORK,
  PLAIN,
  Small,
  make_batch,
  normalized,
  parts_for,
  start,
  written_out,
)

from saq_jax._paths import is_quant_scale, named_leaves
from saq_jax.training.config import StageConfig
from saq_jax.training.loss import cross_entropy
from saq_jax.training.network import Network
from saq_jax.training.sharding import make_mesh, over_batch, replicated, to_devices
from saq_jax.training.step import StepConfig, eval_step, train_on, train_step

# One step, in float64, against the loss of small_network.


@pytest.mark.parametrize(
  ('rho', 'both', 'smoothing'),
  [(None, False, 0.2), (0.5, False, 0.0), (0.5, True, 0.2)],
  ids=['qat', 'saq', 'saq-both'],
)
def test_metrics_statistics_and_parameters(rho, both, smoothing):
  with jax.enable_x64(True):
    parts = parts_for(rho)
    state = start(parts)
    params = jax.tree.map(lambda x: x.astype(float), state.params)
    state = state.replace(params=params, opt_state=parts['tx'].init(params))
    batch = make_batch()
    images, labels = jnp.asarray(normalized(batch['image'])), jnp.asarray(batch['label'])
    config = StepConfig((0.4,), (0.3,), label_smoothing=smoothing, batch_stats_from_both=both)
    step = jax.jit(functools.partial(train_on, config=config, **parts))
    new, metrics = step(state, images, labels)

    gradient = jax.jit(jax.value_and_grad(written_out, has_aux=True))
    z, pullback = jax.vjp(NETWORK.quantize, params)
    (loss, (hits, _, found)), g = gradient(z, None, images, labels, smoothing)
    perturbed = [x for path, x in named_leaves(g).items() if not is_quant_scale(path)]
    norm = np.sqrt(sum(np.sum(x**2) for x in perturbed))
    clean, stats = pullback(g)[0], named_leaves(found)
    want = {'loss': loss, 'accuracy': hits.mean(), 'lr': 0.2, 'second': float(rho is not None)}
    sharp, stats = clean, {p: 0.9 * p.endswith('var') + 0.1 * x for p, x in stats.items()}
    if rho is not None:
      point = jax.tree.map(lambda x, d: x + rho * d / norm, z, g)
      point['model']['fc']['input'] = z['model']['fc']['input']
      point['scales'] = z['scales']
      (second, (_, _, found)), g2 = gradient(point, None, images, labels, smoothing)
      (sharp,) = pullback(g2)
      want |= {'rho': rho, 'loss_perturbed': second, 'grad_norm': norm}
      assert second > loss + 0.01
      if both:
        stats = {p: 0.9 * stats[p] + 0.1 * x for p, x in named_leaves(found).items()}
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (sharp, clean)]
    norms = [np.linalg.norm(x) for x in flat]
    want |= {'sharp_grad_norm': norms[0], 'cosine': flat[0] @ flat[1] / (norms[0] * norms[1])}
    want.setdefault('grad_norm', norms[0])

    assert metrics.keys() == want.keys()
    for name, x in want.items():
      np.testing.assert_allclose(metrics[name], x, rtol=1e-6, err_msg=name)
    assert (int(new.step), int(new.seed)) == (1, 0)
    for path, x in named_leaves(new.batch_stats).items():
      np.testing.assert_allclose(x, stats[path], rtol=1e-6, err_msg=path)
    old, sharp = named_leaves(params), named_leaves(sharp)
    for path, x in named_leaves(new.params).items():
      rate = 0.02 if is_quant_scale(path) else 0.2
      # Nesterov's first step with momentum 0.9 is 1.9 gradients long.
      np.testing.assert_allclose(x, old[path] - rate * 1.9 * sharp[path], rtol=1e-6, atol=1e-12)


def count(jaxpr, name):
  """Equations of a primitive in a program, those of its inner programs too."""
  total = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
  for eqn in jaxpr.eqns:
    for x in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns')):
      total += count(x, name) if hasattr(x, 'eqns') else 0
  return total


@pytest.mark.parametrize('rho', [None, 0.5], ids=['qat', 'saq'])
def test_a_step_costs_one_gradient_and_one_more_for_saq(rho):
  parts = parts_for(rho)
  state, batch = start(parts), make_batch()
  images = jnp.asarray(normalized(batch['image']), jnp.float32)
  step = functools.partial(train_on, config=PLAIN, **parts)
  z = NETWORK.quantize(state.params)
  one = jax.make_jaxpr(jax.grad(written_out, has_aux=True))(z, None, images, batch['label'])
  all_of_it = jax.make_jaxpr(step)(state, images, batch['label'])
  # The convolution and the gradient of its kernel.
  assert count(one, 'conv_general_dilated') == 2
  assert count(all_of_it, 'conv_general_dilated') == (2 if rho is None else 4)


# Random numbers.


def test_augmentation_is_that_of_the_seed_and_the_step_and_the_same_in_both_passes():
  parts = parts_for(0.0)
  state, batch = start(parts), make_batch()
  step = jax.jit(functools.partial(train_step, config=AUGMENTED, **parts))
  losses = {}
  for seed, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
    at = state.replace(seed=jnp.uint32(seed), step=jnp.int32(t))
    _, metrics = step(at, batch)
    losses[seed, t] = float(metrics['loss'])
    np.testing.assert_allclose(metrics['loss_perturbed'], metrics['loss'], rtol=1e-6)
    assert float(step(at, batch)[1]['loss']) == losses[seed, t]
  assert len(set(losses.values())) == 4


def test_without_augmentation_the_images_are_the_normalized_ones():
  parts = parts_for(None)
  state, batch = start(parts), make_batch()
  _, metrics = jax.jit(functools.partial(train_step, config=PLAIN, **parts))(state, batch)
  z, images = NETWORK.quantize(state.params), jnp.asarray(normalized(batch['image']), jnp.float32)
  want, _ = jax.jit(written_out)(z, None, images, batch['label'])
  np.testing.assert_allclose(metrics['loss'], want, rtol=1e-5)


# Devices, memory, compilation.


def relative_error(got, want):
  got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (got, want))
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_a_batch_over_eight_devices_gives_the_step_of_one():
  mesh = make_mesh()
  whole, split = replicated(mesh), over_batch(mesh)
  parts = parts_for(0.5, StageConfig(lr=0.2, clip_norm=1.0))
  step = functools.partial(train_step, config=AUGMENTED, **parts)
  alone, here = jax.jit(step), start(parts)
  there, batch = jax.device_put(start(parts), whole), to_devices(make_batch(), mesh)
  assert batch['image'].sharding.shard_shape(batch['image'].shape) == (2, 6, 6, 1)
  spread = jax.jit(step, in_shardings=(whole, split), out_shardings=whole).lower(there, batch)
  spread = spread.compile()
  assert 'all-reduce' in spread.as_text()
  for seed in range(3):
    here, want = alone(here, make_batch(seed=seed))
    there, metrics = spread(there, to_devices(make_batch(seed=seed), mesh))
    for name, x in want.items():
      np.testing.assert_allclose(metrics[name], x, rtol=2e-5, err_msg=name)
  assert relative_error(there.params, here.params) < 1e-5
  assert relative_error(there.batch_stats, here.batch_stats) < 1e-5
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(there))
  assert relative_error(there.params, start(parts).params) > 0.01


def test_many_steps_are_one_compilation_in_the_memory_of_the_state(caplog):
  parts = parts_for(0.5)

  def the_step(state, batch):
    return train_step(state, batch, config=AUGMENTED, **parts)

  step, state = jax.jit(the_step, donate_argnums=0), jax.jit(lambda: start(parts))()
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  with jax.log_compiles(), warnings.catch_warnings():
    warnings.simplefilter('error')
    for seed in range(4):
      old, (state, _) = state, step(state, make_batch(seed=seed))
      momentum = [x for x in jax.tree.leaves(old.opt_state) if x.ndim]
      assert len(momentum) == 5
      assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.batch_stats, momentum)))
      assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
  compiled = [r for r in caplog.messages if r.startswith('Compiling') and 'the_step' in r]
  assert len(compiled) == 1
  assert int(state.step) == 4


@pytest.mark.parametrize(
  ('rho', 'dtype'),
  [(None, None), (0.05, None), (0.05, jnp.bfloat16)],
  ids=['qat', 'saq', 'saq-bfloat16'],
)
def test_it_learns(rho, dtype):
  parts = parts_for(rho, network=Network(Small(dtype=dtype), NETWORK.quantize))
  state, batch = start(parts), make_batch(64)
  step = functools.partial(train_step, config=PLAIN, **parts)
  assert ('bf16[' in str(jax.make_jaxpr(step)(state, batch))) == (dtype is not None)
  step, history = jax.jit(step, donate_argnums=0), []
  for _ in range(30):
    state, metrics = step(state, batch)
    history.append(jax.tree.map(float, metrics))
  assert history[0]['loss'] > 0.8
  assert max(m['loss'] for m in history[-5:]) < 0.7 * history[0]['loss']
  cosine = 0.2 * 0.5 * (1 + np.cos(np.pi * np.arange(30) / 40))
  np.testing.assert_allclose([m['lr'] for m in history], cosine, rtol=1e-5)
  kept = [state.params, state.batch_stats, state.opt_state]
  floating = [x.dtype for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert set(floating) == {jnp.dtype('float32')}
  assert {x.dtype for x in metrics.values()} == {jnp.dtype('float32')}


# Evaluation and the loss.


def test_evaluation_sums_over_the_real_examples_alone():
  state = start(parts_for(None))
  stats = {'bn': {'mean': 0.1 * jnp.arange(6.0), 'var': 1 + 0.1 * jnp.arange(6.0)}}
  z, batch = NETWORK.quantize(state.params), make_batch(11)
  batch['mask'] = np.float32([1] * 8 + [0] * 3)
  step = jax.jit(functools.partial(eval_step, network=NETWORK, config=AUGMENTED))
  sums = step(z, stats, batch)
  images = jnp.asarray(normalized(batch['image'][:8]), jnp.float32)
  fn = jax.jit(functools.partial(written_out, train=False))
  _, (hits, losses, _) = fn(z, stats, images, batch['label'][:8])
  np.testing.assert_allclose(sums['loss'], np.sum(losses), rtol=1e-5)
  assert (float(sums['correct']), float(sums['count'])) == (np.sum(hits), 8)
  for label, pixel in ((0, 255), (2, 0), (-1, 7), (99, 255)):
    batch['label'][8:], batch['image'][8:] = label, pixel
    garbage = step(z, stats, batch)
    assert {name: float(x) for name, x in garbage.items()} == jax.tree.map(float, sums)


@pytest.mark.parametrize('alpha', [0.0, 0.1, 0.5])
def test_cross_entropy_with_smoothed_labels(alpha):
  logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32) * 3
  labels = np.array([0, 3, 1, 1, 2])
  log_p = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
  targets = (1 - alpha) * np.eye(4)[labels] + alpha / 4
  got = cross_entropy(jnp.asarray(logits), labels, alpha)
  np.testing.assert_allclose(got, -np.sum(targets * log_p, -1), rtol=1e-5)


def test_cross_entropy_of_bfloat16_logits_is_taken_in_float32():
  logits = jnp.array([[3.0, 1.0, -250.0]], jnp.bfloat16)
  loss = cross_entropy(logits, jnp.array([1]), 0.0)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, 2 + np.log1p(np.exp(-2)), rtol=1e-6)

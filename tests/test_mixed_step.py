"""A step on mixed and erased images: soft targets, and which random numbers belong to what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_network import AUGMENTED, CLASSES, PLAIN, make_batch, parts_for, start

from saq_jax.data import augment, mix
from saq_jax.training.loss import cross_entropy, hits
from saq_jax.training.step import (
  StepConfig,
  eval_step,
  prepare_images,
  step_key,
  train_step,
)

DEIT = StepConfig(
  AUGMENTED.mean,
  AUGMENTED.std,
  flip=True,
  erasing=0.5,
  mixup=0.8,
  cutmix=1.0,
  num_classes=CLASSES,
  label_smoothing=0.1,
)


def test_mixed_labels_have_the_loss_of_their_shares():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (6, 5))
  targets = rng.dirichlet(np.ones(5), 6)
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  wanted = -((0.9 * targets + 0.1 / 5) * log_p).sum(1)
  with jax.enable_x64(True):
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), 0.1)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    # timm's mixup_target: lam of one smoothed one-hot row and the rest of another.
    one, two, lam = np.eye(5)[1], np.eye(5)[3], 0.3
    soft = lam * (0.9 * one + 0.02) + (1 - lam) * (0.9 * two + 0.02)
    mixed = jnp.asarray(lam * one + (1 - lam) * two)[None]
    np.testing.assert_allclose(
      cross_entropy(jnp.asarray(logits[:1]), mixed, 0.1), -(soft * log_p[0]).sum(), rtol=1e-12
    )


def test_a_hit_on_a_mixed_label_counts_its_share():
  logits = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 3.0]])
  targets = jnp.array([[0.3, 0.7, 0.0], [0.0, 0.4, 0.6]])
  np.testing.assert_allclose(hits(logits, targets), [0.3, 0.6])
  assert hits(logits, jnp.array([0, 1])).tolist() == [True, False]


def stepped(config, batch, state, parts):
  return jax.jit(functools.partial(train_step, config=config, **parts))(state, batch)


def test_a_step_is_that_on_the_mixed_images_and_targets():
  parts, batch = parts_for(0.5), make_batch()
  state = start(parts, seed=3)
  _, metrics = stepped(DEIT, batch, state, parts)
  # Put together again from the tested parts, each with a key of its own.
  key = step_key(state)
  flip_key = jax.random.split(key)[1]
  images = augment.normalize(augment.flip(flip_key, batch['image']), DEIT.mean, DEIT.std)
  images = mix.erase(jax.random.fold_in(key, 3), images, 0.5)
  one_hot = np.eye(CLASSES, dtype=np.float32)[batch['label']]
  images, targets = mix.mix(jax.random.fold_in(key, 4), images, jnp.asarray(one_hot), 0.8, 1.0)
  assert np.any(np.asarray(targets) != one_hot)
  z = parts['network'].quantize(state.params)
  logits, _ = parts['network'].model.apply(
    {'params': z['model'], 'batch_stats': state.batch_stats},
    images,
    train=True,
    mutable=['batch_stats'],
    rngs={'dropout': jax.random.fold_in(key, 2)},
  )
  loss = cross_entropy(logits, targets, 0.1).mean()
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics['accuracy'], hits(logits, targets).mean(), rtol=1e-5)
  assert metrics['loss_perturbed'] > metrics['loss']


def test_each_step_is_mixed_in_its_own_way_and_the_same_when_taken_again():
  parts, batch = parts_for(None), make_batch()
  state = start(parts)
  (_, one), (_, again) = (stepped(DEIT, batch, state, parts) for _ in range(2))
  assert one['loss'] == again['loss']
  _, other = stepped(DEIT, batch, state.replace(step=state.step + 1), parts)
  assert one['loss'] != other['loss']


def test_nothing_is_erased_or_mixed_without_a_key():
  batch = make_batch()
  np.testing.assert_array_equal(
    prepare_images(batch['image'], DEIT), prepare_images(batch['image'], PLAIN)
  )


@pytest.mark.parametrize('config', [PLAIN, DEIT], ids=['plain', 'deit'])
def test_damaged_examples_are_counted(config):
  parts, batch = parts_for(None), make_batch()
  damaged = np.zeros(16, bool)
  damaged[[2, 5, 11]] = True
  _, metrics = stepped(config, {**batch, 'damaged': damaged}, start(parts), parts)
  assert metrics['damaged'] == 3
  assert 'damaged' not in stepped(config, batch, start(parts), parts)[1]
  state = start(parts)
  z = parts['network'].quantize(state.params)
  mask = np.ones(16, np.float32) - damaged
  sums = eval_step(
    z,
    state.batch_stats,
    {**batch, 'damaged': damaged, 'mask': mask},
    network=parts['network'],
    config=config,
  )
  assert (int(sums['count']), int(sums['damaged'])) == (13, 3)

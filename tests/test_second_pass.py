"""In bfloat16 the second pass is taken in float32, so that no perturbation is rounded away."""

import functools

import jax
import numpy as np
import pytest
from small_network import (
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
from saq_jax.training.network import Network
from saq_jax.training.state import variables
from saq_jax.training.step import StepConfig, train_on

RHO = 0.02
HALF = Network(Small(dtype='bfloat16'), NETWORK.quantize)


@pytest.fixture(scope='module')
def perturbed():
  """The state, a batch, and z + eps from the gradient of the model in bfloat16."""
  parts = parts_for(RHO, network=HALF)
  state, batch = start(parts), make_batch()
  images = np.asarray(normalized(batch['image']), np.float32)

  def loss(z):
    logits, _ = HALF.model.apply(
      variables(z, state.batch_stats), images, train=True, mutable=['batch_stats']
    )
    log_p = jax.nn.log_softmax(logits.astype(np.float32))
    return -log_p[np.arange(len(images)), batch['label']].mean()

  z = HALF.quantize(state.params)
  g = jax.jit(jax.grad(loss))(z)
  wanted = {path: not is_quant_scale(path) for path in named_leaves(g)}
  norm = np.sqrt(sum(np.sum(x**2) for path, x in named_leaves(g).items() if wanted[path]))
  eps = jax.tree.map(lambda x: RHO * x / norm, g)
  eps['model']['fc']['input'] = jax.tree.map(np.zeros_like, eps['model']['fc']['input'])
  return parts, state, images, batch['label'], z, eps


def second_loss(perturbed, **settings):
  parts, state, images, labels, _, _ = perturbed
  config = StepConfig(mean=PLAIN.mean, std=PLAIN.std, **settings)
  step = jax.jit(functools.partial(train_on, config=config, **parts))
  return float(step(state, images, labels)[1]['loss_perturbed'])


def test_second_pass_sees_the_whole_perturbation(perturbed):
  _, _, images, labels, z, eps = perturbed
  expected, _ = written_out(jax.tree.map(np.add, z, eps), None, images, labels)
  assert second_loss(perturbed) == pytest.approx(float(expected), rel=1e-5)


def test_in_the_models_own_dtype_it_sees_another_one(perturbed):
  """Which is why float32 is the default: most elements of the kernels do not move at all."""
  _, _, images, labels, z, eps = perturbed
  expected, _ = written_out(jax.tree.map(np.add, z, eps), None, images, labels)
  ours = second_loss(perturbed, second_pass_float32=False)
  assert ours != pytest.approx(float(expected), rel=1e-5)
  kernel, step = z['model']['conv']['kernel'], eps['model']['conv']['kernel']
  moved = (kernel + step).astype('bfloat16') != kernel.astype('bfloat16')
  assert np.mean(moved) < 0.9
  assert np.mean(kernel + step != kernel) > 0.99

"""Three whole SAQ steps of PreResNet-20, W4A4, against the authors' PyTorch code in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch_names

from saq_jax._paths import named_leaves
from saq_jax.training.build import build_optimizer, build_slot
from saq_jax.training.config import ModelConfig, QuantConfig, SAQConfig, StageConfig
from saq_jax.training.network import build_network
from saq_jax.training.state import TrainState, variables
from saq_jax.training.step import StepConfig, train_on

RTOL = 1e-6


def agree(ours, theirs, what):
  """Every leaf, as a norm relative to the recorded one (which is stored in float32)."""
  ours, theirs = named_leaves(ours), named_leaves(theirs)
  assert ours.keys() == theirs.keys()
  for name, x in theirs.items():
    distance = np.linalg.norm(np.ravel(ours[name] - x))
    assert distance <= RTOL * np.linalg.norm(np.ravel(x)), (what, name, distance)


@pytest.fixture(scope='module')
def trained():
  """Our run of the recorded steps: metrics and states, with the gradient of the first step."""
  record = np.load(torch_names.RECORD)
  with jax.enable_x64(True):
    network = build_network(ModelConfig(depth=20, width=16), QuantConfig(), num_classes=100)
    saq_config = SAQConfig(rho=0.4, perturb_act_scales=True, batch_stats_from_both=True)
    recipe = StageConfig(lr=0.01, scale_lr=0.01, weight_decay=1e-4, schedule='constant')
    slot = build_slot(network, saq_config, steps_per_epoch=1)
    optimizer, lr = build_optimizer(recipe, steps_per_epoch=1)
    # The gradient that the optimizer is handed is kept as a state of the chain.
    tap = optax.GradientTransformation(
      lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, s, p: (g, g)
    )
    tx = optax.chain(slot, tap, optimizer)
    config = StepConfig(mean=(0.0,), std=(1.0,), batch_stats_from_both=True)
    step = jax.jit(functools.partial(train_on, network=network, tx=tx, lr=lr, config=config))
    params, stats = jax.tree.map(jnp.asarray, torch_names.read(record, 'init'))
    zero = jnp.zeros((), jnp.int32)
    state, states, metrics = TrainState(zero, zero, params, stats, tx.init(params)), [], []
    for t in range(3):
      images = jnp.asarray(record[f'batch{t}/image_nchw'].transpose(0, 2, 3, 1), jnp.float64)
      state, figures = step(state, images, jnp.asarray(record[f'batch{t}/label']))
      states.append(state)
      metrics.append(figures)
    z = network.quantize(state.params)
    images = jnp.asarray(record['batch0/image_nchw'].transpose(0, 2, 3, 1), jnp.float64)
    logits = network.model.apply(variables(z, state.batch_stats), images, train=False)
    yield record, states, metrics, logits


@pytest.mark.parametrize(
  ('ours', 'theirs'),
  [
    ('loss', 'loss_clean'),
    ('loss_perturbed', 'loss_perturbed'),
    ('grad_norm', 'perturbation_grad_norm'),
  ],
)
def test_losses_and_norm_of_every_step(trained, ours, theirs):
  record, _, metrics, _ = trained
  np.testing.assert_allclose([m[ours] for m in metrics], record[theirs], rtol=1e-11)


def test_gradient_that_the_optimizer_is_handed(trained):
  record, states, _, _ = trained
  theirs, _ = torch_names.read(record, 'sam_grad_step1')
  agree(states[0].opt_state[1], theirs, 'gradient')


@pytest.mark.parametrize('steps', [1, 3])
def test_parameters_clips_and_statistics(trained, steps):
  record, states, _, _ = trained
  params, stats = torch_names.read(record, f'after{steps}')
  agree(states[steps - 1].params, params, 'parameters')
  agree(states[steps - 1].batch_stats, stats, 'statistics')


def test_logits_in_eval_mode(trained):
  record, _, _, logits = trained
  np.testing.assert_allclose(logits, record['eval_logits_after3'], rtol=1e-9, atol=1e-11)


def test_every_recorded_tensor_is_compared():
  record = np.load(torch_names.RECORD)
  names = [key[len('after1/') :] for key in record.files if key.startswith('after1/')]
  left_out = [name for name in names if torch_names.our_path(name) is None]
  assert left_out == ['conv.activation_clip_value']
  assert len(names) == len({torch_names.our_path(name) for name in names})

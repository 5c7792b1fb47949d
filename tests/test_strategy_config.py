"""Strategies by their settings: what reaches the links, and what does not go together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_network import NETWORK, start

from saq_jax._paths import named_leaves
from saq_jax.training.bounds import ConfigError
from saq_jax.training.build import build_slot, known_choices
from saq_jax.training.compiled import CompiledStep
from saq_jax.training.config import SAQConfig
from saq_jax.training.strategy_config import StrategyConfig, check_strategy

STEPS = 6


def steps_of(total_steps=STEPS, seed=0, **strategy):
  """Which steps took a second gradient, and where each gradient was taken; gradients of ones."""
  slot = build_slot(
    NETWORK, SAQConfig(rho=0.5), 1.0, StrategyConfig(**strategy), total_steps=total_steps, seed=seed
  )
  params = start({'network': NETWORK, 'tx': slot}).params
  state, taken, points = slot.init(params), [], []
  g = jax.tree.map(jnp.ones_like, params)

  @jax.jit
  def update(state, g):
    _, state = slot.update(g, state, params, grad_fn=lambda z: (g, z))
    return state._replace(aux=None), state.aux

  for t in range(STEPS):
    state, z = update(state, jax.tree.map(lambda x, t=t: x * (1 + t % 2), g))
    taken.append(bool(state.second))
    points.append(named_leaves(z))
  return taken, points, named_leaves(NETWORK.quantize(params))


def has_moved(x, z):
  return bool(np.max(np.abs(x - z)) > 1e-3)


@pytest.mark.parametrize(
  ('strategy', 'taken'),
  [
    ({}, [1, 1, 1, 1, 1, 1]),
    ({'name': 'interval', 'period': 4}, [1, 0, 0, 0, 1, 0]),
    ({'name': 'looksam', 'period': 2}, [1, 0, 1, 0, 1, 0]),
    ({'name': 'momentum'}, [0] * 6),
    ({'name': 'random', 'first_probability': 1.0, 'last_probability': 1.0}, [1] * 6),
    ({'name': 'random', 'first_probability': 0.0, 'last_probability': 0.0}, [0] * 6),
    # Squares in turn 1 and 4: above their mean in every second step.
    ({'name': 'adaptive', 'first_threshold': 0.0, 'last_threshold': 0.0}, [1, 1, 0, 1, 0, 1]),
  ],
)
def test_strategies_by_name(strategy, taken):
  assert steps_of(**strategy)[0] == [bool(t) for t in taken]


def test_the_probability_goes_from_the_first_to_the_last():
  taken = steps_of(name='random', first_probability=0.0, last_probability=1.0)[0]
  assert (taken[0], taken[-1]) == (False, True)
  seeds = [steps_of(name='random', seed=s)[0] for s in range(4)]
  assert len({tuple(t) for t in seeds}) > 1


@pytest.mark.parametrize(
  'strategy',
  [{'name': 'interval', 'period': 4}, {'name': 'looksam', 'period': 2}, {'name': 'random'}],
)
def test_what_is_known_before_the_stage_is_what_the_steps_choose(strategy):
  for seed in (0, 1):
    known = known_choices(StrategyConfig(**strategy), STEPS, seed)
    assert known.tolist() == steps_of(seed=seed, **strategy)[0]


@pytest.mark.parametrize('name', ['full', 'momentum', 'adaptive'])
def test_nothing_is_known_where_all_steps_are_alike_or_the_gradient_decides(name):
  assert known_choices(StrategyConfig(name=name), STEPS, 0) is None


def test_a_known_choice_has_a_program_of_its_own():
  made = []

  def make(taken):
    made.append(taken)
    return lambda state, batch: (state, taken)

  step = CompiledStep(make, np.array([True, False, False, True]))
  assert [step.is_new(n) for n in (1, 2)] == [True, True]
  assert [step(None, None, n)[1] for n in (1, 2, 3, 4)] == [True, False, False, True]
  assert made == [True, False]
  assert not step.is_new(3)
  assert CompiledStep(make)(None, None, 7)[1] is None


def test_patterns_choose_among_what_the_perturbation_has():
  _, points, z = steps_of(perturb_only=('model/bn/.*', '.*quant_scale'))
  moved = {path for path, x in points[0].items() if has_moved(x, z[path])}
  assert moved == {'model/bn/scale', 'model/bn/bias'}


def test_tensors_are_drawn_anew_in_each_step():
  _, points, z = steps_of(tensors=0.5)
  moved = [tuple(has_moved(x, z[path]) for path, x in point.items()) for point in points]
  assert len(set(moved)) > 1


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'period': 7}, r"period: 'full' does not read it.*'interval' or 'looksam'"),
    ({'name': 'interval', 'alpha': 0.5}, "alpha: 'interval' does not read it"),
    ({'name': 'random', 'decay': 0.5}, "'adaptive' or 'momentum'"),
    ({'name': 'interval', 'first_examples': 0.5}, "first_examples=0.5: goes with name='full'"),
    ({'first_examples': 0.5, 'second_examples': 0.5}, 'second_examples=0.5: needs the loss'),
    ({'name': 'momentum', 'second_examples': 0.5}, 'second_examples=0.5'),
  ],
)
def test_settings_that_do_not_go_together(settings, words):
  with pytest.raises(ConfigError, match=words):
    check_strategy(StrategyConfig(**settings), accumulate=1, accumulate_clean_grad=False)


@pytest.mark.parametrize(
  ('settings', 'how', 'words'),
  [
    ({'second_examples': 0.5}, {'accumulate': 2}, 'accumulate=2: does not go with'),
    ({'first_examples': 0.5}, {'accumulate': 2}, 'accumulate=2: does not go with'),
    ({'name': 'momentum'}, {'accumulate_clean_grad': True}, 'would be half as long'),
    ({'name': 'interval'}, {'accumulate_clean_grad': True}, 'would be half as long'),
    ({'first_examples': 0.5}, {'accumulate_clean_grad': True}, 'would be half as long'),
  ],
)
def test_settings_that_do_not_go_with_those_of_others(settings, how, words):
  how = {'accumulate': 1, 'accumulate_clean_grad': False} | how
  with pytest.raises(ConfigError, match=words):
    check_strategy(StrategyConfig(**settings), **how)


def test_the_defaults_go_together():
  for name in ('full', 'interval', 'looksam', 'random', 'adaptive', 'momentum'):
    strategy = dataclasses.replace(StrategyConfig(), name=name)
    check_strategy(strategy, accumulate=2, accumulate_clean_grad=False)

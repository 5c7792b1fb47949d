"""Divergence: how it is seen, what is told, and runs that go back to a checkpoint by themselves."""

import json
import math
import random
import signal
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import assert_same_stage, wait_for_line
from test_resume import command, start

from saq_jax.training.bookkeeping import Bookkeeping, DivergedError, StepBackError
from saq_jax.training.metrics import read_metrics
from saq_jax.training.signals import Stop
from saq_jax.training.watch_config import WatchConfig
from saq_jax.training.watch_loss import LossWatch
from saq_jax.training.watch_replay import StepsBack, origin, slowed
from saq_jax.training.watch_stall import StallWatch

FIGURES = {'loss': float('nan'), 'sharp_grad_norm': 1.0, 'lr': 0.125, 'accuracy': 0.0}
SPIKES = WatchConfig(spike_factor=2.0, spike_steps=3)


def figures(loss):
  return FIGURES | {'loss': loss}


# ---- How it is seen


def test_a_spike_has_to_last_and_is_held_against_the_losses_before_it():
  watch = LossWatch(SPIKES)
  for step in range(1, 101):
    assert watch.see(step, figures(1.0)) is None
  above = [2.5, 2.5, 1.9, 2.5, 2.5]  # two in a row, twice
  assert not any(watch.see(101 + i, figures(loss)) for i, loss in enumerate(above))
  found = watch.see(106, figures(2.5))
  assert (found.step, found.first, found.last_good) == (106, 104, 102)
  assert 'for 3 steps the loss was above 2 times its median of 1' in found.words


def test_no_loss_is_a_spike_before_a_hundred_are_known_or_where_it_is_off():
  watch = LossWatch(SPIKES)
  assert not any(watch.see(step, figures(10.0**step)) for step in range(1, 100))
  watch = LossWatch(WatchConfig())
  assert not any(watch.see(step, figures(1.5**step)) for step in range(1, 300))
  assert watch.notes == {}


@pytest.mark.parametrize('bad', [{'loss': math.inf}, {'sharp_grad_norm': math.nan}])
def test_what_is_not_finite_is_seen_at_once_with_the_spike_before_it(bad):
  watch = LossWatch(SPIKES)
  assert watch.see(1, figures(1.0) | bad).last_good == -1
  for step in range(2, 102):
    watch.see(step, figures(1.0))
  watch.see(102, figures(3.0))
  assert watch.see(103, figures(1.0) | bad).first == 102


def test_a_watch_goes_on_from_its_notes_as_if_it_had_not_been_stopped():
  draw = random.Random(0)
  losses = [draw.lognormvariate(0, 1) for _ in range(400)]
  config = WatchConfig(spike_factor=1.2, spike_steps=6)

  def seen(stops):
    watch = LossWatch(config, steps_back=StepsBack(1, 5, 7))
    for step, loss in enumerate(losses, 1):
      if found := watch.see(step, figures(loss)):
        return found, watch.steps_back
      if step in stops:
        watch = LossWatch(config, json.loads(json.dumps(watch.notes)))
    return None

  whole = seen(())
  assert whole is not None
  assert whole[0].step > 100
  assert seen(range(1, 400, 3)) == whole
  assert whole[1] == StepsBack(1, 5, 7)


# ---- Where it goes back to, and how it differs then


@pytest.mark.parametrize(
  ('last_good', 'saved', 'before', 'to'),
  [
    (39, [20, 30, 40], StepsBack(), 30),
    (40, [20, 30, 40], StepsBack(), 40),
    (9, [], StepsBack(), 0),  # none was due before it
    (9, [10], StepsBack(), 0),
    (25, [30], StepsBack(), None),  # those that were good are not kept any more
    (45, [20, 30, 40], StepsBack(1, 40, 9), 30),  # it did not get over it
    (55, [30, 40, 50], StepsBack(1, 40, 9), 50),  # it did
    (45, [40], StepsBack(2, 40, 9), 40),  # there is no other
  ],
)
def test_where_it_goes_back_to(last_good, saved, before, to):
  assert origin(last_good, saved, 10, before) == to


@pytest.mark.parametrize('make', [lambda lr: optax.sgd(lr, 0.9), optax.adamw])
def test_the_slower_optimizer_is_the_one_of_the_lower_rate(make):
  def path(optimizer):
    params = {'a': jnp.array([1.0, -2.0]), 'b': jnp.float32(3.0)}
    state = optimizer.init(params)
    for step in range(5):
      grads = jax.tree.map(lambda x, k=step: x * (k + 1), params)
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params, state

  slower, lower = path(slowed(make(0.1), 0.5)), path(make(0.05))
  assert jax.tree.structure(slower) == jax.tree.structure(lower)
  for a, b in zip(jax.tree.leaves(slower), jax.tree.leaves(lower)):
    np.testing.assert_allclose(a, b, rtol=1e-6)


class Steps:
  """Steps that are not finite."""

  def is_new(self, step):
    return False

  def __call__(self, *_):
    return None, FIGURES


class Lines:
  def __init__(self):
    self.steps = []

  def write(self, step, figures):
    self.steps.append(step)


def books_of(saved, watch, lines):
  stage = types.SimpleNamespace(
    name='saq', log_every=1, total_steps=100, taken=None, checkpoint_every=10, watch=watch
  )
  due = [step for step in saved if step % 10 == 0]
  checkpoints = types.SimpleNamespace(steps=saved, due=due, wait=lambda: None)
  leg = types.SimpleNamespace(stage=stage, stop=Stop(), losses=LossWatch(watch), profile=None)
  stalls = StallWatch(watch, 'saq', 100)
  return Bookkeeping(leg, Steps(), checkpoints, lines, None, stalls)


@pytest.mark.parametrize(
  ('saved', 'words'),
  [
    ([], 'no checkpoint is good'),
    ([39], 'no checkpoint is good'),  # its parameters were first seen at step 40
    ([20, 30, 39], 'the last good checkpoint is step 30'),
    ([20, 38], 'the last good checkpoint is step 38'),
  ],
)
def test_the_last_good_checkpoint_is_one_that_a_finite_step_followed(saved, words):
  lines = Lines()
  books = books_of(saved, WatchConfig(), lines)
  books.advance(None, None, 40)
  with pytest.raises(DivergedError, match=words) as error:
    books.settle()
  assert 'learning rate 0.125' in str(error.value)
  assert "stage 'saq' diverged at step 40" in str(error.value)
  hint = 'or let it go back by itself: --config.watch.retries=2'
  assert (hint in str(error.value)) == ('is step' in words)  # where there is one to go back to
  assert lines.steps == [40]


def test_going_back_is_told_with_the_step_and_what_differs(caplog):
  books = books_of([20, 30, 38], WatchConfig(retries=2, backoff=0.25), Lines())
  books.advance(None, None, 40)
  with pytest.raises(StepBackError) as error:
    books.settle()
  assert error.value.steps_back == StepsBack(1, 30, 10)  # 38 was not due
  assert 'the checkpoint of step 30 (time 1 of 2)' in caplog.text
  assert 'takes 0.25 times the learning rate' in caplog.text


# ---- Whole runs


def spiking(workdir, digits_dir):
  """A run of so high a learning rate that its loss jumps now and then."""
  return [
    *command(workdir, digits_dir),
    '--config.data.batch_size=64',
    '--config.float_stage.epochs=12',
    '--config.float_stage.lr=2',
    '--config.float_stage.schedule=constant',
    '--config.quant_stage.epochs=1',
    '--config.methods=saq',
    '--config.watch.spike_factor=1.3',
    '--config.watch.spike_steps=1',
    '--config.watch.retries=20',
    '--config.watch.backoff=0.95',
  ]


def test_a_run_that_went_back_is_the_same_however_often_it_is_killed(
  tmp_path, digits_dir, user_env
):
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  done = subprocess.run(
    spiking(whole, digits_dir), check=True, capture_output=True, text=True, env=user_env
  )
  times = done.stderr.count('it goes back to the checkpoint of step')
  assert times >= 2
  lines = read_metrics(whole / 'float')
  assert lines[-1]['steps_back'] == times
  assert [line['step'] for line in lines if 'loss' in line] == list(range(1, 271))
  slower = next(line for line in lines if 'steps_back' in line)
  assert slower['lr'] == pytest.approx(2 * 0.95 ** slower['steps_back'])
  first = slower['step']
  # Stopped before it goes back at a step that is not due, then killed after each time it did.
  kills = (signal.SIGTERM, first - 15), (signal.SIGKILL, first + 8), (signal.SIGKILL, 262)
  for name, count in kills:
    process = start(broken, digits_dir, user_env, spiking)
    wait_for_line(process, broken / 'float' / 'metrics.jsonl', count)
    process.send_signal(name)
    process.communicate(timeout=60)
  subprocess.run(spiking(broken, digits_dir), check=True, capture_output=True, env=user_env)
  assert (whole / 'float' / 'metrics.jsonl').read_bytes() == (
    broken / 'float' / 'metrics.jsonl'
  ).read_bytes()
  for stage in ('float', 'saq'):
    assert_same_stage(broken / stage, whole / stage)


def exploding(workdir, digits_dir):
  """A run that is not finite after its first step, unless its learning rate falls."""
  return [
    *command(workdir, digits_dir),
    '--config.float_stage.lr=1e30',
    '--config.float_stage.schedule=constant',
    '--config.methods=saq',
    '--config.quant_stage.epochs=1',
    '--config.watch.backoff=1e-16',
  ]


def test_a_run_without_a_good_checkpoint_begins_anew_as_often_as_it_may(
  tmp_path, digits_dir, user_env
):
  def run(*more):
    flags = [*exploding(tmp_path / 'run', digits_dir), *more]
    return subprocess.run(flags, check=False, capture_output=True, text=True, env=user_env)

  stopped = run()
  assert stopped.returncode == 1
  assert 'no checkpoint is good' in stopped.stderr.strip().splitlines()[-1]
  again = run('--config.watch.retries=1')  # the same run: how it is watched is free
  assert again.returncode == 1
  assert 'it goes back to its beginning (time 1 of 1)' in again.stderr
  assert 'it went back 1 of 1 times' in again.stderr.strip().splitlines()[-1]
  done = run('--config.watch.retries=3')
  assert done.returncode == 0, done.stderr
  assert 'Traceback' not in done.stderr
  assert {line['steps_back'] for line in read_metrics(tmp_path / 'run' / 'float')} == {2}
  assert not any('steps_back' in line for line in read_metrics(tmp_path / 'run' / 'saq'))

"""Runs that are killed: the restarted one ends with the bits of one that was not."""

import random
import signal
import subprocess
import sys
import time

import pytest
from runs import assert_same_stage, wait_for_line

from saq_jax.training.checkpoint import find_best, restore_subtrees
from saq_jax.training.metrics import read_metrics

SETTINGS = [
  '--config.model.width=2',
  '--config.data.batch_size=128',
  '--config.float_stage.epochs=2',
  '--config.quant_stage.epochs=6',
  '--config.checkpoint_every_epochs=0.5',
  '--config.log_every_steps=1',
  # Resumed in the middle of a period, of which a state is carried on.
  '--config.strategy.name=looksam',
  '--config.strategy.period=4',
  '--config.watch.oscillation=True',
]


def command(workdir, digits_dir):
  return [
    sys.executable, '-m', 'saq_jax.main', f'--workdir={workdir}',
    f'--config.data.data_dir={digits_dir}', *SETTINGS,
  ]  # fmt: skip


def start(workdir, digits_dir, env, words=command):
  # Without a terminal the program writes to a pipe, as under a scheduler.
  return subprocess.Popen(
    words(workdir, digits_dir),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=env,
  )


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory, digits_dir, user_env):
  workdir = tmp_path_factory.mktemp('unbroken') / 'run'
  subprocess.run(command(workdir, digits_dir), check=True, capture_output=True, env=user_env)
  return workdir


def assert_same_run(workdir, unbroken):
  for stage in ('float', 'qat', 'saq'):
    assert_same_stage(workdir / stage, unbroken / stage)
    assert find_best(workdir / stage).name == find_best(unbroken / stage).name
  assert (workdir / 'results.json').read_bytes() == (unbroken / 'results.json').read_bytes()


def test_killed_at_random_steps_stopped_by_sigterm_and_resumed(
  tmp_path, digits_dir, user_env, unbroken
):
  run = tmp_path / 'run'
  draw = random.Random(20211123)
  for stage, first, last in (('float', 2, 22), ('qat', 2, 60), ('saq', 2, 40)):
    process = start(run, digits_dir, user_env)
    wait_for_line(process, run / stage / 'metrics.jsonl', draw.randrange(first, last))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

  process = start(run, digits_dir, user_env)
  metrics = run / 'saq' / 'metrics.jsonl'
  wait_for_line(process, metrics, 53)
  seen = read_metrics(metrics)[-1]['step']
  began = time.monotonic()
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=60)
  assert time.monotonic() - began < 20
  assert process.returncode == 0, output
  assert "SIGTERM: saved stage 'saq' at step" in output
  assert 'Traceback' not in output
  (step,) = restore_subtrees(run / 'saq', 'step')
  assert seen <= int(step) < 67
  assert read_metrics(metrics)[-1]['step'] == int(step)  # its lines are whole up to the save

  subprocess.run(command(run, digits_dir), check=True, capture_output=True, env=user_env)
  assert_same_run(run, unbroken)


def test_the_most_accurate_state_is_kept_beside_the_newest_that_were_due(unbroken):
  for stage, due in (('float', [6, 12, 18]), ('qat', [54, 60, 66]), ('saq', [54, 60, 66])):
    lines = read_metrics(unbroken / stage)
    scores = {line['step']: line['test_accuracy'] for line in lines if 'test_accuracy' in line}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert find_best(unbroken / stage).name == str(best)
    there = {int(path.name) for path in (unbroken / stage / 'checkpoints').iterdir()}
    assert there == {*due, max(scores), best}


def test_divergence_is_named_and_exits_1(tmp_path, digits_dir, user_env):
  run = subprocess.run(
    [
      *command(tmp_path / 'run', digits_dir),
      '--config.float_stage.lr=1e30',
      '--config.float_stage.schedule=constant',
    ],
    capture_output=True,
    text=True,
    check=False,
    env=user_env,
  )
  assert run.returncode == 1, run.stdout + run.stderr
  last = run.stderr.strip().splitlines()[-1]
  for words in ("stage 'float' diverged at step", 'learning rate 1e+30', 'no checkpoint is good'):
    assert words in last
  assert 'Traceback' not in run.stderr

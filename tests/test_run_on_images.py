"""Whole runs on JPEG files: workers that die, other numbers of them, damaged images, bad inputs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_datasets import prepare
from runs import assert_same_stage, wait_for_line

from saq_jax.training.metrics import read_metrics

SMALL = [
  '--config.model.width=2',
  '--config.data.image_size=8',
  '--config.data.resize=9',
  '--config.data.mean=0.5',
  '--config.data.std=0.2',
  '--config.data.batch_size=8',
  '--config.data.eval_batch_size=8',
  '--config.augment.rand_augment=9',
  '--config.augment.flip=true',
  '--config.augment.mixup=0.8',
  '--config.augment.cutmix=1',
  '--config.augment.erasing=0.25',
  '--config.augment.repeats=3',
  '--config.float_stage.epochs=8',
  '--config.quant_stage.epochs=4',
  '--config.methods=saq',
  '--config.checkpoint_every_epochs=0.5',
  '--config.log_every_steps=1',
]


def command(workdir, data_dir, *more):
  return [
    sys.executable, '-m', 'saq_jax.main', f'--workdir={workdir}',
    '--config.data.name=imagenet2012', f'--config.data.data_dir={data_dir}', *SMALL, *more,
  ]  # fmt: skip


def finish(*args, env):
  return subprocess.run(command(*args), check=False, capture_output=True, text=True, env=env)


def start(*args, env):
  return subprocess.Popen(
    command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
  )


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  prepare('imagenet2012', folder, train=80, validation=13)
  return folder


def workers_of(pid):
  """The worker processes of a run, by Linux's list of processes."""
  found = []
  for entry in Path('/proc').iterdir():
    try:
      parent = int((entry / 'stat').read_text().rpartition(')')[2].split()[1])
      words = (entry / 'cmdline').read_text()
    except (OSError, ValueError, IndexError):
      continue
    if parent == pid and 'spawn_main' in words:
      found.append(int(entry.name))
  return found


def test_a_worker_dies_and_other_numbers_of_workers_go_on_to_the_same_bits(
  tmp_path, data_dir, user_env
):
  one, two = tmp_path / 'unbroken', tmp_path / 'broken'
  done = finish(one, data_dir, '--config.data.workers=0', env=user_env)
  assert done.returncode == 0, done.stderr
  # A worker is killed.
  process = start(two, data_dir, '--config.data.workers=2', env=user_env)
  wait_for_line(process, two / 'float' / 'metrics.jsonl', 8)
  os.kill(workers_of(process.pid)[0], signal.SIGKILL)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 1
  line = next(line for line in errors.splitlines() if line.startswith('saq_jax: '))
  assert re.match(r'saq_jax: worker [01] of 2 \(process \d+\) died with exit code -9', line)
  assert 'Traceback' not in errors
  # The run is asked to stop.
  process = start(two, data_dir, '--config.data.workers=1', env=user_env)
  wait_for_line(process, two / 'saq' / 'metrics.jsonl', 3)
  process.send_signal(signal.SIGTERM)
  output, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  assert "SIGTERM: saved stage 'saq' at step" in output
  done = finish(two, data_dir, '--config.data.workers=0', env=user_env)
  assert done.returncode == 0, done.stderr
  for stage in ('float', 'saq'):
    assert_same_stage(one / stage, two / stage)
  # How fast it went is told beside them, not in them.
  lines = read_metrics(one / 'float' / 'timing')
  assert len(lines) == 79  # one a step, but for the first
  assert all(0 <= line['data_wait'] <= 1 and line['steps_per_second'] > 0 for line in lines)
  assert not any('data_wait' in line for line in read_metrics(one / 'float'))


def test_a_silent_worker_ends_the_run_in_time(tmp_path, data_dir, user_env):
  process = start(
    tmp_path / 'run',
    data_dir,
    '--config.data.workers=2',
    '--config.data.timeout=5',
    '--config.float_stage.epochs=2000',
    env=user_env,
  )
  wait_for_line(process, tmp_path / 'run' / 'float' / 'metrics.jsonl', 5)
  victim = workers_of(process.pid)[0]
  os.kill(victim, signal.SIGSTOP)
  began = time.monotonic()
  _, errors = process.communicate(timeout=120)
  assert time.monotonic() - began < 60
  assert process.returncode == 1
  assert re.search(rf'saq_jax: no batch for 5 s: worker [01] of 2 \(process {victim}\)', errors)
  assert 'Traceback' not in errors


def test_damaged_images_are_left_out_and_counted(tmp_path, user_env):
  prepare('imagenet2012', tmp_path / 'tfds', train=16, validation=13, damaged=(3, 7))
  short = '--config.float_stage.epochs=4', '--config.quant_stage.epochs=1'
  args = tmp_path / 'run', tmp_path / 'tfds', '--config.augment.repeats=1', *short
  done = finish(*args, env=user_env)
  assert done.returncode == 1
  last = done.stderr.strip().splitlines()[-1]
  assert re.search(r"imagenet2012 'train', record \d+ \(train_[37]\.JPEG\): its image", last)
  assert 'config.data.skip_damaged=True' in last
  args = tmp_path / 'skipping', *args[1:], '--config.data.skip_damaged=true'
  done = finish(*args, env=user_env)
  assert done.returncode == 0, done.stderr
  lines = read_metrics(tmp_path / 'skipping' / 'float')
  # Two of 16 are damaged, and each comes once in the two steps of an epoch.
  counted = [line['damaged'] for line in lines if 'damaged' in line]
  assert len(counted) == 8
  assert [a + b for a, b in zip(counted[::2], counted[1::2])] == [2] * 4
  assert {line['test_damaged'] for line in lines if 'test_accuracy' in line} == {2}
  assert '/11' in done.stdout


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config.data.train_split=nope'], "no split 'nope': name one of"),
    (['--config.data.batch_size=96'], 'batch_size=96 is larger than the 80 examples'),
    (['--config.data.name=cifar10'], 'run `python -m saq_jax.data.prepare cifar10'),
    (['--config.data.data_dir=/nowhere'], '/nowhere'),
    (['--config.data.classes=n01440764,goldfish'], "no class 'goldfish'"),
    (['--config.data.tuning=true', '--config.data.eval_split=train'], 'it chooses both splits'),
    (['--config.data.batch_size=7'], 'must be even'),
    (['--config.data.image_size=None'], 'rand_augment=9.0: set config.data.image_size'),
    (['--config.augment.crop_scale=0.5,0.2'], 'the least and the largest share'),
    (['--config.data.name=folder:/nowhere/pictures'], 'folder'),
  ],
)
def test_bad_input_is_one_line(tmp_path, data_dir, user_env, flags, words):
  done = finish(tmp_path / 'run', data_dir, *flags, env=user_env)
  assert done.returncode == 2, done.stdout + done.stderr
  (line,) = done.stderr.strip().splitlines()
  assert words in line
  assert not (tmp_path / 'run').exists()

"""ViT-B/16's experiment at a small size, as a user runs it: public weights, JPEG files, a kill."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from local_datasets import prepare
from runs import assert_same_stage, wait_for_line

from saq_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / 'tests' / 'reference' / 'hf_vit'
SMALL = [
  f'--config.init_from={WEIGHTS}',
  '--config.model.depth=2',
  '--config.model.width=16',
  '--config.model.heads=2',
  '--config.model.patch=4',
  '--config.model.dropout=0.1',
  '--config.data.image_size=16',
  '--config.data.resize=18',
  '--config.data.batch_size=8',
  '--config.data.eval_batch_size=8',
  '--config.quant_stage.epochs=2.4',
  '--config.checkpoint_every_epochs=0.4',
  '--config.log_every_steps=1',
  '--config.methods=saq',
]


def command(workdir, data_dir, *more):
  return [
    sys.executable, '-m', 'saq_jax.main', '--config', str(ROOT / 'configs' / 'vitb16_4bit.py'),
    f'--workdir={workdir}', f'--config.data.data_dir={data_dir}', *SMALL, *more,
  ]  # fmt: skip


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  prepare('imagenet2012', folder, train=40, validation=13)
  return folder


def test_it_trains_evaluates_saves_and_resumes(tmp_path, data_dir, user_env):
  one, two = tmp_path / 'unbroken', tmp_path / 'killed'
  run = {'capture_output': True, 'text': True, 'env': user_env}
  done = subprocess.run(command(one, data_dir), check=False, **run)
  assert done.returncode == 0, done.stderr
  for words in (
    f'weights from {WEIGHTS}, model.safetensors: ViT, Hugging Face names',
    'head replaced: the file has 5 classes, this run 1000',
    'position embedding',  # of 12 pixels there, of 16 here
    '12/12',
    'SAQ 4-bit',
  ):
    assert words in done.stdout
  (result,) = json.loads((one / 'results.json').read_text())['results']
  assert (result['name'], result['examples']) == ('saq', 13)
  losses = [m['loss'] for m in read_metrics(one / 'saq') if 'loss' in m]
  assert len(losses) == 12
  assert np.isfinite(losses).all()

  process = subprocess.Popen(
    command(two, data_dir),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=user_env,
  )
  wait_for_line(process, two / 'saq' / 'metrics.jsonl', 5)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  again = subprocess.run(command(two, data_dir), check=False, **run)
  assert again.returncode == 0, again.stderr
  assert '0/12' not in again.stdout
  assert_same_stage(two / 'saq', one / 'saq', ('step', 'params', 'opt_state'))


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    ('--config.init_from=nowhere.safetensors', ['nowhere.safetensors', 'no such file']),
    ('--config.model.width=32', ['width 16, and the model has width 32']),
    ('--config.data.image_size=None', ['set config.data.image_size']),
    ('--config.data.image_size=18', ['patches of patch=4 do not tile']),
  ],
)
def test_what_does_not_fit_is_said_before_training(tmp_path, data_dir, user_env, flag, words):
  done = subprocess.run(
    command(tmp_path / 'run', data_dir, flag),
    check=False,
    capture_output=True,
    text=True,
    env=user_env,
  )
  assert done.returncode == 2, done.stdout + done.stderr
  for word in words:
    assert word in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


def test_a_damaged_image_is_named_and_ends_the_run(tmp_path, user_env):
  prepare('imagenet2012', tmp_path / 'tfds', train=16, validation=5, damaged=(3,))
  done = subprocess.run(
    command(tmp_path / 'run', tmp_path / 'tfds'),
    check=False,
    capture_output=True,
    text=True,
    env=user_env,
  )
  assert done.returncode == 1, done.stdout + done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert re.search(
    r"saq_jax: imagenet2012 '\w+', record \d+ \(\w+_3\.JPEG\): its image cannot", last
  )
  assert 'Traceback' not in done.stderr

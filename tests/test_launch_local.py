"""launch/local.sh with real processes, which stand in for main.py."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / 'launch'

PROCESS = """
  import json, os, signal, sys, time
  index = sys.argv[5].split('=')[1]
  got = []
  def tell():
    path = os.path.join(os.environ['OUT'], index)
    told = {'pid': os.getpid(), 'args': sys.argv[1:], 'got': got, 'env': dict(os.environ)}
    with open(path + '.part', 'w') as file:
      json.dump(told, file)
    os.replace(path + '.part', path)
  def note(number, frame):
    got.append(signal.Signals(number).name)
    tell()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
  mode = os.environ.get(f'MODE_{index}', os.environ['MODE'])
  tell()
  if mode == 'ends':
    sys.exit(0)
  if mode == 'fails':
    time.sleep(0.5)
    sys.exit(7)
  while mode == 'hangs' or not got:
    time.sleep(0.05)
  time.sleep(1)  # as if it saved
  got.append('saved')
  tell()
"""


class Local:
  """A run of local.sh with three stand-ins for main.py."""

  def __init__(self, folder, **variables):
    self.folder = folder
    (folder / 'python').write_text(f'#!{sys.executable} -ESs\n{textwrap.dedent(PROCESS)}')
    (folder / 'python').chmod(0o755)
    self.process = subprocess.Popen(
      [LAUNCH / 'local.sh', '3', '--config.seed=1'],
      env={
        'PATH': os.environ['PATH'],
        'PYTHON': str(folder / 'python'),
        'OUT': str(folder),
        'GRACE': '1',
        **variables,
      },
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def told(self, got=0):
    """What each process has written down, once all have, and have got so many signals."""
    deadline = time.monotonic() + 20
    while True:
      files = [self.folder / i for i in '012']
      told = [json.loads(file.read_text()) for file in files if file.exists()]
      if len(told) == 3 and all(len(one['got']) >= got for one in told):
        return told
      assert time.monotonic() < deadline
      time.sleep(0.02)

  def left(self):
    """The processes that are still there."""
    return [one['pid'] for one in self.told() if Path(f'/proc/{one["pid"]}').exists()]


def test_the_processes_get_one_coordinator_and_their_numbers(tmp_path):
  run = Local(tmp_path, MODE='ends', DEVICES='2', XLA_FLAGS='--xla_cpu_enable_fast_math=false')
  assert run.process.wait(20) == 0
  told = run.told()
  (port,) = {re.fullmatch(r'--coordinator=127.0.0.1:(\d+)', t['args'][2])[1] for t in told}
  assert 20000 <= int(port) < 32000
  for i, one in enumerate(told):
    assert one['args'][:2] == ['-m', 'saq_jax.main']
    assert one['args'][3:] == ['--processes=3', f'--process={i}', '--config.seed=1']
    assert one['env']['JAX_PLATFORMS'] == 'cpu'
    flags = '--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=2'
    assert one['env']['XLA_FLAGS'] == flags


@pytest.mark.parametrize('others', ['saves', 'hangs'])
def test_if_one_process_fails_the_others_are_ended(tmp_path, others):
  start = time.monotonic()
  run = Local(tmp_path, MODE=others, MODE_1='fails')
  assert run.process.wait(20) == 7
  assert time.monotonic() - start < 10
  assert run.process.stderr.read().startswith('local.sh: process 1 has ended with code 7')
  assert not run.left()


@pytest.mark.parametrize('how', ['SIGTERM', 'Ctrl-C'])
def test_a_signal_reaches_every_process_once_and_is_waited_for(tmp_path, how):
  run = Local(tmp_path, MODE='saves')
  run.told()
  if how == 'SIGTERM':
    run.process.terminate()
  else:  # A terminal sends it to the whole group.
    os.killpg(run.process.pid, signal.SIGINT)
  assert run.process.wait(20) == 0
  assert [one['got'] for one in run.told()] == [['SIGTERM', 'saved']] * 3


def test_a_second_signal_ends_the_processes_at_once(tmp_path):
  run = Local(tmp_path, MODE='hangs')
  run.told()
  run.process.terminate()
  assert {one['got'][0] for one in run.told(got=1)} == {'SIGTERM'}
  assert run.process.poll() is None
  run.process.terminate()
  assert run.process.wait(20) == 128 + signal.SIGKILL
  assert not run.left()

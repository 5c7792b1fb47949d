"""The chaos of benchmarks/chaos.py in its short form: five kills, one of them with damage."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'


@pytest.fixture
def chaos(monkeypatch):
  """The script as a module."""
  monkeypatch.syspath_prepend(BENCHMARKS)
  import chaos

  monkeypatch.delenv(chaos.NAMESPACE, raising=False)  # in which it would mount a disk
  return chaos


def test_five_kills_lose_nothing(digits_dir, user_env):
  # The prepared digits are found where tfds looks for them.
  process = subprocess.Popen(
    [sys.executable, str(BENCHMARKS / 'chaos.py'), '--short', '--seed=1'],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=user_env | {'TFDS_DATA_DIR': digits_dir},
    start_new_session=True,
  )
  try:
    output, _ = process.communicate(timeout=400)
  finally:
    if process.poll() is None:  # it and the runs that it started
      os.killpg(process.pid, signal.SIGKILL)
  assert process.returncode == 0, output
  rows = re.findall(r'^\| \d+ \| ([a-z ,]+) \| .* \| (-?\d+) \| (.*) \|$', output, re.M)
  codes = {kind: code for kind, code, _ in rows}
  found = {kind: what for kind, _, what in rows}
  assert codes.pop('full disk, stop') in ('0', '1')
  assert codes == {'kill': '-9', 'kill in a save': '-9', 'stop': '0', 'kill and damage': '-9'}
  assert re.fullmatch(r'step \d+ damaged', found['kill and damage'])
  assert output.endswith('bit for bit the unbroken run\n')


def test_damage_that_no_start_tells_of_is_found(chaos, tmp_path):
  run = chaos.Run(tmp_path, [])
  run.printed = ['checkpoint a/10 is damaged', 'started', 'checkpoint a/20 is damaged: a sum']
  run.damaged = [(1, 'a/10'), (1, 'a/20')]
  assert run.unnoticed() == ['a/10']


def test_a_strike_that_fails_leaves_no_process(chaos, tmp_path, monkeypatch):
  started = []

  def start(run):
    started.append(subprocess.Popen(['sleep', '60']))
    return started[-1]

  def fail(*_):
    raise RuntimeError('a strike')

  monkeypatch.setattr(chaos.Run, 'start', start)
  monkeypatch.setattr(chaos, 'strikes', fail)
  with pytest.raises(RuntimeError, match='a strike'):
    chaos.chaos(1, 0, True, tmp_path)
  assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_run_that_does_not_end_is_an_error_and_is_killed(chaos):
  process = subprocess.Popen(['sleep', '60'])
  with pytest.raises(RuntimeError, match=r'does not end in 0 s'):
    chaos.finish(process, 0.1)
  chaos.no_process_left(process)
  assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(('flags', 'kills'), [(['--kills=0'], 0), (['--short'], 5), ([], 20)])
def test_no_kill_is_a_number_too(chaos, monkeypatch, capsys, flags, kills):
  monkeypatch.setenv(chaos.NAMESPACE, '1')  # as if it were in its namespace already
  monkeypatch.setattr(sys, 'argv', ['chaos.py', *flags])
  monkeypatch.setattr(chaos, 'chaos', lambda *args: ([str(args[0])], False))
  assert chaos.main() == 1
  assert f'\n{kills} kills' in capsys.readouterr().out

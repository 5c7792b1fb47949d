"""Progress: what is shown, with a clock of the test's own, on a terminal and in a log."""

import contextlib
import io
import os
import subprocess
import sys

import pytest

from saq_jax.training.progress import Progress


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def run(stream, updates, *, total=100, start=0, **options):
  clock = Clock()
  with Progress('train', total, start, stream=stream, clock=clock, **options) as progress:
    for seconds, step, figures in updates:
      clock.now = 100.0 + seconds
      progress.update(step, **figures)


def test_a_log_gets_a_line_at_the_start_now_and_then_and_at_the_end():
  stream = io.StringIO()
  updates = [(step, step, {'loss': 1 / step}) for step in range(1, 26)]
  run(stream, updates, total=25)
  assert stream.getvalue().splitlines() == [
    'train 0/25',
    'train 10/25 40% 1 steps/s 0:15 left loss 0.1',
    'train 20/25 80% 1 steps/s 0:05 left loss 0.05',
    'train 25/25 100% 1 steps/s loss 0.04',
  ]


def test_the_compilation_of_the_first_step_does_not_count():
  stream = io.StringIO()
  run(stream, [(60, 1, {}), (61, 11, {}), (70, 101, {})], total=301)
  assert stream.getvalue().splitlines() == [
    'train 0/301',
    'train 1/301 0%',
    'train 101/301 33% 10 steps/s 0:20 left',
  ]


def test_a_resumed_run_measures_its_own_steps_only():
  stream = io.StringIO()
  run(stream, [(5, 1001, {}), (7, 1005, {})], total=9005, start=1000)
  assert stream.getvalue().splitlines() == [
    'train 1000/9005',
    'train 1005/9005 11% 2 steps/s 1:06:40 left',
  ]


def test_figures_stay_until_given_again_and_speed_has_three_digits():
  stream = io.StringIO()
  run(stream, [(0, 1, {'accuracy': 0.71234}), (0.5, 1001, {'loss': 2}), (0.8, 1002, {'loss': 1})])
  assert stream.getvalue().splitlines()[-1] == (
    'train 1002/100 1002% 1251 steps/s accuracy 0.7123 loss 1'
  )


def test_an_error_still_leaves_the_last_line():
  stream = io.StringIO()
  with contextlib.suppress(RuntimeError), Progress('train', 9, stream=stream) as progress:
    progress.update(3, loss=float('nan'))
    raise RuntimeError
  assert stream.getvalue().splitlines() == ['train 0/9', 'train 3/9 33% loss nan']


def test_an_empty_run():
  stream = io.StringIO()
  run(stream, [], total=0)
  assert stream.getvalue() == 'train 0/0\n'


@pytest.mark.parametrize('start', [-1, 11])
def test_a_start_outside_the_run_is_refused(start):
  with pytest.raises(ValueError, match='total_steps=10'):
    Progress('train', 10, start)


def test_a_terminal_gets_one_redrawn_line(monkeypatch):
  monkeypatch.setenv('COLUMNS', '100')
  monkeypatch.setenv('TERM', 'xterm')
  stream = io.StringIO()
  run(stream, [(1, 1, {}), (2, 51, {'loss': 0.5})], live=True)
  shown = stream.getvalue()
  assert '\x1b[' in shown
  assert 'train' in shown
  assert '51/100 51% 50 steps/s 0:01 left loss 0.5' in shown
  assert shown.count('\n') == 1


CHILD = """
from saq_jax.training.progress import Progress
with Progress('[train]', 3) as progress:
  for step in 1, 2, 3:
    progress.update(step, loss=1.5)
"""


def test_standard_output_decides_by_itself():
  piped = subprocess.run(
    [sys.executable, '-c', CHILD],
    capture_output=True,
    check=True,
    env=os.environ | {'FORCE_COLOR': '1'},
  ).stdout
  assert b'\x1b' not in piped
  assert piped.startswith(b'[train] 0/3\n[train] 3/3 100%')

  ours, theirs = os.openpty()
  subprocess.run(
    [sys.executable, '-c', CHILD],
    stdout=theirs,
    check=True,
    env=os.environ | {'TERM': 'xterm', 'COLUMNS': '100'},
  )
  os.close(theirs)
  shown = os.read(ours, 100_000)
  os.close(ours)
  assert b'\x1b[' in shown
  assert b'3/3 100%' in shown

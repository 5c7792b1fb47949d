"""Batches ahead of the step: one stream for any workers, and no hang when one dies or is silent."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from local_datasets import prepare

from saq_jax.data.datasets import Examples, load_records
from saq_jax.data.decode import RecordError
from saq_jax.data.loader import Loader, LoaderError, Reading
from saq_jax.data.randaugment import RandAugment
from saq_jax.data.resize import Resizing
from saq_jax.data.source import eval_source, train_source

TWO = Reading(workers=2, timeout=60)
RELEASE = threading.Event()


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('tfds'))
  prepare('imagenet2012', folder, train=24)
  return load_records(
    'imagenet2012',
    'train',
    folder,
    Resizing(8, 10, interpolation='fast'),
    rand_augment=RandAugment(),
    flip=True,
  )


class Slow:
  """A batch that takes its time; from a step on, for ever."""

  def __init__(self, seconds=0.0, stuck_from=10**9):
    self.seconds, self.stuck_from = seconds, stuck_from

  def __call__(self, step):
    if step >= self.stuck_from:
      RELEASE.wait()
    time.sleep(self.seconds)
    return {'step': np.full(3, step), 'pid': np.full(1, os.getpid())}


def slow(**how):
  return grain.MapDataset.range(10**6).map(Slow(**how))


def copied(batch):
  return {name: np.array(array) for name, array in batch.items()}


def read(source, start, stop, reading, decodes=True):
  with Loader(source, start, stop, copied, reading, decodes=decodes) as batches:
    return list(batches)


def assert_same(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


# One stream.


@pytest.mark.parametrize('workers', [0, 2])
def test_any_number_of_workers_gives_the_batches_of_the_steps(records, workers):
  source = train_source(records, 4, seed=3, repeats=2)
  wanted = [source[step] for step in range(9)]
  assert_same(read(source, 0, 9, Reading(workers)), wanted)
  # Stopped after step 4 and gone on with by others.
  assert_same(read(source, 5, 9, Reading(workers + 1)), wanted[5:])


def test_evaluation_batches_too(records):
  source = eval_source(records, 10)
  assert_same(read(source, 0, len(source), TWO), [source[i] for i in range(3)])


def test_no_process_is_begun_for_what_is_in_memory():
  examples = Examples(np.zeros((4, 2, 2, 1), np.uint8), np.arange(4, dtype=np.int32), 4)
  assert examples.decodes is False
  pids = {
    int(b['pid'][0]) for b in read(slow(), 0, 3, Reading(workers=2), decodes=examples.decodes)
  }
  assert pids == {os.getpid()}


def test_workers_are_processes_of_their_own():
  pids = {int(batch['pid'][0]) for batch in read(slow(), 0, 6, TWO)}
  assert len(pids) == 2
  assert os.getpid() not in pids
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)  # and are gone


def test_the_number_of_workers_follows_the_cores(monkeypatch):
  for cores, wanted in ((1, 0), (4, 0), (5, 3), (16, 14), (240, 32)):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _, n=cores: set(range(n)))
    assert Reading().processes() == wanted
    assert Reading(workers=7).processes() == 7


# Ahead of the step.


def test_two_batches_are_transferred_before_they_are_asked_for():
  done = []
  with Loader(slow(), 0, 100, lambda b: done.append(int(b['step'][0])), Reading(0)) as batches:
    iterator = iter(batches)
    next(iterator)
    until = time.monotonic() + 30
    while len(done) < 4 and time.monotonic() < until:
      time.sleep(0.01)
    time.sleep(0.2)
    # One used, two that wait, and one for which there is no place yet.
    assert done == [0, 1, 2, 3]


def test_the_time_without_data_is_measured():
  with Loader(slow(seconds=0.1), 0, 8, copied, Reading(0), decodes=False) as batches:
    list(batches)
    assert batches.waited > 0.6  # nothing else was done
  with Loader(slow(), 0, 8, copied, Reading(0), decodes=False) as batches:
    for _ in batches:
      time.sleep(0.1)
    assert batches.waited < 0.6


# What goes wrong.


def until_error(source, start, reading, at=-1, action=None):
  """Takes batches until none comes, does something to the worker of one, and gives the error."""
  pids = []

  def take_all():
    with Loader(source, start, 10**5, copied, reading) as batches:
      for batch in batches:
        if int(batch['step'][0]) == at:
          pids.append(int(batch['pid'][0]))
          os.kill(pids[0], action)

  with pytest.raises(LoaderError, match='The same command goes on from the last') as error:
    take_all()
  assert '\n' not in str(error.value)
  return str(error.value), (pids or [None])[0]


def test_a_killed_worker_is_named_at_once():
  began = time.monotonic()
  error, pid = until_error(slow(seconds=0.05), 7, Reading(2, timeout=300), 9, signal.SIGKILL)
  # Steps 7, 9, 11, ... are worker 0's.
  assert error.startswith(f'worker 0 of 2 (process {pid}) died with exit code -9')
  assert 'while it made the batch of step' in error
  assert time.monotonic() - began < 60


def test_a_worker_that_is_silent_is_named_after_the_timeout():
  began = time.monotonic()
  error, pid = until_error(slow(seconds=0.05), 0, Reading(2, timeout=5), 21, signal.SIGSTOP)
  assert error.startswith(f'no batch for 5 s: worker 1 of 2 (process {pid}) is silent at step')
  assert time.monotonic() - began < 60
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_a_disk_that_is_silent_is_told_too():
  error, _ = until_error(slow(stuck_from=2), 0, Reading(0, timeout=1))
  RELEASE.set()
  assert error.startswith('no batch for 1 s: this process, which reads its own data, is silent')
  assert 'at step 2' in error
  assert 'config.data.timeout' in error


@pytest.mark.parametrize('workers', [0, 2])
def test_a_damaged_image_is_named_from_any_process(tmp_path, workers):
  prepare('imagenet2012', tmp_path, damaged=(3,), train=8)
  records = load_records('imagenet2012', 'train', str(tmp_path), Resizing(8, 10))
  with pytest.raises(RecordError, match=r"imagenet2012 'train', record \d+ \(train_3\.JPEG\)"):
    read(train_source(records, 4, seed=0), 0, 4, Reading(workers))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  script = tmp_path / 'parent.py'
  script.write_text(
    textwrap.dedent("""
    import os, time
    import grain, numpy as np
    from saq_jax.data.loader import Loader, Reading

    class Make:
      def __call__(self, step):
        return {'pid': np.full(1, os.getpid())}

    if __name__ == '__main__':
      source = grain.MapDataset.range(10**6).map(Make())
      with Loader(source, 0, 10**6, lambda b: int(b['pid'][0]), Reading(2)) as pids:
        pids = iter(pids)
        print(next(pids), next(pids), flush=True)
        time.sleep(600)
    """)
  )
  parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
  pids = [int(pid) for pid in parent.stdout.readline().split()]
  assert len(pids) == 2
  parent.kill()
  parent.wait()
  until = time.monotonic() + 30
  while any(_runs(pid) for pid in pids) and time.monotonic() < until:
    time.sleep(0.1)
  assert not any(_runs(pid) for pid in pids)


def _runs(pid):
  """Whether a process is there, and not only its entry for a parent that did not ask."""
  try:
    state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
  except FileNotFoundError:
    return False
  return state != 'Z'

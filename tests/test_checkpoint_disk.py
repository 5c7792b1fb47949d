"""Full disks: a save that fails leaves the run and the checkpoints before it as they were."""

import errno
import logging
import os
import subprocess
import sys
import types

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from saq_jax.training import checkpoint_disk
from saq_jax.training.checkpoint import Checkpoints
from saq_jax.training.checkpoint_disk import SaveError, disk_reason, room

# A limit on the size of files stands for a full disk; it can be lifted again.
FULL = """
import resource, sys, time
import jax, jax.numpy as jnp
from saq_jax.training.checkpoint import Checkpoints
from saq_jax.training.checkpoint_disk import SaveError

def room(size):
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def state(step):
  key = jax.random.key(step)
  return {str(i): jax.random.normal(jax.random.fold_in(key, i), (300, 300)) for i in range(9)}

def check(step):
  found, restored = checkpoints.restore_latest(state(0))
  assert found == step, found
  assert all((a == b).all() for a, b in zip(restored.values(), state(step).values()))

checkpoints = Checkpoints(sys.argv[1], keep=2)
checkpoints.save(1, state(1))
checkpoints.save(2, state(2))
checkpoints.wait()
room(100_000)
checkpoints.save(3, state(3))
while checkpoints.latest_step == 3:  # a check does not wait
  time.sleep(0.01)
  checkpoints.check()
assert checkpoints.steps == [1, 2], checkpoints.steps
check(2)
checkpoints.save(4, state(4))
checkpoints.save(5, state(5))  # tells of the one before
try:
  checkpoints.wait()
except SaveError as error:
  print(error)
check(2)
room(resource.RLIM_INFINITY)
checkpoints.save(6, state(6))
check(6)
assert checkpoints.steps == [2, 6], checkpoints.steps
room(100_000)
checkpoints.save(7, state(7))
try:
  with checkpoints:
    raise KeyError('the error that ends the run')
except KeyError as error:
  print(error)
"""


def test_a_full_disk_is_survived_told_in_a_line_each_and_tried_again(tmp_path):
  command = [sys.executable, '-c', FULL, str(tmp_path / 'run')]
  child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert child.returncode == 0, child.stderr
  must, last = child.stdout.splitlines()
  reason = os.strerror(errno.EFBIG)
  for step, line in zip((3, 4, 5, 7), [*child.stderr.splitlines()[:2], must, child.stderr]):
    assert f'checkpoint {tmp_path}/run/{step} was not written: {reason}; it takes up to' in line
    assert 'up to 3,240,000 bytes, ' in line
    assert ' bytes are free. The newest one: step ' in line
  assert 'Make room; the same command goes on from there.' in must
  assert last == "'the error that ends the run'"
  # One line a failed save, and nothing of the libraries below.
  lines = child.stderr.splitlines()
  assert len(lines) == 3, child.stderr
  assert all('The run goes on, and the next checkpoint tries again.' in x for x in lines[:2])
  assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == ['2', '6']


def test_what_is_no_failure_of_the_disk_is_not_taken_for_one():
  assert disk_reason(ValueError('a leaf has no shape')) is None
  assert disk_reason(None) is None
  assert disk_reason(OSError(errno.EIO, 'Input/output error')) == 'Input/output error'
  error = RuntimeError('in a thread')
  error.__cause__ = ValueError("Failed to write 7 bytes [os_error_code='122']")
  assert disk_reason(error) == os.strerror(122)
  assert issubclass(SaveError, OSError)  # main ends with a line on it


def test_an_unknown_disk_has_no_known_room(tmp_path):
  assert room(tmp_path).endswith(' bytes are free')
  assert 'not known' in room(tmp_path / 'absent')


def test_only_the_arrays_of_a_failed_save_are_hushed(monkeypatch, caplog):
  seen = []
  checkpoint_disk.hush()
  monkeypatch.setattr(checkpoint_disk, '_former', [lambda unraisable: seen.append(unraisable)])
  for error in (RuntimeError('Event loop is closed'), RuntimeError('another'), OSError(5)):
    checkpoint_disk._hook(types.SimpleNamespace(exc_value=error))
  assert [str(unraisable.exc_value) for unraisable in seen] == ['another', '5']
  with caplog.at_level(logging.ERROR):
    for words in ("not written [os_error_code='28']", 'another'):
      logging.getLogger('asyncio').error('a task', exc_info=ValueError(words))
  assert [str(record.exc_info[1]) for record in caplog.records] == ['another']


def test_a_save_that_cannot_even_begin_is_not_taken_for_written(tmp_path, monkeypatch, caplog):
  def fail(*args, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  state = {'a': jnp.ones(3)}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state)
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'save', fail)
    checkpoints.save(2, state)
    checkpoints.check()
    assert '/2 was not written: No space left on device; it takes up to 12 bytes' in caplog.text
    with pytest.raises(SaveError, match=r'The newest one: step 1\. Make room'):
      checkpoints.wait()
  checkpoints.wait()  # it was told
  checkpoints.save(3, state)
  checkpoints.close()
  assert caplog.text.count('was not written') == 1
  assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '3']


@pytest.mark.parametrize('how', ['wait', 'close'])
def test_a_first_save_that_fails_leaves_nothing(tmp_path, how):
  script = FULL.split('checkpoints = ')[0] + (
    'checkpoints = Checkpoints(sys.argv[1])\nroom(100)\ncheckpoints.save(1, state(1))\n'
    f'try:\n  checkpoints.{how}()\nexcept SaveError as error:\n  print(error)\n'
  )
  command = [sys.executable, '-c', script, str(tmp_path)]
  child = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
  assert 'The newest one: none.' in child.stdout, child.stderr
  assert list(tmp_path.iterdir()) == []

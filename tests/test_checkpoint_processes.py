"""Checkpoints of several processes: one state, and damage that they pass over together."""

import errno
import os
import sys

import jax
import jax.numpy as jnp
import pytest
from runs import succeed

from saq_jax.training.checkpoint import Checkpoints
from saq_jax.training.checkpoint_disk import SaveError

PROCESS = """
import logging, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from saq_jax.training.checkpoint import Checkpoints, restore_subtrees
from saq_jax.training import checkpoint_format
from saq_jax.training.cluster import Cluster, all_agree, differing, from_first, join

logging.basicConfig(format='%(message)s')
folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
join(Cluster('127.0.0.1:' + port, 2, index))
mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec('data'))
whole = NamedSharding(mesh, PartitionSpec())
values = np.arange(24, dtype=np.float32).reshape(8, 3)

def make(step, sharding):
  return jax.make_array_from_callback((8, 3), sharding, lambda at: step * values[at])

def check(state, step):
  for leaf in jax.tree.leaves(state):
    for shard in leaf.addressable_shards:
      assert (np.asarray(shard.data) == step * values[shard.index]).all()

# What they agree on.
assert all_agree(True) and not all_agree(index == 0)
assert from_first('ä process 0' if index == 0 else 'another, longer one') == 'ä process 0'
assert from_first('' if index == 0 else 'x') == ''
assert differing({'a': 'same', 'b': str(index), 'c': 'same'}) == ['b']

# One state, in other layouts, and parts of it.
example = {'a': make(0, whole), 'b': {'c/d': make(0, rows)}}
with Checkpoints(folder) as checkpoints:
  for step in (1, 2, 3):
    checkpoints.save(step, {'a': make(step, rows), 'b': {'c/d': make(step, whole)}})
  step, state = checkpoints.restore_latest(example)
  assert step == 3
  check(state, 3)
if index == 1:  # of one process alone
  part, = restore_subtrees(folder, 'b')
  assert (part['c/d'] == 3 * values).all()

# The third cannot be read by process 1 alone, the second has a wrong bit in the part of one.
read = checkpoint_format._read
def fails(step_dir, args):
  if index == 1 and step_dir.name == '3':
    raise checkpoint_format.DamagedCheckpointError(f'{step_dir}: its chunk is bad')
  restored = read(step_dir, args)
  if index == 1 and step_dir.name == '2':
    restored['b']['c/d'] = restored['b']['c/d'] + 1
  return restored
checkpoint_format._read = fails
with Checkpoints(folder) as checkpoints:
  step, state = checkpoints.restore_latest(example)
  assert step == 1
  check(state, 1)
  checkpoint_format._read = read
  checkpoints.save(2, {'a': make(7, rows), 'b': {'c/d': make(7, whole)}})
  step, state = checkpoints.restore_latest(example)
  assert step == 2
  check(state, 7)

# A disk that fails for one of them is no damage, for neither.
def disk(step_dir, args):
  if index == 1:
    raise OSError(5, 'Input/output error')
  return read(step_dir, args)
checkpoint_format._read = disk
with Checkpoints(folder) as checkpoints:
  try:
    checkpoints.restore_latest(example)
  except OSError as error:
    print(error)
  assert checkpoints.steps == [1, 2]
print('done')
"""


def test_two_processes_have_one_state_and_pass_over_damage_together(tmp_path):
  env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  words = sys.executable, '-c', PROCESS, tmp_path
  (first, first_told), (second, second_told) = succeed(2, lambda *which: [*words, *which], env, 120)
  assert f'another process did not read checkpoint {tmp_path}/2: it tells why' in first
  assert 'Input/output error' in second
  assert first.endswith('done\n')
  assert second.endswith('done\n')
  assert '3 is damaged: another process cannot read its part of it; going back' in first_told
  assert '3: its chunk is bad; going back' in second_told
  for told in (first_told, second_told):
    assert '2 is damaged: b.c/d is not what was written; going back' in told


@pytest.fixture
def failing(tmp_path, monkeypatch):
  """Checkpoints of two processes, whose save under way the disk fails."""

  def fail():
    raise ValueError("Failed to write [os_error_code='28']")

  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, {'a': jnp.ones(3)})
  checkpoints.wait()
  with monkeypatch.context() as patch:
    patch.setattr(jax, 'process_count', lambda: 2)
    patch.setattr(checkpoints._manager, 'wait_until_finished', fail)
    checkpoints._begun = 2, 12
    yield checkpoints
  checkpoints._begun = None
  checkpoints.close()


def test_a_full_disk_is_one_line_with_several_processes_too(failing):
  with pytest.raises(SaveError) as error:
    failing.wait()
  assert '/2 was not written: ' + os.strerror(errno.ENOSPC) in str(error.value)
  assert 'it takes up to 12 bytes' in str(error.value)
  assert 'Make room; the same command goes on from the one before' in str(error.value)


def test_a_failed_save_does_not_hide_the_error_that_ends_the_run(failing, caplog):
  with pytest.raises(KeyError), failing:
    raise KeyError('the error')
  assert caplog.text.count('was not written') == 1

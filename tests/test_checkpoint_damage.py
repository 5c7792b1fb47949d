"""Damaged checkpoints: found and passed over, and told apart from a disk that fails."""

import errno
import gc
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from checkpoint_states import assert_same_bits, files_of, flip, make_state, save_steps

from saq_jax.training import checkpoint_format
from saq_jax.training.checkpoint import Checkpoints, restore, restore_subtrees

# Orbax leaves reads behind that complain when they are collected, once a checkpoint is damaged.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

DAMAGES = {
  'delete': lambda path: path.unlink(),
  'truncate': lambda path: os.truncate(path, path.stat().st_size // 2),
  'flip': flip,
  'garbage': lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
}


@pytest.mark.usefixtures('_collected')
@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_to_any_file_is_harmless_or_falls_back(tmp_path, damage, caplog):
  """Every file of the newest checkpoint in turn: never a wrong state, and never an error."""
  source = save_steps(tmp_path / 'source', 1, 2)
  fell_back = 0
  for path in files_of(source / '2'):
    run = tmp_path / 'run'
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(source, run)
    DAMAGES[damage](run / path.relative_to(source))
    caplog.clear()
    with Checkpoints(run) as checkpoints:
      step, restored = checkpoints.restore_latest(make_state())
      assert_same_bits(restored, make_state(step))
      if step == 1:
        fell_back += 1
        assert f'{run}/2 is damaged' in caplog.text
        assert checkpoints.latest_step == 1
  assert fell_back >= 3


@pytest.fixture
def _collected():
  yield
  gc.collect()


def spoil(step_dir):
  for path in step_dir.glob('state/**/d/*'):
    flip(path)


def test_a_single_wrong_bit_among_the_values_is_found(tmp_path):
  """Orbax reads it without a word: the sums of bits find it."""
  state = {'big': jax.random.normal(jax.random.key(0), (200, 200))}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
  flip(max(files_of(tmp_path / '1'), key=lambda path: path.stat().st_size))
  for attempt in (lambda: restore(tmp_path, state), lambda: restore_subtrees(tmp_path, 'big')):
    with pytest.raises(ValueError, match='is damaged: big is not what was written'):
      attempt()


@pytest.mark.usefixtures('_collected')
def test_the_run_goes_on_over_a_damaged_checkpoint(tmp_path):
  save_steps(tmp_path, 1, 2)
  spoil(tmp_path / '2')
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(make_state())[0] == 1
    assert (tmp_path / '2').is_dir()  # kept until the run writes again
    checkpoints.save(2, make_state(2))
    step, restored = checkpoints.restore_latest(make_state())
  assert step == 2
  assert_same_bits(restored, make_state(2))


@pytest.mark.usefixtures('_collected')
def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
  save_steps(tmp_path, 1, 2)
  for step in '12':
    spoil(tmp_path / step)
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match='remove that direct'):
    checkpoints.restore_latest(make_state())
  for attempt in (
    lambda: restore(tmp_path, make_state()),
    lambda: restore_subtrees(tmp_path, 'params', 'opt_state'),
  ):
    with pytest.raises(ValueError, match=rf'{tmp_path}/2 is damaged'):
      attempt()


SAVING = """
import sys
import jax.numpy as jnp
from saq_jax.training import checkpoint_format
from saq_jax.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
found = checkpoints.restore_latest({str(i): jnp.zeros((300, 300)) for i in range(20)})
step = found[0] if found else 0
while True:
  step += 1
  checkpoints.save(step, {str(i): jnp.full((300, 300), float(step)) for i in range(20)})
  print(step, flush=True)
"""


def test_killed_in_mid_save_and_resumed(tmp_path):
  """Four kills at random moments of a loop that does nothing but save."""
  begun, moments = 0, random.Random(1)
  example = {str(i): jnp.zeros((300, 300)) for i in range(20)}
  half_written = 0
  for _ in range(4):
    child = subprocess.Popen([sys.executable, '-c', SAVING, str(tmp_path)], stdout=subprocess.PIPE)
    for _ in range(3):
      begun = int(next(child.stdout))
    with pytest.raises(subprocess.TimeoutExpired):
      child.wait(timeout=moments.uniform(0, 0.05))
    child.kill()
    child.wait()
    half_written += any('tmp' in path.name for path in tmp_path.iterdir())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
      step, restored = checkpoints.restore_latest(example)
      assert step >= begun - 1  # a save waits for the one before it
      assert all((leaf == step).all() for leaf in jax.tree.leaves(restored))
      assert all(path.name.isdigit() for path in tmp_path.iterdir())
  assert half_written


def failing_with(code):
  return ValueError(f"Error reading array 'a' [os_error_code='{code}']")


@pytest.mark.parametrize(
  ('error', 'raised'),
  [
    (OSError(errno.EIO, 'Input/output error'), OSError),
    (PermissionError(errno.EACCES, 'Permission denied'), OSError),
    (MemoryError(), MemoryError),
    # As TensorStore tells of the system's errors.
    *[(failing_with(code), OSError) for code in (errno.EIO, errno.ESTALE, errno.EACCES)],
  ],
)
def test_an_error_that_may_pass_is_not_taken_for_damage(tmp_path, monkeypatch, error, raised):
  save_steps(tmp_path, 1, 2)

  def fail(*args, **kwargs):
    raise error

  with monkeypatch.context() as broken, Checkpoints(tmp_path) as checkpoints:
    broken.setattr(ocp.Checkpointer, 'restore', fail)
    with pytest.raises(raised) as caught:
      checkpoints.restore_latest(make_state())
    assert raised is MemoryError or f'{tmp_path}/2 cannot be read: ' in str(caught.value)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == [1, 2]
    assert checkpoints.restore_latest(make_state())[0] == 2


@pytest.mark.parametrize('name', ['_CHECKPOINT_METADATA', '_METADATA'])
def test_neither_is_a_description_that_the_disk_does_not_give(tmp_path, monkeypatch, name):
  save_steps(tmp_path, 1, 2)
  (file,) = (path for path in files_of(tmp_path / '2') if path.name == name)
  whole, read = file.read_bytes(), Path.read_bytes

  def fail(path):
    if path == file:
      raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return read(path)

  file.write_bytes(b'')  # as Orbax, which says nothing of the disk, sees it
  with monkeypatch.context() as broken, Checkpoints(tmp_path) as checkpoints:
    broken.setattr(Path, 'read_bytes', fail)
    with pytest.raises(OSError, match='2 cannot be read: Stale file handle'):
      checkpoints.restore_latest(make_state())
  file.write_bytes(whole)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(make_state())[0] == 2


@pytest.mark.parametrize('code', [errno.ENOENT, errno.ENOTDIR, errno.EISDIR])
def test_a_file_that_is_missing_is_damage(tmp_path, monkeypatch, code):
  save_steps(tmp_path, 1)

  def fail(*args, **kwargs):
    raise failing_with(code)

  monkeypatch.setattr(ocp.Checkpointer, 'restore', fail)
  with pytest.raises(checkpoint_format.DamagedCheckpointError):
    restore(tmp_path, make_state())

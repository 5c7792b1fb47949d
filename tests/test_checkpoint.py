"""Checkpoints: exact round trips, misfits, newer formats, and foreign paths."""

import functools
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from checkpoint_states import KERNEL, State, assert_same_bits, make_state, save_steps
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from saq_jax.training import checkpoint_format
from saq_jax.training.checkpoint import Checkpoints, find_checkpoint, restore, restore_subtrees

# Orbax leaves reads behind that complain when they are collected, once a checkpoint is damaged.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def test_a_state_comes_back_bit_for_bit(tmp_path):
  state = make_state(5)
  save_steps(tmp_path, 5)
  with Checkpoints(tmp_path) as checkpoints:
    step, restored = checkpoints.restore_latest(make_state(0))
  assert step == 5
  assert isinstance(restored, State)
  assert_same_bits(restored, state)


def test_empty_parts_and_a_bare_tree_come_back(tmp_path):
  state = {'a': {}, 'b': (), 'c': [jnp.ones(2), {'d': None}]}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, state)
    assert_same_bits(checkpoints.restore_latest(state)[1], state)


def test_restores_to_the_examples_sharding(tmp_path):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  whole = NamedSharding(mesh, PartitionSpec())

  def place(leaf):
    return rows if leaf.ndim and leaf.shape[0] == 8 else whole

  state = make_state(1)
  sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf)), state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, sharded)
    on_one = checkpoints.restore_latest(state)[1]
    checkpoints.save(2, state)
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), state
    )
    on_all = checkpoints.restore_latest(abstract)[1]
  assert_same_bits(on_one, state)
  assert_same_bits(on_all, state)
  for expected, restored in ((state, on_one), (sharded, on_all)):
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(restored)):
      assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_a_saved_state_may_be_donated_at_once(tmp_path):
  @functools.partial(jax.jit, donate_argnums=0)
  def count(tree):
    return jax.tree.map(lambda leaf: leaf + 1, tree)

  tree = count({str(i): jnp.zeros((256, 256)) for i in range(6)})
  with Checkpoints(tmp_path, keep=30) as checkpoints:
    for step in range(1, 31):
      if step % 5 == 0:
        checkpoints.save(step, tree)
      tree = count(tree)
  for step in range(5, 31, 5):
    restored = restore(tmp_path / str(step), tree)
    assert all((leaf == step).all() for leaf in jax.tree.leaves(restored))


def test_the_last_ones_are_kept_and_a_step_is_saved_once(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest_step is None
    assert checkpoints.restore_latest(make_state()) is None
    for step in (1, 2, 3, 3, 4):
      checkpoints.save(step, make_state(step))
      assert checkpoints.latest_step == step
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['3', '4']
    with pytest.raises(ValueError, match=r'step 2 is older than .* 4'):
      checkpoints.save(2, make_state(2))
  with pytest.raises(ValueError, match='keep=0'):
    Checkpoints(tmp_path, keep=0)


FULL = """
import resource, sys
import jax, jax.numpy as jnp
from saq_jax.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints.save(1, {'a': jax.random.normal(jax.random.key(0), (500, 500))})
try:
  getattr(checkpoints, sys.argv[2])()
except (OSError, ValueError):
  print('failed')
"""


@pytest.mark.parametrize('how', ['wait', 'close'])
def test_a_save_that_fails_is_not_silent(tmp_path, how):
  """A limit on the size of files stands for a full disk."""
  command = [sys.executable, '-c', FULL, str(tmp_path), how]
  child = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert child.stdout == 'failed\n', child.stderr
  with pytest.raises(ValueError, match='no checkpoint'):
    find_checkpoint(tmp_path)


def test_names_that_orbax_would_mix_up_are_refused(tmp_path):
  state = {'scales': {'a.b': jnp.ones(1), 'a': {'b': jnp.zeros(1)}}}
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=r"'a\.b'"):
      checkpoints.save(1, state)
    # Slashes, as the paths of scales have them, stay apart from nesting.
    state = {
      's': {'a/b': jnp.ones(1), 'a': {'b': jnp.zeros(1)}, 'c/0': jnp.ones(2), 'c': jnp.ones(1)}
    }
    checkpoints.save(1, state)
    assert_same_bits(checkpoints.restore_latest(state)[1], state)


def test_parts_are_read_as_numpy_whatever_the_rest_is(tmp_path):
  state = make_state(4)
  save_steps(tmp_path, 4)
  params, batch_stats = restore_subtrees(tmp_path, 'params', 'batch_stats')
  assert_same_bits(params, state.params)
  assert_same_bits(batch_stats, state.batch_stats)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((params, batch_stats)))
  with pytest.raises(ValueError, match=r"no 'ema'; it holds \['batch_stats', 'opt_state'"):
    restore_subtrees(tmp_path, 'params', 'ema')


# ---- What does not fit


def change(state, edit):
  model = jax.tree.map(lambda leaf: leaf, state.params)
  edit(model)
  return state.replace(params=model)


MISFITS = {
  'missing': (
    lambda p: p['model'].update(new=jnp.ones(2)),
    [r'params\.model\.new +- +float32\[2\]'],
  ),
  'extra': (
    lambda p: p['scales'].pop(KERNEL),
    [rf'params\.scales\.{KERNEL} +float32\[\] +-'],
  ),
  'misshapen': (
    lambda p: p['scales'].update({KERNEL: jnp.ones(3)}),
    [rf'params\.scales\.{KERNEL} +float32\[\] +float32\[3\]'],
  ),
  'dtype': (
    lambda p: p['model']['head'].update(kernel=jnp.ones(8, jnp.bfloat16)),
    [r'params\.model\.head\.kernel +float32\[8\] +bfloat16\[8\]'],
  ),
  'renamed': (
    lambda p: p['model'].update(tail=p['model'].pop('head')),
    [r'head\.kernel +float32\[8\] +-', r'tail\.kernel +- +float32\[8\]'],
  ),
}


@pytest.mark.parametrize('kind', MISFITS)
def test_a_tree_that_does_not_fit_is_shown_side_by_side(tmp_path, kind):
  edit, rows = MISFITS[kind]
  save_steps(tmp_path, 1, 2)
  example = change(make_state(), edit)
  with Checkpoints(tmp_path) as checkpoints:
    for attempt in (checkpoints.restore_latest, lambda example: restore(tmp_path, example)):
      with pytest.raises(ValueError, match='does not fit') as caught:
        attempt(example)
      assert not isinstance(caught.value, checkpoint_format.DamagedCheckpointError)
      for row in rows:
        caught.match(row)
    assert checkpoints.latest_step == 2


def test_only_some_of_many_misfits_are_listed(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {str(i): jnp.ones(i) for i in range(1, 31)})
    with pytest.raises(ValueError, match=r'differing: 30\n(.*\n){9}  and 22 more'):
      checkpoints.restore_latest({str(i): jnp.ones(i + 1) for i in range(1, 31)})


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint_format, 'FORMAT', 2)
    save_steps(tmp_path, 1)
  for attempt in (lambda: restore(tmp_path, make_state()), lambda: restore_subtrees(tmp_path, 'x')):
    with pytest.raises(ValueError, match=r'format 2, this version reads up to 1.*newer'):
      attempt()


def test_a_newer_format_is_kept_whatever_its_parts_are_called(tmp_path, monkeypatch):
  """It is no damage: nothing of it is known, and nothing of it is removed."""
  save_steps(tmp_path, 1)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint_format, 'FORMAT', 2)
    save_steps(tmp_path, 2)
  (tmp_path / '2' / 'state').rename(tmp_path / '2' / 'everything')
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=r'format 2, this version reads up to 1.*newer') as caught:
      checkpoints.restore_latest(make_state())
    assert not isinstance(caught.value, checkpoint_format.DamagedCheckpointError)
    assert checkpoints.steps == [1, 2]


# ---- Paths of other runs


def test_the_newest_is_found_from_the_run_the_stage_and_the_step(tmp_path):
  first = save_steps(tmp_path / 'run' / 'float' / 'checkpoints', 10, 20)
  second = save_steps(tmp_path / 'run' / 'quantized' / 'checkpoints', 3, 5)
  (tmp_path / 'run' / 'logs').mkdir()
  (tmp_path / 'run' / '7').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{}')
  os.rename(second / '5', second / '5.orbax-checkpoint-tmp')  # as a kill leaves one
  for path, step in (
    (tmp_path / 'run', second / '3'),
    (str(tmp_path / 'run' / 'quantized'), second / '3'),
    (tmp_path / 'run' / 'float', first / '20'),
    (first, first / '20'),
    (str(first / '10') + '/', first / '10'),
  ):
    assert str(find_checkpoint(path)) == str(step)
    assert int(restore(path, make_state()).step) == int(step.name)


def test_a_path_without_a_checkpoint_is_one_line(tmp_path):
  (tmp_path / 'empty' / 'sub').mkdir(parents=True)
  (tmp_path / 'file').write_text('')
  for name in ('absent', 'empty', 'file'):
    with pytest.raises(ValueError, match=rf'^no checkpoint at .*{name}: .*$'):
      restore(tmp_path / name, make_state())


def test_a_foreign_directory_of_numbers_is_no_checkpoint(tmp_path):
  (tmp_path / '12').mkdir()
  (tmp_path / '12' / 'weights.bin').write_bytes(b'abc')
  with pytest.raises(ValueError, match=r'(?s)12 is damaged'):
    restore(tmp_path, make_state())


def test_orbax_keeps_quiet(tmp_path, caplog):
  before = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.INFO)
  logger = absl_logging.get_absl_logger()
  logger.addHandler(caplog.handler)
  try:
    save_steps(tmp_path, 1, 2)
    restore(tmp_path, make_state())
    assert [record for record in caplog.records if record.name == 'absl'] == []
    with caplog.at_level(logging.INFO):
      absl_logging.info('the program itself')
    assert 'the program itself' in caplog.text
  finally:
    logger.removeHandler(caplog.handler)
    absl_logging.set_verbosity(before)

"""Which checkpoints stay, the best one, what is noted beside them, and going back."""

import json

import jax.numpy as jnp
import pytest

from saq_jax.training.checkpoint import Checkpoints, find_best, find_checkpoint
from saq_jax.training.checkpoint_format import DamagedCheckpointError, read_notes
from saq_jax.training.checkpoint_policy import Retention


def state(step):
  return {'step': jnp.int32(step), 'w': jnp.full(4, float(step))}


def there(folder):
  return sorted(int(path.name) for path in folder.iterdir())


def test_what_was_not_due_pushes_nothing_out_and_goes_with_the_next(tmp_path):
  with Checkpoints(tmp_path, keep=2, every=10) as checkpoints:
    for step in (10, 20, 23, 27, 30, 31):
      checkpoints.save(step, state(step))
      checkpoints.wait()
      assert checkpoints.latest_step == step
    assert there(tmp_path) == [20, 30, 31]
    assert checkpoints.due == [20, 30]


@pytest.mark.parametrize('keep_best', [True, False])
def test_the_best_stays_over_restarts_and_is_found(tmp_path, keep_best):
  scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: 0.7, 6: 0.1}
  for step, score in scores.items():
    with Checkpoints(tmp_path / 'saq' / 'checkpoints', keep=2, keep_best=keep_best) as checkpoints:
      checkpoints.save(step, state(step), score=score)
      checkpoints.wait()
      known = checkpoints.best
  if keep_best:
    assert known == (2, 0.9)  # the earlier of the equal ones
    assert there(tmp_path / 'saq' / 'checkpoints') == [2, 5, 6]
    assert find_best(tmp_path / 'saq').name == '2'
  else:
    assert known == (5, 0.7)
    assert there(tmp_path / 'saq' / 'checkpoints') == [5, 6]
  assert find_checkpoint(tmp_path).name == '6'


def test_without_scores_there_is_no_best(tmp_path):
  with Checkpoints(tmp_path, keep_best=True) as checkpoints:
    assert checkpoints.best is None
    checkpoints.save(1, state(1))
    assert checkpoints.best is None
  with pytest.raises(ValueError, match='has a score: none was saved with an evaluation'):
    find_best(tmp_path)
  with pytest.raises(ValueError, match='no such directory'):
    find_best(tmp_path / 'absent')


def test_a_damaged_checkpoint_is_passed_over_in_the_search_for_the_best(tmp_path):
  with Checkpoints(tmp_path, keep=9) as checkpoints:
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.7)):
      checkpoints.save(step, state(step), score=score)
  for step, best in ((2, '3'), (1, '3')):
    (tmp_path / str(step) / '_CHECKPOINT_METADATA').write_text('{')
    assert find_best(tmp_path).name == best
  (tmp_path / '3' / '_CHECKPOINT_METADATA').write_text('{')
  with pytest.raises(DamagedCheckpointError):
    find_best(tmp_path)


def test_of_equal_checkpoints_the_newest_stay_without_scores():
  retention = Retention(3, True, 5, lambda step: None)
  assert retention.staying(range(1, 22)) == {10, 15, 20, 21}


def test_notes_come_back_and_are_guarded(tmp_path):
  notes = {'losses': [0.1, 1e-45, 2.5], 'steps_back': {'count': 2}}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state(1), notes, 0.75)
    checkpoints.save(2, state(2))
    checkpoints.wait()
    assert checkpoints.notes(1) == notes
    assert checkpoints.notes(2) == {}
  file = tmp_path / '1' / '_CHECKPOINT_METADATA'
  changed = json.loads(file.read_text())
  changed['custom_metadata']['notes'] = changed['custom_metadata']['notes'].replace('2.5', '2.6')
  file.write_text(json.dumps(changed))
  with pytest.raises(DamagedCheckpointError, match='its notes are not what was written'):
    read_notes(find_checkpoint(tmp_path / '1'))
  with Checkpoints(tmp_path, keep_best=True) as checkpoints:
    assert checkpoints.best is None  # a damaged one is not the best


def test_a_checkpoint_from_before_there_were_notes_is_read(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state(1))
  file = tmp_path / '1' / '_CHECKPOINT_METADATA'
  old = json.loads(file.read_text())
  for name in ('notes', 'sum_of_notes'):
    del old['custom_metadata'][name]
  file.write_text(json.dumps(old))
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(state(0))[0] == 1
    assert checkpoints.notes(1) == {}


def test_going_back_removes_what_came_after_and_the_steps_can_be_saved_again(tmp_path):
  with Checkpoints(tmp_path, keep=9, keep_best=True) as checkpoints:
    for step in range(1, 6):
      checkpoints.save(step, state(step), {'was': 'first'}, score=step / 10)
    checkpoints.drop_after(3)
    assert there(tmp_path) == [1, 2, 3]
    assert checkpoints.best == (3, 0.3)
    checkpoints.save(4, state(40), {'was': 'second'}, score=0.1)
    step, restored = checkpoints.restore_latest(state(0))
    assert (step, int(restored['step']), checkpoints.notes(4)) == (4, 40, {'was': 'second'})
    assert checkpoints.best == (3, 0.3)
    checkpoints.drop_after(0)
    assert checkpoints.restore_latest(state(0)) is None

"""The bookkeeping of a stage: what a step that is not finite is told with."""

import types

import pytest

from saq_jax.training.loop import DivergedError, Stop, _Run

STAGE = types.SimpleNamespace(name='saq', log_every=1, total_steps=100, checkpoint_every=10)
FIGURES = {'loss': float('nan'), 'sharp_grad_norm': 1.0, 'lr': 0.125, 'accuracy': 0.0}


class Lines:
  def __init__(self):
    self.steps = []

  def write(self, step, figures):
    self.steps.append(step)


@pytest.mark.parametrize(
  ('saved', 'words'),
  [
    ([], 'no checkpoint is good'),
    ([39], 'no checkpoint is good'),  # its parameters were first seen at step 40
    ([20, 30, 39], 'the last good checkpoint is step 30'),
    ([20, 38], 'the last good checkpoint is step 38'),
  ],
)
def test_the_last_good_checkpoint_is_one_that_a_finite_step_followed(saved, words):
  checkpoints = types.SimpleNamespace(steps=saved, wait=lambda: None)
  lines = Lines()
  run = _Run(STAGE, lambda state, batch: (state, FIGURES), checkpoints, lines, None, Stop())
  run.advance(None, None, 40)
  with pytest.raises(DivergedError, match=words) as error:
    run.settle()
  assert 'learning rate 0.125' in str(error.value)
  assert "stage 'saq' diverged at step 40" in str(error.value)
  assert lines.steps == [40]

"""What a stage writes down while it runs, by the first process alone."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from saq_jax.training.evaluate import Score
from saq_jax.training.metrics import MetricWriter

# The clock's figures have a folder of their own: the metrics are the same whenever a run is stopped
# and resumed, and on a machine of any speed.
TIMING = 'timing'


class StageLog:
  """Writes the metrics of a stage, each with its epoch, and beside them how fast it went.

  Args:
    directory: of the stage: holds 'metrics.jsonl' and 'timing/metrics.jsonl', and TensorBoard's
      event files with each.
    steps_per_epoch: training examples over the batch size.
    resume_step: the step that is gone on from; None at a new beginning.
  """

  def __init__(self, directory: Path, steps_per_epoch: float, resume_step: int | None) -> None:
    self._steps_per_epoch = steps_per_epoch
    self._writers = []
    if jax.process_index() == 0:
      self._writers = [MetricWriter(d, resume_step) for d in (directory, directory / TIMING)]
    self._last: tuple[int, float, float] | None = None

  def __enter__(self) -> 'StageLog':
    return self

  def __exit__(self, *exception: object) -> None:
    for writer in self._writers:
      writer.close()

  def write(self, step: int, figures: Mapping[str, Any]) -> None:
    """Writes a line of metrics.

    Args:
      step: finished steps.
      figures: a name and a number each.
    """
    if self._writers:
      self._writers[0].write(step, {'epoch': step / self._steps_per_epoch, **figures})

  def write_score(self, step: int, score: Score) -> None:
    """Writes an evaluation.

    Args:
      step: finished steps.
      score: what it found.
    """
    figures: dict[str, Any] = {'test_loss': score.loss, 'test_accuracy': score.accuracy}
    self.write(step, figures | ({'test_damaged': score.damaged} if score.damaged else {}))

  def write_timing(self, step: int, waited: float) -> float | None:
    """Writes the speed since the call before, and which share of the time went by without data.

    Args:
      step: finished steps.
      waited: seconds for which the loop has waited for batches since it began.

    Returns:
      That share, 0 to 1; None at the first call.
    """
    now, last = time.monotonic(), self._last
    self._last = step, now, waited
    if last is None or now <= last[1]:
      return None
    seconds = now - last[1]
    share = min(1.0, (waited - last[2]) / seconds)
    if self._writers:
      figures = {'data_wait': share, 'steps_per_second': (step - last[0]) / seconds}
      self._writers[1].write(step, figures)
    return share

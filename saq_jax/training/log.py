"""What a stage writes down while it runs, by the first process alone."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saq_jax.training.checkpoint_disk import disk_reason, room
from saq_jax.training.evaluate import Score
from saq_jax.training.metrics import MetricWriter

# The clock's figures have a folder of their own: the metrics are the same whenever a run is stopped
# and resumed, and on a machine of any speed.
TIMING = 'timing'


class StageLog:
  """Writes the metrics of a stage, each with its epoch, and beside them how fast it went.

  While the disk is full or fails, the lines are kept in memory, with a warning; `sync` tells
  whether all are written.

  Args:
    directory: of the stage: holds 'metrics.jsonl' and 'timing/metrics.jsonl', and TensorBoard's
      event files with each.
    steps_per_epoch: training examples over the batch size.
    resume_step: the step that is gone on from; None at a new beginning.
    steps_back: how often the stage went back to a checkpoint, noted in each line where it did.
  """

  def __init__(
    self,
    directory: Path,
    steps_per_epoch: float,
    resume_step: int | None,
    steps_back: int = 0,
  ) -> None:
    self._directory, self._steps_per_epoch = directory, steps_per_epoch
    self._more = {'steps_back': steps_back} if steps_back else {}
    self._writers = []
    if jax.process_index() == 0:
      self._writers = [MetricWriter(d, resume_step) for d in (directory, directory / TIMING)]
    self._last: tuple[int, float, float] | None = None
    self._kept = False  # whether that was told since all lines were written

  def __enter__(self) -> 'StageLog':
    return self

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    for writer in self._writers:
      try:
        writer.close()
      except OSError:
        if error is None:
          raise
        # It would hide the error that ends the run, which goes on from a checkpoint before.

  def write(self, step: int, figures: Mapping[str, Any]) -> None:
    """Writes a line of metrics.

    Args:
      step: finished steps.
      figures: a name and a number each.
    """
    if self._writers:
      epoch = step / self._steps_per_epoch
      self._take(self._writers[0].write, step, {'epoch': epoch, **figures, **self._more})

  def write_score(self, step: int, score: Score) -> None:
    """Writes an evaluation.

    Args:
      step: finished steps.
      score: what it found.
    """
    figures: dict[str, Any] = {'test_loss': score.loss, 'test_accuracy': score.accuracy}
    self.write(step, figures | ({'test_damaged': score.damaged} if score.damaged else {}))

  def start_timing(self, step: int, waited: float) -> None:
    """Begins a new interval of `write_timing`.

    Args:
      step: finished steps.
      waited: as there.
    """
    self._last = step, time.monotonic(), waited

  def write_timing(self, step: int, waited: float, seconds: Sequence[float] = ()) -> float | None:
    """Writes the speed since the call before, and which share of the time went by without data.

    Beside them are the median, the 95th percentile and the longest of the steps' times, and the
    memory of the fullest device, where the backend tells it.

    Args:
      step: finished steps.
      waited: seconds for which the loop has waited for batches since it began.
      seconds: that each step since the call before took, as far as they are known.

    Returns:
      That share, 0 to 1; None at the first call.
    """
    now, last = time.monotonic(), self._last
    self._last = step, now, waited
    if last is None or now <= last[1]:
      return None
    passed = now - last[1]
    share = min(1.0, (waited - last[2]) / passed)
    if self._writers:
      figures = {'data_wait': share, 'steps_per_second': (step - last[0]) / passed}
      self._take(self._writers[1].write, step, figures | _spread(seconds) | _memory())
    return share

  def sync(self) -> None:
    """Writes the lines that are kept, and waits until all are on the disk itself.

    Raises:
      OSError: if the disk is full or fails.
    """
    try:
      for writer in self._writers:
        writer.sync()
    except OSError as error:
      raise OSError(self._not_written(error)) from error
    self._kept = False

  def _take(self, write: Callable[..., None], *line: Any) -> None:
    """Writes a line; warns, once, where the disk does not take it."""
    try:
      write(*line)
    except OSError as error:
      if not self._kept:
        warning = '%s They are kept in memory, and the run goes on.'
        logging.getLogger(__name__).warning(warning, self._not_written(error))
      self._kept = True

  def _not_written(self, error: OSError) -> str:
    """The message for lines that the disk did not take."""
    place = self._directory
    return f'the metrics in {place} cannot be written: {disk_reason(error)}; {room(place)}.'


def _spread(seconds: Sequence[float]) -> dict[str, float]:
  """Median, 95th percentile and maximum of the steps' times, in seconds."""
  if not seconds:
    return {}
  median, high, longest = np.percentile(seconds, (50, 95, 100))
  return {'step_p50': float(median), 'step_p95': float(high), 'step_max': float(longest)}


def _memory() -> dict[str, int]:
  """Bytes in use and the most that were, of the fullest of this process's devices."""
  try:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
  except jax.errors.JaxRuntimeError:  # a backend that cannot tell
    return {}
  named = {'memory_in_use': 'bytes_in_use', 'memory_peak': 'peak_bytes_in_use'}
  found = {name: [s[key] for s in stats if key in s] for name, key in named.items()}
  return {name: max(values) for name, values in found.items() if values}

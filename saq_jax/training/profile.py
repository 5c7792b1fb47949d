"""A trace of some steps by JAX's profiler."""

import contextlib
import re
from pathlib import Path

import jax

from saq_jax.training.checkpoint_disk import disk_reason

__all__ = ['FOLDER', 'Profile']

FOLDER = 'profile'
_STEPS = re.compile(r'([0-9]+):([0-9]+)')


class Profile:
  """Records some steps of the first stage that takes them, once, and by the first process.

  A run that goes on from a checkpoint between them records the rest of them.

  Args:
    first: the first step to record, at least 1.
    last: the last one.

  Raises:
    ValueError: if these are no steps in order.

  Example:
    >>> profile = Profile.parse('10:12')
    >>> [step for step in range(8, 15) if profile.wants(step)]
    [10, 11, 12]
  """

  def __init__(self, first: int, last: int) -> None:
    if not 1 <= first <= last:
      raise ValueError('the steps must be 1 or more and in order, as in 10:20')
    self._first, self._last = first, last
    self._began: tuple[int, Path] | None = None
    self._step = 0
    self._done = False

  @classmethod
  def parse(cls, text: str) -> 'Profile':
    """Reads the steps as they are typed.

    Args:
      text: 'M:N'.

    Returns:
      The profile.

    Raises:
      ValueError: if it is something else.
    """
    found = _STEPS.fullmatch(text)
    if not found:
      raise ValueError('name the first and the last step, as in 10:20')
    return cls(int(found[1]), int(found[2]))

  @property
  def recording(self) -> bool:
    """Whether it has begun and not ended."""
    return self._began is not None

  def wants(self, step: int) -> bool:
    """Says whether a step is to be recorded.

    Args:
      step: about to be taken.

    Returns:
      True if so, until the recording has ended.
    """
    mine = not self._done and jax.process_index() == 0
    return mine and self._first <= step <= self._last

  def begin(self, step: int, directory: Path) -> None:
    """Begins to record, with nothing under way on the devices.

    Args:
      step: about to be taken.
      directory: of the stage; the trace goes into a folder of it.
    """
    folder = directory / FOLDER
    try:
      jax.profiler.start_trace(str(folder))
    except Exception as error:
      self._give_up(folder, error)
    else:
      self._began = step, folder

  def note(self, step: int) -> bool:
    """Notes that a step was begun.

    Args:
      step: which.

    Returns:
      True if it was the last one: once it is done, `end` is to be called.
    """
    self._step = step
    return self.recording and step == self._last

  def end(self) -> None:
    """Writes what was recorded, and says where; does nothing where nothing was."""
    if self._began is None:
      return
    (first, folder), self._began, self._done = self._began, None, True
    try:
      jax.profiler.stop_trace()
    except Exception as error:
      self._give_up(folder, error)
    else:
      _say(
        f'profile of steps {first} to {self._step} in {folder}: tensorboard --logdir {folder}, or '
        'its trace.json.gz in https://ui.perfetto.dev'
      )

  def _give_up(self, folder: Path, error: Exception) -> None:
    """Does without a trace, which is no reason to end a run."""
    self._done = True
    _say(f'no profile in {folder}: {disk_reason(error) or error}')


def _say(words: str) -> None:
  """Prints a line, if the output has room for it."""
  with contextlib.suppress(OSError):
    print(f'  {words}', flush=True)

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

  A run that goes on from a checkpoint between them records the rest of them. The other processes
  make the same calls and are answered alike, so that all of them wait at the same steps.

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
    self._began: int | None = None
    self._folder: Path | None = None  # of the process that records
    self._step = 0
    self._done = False

  def __str__(self) -> str:
    return f'{self._first}:{self._last}'

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
    """Whether it has begun and not ended, in whichever process."""
    return self._began is not None

  def wants(self, step: int) -> bool:
    """Says whether a step is to be recorded.

    Args:
      step: about to be taken.

    Returns:
      True if so, until the recording has ended.
    """
    return not self._done and self._first <= step <= self._last

  def begin(self, step: int, directory: Path) -> None:
    """Begins to record, with nothing under way on the devices.

    Args:
      step: about to be taken.
      directory: of the stage; the trace goes into a folder of it.
    """
    self._began = step
    if jax.process_index() != 0:
      return
    folder = directory / FOLDER
    try:
      jax.profiler.start_trace(str(folder))
    except Exception as error:
      _say_none(folder, error)
    else:
      self._folder = folder

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
    (first, folder), self._began, self._done = (self._began, self._folder), None, True
    if folder is None:
      return
    try:
      jax.profiler.stop_trace()
    except Exception as error:
      _say_none(folder, error)
    else:
      _say(
        f'profile of steps {first} to {self._step} in {folder}: tensorboard --logdir {folder}, or '
        'its trace.json.gz in https://ui.perfetto.dev'
      )


def _say_none(folder: Path, error: Exception) -> None:
  """Tells that there is no trace, which is no reason to end a run."""
  _say(f'no profile in {folder}: {disk_reason(error) or error}')


def _say(words: str) -> None:
  """Prints a line, if the output has room for it."""
  with contextlib.suppress(OSError):
    print(f'  {words}', flush=True)

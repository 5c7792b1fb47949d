"""A watch over the loop: it tells of a wait that is too long, and may end the process."""

import contextlib
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TextIO

from saq_jax.training.watch_config import WatchConfig

__all__ = ['StallWatch']

_CALLS_SHOWN = 5


class StallWatch:
  """Watches, from a thread, the waits that the thread which made it announces.

  A wait that takes longer than it may is told of in one line on standard error, and in another one
  when it ends or when it ends the process. Time in which this process did not run, stopped or on a
  machine asleep, does not count. It can only see a wait that leaves the interpreter's lock free,
  as JAX's and those for files do.

  Args:
    config: how long a wait may take.
    name: of the stage, for the lines.
    total_steps: for the lines.
    stream: where they go; standard error by default.
    end: ends the process, given the exit code.

  Example:
    >>> with StallWatch(WatchConfig(), 'saq', 100) as watch, watch.waiting(7, 'the step'):
    ...   pass
  """

  def __init__(
    self,
    config: WatchConfig,
    name: str,
    total_steps: int,
    *,
    stream: TextIO | None = None,
    end: Callable[[int], NoReturn] = os._exit,
  ) -> None:
    self._config, self._name, self._total = config, name, total_steps
    self._stream, self._end = stream, end
    self._watched = threading.get_ident()
    self._lock = threading.Lock()
    self._wait: _Wait | None = None
    self._slowest: dict[str, float] = {}
    limits = [s for s in (config.stall_seconds, config.stall_abort_seconds) if s is not None]
    self._pause = min(1.0, min(limits) / 4) if limits else None
    self._closing = threading.Event()
    self._thread = threading.Thread(target=self._run, name='stall watch', daemon=True)

  def __enter__(self) -> 'StallWatch':
    if self._pause is not None:
      self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._closing.set()
    if self._pause is not None:
      self._thread.join()

  @contextlib.contextmanager
  def waiting(self, step: int, what: str, *, grows: bool = False) -> Iterator[None]:
    """Announces a wait, which lasts as long as the block; one within another stands in for it.

    Args:
      step: the step that the loop is at.
      what: is waited for, in words.
      grows: the first such wait is not watched, being compiled, and later ones may take the time
        of the slowest before them in addition.

    Yields:
      Nothing: the block is the wait.
    """
    began = time.monotonic()
    allowed = self._slowest.get(what) if grows else 0.0
    with self._lock:
      outer = self._wait
      self._wait = None if allowed is None else _Wait(step, what, allowed)
    try:
      yield
    finally:
      with self._lock:
        wait, self._wait = self._wait, outer
      seconds = time.monotonic() - began
      self._slowest[what] = max(self._slowest.get(what, 0.0), seconds)
      if wait is not None and wait.told:
        self._say(f'stage {self._name!r} goes on at step {step}, after {wait.seconds:.0f} s.')

  def _run(self) -> None:
    """Runs in the thread: looks at the wait now and then."""
    assert self._pause is not None
    last = time.monotonic()
    while not self._closing.wait(self._pause):
      now = time.monotonic()
      # A longer pause than was asked for: this process itself was stopped.
      passed, last = min(now - last, 2 * self._pause), now
      with self._lock:
        if self._wait is not None:
          self._wait.seconds += passed
          self._judge(self._wait)

  def _judge(self, wait: '_Wait') -> None:
    """Tells of a wait that is too long, and ends the process where it is far too long."""
    tell, abort = self._config.stall_seconds, self._config.stall_abort_seconds
    if abort is not None and wait.seconds >= abort + wait.allowed:
      self._say(
        f'{self._words(wait)} That is longer than config.watch.stall_abort_seconds={abort:g}: the '
        'process ends with exit code 1, and the same command goes on from the last checkpoint.'
      )
      self._end(1)
    if tell is not None and not wait.told and wait.seconds >= tell + wait.allowed:
      wait.told = True
      self._say(self._words(wait))

  def _words(self, wait: '_Wait') -> str:
    """Which stage waits where, how long, and for what."""
    where = _stack(sys._current_frames().get(self._watched))
    return (
      f'stage {self._name!r} has waited for {wait.seconds:.0f} s at step {wait.step} of '
      f'{self._total}: {wait.what} does not end ({where}). A device, its connection or a disk may '
      'hang.'
    )

  def _say(self, words: str) -> None:
    """Prints a line; a stream that nobody reads must not stop the watch."""
    with contextlib.suppress(OSError, ValueError):
      print(f'saq_jax: {words}', file=self._stream or sys.stderr, flush=True)


class _Wait:
  """One announced wait."""

  def __init__(self, step: int, what: str, allowed: float) -> None:
    self.step, self.what, self.allowed = step, what, allowed
    self.seconds = 0.0
    self.told = False


def _stack(frame: FrameType | None) -> str:
  """The innermost calls of a thread, the last one first; no file is read for it."""
  calls = [
    f'{call.f_code.co_name} in {os.path.basename(call.f_code.co_filename)}:{line}'
    for call, line in itertools.islice(traceback.walk_stack(frame), _CALLS_SHOWN)
  ]
  return ' < '.join(calls) if frame else 'its stack is not known'

"""Preemption: SIGTERM and SIGINT as a request to stop at the next convenient place."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

__all__ = ['Stop', 'preemption']


class Stop:
  """Whether the run was asked to stop.

  Attributes:
    requested: true from the first signal on.
    reason: the signal's name, such as 'SIGTERM'; empty before it.
  """

  def __init__(self) -> None:
    self.requested = False
    self.reason = ''

  def request(self, reason: str) -> None:
    """Asks to stop, as a signal does.

    Args:
      reason: what asked for it; the first one stays.
    """
    if not self.requested:
      self.requested, self.reason = True, reason


@contextlib.contextmanager
def preemption(
  signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> Iterator[Stop]:
  """Turns the first signal into a request, so that the run can save and end by itself.

  That signal also puts the former handlers back: a second one acts as it did before, so that
  Ctrl-C twice ends a run that does not come to its end. Python takes signals in its main thread
  only; entered in another thread, this leaves them alone and nothing requests a stop.

  Args:
    signals: the signals to take.

  Yields:
    The request, not yet made.

  Example:
    >>> with preemption() as stop:
    ...   signal.raise_signal(signal.SIGTERM)
    ...   stop.requested, stop.reason
    (True, 'SIGTERM')
  """
  stop = Stop()
  former: dict[signal.Signals, Any] = {}

  def restore() -> None:
    for number, handler in former.items():
      # None stands for a handler that was not set from Python, and cannot be set from it.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    former.clear()

  def on_signal(number: int, frame: FrameType | None) -> None:
    restore()
    stop.request(signal.Signals(number).name)

  try:
    if threading.current_thread() is threading.main_thread():
      for number in signals:
        former[number] = signal.signal(number, on_signal)
    yield stop
  finally:
    restore()

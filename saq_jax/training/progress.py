"""Progress of a run: a live line on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import rich.progress
from rich.console import Console

__all__ = ['Progress']


class Progress:
  """Shows how far a run is, how fast, how long it will take, and its last figures.

  The speed is measured from the first update on, so that the first step's compilation is left out.
  On a terminal one line is redrawn; elsewhere a plain line is printed at the start, then at most
  every `interval` seconds, and at the end.

  Args:
    description: what is running, a word or two.
    total_steps: the step at which it is done.
    start_step: the step it begins or resumes from.
    stream: where to write; standard output by default.
    live: whether to redraw one line; by default where `stream` is a terminal.
    interval: seconds between plain lines.
    clock: gives the time in seconds.

  Raises:
    ValueError: if `start_step` is not within 0 and `total_steps`.

  Example:
    >>> with Progress('train', total_steps=2, live=False) as progress:
    ...   progress.update(2, loss=0.25)
    train 0/2
    train 2/2 100% loss 0.25
  """

  def __init__(
    self,
    description: str,
    total_steps: int,
    start_step: int = 0,
    *,
    stream: TextIO | None = None,
    live: bool | None = None,
    interval: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    if not 0 <= start_step <= total_steps:
      raise ValueError(f'start_step={start_step} is not within 0 and total_steps={total_steps}')
    self._description, self._total, self._step = description, total_steps, start_step
    self._stream = sys.stdout if stream is None else stream
    self._interval, self._clock = interval, clock
    self._figures: dict[str, float] = {}
    self._first: tuple[int, float] | None = None
    self._now = self._printed_at = clock()
    self._printed_step = -1
    self._bar = self._live_bar() if (self._stream.isatty() if live is None else live) else None

  def __enter__(self) -> 'Progress':
    if self._bar is not None:
      self._bar.start()
    else:
      self._print()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar is not None:
      self._bar.stop()
    elif self._printed_step != self._step:
      self._print()

  def update(self, step: int, **figures: Any) -> None:
    """Notes that a step is done.

    Args:
      step: the number of finished steps.
      **figures: numbers to show, such as `loss=0.5`; each stays until it is given again.
    """
    self._step, self._now = step, self._clock()
    self._figures |= {name: float(value) for name, value in figures.items()}
    if self._first is None:
      self._first = step, self._now
    if self._bar is not None:
      self._bar.update(self._bar.task_ids[0], completed=step, words=self._words())
    elif self._now - self._printed_at >= self._interval:
      self._print()

  def _live_bar(self) -> rich.progress.Progress:
    """One line of rich's: the description, a bar, and the words of the plain line."""
    bar = rich.progress.Progress(
      rich.progress.TextColumn('{task.description}', markup=False),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.TextColumn('{task.fields[words]}', markup=False),
      console=Console(file=self._stream, force_terminal=True),
      refresh_per_second=4,
    )
    bar.add_task(self._description, total=self._total, completed=self._step, words=self._words())
    return bar

  def _print(self) -> None:
    """Prints the plain line; a log on a full disk, which takes it later, is no reason to end."""
    try:
      print(self._description, self._words(), file=self._stream, flush=True)
    except BrokenPipeError:
      raise
    except OSError:
      pass
    self._printed_step, self._printed_at = self._step, self._now

  def _words(self) -> str:
    """Steps, share, speed, time left and figures, as far as they are known."""
    words = [f'{self._step}/{self._total}']
    if self._first is not None:
      words.append(f'{100 * self._step // max(self._total, 1)}%')
      first_step, first_time = self._first
      if self._step > first_step and self._now > first_time:
        rate = (self._step - first_step) / (self._now - first_time)
        words.append(f'{rate:.3g} steps/s' if rate < 100 else f'{rate:.0f} steps/s')
        if self._step < self._total:
          words.append(f'{_duration((self._total - self._step) / rate)} left')
    return ' '.join(words + [f'{name} {value:.4g}' for name, value in self._figures.items()])


def _duration(seconds: float) -> str:
  """Hours, minutes and seconds, such as 1:02:03."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  return f'{hours}:{minute:02}:{second:02}' if hours else f'{minute}:{second:02}'

"""Metrics on disk: one JSON object a line, and the same figures for TensorBoard."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saq_jax.training.append import AppendedFile
from saq_jax.training.events import EventFile

__all__ = ['FILE_NAME', 'MetricWriter', 'read_metrics']

FILE_NAME = 'metrics.jsonl'
# JSON has no words for these; as strings they stay strict JSON, and float() reads them back.
_NOT_FINITE = ('NaN', 'Infinity', '-Infinity')

Record = dict[str, int | float]


class MetricWriter:
  """Writes the figures of a run to `metrics.jsonl` and to TensorBoard's event files.

  Each line is `{"step": 12, "loss": 0.5}`; NaN and infinities are the strings "NaN", "Infinity" and
  "-Infinity", so that every line is strict JSON. A line is handed to the system as soon as it is
  written: a kill loses the one being written at most. What a full disk does not take is kept, and
  goes first the next time.

  A resumed run writes the steps after its checkpoint again, so their lines are dropped on opening,
  with a line torn by a kill. No line is lost or doubled if those of a step up to k are written
  before the checkpoint of step k is. In a run of several processes the first alone should write.

  Args:
    directory: where the files lie; created where missing.
    resume_step: the step the run resumes from, whose line is kept; None where it begins anew.

  Raises:
    ValueError: if the file already there holds a line, other than the last, that is not a metric.
    OSError: if the files cannot be opened.

  Example:
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with MetricWriter(folder) as writer:
    ...   writer.write(1, {'loss': 0.5, 'rate': float('nan')})
    >>> read_metrics(folder)
    [{'step': 1, 'loss': 0.5, 'rate': nan}]
  """

  def __init__(self, directory: str | os.PathLike[str], resume_step: int | None = None) -> None:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    _drop_after(path, resume_step)
    self._lines = AppendedFile(path)
    self._events = EventFile(folder, 0 if resume_step is None else resume_step + 1)

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def write(self, step: int, figures: Mapping[str, Any]) -> None:
    """Writes one line.

    Args:
      step: the number of finished training steps.
      figures: a name and a number each: Python's, numpy's or jax's, with one element.

    Raises:
      ValueError: if a figure is called 'step', or is not one real number.
      OSError: if the disk does not take the line; it is kept for the next time.
    """
    if 'step' in figures:
      raise ValueError("a figure cannot be called 'step': that name holds the step itself")
    record: Record = {'step': int(step)}
    record |= {name: _number(name, value) for name, value in figures.items()}
    # TensorBoard has no place for the others.
    finite = {name: record[name] for name in figures if math.isfinite(record[name])}
    try:
      self._lines.write(_encode(record).encode())
    finally:
      self._events.write(int(step), finite)

  def sync(self) -> None:
    """Writes the lines that are kept, and waits until all are on the disk itself.

    Raises:
      OSError: if the disk does not take all.
    """
    try:
      self._lines.sync()
    finally:
      self._events.sync()

  def close(self) -> None:
    """Writes the lines that are kept, and closes the files in any case.

    Raises:
      OSError: if the disk does not take all.
    """
    try:
      self._lines.close()
    finally:
      self._events.close()


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
  """Reads the figures a `MetricWriter` wrote.

  Args:
    path: the file, or its directory.

  Returns:
    One dict a line, with its 'step', in the order of writing; a torn last line is left out.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if another line is not a metric.
  """
  path = Path(path)
  return list(_records(path / FILE_NAME if path.is_dir() else path))


def _records(path: Path) -> Iterator[Record]:
  """The lines of a file, without a last one that was not finished."""
  return (record for record, _ in _placed_records(path))


def _placed_records(path: Path) -> Iterator[tuple[Record, int]]:
  """The same with the place at which each line ends, in bytes."""
  end = 0
  with path.open('rb') as lines:
    for number, line in enumerate(lines, start=1):
      end += len(line)
      try:
        record = {
          name: float(value) if value in _NOT_FINITE else value
          for name, value in json.loads(line).items()
        }
        record['step'] = int(record['step'])
      except (ValueError, TypeError, KeyError, AttributeError) as error:
        if line.endswith(b'\n'):
          shown = line[:60].decode(errors='replace')
          raise ValueError(f'{path}, line {number}, is not a metric: {shown!r}') from error
      else:
        yield record, end


def _drop_after(path: Path, step: int | None) -> None:
  """Cuts the file after the lines up to a step; None keeps none. That takes no room on the disk."""
  if not path.exists():
    return
  end = 0
  if step is not None:
    end = max((end for record, end in _placed_records(path) if record['step'] <= step), default=0)
  with path.open('r+b') as lines:
    lines.truncate(end)
    if end:
      lines.seek(end - 1)
      if lines.read(1) != b'\n':  # a kill took it from a line that is whole
        lines.write(b'\n')
    lines.flush()
    os.fsync(lines.fileno())


def _encode(record: Record) -> str:
  """One line of strict JSON."""
  strict = {name: value if math.isfinite(value) else _word(value) for name, value in record.items()}
  return json.dumps(strict, allow_nan=False) + '\n'


def _word(value: float) -> str:
  """What stands for a number that is not finite."""
  return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'


def _number(name: str, value: Any) -> int | float:
  """A figure as Python's int or float."""
  array = np.asarray(value)
  try:
    if array.size == 1 and array.dtype.kind in 'biu':
      return int(array.reshape(()))
    # Narrow floats of jax are no numpy kind of their own.
    if array.size == 1 and array.dtype.kind in 'fV':
      return float(array.reshape(()))
  except (TypeError, ValueError):
    pass
  raise ValueError(f'figure {name!r} must be one real number, got {array.dtype} {array.shape}')

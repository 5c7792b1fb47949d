"""TensorBoard's event files, written by the thread that has the figures."""

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from saq_jax.training.append import AppendedFile

__all__ = ['EventFile']

_numbers = itertools.count()


class EventFile:
  """One event file; a run that goes on from a step begins another.

  tensorboardX's own writer has a thread that a full disk ends, after which every figure blocks.

  Args:
    folder: where it lies.
    first_step: TensorBoard hides the events of earlier files from this step on.

  Raises:
    OSError: if the file cannot be opened.

  Example:
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> EventFile(folder, 0).close()
    >>> [path.name.split('.')[:3] for path in folder.iterdir()]
    [['events', 'out', 'tfevents']]
  """

  def __init__(self, folder: Path, first_step: int) -> None:
    # By their names TensorBoard reads them in the order of time.
    place = f'{time.time():.6f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}'
    self._file = AppendedFile(folder / f'events.out.tfevents.{place}')
    self._head = _record(Event(wall_time=time.time(), file_version='brain.Event:2'))
    self._head += _record(
      Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
    )

  def write(self, step: int, figures: Mapping[str, float]) -> None:
    """Appends figures of a step.

    Args:
      step: the number of finished training steps.
      figures: finite numbers by name.

    Raises:
      OSError: if the disk does not take them; they are kept for the next time.
    """
    values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
    event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
    head, self._head = self._head, b''
    self._file.write(head + _record(event))

  def sync(self) -> None:
    """Writes what is kept, and waits until all is on the disk itself.

    Raises:
      OSError: if the disk does not take all.
    """
    self._file.sync()

  def close(self) -> None:
    """Writes what is kept, and closes the file in any case.

    Raises:
      OSError: if the disk does not take all.
    """
    self._file.close()


def _record(event: Event) -> bytes:
  """An event with its length and their sums, as TFRecord has them."""
  data = event.SerializeToString()
  length = struct.pack('<Q', len(data))
  sums = [struct.pack('<I', masked_crc32c(part)) for part in (length, data)]
  return length + sums[0] + data + sums[1]

"""Files that are only ever appended to, and lose nothing while a disk is full."""

import os
from pathlib import Path

__all__ = ['AppendedFile']


class AppendedFile:
  """A file to which bytes are added at its end, handed to the system at once.

  What a full or failing disk does not take is kept in memory, from the very byte on, and goes first
  the next time: the file is always a beginning of what was written, and never torn in its middle.

  Args:
    path: of the file; made where missing.

  Raises:
    OSError: if it cannot be opened.

  Example:
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / 'lines'
    >>> with AppendedFile(path) as file:
    ...   file.write(b'one')
    >>> path.read_bytes()
    b'one'
  """

  def __init__(self, path: Path) -> None:
    self._file = path.open('ab', buffering=0)
    self._kept = b''

  def __enter__(self) -> 'AppendedFile':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def write(self, data: bytes) -> None:
    """Appends bytes after those that are still kept.

    Args:
      data: what to append; it is kept if the disk does not take it.

    Raises:
      OSError: if the disk does not take all.
    """
    self._kept += data
    self.flush()

  def flush(self) -> None:
    """Writes what is kept.

    Raises:
      OSError: if the disk does not take all.
    """
    while self._kept:
      self._kept = self._kept[os.write(self._file.fileno(), self._kept) :]

  def sync(self) -> None:
    """Writes what is kept, and waits until all is on the disk itself.

    Raises:
      OSError: if the disk does not take all.
    """
    self.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Writes what is kept, and closes the file in any case.

    Raises:
      OSError: if the disk does not take all.
    """
    try:
      self.flush()
    finally:
      self._file.close()
      self._kept = b''

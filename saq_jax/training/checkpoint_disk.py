"""A disk that is full or fails: which errors tell of it, and what to say of a save it ended."""

import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging as absl_logging

__all__ = [
  'SaveError', 'bytes_needed', 'disk_fails', 'disk_reason', 'hush', 'not_written', 'room',
]  # fmt: skip

# TensorStore tells of the system's errors by a ValueError, with the number in its words.
_CODE = re.compile(r"os_error_code='(\d+)'")
_MISSING = errno.ENOENT, errno.ENOTDIR, errno.EISDIR


class SaveError(OSError):
  """A checkpoint that could not be written; those before it are as they were."""


def disk_reason(error: BaseException | None) -> str | None:
  """What the system says of the disk, if that is what an error comes from.

  Args:
    error: any error, with those that it was raised from.

  Returns:
    Such as 'No space left on device'; None for an error of another kind.

  Example:
    >>> disk_reason(ValueError("Failed to write [os_error_code='28']"))
    'No space left on device'
    >>> disk_reason(ValueError('shapes differ'))
  """
  return next((reason for _, reason in _told(error)), None)


def disk_fails(error: BaseException) -> bool:
  """Whether an error tells that a disk did not give what it has, and may give it another time.

  Args:
    error: of a reading, with those that it was raised from.

  Returns:
    False where it tells that a file is missing or no file, or nothing of the system.

  Example:
    >>> disk_fails(ValueError("Failed to read [os_error_code='5']"))
    True
    >>> disk_fails(FileNotFoundError(2, 'No such file or directory'))
    False
  """
  return any(code not in _MISSING for code, _ in _told(error))


def _told(error: BaseException | None) -> Iterator[tuple[int | None, str]]:
  """What the system says in an error and in those that it was raised from: number and words."""
  while error is not None:
    if isinstance(error, OSError):
      yield error.errno, error.strerror or str(error)
    elif found := _CODE.search(str(error)):
      yield int(found[1]), os.strerror(int(found[1]))
    error = error.__cause__ or error.__context__


def bytes_needed(state: Any) -> int:
  """The most that a checkpoint takes on the disk, less some kilobytes of descriptions.

  Args:
    state: a tree of arrays.

  Returns:
    Bytes; compression makes it less.
  """
  return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def room(directory: str | os.PathLike[str]) -> str:
  """How much a disk has left, in words.

  Args:
    directory: on that disk.

  Returns:
    Such as '1,024 bytes are free'.
  """
  try:
    return f'{shutil.disk_usage(directory).free:,} bytes are free'
  except OSError:
    return 'how many are free is not known'


def not_written(path: os.PathLike[str], needed: int, reason: str) -> str:
  """Tells of a checkpoint that the disk did not take.

  Args:
    path: where it was to be.
    needed: as `bytes_needed` says.
    reason: as `disk_reason` says.

  Returns:
    A sentence.
  """
  return (
    f'the checkpoint {path} was not written: {reason}; it takes up to {needed:,} bytes, '
    f'{room(os.path.dirname(path))}.'
  )


def hush() -> None:
  """Keeps Orbax's progress quiet, and a traceback for each array that a failed save left unwritten.

  The first error ends the save. Those of the other arrays nobody waits for any more: TensorStore
  hands them to the interpreter's hook for errors that cannot be caught, asyncio to its log.
  """
  absl_logging.get_absl_logger().addFilter(_drop_orbax_chatter)
  if not _former:
    _former.append(sys.unraisablehook)
    sys.unraisablehook = _hook
    logging.getLogger('asyncio').addFilter(_passes)


_former: list[Callable[[Any], object]] = []


def _hook(unraisable: Any) -> None:
  """Passes on what is no array of a failed save, whose event loop is closed."""
  error = unraisable.exc_value
  if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
    _former[0](unraisable)


def _passes(record: logging.LogRecord) -> bool:
  """Lets pass what is no array of a failed save."""
  return not (record.exc_info and _CODE.search(str(record.exc_info[1])))


def _drop_orbax_chatter(record: logging.LogRecord) -> bool:
  """Lets pass all but Orbax's progress, some twenty lines a save, and the errors that it raises."""
  told = record.levelno < logging.WARNING or record.exc_info is not None
  return not (told and '/orbax/' in record.pathname)

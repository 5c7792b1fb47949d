"""A disk that is full or fails: which errors tell of it, and what to say of a save it ended."""

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax

__all__ = ['SaveError', 'bytes_needed', 'disk_reason', 'hush', 'room']

# TensorStore tells of the system's errors by a ValueError, with the number in its words.
_CODE = re.compile(r"os_error_code='(\d+)'")


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
  while error is not None:
    if isinstance(error, OSError):
      return error.strerror or str(error)
    if found := _CODE.search(str(error)):
      return os.strerror(int(found[1]))
    error = error.__cause__ or error.__context__
  return None


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


def hush() -> None:
  """Keeps the libraries below from a traceback for each array that a failed save left unwritten.

  The first error ends the save. Those of the other arrays nobody waits for any more: TensorStore
  hands them to the interpreter's hook for errors that cannot be caught, asyncio to its log.
  """
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

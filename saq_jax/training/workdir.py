"""The work directory: one experiment's alone, marked by its settings."""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saq_jax.training.bounds import ConfigError

MARK = 'config.json'
VERSION_KEY = 'saq_jax'
LOCK = '.lock'
PIN = 'init_from.json'
# What changes nothing of the result, so that a stopped run may go on with another choice.
_FREE = (
  *('data.workers', 'data.timeout', 'checkpoint.keep', 'checkpoint.keep_best'),
  *('watch.stall_seconds', 'watch.stall_abort_seconds'),
  *('watch.spike_factor', 'watch.spike_steps', 'watch.retries'),
)
_PARTS = (LOCK, f'.{MARK}.', f'.{PIN}.')


class WorkdirError(ValueError):
  """A directory that this experiment cannot use; the message says what to do."""


@contextlib.contextmanager
def claim(
  directory: str | os.PathLike[str], settings: dict[str, Any], version: str
) -> Iterator[Path]:
  """Holds a directory for an experiment: a new one, or one that is that experiment's already.

  While it is held, no other process can claim it. Where the settings turn out to be impossible
  (a ConfigError) before anything was trained, it is left as it was found.

  Args:
    directory: made where missing.
    settings: of the experiment, as plain JSON values.
    version: of this package, noted in the mark.

  Yields:
    The directory.

  Raises:
    WorkdirError: if it cannot be made or written, holds something else, holds a run of other
      settings, or is another process's. Nothing in it is touched then.

  Example:
    >>> import tempfile
    >>> with claim(tempfile.mkdtemp(), {'seed': 0}, '1.0') as folder:
    ...   sorted(path.name for path in folder.iterdir())
    ['.lock', 'config.json']
  """
  if '://' in str(directory):
    raise WorkdirError(f'{directory} is no directory: name a --workdir on a file system.')
  folder = Path(directory)
  made = not folder.exists()
  _examine(folder, settings)
  with _locked(folder):
    if not _examine(folder, settings):
      try:
        with usable(folder):
          write_json(folder / MARK, {VERSION_KEY: version, 'config': settings})
      except WorkdirError:
        _let_go(folder, made)
        raise
    try:
      yield folder
    except ConfigError:
      _let_go(folder, made)
      raise


def _examine(folder: Path, settings: dict[str, Any]) -> bool:
  """Makes the directory where missing, and tells whether it bears the mark of these settings."""
  mark = folder / MARK
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if mark.exists():
      _require_same(folder, json.loads(mark.read_text(encoding='utf-8')), settings)
      return True
    if any(not path.name.startswith(_PARTS) for path in folder.iterdir()):
      raise WorkdirError(
        f'{folder} holds files that are not a run of this package: name another --workdir.'
      )
    if not os.access(folder, os.W_OK):
      raise WorkdirError(f'{folder} is not writable: name another --workdir.')
    return False
  except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
    raise WorkdirError(f'{mark} is not of this package: name another --workdir.') from None
  except OSError as error:
    raise _unusable(folder, error) from None


@contextlib.contextmanager
def usable(folder: Path) -> Iterator[None]:
  """Turns what the disk says while a work directory is written into one line for the user.

  Args:
    folder: the work directory.

  Yields:
    Nothing: the block writes there.

  Raises:
    WorkdirError: for an OSError of the block, such as that of a full disk.
  """
  try:
    yield
  except OSError as error:
    raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> WorkdirError:
  """The error for a directory that the disk does not let be used."""
  return WorkdirError(
    f'{folder} cannot be used ({error.strerror or error}): name a --workdir that is writable, on a '
    'disk with room.'
  )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Keeps other processes out until the end of this one, however it ends."""
  with usable(folder):
    file = (folder / LOCK).open('w', encoding='utf-8')
  with file as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise WorkdirError(
        f'{folder} is in use: another process runs this experiment. Wait for it, or name another '
        '--workdir.'
      ) from None
    except OSError:  # a file system without locks
      pass
    yield


def _let_go(folder: Path, made: bool) -> None:
  """Takes the mark away again, if nothing else was written yet."""
  files = [path for path in folder.rglob('*') if path.is_file()]
  if all(path.parent == folder and path.name in (MARK, LOCK, PIN) for path in files):
    for path in folder.iterdir():
      if path.is_dir():
        shutil.rmtree(path)
      else:
        path.unlink()
    if made:
      folder.rmdir()


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file whole or not at all.

  Args:
    path: of the file.
    value: what `json.dumps` takes.

  Raises:
    OSError: if the disk is full or fails; what was written of it is removed.
  """
  part = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
  try:
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')
    part.replace(path)
  except OSError:
    part.unlink(missing_ok=True)
    raise


def _require_same(folder: Path, mark: dict[str, Any], settings: dict[str, Any]) -> None:
  """Raises WorkdirError unless the directory was marked with the same settings."""
  here, there = identity(settings), identity(mark['config'])
  changed = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
  if changed:
    shown = ', '.join(
      f'{key}={there.get(key)!r} there, {here.get(key)!r} here' for key in changed[:3]
    )
    raise WorkdirError(
      f'{folder} holds a run with another config ({shown}): name another --workdir, or give the '
      'config it was begun with.'
    )


def identity(settings: dict[str, Any]) -> dict[str, Any]:
  """What makes two runs the same one: all settings but those that change nothing of the result.

  Args:
    settings: of an experiment, as plain JSON values.

  Returns:
    The values by their dotted names.

  Example:
    >>> identity({'seed': 0, 'data': {'workers': 2, 'name': 'digits'}})
    {'seed': 0, 'data.name': 'digits'}
  """
  # Through JSON and back, so that tuples and lists are alike.
  flat = _flat(json.loads(json.dumps(settings)))
  return {key: value for key, value in flat.items() if key not in _FREE}


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dicts with dotted keys."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return flat

"""The work directory: one experiment's alone, marked by its settings."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

MARK = 'config.json'
VERSION_KEY = 'saq_jax'


class WorkdirError(ValueError):
  """A directory that this experiment cannot use; the message says what to do."""


def claim(directory: str | os.PathLike[str], settings: dict[str, Any], version: str) -> Path:
  """Takes a directory for an experiment, or finds that it is that experiment's already.

  Args:
    directory: made where missing.
    settings: of the experiment, as plain JSON values.
    version: of this package, noted in the mark.

  Returns:
    The directory.

  Raises:
    WorkdirError: if it cannot be made or written, holds something else, or holds a run of other
      settings. Nothing in it is touched then.
  """
  folder = Path(directory)
  mark = folder / MARK
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if mark.exists():
      _require_same(folder, json.loads(mark.read_text(encoding='utf-8')), settings)
    elif any(folder.iterdir()):
      raise WorkdirError(
        f'{folder} holds files that are not a run of this package: name another --workdir.'
      )
    else:
      write_json(mark, {VERSION_KEY: version, 'config': settings})
  except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
    raise WorkdirError(f'{mark} is not of this package: name another --workdir.') from None
  except OSError as error:
    raise WorkdirError(
      f'{folder} cannot be used ({error.strerror or error}): name a --workdir that is writable.'
    ) from None
  if not os.access(folder, os.W_OK):
    raise WorkdirError(f'{folder} is not writable: name another --workdir.')
  return folder


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  part = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
  part.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')
  part.replace(path)


def _require_same(folder: Path, mark: dict[str, Any], settings: dict[str, Any]) -> None:
  """Raises WorkdirError unless the directory was marked with the same settings."""
  # Through JSON and back, so that tuples and lists are alike.
  here = _flat(json.loads(json.dumps(settings)))
  there = _flat(mark['config'])
  changed = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
  if changed:
    shown = ', '.join(
      f'{key}={there.get(key)!r} there, {here.get(key)!r} here' for key in changed[:3]
    )
    raise WorkdirError(
      f'{folder} holds a run with another config ({shown}): name another --workdir, or give the '
      'config it was begun with.'
    )


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dicts with dotted keys."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return flat

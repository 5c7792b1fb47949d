"""Checkpoints of any run, found by a path and read whole or in parts."""

import os
from typing import Any, TypeVar

import orbax.checkpoint as ocp
from etils import epath

from saq_jax.training import checkpoint_format

__all__ = ['find_best', 'find_checkpoint', 'restore', 'restore_subtrees']

# A run holds stages, a stage may hold a folder of checkpoints, that one holds steps.
_DEPTH = 3

PathLike = str | os.PathLike[str]
State = TypeVar('State')


def find_checkpoint(path: PathLike) -> epath.Path:
  """Finds the newest checkpoint at or below a directory.

  Args:
    path: a run's directory, a stage's, or that of one checkpoint.

  Returns:
    The directory of the checkpoint finished last.

  Raises:
    ValueError: if there is none.
  """
  found = _all_at(path)
  return max(found, key=lambda step: (step.commit_timestamp_nsecs or 0, step.step)).path


def find_best(path: PathLike) -> epath.Path:
  """Finds the checkpoint of the highest score at or below a directory.

  A damaged one is passed over. The score of a training run is the accuracy on the evaluation split:
  what is chosen by it is evaluated honestly on another one only.

  Args:
    path: a stage's directory, or that of its checkpoints.

  Returns:
    The directory of the best checkpoint, of the earliest among equal ones.

  Raises:
    ValueError: if there is none, or none that can be read has a score.
  """
  scored, readable, damage = [], False, ValueError()
  for found in _all_at(path):
    try:
      score = checkpoint_format.read_notes(found.path).score
    except checkpoint_format.DamagedCheckpointError as error:
      damage = error
      continue
    readable = True
    if score is not None:
      scored.append((score, -found.step, found.path))
  if not readable:
    raise damage
  if not scored:
    raise ValueError(f'no checkpoint at {path} has a score: none was saved with an evaluation')
  return max(scored)[2]


def _all_at(path: PathLike) -> list[Any]:
  """Orbax's descriptions of the finished checkpoints at or below a directory, at least one."""
  root = epath.Path(path).resolve()
  if not root.is_dir():
    raise ValueError(f'no checkpoint at {path}: there is no such directory')
  finished = ocp.path.step.standard_name_format().find_all
  if root.name.isdigit():
    own = [found for found in finished(root.parent) if found.path == root]
    if own:
      return own
  level, found = [root], list[Any]()
  for _ in range(_DEPTH):
    steps = {step.path: step for folder in level for step in finished(folder)}
    found += steps.values()
    subs = [sub for folder in level for sub in folder.iterdir() if sub.is_dir()]
    level = [sub for sub in subs if sub not in steps]
  if not found:
    raise ValueError(f'no checkpoint at {path}: no finished one in it or {_DEPTH} levels below')
  return found


def restore(path: PathLike, example: State) -> State:
  """Restores the whole state from the newest checkpoint of any run, bit for bit.

  Args:
    path: as in `find_checkpoint`.
    example: as in `Checkpoints.restore_latest`.

  Returns:
    The state, placed as `example` is.

  Raises:
    ValueError: if there is no checkpoint, it is damaged or newer, or does not fit `example`.
  """
  return checkpoint_format.read_state(find_checkpoint(path), example)


def restore_subtrees(path: PathLike, *names: str) -> tuple[Any, ...]:
  """Restores parts of a state as numpy arrays, whatever the rest of the state is.

  Args:
    path: as in `find_checkpoint`.
    *names: top-level fields of the state, such as `'params', 'batch_stats'`.

  Returns:
    One tree of numpy arrays for each name, in that order; custom nodes come as dicts.

  Raises:
    ValueError: if there is no checkpoint, it is damaged or newer, or lacks one of the names.
  """
  return checkpoint_format.read_subtrees(find_checkpoint(path), names)

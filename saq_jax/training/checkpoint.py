"""Checkpoints: asynchronous saves of the training state by Orbax, and exact restores of it."""

import logging
import os
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from saq_jax.training import checkpoint_format

__all__ = ['Checkpoints', 'find_checkpoint', 'restore', 'restore_subtrees']

# A run holds stages, a stage may hold a folder of checkpoints, that one holds steps.
_DEPTH = 3

PathLike = str | os.PathLike[str]
State = TypeVar('State')


class Checkpoints:
  """The checkpoints of one run: the last `keep` of them, in a directory of their own.

  A save copies the state off the devices, returns, and is written behind the training. What a kill
  left half written does not count, and is removed on opening. Every process makes the same calls.

  Args:
    directory: where the checkpoints lie, one folder a step; created where missing.
    keep: how many of the newest to keep, at least 1.

  Raises:
    ValueError: if `keep` is below 1.

  Example:
    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> state = {'step': jnp.int32(7)}
    >>> with Checkpoints(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...   checkpoints.save(7, state)
    ...   checkpoints.wait()
    ...   step, restored = checkpoints.restore_latest({'step': jnp.int32(0)})
    >>> step, int(restored['step'])
    (7, 7)
  """

  def __init__(self, directory: PathLike, keep: int = 3) -> None:
    if keep < 1:
      raise ValueError(f'keep={keep}: at least the newest checkpoint must be kept')
    absl_logging.get_absl_logger().addFilter(_drop_orbax_chatter)
    self._damaged: list[int] = []
    self._manager = ocp.CheckpointManager(
      epath.Path(directory).resolve(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # so that one damaged file does not stop it
      ),
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  @property
  def latest_step(self) -> int | None:
    """The newest step saved, or being saved; None in an empty directory."""
    return max(self.steps, default=None)

  def save(self, step: int, state: Any) -> None:
    """Begins to save `state`; it may be donated or changed as soon as this returns.

    A step that is there already is left as it is. Errors of the writing itself are raised by the
    next call of `save`, `wait` or `close`.

    Args:
      step: the number of finished training steps.
      state: a tree of arrays, none of them a typed PRNG key.

    Raises:
      ValueError: if a later step is there, or two leaves share one name in the checkpoint.
    """
    latest = self.latest_step
    if latest is not None and step < latest:
      raise ValueError(
        f'step {step} is older than the newest checkpoint, {latest}, of '
        f'{self._manager.directory}: restore that one, or use another directory'
      )
    # The run has gone on from an older step and now overwrites what could not be read.
    while self._damaged:
      self._manager.delete(self._damaged.pop())
    if step != latest:
      self._manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)),
        custom_metadata=checkpoint_format.describe(step, state),
      )

  def restore_latest(self, example: State) -> tuple[int, State] | None:
    """Restores the newest checkpoint that can be read, bit for bit.

    A damaged one is passed over with a warning, and removed when the next is saved. With several
    processes it is an error instead, as each might see another damage and fall back elsewhere.

    Args:
      example: a tree of the state's structure; each leaf gives a shape, a dtype and a sharding
        (an array, or a `jax.ShapeDtypeStruct` with a sharding; its values are not read).

    Returns:
      The step and the state, placed as `example` is; None if there is no checkpoint.

    Raises:
      ValueError: if a checkpoint does not fit `example`, is of a newer format, or if there are
        checkpoints but all are damaged.
    """
    self.wait()
    steps = self.steps
    for step in reversed(steps):
      try:
        restored = checkpoint_format.read_state(self._manager.directory / str(step), example)
      except checkpoint_format.DamagedCheckpointError as error:
        if jax.process_count() > 1 or step == steps[0]:
          raise type(error)(f'{error}; remove that directory to do without it') from error
        logging.getLogger(__name__).warning('%s; going back to the one before it', error)
        self._damaged.append(step)
      else:
        return step, restored
    return None

  def wait(self) -> None:
    """Blocks until every save begun is whole on the disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the saves under way and ends the threads behind them."""
    try:
      self.wait()  # Orbax's own closing would hide that a save has failed
    finally:
      self._manager.close()

  @property
  def steps(self) -> list[int]:
    """The steps that are there and not known to be damaged, oldest first."""
    return sorted(set(self._manager.all_steps()) - set(self._damaged))


def find_checkpoint(path: PathLike) -> epath.Path:
  """Finds the newest checkpoint at or below a directory.

  Args:
    path: a run's directory, a stage's, or that of one checkpoint.

  Returns:
    The directory of the checkpoint finished last.

  Raises:
    ValueError: if there is none.
  """
  root = epath.Path(path).resolve()
  if not root.is_dir():
    raise ValueError(f'no checkpoint at {path}: there is no such directory')
  finished = ocp.path.step.standard_name_format().find_all
  if root.name.isdigit() and root in {found.path for found in finished(root.parent)}:
    return root
  level, found = [root], list[Any]()
  for _ in range(_DEPTH):
    steps = {step.path: step for folder in level for step in finished(folder)}
    found += steps.values()
    subs = [sub for folder in level for sub in folder.iterdir() if sub.is_dir()]
    level = [sub for sub in subs if sub not in steps]
  if not found:
    raise ValueError(f'no checkpoint at {path}: no finished one in it or {_DEPTH} levels below')
  return max(found, key=lambda step: (step.commit_timestamp_nsecs or 0, step.step)).path


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


def _drop_orbax_chatter(record: logging.LogRecord) -> bool:
  """Lets pass all but Orbax's own progress notes, some twenty lines a save."""
  return record.levelno >= logging.WARNING or '/orbax/' not in record.pathname

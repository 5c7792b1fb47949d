"""Checkpoints: asynchronous saves of the training state by Orbax, and exact restores of it."""

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from saq_jax.training import checkpoint_format
from saq_jax.training.checkpoint_disk import (
  SaveError,
  bytes_needed,
  disk_reason,
  hush,
  not_written,
)
from saq_jax.training.checkpoint_find import find_best, find_checkpoint, restore, restore_subtrees
from saq_jax.training.checkpoint_format import Notes
from saq_jax.training.checkpoint_policy import Retention

__all__ = ['Checkpoints', 'find_best', 'find_checkpoint', 'restore', 'restore_subtrees']

PathLike = str | os.PathLike[str]
State = TypeVar('State')


class Checkpoints:
  """The checkpoints of one run, in a directory of their own: the newest, and the best of all.

  A save copies the state off the devices, returns, and is written behind the training. What a kill
  left half written does not count, and is removed on opening. Where a disk is full or fails, the
  ones before stay as they are. Every process makes the same calls.

  Args:
    directory: where the checkpoints lie, one folder a step; created where missing.
    keep: how many of the newest that were due are kept, at least 1. The newest of all is as well.
    keep_best: keep the one with the highest score as well, the earliest of equal ones.
    every: steps between those that are due; one in between is there until the next.

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

  def __init__(
    self, directory: PathLike, keep: int = 3, *, keep_best: bool = False, every: int = 1
  ) -> None:
    if keep < 1:
      raise ValueError(f'keep={keep}: at least the newest checkpoint must be kept')
    hush()
    self._directory = epath.Path(directory).resolve()
    self._retention = Retention(keep, keep_best, every, self._score)
    self._damaged: list[int] = []
    self._scores: dict[int, float | None] = {}
    self._begun: tuple[int, int] | None = None  # step and bytes
    self._lost: SaveError | None = None  # of the newest save that was begun
    self._told = True
    self._manager = self._open()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    if error is None:
      self.close()
      return
    with contextlib.suppress(Exception):  # raising would hide the error that ends the run
      try:
        self._collect()
      except SaveError as lost:
        _warn('%s', lost)
    self._tell('')
    with contextlib.suppress(Exception):
      self._manager.close()

  @property
  def latest_step(self) -> int | None:
    """The newest step saved, or being saved; None in an empty directory."""
    return max(self.steps, default=None)

  @property
  def steps(self) -> list[int]:
    """The steps that are there and not known to be damaged, oldest first."""
    return sorted(set(self._manager.all_steps()) - set(self._damaged))

  @property
  def due(self) -> list[int]:
    """Those of them that are a multiple of `every`."""
    return self._retention.due(self.steps)

  @property
  def best(self) -> tuple[int, float] | None:
    """The step with the highest score, and that score; None where no checkpoint has one."""
    return self._retention.best(self.steps)

  def save(
    self,
    step: int,
    state: Any,
    notes: Mapping[str, Any] | None = None,
    score: float | None = None,
  ) -> None:
    """Begins to save `state`; it may be donated or changed as soon as this returns.

    A step that is there already is left as it is. A disk that is full or fails is a warning, and an
    error of the next `wait` or `close` if no later save was begun.

    Args:
      step: the number of finished training steps.
      state: a tree of arrays, none of them a typed PRNG key.
      notes: JSON values, for `notes`.
      score: how good it is, for `keep_best`; more is better.

    Raises:
      ValueError: if a later step is there, or two leaves share one name in the checkpoint.
    """
    self._collect()
    self._tell()
    latest = self.latest_step
    if latest is not None and step < latest:
      raise ValueError(
        f'step {step} is older than the newest checkpoint, {latest}, of '
        f'{self._directory}: restore that one, or use another directory'
      )
    # The run has gone on from an older step and now overwrites what could not be read.
    while self._damaged:
      self._manager.delete(self._damaged.pop())
    if step == latest:
      return
    about = checkpoint_format.describe(step, state, Notes(notes or {}, score))
    self._begun, self._scores[step], self._lost = (step, bytes_needed(state)), score, None
    try:
      self._manager.save(
        step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)), custom_metadata=about
      )
    except Exception as error:
      self._failed(error)

  def check(self) -> None:
    """Warns, without waiting, if the save under way has failed; the next `save` tries again."""
    alone = jax.process_count() == 1
    if alone and self._begun is not None and not self._manager.is_saving_in_progress():
      self._collect()
    self._tell()

  def wait(self) -> None:
    """Blocks until the newest save is whole on the disk.

    Raises:
      SaveError: if it was not written, for the disk is full or fails.
    """
    self._collect()
    if self._lost is not None:
      lost, self._lost = self._lost, None
      raise SaveError(f'{lost} Make room; the same command goes on from there.') from lost

  def close(self) -> None:
    """Waits for the save under way and ends the threads behind it.

    Raises:
      SaveError: as `wait`.
    """
    try:
      self.wait()  # Orbax's own closing would hide that a save has failed
    finally:
      self._manager.close()

  def restore_latest(self, example: State) -> tuple[int, State] | None:
    """Restores the newest checkpoint that can be read, bit for bit.

    A damaged one is passed over with a warning, and removed when the next is saved. Several
    processes pass it over together, whichever of them could not read it.

    Args:
      example: a tree of the state's structure; each leaf gives a shape, a dtype and a sharding
        (an array, or a `jax.ShapeDtypeStruct` with a sharding; its values are not read).

    Returns:
      The step and the state, placed as `example` is; None if there is no checkpoint.

    Raises:
      ValueError: if a checkpoint does not fit `example`, is of a newer format, or if there are
        checkpoints but all are damaged.
      OSError: if the disk fails, which is no damage.
    """
    self._collect()
    self._tell()
    steps = self.steps
    for step in reversed(steps):
      try:
        restored = checkpoint_format.read_state(self._directory / str(step), example)
      except checkpoint_format.DamagedCheckpointError as error:
        if step == steps[0]:
          raise type(error)(f'{error}; remove that directory to do without it') from error
        _warn('%s; going back to the one before it', error)
        self._damaged.append(step)
      else:
        return step, restored
    return None

  def notes(self, step: int) -> Mapping[str, Any]:
    """What was noted beside a state.

    Args:
      step: of a checkpoint that is there.

    Returns:
      The notes that `save` was given.

    Raises:
      ValueError: if the checkpoint is damaged or of a newer format.
    """
    return checkpoint_format.read_notes(self._directory / str(step)).of_run

  def drop_after(self, step: int) -> None:
    """Removes all later checkpoints, for a run that goes back.

    Args:
      step: the newest to keep.
    """
    self._collect()
    self._tell()
    self._lost = None
    for later in [s for s in self._manager.all_steps() if s > step]:
      self._manager.delete(later)
    self._damaged = [s for s in self._damaged if s <= step]

  def _open(self) -> ocp.CheckpointManager:
    """Orbax's manager of what is in the directory, without what is half written."""
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._retention,
        create=True,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # so that one damaged file does not stop it
      ),
    )

  def _collect(self) -> None:
    """Waits for the save under way."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      self._failed(error)
    self._begun = None

  def _failed(self, error: Exception) -> None:
    """Notes a save that the disk has failed, and opens the directory anew, as after a kill."""
    reason, begun, self._begun = disk_reason(error), self._begun, None
    if reason is None or begun is None:
      raise error
    step, needed = begun
    lost = not_written(self._directory / str(step), needed, reason)
    if jax.process_count() > 1:  # they would have to agree on what they found
      raise SaveError(f'{lost} Make room; the same command goes on from the one before.') from error
    with contextlib.suppress(Exception):
      self._manager.close()
    for half_written in self._directory.glob(f'{step}.*'):
      shutil.rmtree(half_written, ignore_errors=True)
    self._manager = self._open()
    del self._scores[step]
    newest = 'none' if self.latest_step is None else f'step {self.latest_step}'
    self._told = False
    self._lost = SaveError(f'{lost} The newest one: {newest}.')

  def _tell(self, then: str = ' The run goes on, and the next checkpoint tries again.') -> None:
    """Warns of a failed save, once, where it is not raised."""
    if self._lost is not None and not self._told:
      _warn('%s%s', self._lost, then)
    self._told = True

  def _score(self, step: int) -> float | None:
    """The score noted beside a state; None where there is none, or it cannot be read."""
    if step not in self._scores:
      try:
        self._scores[step] = checkpoint_format.read_notes(self._directory / str(step)).score
      except ValueError:
        self._scores[step] = None
    return self._scores[step]


def _warn(words: str, *values: object) -> None:
  """A line for the user."""
  logging.getLogger(__name__).warning(words, *values)

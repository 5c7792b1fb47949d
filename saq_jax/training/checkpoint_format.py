"""The form of one checkpoint on disk: written with a sum of each leaf's bits, checked when read."""

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from saq_jax.training.checkpoint_disk import disk_fails, disk_reason

__all__ = [
  'FORMAT',
  'DamagedCheckpointError',
  'Notes',
  'describe',
  'read_notes',
  'read_state',
  'read_subtrees',
]

# The version of what a checkpoint holds; it grows when an older reader would misread a newer one.
FORMAT = 1
_KIND = 'saq_jax.training'
_NAMED_LEAVES = 8
# Read beforehand, for Orbax takes one that the disk does not give for one that is not there.
_DESCRIPTIONS = '_CHECKPOINT_METADATA', 'state/_METADATA'

_Paths = dict[tuple[str, ...], Any]


class DamagedCheckpointError(ValueError):
  """A checkpoint that was finished but cannot be read any more, or not as it was written."""


@dataclasses.dataclass(frozen=True)
class Notes:
  """What is noted beside a state.

  Attributes:
    of_run: JSON values of the run's own, by name.
    score: how good the state is, where that is known; more is better.
  """

  of_run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  score: float | None = None


def describe(step: int, state: Any, notes: Notes = Notes()) -> dict[str, Any]:
  """What is stored beside a state: the format, a sum of bits for each leaf, and notes.

  Args:
    step: the number of finished training steps.
    state: a tree of arrays.
    notes: come back by `read_notes`.

  Returns:
    A dict of JSON values.

  Raises:
    ValueError: if two leaves would share one name in the checkpoint.
  """
  paths = _paths(state)
  # Orbax joins the keys of a path by dots, and lets one of two equal names overwrite the other.
  seen: dict[str, tuple[str, ...]] = {}
  for parts in paths:
    if (other := seen.setdefault('.'.join(parts), parts)) != parts:
      raise ValueError(f'leaves {other} and {parts} would share one name: rename a key with a dot')
  about = {'kind': _KIND, 'format': FORMAT, 'step': step, 'sums': _sums(paths)}
  # As text, so that its sum is one of bits.
  text = json.dumps([notes.of_run, notes.score], sort_keys=True)
  return about | {'notes': text, 'sum_of_notes': zlib.crc32(text.encode())}


def read_state(step_dir: epath.Path, example: Any) -> Any:
  """Reads a whole state, placed as an example is.

  Every process of a run calls it, and reads its part without the others: then they agree, so that
  all have the state or all have an error.

  Args:
    step_dir: the directory of one checkpoint.
    example: a tree of arrays or `jax.ShapeDtypeStruct`, of the state's structure.

  Returns:
    The state, bit for bit as it was saved.

  Raises:
    DamagedCheckpointError: if it cannot be read, here or elsewhere, or differs from what was
      written.
    ValueError: if it is of a newer format, or does not fit `example`.
    OSError: if the disk fails, here or elsewhere.
  """
  failure: Exception | None = None
  try:
    stored, about = _open(step_dir)
    _check_fit(step_dir, _paths(stored), _paths(example))
    placing = ocp.checkpoint_utils.construct_restore_args(example)
    restored = _read(step_dir, ocp.args.PyTreeRestore(item=example, restore_args=placing))
  except Exception as error:
    failure = error
  _agree(step_dir, failure)
  _compare(step_dir, _sums(_paths(restored)), about)
  return restored


def read_notes(step_dir: epath.Path) -> Notes:
  """Reads what was noted beside a state.

  Args:
    step_dir: the directory of one checkpoint.

  Returns:
    The notes.

  Raises:
    DamagedCheckpointError: if they cannot be read, or differ from what was written.
    ValueError: if the checkpoint is of a newer format.
  """
  _, about = _open(step_dir)
  return Notes(*json.loads(about['notes'])) if 'notes' in about else Notes()


def read_subtrees(step_dir: epath.Path, names: tuple[str, ...]) -> tuple[Any, ...]:
  """Reads some top-level fields of a state as trees of numpy arrays, by this process alone.

  Args:
    step_dir: the directory of one checkpoint.
    names: the fields, in the order wanted.

  Returns:
    One tree for each name.

  Raises:
    DamagedCheckpointError: if they cannot be read, or differ from what was written.
    ValueError: if the checkpoint is of a newer format, or lacks one of the names.
  """
  stored, about = _open(step_dir)
  if missing := [name for name in names if name not in stored]:
    raise ValueError(f'checkpoint {step_dir} has no {missing[0]!r}; it holds {sorted(stored)}')
  wanted = {name: stored[name] for name in names}
  placing = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
  args = ocp.args.PyTreeRestore(item=wanted, restore_args=placing, partial_restore=True)
  restored = _read(step_dir, args)
  _compare(step_dir, _sums(_paths(restored), alone=True), about)
  return tuple(restored[name] for name in names)


def _open(step_dir: epath.Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
  """The tree of shapes and dtypes a checkpoint holds, and its description, if it can be read."""
  with _reader() as reader:
    try:
      for name in _DESCRIPTIONS:
        with contextlib.suppress(FileNotFoundError):
          Path(step_dir, name).read_bytes()
      metadata = reader.metadata(step_dir)
    except Exception as error:
      raise _judged(step_dir, error) from error
  about = metadata.custom_metadata or {}
  version = about.get('format')
  if about.get('kind') != _KIND or not isinstance(version, int):
    raise _damage(step_dir, ValueError('it does not say that saq_jax wrote it'))
  if version > FORMAT:  # of which nothing more is known
    raise ValueError(
      f'checkpoint {step_dir} has format {version}, this version reads up to {FORMAT}: '
      'use the newer version of saq_jax that wrote it'
    )
  if zlib.crc32(str(about.get('notes', '')).encode()) != about.get('sum_of_notes', 0):
    raise _damage(step_dir, ValueError('its notes are not what was written'))
  state = metadata.item_metadata.get('state') if metadata.item_metadata else None
  if state is None:
    raise _damage(step_dir, ValueError('its state is missing'))
  return state.tree, about


def _read(step_dir: epath.Path, args: ocp.args.PyTreeRestore) -> Any:
  """Reads the arrays; whatever stops that, now that the trees fit, is damage or the disk."""
  with _reader() as reader:
    try:
      return reader.restore(step_dir, args=ocp.args.Composite(state=args))['state']
    except Exception as error:
      raise _judged(step_dir, error) from error


def _compare(step_dir: epath.Path, found: dict[str, int], about: dict[str, Any]) -> None:
  """Raises if the sums of what was read are not those of what was written."""
  for name, value in found.items():
    if value != about.get('sums', {}).get(name):
      raise _damage(step_dir, ValueError(f'{name} is not what was written'))


def _agree(step_dir: epath.Path, failure: Exception | None) -> None:
  """Raises what stopped this process; and where it stopped another one only, the like of it."""
  mine = 0 if failure is None else 1 if isinstance(failure, DamagedCheckpointError) else 2
  worst = mine
  if jax.process_count() > 1:
    worst = int(multihost_utils.process_allgather(np.array(mine)).max())
  if failure is not None and mine == worst:
    raise failure
  if worst == 1:
    raise _damage(step_dir, ValueError('another process cannot read its part of it'))
  if worst == 2:
    raise OSError(f'another process did not read checkpoint {step_dir}: it tells why') from failure


def _reader() -> ocp.Checkpointer:
  """A reader of any checkpoint directory, whatever its name, that waits for no other process."""
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
  state = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
  handler = ocp.CompositeCheckpointHandler(state=state)
  return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _paths(tree: Any) -> _Paths:
  """The leaves by the keys on their paths, alike for a dataclass and the dict it is stored as."""
  return {
    tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _sums(paths: _Paths, *, alone: bool = False) -> dict[str, int]:
  """The sum of each leaf's bits modulo 2^32, the same for every sharding of it.

  All processes together make it, unless this one, `alone`, has all there is to add up.
  """
  alone = alone or jax.process_count() == 1
  counts = alone or jax.process_index() == 0
  sums = np.array([_sum_of_bits(leaf, counts) for leaf in paths.values()], np.uint32)
  if not alone:
    sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
  return {'.'.join(parts): int(value) for parts, value in zip(paths, sums)}


def _sum_of_bits(leaf: Any, counts: bool) -> np.uint32:
  """This process's part of the sum: each element is counted in one place only."""
  if isinstance(leaf, jax.Array):
    pieces = [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
  else:
    pieces = [leaf] if counts else []
  total = np.uint32(0)
  for piece in pieces:
    flat = np.ascontiguousarray(piece).reshape(-1)
    bits = flat.view(f'uint{8 * min(flat.dtype.itemsize, 4)}')
    total = np.add.reduce([total, bits.sum(dtype=np.uint32)], dtype=np.uint32)
  return total


def _check_fit(step_dir: epath.Path, stored: _Paths, expected: _Paths) -> None:
  """Raises if two trees differ in a leaf's place, shape or dtype, and shows some of the leaves."""

  def kind(leaf: Any) -> str:
    return '-' if leaf is None else f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'

  rows = [
    ('.'.join(parts), kind(stored.get(parts)), kind(expected.get(parts)))
    for parts in sorted(stored | expected)
  ]
  rows = [row for row in rows if row[1] != row[2]]
  if rows:
    shown = [('leaf', 'checkpoint', 'expected'), *rows[:_NAMED_LEAVES]]
    first, second = (max(len(row[i]) for row in shown) for i in (0, 1))
    table = '\n'.join(f'  {a:<{first}}  {b:<{second}}  {c}' for a, b, c in shown)
    more = f'\n  and {len(rows) - _NAMED_LEAVES} more' if len(rows) > _NAMED_LEAVES else ''
    raise ValueError(
      f'checkpoint {step_dir} does not fit the state; leaves differing: {len(rows)}\n{table}{more}'
    )


def _judged(step_dir: epath.Path, error: Exception) -> Exception:
  """What may pass (a disk, a memory, a permission) as such; else the error for damage."""
  if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
    return error
  if disk_fails(error):
    return OSError(f'checkpoint {step_dir} cannot be read: {disk_reason(error)}')
  return _damage(step_dir, error)


def _damage(step_dir: epath.Path, error: Exception) -> DamagedCheckpointError:
  """The error for a checkpoint that cannot be read, with the beginning of the reason."""
  reason = (str(error).strip() or type(error).__name__).splitlines()[0]
  return DamagedCheckpointError(f'checkpoint {step_dir} is damaged: {reason[:120]}')

"""Fits given leaves to those that a model wants, whatever format they came from.

A head for another number of classes is left out, position embeddings and tables of relative
positions are resampled, and scales that the model has no use for are dropped. All else must fit.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from saq_jax._paths import is_quant_scale
from saq_jax.models.swin import resize_relative_bias
from saq_jax.models.vit import resize_position_embedding
from saq_jax.pretrained.errors import PretrainedError, shape_words, table
from saq_jax.pretrained.sizes import differences

Leaves = dict[str, Any]

_ROWS_OF_A_KIND = 4


@dataclasses.dataclass(frozen=True)
class Fitted:
  """Leaves that fit a model.

  Attributes:
    leaves: by path, each of the shape that the model wants.
    scales: of the weights, by the path of the kernel in the model's parameters.
    fresh: paths of leaves that must keep their first values, those of a head that is replaced.
    notes: what was changed, a line each.
  """

  leaves: Leaves
  scales: Leaves
  fresh: frozenset[str]
  notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where given leaves came from, for messages.

  Attributes:
    file: which file.
    names: of the tensors in it, by path.
    shapes: of those tensors in their own layout, by name.
    unknown: names that have no path.
  """

  file: str = 'the checkpoint'
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  unknown: tuple[str, ...] = ()

  def name(self, path: str) -> str:
    """Gives the name in the file of a leaf.

    Args:
      path: of the leaf.

    Returns:
      The name, which is the path where there is no other.
    """
    return self.names.get(path, path)

  def shape(self, path: str, leaf: Any) -> tuple[int, ...]:
    """Gives the shape in the file of a leaf.

    Args:
      path: of the leaf.
      leaf: what it became here.

    Returns:
      The shape in the file's own layout.
    """
    return self.shapes.get(self.name(path), np.shape(leaf))


def fit(
  given: Mapping[str, Any],
  wanted: Mapping[str, Any],
  *,
  last_kernel: str,
  image_size: tuple[int, int] | None = None,
  scales: Mapping[str, Any] | None = None,
  scale_paths: Collection[str] | None = None,
  origin: Origin | None = None,
) -> Fitted:
  """Fits given leaves to a model.

  Args:
    given: arrays by 'params/...' and 'batch_stats/...'.
    wanted: the model's leaves by the same paths: arrays, or `jax.ShapeDtypeStruct`.
    last_kernel: regular expression over the paths, without 'params/', of the heads' kernels.
    image_size: height and width of the images, where they may not be square.
    scales: of the weights, by the path of the kernel; that of a replaced head is dropped.
    scale_paths: of the kernels that the run quantizes; scales of others are dropped; None keeps
      all.
    origin: for messages.

  Returns:
    The leaves that fit. Scales of activations that were not given are in neither set.

  Raises:
    PretrainedError: if kind or size of the network differ, or leaves are missing, unknown, of
      another shape, not floating or not finite.

  Example:
    >>> import numpy as np
    >>> given = {'params/fc/kernel': np.zeros((4, 10)), 'params/fc/bias': np.zeros(10)}
    >>> wanted = {'params/fc/kernel': np.zeros((4, 3)), 'params/fc/bias': np.zeros(3)}
    >>> fit(given, wanted, last_kernel='fc/kernel').notes
    ('head replaced: the file has 10 classes, this run 3',)
  """
  origin = origin or Origin()
  leaves = dict(given)
  shapes = [{path: np.shape(x) for path, x in tree.items()} for tree in (leaves, wanted)]
  if found := differences(*shapes):
    raise PretrainedError(
      f'{origin.file} is of another network: {found}. Set config.model '
      'to that (docs/models.md), or take other weights'
    )
  fresh, notes = _without_head(leaves, wanted, last_kernel, origin)
  notes += _resized(leaves, wanted, image_size)
  notes += _without_idle_scales(leaves, wanted)
  _require_fitting(leaves, wanted, fresh, origin)
  _require_finite(leaves, wanted, origin)
  kept = {path: x for path, x in (scales or {}).items() if f'params/{path}' not in fresh}
  if scale_paths is not None and (idle := kept.keys() - set(scale_paths)):
    kept = {path: x for path, x in kept.items() if path not in idle}
    notes.append(f'{len(idle)} scales of weights left out: the run does not quantize those')
  return Fitted(leaves, kept, frozenset(fresh), tuple(notes))


def _without_head(
  leaves: Leaves, wanted: Mapping[str, Any], last_kernel: str, origin: Origin
) -> tuple[set[str], list[str]]:
  """Takes out heads for another number of classes; gives the paths to fill, and a note."""
  kernels = [p for p in wanted if re.fullmatch(f'params/(?:{last_kernel})', p)]
  missing = [p for p in kernels if p not in leaves]
  theirs = {p: np.shape(leaves[p]) for p in kernels if p in leaves}
  other = [p for p, s in theirs.items() if s != (ours := wanted[p].shape) and s[:-1] == ours[:-1]]
  if not missing and not other:
    return set(), []
  if missing and len(missing) < len(kernels) and not other:
    raise PretrainedError(
      f'{origin.file} has no {missing[0].removeprefix("params/")}, only one of the '
      f'{len(kernels)} heads whose mean the model takes: use weights with both heads, as '
      'DeiTForImageClassificationWithTeacher has them, or another number of classes'
    )
  replaced = missing + other
  fresh = set()
  for path in replaced:
    module = path.removesuffix('kernel')
    fresh |= {p for p in (path, f'{module}bias') if p in wanted}
  for path in fresh:
    leaves.pop(path, None)
  classes = wanted[kernels[0]].shape[-1]
  if not other:
    return fresh, [f'new head for {classes} classes: the file has none']
  return fresh, [f'head replaced: the file has {theirs[other[0]][-1]} classes, this run {classes}']


def _resized(
  leaves: Leaves, wanted: Mapping[str, Any], image_size: tuple[int, int] | None
) -> list[str]:
  """Resamples what has a size of its own for each size of image or window; gives notes."""
  notes = []
  path = 'params/pos_embed'
  if _of_another_length(leaves.get(path), wanted.get(path), axis=1):
    prefix = 2 if 'params/dist_token' in wanted else 1
    old = math.isqrt(leaves[path].shape[1] - prefix)
    grid = _grid(wanted, prefix, image_size)
    if old**2 == leaves[path].shape[1] - prefix and math.prod(grid) > 0:
      leaves[path] = np.asarray(resize_position_embedding(leaves[path], grid, prefix))
      notes.append(f'position embedding interpolated from {old}x{old} to {grid[0]}x{grid[1]}')
  windows = set()
  for path in wanted:
    if path.endswith('/relative_bias') and _of_another_length(leaves.get(path), wanted[path], 0):
      old, new = ((math.isqrt(x.shape[0]) + 1) // 2 for x in (leaves[path], wanted[path]))
      if (2 * old - 1) ** 2 == leaves[path].shape[0]:
        leaves[path] = np.asarray(resize_relative_bias(leaves[path], new))
        windows.add(f'{old}x{old} to {new}x{new}')
  notes += [f'relative positions interpolated from windows of {words}' for words in sorted(windows)]
  return notes


def _of_another_length(given: Any, wanted: Any, axis: int) -> bool:
  """Whether two arrays are there, and their shapes differ in one axis alone."""
  if given is None or wanted is None or np.ndim(given) != len(wanted.shape):
    return False
  return [i for i, (a, b) in enumerate(zip(given.shape, wanted.shape)) if a != b] == [axis]


def _grid(
  wanted: Mapping[str, Any], prefix: int, image_size: tuple[int, int] | None
) -> tuple[int, int]:
  """Rows and columns of the patches that the model sees; zeros where they cannot be told."""
  count = wanted['params/pos_embed'].shape[1] - prefix
  patch = wanted['params/patch_embed/kernel'].shape[0]
  if image_size and (image_size[0] // patch) * (image_size[1] // patch) == count:
    return image_size[0] // patch, image_size[1] // patch
  side = math.isqrt(count)
  return (side, side) if side**2 == count else (0, 0)


def _without_idle_scales(leaves: Leaves, wanted: Mapping[str, Any]) -> list[str]:
  """Drops scales of activations that the model has not, or has of another shape; gives a note."""
  idle = [
    path
    for path, x in leaves.items()
    if is_quant_scale(path) and (path not in wanted or np.shape(x) != wanted[path].shape)
  ]
  for path in idle:
    del leaves[path]
  if not idle:
    return []
  return [
    f'{len(idle)} scales of activations left out: the model does not quantize those, or otherwise'
  ]


def _require_fitting(
  leaves: Leaves, wanted: Mapping[str, Any], fresh: set[str], origin: Origin
) -> None:
  """Raises unless the leaves are those wanted; the message has a table."""
  missing, shaped, turned = [], [], []
  for path, leaf in wanted.items():
    want = shape_words(leaf.shape)
    if path in fresh or is_quant_scale(path):
      continue
    if path not in leaves:
      missing.append(('(missing)', '', path, '', want))
    elif (shape := np.shape(leaves[path])) != leaf.shape:
      there = origin.shape(path, leaves[path])
      shaped.append((origin.name(path), shape_words(there), path, shape_words(shape), want))
      turned += [origin.name(path)] if leaf.shape in (there, shape[::-1]) else []
  unknown = [
    (origin.name(p), shape_words(origin.shape(p, x)), '(unknown)', shape_words(np.shape(x)), '')
    for p, x in leaves.items()
    if p not in wanted
  ]
  unknown += [
    (name, shape_words(origin.shapes.get(name, ())), '(unknown)', '', '') for name in origin.unknown
  ]
  if not missing and not shaped and not unknown:
    return
  counts = f'missing {len(missing)}, of another shape {len(shaped)}, unknown {len(unknown)}'
  heading = ('in the file', 'shape there', 'here', 'shape here', 'wanted')
  rows = [row for kind in (shaped, missing, unknown) for row in kind[:_ROWS_OF_A_KIND]]
  words = f'\n  {turned[0]} would fit transposed: is its layout the usual one?' if turned else ''
  raise PretrainedError(
    f'{origin.file} does not fit the model; tensors {counts}:\n{table(rows, heading)}{words}'
  )


def _require_finite(leaves: Leaves, wanted: Mapping[str, Any], origin: Origin) -> None:
  """Raises if a leaf is not floating where that is wanted, or holds NaN or infinity."""
  for path, x in leaves.items():
    if not jnp.issubdtype(wanted[path].dtype, jnp.floating):
      continue
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise PretrainedError(
        f'{origin.file}: {origin.name(path)} is of {x.dtype}, where floats are wanted: the file '
        'may be one of quantized weights, which are not taken'
      )
    bad = int(np.size(x) - np.isfinite(np.asarray(x)).sum())
    if bad:
      raise PretrainedError(
        f'{origin.file}: {origin.name(path)} has {bad} values of {np.size(x)} that are NaN or '
        'infinite: it is no usable checkpoint'
      )

"""Encoded images of any size, decoded and brought to one size when a batch asks for them."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from saq_jax.data.decode import RecordError, decode, decode_part, from_pil, to_pil
from saq_jax.data.randaugment import RandAugment
from saq_jax.data.resize import DRAWS, Resizing, centre, random_box, resize

Batch = dict[str, np.ndarray]

# Keeps the bits of an example's augmentation apart from those that order the examples.
_AUGMENTATION = 1
# Damaged records in a row after which no other one is looked for: so many are no accident.
_TRIES = 100
_BLOCK = 1000  # Records that are checked together.
_UNREADABLE = (RuntimeError, OSError, ValueError, KeyError)


class LabelError(RecordError):
  """A label that is not a class: the dataset is a wrong one, which leaving it out would hide."""


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
  """A labelled set of encoded images.

  Attributes:
    records: a random-access sequence of {'image': bytes, 'label': int}; messages have the
      'file_name' where there is one.
    num_classes: the number of classes.
    channels: 3, or 1 for grey images.
    resizing: how images come to one size.
    rand_augment: of training images; None for none.
    flip: mirrors a training image with probability one half, before `rand_augment`.
    skip_damaged: takes the next sound image where one is damaged, or where its record cannot be
      read; else that is an error.
    name: of the set, for messages.
  """

  records: Sequence[dict[str, Any]]
  num_classes: int
  channels: int
  resizing: Resizing
  rand_augment: RandAugment | None = None
  flip: bool = False
  skip_damaged: bool = False
  name: str = 'dataset'

  def __len__(self) -> int:
    return len(self.records)

  @property
  def decodes(self) -> bool:
    """Images are decoded for each batch, which is worth worker processes."""
    return True

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """The shape of each image of a batch, [H, W, C]."""
    return self.resizing.size, self.resizing.size, self.channels

  def train_batch(self, indices: np.ndarray, seed: int, positions: Sequence[int]) -> Batch:
    """Decodes examples and augments them, as a pure function of the arguments.

    A random part is cut out of each image and brought to the size of all.

    Args:
      indices: of the examples, [b].
      seed: of the augmentation.
      positions: of the examples in the whole stream, [b]; with the seed they give its draws.

    Returns:
      {'image': uint8 [b, size, size, C], 'label': int32 [b]}; with `skip_damaged` also 'damaged',
      bool [b], true where the example's image is another one's in its place.

    Raises:
      RecordError: a record cannot be read or decoded, with `skip_damaged` a hundred in a row, or a
        label is not a class.
    """
    batch = self._empty(len(indices))
    for row, (index, position) in enumerate(zip(indices.tolist(), positions, strict=True)):
      draws = _uniform(seed, position, self._num_draws)
      batch['label'][row], damaged = self._next_sound(index, draws, batch['image'][row])
      if damaged:
        batch['damaged'][row] = True
    return batch

  def eval_batch(self, indices: np.ndarray) -> Batch:
    """Decodes examples, scales the shorter side to `resize` and cuts out the centre.

    Args:
      indices: of the examples, [b].

    Returns:
      As `train_batch`; a damaged image is black, and no other one stands in for it.

    Raises:
      RecordError: a record cannot be read or decoded, or a label is not a class.
    """
    batch, sizes = self._empty(len(indices)), self.resizing
    for row, index in enumerate(indices.tolist()):
      try:
        record = self._read(index)
        batch['label'][row] = record['label']
        pixels = self._named(index, record, decode, self.channels)
        batch['image'][row] = centre(pixels, sizes.size, sizes.resize, sizes.interpolation)
      except LabelError:
        raise
      except RecordError:
        if not self.skip_damaged:
          raise
        batch['damaged'][row] = True
    return batch

  def find_damaged(self, tell: Callable[[int], object]) -> list[str]:
    """Reads and decodes every record.

    Args:
      tell: is called with the number of records that are done, now and then.

    Returns:
      What cannot be used, such as 'record 3 (train_3.JPEG)'.
    """

    def damaged(index: int) -> str | None:
      record: dict[str, Any] = {}
      try:
        record = self._read(index)
        decode(record['image'], self.channels)
      except RecordError:
        return _name_of(index, record)
      return None

    found: list[str | None] = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for start in range(0, len(self), _BLOCK):
        found += pool.map(damaged, range(start, min(start + _BLOCK, len(self))))
        tell(len(found))
    return [name for name in found if name]

  def _empty(self, count: int) -> Batch:
    """A batch to fill."""
    batch: Batch = {
      'image': np.zeros((count, *self.image_shape), np.uint8),
      'label': np.zeros(count, np.int32),
    }
    if self.skip_damaged:
      batch['damaged'] = np.zeros(count, bool)
    return batch

  @property
  def _num_draws(self) -> int:
    """Random numbers an example: of the crop, the flip and RandAugment."""
    return DRAWS + 1 + (self.rand_augment.num_draws if self.rand_augment else 0)

  def _next_sound(self, index: int, draws: np.ndarray, out: np.ndarray) -> tuple[int, bool]:
    """Writes a training image or, where it is damaged, the next; its label, and if it is that."""
    tries = min(len(self), _TRIES)
    for attempt in range(tries):
      try:
        return self._augment((index + attempt) % len(self), draws, out), attempt > 0
      except LabelError:
        raise
      except RecordError as error:
        if not self.skip_damaged:
          raise
        last = error
    raise RecordError(
      f'{tries} records in a row are damaged, too many to leave out; the last is {last}'
    ) from last

  def _augment(self, index: int, draws: np.ndarray, out: np.ndarray) -> int:
    """Writes a training image, [size, size, C], and gives its label."""
    record, sizes = self._read(index), self.resizing
    pixels = self._named(
      index,
      record,
      decode_part,
      self.channels,
      lambda width, height: random_box(width, height, draws[:DRAWS], sizes.crop_scale),
      fast=sizes.interpolation == 'fast',
      size=sizes.size,
    )
    resize(pixels, sizes.size, sizes.size, sizes.interpolation, out)
    if self.flip and draws[DRAWS] < 0.5:
      out[...] = out[:, ::-1].copy()
    if self.rand_augment:
      out[...] = from_pil(self.rand_augment(to_pil(out), draws[DRAWS + 1 :]))
    return int(record['label'])

  def _read(self, index: int) -> dict[str, Any]:
    """A record whose label is a class."""
    try:
      record = read_record(self.records, index)
    except RecordError as error:
      raise RecordError(f'{self._title(index, {})} {error}{self._hint("records")}') from error
    label = int(record['label'])
    if not 0 <= label < self.num_classes:
      raise LabelError(
        f'{self._title(index, record)}: label {label} is not one of {self.num_classes} classes'
      )
    return record

  def _named(
    self,
    index: int,
    record: dict[str, Any],
    decode_fn: Callable[..., np.ndarray],
    *args: Any,
    **kw: Any,
  ) -> np.ndarray:
    """What the function makes of the record's image, or an error that names the record."""
    try:
      return decode_fn(record['image'], *args, **kw)
    except RecordError as error:
      raise RecordError(f'{self._title(index, record)}: {error}{self._hint("images")}') from error

  def _hint(self, what: str) -> str:
    """How to go on without what is damaged, where that is not done already."""
    return '' if self.skip_damaged else f'; config.data.skip_damaged=True leaves such {what} out'

  def _title(self, index: int, record: dict[str, Any]) -> str:
    """What a reader calls a record; {} where it cannot be read."""
    return f'{self.name}, {_name_of(index, record)}'


def read_record(records: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
  """Reads a record, of whose file any part may be damaged.

  Args:
    records: as tfds opens them.
    index: of the record.

  Returns:
    The record.

  Raises:
    RecordError: it cannot be read; the message, to be put after the record's name, says why and
      what to do.

  Example:
    >>> read_record([{'label': 3}], 0)
    {'label': 3}
  """
  try:
    return records[index]
  except Exception as error:
    # protobuf's error is not one of those, and nothing else here needs protobuf.
    if not isinstance(error, _UNREADABLE) and type(error).__name__ != 'DecodeError':
      raise
    reason = ' '.join(str(error).split())[:200]
    raise RecordError(
      f"cannot be read from its file ({reason}): delete the dataset's directory and run"
      ' `python -m saq_jax.data.prepare` for it again'
    ) from error


def _name_of(index: int, record: dict[str, Any]) -> str:
  """A record as 'record 3 (file.jpg)', or without the file."""
  name = record.get('file_name')
  file = f' ({name.decode() if isinstance(name, bytes) else name})' if name else ''
  return f'record {index}{file}'


def _uniform(seed: int, position: int, count: int) -> np.ndarray:
  """Uniform numbers in [0, 1) that belong to one place of the stream."""
  sequence = np.random.SeedSequence((seed, position, _AUGMENTATION))
  return (np.random.Philox(sequence).random_raw(count) >> np.uint64(11)) * 2.0**-53

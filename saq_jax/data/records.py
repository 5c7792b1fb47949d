"""Encoded images of any size, decoded and brought to one size when a batch asks for them."""

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
    skip_damaged: takes the next sound image where one is damaged; else that is an error.
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
      RecordError: an image cannot be decoded, or a label is not a class.
    """
    batch = self._empty(len(indices))
    for row, (index, position) in enumerate(zip(indices.tolist(), positions, strict=True)):
      draws = _uniform(seed, position, self._num_draws)
      for attempt in range(len(self)):
        try:
          label = self._augment((index + attempt) % len(self), draws, batch['image'][row])
          break
        except RecordError:
          if not self.skip_damaged or attempt + 1 == len(self):
            raise
          batch['damaged'][row] = True
      batch['label'][row] = label
    return batch

  def eval_batch(self, indices: np.ndarray) -> Batch:
    """Decodes examples, scales the shorter side to `resize` and cuts out the centre.

    Args:
      indices: of the examples, [b].

    Returns:
      As `train_batch`; a damaged image is black, and no other one stands in for it.

    Raises:
      RecordError: an image cannot be decoded, or a label is not a class.
    """
    batch, sizes = self._empty(len(indices)), self.resizing
    for row, index in enumerate(indices.tolist()):
      try:
        data, batch['label'][row] = self._read(index)
        pixels = self._named(index, decode, data, self.channels)
        batch['image'][row] = centre(pixels, sizes.size, sizes.resize, sizes.interpolation)
      except RecordError:
        if not self.skip_damaged:
          raise
        batch['damaged'][row] = True
    return batch

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

  def _augment(self, index: int, draws: np.ndarray, out: np.ndarray) -> int:
    """Writes a training image, [size, size, C], and gives its label."""
    data, label = self._read(index)
    sizes = self.resizing
    pixels = self._named(
      index,
      decode_part,
      data,
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
    return label

  def _read(self, index: int) -> tuple[bytes, int]:
    """An image file and its label."""
    record = self.records[index]
    label = int(record['label'])
    if not 0 <= label < self.num_classes:
      raise RecordError(
        f'{self._title(index)}: label {label} is not one of {self.num_classes} classes'
      )
    return record['image'], label

  def _named(self, index: int, decode_fn: Callable[..., np.ndarray], *args: Any, **kw: Any) -> Any:
    """What the function gives, or an error that names the record."""
    try:
      return decode_fn(*args, **kw)
    except RecordError as error:
      raise RecordError(
        f'{self._title(index)}: {error}; config.data.skip_damaged=True leaves such images out'
      ) from error

  def _title(self, index: int) -> str:
    """What a reader calls a record."""
    file_name = self.records[index].get('file_name')
    file = f' ({file_name.decode() if isinstance(file_name, bytes) else file_name})'
    return f'{self.name}, record {index}' + (file if file_name else '')


def _uniform(seed: int, position: int, count: int) -> np.ndarray:
  """Uniform numbers in [0, 1) that belong to one place of the stream."""
  sequence = np.random.SeedSequence((seed, position, _AUGMENTATION))
  return (np.random.Philox(sequence).random_raw(count) >> np.uint64(11)) * 2.0**-53

"""Labelled images: whole in memory, or encoded on disk and decoded when a batch asks for them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from saq_jax.data.builders import errors_only, open_builder, open_split
from saq_jax.data.classes import OfClasses, find_classes
from saq_jax.data.decode import RecordError
from saq_jax.data.randaugment import RandAugment
from saq_jax.data.records import Batch, Records, read_record
from saq_jax.data.resize import Resizing


class Dataset(Protocol):
  """What batches are drawn from: `Examples` in memory, or `Records`."""

  @property
  def num_classes(self) -> int:
    """The number of classes."""

  @property
  def image_shape(self) -> tuple[int, ...]:
    """The shape of an image of a batch, [H, W, C]."""

  @property
  def decodes(self) -> bool:
    """Whether a batch takes work that is worth processes of its own."""

  def __len__(self) -> int: ...

  def train_batch(self, indices: np.ndarray, seed: int, positions: Sequence[int]) -> Batch:
    """Examples to train on, [b], as a pure function.

    Args:
      indices: of the examples, [b].
      seed: of what is random.
      positions: of the examples in the whole stream, [b].

    Returns:
      {'image': uint8 [b, H, W, C], 'label': int32 [b]}.
    """

  def eval_batch(self, indices: np.ndarray) -> Batch:
    """Examples to evaluate on.

    Args:
      indices: of the examples, [b].

    Returns:
      As `train_batch`.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """Holds a labelled set of images of one shape in memory.

  Attributes:
    images: uint8 [N, H, W, C], N >= 1.
    labels: int32 [N], each in 0..num_classes - 1.
    num_classes: The number of classes, which may exceed those that occur.

  Raises:
    ValueError: A shape, dtype or label that breaks the above.

  Example:
    >>> Examples(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4, dtype=np.int32), 10).images.shape
    (4, 8, 8, 1)
  """

  images: np.ndarray
  labels: np.ndarray
  num_classes: int

  def __post_init__(self) -> None:
    images, labels = self.images, self.labels
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
      raise ValueError(
        f'images must be uint8 [N, H, W, C] with N >= 1, got {images.dtype} {images.shape}'
      )
    if labels.shape != images.shape[:1] or labels.dtype != np.int32:
      raise ValueError(
        f'labels must be int32 [{len(images)}], one an image, got {labels.dtype} {labels.shape}'
      )
    if labels.min() < 0 or labels.max() >= self.num_classes:
      raise ValueError(
        f'labels must be in 0..{self.num_classes - 1}, got {labels.min()}..{labels.max()}'
      )

  def __len__(self) -> int:
    return len(self.images)

  @property
  def image_shape(self) -> tuple[int, ...]:
    """The shape of an image, [H, W, C]."""
    return self.images.shape[1:]

  @property
  def decodes(self) -> bool:
    """The images are there as they are."""
    return False

  def train_batch(self, indices: np.ndarray, seed: int, positions: Sequence[int]) -> Batch:
    """Picks examples to train on.

    Args:
      indices: of the examples, [b].
      seed: without a part here: nothing is random.
      positions: likewise.

    Returns:
      {'image': uint8 [b, H, W, C], 'label': int32 [b]}.
    """
    del seed, positions
    return self.eval_batch(indices)

  def eval_batch(self, indices: np.ndarray) -> Batch:
    """Picks examples to evaluate on.

    Args:
      indices: of the examples, [b].

    Returns:
      {'image': uint8 [b, H, W, C], 'label': int32 [b]}.
    """
    return {'image': self.images[indices], 'label': self.labels[indices]}


def load_examples(
  name: str, split: str, data_dir: str | None = None, classes: Sequence[str] = ()
) -> Examples:
  """Reads a dataset that fits in memory, in its stored order.

  'digits' is prepared on first use, in a second. Any other dataset must have been prepared
  (`python -m saq_jax.data.prepare`), and have an 'image' of one fixed shape and a 'label'.

  Args:
    name: 'digits', 'folder:PATH' or tfds's name of a dataset, such as 'cifar10' or 'cifar10:3.0.2'.
    split: A split in tfds's notation, such as 'train', 'train[:80%]' or 'train+test'.
    data_dir: tfds's data directory; None is tfds's default, `~/tensorflow_datasets` or
      `$TFDS_DATA_DIR`.
    classes: names of the classes to read, which are numbered anew in this order; () is all.

  Returns:
    The split's examples.

  Raises:
    ValueError: The dataset is unknown, not prepared or of another kind, the split is unknown or
      empty, or a class is unknown.
    PermissionError: The digits are not prepared and `data_dir` cannot be written.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as data_dir:
    ...   examples = load_examples('digits', 'train[:50%]', data_dir)
    >>> examples.images.shape, examples.num_classes
    ((719, 8, 8, 1), 10)
  """
  builder = open_builder(name, data_dir)
  image = builder.info.features['image']
  if None in image.shape:
    raise ValueError(
      f'dataset {name!r} has images {image.shape}: only images of one fixed shape are held in'
      ' memory; set config.data.image_size to bring them to one size as they are read'
    )
  records, count = _chosen(builder, name, split, classes, decoders=None)
  images = np.empty((len(records), *image.shape), np.uint8)
  labels = np.empty(len(records), np.int32)
  with errors_only():
    # A plain loop: grain's threads, measured, took twice as long over images this small.
    for index in range(len(records)):
      try:
        record = read_record(records, index)
      except RecordError as error:
        raise ValueError(f'{name} {split!r}, record {index}: it {error}') from error
      images[index], labels[index] = record['image'], record['label']
  return Examples(images, labels, count)


def load_records(
  name: str,
  split: str,
  data_dir: str | None,
  resizing: Resizing,
  *,
  classes: Sequence[str] = (),
  rand_augment: RandAugment | None = None,
  flip: bool = False,
  skip_damaged: bool = False,
) -> Records:
  """Opens a dataset whose images are decoded batch by batch.

  Args:
    name: as in `load_examples`.
    split: as in `load_examples`.
    data_dir: as in `load_examples`.
    resizing: how the images come to one size.
    classes: as in `load_examples`.
    rand_augment: as in `Records`, like the rest.
    flip: mirrors training images at random.
    skip_damaged: goes on without damaged images.

  Returns:
    The split's records.

  Raises:
    ValueError: as `load_examples`.
  """
  builder = open_builder(name, data_dir)
  features = builder.info.features
  decoders = {
    key: tfds.decode.SkipDecoding()
    for key, feature in features.items()
    if isinstance(feature, tfds.features.Image)
  }
  records, count = _chosen(builder, name, split, classes, decoders)
  return Records(
    records,
    count,
    features['image'].shape[-1],
    resizing,
    rand_augment=rand_augment,
    flip=flip,
    skip_damaged=skip_damaged,
    name=f'{name} {split!r}',
  )


def _chosen(
  builder: tfds.core.DatasetBuilder,
  name: str,
  split: str,
  classes: Sequence[str],
  decoders: dict[str, tfds.decode.Decoder] | None,
) -> tuple[Sequence[dict[str, Any]], int]:
  """The records of a split that are of the classes, and how many classes there are."""
  records = open_split(builder, name, split, decoders)
  if not classes:
    return records, builder.info.features['label'].num_classes
  return OfClasses(records, *find_classes(builder, split, classes)), len(classes)

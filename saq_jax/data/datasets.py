"""Labelled images: whole in memory, or encoded on disk and decoded when a batch asks for them."""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from saq_jax.data.digits import Digits, prepare_digits
from saq_jax.data.records import Batch, Records, Resizing


class Dataset(Protocol):
  """What batches are drawn from: `Examples` in memory, or `Records`."""

  @property
  def num_classes(self) -> int:
    """The number of classes."""

  @property
  def image_shape(self) -> tuple[int, ...]:
    """The shape of an image of a batch, [H, W, C]."""

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


def load_examples(name: str, split: str, data_dir: str | None = None) -> Examples:
  """Reads a tfds image-classification dataset that fits in memory, in its stored order.

  'digits' is prepared on first use, in a second. Any other dataset must have been prepared as
  array_record, and have an 'image' of one fixed shape and a 'label'.

  Args:
    name: tfds's name of the dataset, such as 'digits', 'cifar10' or 'cifar10:3.0.2'.
    split: A split in tfds's notation, such as 'train', 'train[:80%]' or 'train+test'.
    data_dir: tfds's data directory; None is tfds's default, `~/tensorflow_datasets` or
      `$TFDS_DATA_DIR`.

  Returns:
    The split's examples.

  Raises:
    ValueError: The dataset is unknown, not prepared or of another kind, or the split is unknown or
      empty.
    PermissionError: The digits are not prepared and `data_dir` cannot be written.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as data_dir:
    ...   examples = load_examples('digits', 'train[:50%]', data_dir)
    >>> examples.images.shape, examples.num_classes
    ((719, 8, 8, 1), 10)
  """
  builder = _builder(name, data_dir)
  image = builder.info.features['image']
  if None in image.shape:
    raise ValueError(
      f'dataset {name!r} has images {image.shape}: only images of one fixed shape are held in'
      ' memory; set config.data.image_size to bring them to one size as they are read'
    )
  records = _open_split(builder, name, split, decoders=None)
  images = np.empty((len(records), *image.shape), np.uint8)
  labels = np.empty(len(records), np.int32)
  with _errors_only():
    # A plain loop: grain's threads, measured, took twice as long over images this small.
    for index, record in enumerate(records):
      images[index], labels[index] = record['image'], record['label']
  return Examples(images, labels, builder.info.features['label'].num_classes)


def load_records(name: str, split: str, data_dir: str | None, resizing: Resizing) -> Records:
  """Opens a tfds image-classification dataset whose images are decoded batch by batch.

  Args:
    name: as in `load_examples`.
    split: as in `load_examples`.
    data_dir: as in `load_examples`.
    resizing: how the images come to one size.

  Returns:
    The split's records.

  Raises:
    ValueError: as `load_examples`.
  """
  builder = _builder(name, data_dir)
  features = builder.info.features
  decoders = {
    key: tfds.decode.SkipDecoding()
    for key, feature in features.items()
    if isinstance(feature, tfds.features.Image)
  }
  records = _open_split(builder, name, split, decoders)
  return Records(records, features['label'].num_classes, features['image'].shape[-1], resizing)


def _builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """The builder of a dataset that is on disk and has images and classes."""
  builder = prepare_digits(data_dir) if name == Digits.name else _prepared_builder(name, data_dir)
  _check_features(name, builder.info.features)
  return builder


def _open_split(
  builder: tfds.core.DatasetBuilder,
  name: str,
  split: str,
  decoders: dict[str, tfds.decode.Decoder] | None,
) -> Sequence[Any]:
  """The records of a split; ValueError if there are none."""
  try:
    count = builder.info.splits[split].num_examples
  except (ValueError, KeyError, NotImplementedError) as error:
    raise ValueError(
      f'dataset {name!r} has no split {split!r}: name one of {sorted(builder.info.splits)} or a'
      " slice within one, such as 'train[:80%]'"
    ) from error
  if not count:
    raise ValueError(f'split {split!r} of dataset {name!r} is empty: widen its slice')
  try:
    return builder.as_data_source(split, decoders=decoders)
  except NotImplementedError as error:
    raise ValueError(
      f'{builder.data_dir} holds {builder.info.file_format.value} files, which need TensorFlow:'
      ' prepare the dataset as array_record in another data_dir'
    ) from error


def _prepared_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Returns tfds's builder of a dataset that is on disk."""
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except (ValueError, AssertionError, ImportError) as error:
    reason = str(error).strip().split('\n')[0]
    known = [Digits.name, *tfds.list_builders(with_community_datasets=False)]
    near = difflib.get_close_matches(name, known)
    raise ValueError(
      f'cannot load dataset {name!r} ({reason}): name one of tfds.list_builders()'
      + (f', perhaps {near[0]!r}' if near else '')
    ) from error
  # tfds warns when asked is_prepared() of a directory that is not there.
  if not (builder.data_path.exists() and builder.is_prepared()):
    where = f' --data_dir={data_dir}' if data_dir else ''
    raise ValueError(
      f"dataset {name!r} is not prepared in {builder.data_dir}: pip install 'saq_jax[prepare]' and"
      f' run `tfds build {name} --file_format=array_record{where}`'
    )
  return builder


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
  """Keeps back tfds's advice to install OpenCV, which is logged as a warning."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _check_features(name: str, features: tfds.features.FeatureConnector) -> None:
  """Raises ValueError unless there are a class and a uint8 image."""
  keys = sorted(features.keys()) if isinstance(features, tfds.features.FeaturesDict) else []
  if not {'image', 'label'} <= set(keys):
    raise ValueError(f"dataset {name!r} has features {keys}: it needs an 'image' and a 'label'")
  image, label = features['image'], features['label']
  if (
    not isinstance(image, tfds.features.Image)
    or not isinstance(label, tfds.features.ClassLabel)
    or image.np_dtype != np.uint8
  ):
    raise ValueError(
      f'dataset {name!r} has image {image!r} and label {label!r}: only a ClassLabel and uint8'
      ' images are read'
    )

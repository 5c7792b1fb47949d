"""In-memory datasets and the batches drawn from them, each a pure function of the step."""

import contextlib
import dataclasses
import difflib
import functools
import sys
from collections.abc import Iterator

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from saq_jax.data.digits import Digits, prepare_digits

Batch = dict[str, np.ndarray]


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
  builder = prepare_digits(data_dir) if name == Digits.name else _prepared_builder(name, data_dir)
  _check_features(name, builder.info.features)
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
    records = builder.as_data_source(split)
  except NotImplementedError as error:
    raise ValueError(
      f'{builder.data_dir} holds {builder.info.file_format.value} files, which need TensorFlow:'
      ' prepare the dataset as array_record in another data_dir'
    ) from error
  images = np.empty((count, *builder.info.features['image'].shape), np.uint8)
  labels = np.empty(count, np.int32)
  with _errors_only():
    # A plain loop: grain's threads, measured, took twice as long over images this small.
    for index, record in enumerate(records):
      images[index], labels[index] = record['image'], record['label']
  return Examples(images, labels, builder.info.features['label'].num_classes)


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
  """Raises ValueError unless there are a class and a uint8 image of one fixed shape."""
  keys = sorted(features.keys()) if isinstance(features, tfds.features.FeaturesDict) else []
  if not {'image', 'label'} <= set(keys):
    raise ValueError(f"dataset {name!r} has features {keys}: it needs an 'image' and a 'label'")
  image, label = features['image'], features['label']
  if (
    not isinstance(image, tfds.features.Image)
    or not isinstance(label, tfds.features.ClassLabel)
    or None in image.shape
    or image.np_dtype != np.uint8
  ):
    raise ValueError(
      f'dataset {name!r} has image {image!r} and label {label!r}: only a ClassLabel and uint8'
      ' images of one fixed shape are held in memory'
    )


def train_source(
  examples: Examples,
  batch_size: int,
  *,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """Returns the endless training batches, as a pure function of the step.

  Step t takes the positions t * batch_size .. (t + 1) * batch_size - 1 of the stream

      perm(seed, 0), perm(seed, 1), perm(seed, 2), ...

  of whole epochs, each a new permutation of all examples: none is dropped, each comes once an epoch
  and an epoch may end within a batch. A process takes its own contiguous share of each batch, so
  the shares put end to end are the batch that one process alone would draw.

  The permutations come from Philox bits, whose stream NumPy keeps fixed across versions.

  Args:
    examples: The examples.
    batch_size: Examples a step over all processes; a multiple of `process_count`, at most N.
    seed: Any integer >= 0.
    process_index: This process, 0..process_count - 1.
    process_count: The number of processes that share each batch.

  Returns:
    A dataset of batches {'image': uint8 [b, H, W, C], 'label': int32 [b]} with
    b = batch_size // process_count. `source[t]` is step t and `source[t:]` resumes there.

  Raises:
    ValueError: A batch size, process or seed that breaks the above.

  Example:
    >>> examples = Examples(np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32), 5)
    >>> source = train_source(examples, 2, seed=0)
    >>> epochs = np.concatenate([source[step]['label'] for step in range(5)])
    >>> sorted(epochs[:5].tolist()), sorted(epochs[5:].tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    >>> bool(np.all(source[3:][0]['label'] == source[3]['label']))
    True
  """
  share = _share(batch_size, process_index, process_count)
  count = len(examples)
  if batch_size > count:
    raise ValueError(f'batch_size {batch_size} exceeds the {count} examples: lower it')
  if seed < 0:
    raise ValueError(f'seed must be 0 or more, got {seed}')

  # One element is one whole batch: grain's cost an element is then paid once a step.
  def take(step: int) -> Batch:
    # Python's integers: a step may be near the largest that 64 bits hold.
    epoch, start = divmod(int(step) * batch_size + share.start, count)
    stop = start + share.stop - share.start
    indices = _permutation(seed, epoch, count)[start:stop]
    if stop > count:
      indices = np.concatenate([indices, _permutation(seed, epoch + 1, count)[: stop - count]])
    return {'image': examples.images[indices], 'label': examples.labels[indices]}

  return grain.MapDataset.range(sys.maxsize).map(take)


def eval_batches(
  examples: Examples, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
  """Returns every example exactly once, in order, in batches of one shape.

  The last batch is padded with zeros; every process yields ceil(N / batch_size) batches, some of
  which may be padding alone.

  Args:
    examples: The examples.
    batch_size: Examples a batch over all processes; a multiple of `process_count`.
    process_index: This process, 0..process_count - 1.
    process_count: The number of processes that share each batch.

  Returns:
    An iterator over {'image': uint8 [b, H, W, C], 'label': int32 [b], 'mask': float32 [b]} with
    b = batch_size // process_count; the mask is 1 for an example and 0 for padding.

  Raises:
    ValueError: A batch size or process that breaks the above.

  Example:
    >>> examples = Examples(np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32), 5)
    >>> [batch['mask'].tolist() for batch in eval_batches(examples, 3)]
    [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
  """
  # Checked here and not in a generator, which would raise at the first batch only.
  share = _share(batch_size, process_index, process_count)
  starts = range(share.start, share.start + len(examples), batch_size)
  return (_padded(examples, start, share.stop - share.start) for start in starts)


def _padded(examples: Examples, start: int, size: int) -> Batch:
  """Returns the `size` examples from `start` on, with zeros and a zero mask past the last."""
  images, labels = examples.images[start : start + size], examples.labels[start : start + size]
  missing = size - len(images)
  return {
    'image': np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)]),
    'label': np.pad(labels, (0, missing)),
    'mask': np.pad(np.ones(len(images), np.float32), (0, missing)),
  }


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
  """Returns the part of a global batch that is a process's own."""
  if process_count <= 0:
    raise ValueError(f'process_count must be positive, got {process_count}')
  if not 0 <= process_index < process_count:
    raise ValueError(f'process_index {process_index} must be in 0..{process_count - 1}')
  if batch_size <= 0 or batch_size % process_count:
    raise ValueError(
      f'batch_size must be a positive multiple of the {process_count} processes, got {batch_size}'
    )
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
  """Returns the order of an epoch's examples, int64 [count]."""
  bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
  # Sorting raw bits, because NumPy may change how it shuffles but not a bit generator's stream.
  return np.argsort(bits, kind='stable')

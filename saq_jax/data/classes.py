"""Some classes of a dataset, as ImageNet-100 is of ImageNet: which records are theirs."""

import contextlib
import dataclasses
import difflib
import os
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from rich.progress import track

from saq_jax.data.decode import RecordError
from saq_jax.data.records import read_record


@dataclasses.dataclass(frozen=True, eq=False)
class OfClasses(Sequence[dict[str, Any]]):
  """The records of some classes, with labels of their own.

  Attributes:
    records: all of a split.
    indices: of those that are taken, int64 [n].
    labels: of those, int32 [n].
  """

  records: Sequence[dict[str, Any]]
  indices: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      raise TypeError('one record at a time')
    record = self.records[int(self.indices[index])]
    return {**record, 'label': int(self.labels[index])}


def find_classes(
  builder: tfds.core.DatasetBuilder, split: str, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the records of some classes.

  Labels can be known from the whole records only, so all are read once and the labels kept in a
  file beside them, `labels.SPLIT.npy` (where that cannot be written, they are read each time).

  Args:
    builder: of a prepared dataset.
    split: in tfds's notation; it exists.
    classes: names of classes; a record's label is its class's place here.

  Returns:
    The indices of their records in the split, int64 [n], and their labels, int32 [n].

  Raises:
    ValueError: a class is unknown or named twice, there is no record of any, or one cannot be read.
  """
  known = {name: label for label, name in enumerate(builder.info.features['label'].names)}
  for name in classes:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1) or list(known)[:1]
      raise ValueError(
        f'dataset {builder.name!r} has no class {name!r}: its {len(known)} classes have names such'
        f' as {near[0]!r}'
      )
  if len(set(classes)) < len(classes):
    twice = next(name for name in classes if classes.count(name) > 1)
    raise ValueError(f'class {twice!r} is named twice: name each once')
  labels = _labels_of(builder, split)
  renumbered = np.full(len(known), -1, np.int32)
  renumbered[[known[name] for name in classes]] = np.arange(len(classes))
  (indices,) = np.nonzero(renumbered[labels] >= 0)
  if not len(indices):
    raise ValueError(f'split {split!r} of {builder.name!r} has no record of the named classes')
  return indices, renumbered[labels[indices]]


def _labels_of(builder: tfds.core.DatasetBuilder, split: str) -> np.ndarray:
  """The labels of a split's records, in their order."""
  infos = builder.info.splits
  parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
  return np.concatenate(
    [_all_labels(builder, part.splitname)[part.from_ : part.to] for part in parts]
  )


def _all_labels(builder: tfds.core.DatasetBuilder, name: str) -> np.ndarray:
  """The labels of a whole split, from the file beside it or from its records."""
  path = os.path.join(builder.data_dir, f'labels.{name}.npy')
  count = builder.info.splits[name].num_examples
  with contextlib.suppress(OSError, ValueError):
    labels = np.load(path, allow_pickle=False)
    if labels.shape == (count,) and labels.dtype == np.int32:
      return labels
  labels = _read_labels(builder, name, count)
  part = f'{path}.{uuid.uuid4().hex[:8]}'
  try:
    with open(part, 'wb') as file:
      np.save(file, labels)
    os.replace(part, path)
  except OSError as error:
    print(f'the labels are not kept ({error}): they are read anew the next time', file=sys.stderr)
  return labels


def _read_labels(builder: tfds.core.DatasetBuilder, name: str, count: int) -> np.ndarray:
  """The labels of a whole split, read from its records."""
  print(f'reading the labels of all {count:,} records of {builder.name} {name!r}, once', flush=True)
  features = builder.info.features
  skip = {key: tfds.decode.SkipDecoding() for key in features if _is_image(features[key])}
  records = builder.as_data_source(name, decoders=skip)
  labels = np.empty(count, np.int32)
  for index in track(range(count), description='labels', disable=not sys.stdout.isatty()):
    try:
      labels[index] = read_record(records, index)['label']
    except RecordError as error:
      raise ValueError(f'{builder.name} {name!r}, record {index} {error}') from error
  return labels


def _is_image(feature: Any) -> bool:
  return isinstance(feature, tfds.features.Image)

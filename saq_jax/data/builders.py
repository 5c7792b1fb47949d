"""Finding a prepared dataset and its splits, with one clear line for whatever is missing."""

import contextlib
import difflib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from saq_jax.data.catalog import prepare_command
from saq_jax.data.digits import Digits, prepare_digits
from saq_jax.data.folder import FOLDER, folder_builder


def open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """The builder of a dataset that is on disk and has images and classes.

  Args:
    name: tfds's name of the dataset, 'digits', which is prepared here, or 'folder:/path'.
    data_dir: tfds's data directory; None is tfds's default, `~/tensorflow_datasets` or
      `$TFDS_DATA_DIR`.

  Returns:
    A builder that is ready for `as_data_source`.

  Raises:
    ValueError: the dataset is unknown, not prepared or of another kind.
    PermissionError: the digits are not prepared and `data_dir` cannot be written.
  """
  data_dir = os.path.expanduser(data_dir) if data_dir else None
  if name == Digits.name:
    builder: tfds.core.DatasetBuilder = prepare_digits(data_dir)
  else:
    _check_data_dir(name, data_dir)
    builder = (
      folder_builder(name, data_dir)
      if name.startswith(FOLDER)
      else _prepared_builder(name, data_dir)
    )
  check_features(name, builder.info.features)
  return builder


def open_split(
  builder: tfds.core.DatasetBuilder,
  name: str,
  split: str,
  decoders: dict[str, tfds.decode.Decoder] | None,
) -> Sequence[Any]:
  """The records of a split, in their stored order.

  Args:
    builder: of a dataset that is on disk.
    name: of the dataset, for messages.
    split: in tfds's notation.
    decoders: of tfds, as for features that are to stay encoded.

  Returns:
    A random-access sequence of dictionaries.

  Raises:
    ValueError: the split is unknown or empty, or its files can be read with TensorFlow alone.
  """
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
      f'{builder.data_dir} holds {builder.info.file_format.value} files, which need TensorFlow: run'
      f' `{prepare_command(name, "ANOTHER_DIR")}`, which writes array_record'
    ) from error


def find_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Tfds's builder of a name, whether or not the dataset is on disk.

  Args:
    name: tfds's name of the dataset.
    data_dir: tfds's data directory, or None for its default.

  Returns:
    The builder.

  Raises:
    ValueError: tfds knows no such dataset, version or config.
  """
  try:
    # Where a dataset's code imports TensorFlow and it is missing, tfds prints a banner too.
    with contextlib.redirect_stdout(io.StringIO()):
      return tfds.builder(name, data_dir=data_dir)
  except (ValueError, AssertionError, ImportError) as error:
    reason = str(error).strip().split('\n')[0]
    known = [Digits.name, *tfds.list_builders(with_community_datasets=False)]
    near = [FOLDER + name] if os.path.isdir(name) else difflib.get_close_matches(name, known)
    raise ValueError(
      f"cannot load dataset {name!r} ({reason}): name one of tfds.list_builders() or 'folder:/path'"
      + (f', perhaps {near[0]!r}' if near and near[0] != name else '')
    ) from error


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  """Whether a dataset is on disk.

  Args:
    builder: of the dataset.

  Returns:
    True if it is there with its metadata.

  Raises:
    ValueError: its directory is there without its metadata (a copy cut short).
  """
  # tfds warns when asked is_prepared() of a directory that is not there.
  if not builder.data_path.exists():
    return False
  with errors_only():
    if not builder.is_prepared():
      raise ValueError(f'{builder.data_dir} is incomplete: delete it and prepare the dataset anew')
  return True


def _prepared_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Tfds's builder of a dataset that is on disk."""
  builder = find_builder(name, data_dir)
  if not is_prepared(builder):
    raise ValueError(
      f'dataset {name!r} is not prepared in {builder.data_dir}: run'
      f' `{prepare_command(name, data_dir)}`'
    )
  return builder


def _check_data_dir(name: str, data_dir: str | None) -> None:
  """Raises ValueError if a local directory was named that is not there."""
  if data_dir and '://' not in data_dir and not os.path.isdir(data_dir):
    raise ValueError(
      f'data_dir {data_dir!r} is not a directory: name the one in which {name!r} was prepared, or'
      f' run `{prepare_command(name, data_dir)}`'
    )


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
  """Keeps back tfds's warnings, such as the advice to install OpenCV.

  Yields:
    None; warnings are shown again after it.
  """
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def check_features(name: str, features: tfds.features.FeatureConnector) -> None:
  """Makes sure that a dataset has images and classes.

  Args:
    name: of the dataset, for messages.
    features: of the dataset.

  Raises:
    ValueError: there is no ClassLabel 'label' or no uint8 'image'.
  """
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

"""The digits dataset: scikit-learn's embedded scans as a tfds builder, prepared once on disk."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

_DESCRIPTION = """
1,797 scans of handwritten digits by 13 writers, 8x8 pixels: the test set of the UCI "Optical
recognition of handwritten digits", in the copy that scikit-learn carries, so nothing is downloaded.

Pixels: the source's grey v in 0..16 is stored as the uint8 (255 * v + 8) // 16, which is
round(v * 255 / 16); (16 * pixel + 127) // 255 gives v back exactly.

Splits: within each class, in the source's order, the third of every five scans is in 'test' (the
rank r, from 0, with r % 5 == 2), the others in 'train': 359 and 1,438. The source does not name the
writers, so the splits share them: a figure on 'test' says nothing of unseen writers.
"""

_CITATION = """
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title  = {Optical Recognition of Handwritten Digits},
  year   = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi    = {10.24432/C50P49}
}
"""


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """Builds the digits: features 'image' (uint8 8x8x1), 'label' (10 classes) and 'id' (text).

  The splits are fixed, stratified by class and free of any random generator: 1,438 scans in
  'train', 359 in 'test'. An 'id' is the scan's index in scikit-learn's order, as '0000' to '1796'.
  The class is kept out of tfds's register of names, so it never clashes with another 'digits'; once
  prepared, `tfds.builder('digits', data_dir=...)` finds it from its files all the same.

  Example:
    >>> Digits.name, str(Digits.VERSION)
    ('digits', '1.0.0')
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES: ClassVar[dict[str, str]] = {
    '1.0.0': '1,438 training and 359 test scans, stratified by class.'
  }

  def _info(self) -> tfds.core.DatasetInfo:
    """Returns the metadata, from here alone: the package carries no metadata files."""
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'id': tfds.features.Text(),
          'image': tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format='png'),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits',
      citation=_CITATION,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    """Returns the generator of each split."""
    del dl_manager  # Nothing is downloaded.
    grey, labels = load_digits(return_X_y=True)
    # The rank of each scan among those of its class, in the source's order.
    ranks = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
    grey = grey.reshape(-1, 8, 8).astype(np.int32)
    images = ((255 * grey + 8) // 16).astype(np.uint8)
    in_test = ranks % 5 == 2
    return {
      'train': self._generate_examples(images, labels, np.flatnonzero(~in_test)),
      'test': self._generate_examples(images, labels, np.flatnonzero(in_test)),
    }

  def _generate_examples(
    self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (id, example) of the scans at `indices`."""
    for index in indices:
      key = f'{index:04d}'
      # Without TensorFlow, tfds encodes a PIL image but no array.
      image = Image.fromarray(images[index])
      yield key, {'id': key, 'image': image, 'label': int(labels[index])}


def prepare_digits(data_dir: str | None = None) -> Digits:
  """Returns the digits' builder with its data on disk, preparing them where they are not yet.

  The data are written to a directory of their own, which is renamed into place when complete. So a
  preparation that was killed leaves nothing that is ever read, and of two processes that prepare at
  the same time one wins and both read its files.

  Args:
    data_dir: tfds's data directory; None is tfds's default, `~/tensorflow_datasets` or
      `$TFDS_DATA_DIR`.

  Returns:
    A builder that is ready for `as_data_source`.

  Raises:
    PermissionError: `data_dir` cannot be written and does not hold the digits.
    ValueError: the digits' directory is there but lacks its metadata (a copy cut short).

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as data_dir:
    ...   builder = prepare_digits(data_dir)
    >>> {name: split.num_examples for name, split in sorted(builder.info.splits.items())}
    {'test': 359, 'train': 1438}
  """
  builder = Digits(data_dir=data_dir, file_format='array_record')
  if not builder.data_path.exists():
    try:
      _prepare_quietly(builder)
    except OSError as error:
      if not builder.data_path.exists():  # Else another process was first.
        raise PermissionError(
          f'cannot write the digits to {builder.data_dir} ({error}): pass a writable data_dir or'
          ' set TFDS_DATA_DIR to one'
        ) from error
    # A fresh builder reads the metadata from disk, whichever process wrote them.
    builder = Digits(data_dir=data_dir, file_format='array_record')
  if not builder.is_prepared():
    raise ValueError(f'{builder.data_dir} is incomplete: delete it, and it is prepared anew')
  return builder


def _prepare_quietly(builder: Digits) -> None:
  """Writes the dataset without tfds's banner and progress bars, which show for a second only."""
  # tfds.disable_progress_bar() would hold for the user's own datasets too, and keep the banner.
  silence = io.StringIO()
  with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
    builder.download_and_prepare(file_format='array_record')

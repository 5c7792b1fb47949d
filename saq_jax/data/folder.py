"""A folder of images, one sub-folder a class, as a dataset: stored once as array_record by tfds."""

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from saq_jax.data.catalog import prepare_command
from saq_jax.data.folder_listing import (
  File,
  Listing,
  Note,
  Progress,
  check_images,
  has_changed,
  list_folder,
  some,
  text,
  without_damaged,
)

FOLDER = 'folder:'

_FACTS = 'folder.json'  # Lies beside the records and says what they were made from.
_SHARD_BYTES = 128 << 20  # A shard is in memory while it is written.


def prepare_folder(
  name: str, data_dir: str | None = None, *, skip_damaged: bool = False, note: Note = print
) -> tfds.core.DatasetBuilder:
  """Stores a folder's images in tfds's data directory, unless they are there as they are now.

  The folder is FOLDER/SPLIT/CLASS/image, with the splits 'train' and any of 'val' (or 'validation')
  and 'test', or FOLDER/CLASS/image, which is one split 'train'. The class folders of 'train', by
  name, are the labels 0, 1, ... of every split. Files are stored as they are, in an order that a
  hash of their paths gives: a slice such as 'train[90%:]' is a random part. Names that begin with a
  dot are passed over; links are followed. TensorFlow is not needed.

  A folder that has changed is stored anew, beside what was stored before. What is written gets its
  name when it is complete, so a preparation that was killed leaves nothing that is ever read.

  Args:
    name: 'folder:' and the folder's path.
    data_dir: tfds's data directory; None is tfds's default, `~/tensorflow_datasets` or
      `$TFDS_DATA_DIR`.
    skip_damaged: leave out images that cannot be opened, instead of refusing the folder.
    note: is told each thing worth knowing, a line.

  Returns:
    A builder that is ready for `as_data_source`.

  Raises:
    ValueError: the folder is not there, is laid out otherwise or has images that cannot be opened.
    OSError: the folder cannot be read or `data_dir` cannot be written.

  Example:
    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as scratch:
    ...   for path in 'train/cat', 'train/dog', 'val/cat':
    ...     Path(scratch, 'pets', path).mkdir(parents=True)
    ...     Image.new('RGB', (5, 4)).save(Path(scratch, 'pets', path, 'one.png'))
    ...   builder = prepare_folder(f'folder:{scratch}/pets', f'{scratch}/data', note=len)
    >>> {name: split.num_examples for name, split in builder.info.splits.items()}
    {'train': 2, 'validation': 1}
    >>> builder.info.features['label'].names
    ['cat', 'dog']
  """
  _changed_in_this_run.cache_clear()
  root, base = _root(name), _base(name, data_dir)
  if not os.path.isdir(root):
    raise ValueError(f'{root} is not a folder: name one that holds class folders of images')
  if Path(os.path.realpath(base)).is_relative_to(os.path.realpath(root)):
    raise ValueError(f'data_dir lies within {root}, whose images it is to hold: name another')
  # Before it is known what is stored: where another process is first, this one finds its version.
  version = f'{1 + max(_versions(base).values(), default=0)}.0.0'
  listing, stored = list_folder(root), _newest(base)
  if not stored or _facts(stored)['fingerprint'] != listing.fingerprint:
    _store(listing, base / version, skip_damaged, note)
    stored = _newest(base)
  else:
    note(f'{root} is prepared already')
  if stored and (left_out := _facts(stored)['left_out']):
    note(f'{len(left_out):,} damaged images are left out: {some(left_out)}')
  for path in sorted({*_versions(base), *base.glob('incomplete*')} - {stored}):
    note(f'{path} is of an earlier preparation: delete it when nothing uses it any more')
  return _open(name, data_dir, has_changed)


def folder_builder(name: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
  """Returns the builder of a folder that has been prepared and has not changed since.

  The folder itself may be gone, as where its data were brought to another machine. A process lists
  it once: of a change after that, another one tells.

  Args:
    name: 'folder:' and the folder's path.
    data_dir: as in `prepare_folder`.

  Returns:
    A builder that is ready for `as_data_source`.

  Raises:
    ValueError: the folder is not prepared, or has changed since.

  Example:
    >>> folder_builder('folder:/no/such/folder', '/no/data')
    Traceback (most recent call last):
      ...
    ValueError: folder '/no/such/folder' does not exist, and /no/data has no data of it
  """
  return _open(name, data_dir, _changed_in_this_run)


# As a run opens each of its splits; it does not outlive a change by much.
_changed_in_this_run = functools.cache(has_changed)


def _open(
  name: str, data_dir: str | None, changed: Callable[[str, str], bool]
) -> tfds.core.DatasetBuilder:
  """The builder of a prepared folder, which must not have changed."""
  root, base = _root(name), _base(name, data_dir)
  stored, there = _newest(base), os.path.isdir(root)
  if not stored and not there:
    raise ValueError(f'folder {root!r} does not exist, and {base.parent} has no data of it')
  command = prepare_command(name, data_dir)
  if not stored:
    raise ValueError(f'folder {root!r} is not prepared in {base.parent}: run `{command}`')
  if there and changed(root, _facts(stored)['fingerprint']):
    raise ValueError(f'folder {root!r} has changed since it was prepared: run `{command}`')
  return tfds.builder_from_directory(str(stored))


# Where things lie.


def _root(name: str) -> str:
  """The folder of a name, as an absolute path; it need not exist."""
  path = name.removeprefix(FOLDER)
  if path == name or not path:
    raise ValueError(f'{name!r} names no folder: write {FOLDER}/path/of/the/folder')
  return os.path.abspath(os.path.expanduser(path))


def _base(name: str, data_dir: str | None) -> Path:
  """Where a folder's data lie: a directory for each time that it was prepared."""
  root = _root(name)
  words = re.sub('[^a-z0-9]+', '_', os.path.basename(root).lower()).strip('_')
  digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:10]
  parent = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
  return parent / '_'.join(filter(None, ['folder', words, digest]))


def _versions(base: Path) -> dict[Path, int]:
  """The number of every version of a folder's data, also of one that was copied in part."""
  return {path: int(path.name[:-4]) for path in base.glob('*.0.0') if path.name[:-4].isdecimal()}


def _newest(base: Path) -> Path | None:
  """The newest whole version."""
  versions = _versions(base)
  whole = [path for path in versions if (path / 'dataset_info.json').exists()]
  return max(whole, key=lambda path: versions[path], default=None)


def _facts(stored: Path) -> dict[str, Any]:
  """What is known of stored data: their folder, its fingerprint, what was left out."""
  try:
    facts: dict[str, Any] = json.loads((stored / _FACTS).read_text(encoding='utf-8'))
    return facts
  except (OSError, ValueError) as error:
    raise ValueError(f'{stored} is incomplete ({error}): delete it and prepare it anew') from error


# Writing.


def _store(listing: Listing, target: Path, skip_damaged: bool, note: Note) -> None:
  """Writes a folder's images as a new version, the directory `target`."""
  check_images(listing)
  if listing.others:
    note(f'{len(listing.others):,} other files or folders are not read: {some(listing.others)}')
  whole = without_damaged(listing, skip_damaged, note)
  check_images(whole)
  target.parent.mkdir(parents=True, exist_ok=True)
  free, needed = shutil.disk_usage(target.parent).free, sum(file.size for file in whole.all_files)
  if free < needed:
    raise OSError(f'{target.parent} needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB free')
  note(f'Storing {len(whole.all_files):,} images ({needed / 1e6:,.1f} MB) in {target}')
  left_out = {file.path for file in listing.all_files} - {file.path for file in whole.all_files}
  facts = {
    'folder': text(listing.root),
    'fingerprint': listing.fingerprint,
    'left_out': [text(path) for path in sorted(left_out)],
  }
  builder = _new_builder(whole, target, json.dumps(facts, indent=2), note)
  try:
    builder.download_and_prepare(file_format='array_record')
  except OSError:
    if not target.exists():  # Else another process was first.
      raise


def _new_builder(
  listing: Listing, target: Path, facts: str, note: Note
) -> tfds.core.DatasetBuilder:
  """The tfds builder that writes a version of a folder's data."""
  labels = {label: i for i, label in enumerate(listing.classes['train'])}
  progress = Progress(f'of {len(listing.all_files):,} images stored', note)
  done = itertools.count()

  def examples(files: list[File]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
      progress.tell(next(done))
      image = Path(listing.root, file.path).read_bytes()
      name = text(file.path)
      # As tfds encodes them: of its versions, some do so and some do not.
      yield name, {'image': image, 'label': labels[file.label], 'file_name': name.encode()}

  # A GeneratorBasedBuilder shuffles by way of the disk from a gigabyte on, which needs TensorFlow;
  # here the order is known before anything is read. tfds.core itself lists the class only late.
  class Folder(tfds.core.dataset_builder.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    name = target.parent.name
    VERSION = tfds.core.Version(target.name)

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
        builder=self,
        description=f'The images of {text(listing.root)}, as they are.',
        features=tfds.features.FeaturesDict(
          {
            'image': tfds.features.Image(shape=(None, None, 3)),
            'label': tfds.features.ClassLabel(names=list(labels)),
            'file_name': tfds.features.Text(),
          }
        ),
        supervised_keys=('image', 'label'),
      )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, Any]:
      del dl_manager  # Nothing is downloaded.
      (self.data_path / _FACTS).write_text(facts)
      return {
        split: [functools.partial(examples, shard) for shard in _shards(split, files)]
        for split, files in listing.files.items()
      }

    def _log_download_bytes(self) -> None:
      """Keeps back tfds's banner, which would tell that nothing is downloaded."""

    def _log_download_done(self) -> None:
      """Likewise."""

  return Folder(data_dir=str(target.parent.parent), file_format='array_record')


def _shards(split: str, files: list[File]) -> list[list[File]]:
  """The files in the order in which they are stored, cut into parts of about one size."""
  order = sorted(files, key=lambda f: hashlib.sha256(os.fsencode(f'{split}/{f.path}')).digest())
  count = min(len(files), 1 + sum(file.size for file in files) // _SHARD_BYTES)
  ends = [len(files) * i // count for i in range(count + 1)]
  return [order[start:end] for start, end in itertools.pairwise(ends)]

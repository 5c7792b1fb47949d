"""The command that prepares a dataset: python -m saq_jax.data.prepare NAME."""

import argparse
import contextlib
import importlib.util
import io
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import tensorflow_datasets as tfds

from saq_jax.data.builders import check_features, errors_only, find_builder, is_prepared, open_split
from saq_jax.data.catalog import known, prepare_command, training_command
from saq_jax.data.datasets import load_records
from saq_jax.data.decode import RecordError, decode
from saq_jax.data.digits import Digits, prepare_digits
from saq_jax.data.folder import FOLDER, prepare_folder
from saq_jax.data.folder_listing import Progress, some
from saq_jax.data.resize import Resizing

_HELP = """\
Prepares a dataset once, as array_record files, which are read without TensorFlow, and checks them.

  digits          needs nothing
  folder:/path    images of your own, as /path/train/CLASS/image.jpg, with val/ and test/ beside
                  train/, or as /path/CLASS/image.jpg; needs nothing
  cifar10, ...    any dataset of tfds with images and classes; needs TensorFlow, for this command
                  alone: pip install 'saq_jax[prepare]'
  imagenet2012    likewise, and the two tar files of image-net.org in --manual_dir
"""
_CODES = 'Exit codes: 0 done; 1 a failed download, damaged data or a failing disk; 2 wrong input.'


class PreparationError(Exception):
  """A preparation that failed, or data that are not what they should be."""


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line."""

  def error(self, message: str) -> NoReturn:
    raise ValueError(f'{message}; see python -m saq_jax.data.prepare --help')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: the arguments after the program's name; those of the process by default.

  Returns:
    The exit code: 0, 1 or 2, as `--help` says.
  """
  try:
    args = _parser().parse_args(argv)
    data_dir = os.path.expanduser(args.data_dir) if args.data_dir else None
    builder = _prepare(args.name, data_dir, args.manual_dir, args.skip_damaged)
    _check(builder, args.name, data_dir)
    counts = {split: i.num_examples for split, i in builder.info.splits.items() if i.num_examples}
    if args.check_all:
      _check_all(builder, args.name, data_dir, counts)
    print(training_command(args.name, data_dir, builder.info.features['image'].shape, counts))
  except SystemExit:  # After --help.
    return 0
  except ValueError as error:
    return _fail(error, 2)
  except (PreparationError, OSError) as error:
    return _fail(error, 1)
  except KeyboardInterrupt:
    return _fail('stopped; what is half done is never read', 1)
  return 0


def _parser() -> _Parser:
  """The arguments."""
  parser = _Parser(
    'python -m saq_jax.data.prepare',
    description=_HELP,
    epilog=_CODES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('name', metavar='NAME', help='of the dataset')
  parser.add_argument('--data_dir', help='default: $TFDS_DATA_DIR or ~/tensorflow_datasets')
  parser.add_argument('--manual_dir', help='where files lie that you have fetched yourself')
  parser.add_argument(
    '--skip_damaged', action='store_true', help='leave out images of a folder that cannot be opened'
  )
  parser.add_argument(
    '--check_all', action='store_true', help='decode every image, not only the ends of each split'
  )
  return parser


def _note(line: str) -> None:
  """Prints a line at once, also into a file."""
  print(line, flush=True)


def _fail(error: BaseException | str, code: int) -> int:
  """Prints the message, and gives the exit code."""
  print(f'saq_jax: {error}', file=sys.stderr)
  return code


# Preparing.


def _prepare(
  name: str, data_dir: str | None, manual_dir: str | None, skip_damaged: bool
) -> tfds.core.DatasetBuilder:
  """Prepares any dataset, unless it is prepared already."""
  if skip_damaged and not name.startswith(FOLDER):
    raise ValueError(f'--skip_damaged is for {FOLDER}/path alone')
  if name.startswith(FOLDER):
    return prepare_folder(name, data_dir, skip_damaged=skip_damaged, note=_note)
  if name == Digits.name:
    if Digits(data_dir=data_dir).data_path.exists():
      _note(f'{name} is prepared already')
    return prepare_digits(data_dir)
  builder = find_builder(name, data_dir)
  check_features(name, builder.info.features)
  if is_prepared(builder):
    _note(f'{name} is prepared already')
    return builder
  _run_tfds(builder, name, _manual_dir(builder, name, manual_dir))
  # A fresh builder reads the metadata from disk, whichever process wrote them.
  return find_builder(name, data_dir)


def _manual_dir(builder: tfds.core.DatasetBuilder, name: str, given: str | None) -> Path:
  """Where files lie that were fetched by hand; ValueError if tfds could not start."""
  if not _has_tensorflow():
    raise ValueError(f"to prepare {name}, tfds needs TensorFlow: pip install 'saq_jax[prepare]'")
  manual = Path(given or builder.data_dir_root / 'downloads' / 'manual').expanduser()
  if given and not manual.is_dir():
    raise ValueError(f'--manual_dir {given} is not a directory')
  facts = known(name)
  if facts and (missing := [f for f in facts.manual_files if not (manual / f).is_file()]):
    raise ValueError(
      f'{name} needs {" and ".join(missing)} in {manual}: fetch them from {facts.manual_from}, and'
      ' name their directory with --manual_dir'
    )
  return manual


def _has_tensorflow() -> bool:
  """Whether TensorFlow is installed, without importing it."""
  return importlib.util.find_spec('tensorflow') is not None


def _run_tfds(builder: tfds.core.DatasetBuilder, name: str, manual: Path) -> None:
  """Has tfds download and write a dataset, in a directory that gets its name when complete."""
  sources = {url.rsplit('/', 1)[-1]: info.size for url, info in (builder.url_infos or {}).items()}
  _note(f'Preparing {name} in {builder.data_dir}')
  for file, size in sources.items():
    if (manual / file).is_file() and (manual / file).stat().st_size != size:
      _note(f'{manual / file} is not the published file, which has {size}')
  for left in builder.data_path.parent.glob('incomplete*'):
    _note(f'{left} is of an earlier preparation: delete it when nothing uses it any more')
  # Else TensorFlow tells of its build.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  logging.getLogger('urllib3').setLevel(logging.ERROR)  # It warns of each of ten attempts.
  config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
  try:
    with contextlib.redirect_stdout(io.StringIO()), errors_only(), _bars_as_lines():
      builder.download_and_prepare(download_config=config, file_format='array_record')
  except Exception as error:  # A dataset's own code runs, and it raises whatever it likes.
    if isinstance(error, OSError) and builder.data_path.exists():
      return  # Another process was first.
    again = ''
    if type(error).__module__.startswith('requests') or type(error).__name__ == 'DownloadError':
      fetch = f', or fetch {", ".join(sources)} into --manual_dir' if 0 < len(sources) < 5 else ''
      again = f'; run it again when the network is there{fetch}'
    raise PreparationError(f'cannot prepare {name} ({_reason(error)}){again}') from error


def _reason(error: BaseException) -> str:
  """An error in one line of moderate length."""
  words = ' '.join(str(error).split())
  return f'{type(error).__name__}: {words if len(words) < 400 else "... " + words[-400:]}'


class _Lines(io.TextIOBase):
  """Writes what a progress bar draws as a line now and then, for where there is no terminal."""

  def __init__(self, stream: TextIO, seconds: float = 10.0) -> None:
    self._stream, self._seconds, self._told, self._drawn = stream, seconds, time.monotonic(), False

  def write(self, text: str) -> int:
    # A bar begins with a carriage return; between bars the cursor goes up and down.
    drawn = '\r' in text or '\x1b[A' in text or (self._drawn and not text.strip())
    if not drawn:
      self._stream.write(text)
    elif '\r' in text and text.strip() and time.monotonic() - self._told > self._seconds:
      self._told = time.monotonic()
      self._stream.write(text.strip() + '\n')
    self._drawn = drawn
    return len(text)


@contextlib.contextmanager
def _bars_as_lines() -> Iterator[None]:
  """Turns tfds's progress bars into lines where they would not be drawn on a terminal."""
  if sys.stderr.isatty():
    yield
  else:
    with contextlib.redirect_stderr(_Lines(sys.stderr)):
      yield


# Checking.


def _check(builder: tfds.core.DatasetBuilder, name: str, data_dir: str | None) -> None:
  """Holds what lies on disk against what is known of the dataset, and prints it as a table."""
  facts = known(name)
  expected = dict(facts.counts) if facts else {}
  found = {split: info.num_examples for split, info in sorted(builder.info.splits.items())}
  mend = f'delete {builder.data_dir} and run `{prepare_command(name, data_dir)}` again'
  wrong = [
    f'{split} has {found.get(split, 0):,} examples and should have {count:,}'
    for split, count in expected.items()
    if found.get(split) != count
  ]
  if wrong:
    files = (
      f', with {" and ".join(facts.manual_files)} whole' if facts and facts.manual_files else ''
    )
    raise PreparationError(f'{name} is not complete: {"; ".join(wrong)}: {mend}{files}')
  print(f'{"split":<12} {"examples":>10}')
  for split, count in found.items():
    if count:
      _check_split(builder, name, split, count, mend)
    print(f'{split:<12} {count:>10,}' + ('  as published' if split in expected else ''))
  classes = builder.info.features['label'].num_classes
  print(f'{classes:,} classes, {builder.info.dataset_size}, in {builder.data_dir}')


def _check_split(
  builder: tfds.core.DatasetBuilder, name: str, split: str, count: int, mend: str
) -> None:
  """Counts the records of the files themselves, and decodes the first and the last image."""
  decoders = {
    key: tfds.decode.SkipDecoding()
    for key, feature in builder.info.features.items()
    if isinstance(feature, tfds.features.Image)
  }
  records = open_split(builder, name, split, decoders)
  try:
    # The length of `records` comes from the metadata.
    count_in = tfds.core.file_adapters.ArrayRecordFileAdapter.num_examples
    stored = sum(count_in(path) for path in builder.info.splits[split].filepaths)
    ends = [records[0], records[len(records) - 1]]
  except Exception as error:  # The reader raises errors of several kinds.
    raise PreparationError(f'{name}: {split} cannot be read ({_reason(error)}): {mend}') from error
  if stored != count or len(records) != count:
    raise PreparationError(f'{name}: {split} has {stored:,} records of {count:,}: {mend}')
  for record in ends:
    try:
      decode(record['image'], builder.info.features['image'].shape[-1])
    except RecordError as error:
      words = f'{name}: an image of {split} cannot be decoded ({_reason(error)})'
      if not name.startswith(FOLDER):
        raise PreparationError(f'{words}: {mend}') from error
      # The user's own file, which preparing anew would store again.
      path = record['file_name'].decode()
      _note(f'{words}: {path}; training ends at it, unless config.data.skip_damaged is set')


def _check_all(
  builder: tfds.core.DatasetBuilder, name: str, data_dir: str | None, counts: dict[str, int]
) -> None:
  """Decodes every image."""
  damaged, total = list[str](), sum(counts.values())
  for split, count in counts.items():
    progress = Progress(f'of {count:,} images of {split} decoded', _note)
    records = load_records(name, split, data_dir, Resizing(1, 1))
    damaged += [f'{split} {record}' for record in records.find_damaged(progress.tell)]
  if not damaged:
    return _note(f'all {total:,} images can be decoded')
  mend = f'delete {builder.data_dir} and run `{prepare_command(name, data_dir)}` again'
  if name.startswith(FOLDER):
    mend = 'mend or delete them and prepare it again, or set config.data.skip_damaged'
  raise PreparationError(
    f'{name}: {len(damaged):,} of {total:,} images are damaged: {some(damaged)}: {mend}'
  )


if __name__ == '__main__':
  sys.exit(main())

"""Tests of preparing and reading datasets, on real files and in real processes."""

import doctest
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from saq_jax.data import datasets as datasets_lib
from saq_jax.data import digits as digits_lib
from saq_jax.data.datasets import Examples, load_examples
from saq_jax.data.digits import Digits, prepare_digits

_ROOT = Path(__file__).resolve().parents[1]

# Reports that it is ready, prepares in each directory it is told, and prints what it read there.
_PREPARE = """
import hashlib, sys
from saq_jax.data.datasets import load_examples
print('ready', flush=True)
for line in sys.stdin:
  images = load_examples('digits', 'train', line.strip()).images
  print(hashlib.sha256(images.tobytes()).hexdigest(), flush=True)
"""

# Stops for good in the middle of a split.
_STALL = """
import sys, time
from saq_jax.data import digits
generate = digits.Digits._generate_examples
def stall(self, images, labels, indices):
  for i, example in enumerate(generate(self, images, labels, indices)):
    if i == 700:
      sys.__stdout__.write('half\\\\n')
      sys.__stdout__.flush()
      time.sleep(600)
    yield example
digits.Digits._generate_examples = stall
digits.prepare_digits(sys.argv[1])
""".replace('\\\\', '\\')


def _python(code: str, *args: str) -> subprocess.Popen[str]:
  pipe = subprocess.PIPE
  return subprocess.Popen(
    [sys.executable, '-c', code, *args], cwd=_ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
  )


# The builder.


def test_splits_are_every_fifth_scan_of_each_class(digits_dir: str) -> None:
  grey, labels = load_digits(return_X_y=True)
  in_class = [np.flatnonzero(labels == c) for c in range(10)]
  test_ids = np.sort(np.concatenate([ids[2::5] for ids in in_class]))
  train_ids = np.setdiff1d(np.arange(1797), test_ids)
  for split, ids in (('train', train_ids), ('test', test_ids)):
    records = list(prepare_digits(digits_dir).as_data_source(split))
    assert sorted(int(record['id']) for record in records) == ids.tolist()
    for record in records:
      index = int(record['id'])
      grey_back = (16 * record['image'].astype(int) + 127) // 255
      assert record['label'] == labels[index]
      np.testing.assert_array_equal(grey_back.ravel(), grey[index])
      # Half a level is rounded up, as floor(x + 1/2).
      expected = np.floor(grey[index] * 255 / 16 + 0.5)
      np.testing.assert_array_equal(record['image'].ravel(), expected)


def test_counts_are_the_documented_ones(digits_dir: str) -> None:
  train, test = (load_examples('digits', split, digits_dir) for split in ('train', 'test'))
  assert (train.images.shape, test.images.shape) == ((1438, 8, 8, 1), (359, 8, 8, 1))
  assert np.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
  assert (train.images.min(), train.images.max(), train.num_classes) == (0, 255, 10)


def test_stored_order_is_the_recorded_one(digits_dir: str) -> None:
  # Recorded with tfds 4.9.10: a slice such as 'train[:80%]' must stay the same examples.
  records = prepare_digits(digits_dir).as_data_source('train')
  assert [records[i]['id'] for i in range(4)] == [b'1680', b'1456', b'0052', b'0630']


def test_prepared_digits_are_found_by_name(digits_dir: str) -> None:
  assert tfds.builder('digits', data_dir=digits_dir).info.splits['test'].num_examples == 359


def test_two_processes_prepare_at_once(tmp_path: Path, digits_dir: str) -> None:
  images = load_examples('digits', 'train', digits_dir).images
  expected = hashlib.sha256(images.tobytes()).hexdigest()
  processes = [_python(_PREPARE) for _ in range(2)]
  try:
    for process in processes:
      assert process.stdout is not None
      assert process.stdout.readline() == 'ready\n'
    for attempt in range(4):  # The imports are done, so that each round starts together.
      for process in processes:
        assert process.stdin is not None
        process.stdin.write(f'{tmp_path / str(attempt)}\n')
        process.stdin.flush()
      for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == f'{expected}\n'
  finally:
    # Nothing of tfds's banner, bars and warnings is shown.
    assert [process.communicate() for process in processes] == [('', ''), ('', '')]
  assert not list(tmp_path.rglob('incomplete*'))


def test_loser_of_the_race_reads_the_winners_files(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  split_generators = Digits._split_generators

  def overtaken(self: Digits, dl_manager: object) -> object:
    monkeypatch.setattr(Digits, '_split_generators', split_generators)
    prepare_digits(str(tmp_path))  # The winner, while this one is half way.
    return split_generators(self, dl_manager)

  monkeypatch.setattr(Digits, '_split_generators', overtaken)
  assert prepare_digits(str(tmp_path)).info.splits['train'].num_examples == 1438


def test_killed_preparation_is_made_good(tmp_path: Path) -> None:
  process = _python(_STALL, str(tmp_path))
  assert process.stdout is not None
  assert process.stdout.readline() == 'half\n'
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert list(tmp_path.rglob('incomplete*'))
  assert len(load_examples('digits', 'train', str(tmp_path))) == 1438


def test_directory_cut_short_is_named(tmp_path: Path) -> None:
  (tmp_path / 'digits' / '1.0.0').mkdir(parents=True)
  with pytest.raises(ValueError, match=r'digits/1\.0\.0 is incomplete: delete it'):
    prepare_digits(str(tmp_path))


# Reading a dataset.


def test_split_slices(digits_dir: str) -> None:
  whole = load_examples('digits', 'train', digits_dir)
  first, rest = (load_examples('digits', s, digits_dir) for s in ('train[:80%]', 'train[80%:]'))
  assert (len(first), len(rest)) == (1150, 288)
  np.testing.assert_array_equal(np.concatenate([first.images, rest.images]), whole.images)
  assert len(load_examples('digits', 'train+test', digits_dir)) == 1797


def _prepare_fake(
  dataset: str, features: dict[str, object], data_dir: Path, version: str = '1.0.0'
) -> None:
  """Prepares four examples under a dataset's name and version."""
  with tfds.core.registered.skip_registration():

    class Fake(tfds.core.GeneratorBasedBuilder):
      name = dataset
      VERSION = tfds.core.Version(version)

      def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _split_generators(self, dl_manager: object) -> dict[str, object]:
        return {'train': self._generate_examples()}

      def _generate_examples(self):
        for i in range(4):
          pixels = np.full((32, 32, 3), 10 * i, np.uint8)
          values = {'id': str(i), 'image': Image.fromarray(pixels), 'label': i, 'text': 'words'}
          yield i, {key: values[key] for key in features}

  Fake(data_dir=data_dir).download_and_prepare(file_format='array_record')


_CIFAR = {
  'id': tfds.features.Text(),
  'image': tfds.features.Image(shape=(32, 32, 3)),
  'label': tfds.features.ClassLabel(num_classes=10),
}


def test_reads_another_prepared_dataset(tmp_path: Path) -> None:
  # The real builder then reads these files as its own.
  _prepare_fake('cifar10', _CIFAR, tmp_path, str(tfds.builder_cls('cifar10').VERSION))
  examples = load_examples('cifar10', 'train', str(tmp_path))
  assert (examples.images.shape, examples.num_classes) == ((4, 32, 32, 3), 10)
  np.testing.assert_array_equal(examples.images[:, 5, 6, 1], 10 * examples.labels)
  assert sorted(examples.labels.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
  ('features', 'message'),
  [
    ({'text': tfds.features.Text()}, r"features \['text'\]: it needs an 'image' and a 'label'"),
    ({**_CIFAR, 'image': tfds.features.Image(shape=(None, None, 3))}, 'one fixed shape'),
    ({**_CIFAR, 'label': tfds.features.Scalar(np.int64)}, 'only a ClassLabel'),
  ],
)
def test_dataset_of_another_kind(tmp_path: Path, features: dict[str, object], message: str) -> None:
  _prepare_fake('another_kind', features, tmp_path)
  with pytest.raises(ValueError, match=message):
    load_examples('another_kind', 'train', str(tmp_path))


@pytest.mark.parametrize(
  ('name', 'split', 'message'),
  [
    ('digits', 'val', r"no split 'val': name one of \['test', 'train'\]"),
    ('digits', 'train[:200%]', r'a slice within one'),
    ('digits', 'all[:2]', r'a slice within one'),
    ('digits', 'train[:0]', r'is empty'),
    ('cifar10', 'train', r'not prepared in .*`python -m saq_jax.data.prepare cifar10 --data_dir'),
    ('cifar1', 'train', r"perhaps 'cifar10'"),
    ('digit', 'train', r"perhaps 'digits'"),
    ('cifar10:9.9.9', 'train', r'only: 3\.0\.2'),
    ('', 'train', r"cannot load dataset ''"),
  ],
)
def test_wrong_names_raise_one_clear_line(
  digits_dir: str, name: str, split: str, message: str
) -> None:
  with pytest.raises(ValueError, match=message) as error:
    load_examples(name, split, digits_dir)
  assert '\n' not in str(error.value)


def test_unwritable_data_dir(tmp_path: Path) -> None:
  (tmp_path / 'file').touch()  # Not even root can write below a file.
  with pytest.raises(PermissionError, match='pass a writable data_dir or set TFDS_DATA_DIR'):
    load_examples('digits', 'train', str(tmp_path / 'file'))


@pytest.mark.parametrize(
  ('images', 'labels', 'message'),
  [
    (np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.int32), r'uint8 \[N, H, W, C\]'),
    (np.zeros((2, 8, 8, 1)), np.zeros(2, np.int32), r'got float64'),
    (np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, np.int32), r'N >= 1'),
    (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(3, np.int32), r'int32 \[2\]'),
    (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int64), r'int32 \[2\]'),
    (np.zeros((1, 8, 8, 1), np.uint8), np.full(1, 10, np.int32), r'0\.\.9, got 10\.\.10'),
  ],
)
def test_examples_are_checked(images: np.ndarray, labels: np.ndarray, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    Examples(images, labels, 10)


def test_doctests() -> None:
  for module in (digits_lib, datasets_lib):
    assert doctest.testmod(module).failed == 0

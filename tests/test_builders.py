"""Tfds's own builders read prepared files of all five datasets; what is missing is one line."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from local_datasets import SMALL_IMAGES, features_of, prepare, small_pixels

from saq_jax.data.builders import open_builder, open_split
from saq_jax.data.catalog import known, splits_of
from saq_jax.data.datasets import load_examples, load_records
from saq_jax.data.resize import Resizing

ROOT = Path(__file__).parent.parent
COUNTS = {
  'imagenet2012': {'train': 104, 'validation': 5},
  'cifar10': {'train': 20, 'test': 7},
  'cifar100': {'train': 20, 'test': 7},
  'oxford_flowers102': {'train': 8, 'validation': 6, 'test': 5},
  'oxford_iiit_pet': {'train': 20, 'test': 7},
}
PHOTOS = sorted(set(COUNTS) - set(SMALL_IMAGES))


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  for name, counts in COUNTS.items():
    prepare(name, folder, **counts)
  return str(folder)


@pytest.mark.parametrize('name', COUNTS)
def test_the_real_builder_reads_a_dataset(data_dir, tmp_path, name):
  builder = open_builder(name, data_dir)
  # No stand-in that only knows the files: the class that would prepare the dataset.
  assert type(builder) is tfds.builder_cls(name)
  features = tfds.builder(name, data_dir=str(tmp_path)).info.features
  assert repr(builder.info.features) == repr(features)
  assert builder.info.features['label'].names == features_of(name)['label'].names
  assert builder.info.features['label'].num_classes == known(name).num_classes
  assert {s: info.num_examples for s, info in builder.info.splits.items()} == COUNTS[name]
  record = builder.as_data_source('train')[0]
  assert set(record) == set(features)


@pytest.mark.parametrize('name', COUNTS)
def test_the_catalogs_splits_open(data_dir, name):
  builder, splits = open_builder(name, data_dir), splits_of(name)
  sizes = [
    len(open_split(builder, name, split, decoders=None))
    for split in (splits.train, splits.test, splits.tuning_train, splits.tuning_test)
  ]
  want = {
    'imagenet2012': [104, 5, 103, 1],
    'oxford_flowers102': [14, 5, 8, 6],
  }
  assert sizes == want.get(name, [20, 7, 18, 2])
  # No example to choose settings by is trained on then.
  keys = [
    {r['id' if name in SMALL_IMAGES else 'file_name'] for r in builder.as_data_source(split)}
    for split in (splits.tuning_train, splits.tuning_test, splits.test)
  ]
  assert len(set.union(*keys)) == sum(map(len, keys)) == sum(sizes[1:])


@pytest.mark.parametrize('name', SMALL_IMAGES)
def test_pixels_are_those_that_were_written(data_dir, name):
  for split in ('train', 'test'):
    examples = load_examples(name, split, data_dir)
    assert examples.num_classes == known(name).num_classes
    ids = [record['id'] for record in open_builder(name, data_dir).as_data_source(split)]
    indices = [int(i.decode().removeprefix(f'{split}_')) for i in ids]
    assert sorted(indices) == list(range(COUNTS[name][split]))
    np.testing.assert_array_equal(examples.images, [small_pixels(split, i) for i in indices])
    assert examples.labels.tolist() == [i % 4 for i in indices]


@pytest.mark.parametrize('name', PHOTOS)
def test_photographs_give_batches(data_dir, name):
  records = load_records(name, 'train', data_dir, Resizing(size=12, resize=14))
  assert (len(records), records.num_classes) == (COUNTS[name]['train'], known(name).num_classes)
  for batch in (records.eval_batch(np.arange(8)), records.train_batch(np.arange(8), 0, range(8))):
    assert batch['image'].shape == (8, 12, 12, 3)
    # A photograph's colour says its class (local_datasets.jpeg).
    colours = 40 + np.outer(batch['label'], (37, 91, 53)) % 180
    assert np.abs(batch['image'].mean((1, 2)) - colours).max() < 25


def test_records_travel_to_other_processes(data_dir):
  records = load_records('oxford_iiit_pet', 'train', data_dir, Resizing(size=12, resize=14))
  there = pickle.loads(pickle.dumps(records))
  np.testing.assert_array_equal(
    there.eval_batch(np.arange(3))['image'], records.eval_batch(np.arange(3))['image']
  )


# The data directory.


@pytest.mark.parametrize('variable', ['TFDS_DATA_DIR', 'HOME'])
def test_without_a_data_dir_it_is_tfdss_own(data_dir, tmp_path, variable):
  where = data_dir
  if variable == 'HOME':
    where = str(tmp_path)
    (tmp_path / 'tensorflow_datasets').symlink_to(data_dir)
  code = 'from saq_jax.data.datasets import load_examples as f; print(len(f("cifar10", "train")))'
  environ = {k: v for k, v in os.environ.items() if k != 'TFDS_DATA_DIR'} | {variable: where}
  done = subprocess.run(
    [sys.executable, '-c', code], env=environ, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert (done.stdout, done.stderr) == ('20\n', '')


def test_a_tilde_is_the_home_directory(data_dir, monkeypatch):
  monkeypatch.setenv('HOME', os.path.dirname(data_dir))
  builder = open_builder('cifar10', f'~/{os.path.basename(data_dir)}')
  assert str(builder.data_dir).startswith(data_dir)


# What is missing is said in one line.


def refusal(name, data_dir, split=None):
  with pytest.raises(ValueError) as caught:  # noqa: PT012, either line may refuse
    builder = open_builder(name, data_dir)
    open_split(builder, name, split, None)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_a_data_dir_that_is_not_there(tmp_path):
  for name in ('cifar10', 'folder:/photos', 'no_such_dataset'):
    message = refusal(name, str(tmp_path / 'none'))
    assert 'none' in message
    assert 'is not a directory' in message
    assert f'`python -m saq_jax.data.prepare {name} --data_dir={tmp_path}/none`' in message


def test_a_dataset_that_is_not_prepared(tmp_path):
  message = refusal('cifar10:3.0.2', str(tmp_path))
  assert f'not prepared in {tmp_path}/cifar10/3.0.2' in message
  assert f'run `python -m saq_jax.data.prepare cifar10:3.0.2 --data_dir={tmp_path}`' in message


def test_a_name_that_is_not_known(tmp_path):
  assert "perhaps 'oxford_iiit_pet'" in refusal('oxford_iit_pet', str(tmp_path))
  assert f"perhaps 'folder:{tmp_path}'" in refusal(str(tmp_path), str(tmp_path))


def test_splits_that_are_not_there(data_dir):
  message = refusal('imagenet2012', data_dir, 'test')
  assert "no split 'test': name one of ['train', 'validation']" in message
  assert 'is empty: widen its slice' in refusal('imagenet2012', data_dir, 'validation[:1%]')


def test_a_copy_cut_short(tmp_path):
  (tmp_path / 'cifar10' / '3.0.2').mkdir(parents=True)
  assert '3.0.2 is incomplete: delete it' in refusal('cifar10', str(tmp_path))


def test_files_of_another_format(data_dir, tmp_path):
  (tmp_path / 'cifar10' / '3.0.2').mkdir(parents=True)
  for file in ('dataset_info.json', 'features.json'):
    words = Path(data_dir, 'cifar10', '3.0.2', file).read_text(encoding='utf-8')
    (tmp_path / 'cifar10' / '3.0.2' / file).write_text(words.replace('array_record', 'tfrecord'))
  message = refusal('cifar10', str(tmp_path), 'train')
  assert 'holds tfrecord files, which need TensorFlow: run `python -m saq_jax.data.pre' in message

"""Some classes of a dataset: their records alone, with labels of their own."""

import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from local_datasets import prepare

from saq_jax.data.catalog import IMAGENET_100
from saq_jax.data.classes import find_classes
from saq_jax.data.datasets import load_examples, load_records
from saq_jax.data.resize import Resizing
from saq_jax.data.source import eval_source

SMALL = Resizing(8, 10)
# Classes 0 to 3 of ImageNet.
FIRST = ('n01440764', 'n01443537', 'n01484850', 'n01491361')


@pytest.fixture
def data_dir(tmp_path):
  prepare('imagenet2012', tmp_path, train=21, validation=10)
  return str(tmp_path)


def stored_labels(data_dir, split):
  builder = tfds.builder('imagenet2012', data_dir=data_dir)
  skip = {'image': tfds.decode.SkipDecoding()}
  return np.array([r['label'] for r in builder.as_data_source(split, decoders=skip)])


@pytest.mark.parametrize(
  'split', ['train', 'train[:60%]', 'train[5:]', 'train[3:9]+validation[:4]', 'validation']
)
def test_records_of_the_classes_are_found_and_numbered_in_the_order_of_the_names(data_dir, split):
  builder = tfds.builder('imagenet2012', data_dir=data_dir)
  indices, labels = find_classes(builder, split, (FIRST[3], FIRST[1]))
  stored = stored_labels(data_dir, split)
  np.testing.assert_array_equal(indices, np.nonzero((stored == 1) | (stored == 3))[0])
  np.testing.assert_array_equal(labels, np.where(stored[indices] == 3, 0, 1))


def test_they_are_trained_and_evaluated_on_alone(data_dir):
  whole = load_records('imagenet2012', 'train', data_dir, SMALL)
  some = load_records('imagenet2012', 'train', data_dir, SMALL, classes=(FIRST[2], FIRST[0]))
  assert (len(some), some.num_classes) == (11, 2)
  batch, everything = eval_source(some, 11)[0], eval_source(whole, 21)[0]
  kept = np.isin(everything['label'], (0, 2))
  np.testing.assert_array_equal(batch['image'], everything['image'][kept])
  np.testing.assert_array_equal(batch['label'], everything['label'][kept] == 0)


def test_small_datasets_in_memory_too(tmp_path):
  prepare('cifar10', tmp_path, train=16)
  some = load_examples('cifar10', 'train', str(tmp_path), ('bird', 'airplane'))
  whole = load_examples('cifar10', 'train', str(tmp_path))
  kept = np.isin(whole.labels, (0, 2))
  np.testing.assert_array_equal(some.images, whole.images[kept])
  np.testing.assert_array_equal(some.labels, whole.labels[kept] == 0)
  assert some.num_classes == 2


def test_labels_are_read_once_and_kept_beside_the_records(data_dir, capsys):
  builder = tfds.builder('imagenet2012', data_dir=data_dir)
  first = find_classes(builder, 'train', FIRST[:1])
  assert "the labels of all 21 records of imagenet2012 'train', once" in capsys.readouterr().out
  again = find_classes(builder, 'train[:100%]', FIRST[:1])
  assert not capsys.readouterr().out
  np.testing.assert_array_equal(first, again)
  path = os.path.join(builder.data_dir, 'labels.train.npy')
  np.testing.assert_array_equal(np.load(path), stored_labels(data_dir, 'train'))
  # A damaged or foreign file is not believed.
  np.save(path, np.zeros(3, np.int32))
  np.testing.assert_array_equal(find_classes(builder, 'train', FIRST[:1]), first)
  with open(path, 'wb') as file:
    file.write(b'no array')
  np.testing.assert_array_equal(find_classes(builder, 'train', FIRST[:1]), first)


def test_a_directory_that_cannot_be_written_is_no_hindrance(data_dir, monkeypatch, capsys):
  def refuse(*_):
    raise PermissionError('read-only')

  monkeypatch.setattr(os, 'replace', refuse)
  builder = tfds.builder('imagenet2012', data_dir=data_dir)
  indices, _ = find_classes(builder, 'train', FIRST)
  assert len(indices) == 21
  assert 'read anew the next time' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('classes', 'words'),
  [
    (('n01440765',), r"no class 'n01440765': its 1000 classes have names such as 'n01440764'"),
    (FIRST[:1] * 2, "class 'n01440764' is named twice"),
    (IMAGENET_100[:1], 'no record of the named classes'),
  ],
)
def test_classes_that_cannot_be_taken_are_named(data_dir, classes, words):
  with pytest.raises(ValueError, match=words):
    load_records('imagenet2012', 'train', data_dir, SMALL, classes=classes)

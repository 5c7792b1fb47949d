"""The facts of known datasets are tfds's own."""

import pytest
import tensorflow_datasets as tfds

from saq_jax.data.catalog import IMAGENET_100, Splits, known, splits_of
from saq_jax.data.digits import Digits

NAMES = ('imagenet2012', 'cifar10', 'cifar100', 'oxford_flowers102', 'oxford_iiit_pet')


@pytest.mark.parametrize('name', NAMES)
def test_classes_and_splits_are_those_of_the_builder(tmp_path, name):
  builder = tfds.builder(name, data_dir=str(tmp_path))
  facts = known(f'{name}:{builder.version}')
  assert facts is known(name)
  assert builder.info.features['label'].num_classes == facts.num_classes
  instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS or ''
  assert bool(facts.manual_files) == bool(instructions)
  assert all(file in instructions for file in facts.manual_files)


def test_the_digits_are_those_of_this_package(digits_dir):
  facts, builder = known('digits'), Digits(data_dir=digits_dir)
  assert builder.info.features['label'].num_classes == facts.num_classes
  assert {s: i.num_examples for s, i in builder.info.splits.items()} == facts.counts


@pytest.mark.parametrize(
  ('name', 'sizes'),
  [
    ('cifar10', (50_000, 10_000, 45_000, 5_000)),
    ('oxford_flowers102', (2_040, 6_149, 1_020, 1_020)),
    ('imagenet2012', (1_281_167, 50_000, 1_268_355, 12_812)),
  ],
)
def test_splits_have_the_sizes_of_the_literature(name, sizes):
  facts, splits = known(name), splits_of(name)
  infos = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=[count],
      num_bytes=0,
      filename_template=tfds.core.ShardedFileTemplate(
        data_dir='/data', dataset_name=name, split=split, filetype_suffix='array_record'
      ),
    )
    for split, count in facts.counts.items()
  ]
  table = tfds.core.SplitDict(infos)
  names = (splits.train, splits.test, splits.tuning_train, splits.tuning_test)
  assert tuple(table[split].num_examples for split in names) == sizes


@pytest.mark.parametrize('name', ['folder:/data/cifar10', 'mnist', 'cifar10_1', ''])
def test_other_names_have_the_usual_splits(name):
  assert known(name) is None
  assert splits_of(name) == Splits('train', 'test', 'train[:90%]', 'train[90%:]')


def test_imagenet_100_is_of_imagenet(tmp_path):
  names = tfds.builder('imagenet2012', data_dir=str(tmp_path)).info.features['label'].names
  assert len(set(IMAGENET_100)) == len(IMAGENET_100) == 100
  assert set(IMAGENET_100) <= set(names)
  assert (IMAGENET_100[0], IMAGENET_100[-1]) == ('n02869837', 'n02090622')

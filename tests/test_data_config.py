"""Settings of the data: the splits that a name stands for."""

import pytest

from saq_jax.training.data_config import DataConfig


@pytest.mark.parametrize(
  ('settings', 'splits'),
  [
    ({}, ('train', 'test')),
    ({'tuning': True}, ('train[:80%]', 'train[80%:]')),
    ({'name': 'imagenet2012'}, ('train', 'validation')),
    ({'name': 'imagenet2012:5.1.0', 'tuning': True}, ('train[:99%]', 'train[99%:]')),
    ({'name': 'cifar100', 'tuning': True}, ('train[:90%]', 'train[90%:]')),
    ({'name': 'oxford_flowers102'}, ('train+validation', 'test')),
    ({'name': 'oxford_flowers102', 'tuning': True}, ('train', 'validation')),
    ({'name': 'folder:/pictures'}, ('train', 'test')),
    ({'name': 'cifar10', 'train_split': 'train[:1%]'}, ('train[:1%]', 'test')),
    ({'name': 'cifar10', 'eval_split': 'train[:1%]'}, ('train', 'train[:1%]')),
  ],
)
def test_splits_are_those_of_the_literature_unless_they_are_named(settings, splits):
  assert DataConfig(**settings).splits == splits

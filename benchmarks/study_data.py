"""The study's examples: the digits, and a hard part of them with few and noisy labels."""

import dataclasses

import numpy as np

from saq_jax.data.datasets import Examples, load_examples

DATA = ('digits', 'hard')
SPLITS = {'train': 'train[:80%]', 'validation': 'train[80%:]', 'test': 'test'}
PER_CLASS = 20  # examples of 'hard'
WRONG = 4  # of them, with another class's label
_SEED = 2111


@dataclasses.dataclass(frozen=True)
class Splits:
  """What is trained on, what settings are chosen on, and what the final figures are of.

  Attributes:
    train: the training examples.
    validation: with right labels.
    test: with right labels.
  """

  train: Examples
  validation: Examples
  test: Examples


def load(name: str, data_dir: str | None = None) -> Splits:
  """Reads one of `DATA`.

  Both have the same validation and test examples. 'hard' trains on 20 examples a class of those
  that 'digits' trains on, and of each class 4 labels, 20 %, are replaced by that of another class
  drawn at random. The examples and the wrong labels are the same in every run.

  Args:
    name: 'digits' or 'hard'.
    data_dir: of tfds.

  Returns:
    The splits.
  """
  splits = {key: load_examples('digits', split, data_dir) for key, split in SPLITS.items()}
  if name == 'hard':
    splits['train'] = few_and_noisy(splits['train'])
  return Splits(**splits)


def few_and_noisy(examples: Examples, seed: int = _SEED) -> Examples:
  """Takes `PER_CLASS` examples of each class, and gives `WRONG` of these another class's label.

  Args:
    examples: to draw from.
    seed: of the draws.

  Returns:
    The examples, class after class, the wrong ones of a class first.
  """
  classes = examples.num_classes
  # Raw bits: NumPy keeps their stream fixed across versions, but not how it draws from it.
  bits = np.random.Philox(np.random.SeedSequence(seed))
  indices, labels = [], []
  for label in range(classes):
    here = np.flatnonzero(examples.labels == label)
    chosen = here[np.argsort(bits.random_raw(len(here)), kind='stable')[:PER_CLASS]]
    shift = 1 + (bits.random_raw(WRONG) % (classes - 1)).astype(np.int64)
    indices.append(chosen)
    labels.append(np.r_[(label + shift) % classes, np.full(PER_CLASS - WRONG, label)])
  where = np.concatenate(indices)
  return Examples(examples.images[where], np.concatenate(labels).astype(np.int32), classes)

"""What is known of a dataset by its name: classes, counts, and the splits that the literature uses.

Only facts and no files: nothing here is read from disk, and nothing beyond Python is imported.
"""

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Splits:
  """The splits of a dataset, in tfds's notation. The defaults serve a dataset that is not known.

  Attributes:
    train: to train on for the final figures.
    test: of the final figures.
    tuning_train: to train on while settings are chosen.
    tuning_test: to choose settings by; it shares no example with `test`.
  """

  train: str = 'train'
  test: str = 'test'
  tuning_train: str = 'train[:90%]'
  tuning_test: str = 'train[90%:]'


@dataclasses.dataclass(frozen=True)
class KnownDataset:
  """A dataset whose facts are published.

  Attributes:
    num_classes: the number of classes.
    counts: examples of each split that has labels.
    splits: as the literature uses them.
    manual_files: what must be fetched by hand before tfds can prepare it.
    manual_from: where from.
  """

  num_classes: int
  counts: Mapping[str, int]
  splits: Splits = Splits()
  manual_files: tuple[str, ...] = ()
  manual_from: str = ''


_KNOWN = {
  # Papers report the validation images, as the labels of the test images were never published;
  # so settings are chosen on a hundredth of the training images.
  'imagenet2012': KnownDataset(
    num_classes=1000,
    counts={'train': 1_281_167, 'validation': 50_000},
    splits=Splits('train', 'validation', 'train[:99%]', 'train[99%:]'),
    manual_files=('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'),
    manual_from='https://image-net.org/download-images, after registering there',
  ),
  # 45,000 and 5,000 to choose settings, as in the ResNet paper (arXiv 1512.03385, section 4.2).
  'cifar10': KnownDataset(10, {'train': 50_000, 'test': 10_000}),
  'cifar100': KnownDataset(100, {'train': 50_000, 'test': 10_000}),
  # BiT (arXiv 1912.11370) and ViT (arXiv 2010.11929) train on the 2,040 images of both splits.
  'oxford_flowers102': KnownDataset(
    num_classes=102,
    counts={'train': 1_020, 'validation': 1_020, 'test': 6_149},
    splits=Splits('train+validation', 'test', 'train', 'validation'),
  ),
  'oxford_iiit_pet': KnownDataset(37, {'train': 3_680, 'test': 3_669}),
  # A fifth: a tenth of 1,438 scans would tell little.
  'digits': KnownDataset(
    num_classes=10,
    counts={'train': 1_438, 'test': 359},
    splits=Splits('train', 'test', 'train[:80%]', 'train[80%:]'),
  ),
}

# An experiment for each dataset and its batch, in configs/; the others borrow one for images like
# theirs.
_CONFIGS = {
  'digits': ('digits_4bit', 64),
  'cifar10': ('preresnet20_4bit_cifar10', 128),
  'cifar100': ('preresnet20_4bit_cifar100', 128),
  'imagenet2012': ('resnet18_4bit', 512),
  'oxford_flowers102': ('vitb16_4bit_flowers102', 128),
  'oxford_iiit_pet': ('vitb16_4bit_pets', 128),
}
_FOR_SMALL_IMAGES, _FOR_PHOTOS = _CONFIGS['cifar10'], _CONFIGS['oxford_flowers102']

# The 100 classes of ImageNet-100 and their order, published with Contrastive Multiview Coding
# (arXiv 1906.05849), as the file imagenet100.txt of github HobbitLong/CMC has them.
_IMAGENET_100 = """
  n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245
  n01773797 n01735189 n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148
  n03530642 n04435653 n02086910 n02859443 n13040303 n03594734 n02085620 n02099849 n01558993
  n04493381 n02109047 n04111531 n02877765 n04429376 n02009229 n01978455 n02106550 n01820546
  n01692333 n07714571 n02974003 n02114855 n03785016 n03764736 n03775546 n02087046 n07836838
  n04099969 n04592741 n03891251 n02701002 n03379051 n02259212 n07715103 n03947888 n04026417
  n02326432 n03637318 n01980166 n02113799 n02086240 n03903868 n02483362 n04127249 n02089973
  n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322 n02113978 n03787032
  n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029 n03837869
  n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045
  n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672
  n02090622
"""
IMAGENET_100 = tuple(_IMAGENET_100.split())


def known(name: str) -> KnownDataset | None:
  """The facts of a dataset.

  Args:
    name: tfds's name, with or without a version or a config.

  Returns:
    The facts, or None where the dataset is not among those known here.

  Example:
    >>> known('cifar10:3.0.2').counts['train']
    50000
    >>> known('mnist') is None
    True
  """
  return _KNOWN.get(re.split('[:/]', name, maxsplit=1)[0])


def splits_of(name: str) -> Splits:
  """The splits to train and to evaluate on.

  Args:
    name: tfds's name of any dataset, or a folder's, 'folder:/path'.

  Returns:
    Those of the literature where the dataset is known. Else the splits 'train' and 'test', and to
    choose settings the last tenth of the training examples.

  Example:
    >>> splits_of('imagenet2012').test, splits_of('mnist').test
    ('validation', 'test')
  """
  facts = known(name)
  return facts.splits if facts else Splits()


def prepare_command(name: str, data_dir: str | None) -> str:
  """The command that prepares a dataset, for messages that tell what to do.

  Args:
    name: of the dataset.
    data_dir: where to; None is tfds's default.

  Returns:
    A line for the shell.

  Example:
    >>> prepare_command('folder:/my photos', '/data')
    "python -m saq_jax.data.prepare 'folder:/my photos' --data_dir=/data"
  """
  where = f' --data_dir={shlex.quote(data_dir)}' if data_dir else ''
  return f'python -m saq_jax.data.prepare {shlex.quote(name)}{where}'


def training_command(
  name: str, data_dir: str | None, shape: Sequence[int | None], counts: Mapping[str, int]
) -> str:
  """How to train on a dataset that has been prepared.

  Args:
    name: of the dataset.
    data_dir: where it is; None is tfds's default.
    shape: of its images, with None for sizes that differ.
    counts: examples of each split.

  Returns:
    Two lines: what to do, and the command for the shell.

  Example:
    >>> training_command('mnist', None, (28, 28, 1), {'train': 100, 'test': 50}).split()[-3:]
    ['--config.data.batch_size=64', '--config.data.mean=0.5', '--config.data.std=0.5']
  """
  plain = re.split('[:/]', name, maxsplit=1)[0]
  own, photos = _CONFIGS.get(plain), None in shape
  config, batch_size = own or (_FOR_PHOTOS if photos else _FOR_SMALL_IMAGES)
  flags = {'data.data_dir': data_dir} if data_dir else {}
  if name.startswith('folder:'):
    path = os.path.abspath(os.path.expanduser(name.removeprefix('folder:')))
    flags['data.name'] = f'folder:{path}'
  elif not own or name != plain:
    flags['data.name'] = name
  splits, count = _usable_splits(name, counts)
  flags |= splits
  if 0 < count < batch_size:
    flags['data.batch_size'] = str(1 << (count.bit_length() - 1))
  if shape[-1] != 3 and not own:
    flags |= {'data.mean': '0.5', 'data.std': '0.5'}
    # The weights that the configs for photographs start from are of three channels.
    flags |= {'init_from': 'None'} if photos else {}
  words = [f'--config.{key}={shlex.quote(value)}' for key, value in flags.items()]
  command = ' '.join(['python -m saq_jax.main', f'--config configs/{config}.py', *words])
  there = ', '.join(split for split, number in counts.items() if number)
  which = '' if count else f', with splits for TRAIN and EVAL, of {there} or slices of them'
  return f'Train on it{which}:\n  {command}'


def _usable_splits(name: str, counts: Mapping[str, int]) -> tuple[dict[str, str], int]:
  """The flags for splits that there are, and how many examples are trained on; 0: who knows."""
  usual, there = splits_of(name), {split for split, count in counts.items() if count}
  train = usual.train.split('+')
  if not set(train) <= there:
    return {'data.train_split': 'TRAIN', 'data.eval_split': 'EVAL'}, 0
  count = sum(counts[split] for split in train)
  if usual.test in there:
    return {}, count
  if 'validation' in there:
    return {'data.eval_split': 'validation'}, count
  share = 90 if count >= 10 else 50  # A tenth of fewer is none.
  slices = {'data.train_split': f'train[:{share}%]', 'data.eval_split': f'train[{share}%:]'}
  return slices, count * share // 100

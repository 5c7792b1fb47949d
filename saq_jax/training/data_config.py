"""The settings of the data: which examples, how they are read, and how they are augmented."""

import dataclasses
from typing import Literal

from saq_jax.data.catalog import splits_of
from saq_jax.training.bounds import ABOVE_0, ConfigError, within


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which examples, and how they come to the model.

  Attributes:
    name: 'digits', a tfds dataset, or 'folder:PATH' of class sub-folders; prepared once by
      `python -m saq_jax.data.prepare NAME` (the digits by themselves).
    data_dir: the tfds data dir; None is tfds's own (~/tensorflow_datasets).
    train_split: a tfds split, slices as in 'train[:80%]' too. None: as the literature has it
      (saq_jax/data/catalog.py).
    eval_split: the split of the final figures. None: likewise.
    tuning: to choose settings by: hold a part of the literature's training split out, train on the
      rest and evaluate on it, never on the test split.
    classes: names of the classes to take, in the order of their new labels; () is all.
      recipes.IMAGENET_100 is the usual choice of 100.
    batch_size: the global batch.
    eval_batch_size: the global batch of an evaluation; the last one is padded and masked.
    mean: of the channels, of pixels in 0 to 1.
    std: of the channels.
    image_size: side of the square that images are brought to: a random part of the image to train
      (`augment.crop_scale`), the centre to evaluate (`resize`). None: as they are stored.
    resize: the shorter side of an image before its centre is cut out to evaluate.
    interpolation: 'bilinear' or 'bicubic', pixel for pixel as in torchvision and timm, or 'fast':
      bilinear without a wider filter where images shrink, as TensorFlow's pipelines train, at
      1.7 times the speed; it evaluates as 'bilinear'.
    skip_damaged: where an image cannot be decoded, train on the next one and evaluate without it,
      and count it in the metrics; else it ends the run.
    workers: processes that decode images; 0 is threads of the main process. None chooses by the
      number of cores. The batches are the same for any; a stopped run may go on with another.
    timeout: seconds without a batch after which the run ends with an error.
  """

  name: str = 'digits'
  data_dir: str | None = None
  train_split: str | None = None
  eval_split: str | None = None
  tuning: bool = False
  classes: tuple[str, ...] = ()
  batch_size: int = within(64, 1)
  eval_batch_size: int = within(256, 1)
  mean: tuple[float, ...] = (0.305,)
  std: tuple[float, ...] = within((0.376,), ABOVE_0)
  image_size: int | None = within(None, 1)
  resize: int = within(256, 1)
  interpolation: Literal['bilinear', 'bicubic', 'fast'] = 'bilinear'
  skip_damaged: bool = False
  workers: int | None = within(None, 0, 512)
  timeout: float = within(600.0, 1)

  @property
  def splits(self) -> tuple[str, str]:
    """The splits that are trained on and evaluated on, in tfds's notation."""
    known = splits_of(self.name)
    train, test = known.train, known.test
    if self.tuning:
      train, test = known.tuning_train, known.tuning_test
    return self.train_split or train, self.eval_split or test


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  """How training images are varied. DeiT's recipe is `recipes.deit_augmentation`.

  Attributes:
    crop_scale: with `data.image_size`, least and largest share of the area that a random part
      takes.
    pad_crop: pixels of zero padding before a random crop of the old size; 0 is none.
    flip: random horizontal flips.
    rand_augment: magnitude of RandAugment, 0 to 10, on images that `data.image_size` brings to one
      size; None is none.
    rand_augment_std: deviation of the magnitude.
    erasing: probability that a box of an image is replaced by noise.
    mixup: alpha of mixup; 0 is none. With cutmix too, a coin chooses for each batch.
    cutmix: alpha of cutmix; 0 is none.
    repeats: how often an example is taken in a row, each time augmented anew.
  """

  crop_scale: tuple[float, ...] = within((0.08, 1.0), ABOVE_0, 1)
  pad_crop: int = within(1, 0, 64)
  flip: bool = False
  rand_augment: float | None = within(None, 0, 10)
  rand_augment_std: float = within(0.5, 0)
  erasing: float = within(0.0, 0, 1)
  mixup: float = within(0.0, 0)
  cutmix: float = within(0.0, 0)
  repeats: int = within(1, 1)


def check_data(data: DataConfig, augment: AugmentConfig) -> None:
  """Raises ConfigError for values that do not go together.

  Args:
    data: which examples.
    augment: how they are varied.

  Raises:
    ConfigError: if so; the message names the setting.

  Example:
    >>> check_data(DataConfig(image_size=224), AugmentConfig(rand_augment=9.0))
    >>> check_data(DataConfig(tuning=True, eval_split='test'), AugmentConfig())
    Traceback (most recent call last):
      ...
    saq_jax.training.bounds.ConfigError: config.data.tuning: it chooses both splits; leave ...
  """
  if len(data.mean) != len(data.std):
    raise ConfigError('config.data.mean and config.data.std must be as long as each other.')
  scale = augment.crop_scale
  if len(scale) != 2 or scale[0] > scale[1]:
    raise ConfigError(
      f'config.augment.crop_scale={scale}: must be the least and the largest share, such as '
      '(0.08, 1.0).'
    )
  if data.image_size is not None and data.image_size > data.resize:
    raise ConfigError(
      f'config.data.image_size={data.image_size}: must be at most config.data.resize={data.resize},'
      ' the shorter side that its centre is cut from.'
    )
  if augment.rand_augment is not None and data.image_size is None:
    raise ConfigError(
      f'config.augment.rand_augment={augment.rand_augment}: set config.data.image_size.'
    )
  if (augment.mixup or augment.cutmix) and data.batch_size % 2:
    raise ConfigError(
      f'config.data.batch_size={data.batch_size}: must be even, for augment.mixup and cutmix mix '
      'pairs.'
    )
  if data.tuning and (data.train_split or data.eval_split):
    raise ConfigError(
      'config.data.tuning: it chooses both splits; leave train_split and eval_split None.'
    )

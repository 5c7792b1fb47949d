"""The examples that the settings name, opened or read, and whether batches of them fit."""

import math

from jax.sharding import Mesh

from saq_jax.data.datasets import Dataset, load_examples, load_records
from saq_jax.data.randaugment import RandAugment
from saq_jax.data.resize import Resizing
from saq_jax.training.bounds import ConfigError
from saq_jax.training.config import ExperimentConfig
from saq_jax.training.sharding import make_mesh, require_divisible


def load_splits(config: ExperimentConfig) -> tuple[Dataset, Dataset]:
  """Reads the examples that the settings name.

  Args:
    config: the experiment.

  Returns:
    The training and the test examples.

  Raises:
    ConfigError: if they cannot be read, or the channels' means do not fit them.
  """
  data = config.data
  try:
    train, test = (load_split(config, split) for split in data.splits)
  except (ValueError, OSError) as error:
    raise ConfigError(f'config.data: {error}') from error
  channels = train.image_shape[-1]
  if len(data.mean) not in (1, channels):
    raise ConfigError(
      f'config.data.mean has {len(data.mean)} entries, and {data.name!r} has {channels} channels.'
    )
  return train, test


def load_split(config: ExperimentConfig, split: str) -> Dataset:
  """Reads a split into memory, or opens it where images are brought to one size.

  Args:
    config: the experiment.
    split: in tfds's notation.

  Returns:
    The examples.

  Raises:
    ValueError, OSError: if they cannot be read.
  """
  data, augment = config.data, config.augment
  if data.image_size is None:
    return load_examples(data.name, split, data.data_dir, data.classes)
  low, high = augment.crop_scale
  return load_records(
    data.name,
    split,
    data.data_dir,
    Resizing(data.image_size, data.resize, (low, high), data.interpolation),
    classes=data.classes,
    rand_augment=_rand_augment(config),
    flip=augment.flip and flips_on_host(config),
    skip_damaged=data.skip_damaged,
  )


def flips_on_host(config: ExperimentConfig) -> bool:
  """Whether flips are the host's, because RandAugment, which follows them, is.

  Args:
    config: the experiment.

  Returns:
    True for the host, false for the device, where flips cost the least.
  """
  return config.augment.rand_augment is not None


def require_fitting_batches(config: ExperimentConfig, train: Dataset, mesh: Mesh) -> None:
  """Raises ConfigError if a batch is larger than the data, or cannot be split over devices.

  Args:
    config: the experiment.
    train: the training examples.
    mesh: the devices.

  Raises:
    ConfigError: if so.
  """
  require_enough(config, train)
  data = config.data
  try:
    require_divisible(data.batch_size, mesh, 'config.data.batch_size', parts_of_batch(config))
    require_divisible(data.eval_batch_size, mesh, 'config.data.eval_batch_size')
    share, group = data.batch_size // mesh.size, config.saq.group_size
    if group and share % (group * config.quant_stage.accumulate):
      raise ValueError(
        f"config.saq.group_size={group}: must divide a device's share of the batch, {share}"
        + (', after quant_stage.accumulate' if config.quant_stage.accumulate > 1 else '')
        + '.'
      )
  except ValueError as error:
    raise ConfigError(str(error)) from None


def parts_of_batch(config: ExperimentConfig) -> int:
  """What every stage's batch must be a multiple of for its `accumulate`.

  Args:
    config: the experiment.

  Returns:
    The least common multiple of both.
  """
  return math.lcm(config.float_stage.accumulate, config.quant_stage.accumulate)


def mesh_of(config: ExperimentConfig) -> Mesh:
  """The devices, laid out as the settings say.

  Args:
    config: the experiment.

  Returns:
    The mesh.

  Raises:
    ConfigError: if they cannot be laid out so.
  """
  try:
    return make_mesh(config.mesh.fsdp)
  except ValueError as error:
    raise ConfigError(f'config.mesh.fsdp={config.mesh.fsdp}: {error}') from error


def require_enough(config: ExperimentConfig, train: Dataset) -> None:
  """Raises ConfigError if there are fewer examples than a global batch takes.

  Args:
    config: the experiment.
    train: the training examples.

  Raises:
    ConfigError: if so.
  """
  data = config.data
  if data.batch_size > len(train):
    raise ConfigError(
      f'config.data.batch_size={data.batch_size} is larger than the {len(train)} examples of '
      f'{data.splits[0]!r}: make it smaller.'
    )


def _rand_augment(config: ExperimentConfig) -> RandAugment | None:
  """RandAugment as the settings have it; what it moves in is of the channels' means."""
  data, augment = config.data, config.augment
  if augment.rand_augment is None:
    return None
  return RandAugment(
    magnitude=augment.rand_augment,
    std=augment.rand_augment_std,
    fill=tuple(min(255, round(255 * mean)) for mean in data.mean),
    resample='bicubic' if data.interpolation == 'bicubic' else 'bilinear',
  )

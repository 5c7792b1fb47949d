"""A work directory opened again: its settings, its examples, and the networks that it trained."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from saq_jax._paths import PyTree
from saq_jax.data.datasets import Dataset
from saq_jax.data.decode import RecordError
from saq_jax.data.source import eval_source
from saq_jax.training.bounds import ConfigError
from saq_jax.training.checkpoint import find_checkpoint, restore_subtrees
from saq_jax.training.config import ExperimentConfig
from saq_jax.training.inputs import load_splits
from saq_jax.training.loop import Stage
from saq_jax.training.metrics import FILE_NAME, read_metrics
from saq_jax.training.parsing import parse
from saq_jax.training.stages import make_stage
from saq_jax.training.workdir import MARK, PIN, WorkdirError

STAGES = ('float', 'qat', 'saq')
# What a stage writes into its metrics where it follows the codes of its weights.
CHANGED, OSCILLATING = 'codes_changed', 'codes_oscillating'


@dataclasses.dataclass(frozen=True)
class Trained:
  """A stage of a run, with what it trained.

  Attributes:
    stage: its settings and its network, which computes in float32 whatever it was trained in.
    params: of its newest checkpoint, latent weights.
    batch_stats: likewise.
    step: of that checkpoint.
    test_accuracy: of the run's own report; None where it has not written one.
    codes: the steps, and the fractions of codes that changed and that oscillate; None where the
      run did not follow them.
  """

  stage: Stage
  params: PyTree
  batch_stats: PyTree
  step: int
  test_accuracy: float | None
  codes: dict[str, list[float]] | None

  @property
  def quantized(self) -> bool:
    """Whether any of its weights has a code."""
    chosen = self.stage.network.quantize.assign(self.params['model'])
    return any(quantizer.bits is not None for quantizer in chosen.values())


def read_settings(workdir: Path, data_dir: str | None = None) -> ExperimentConfig:
  """Reads the settings that a work directory is marked with.

  Args:
    workdir: of a run of `saq_jax.main`.
    data_dir: where its datasets lie now; None for where they lay.

  Returns:
    The experiment, the model's settings being those that given weights asked for.

  Raises:
    WorkdirError: if it is not there, or is not one of this package.
    ConfigError: if it is of settings that this version does not have.
  """
  mark, pin = workdir / MARK, workdir / PIN
  if not workdir.is_dir():
    raise WorkdirError(f'{workdir}: there is no such directory; --workdir is that of a run.')
  try:
    settings = json.loads(mark.read_text(encoding='utf-8'))['config']
    asked = json.loads(pin.read_text(encoding='utf-8'))['model'] if pin.exists() else {}
    config = parse(config_dict.ConfigDict(settings))
  except ConfigError as error:
    raise ConfigError(f'{mark}: {error}') from None
  except FileNotFoundError:
    raise WorkdirError(
      f'{workdir} is no run of this package (it has no {MARK}): name the --workdir that '
      'saq_jax.main was given.'
    ) from None
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise WorkdirError(f'{mark} cannot be read ({type(error).__name__}): {error}') from None
  model = dataclasses.replace(config.model, **asked, dtype='float32')
  data = config.data if data_dir is None else dataclasses.replace(config.data, data_dir=data_dir)
  return dataclasses.replace(config, model=model, data=data)


def find_stages(workdir: Path, asked: Sequence[str] = ()) -> list[str]:
  """Tells which stages of a run have a checkpoint.

  Args:
    workdir: of the run.
    asked: names of stages; none for all that are there.

  Returns:
    The names, in the order of training.

  Raises:
    WorkdirError: if none has one, or one that was asked for is unknown or has none.
  """
  there = [name for name in STAGES if _checkpoint(workdir, name) is not None]
  words = f'{workdir} has checkpoints of: {", ".join(there) or "no stage"}'
  for name in asked:
    if name not in STAGES:
      raise WorkdirError(f'--stages: {name!r} is not a stage; {words}.')
    if name not in there:
      raise WorkdirError(f'--stages: there is no checkpoint of {name!r}. {words}.')
  if not there:
    raise WorkdirError(
      f'{words}. Train first: python -m saq_jax.main --workdir {workdir} (a comparison over seeds '
      'keeps none).'
    )
  return [name for name in there if name in (asked or there)]


def open_stage(config: ExperimentConfig, workdir: Path, name: str, train: Dataset) -> Trained:
  """Restores what a stage trained, from its newest checkpoint.

  Args:
    config: the experiment, of `read_settings`.
    workdir: of the run.
    name: of a stage that has a checkpoint.
    train: the training examples.

  Returns:
    The stage with its parameters.

  Raises:
    DamagedCheckpointError, ValueError: if the checkpoint cannot be read.
  """
  path = find_checkpoint(workdir / name)
  params, batch_stats = restore_subtrees(path, 'params', 'batch_stats')
  params, batch_stats = jax.tree.map(jnp.asarray, (params, batch_stats))
  return Trained(
    make_stage(config, name, train),
    {'model': params['model'], 'scales': params.get('scales', {})},
    batch_stats or {},
    int(path.name),
    _test_accuracy(workdir, name),
    _codes(workdir / name),
  )


def first_batches(
  config: ExperimentConfig, count: int, batch_size: int
) -> tuple[Dataset, list[dict[str, Any]]]:
  """Reads the first training examples as they are evaluated: whole, and not augmented.

  Args:
    config: the experiment.
    count: of examples; all where there are fewer.
    batch_size: of each batch; the last is padded, and its mask says so.

  Returns:
    The training split, and its first batches: 'image' uint8 [B, H, W, C], 'label' int32 [B] and
    'mask' float32 [B], on the device.

  Raises:
    ConfigError: if the examples cannot be read.
    RecordError: if an image cannot be decoded, or none where damaged ones are left out.
  """
  train, _ = load_splits(config)
  count = min(count, len(train))
  size = min(batch_size, count)
  source = eval_source(train, size)
  batches = []
  for k in range(-(-count // size)):
    batch = source[k]
    mask = batch['mask'] * (k * size + np.arange(size) < count)
    batches.append({'image': batch['image'], 'label': batch['label'], 'mask': mask})
  if not any(batch['mask'].any() for batch in batches):
    raise RecordError(f'none of the first {count} images can be decoded')
  return train, jax.device_put(batches)


def _checkpoint(workdir: Path, name: str) -> Any:
  """The newest checkpoint of a stage; None if there is none."""
  try:
    return find_checkpoint(workdir / name)
  except ValueError:
    return None


def _test_accuracy(workdir: Path, name: str) -> float | None:
  """What the report of the run says of a stage, if it has one."""
  try:
    results = json.loads((workdir / 'results.json').read_text(encoding='utf-8'))['results']
    return next(float(result['accuracy']) for result in results if result['name'] == name)
  except (OSError, ValueError, KeyError, TypeError, StopIteration):
    return None


def _codes(directory: Path) -> dict[str, list[float]] | None:
  """How many codes changed and oscillated over the steps, if that was noted."""
  rows = read_metrics(directory) if (directory / FILE_NAME).exists() else []
  rows = [row for row in rows if CHANGED in row and OSCILLATING in row]
  if not rows:
    return None
  return {
    'step': [row['step'] for row in rows],
    'changed': [float(row[CHANGED]) for row in rows],
    'oscillating': [float(row[OSCILLATING]) for row in rows],
  }

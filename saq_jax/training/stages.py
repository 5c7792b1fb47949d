"""The stages of an experiment, made from its settings and run in order."""

import dataclasses
import functools
from pathlib import Path

import optax
from jax import Array
from jax.sharding import Mesh

from saq_jax._paths import PyTree
from saq_jax.data.source import Examples, load_examples
from saq_jax.training.build import (
  FLOATING,
  build_network,
  build_optimizer,
  build_slot,
  total_steps,
)
from saq_jax.training.checkpoint import restore_subtrees
from saq_jax.training.config import ConfigError, ExperimentConfig
from saq_jax.training.evaluate import Score
from saq_jax.training.loop import Stage, run_stage
from saq_jax.training.sharding import make_mesh, require_divisible
from saq_jax.training.signals import Stop
from saq_jax.training.state import TrainState, new_state, state_from_weights
from saq_jax.training.step import StepConfig, prepare_images

Weights = tuple[PyTree, PyTree, dict[str, Array]] | None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A finished stage.

  Attributes:
    stage: what was trained.
    state: its final state.
    score: on the test split.
    directory: where its checkpoints and metrics are.
    image_shape: of one image, [H, W, C].
  """

  stage: Stage
  state: TrainState
  score: Score
  directory: Path
  image_shape: tuple[int, ...]


def train_all(config: ExperimentConfig, workdir: Path, stop: Stop) -> list[Outcome]:
  """Trains every stage of an experiment, going on where an earlier run of it ended.

  Args:
    config: the experiment.
    workdir: its directory; each stage has a folder of its name in it.
    stop: asks to save and leave.

  Returns:
    The finished stages: the float one, unless the weights were given, then `config.methods`.

  Raises:
    ConfigError: if the batch does not fit the data or the devices, or the given weights the model.
    PreemptedError, DivergedError: as `run_stage`.
  """
  train, test = load_splits(config)
  mesh = make_mesh()
  require_fitting_batches(config, train, mesh)
  outcomes: list[Outcome] = []
  weights = _given_weights(config)
  for name in config.methods if weights else ('float', *config.methods):
    stage = make_stage(config, name, train)
    begin = functools.partial(_begin, stage, config)
    directory = workdir / name
    state, score = run_stage(stage, begin, weights, train, test, mesh, directory, stop)
    outcomes.append(Outcome(stage, state, score, directory, train.images.shape[1:]))
    if name == 'float':
      weights = state.params['model'], state.batch_stats, state.params['scales']
  return outcomes


def load_splits(config: ExperimentConfig) -> tuple[Examples, Examples]:
  """The training and the test examples."""
  data = config.data
  try:
    train, test = (
      load_examples(data.name, split, data.data_dir)
      for split in (data.train_split, data.eval_split)
    )
  except (ValueError, OSError) as error:
    raise ConfigError(f'config.data: {error}') from error
  channels = train.images.shape[-1]
  if len(data.mean) not in (1, channels):
    raise ConfigError(
      f'config.data.mean has {len(data.mean)} entries, and {data.name!r} has {channels} channels.'
    )
  return train, test


def require_fitting_batches(config: ExperimentConfig, train: Examples, mesh: Mesh) -> None:
  """Raises ConfigError if a batch is larger than the data, or cannot be split over devices."""
  data = config.data
  if data.batch_size > len(train):
    raise ConfigError(
      f'config.data.batch_size={data.batch_size} is larger than the {len(train)} examples of '
      f'{data.train_split!r}: make it smaller.'
    )
  try:
    require_divisible(data.batch_size, mesh, 'config.data.batch_size')
    require_divisible(data.eval_batch_size, mesh, 'config.data.eval_batch_size')
  except ValueError as error:
    raise ConfigError(str(error)) from None


def make_stage(config: ExperimentConfig, name: str, train: Examples) -> Stage:
  """Makes a stage of the settings.

  Args:
    config: the experiment.
    name: 'float', 'qat' or 'saq'.
    train: the training examples, for the length of an epoch and the classes.

  Returns:
    The stage.
  """
  settings = config.float_stage if name == 'float' else config.quant_stage
  quant = FLOATING if name == 'float' else config.quant
  network = build_network(config.model, quant, train.num_classes)
  steps_per_epoch = len(train) / config.data.batch_size
  slot = build_slot(network, config.saq if name == 'saq' else None, steps_per_epoch)
  optimizer, lr = build_optimizer(settings, steps_per_epoch)
  return Stage(
    name=name,
    network=network,
    tx=optax.chain(slot, optimizer),
    lr=lr,
    step=StepConfig.of(config.data, settings.label_smoothing, config.saq.batch_stats_from_both),
    seed=config.seed,
    batch_size=config.data.batch_size,
    eval_batch_size=config.data.eval_batch_size,
    total_steps=total_steps(settings, steps_per_epoch),
    steps_per_epoch=steps_per_epoch,
    eval_every=max(1, round(config.eval_every_epochs * steps_per_epoch)),
    checkpoint_every=max(1, round(config.checkpoint_every_epochs * steps_per_epoch)),
    log_every=config.log_every_steps,
  )


def _begin(stage: Stage, config: ExperimentConfig, images: Array, weights: Weights) -> TrainState:
  """The state at step 0: random weights, or given ones with scales found from a batch."""
  inputs = prepare_images(images, stage.step)
  if weights is None:
    return new_state(stage.network, stage.tx, config.seed, inputs)
  return state_from_weights(stage.network, stage.tx, config.seed, inputs, *weights)


def _given_weights(config: ExperimentConfig) -> Weights:
  """Weights, running statistics and scales that `init_from` names, if it does."""
  if config.init_from is None:
    return None
  try:
    params, batch_stats = restore_subtrees(config.init_from, 'params', 'batch_stats')
  except ValueError as error:
    raise ConfigError(f'config.init_from: {error}.') from error
  return params['model'], batch_stats, params['scales']

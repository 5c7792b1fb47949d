"""The training loop of one stage: resume, step, log, evaluate, save, stop when asked to."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from saq_jax._paths import PyTree
from saq_jax.data.datasets import Dataset
from saq_jax.data.loader import Loader, LoaderError, Reading
from saq_jax.data.source import train_source
from saq_jax.training.bookkeeping import (
  Bookkeeping,
  DivergedError,
  Leg,
  PreemptedError,
  StepBackError,
)
from saq_jax.training.bounds import ConfigError
from saq_jax.training.checkpoint import Checkpoints
from saq_jax.training.checkpoint_config import CheckpointConfig
from saq_jax.training.compiled import CompiledStep
from saq_jax.training.config import MeshConfig
from saq_jax.training.evaluate import Score, make_evaluator
from saq_jax.training.log import StageLog
from saq_jax.training.network import Network
from saq_jax.training.passes import Groups
from saq_jax.training.profile import Profile
from saq_jax.training.progress import Progress
from saq_jax.training.sharding import Layout, over_batch, replicated, to_devices
from saq_jax.training.signals import Stop
from saq_jax.training.state import TrainState
from saq_jax.training.step import StepConfig, TrainStep, train_step
from saq_jax.training.watch_config import WatchConfig
from saq_jax.training.watch_loss import LossWatch
from saq_jax.training.watch_replay import StepsBack, slowed
from saq_jax.training.watch_stall import StallWatch
from saq_jax.training.workdir import WorkdirError

__all__ = ['Begin', 'DivergedError', 'PreemptedError', 'Stage', 'run_stage']

Begin = Callable[[Array, PyTree], TrainState]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One training run, complete but for its data.

  Attributes:
    name: of its directory and its progress line: 'float', 'qat' or 'saq'.
    network: what is trained.
    slot: `saq(...)` or `qat(...)`, the first link of the chain.
    optimizer: follows it.
    tracker: the last link, which changes no update and sees them as they are applied; if any.
    lr: the schedule of the learning rate, for the metrics.
    step: augmentation, loss and batch statistics.
    seed: of the order of the examples.
    repeats: how often an example is taken in a row.
    reading: who makes the batches.
    batch_size: global.
    eval_batch_size: global.
    total_steps: steps to take.
    steps_per_epoch: training examples over the batch size.
    eval_every: steps between evaluations.
    checkpoint_every: steps between checkpoints.
    log_every: steps between lines of metrics.
    mesh: how the state lies on the devices.
    per_device: each device perturbs by the gradients of its own share of the batch.
    group_size: examples a perturbation then; None for the share as a whole.
    taken: bool [total_steps], which steps take the second gradient; None where that is not known
      before them.
    watch: what the stage looks out for.
    checkpoint: which checkpoints it keeps.
  """

  name: str
  network: Network
  slot: optax.GradientTransformationExtraArgs
  optimizer: optax.GradientTransformation
  tracker: optax.GradientTransformation | None
  lr: optax.Schedule
  step: StepConfig
  seed: int
  repeats: int
  reading: Reading
  batch_size: int
  eval_batch_size: int
  total_steps: int
  steps_per_epoch: float
  eval_every: int
  checkpoint_every: int
  log_every: int
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  per_device: bool = False
  group_size: int | None = None
  taken: np.ndarray | None = None
  watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

  @property
  def tx(self) -> optax.GradientTransformationExtraArgs:
    """The whole chain."""
    return optax.chain(self.slot, self.rest)

  @property
  def rest(self) -> optax.GradientTransformation:
    """The chain without the slot."""
    return self.optimizer if self.tracker is None else optax.chain(self.optimizer, self.tracker)


def run_stage(
  stage: Stage,
  begin: Begin,
  weights: PyTree,
  train: Dataset,
  test: Dataset,
  mesh: Mesh,
  directory: Path,
  stop: Stop,
  profile: Profile | None = None,
) -> tuple[TrainState, Score]:
  """Trains a stage to its end, from its newest checkpoint if it has one.

  Args:
    stage: what to train.
    begin: makes the state at step 0 from the first batch of images, uint8, and `weights`.
    weights: what to begin from, any tree of arrays or None.
    train: examples to train on.
    test: examples to evaluate on.
    mesh: the devices.
    directory: holds 'checkpoints', and what `StageLog` writes.
    stop: asks to save and leave.
    profile: steps to record, if any.

  Returns:
    The final state and its score on `test`.

  Raises:
    PreemptedError: if it was asked to stop; the state is saved.
    DivergedError: if it diverges, and may not or cannot go back to a checkpoint.
    LoaderError, RecordError: if no batch comes, or one cannot be made.
    ConfigError: if the given weights do not fit.
    WorkdirError: if what is in the directory cannot be gone on with.
    OSError: if the disk is full or fails where the run cannot go on without it.
  """
  first = _first_images(stage, train)
  example = _abstract(begin, Layout(mesh, stage.mesh.min_shard), first, weights)
  evaluate = make_evaluator(
    stage.network, stage.step, mesh, test, stage.eval_batch_size, stage.reading
  )
  kept = stage.checkpoint
  with Checkpoints(
    directory / 'checkpoints', kept.keep, keep_best=kept.keep_best, every=stage.checkpoint_every
  ) as checkpoints:
    went_back: StepsBack | None = None
    while True:
      start, state, notes = _restored(checkpoints, example)
      if state is None:
        state = _started(begin, example, first, weights)
      losses = LossWatch(stage.watch, notes, went_back)
      leg = Leg(_replayed(stage, losses.steps_back), start, losses, directory, stop, profile)
      try:
        state, score = _train(leg, state, checkpoints, evaluate, train, mesh)
        return state, score or evaluate(state.params, state.batch_stats)
      except StepBackError as error:
        went_back = error.steps_back
      del state  # before another one is made
      checkpoints.drop_after(went_back.to)


def _restored(
  checkpoints: Checkpoints, example: TrainState
) -> tuple[int, TrainState | None, Mapping[str, Any]]:
  """The step, state and notes of the newest checkpoint; no state where there is none."""
  try:
    restored = checkpoints.restore_latest(example)
    return (0, None, {}) if restored is None else (*restored, checkpoints.notes(restored[0]))
  except ConfigError:
    raise
  except ValueError as error:
    raise WorkdirError(str(error)) from error


def _train(
  leg: Leg,
  state: TrainState,
  checkpoints: Checkpoints,
  evaluate: Callable[[PyTree, PyTree], Score],
  train: Dataset,
  mesh: Mesh,
) -> tuple[TrainState, Score | None]:
  """Takes the steps that are left; with the score of the last one, if any was taken."""
  stage, start, steps_back = leg.stage, leg.start, leg.losses.steps_back
  if start == stage.total_steps:
    return state, None
  score = None
  # Where batches are left out, the stream is longer by them.
  stream = dataclasses.replace(stage, total_steps=stage.total_steps + steps_back.skipped)
  with (
    StageLog(leg.directory, stage.steps_per_epoch, start or None, steps_back.count) as log,
    Progress(stage.name, stage.total_steps, start) as progress,
    StallWatch(stage.watch, stage.name, stage.total_steps) as stalls,
    _batches(stream, train, mesh, start + steps_back.skipped) as batches,
    Bookkeeping(leg, _compiled(stage, mesh, state), checkpoints, log, progress, stalls) as books,
  ):
    step = start
    try:
      for step, batch in enumerate(batches, start + 1):
        state = books.advance(state, batch, step)
        books.time(step, batches.waited)
        score = None
        if step % stage.eval_every == 0 or step == stage.total_steps:
          books.settle()
          with stalls.waiting(step, 'the evaluation', grows=True):
            score = evaluate(state.params, state.batch_stats)
          books.score(step, score, batches.waited)
        books.save_if_due(state, step, score)
    except LoaderError:
      # A signal to a whole process group ends the workers too: what is done is saved all the same.
      if not leg.stop.requested or jax.process_count() > 1:
        raise
      books.save_if_due(state, step, None)
  return state, score


def _replayed(stage: Stage, steps_back: StepsBack) -> Stage:
  """The stage with the learning rate that it has after it went back so often."""
  if not steps_back.count:
    return stage
  factor = stage.watch.backoff**steps_back.count
  slower = slowed(stage.optimizer, factor)
  return dataclasses.replace(stage, optimizer=slower, lr=lambda step: factor * stage.lr(step))


def _batches(stage: Stage, train: Dataset, mesh: Mesh, start: int) -> Loader[dict[str, Array]]:
  """The batches from a step on, each on its way to the devices before it is needed."""
  source = train_source(
    train,
    stage.batch_size,
    seed=stage.seed,
    repeats=stage.repeats,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  transfer = functools.partial(to_devices, mesh=mesh)
  return Loader(source, start, stage.total_steps, transfer, stage.reading, decodes=train.decodes)


def _first_images(stage: Stage, train: Dataset) -> np.ndarray:
  """The images of the first global batch, which every process takes whole."""
  source = train_source(train, stage.batch_size, seed=stage.seed)
  reading = dataclasses.replace(stage.reading, workers=0)
  with Loader(source, 0, 1, lambda batch: batch['image'], reading) as batches:
    return next(iter(batches))


def _compiled(stage: Stage, mesh: Mesh, state: TrainState) -> CompiledStep:
  """The train step, jitted once a choice; the state's memory is reused."""
  layout = Layout(mesh, stage.mesh.min_shard)
  groups = Groups(stage.slot, stage.rest, mesh, stage.group_size) if stage.per_device else None
  step = functools.partial(
    train_step,
    network=stage.network,
    tx=stage.tx,
    lr=stage.lr,
    config=stage.step,
    groups=groups,
    layout=layout,
  )
  placed = layout.shardings(state)

  def jitted(taken: bool | None) -> TrainStep:
    return jax.jit(
      functools.partial(step, taken=taken),
      donate_argnums=0,
      in_shardings=(placed, over_batch(mesh)),
      out_shardings=(placed, replicated(mesh)),
    )

  return CompiledStep(jitted, stage.taken)


def _started(begin: Begin, example: TrainState, *inputs: PyTree) -> TrainState:
  """The state at step 0, placed as the example is."""
  places = jax.tree.map(lambda x: x.sharding, example)
  return jax.jit(begin, out_shardings=places)(*inputs)


def _abstract(begin: Begin, layout: Layout, *inputs: PyTree) -> TrainState:
  """Shapes, dtypes and places of the state, without making it."""
  shapes = jax.eval_shape(begin, *inputs)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    layout.shardings(shapes),
  )

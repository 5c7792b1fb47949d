"""The training loop of one stage: resume, step, log, evaluate, save, stop when asked to."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from saq_jax._paths import PyTree
from saq_jax.data.datasets import Dataset
from saq_jax.data.loader import Loader, Reading
from saq_jax.data.source import train_source
from saq_jax.training.bounds import ConfigError
from saq_jax.training.checkpoint import Checkpoints
from saq_jax.training.evaluate import Score, make_evaluator
from saq_jax.training.log import StageLog
from saq_jax.training.network import Network
from saq_jax.training.progress import Progress
from saq_jax.training.sharding import over_batch, replicated, to_devices
from saq_jax.training.signals import Stop
from saq_jax.training.state import TrainState
from saq_jax.training.step import Metrics, StepConfig, TrainStep, train_step
from saq_jax.training.workdir import WorkdirError

Begin = Callable[[Array, PyTree], TrainState]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One training run, complete but for its data.

  Attributes:
    name: of its directory and its progress line: 'float', 'qat' or 'saq'.
    network: what is trained.
    tx: `optax.chain(saq(...) or qat(...), optimizer)`.
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
  """

  name: str
  network: Network
  tx: optax.GradientTransformationExtraArgs
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


class PreemptedError(RuntimeError):
  """The run was asked to stop; its state is saved and the same command goes on with it."""


class DivergedError(RuntimeError):
  """The loss or the gradient is not finite."""


def run_stage(
  stage: Stage,
  begin: Begin,
  weights: PyTree,
  train: Dataset,
  test: Dataset,
  mesh: Mesh,
  directory: Path,
  stop: Stop,
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

  Returns:
    The final state and its score on `test`.

  Raises:
    PreemptedError: if it was asked to stop; the state is saved.
    DivergedError: if a loss or a gradient is not finite.
    LoaderError, RecordError: if no batch comes, or one cannot be made.
    ConfigError: if the given weights do not fit.
    WorkdirError: if what is in the directory cannot be gone on with.
  """
  first = _first_images(stage, train)
  evaluate = make_evaluator(
    stage.network, stage.step, mesh, test, stage.eval_batch_size, stage.reading
  )
  with Checkpoints(directory / 'checkpoints') as checkpoints:
    try:
      restored = checkpoints.restore_latest(_abstract(begin, mesh, first, weights))
    except ConfigError:
      raise
    except ValueError as error:
      raise WorkdirError(str(error)) from error
    start = 0 if restored is None else restored[0]
    state = _started(begin, mesh, first, weights) if restored is None else restored[1]
    score = None
    if start < stage.total_steps:
      with (
        StageLog(directory, stage.steps_per_epoch, start if restored else None) as log,
        Progress(stage.name, stage.total_steps, start) as progress,
        _batches(stage, train, mesh, start) as batches,
      ):
        run = _Run(stage, _compiled(stage, mesh), checkpoints, log, progress, stop)
        for step, batch in enumerate(batches, start + 1):
          state = run.advance(state, batch, step)
          run.time(step, batches.waited)
          if step % stage.eval_every == 0 or step == stage.total_steps:
            run.settle()
            score = evaluate(state.params, state.batch_stats)
            log.write_score(step, score)
            progress.update(step, test=score.accuracy)
          run.save_if_due(state, step)
    return state, score or evaluate(state.params, state.batch_stats)


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


class _Run:
  """The bookkeeping of a stage under way: metrics one step late, checkpoints, the wish to stop."""

  def __init__(
    self,
    stage: Stage,
    compiled: TrainStep,
    checkpoints: Checkpoints,
    log: StageLog,
    progress: Progress,
    stop: Stop,
  ) -> None:
    self._stage, self._compiled, self._checkpoints = stage, compiled, checkpoints
    self._log, self._progress, self._stop = log, progress, stop
    self._pending: tuple[int, Metrics] | None = None
    self._new = True

  def advance(self, state: TrainState, batch: dict[str, Array], step: int) -> TrainState:
    """Starts a step, then reads the metrics of the one before, so that the device never waits."""
    state, metrics = self._compiled(state, batch)
    self.settle()
    self._pending = step, metrics
    return state

  def time(self, step: int, waited: float) -> None:
    """Notes the speed whenever metrics are due, and after the first step, which is compiled."""
    if step % self._stage.log_every == 0 or step == self._stage.total_steps or self._new:
      share = self._log.write_timing(step, waited)
      if share is not None:
        self._progress.update(step - 1, data_wait=share)
    self._new = False

  def settle(self) -> None:
    """Reads the metrics that are out, checks them, and writes and shows them."""
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not all(math.isfinite(figures[name]) for name in ('loss', 'sharp_grad_norm')):
      self._log.write(step, figures)
      raise DivergedError(self._diverged(step, figures))
    if step % self._stage.log_every == 0 or step in (1, self._stage.total_steps):
      self._log.write(step, figures)
    self._progress.update(step, loss=figures['loss'], accuracy=figures['accuracy'])

  def save_if_due(self, state: TrainState, step: int) -> None:
    """Saves at every checkpoint step, at the end, and when asked to stop."""
    done = step == self._stage.total_steps
    stopping = self._stop.requested and not done
    if done or stopping or step % self._stage.checkpoint_every == 0:
      self.settle()
      self._checkpoints.save(step, state)
    if stopping:
      self._checkpoints.wait()
      raise PreemptedError(
        f"{self._stop.reason}: saved stage '{self._stage.name}' at step {step} of "
        f'{self._stage.total_steps}; the same command goes on from there.'
      )

  def _diverged(self, step: int, figures: dict[str, float]) -> str:
    self._checkpoints.wait()
    # Step k's metrics tell of the parameters before it: those saved at k show at step k + 1.
    saved = [known for known in self._checkpoints.steps if known < step - 1]
    good = f'the last good checkpoint is step {saved[-1]}' if saved else 'no checkpoint is good'
    return (
      f"stage '{self._stage.name}' diverged at step {step}: loss {figures['loss']}, gradient norm "
      f'{figures["sharp_grad_norm"]}, learning rate {figures["lr"]:.3g}; {good}. Lower the '
      'learning rate or rho, or set clip_norm, and start in another --workdir.'
    )


def _compiled(stage: Stage, mesh: Mesh) -> TrainStep:
  """The train step, jitted once; the state's memory is reused."""
  whole = replicated(mesh)
  step = functools.partial(
    train_step, network=stage.network, tx=stage.tx, lr=stage.lr, config=stage.step
  )
  return jax.jit(
    step, donate_argnums=0, in_shardings=(whole, over_batch(mesh)), out_shardings=whole
  )


def _started(begin: Begin, mesh: Mesh, *inputs: PyTree) -> TrainState:
  """The state at step 0, on every device."""
  return jax.jit(begin, out_shardings=replicated(mesh))(*inputs)


def _abstract(begin: Begin, mesh: Mesh, *inputs: PyTree) -> TrainState:
  """Shapes, dtypes and places of the state, without making it."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
    jax.eval_shape(begin, *inputs),
  )

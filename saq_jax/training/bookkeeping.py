"""What goes on beside the steps of a stage: metrics, checkpoints, the watch, the wish to stop."""

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import jax
from jax import Array

from saq_jax.training.checkpoint import Checkpoints
from saq_jax.training.checkpoint_disk import SaveError
from saq_jax.training.cluster import all_agree
from saq_jax.training.compiled import CompiledStep
from saq_jax.training.evaluate import Score
from saq_jax.training.log import StageLog
from saq_jax.training.profile import Profile
from saq_jax.training.progress import Progress
from saq_jax.training.signals import Stop
from saq_jax.training.state import TrainState
from saq_jax.training.step import Metrics
from saq_jax.training.watch_loss import Divergence, LossWatch
from saq_jax.training.watch_replay import StepsBack, origin
from saq_jax.training.watch_stall import StallWatch

if TYPE_CHECKING:
  from saq_jax.training.loop import Stage


class PreemptedError(RuntimeError):
  """The run was asked to stop; its state is saved and the same command goes on with it."""


class DivergedError(RuntimeError):
  """The loss or the gradient is not finite, or the loss rose far above what it was."""


class StepBackError(Exception):
  """The stage goes back to a checkpoint and on from there.

  Attributes:
    steps_back: where to, and how the run differs from then on.
  """

  def __init__(self, steps_back: StepsBack) -> None:
    super().__init__(steps_back)
    self.steps_back = steps_back


@dataclasses.dataclass(frozen=True)
class Leg:
  """The steps of a stage from one on, up to its end or until it goes back.

  Attributes:
    stage: with the learning rate of this leg.
    start: the step that it begins after.
    losses: sees divergence.
    directory: of the stage.
    stop: asks to save and leave.
    profile: steps to record, if any.
  """

  stage: 'Stage'
  start: int
  losses: LossWatch
  directory: Path
  stop: Stop
  profile: Profile | None


def has_line(step: int, stage: 'Stage') -> bool:
  """Whether the metrics of a step are written.

  Where a strategy's choice is known, the first step after each of the regular lines that took a
  second gradient has a line too: a period may be such that those of the regular lines never do.

  Args:
    step: its number, from 1.
    stage: that takes it.

  Returns:
    Whether it is the first, the last, one in `log_every`, or such a step.
  """
  since = step % stage.log_every
  if not since or step in (1, stage.total_steps):
    return True
  if stage.taken is None or not stage.taken[step - 1]:
    return False
  return not stage.taken[max(step - since, 1) - 1 : step - 1].any()


class Bookkeeping:
  """Keeps the books of a stage under way; metrics are read one step late.

  Args:
    leg: the steps that are taken.
    compiled: the step.
    checkpoints: of the stage.
    log: of the stage.
    progress: of the stage.
    stalls: sees waits that do not end.
  """

  def __init__(
    self,
    leg: Leg,
    compiled: CompiledStep,
    checkpoints: Checkpoints,
    log: StageLog,
    progress: Progress,
    stalls: StallWatch,
  ) -> None:
    self._leg, self._stage, self._compiled = leg, leg.stage, compiled
    self._checkpoints, self._log, self._progress = checkpoints, log, progress
    self._stalls = stalls
    self._pending: tuple[int, Metrics] | None = None
    self._new = True
    self._ended = time.monotonic()
    self._seconds: list[float] = []

  def __enter__(self) -> 'Bookkeeping':
    return self

  def __exit__(self, *exception: object) -> None:
    if self._leg.profile is not None:
      self._leg.profile.end()

  def advance(self, state: TrainState, batch: dict[str, Array], step: int) -> TrainState:
    """Starts a step, then reads the metrics of the one before, so that the device never waits.

    Args:
      state: before the step; its memory is reused.
      batch: of the step.
      step: its number, from 1.

    Returns:
      The state after it.

    Raises:
      DivergedError, StepBackError: if the step before has diverged.
    """
    profile = self._leg.profile
    if profile is not None and not profile.recording and profile.wants(step):
      self.settle()
      profile.begin(step, self._leg.directory)
    follows = self._pending is not None
    # The first call of a program compiles it.
    with (
      self._stalls.waiting(step, 'the step', grows=self._compiled.is_new(step)),
      jax.profiler.StepTraceAnnotation('train', step_num=step),
    ):
      state, metrics = self._compiled(state, batch, step)
    self.settle()
    self._pending = step, metrics
    if follows:  # else none was waited for
      self._seconds.append(time.monotonic() - self._ended)
    if profile is not None and profile.note(step):
      self.settle()
      profile.end()
    return state

  def time(self, step: int, waited: float) -> None:
    """Notes the speed whenever metrics are due, and after the first step, which is compiled.

    Args:
      step: just begun.
      waited: seconds for which the loop has waited for batches since it began.
    """
    if step % self._stage.log_every == 0 or step == self._stage.total_steps or self._new:
      share = self._log.write_timing(step, waited, self._seconds)
      self._seconds.clear()
      if share is not None:
        self._progress.update(step - 1, data_wait=share)
    self._new = False

  def settle(self) -> None:
    """Reads the metrics that are out, checks them, and writes and shows them.

    Raises:
      DivergedError, StepBackError: if they show that the run has diverged.
    """
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    with self._stalls.waiting(step, 'the step'):
      figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not figures.get('second', 1.0):  # there is none to tell of
      figures.pop('loss_perturbed', None)
    if divergence := self._leg.losses.see(step, figures):
      self._log.write(step, figures)
      self._diverged(divergence)
    damaged = figures.get('damaged')  # written always, so that their sum is that of all images
    if damaged or has_line(step, self._stage):
      self._log.write(step, figures)
    self._progress.update(step, loss=figures['loss'], accuracy=figures['accuracy'])

  def score(self, step: int, score: Score, waited: float) -> None:
    """Writes and shows an evaluation, whose time is not that of the steps.

    Args:
      step: finished steps.
      score: what it found.
      waited: as for `time`.
    """
    self._log.write_score(step, score)
    self._log.start_timing(step, waited)
    self._progress.update(step, test=score.accuracy)

  def save_if_due(self, state: TrainState, step: int, score: Score | None) -> None:
    """Saves at every checkpoint step, at the end, a new best, and when asked to stop.

    Args:
      state: after the step.
      step: finished steps.
      score: of that state, if it was evaluated.

    Raises:
      PreemptedError: if it was asked to stop.
      OSError: if it must save, to stop, and the disk is full or fails.
    """
    done = step == self._stage.total_steps
    stopping = not done and self._is_to_stop(step)
    due = step % self._stage.checkpoint_every == 0
    self._checkpoints.check()
    if done or stopping or due or self._is_best(score):
      with self._stalls.waiting(step, 'the checkpoint'):
        self.settle()
        self._save(state, step, score, must=done or stopping)
        if done or stopping:
          self._checkpoints.wait()
    if stopping:
      reason = self._leg.stop.reason or 'a signal to another process'
      raise PreemptedError(
        f"{reason}: saved stage '{self._stage.name}' at step {step} of "
        f'{self._stage.total_steps}; the same command goes on from there.'
      )
    self._ended = time.monotonic()

  def _is_to_stop(self, step: int) -> bool:
    """Whether the run was asked to stop; several processes agree at each line of metrics."""
    requested = self._leg.stop.requested
    if jax.process_count() == 1:
      return requested
    if step % self._stage.log_every:
      return False
    with self._stalls.waiting(step, 'the agreement of the processes'):
      return not all_agree(not requested)

  def _is_best(self, score: Score | None) -> bool:
    """Whether an evaluation found what is to be kept as the best so far."""
    if score is None or not self._stage.checkpoint.keep_best:
      return False
    best = self._checkpoints.best
    return best is None or score.accuracy > best[1]

  def _save(self, state: TrainState, step: int, score: Score | None, *, must: bool) -> None:
    """Saves, if the metrics up to here are on the disk, for a resumed run begins after them."""
    try:
      self._log.sync()
    except OSError as error:
      if must or jax.process_count() > 1:
        hint = 'Make room; the same command goes on from the last checkpoint.'
        raise OSError(f'{error} {hint}') from error
      warning = '%s Without them no checkpoint is written; the next one tries again.'
      logging.getLogger(__name__).warning(warning, error)
      return
    accuracy = None if score is None else score.accuracy
    self._checkpoints.save(step, state, self._leg.losses.notes, accuracy)

  def _diverged(self, divergence: Divergence) -> NoReturn:
    """Goes back to the last good checkpoint where the stage may, else ends the run."""
    before, watch, name = self._leg.losses.steps_back, self._stage.watch, self._stage.name
    with self._stalls.waiting(divergence.step, 'the checkpoint'), contextlib.suppress(SaveError):
      self._checkpoints.wait()
    seen = f'stage {name!r} diverged at step {divergence.step}: {divergence.words}'
    to = origin(divergence.last_good, self._checkpoints.due, self._stage.checkpoint_every, before)
    if before.count < watch.retries and to is not None:
      logging.getLogger(__name__).warning(
        '%s; it goes back to %s (time %d of %d), leaves out the batches since then, and takes %.3g '
        'times the learning rate.',
        seen,
        f'the checkpoint of step {to}' if to else 'its beginning',
        before.count + 1,
        watch.retries,
        watch.backoff ** (before.count + 1),
      )
      raise StepBackError(before.again(to, divergence.step))
    saved = [step for step in self._checkpoints.steps if step <= divergence.last_good]
    good = f'the last good checkpoint is step {saved[-1]}' if saved else 'no checkpoint is good'
    went = f'; it went back {before.count} of {watch.retries} times' if before.count else ''
    more = f'let it go back by itself: --config.watch.retries={before.count + 2}'
    raise DivergedError(
      f'{seen}; {good}{went}. Lower the learning rate or rho, or set clip_norm, and start in '
      f'another --workdir{"" if to is None else "; or " + more}.'
    )

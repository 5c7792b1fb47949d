"""Trains and scores what a study has yet to do, beside other processes that do the same."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import study_data
from study_parts import Cell, Job, Parts, jobs, load_weights, save_weights, write
from study_plan import (
  ADAPTIVE_ETA,
  ADAPTIVE_RHO,
  SHARPNESS_RHO,
  TUNING_BITS,
  Plan,
  Setting,
  config_of,
  variant,
  variants,
)

from saq_jax.analysis.seeds import SeedScorer, SeedTrainer
from saq_jax.training.state import TrainState

Figures = dict[str, Any]


def work(plan: Plan, parts: Parts, share: tuple[int, int], data_dir: str | None = None) -> None:
  """Does every job of a study that is not done yet; returns when all are.

  Several processes may work in one directory: each takes jobs of its own share first, and then
  helps the others.

  Args:
    plan: what to do.
    parts: where its results go.
    share: (i, n): the share i, from 0, of n processes. Jobs of one network and bit-width are in
      one share, as they have most of what is compiled in common.
    data_dir: of tfds.
  """
  todo = jobs(plan)
  groups = sorted({(job.bits == 32, job.bits, job.network) for job in todo}, key=lambda g: g[1:])
  # 0, 1, 0, 1, ...: the networks in turn, so that each process has one of them.
  part_of = {group: i % share[1] for i, group in enumerate(groups)}
  todo.sort(key=lambda job: part_of[job.bits == 32, job.bits, job.network] != share[0])
  worker = Worker(plan, parts, Progress(plan, parts, todo), data_dir)
  while left := [job for job in todo if not _done(job, plan, parts)]:
    if not any(_try(job, worker, plan, parts) for job in left):
      time.sleep(1)  # others do all that is left, or what it waits for


def _done(job: Job, plan: Plan, parts: Parts) -> bool:
  return all(path.exists() for path in job.files(plan, parts))


def _try(job: Job, worker: 'Worker', plan: Plan, parts: Parts) -> bool:
  """Does a job, if it can be started and nobody else does it."""
  if not all(path.exists() for path in job.waits_for(plan, parts)):
    return False
  with parts.claim(job.name) as ours:
    if not ours or _done(job, plan, parts):
      return False
    worker.do(job)
  return True


class Worker:
  """Does jobs, and keeps what is compiled for the network and the bit-width of the last one.

  Args:
    plan: what to do.
    parts: where its results go.
    progress: is told of every part.
    data_dir: of tfds.
  """

  def __init__(
    self, plan: Plan, parts: Parts, progress: 'Progress', data_dir: str | None = None
  ) -> None:
    self._plan, self._parts, self._progress = plan, parts, progress
    self._splits = {name: study_data.load(name, data_dir) for name in ('digits', *plan.data)}
    self._compiled: tuple[tuple[str, int], Any] | None = None

  def do(self, job: Job) -> None:
    """Does what is left of a job.

    Args:
      job: which.
    """
    for data in self._plan.data:
      cell = Cell(job.network, data)
      for i, setting in enumerate(self._plan.tried(job.method) if job.tunes else ()):
        path = self._parts.tuning(cell, job.method, i)
        self._write(path, functools.partial(self._tune, job, cell, setting), setting.words)
      path = self._parts.final(cell, job.method, job.bits)
      self._write(path, functools.partial(self._final, job, cell), 'final')

  def _write(self, path: Path, make: Callable[[], Figures], words: str) -> None:
    """Makes a part that is not there yet."""
    if not path.exists():
      figures = make()
      write(path, figures)
      self._progress.show(path, words, figures)

  def _tune(self, job: Job, cell: Cell, setting: Setting) -> Figures:
    """The validation scores of one setting."""
    if job.method != 'qat':
      lr_factor = self._parts.chosen(self._plan, cell, 'qat').lr_factor
      setting = Setting(setting.rho, setting.period, lr_factor)
    trainer, scorer = self._tools(job, cell)
    scores: Figures = {'accuracy': [], 'loss': []}
    seconds = []
    for seeds in self._plan.groups(self._plan.tuning_seeds):
      state, _, took = self._train(trainer, job.method, setting, seeds, cell)
      found = scorer.validate(state)
      scores['accuracy'] += found.accuracy
      scores['loss'] += found.loss
      seconds.append(took)
    return {
      'setting': vars(setting),
      'seeds': self._plan.tuning_seeds,
      'validation': scores,
      'seconds': min(seconds),
    }

  def _final(self, job: Job, cell: Cell) -> Figures:
    """All figures of the final seeds; for full precision, the weights that all others begin at."""
    setting = Setting()
    if job.method not in ('float', 'ptq'):
      setting = self._parts.chosen(self._plan, cell, job.method)
    trainer, scorer = self._tools(job, cell)
    figures: Figures = {name: [] for name in ('second', *_FIGURES)}
    seconds = []
    if job.method == 'float':
      for seeds in self._plan.groups(self._plan.tuning_seeds):
        self._train(trainer, 'float', setting, seeds, cell)
    for seeds in self._plan.groups(self._plan.final_seeds):
      state, second, took = self._train(trainer, job.method, setting, seeds, cell)
      for name, values in _flat(scorer.score(state)).items():
        figures[name] += values
      figures['second'] += second
      seconds.append(took)
    more = {'seeds': self._plan.final_seeds, 'seconds': min(seconds)}
    return {'setting': vars(setting), **more, **figures}

  def _train(
    self, trainer: SeedTrainer, method: str, setting: Setting, seeds: tuple[int, ...], cell: Cell
  ) -> tuple[TrainState, list[float], float]:
    """The final state, the part of steps with a second gradient, and the seconds a run."""
    path = self._parts.weights(cell, seeds)
    began = time.perf_counter()
    if method == 'float':
      trained = trainer.run('float', 0.0, seeds, None)
      found = {'model': trained.state.params['model'], 'stats': trained.state.batch_stats}
      save_weights(path, jax.device_get(found))
    else:
      saved = load_weights(path)
      weights = saved['model'], saved['stats']
      if method == 'ptq':
        return trainer.begin('qat', seeds, weights), [0.0] * len(seeds), 0.0
      name = variant(method, setting)
      trained = trainer.run(name, setting.rho, seeds, weights, lr_factor=setting.lr_factor)
    second = [float(value) for value in trained.second]
    return trained.state, second, (time.perf_counter() - began) / len(seeds)

  def _tools(self, job: Job, cell: Cell) -> tuple[SeedTrainer, SeedScorer]:
    """What trains and scores the job's network on the cell's data."""
    key = job.network, TUNING_BITS if job.method == 'float' else job.bits
    if self._compiled is None or self._compiled[0] != key:
      config = config_of(self._plan, *key)
      splits = self._splits['digits']
      trainer = SeedTrainer(config, splits.train, lambda _: None, variants(self._plan, config))
      scorers = {
        kind: SeedScorer(
          trainer.stage(kind),
          splits.train,
          splits.validation,
          splits.test,
          SHARPNESS_RHO,
          adaptive_rho=ADAPTIVE_RHO,
          adaptive_eta=ADAPTIVE_ETA,
        )
        for kind in ('float', 'qat')
      }
      self._compiled = key, (trainer, scorers)
    trainer, scorers = self._compiled[1]
    train = self._splits[cell.data].train
    return trainer.on(train), scorers['float' if job.method == 'float' else 'qat'].on(train)


_FIGURES = (
  'validation_accuracy',
  'validation_loss',
  'test_accuracy',
  'test_loss',
  'train_loss',
  'sharpness',
  'adaptive_sharpness',
)


def _flat(scores: Figures) -> Figures:
  """What a scorer found, as figures by name."""
  out: Figures = {}
  for split in ('validation', 'test'):
    out |= {f'{split}_accuracy': scores[split].accuracy, f'{split}_loss': scores[split].loss}
  return out | {name: scores[name] for name in _FIGURES[4:]}


class Progress:
  """Prints a line a part: how far all processes are, and how long they have yet.

  Args:
    plan: what is to be done.
    parts: where results go.
    todo: all jobs.
  """

  def __init__(self, plan: Plan, parts: Parts, todo: list[Job]) -> None:
    finals, tuning = len(plan.final_seeds), len(plan.tuning_seeds)
    self._runs: dict[Path, int] = {}
    for job in todo:
      for path in job.files(plan, parts):
        # PTQ trains nothing, and full precision the tuning seeds too.
        more = {'float': tuning, 'ptq': -finals}.get(job.method, 0)
        self._runs[path] = tuning if path.parent.name == 'tuning' else finals + more
    self._began, self._before = time.monotonic(), self._count()
    print(f'{self._before} of {sum(self._runs.values())} runs are done', flush=True)

  def show(self, path: Path, words: str, figures: Figures) -> None:
    """Tells of a part that is done.

    Args:
      path: of its file.
      words: its setting.
      figures: what is in it.
    """
    done, total = self._count(), sum(self._runs.values())
    passed = time.monotonic() - self._began
    left = passed * (total - done) / max(done - self._before, 1)
    accuracy = figures['validation']['accuracy'] if 'validation' in figures else None
    accuracy = accuracy or figures['validation_accuracy']
    print(
      f'{_clock(passed)}, {_clock(left)} left, {done}/{total} runs: '
      f'{"/".join(path.parts[-3:-1])} {path.stem}, {words}: '
      f'validation {100 * sum(accuracy) / len(accuracy):.2f} %, {figures["seconds"]:.2f} s a run',
      flush=True,
    )

  def _count(self) -> int:
    """The runs that are done, by any process."""
    return sum(runs for path, runs in self._runs.items() if path.exists())


def _clock(seconds: float) -> str:
  """Minutes and seconds."""
  return f'{int(seconds) // 60}:{int(seconds) % 60:02}'

"""Compares QAT and cases 1 to 3 over many seeds: trains, scores, chooses each radius, reports."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorflow_datasets as tfds
from rich.console import Console

from saq_jax.analysis.compare_report import comparison_tables, write_comparison
from saq_jax.analysis.comparison import CASES, METHODS, Comparison, Runs, Scores
from saq_jax.analysis.seeds import SeedScorer, SeedTrainer, Weights
from saq_jax.data.builders import open_builder
from saq_jax.data.datasets import Dataset
from saq_jax.training.bounds import ConfigError
from saq_jax.training.checkpoint import Checkpoints, restore_subtrees
from saq_jax.training.config import ExperimentConfig
from saq_jax.training.inputs import load_split, load_splits, parts_of_batch, require_enough
from saq_jax.training.loop import DivergedError, PreemptedError
from saq_jax.training.progress import Progress
from saq_jax.training.signals import Stop
from saq_jax.training.stages import require_perturbed
from saq_jax.training.workdir import write_json


@dataclasses.dataclass(frozen=True)
class _Job:
  """One method at one radius, for the seeds that are trained at once."""

  method: str
  rho: float
  seeds: tuple[int, ...]

  def path(self, directory: Path) -> Path:
    """Where its figures go."""
    return self.group(directory) / f'{self.method}-rho{self.rho}.json'

  def group(self, directory: Path) -> Path:
    """The folder of its seeds."""
    return directory / 'seeds' / f'{self.seeds[0]}-{self.seeds[-1]}'


def run_comparison(config: ExperimentConfig, name: str, directory: Path, stop: Stop) -> None:
  """Compares the methods, prints the tables, and writes the report.

  Args:
    config: the experiment, with `compare.seeds` at least 2.
    name: of the experiment, for the report's title.
    directory: its work directory.
    stop: asks to leave between two steps.

  Raises:
    ConfigError, PreemptedError, DivergedError: as `compare`.
  """
  comparison = compare(config, directory, stop)
  paths = write_comparison(comparison, directory, f'{name}: QAT and cases 1 to 3')
  console = Console(width=None if Console().is_terminal else 100)
  for table in comparison_tables(comparison):
    console.print(table)
  for path in paths.values():
    print(path)


def compare(config: ExperimentConfig, directory: Path, stop: Stop) -> Comparison:
  """Trains QAT and cases 1 to 3 for every seed and radius, each from its seed's float weights.

  Seed s is a run with `config.seed + s`: its weights, the order of its examples and its
  augmentation are the same for all methods, which makes the methods comparable seed by seed. The
  radius of a case is the best on the validation split; test figures have no part in that.

  Args:
    config: the experiment; `methods` and `saq.case` are not looked at, `saq.rho` neither.
    directory: holds the figures of every method, radius and group of seeds as soon as they are
      known; those that are there are not trained again.
    stop: asks to leave between two steps.

  Returns:
    All figures, and the radii chosen.

  Raises:
    ConfigError: for less than two seeds, no radius, splits that overlap, given weights, several
      processes, or a batch larger than the data.
    PreemptedError: if it was asked to stop; at most one method of one group is to be repeated.
    DivergedError: if the float stage, QAT, or a case at every radius has a loss that is not finite.
  """
  train, validation, test = _splits(config)
  jobs = list(_jobs(config))
  progress = _Steps(config, train, jobs, directory, stop)
  trainer = SeedTrainer(config, train, progress.advance)
  scorers = {
    kind: SeedScorer(trainer.stage(kind), train, validation, test, config.compare.sharpness_rho)
    for kind in ('float', 'qat')
  }
  with progress.bar:
    for job in jobs:
      if job.path(directory).exists():
        continue
      weights = None if job.method == 'float' else _load_weights(job.group(directory))
      state = trainer.train(job.method, job.rho, job.seeds, weights)
      if job.method == 'float':
        _save_weights(job.group(directory), (state.params['model'], state.batch_stats))
      scores = scorers['float' if job.method == 'float' else 'qat'].score(state)
      runs = Runs(job.method, job.rho, tuple(job.seeds), **scores)
      write_json(job.path(directory), dataclasses.asdict(runs))
  return _gather(config, jobs, directory)


def choose_rho(validation: Mapping[float, Scores]) -> float:
  """Chooses a radius by what was found on the validation split, which is all it is given.

  Args:
    validation: the scores of each radius, over the same seeds.

  Returns:
    The radius of the highest mean accuracy; of several, that of the lowest mean loss. A radius
    with a loss that is not finite is passed over.

  Raises:
    ValueError: if none is left.

  Example:
    >>> choose_rho({0.1: Scores((0.9, 0.8), (0.3, 0.3)), 0.2: Scores((0.8, 0.9), (0.2, 0.3))})
    0.2
  """
  finite = {rho: scores for rho, scores in validation.items() if scores.finite}
  if not finite:
    raise ValueError('no radius has finite losses only.')

  def rank(rho: float) -> tuple[float, float]:
    scores = finite[rho]
    # Rounded, so that the order of a sum breaks no tie.
    return -round(math.fsum(scores.accuracy), 9), math.fsum(scores.loss)

  return min(finite, key=rank)


class _Steps:
  """The progress line, which counts the steps of all jobs, and the wish to stop."""

  def __init__(
    self,
    config: ExperimentConfig,
    train: Dataset,
    jobs: list[_Job],
    directory: Path,
    stop: Stop,
  ) -> None:
    plain = SeedTrainer(config, train, print)
    steps = {kind: plain.stage(kind).total_steps for kind in ('float', 'qat')}
    each = [(job, steps['float' if job.method == 'float' else 'qat']) for job in jobs]
    self._done = sum(count for job, count in each if job.path(directory).exists())
    self._stop, self._jobs, self._directory = stop, jobs, directory
    self.bar = Progress('compare', sum(count for _, count in each), self._done)

  def advance(self, loss: float | None) -> None:
    """Counts a step, and stops if asked to."""
    self._done += 1
    self.bar.update(self._done, **({} if loss is None else {'loss': loss}))
    if self._stop.requested:
      finished = sum(job.path(self._directory).exists() for job in self._jobs)
      raise PreemptedError(
        f'{self._stop.reason}: stopped the comparison with {finished} of {len(self._jobs)} parts '
        'finished and saved; the same command goes on from there.'
      )


def _splits(config: ExperimentConfig) -> tuple[Dataset, Dataset, Dataset]:
  """The three splits, after all checks of the settings that need no training."""
  settings, data = config.compare, config.data
  if settings.seeds < 2:
    raise ConfigError(f'config.compare.seeds={settings.seeds}: a comparison needs at least 2.')
  if not settings.rhos:
    raise ConfigError('config.compare.rhos=(): name at least one radius.')
  if config.init_from is not None:
    raise ConfigError('config.init_from: a comparison trains its own weights, one set a seed.')
  if config.saq.perturbation != 'batch':
    raise ConfigError('config.saq.perturbation: a comparison perturbs by the whole batch.')
  if jax.process_count() > 1:
    raise ConfigError('config.compare.seeds: a comparison runs in a single process.')
  train, test = load_splits(config)
  require_enough(config, train)
  require_perturbed(config, train)
  if data.batch_size % (parts := parts_of_batch(config)):
    raise ConfigError(
      f'config.data.batch_size={data.batch_size}: must be a multiple of {parts}, for accumulate.'
    )
  try:
    validation = load_split(config, settings.validation_split)
  except (ValueError, OSError) as error:
    raise ConfigError(f'config.compare.validation_split: {error}') from error
  infos = open_builder(data.name, data.data_dir).info.splits
  for split in data.splits:
    if _examples_of(split, infos) & _examples_of(settings.validation_split, infos):
      raise ConfigError(
        f'config.compare.validation_split={settings.validation_split!r} overlaps {split!r}: '
        "train on a part, as in --config.data.train_split='train[:80%]', and validate on the rest."
      )
  return train, validation, test


def _examples_of(split: str, infos: Any) -> set[tuple[str, int]]:
  """The examples of a split in tfds's notation, by the name and place they are stored under."""
  parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
  return {
    (part.splitname, index)
    for part in parts
    for index in range(*slice(part.from_, part.to).indices(infos[part.splitname].num_examples))
  }


def _jobs(config: ExperimentConfig) -> Iterator[_Job]:
  """All that is to be trained, group of seeds by group of seeds."""
  settings = config.compare
  for first in range(0, settings.seeds, settings.seeds_at_once):
    seeds = tuple(range(first, min(first + settings.seeds_at_once, settings.seeds)))
    yield _Job('float', 0.0, seeds)
    yield _Job('qat', 0.0, seeds)
    for method in CASES:
      for rho in dict.fromkeys(settings.rhos):
        yield _Job(method, rho, seeds)


def _save_weights(group: Path, weights: Weights) -> None:
  """Saves the float weights of a group of seeds, whole or not at all."""
  with Checkpoints(group / 'float') as checkpoints:
    checkpoints.save(0, dict(zip(('model', 'batch_stats'), weights)))


def _load_weights(group: Path) -> Weights:
  """Reads them back; always from the disk, so that a resumed run is the same as any other."""
  model, batch_stats = restore_subtrees(group / 'float', 'model', 'batch_stats')
  return model, batch_stats


def _gather(config: ExperimentConfig, jobs: list[_Job], directory: Path) -> Comparison:
  """Puts the groups of seeds together and chooses the radii."""
  parts: dict[str, dict[float, Runs]] = {}
  for job in jobs:
    part = Runs.from_json(json.loads(job.path(directory).read_text(encoding='utf-8')))
    radii = parts.setdefault(job.method, {})
    radii[job.rho] = radii[job.rho].joined(part) if job.rho in radii else part
  chosen = {}
  for method, radii in parts.items():
    try:
      best = choose_rho({rho: runs.validation for rho, runs in radii.items() if runs.finite})
    except ValueError:
      radii_too = ' or the radii in compare.rhos' if method in CASES else ''
      raise DivergedError(
        f'{method}: a loss is not finite, whatever was tried. Lower the learning rate{radii_too}, '
        'or set clip_norm, and start in another --workdir.'
      ) from None
    chosen[method] = radii[best]
  return Comparison(
    floating=chosen.pop('float'),
    tried={method: tuple(parts[method].values()) for method in METHODS},
    chosen=chosen,
    sharpness_rho=config.compare.sharpness_rho,
  )

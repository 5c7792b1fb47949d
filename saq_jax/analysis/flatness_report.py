"""The flatness report of a run: opens it, measures every network, writes the page and the JSON."""

import dataclasses
import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saq_jax._version import __version__
from saq_jax.analysis.flatness import Plan, measure
from saq_jax.analysis.flatness_page import write_page
from saq_jax.analysis.flatness_plot import draw_all
from saq_jax.analysis.flatness_run import find_stages, first_batches, open_stage, read_settings
from saq_jax.training.progress import Progress
from saq_jax.training.workdir import WorkdirError

PAGE, FIGURES = 'flatness.html', 'flatness.json'


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be reported on.

  Attributes:
    workdir: of the run.
    output: the directory that is written to.
    stages: names of stages; () for all that have a checkpoint.
    examples: training examples to measure on.
    batch: examples at a time.
    data_dir: where the data lie; None for where the run had them.
    plan: what is measured.
  """

  workdir: Path
  output: Path
  stages: tuple[str, ...] = ()
  examples: int = 512
  batch: int = 128
  data_dir: str | None = None
  plan: Plan = dataclasses.field(default_factory=Plan)


def report_flatness(request: Request, command: str) -> dict[str, Path]:
  """Measures the networks of a run and writes the report, each file whole or not at all.

  Args:
    request: the run, and what is measured.
    command: as it was typed, for the page.

  Returns:
    The paths: 'page' and 'figures'.

  Raises:
    WorkdirError: if the work directory is none, has no such stage, or the output cannot be written.
    ConfigError: if its settings or its data cannot be read.
    DamagedCheckpointError, RecordError: if a checkpoint or an image cannot be read.
    OSError: if the disk does not take the files.
  """
  config = read_settings(request.workdir, request.data_dir)
  names = find_stages(request.workdir, request.stages)
  _require_writable(request.output)
  train, batches = first_batches(config, request.examples, request.batch)
  plan, stages = request.plan, []
  with Progress('flatness', plan.passes * len(names)) as progress:
    for k, name in enumerate(names):
      trained = open_stage(config, request.workdir, name, train)
      count = _Counter(progress, k * plan.passes, (k + 1) * plan.passes)
      stages.append(measure(trained, batches, plan, count))
      count.finish()
  report = {
    'title': f'Flatness of {request.workdir.resolve().name}',
    'command': command,
    'json': FIGURES,
    'versions': {
      'saq_jax': __version__,
      'jax': jax.__version__,
      'numpy': np.__version__,
      'Python': platform.python_version(),
    },
    'device': jax.devices()[0].device_kind,
    'seed': plan.seed,
    'split': config.data.splits[0],
    'examples': stages[0]['examples'],
    'stages': stages,
  }
  page = write_page(report, draw_all(stages))
  return {
    'page': _write(request.output / PAGE, page),
    'figures': _write(request.output / FIGURES, json.dumps(_plain(report), indent=1) + '\n'),
  }


class _Counter:
  """Adds up passes over the examples, within the share of one network."""

  def __init__(self, progress: Progress, start: int, end: int) -> None:
    self._progress, self._done, self._end = progress, start, end

  def __call__(self, passes: int) -> None:
    self._done = min(self._done + passes, self._end)
    self._progress.update(self._done)

  def finish(self) -> None:
    """An iteration may have ended early."""
    self(self._end - self._done)


def _require_writable(folder: Path) -> None:
  """Makes the output directory, and raises WorkdirError if a file cannot be made in it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise WorkdirError(
      f'{folder} cannot be written ({error.strerror or error}): name another --output.'
    ) from None


def _plain(value: Any) -> Any:
  """A value for JSON, which knows nothing that is not finite."""
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> Path:
  """Writes a file beside its place and moves it there in one go."""
  beside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  beside.write_text(text, encoding='utf-8')
  return beside.replace(path)

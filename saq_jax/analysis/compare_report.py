"""The report of a comparison over seeds: its tables, its figures as JSON, and its picture."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.table import Table

from saq_jax.analysis.compare_plot import save_plot
from saq_jax.analysis.comparison import LABELS, METHODS, Comparison, Difference, Runs
from saq_jax.analysis.statistics import Interval, mean_interval
from saq_jax.training.workdir import write_json

Cells = list[list[str]]
Titled = tuple[str, tuple[str, ...], Cells]

_METHODS_HEADER = ('Method', 'rho', 'Test accuracy', 'Train loss', 'Sharpness', 'Against QAT')
_PAIRS_HEADER = ('Compared', 'Difference', '95 % interval', 'p', 'Seeds +/=/-', 'Finding')


def comparison_tables(comparison: Comparison) -> list[Table]:
  """Makes the tables of a comparison for a terminal.

  Args:
    comparison: all its figures.

  Returns:
    Means by method, paired differences of accuracy, and those of sharpness.
  """
  return [
    _rich(title, header, rows) for title, header, rows in _tables(comparison, with_tried=False)
  ]


def write_comparison(comparison: Comparison, directory: Path, title: str) -> dict[str, Path]:
  """Writes the report; all of it is made anew from the comparison.

  Args:
    comparison: what was found.
    directory: where to write.
    title: of the report.

  Returns:
    The paths: 'results' (comparison.json: every figure of every seed and radius), 'picture'
    (comparison.png) and 'report' (comparison.md: the tables and the picture).
  """
  paths = {
    'results': directory / 'comparison.json',
    'picture': directory / 'comparison.png',
    'report': directory / 'comparison.md',
  }
  write_json(paths['results'], _figures(comparison, title))
  save_plot(comparison, paths['picture'])
  sections = [f'# {title}', f'![Accuracy, differences and sharpness]({paths["picture"].name})']
  for caption, header, rows in _tables(comparison, with_tried=True):
    sections += [f'## {caption}', _markdown(header, rows)]
  sections.append(f'**How to read it.** {_how_to_read(comparison)}')
  paths['report'].write_text('\n\n'.join(sections) + '\n', encoding='utf-8')
  return paths


def _tables(comparison: Comparison, *, with_tried: bool) -> list[Titled]:
  """Title, header and cells of every table."""
  seeds = len(comparison.floating.seeds)
  tables: list[Titled] = [
    (
      f'Means over {seeds} seeds with 95 % intervals',
      _METHODS_HEADER,
      [_method_row(comparison, runs) for runs in comparison.rows],
    ),
    (
      'Test accuracy, paired by seed, in percentage points',
      _PAIRS_HEADER,
      [_pair_row(d, 100, 2) for d in comparison.differences('accuracy')],
    ),
    (
      f'Sharpness at rho = {comparison.sharpness_rho:g}, paired by seed',
      _PAIRS_HEADER,
      [_pair_row(d, 1, 4) for d in comparison.differences('sharpness')],
    ),
  ]
  if with_tried:
    tables.append(
      (
        'Radii tried, and what the choice was made by',
        ('Method', 'rho', 'Validation accuracy', 'Validation loss', 'Chosen'),
        [
          _tried_row(runs, runs is comparison.chosen[method])
          for method in METHODS
          for runs in comparison.tried[method]
          if method != 'qat'
        ],
      )
    )
  return tables


def _method_row(comparison: Comparison, runs: Runs) -> list[str]:
  """One method: its means and intervals."""
  flatter = ''
  if runs.method in METHODS[1:]:
    to_qat = next(d for d in comparison.differences('sharpness') if d.first == runs.method)
    ours, theirs = (comparison.interval(m, 'sharpness').mean for m in (runs.method, 'qat'))
    flatter = to_qat.finding
    if to_qat.shown and min(ours, theirs) > 0:
      flatter = f'{max(ours, theirs) / min(ours, theirs):.2f}x {flatter}'
  floating = runs.method == 'float'
  return [
    LABELS[runs.method],
    f'{runs.rho:g}' if runs.rho else '',
    _interval(mean_interval(runs.test.accuracy), 100, '.2f') + ' %',
    f'{mean_interval(runs.train_loss).mean:.4f}',
    # That of other weights, not rounded to a grid, would not compare.
    '' if floating else _interval(mean_interval(runs.sharpness), 1, '.4f'),
    flatter,
  ]


def _pair_row(difference: Difference, unit: float, digits: int) -> list[str]:
  """One pair of methods: by how much they differ, and whether that is shown."""
  found = difference.paired
  ends = found.difference
  return [
    f'{LABELS[difference.first]} - {LABELS[difference.second]}'.replace(' (SAQ)', ''),
    _signed(unit * ends.mean, digits),
    f'{_signed(unit * ends.low, digits)} to {_signed(unit * ends.high, digits)}',
    f'{found.p:.3f}' if found.p >= 0.0005 else '< 0.001',
    f'{found.above}/{found.equal}/{found.below}',
    difference.finding,
  ]


def _tried_row(runs: Runs, chosen: bool) -> list[str]:
  """One radius: its validation figures, and whether it was taken."""
  accuracy = math.fsum(runs.validation.accuracy) / len(runs.seeds)
  loss = math.fsum(runs.validation.loss) / len(runs.seeds)
  return [
    LABELS[runs.method],
    f'{runs.rho:g}',
    f'{100 * accuracy:.2f} %',
    f'{loss:.4f}',
    'yes' if chosen else '',
  ]


def _interval(interval: Interval, unit: float, form: str) -> str:
  """A mean and the half of its interval."""
  half = interval.high - interval.mean
  return f'{unit * interval.mean:{form}} ± {unit * half:{form}}'


def _signed(value: float, digits: int) -> str:
  """A number with its sign, and zero without."""
  return f'{value:+.{digits}f}' if round(value, digits) else f'{0:.{digits}f}'


def _how_to_read(comparison: Comparison) -> str:
  """What the figures mean, and what they do not show."""
  pairs = len(comparison.differences('accuracy'))
  return (
    f'Each of the {len(comparison.floating.seeds)} seeds has its own weights, order of examples '
    'and augmentation, the same for all methods, and all methods start from its float weights. '
    "Intervals are Student's at 95 % over the seeds: they hold for other seeds on these same "
    'data, not for other data. Differences are taken seed by seed; p is of the '
    f'paired t-test. A difference counts as shown where p is below {0.05 / pairs:.2g}: 5 % over '
    f'the {pairs} pairs of a table. Intervals are not widened for that. The radius of each case '
    'was chosen by the validation split; the test split had no part in it. All methods take the '
    'same number of steps; one of a case costs two gradients, or fewer with `config.strategy`, one '
    'of QAT costs one. Sharpness is the change of the mean training loss, in evaluation mode and '
    f'without augmentation, after one ascent step of length {comparison.sharpness_rho:g} from the '
    'quantized weights, the same for all; with straight-through gradients that step need not '
    'ascend.'
  )


def _figures(comparison: Comparison, title: str) -> dict[str, Any]:
  """Every figure, for JSON."""
  summary = {
    method: {
      'rho': comparison.chosen[method].rho,
      'test_accuracy': dataclasses.asdict(comparison.interval(method, 'accuracy')),
      'sharpness': dataclasses.asdict(comparison.interval(method, 'sharpness')),
    }
    for method in METHODS
  }
  differences = [
    {**dataclasses.asdict(d), 'finding': d.finding}
    for figure in ('accuracy', 'sharpness')
    for d in comparison.differences(figure)
  ]
  tried = [runs for method in METHODS for runs in comparison.tried[method]]
  value = {
    'title': title,
    'sharpness_rho': comparison.sharpness_rho,
    'summary': summary,
    'differences': differences,
    'runs': [dataclasses.asdict(runs) for runs in (comparison.floating, *tried)],
  }
  return _plain(value)


def _plain(value: Any) -> Any:
  """The value with None for numbers that JSON does not know."""
  if isinstance(value, dict):
    return {key: _plain(x) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(x) for x in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _rich(title: str, header: Sequence[str], rows: Cells) -> Table:
  """A table for a terminal."""
  table = Table(title=title, title_justify='left', box=rich.box.SIMPLE_HEAD)
  for name in header:
    left = name in (header[0], 'Finding')
    table.add_column(name, justify='left' if left else 'right', no_wrap=True)
  for row in rows:
    table.add_row(*row)
  return table


def _markdown(header: Sequence[str], rows: Cells) -> str:
  """The same table in Markdown."""
  lines = ['| ' + ' | '.join(header) + ' |', '|:--|' + '--:|' * (len(header) - 1)]
  return '\n'.join([*lines, *('| ' + ' | '.join(row) + ' |' for row in rows)])

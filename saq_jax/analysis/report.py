"""The report of an experiment: its table, its learning curves, and all of its figures."""

import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import rich.box
from rich.markup import escape
from rich.table import Table

from saq_jax.analysis.curves import STYLE, draw_curves
from saq_jax.analysis.results import Result, human, wilson_interval

_HEADER = ('Network', 'Bits W/A', 'Test accuracy', 'Loss', 'Size', 'BOPs')
_HOW_TO_READ = (
  'Accuracy is over all test examples, with its 95 % Wilson interval and the number of right '
  'answers: networks whose intervals overlap widely are not told apart by a test of this size. '
  'Size is what inference holds: quantized weights at their bit-width; biases, norms, running '
  'statistics and scales at 32 bits. BOPs are the bit operations for one image: '
  'multiply-accumulates times the bits of both operands. Ratios are against the network of full '
  'precision. In the picture each training loss is also '
  'smoothed over a twentieth of its steps, and networks of one size stand side by side.'
)


def results_table(results: Sequence[Result]) -> Table:
  """Makes the table of some results for a terminal; ratios are against full precision.

  Args:
    results: in the order of their rows.

  Returns:
    A table that fits 80 columns.
  """
  table = Table(box=rich.box.SIMPLE_HEAD)
  for name in _HEADER:
    table.add_column(name, justify='left' if name == _HEADER[0] else 'right', min_width=6)
  for row in _rows(results):
    table.add_row(*('\n[dim]'.join([escape(main), *more]) for main, *more in row))
  return table


def markdown_table(results: Sequence[Result]) -> str:
  """Makes the same table in Markdown, without a newline at its end.

  Args:
    results: in the order of their rows.

  Returns:
    Markdown.
  """
  lines = ['| ' + ' | '.join(_HEADER) + ' |', '|:--|' + '--:|' * (len(_HEADER) - 1)]
  for row in _rows(results):
    cells = [main.replace('|', r'\|') + f' ({", ".join(more)})' * bool(more) for main, *more in row]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def write_report(
  results: Sequence[Result], directory: str | os.PathLike[str], title: str
) -> dict[str, Path]:
  """Writes the report of an experiment; each file is whole or not there at all.

  Args:
    results: one or more, in the order of their rows and colours.
    directory: where to write; created where missing.
    title: of the report.

  Returns:
    The paths: 'results' (results.json: all figures, null where one is not finite), 'report'
    (report.md: the table and the picture) and 'curves' (curves.png).

  Raises:
    ValueError: if there is no result.
  """
  if not results:
    raise ValueError('write_report needs at least one Result')
  folder = Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  figures = {'title': title, 'results': [_figures(result) for result in results]}
  text = '\n\n'.join([
    f'# {title}', markdown_table(results), '![Training loss, test accuracy, size](curves.png)',
    '**How to read it.** ' + _HOW_TO_READ,
  ])  # fmt: skip
  picture = io.BytesIO()
  with mpl.rc_context(STYLE):
    draw_curves(results).savefig(picture, format='png')
  return {
    'results': _write(folder / 'results.json', json.dumps(figures, indent=1).encode()),
    'curves': _write(folder / 'curves.png', picture.getvalue()),
    'report': _write(folder / 'report.md', f'{text}\n'.encode()),
  }


def _rows(results: Sequence[Result]) -> Iterable[list[list[str]]]:
  """The cells of a table: what stands in each, then its details."""
  full = next((result for result in results if result.weight_bits is None), None)
  for result in results:
    low, high = wilson_interval(result.correct, result.examples)
    interval = f'{100 * low:.1f}–{high:.1%}'
    row = [
      [result.label],
      [f'{result.weight_bits or 32}/{result.act_bits or 32}'],
      [f'{result.accuracy:.1%}', interval, f'{result.correct}/{result.examples}'],
      [f'{result.loss:.4f}'],
      [human(result.size_bits / 8, ' ') + 'B', f'{result.size_bits:,} bits'],
      [human(result.bops)],
    ]
    if full is not None and result is not full:
      row[4].append(f'{full.size_bits / result.size_bits:.1f}x smaller')
      row[5].append(f'{full.bops / result.bops:.1f}x fewer')
    yield row


def _figures(result: Result) -> dict[str, Any]:
  """A result for JSON, which knows no numpy and nothing that is not finite."""

  def plain(x: Any) -> Any:
    x = x.item() if hasattr(x, 'item') else x
    return None if isinstance(x, float) and not math.isfinite(x) else x

  fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
  history = [{key: plain(x) for key, x in row.items()} for row in result.history]
  interval = wilson_interval(result.correct, result.examples)
  return {key: plain(x) for key, x in fields.items()} | {'interval': interval, 'history': history}


def _write(path: Path, content: bytes) -> Path:
  """Writes a file beside its place and moves it there in one go."""
  beside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  beside.write_bytes(content)
  return beside.replace(path)

"""The picture of a comparison over seeds: accuracy, differences to QAT, and sharpness."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from saq_jax.analysis.comparison import LABELS, METHODS, Comparison
from saq_jax.analysis.curves import STYLE
from saq_jax.analysis.statistics import Interval

# Of Okabe and Ito's palette, told apart by colour-blind readers; the rows have names too.
_COLOURS = {'qat': '#444444', 'case1': '#0072B2', 'case2': '#D55E00', 'case3': '#009E73'}
_ROWS = {method: -row for row, method in enumerate(METHODS)}


def save_plot(comparison: Comparison, path: Path) -> None:
  """Draws a comparison: a row a method, a dot a seed, the mean and its 95 % interval.

  Args:
    comparison: what was found.
    path: of the PNG.
  """
  with mpl.rc_context(STYLE | {'axes.grid.axis': 'x'}):
    figure = Figure((14, 4.6), dpi=160, layout='constrained')
    FigureCanvasAgg(figure)
    accuracy, difference, sharpness = figure.subplots(1, 3, sharey=True)
    for method in METHODS:
      values = 100 * np.array(comparison.values(method, 'accuracy'))
      _row(accuracy, method, values, _scaled(comparison.interval(method, 'accuracy'), 100), '.2f')
      values = np.array(comparison.values(method, 'sharpness'))
      _row(sharpness, method, values, comparison.interval(method, 'sharpness'), '.4f')
    _draw_differences(difference, comparison)
    seeds = len(comparison.floating.seeds)
    accuracy.set(title=f'Test accuracy, {seeds} seeds', xlabel='%')
    sharpness.set(
      title='Sharpness (less is flatter)',
      xlabel=f'change of the training loss after one step of {comparison.sharpness_rho:g}',
    )
    accuracy.set_yticks(list(_ROWS.values()), [_name(comparison, method) for method in METHODS])
    for axes in (accuracy, difference, sharpness):
      axes.tick_params(axis='y', length=0, labelsize=12)
    accuracy.set_ylim(min(_ROWS.values()) - 0.55, 0.6)
    figure.supxlabel('Dots: seeds. Bars: mean and 95 % interval over the seeds.', fontsize=10)
    figure.savefig(path, format='png')


def _draw_differences(axes: Axes, comparison: Comparison) -> None:
  """Each case less QAT, seed by seed."""
  of_qat = np.array(comparison.values('qat', 'accuracy'))
  axes.axvline(0, color=_COLOURS['qat'], linewidth=1.5)
  axes.text(0, _ROWS['qat'], '  QAT', va='center', color=_COLOURS['qat'])
  for found in comparison.differences('accuracy'):
    if found.second == 'qat':
      values = 100 * (np.array(comparison.values(found.first, 'accuracy')) - of_qat)
      words = f': {found.finding}'
      _row(axes, found.first, values, _scaled(found.paired.difference, 100), '+.2f', words)
  axes.set(title='Test accuracy less that of QAT', xlabel='percentage points, seed by seed')


def _row(
  axes: Axes, method: str, values: np.ndarray, interval: Interval, form: str, words: str = ''
) -> None:
  """The seeds of a method as dots, and above them their mean, its interval and its figure."""
  y, colour = _ROWS[method], _COLOURS[method]
  axes.plot(values, y - _spread(values), 'o', color=colour, markersize=5, alpha=0.5, mew=0)
  axes.errorbar(
    interval.mean,
    y + 0.16,
    xerr=[[interval.mean - interval.low], [interval.high - interval.mean]],
    fmt='D',
    color=colour,
    markersize=6,
    linewidth=2.2,
    capsize=4,
  )
  half = interval.high - interval.mean
  axes.text(
    interval.mean,
    y + 0.27,
    f'{interval.mean:{form}} ± {half:{form.lstrip("+")}}{words}',
    ha='center',
    va='bottom',
    fontsize=10,
    color=colour,
    bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1},
  )


def _spread(values: np.ndarray) -> np.ndarray:
  """How far below its row each dot lies, so that equal and near values do not hide each other."""
  width = max(float(np.ptp(values)), 1e-12) / 30
  below = np.zeros(len(values))
  last: list[float] = []
  for index in np.argsort(values, kind='stable'):
    lane = next((i for i, x in enumerate(last) if values[index] - x > width), len(last))
    last[lane : lane + 1] = [values[index]]
    below[index] = lane
  return 0.08 * below if below.max() < 5 else 0.4 * below / below.max()


def _scaled(interval: Interval, unit: float) -> Interval:
  return Interval(unit * interval.mean, unit * interval.low, unit * interval.high)


def _name(comparison: Comparison, method: str) -> str:
  """A method and its radius."""
  rho = comparison.chosen[method].rho
  return LABELS[method] + (f'\nrho = {rho:g}' if rho else '')

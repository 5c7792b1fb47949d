"""The picture of a study: accuracy less that of QAT, and sharpness over that of QAT, by method."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from study_figures import Study, geometric_mean
from study_plan import METHODS
from study_tables import title_of

from saq_jax.analysis.curves import STYLE

# Of Okabe and Ito's palette, told apart by colour-blind readers; the marks differ too.
_MARKS = (('#0072B2', 'o'), ('#D55E00', 's'), ('#009E73', '^'), ('#AA4499', 'v'))
_ALL = '#222222'
_TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)


def save_plot(study: Study, path: Path) -> None:
  """Draws a study: a row a method but QAT, a mark a cell, and the mean of all with its interval.

  Args:
    study: the figures.
    path: of the PNG.
  """
  methods = [method for method in study.methods if method not in ('qat', 'ptq')]
  with mpl.rc_context(STYLE | {'axes.grid.axis': 'x'}):
    figure = Figure((13, 1.9 + 0.46 * len(methods)), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    accuracy, sharpness = figure.subplots(1, 2, sharey=True)
    _draw_accuracy(accuracy, study, methods)
    _draw_sharpness(sharpness, study, methods)
    for axes in (accuracy, sharpness):
      axes.set_ylim(len(methods) - 0.4, -0.6)
      axes.tick_params(axis='y', length=0)
    accuracy.set_yticks(range(len(methods)), [_name(study, method) for method in methods])
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=5, frameon=False, fontsize=10)
    figure.savefig(path, format='png')


def _draw_accuracy(axes: Axes, study: Study, methods: Sequence[str]) -> None:
  """Differences of the test accuracy, in percentage points."""
  overall = study.overall('qat', 'test_accuracy')
  axes.axvline(0, color=_ALL, linewidth=1.2)
  for i, cell in enumerate(study.cells):
    points = []
    for row, method in enumerate(methods):
      places = [place for place in study.places if place[0] == cell]
      found = study.differences(places, 'qat', 'test_accuracy')
      means = [
        found[place, method].paired.difference.mean for place in places if (place, method) in found
      ]
      if len(means) == len(places):
        points.append((100 * math.fsum(means) / len(means), row + _lane(i, study)))
    _marks(axes, points, i, title_of(cell))
  there = [row for row, method in enumerate(methods) if method in overall]
  intervals = [overall[methods[row]].paired.difference for row in there]
  axes.errorbar(
    [100 * interval.mean for interval in intervals],
    there,
    xerr=[[100 * (interval.high - interval.mean) for interval in intervals]] * 2,
    fmt='D',
    color=_ALL,
    markersize=6.5,
    linewidth=2.2,
    capsize=4,
    label='all, with 95 % interval',
    zorder=4,
  )
  axes.set(
    title=f'Test accuracy less that of QAT, {study.seeds} seeds',
    xlabel='percentage points, paired by seed; mean over the bit-widths',
  )


def _draw_sharpness(axes: Axes, study: Study, methods: Sequence[str]) -> None:
  """Ratios of the sharpness."""
  axes.axvline(1, color=_ALL, linewidth=1.2)
  shown: list[float] = [1.0]
  everywhere: dict[int, list[float]] = {row: [] for row in range(len(methods))}
  for i, cell in enumerate(study.cells):
    points = []
    for row, method in enumerate(methods):
      found = [
        study.ratio(place, method, 'sharpness') for place in study.places if place[0] == cell
      ]
      ratios = [ratio for ratio in found if ratio is not None]
      if len(ratios) == len(found):
        points.append((geometric_mean(ratios), row + _lane(i, study)))
        everywhere[row] += ratios
    shown += [x for x, _ in points]
    _marks(axes, points, i, title_of(cell))
  complete = {row: ratios for row, ratios in everywhere.items() if len(ratios) == len(study.places)}
  middle = [geometric_mean(ratios) for ratios in complete.values()]
  axes.plot(middle, list(complete), 'D', color=_ALL, markersize=6.5, zorder=4)
  axes.set(
    xscale='log',
    xlim=(min(shown) / 1.15, max(shown) * 1.15),
    title='Sharpness over that of QAT (left is flatter)',
    xlabel='ratio of means; geometric mean over the bit-widths',
  )
  axes.xaxis.set(major_locator=FixedLocator(_TICKS), minor_locator=NullLocator())
  axes.xaxis.set_major_formatter('{x:g}')


def _marks(axes: Axes, points: Sequence[tuple[float, float]], index: int, label: str) -> None:
  """The points of one cell, (x, y)."""
  colour, mark = _MARKS[index % len(_MARKS)]
  x, y = [point[0] for point in points], [point[1] for point in points]
  axes.plot(x, y, mark, color=colour, markersize=5.5, alpha=0.8, mew=0, label=label)


def _lane(index: int, study: Study) -> float:
  """How far from the middle of its row a cell's mark lies."""
  return 0.15 * (index - (len(study.cells) - 1) / 2)


def _name(study: Study, method: str) -> str:
  """A method and its cost."""
  return f'{METHODS[method].label}  ({study.gradients(method):.3g} gradients)'

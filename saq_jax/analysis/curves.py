"""The picture of an experiment: training loss, test accuracy, and accuracy by size."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from saq_jax.analysis.results import Result, human, wilson_interval

# Okabe and Ito's palette, told apart by colour-blind readers; its light hues last.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#AA4499', '#444444', '#B8860B', '#56B4E9')
_MARKERS = 'osD^vPX'
STYLE: Any = {
  'font.size': 11,
  'axes.titlesize': 12,
  'axes.titlelocation': 'left',
  'axes.titlepad': 10,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': '#888888',
  'axes.labelcolor': '#444444',
  'xtick.color': '#444444',
  'ytick.color': '#444444',
  'axes.grid': True,
  'axes.grid.axis': 'y',
  'axes.axisbelow': True,
  'grid.color': '#E4E4E4',
}

_Curve = tuple[np.ndarray, np.ndarray]
# A point, the ends of its interval, and the side on which its label should stand: -1 or 1.
_Place = tuple[float, float, float, float, int]


def draw_curves(results: Sequence[Result]) -> Figure:
  """The picture: training loss, test accuracy, and accuracy against size.

  Args:
    results: one or more, in the order of their colours.

  Returns:
    A figure to be saved under `matplotlib.rc_context(STYLE)`.
  """
  longest = max(len(result.label) for result in results)
  figure = Figure((11.5 + 0.18 * longest, 4.4), dpi=160, layout='constrained')
  FigureCanvasAgg(figure)
  loss, accuracy, size = figure.subplots(1, 3)
  _draw_loss(loss, results)
  _draw_accuracy(accuracy, results)
  places = _draw_size(size, results)
  figure.draw_without_rendering()  # Where pixels lie is known from here on.
  _label_points(size, places, results)
  return figure


def _draw_loss(axes: Axes, results: Sequence[Result]) -> None:
  """Training loss over the steps, as it was and smoothed."""
  axes.set(title='Training loss', xlabel='step')
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
  curves = [_curve(result, 'step', 'loss') for result in results]
  smooth = [(x, _moving_average(y)) for x, y in curves]
  values = np.concatenate([y for _, y in smooth])
  if values.size and values.min() > 0:
    axes.set(yscale='log', ylim=(values.min() / 1.5, values.max() * 1.5))
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    axes.yaxis.set_major_formatter('{x:g}')
  for i, (x, y) in enumerate(curves):
    axes.plot(x, y, color=_colour(i), alpha=0.15, linewidth=0.8)
  _lines(axes, smooth, results)


def _draw_accuracy(axes: Axes, results: Sequence[Result]) -> None:
  """Test accuracy over the epochs, on the scale of their later half."""
  axes.set(title='Test accuracy', xlabel='epoch')
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
  curves = [_curve(result, 'epoch', 'test_accuracy') for result in results]
  if late := [value for _, y in curves for value in y[len(y) // 2 :]]:
    _limit(axes, min(late), max(late))
  _lines(axes, curves, results)


def _draw_size(axes: Axes, results: Sequence[Result]) -> list[_Place]:
  """Accuracy against size, with its interval; networks of one size stand side by side."""
  axes.set(title='Test accuracy by size, 95 % interval', xlabel='size', xscale='log')
  sizes = np.log10([result.size_bits / 8 for result in results])
  room = min(0.1 + 0.025 * max(len(result.label) for result in results), 0.38)  # For a label.
  half = max(np.ptp(sizes), 0.3) / 2 / (1 - 2 * room)
  middle = (sizes.max() + sizes.min()) / 2
  axes.set_xlim(10 ** (middle - half), 10 ** (middle + half))
  ticks = (1, 2, 5) if half < 0.75 else (1, 3) if half < 1.6 else (1,)
  axes.xaxis.set(major_locator=LogLocator(subs=ticks), minor_locator=NullLocator())
  axes.xaxis.set_major_formatter(lambda size, _: human(size, ' ').replace('.0', '') + 'B')
  places = []
  for i, result in enumerate(results):
    alike = [k for k in np.argsort(sizes, kind='stable') if abs(sizes[k] - sizes[i]) < 0.03 * half]
    aside = alike.index(i) - (len(alike) - 1) / 2
    x = 10 ** (sizes[i] + 0.12 * half * aside)
    low, high = wilson_interval(result.correct, result.examples)
    axes.plot([x, x], [low, high], color=_colour(i), linewidth=1.8, alpha=0.6)
    axes.plot(x, result.accuracy, _MARKERS[i % 7], color=_colour(i), markersize=8)
    places.append((x, result.accuracy, low, high, -1 if aside < 0 else 1))
  _limit(axes, min(place[2] for place in places), max(place[3] for place in places))
  return places


def _label_points(axes: Axes, places: Sequence[_Place], results: Sequence[Result]) -> None:
  """Writes each label at the first free place about its point; none where all are taken."""
  inside, taken = axes.get_window_extent(), []
  for x, y, low, high, _ in places:
    ends = axes.transData.transform([(x, low), (x, y), (x, high)])
    taken += [Bbox(ends[[0, 2]]).padded(4), Bbox(ends[[1, 1]]).padded(14)]
  for i, (x, y, low, high, side) in enumerate(places):
    beside = [(y, dx, dy) for dy in (0, 14, -14) for dx in (11 * side, -11 * side)]
    for at, dx, dy in [*beside, (high, 0, 10), (low, 0, -10), (high, 0, 24), (low, 0, -24)]:
      label = axes.annotate(
        results[i].label,
        (x, at),
        (dx, dy),
        textcoords='offset points',
        color=_colour(i),
        ha=('center', 'left', 'right')[int(np.sign(dx))],
        va='center',
      )
      box = label.get_window_extent()
      free = not any(box.overlaps(other) for other in taken)
      if free and inside.contains(*box.min) and inside.contains(*box.max):
        taken.append(box)
        break
      label.remove()


def _lines(axes: Axes, curves: Sequence[_Curve], results: Sequence[Result]) -> None:
  """Draws a line a result, with its label in the right margin at the height of its end."""
  ends = []
  for i, (x, y) in enumerate(curves):
    if x.size:
      # A curve that others cover exactly is wider, so that it is seen beneath them.
      covers = sum(np.array_equal(y, other) for _, other in curves[i + 1 :])
      line = '--' if i >= len(_COLOURS) else '-'
      axes.plot(x, y, line, color=_colour(i), linewidth=1.8 + 2 * covers)
      end: dict[str, Any] = {'color': _colour(i), 'markersize': 6 + 4 * covers, 'clip_on': False}
      axes.plot(x[-1], y[-1], _MARKERS[i % 7], **end)
      ends.append((i, x[-1], y[-1]))
  if not ends:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, 'not recorded', transform=axes.transAxes, ha='center', color='#666666')
    return
  axes.set_xlim(0, 1.04 * max(1, *(x for _, x, _ in ends)))
  axes.autoscale_view(scalex=False)
  to_axes = axes.transScale + axes.transLimits
  heights = {i: to_axes.transform((x, y))[1] for i, x, y in ends}
  order = sorted(heights, key=lambda i: heights[i])
  for i, height in zip(order, _apart([heights[i] for i in order], 0.07)):
    label = axes.text(1.03, height, results[i].label, transform=axes.transAxes, va='center')
    label.set_color(_colour(i))


def _apart(heights: Sequence[float], gap: float) -> list[float]:
  """Ascending heights moved to lie at least `gap` apart, and below 1."""
  up, down = list(heights), list(heights)
  for i in range(1, len(up)):
    up[i] = max(up[i], up[i - 1] + gap)
  for i in reversed(range(len(down) - 1)):
    down[i] = min(down[i], down[i + 1] - gap)
  return [(a + b) / 2 - max((up[-1] + down[-1]) / 2 - 1, 0) for a, b in zip(up, down)]


def _limit(axes: Axes, low: float, high: float) -> None:
  """Shows accuracies from `low` to `high` with room around them, and little above 100 %."""
  pad = max(0.2 * (high - low), 0.005)
  axes.set_ylim(low - pad, min(high + pad, 1 + 0.15 * pad))
  axes.yaxis.set_major_formatter(lambda value, _: f'{round(100 * value, 6):g}%')


def _colour(i: int) -> str:
  """The colour of the i-th result, in every panel."""
  return _COLOURS[i % len(_COLOURS)]


def _curve(result: Result, over: str, name: str) -> _Curve:
  """The finite values of a figure, after where they stand."""
  rows = [(row[over], row[name]) for row in result.history if over in row and name in row]
  points = np.array(rows, float).reshape(-1, 2)
  points = points[np.isfinite(points).all(axis=1)]
  return points[:, 0], points[:, 1]


def _moving_average(y: np.ndarray) -> np.ndarray:
  """The mean of each value and its neighbours, a twentieth of all."""
  if not y.size:
    return y
  window = np.ones(max(len(y) // 20, 1))
  return np.convolve(y, window, 'same') / np.convolve(np.ones_like(y), window, 'same')

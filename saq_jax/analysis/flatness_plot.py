"""The pictures of a flatness report: sharpness, curvature, landscapes, and what rounding does."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from saq_jax.analysis.curves import STYLE

Figures = Sequence[Mapping[str, Any]]

# Of Okabe and Ito's palette, with a marker and a line of their own: told apart without colour.
_LOOK: dict[str, dict[str, Any]] = {
  'float': {'color': '#444444', 'marker': 's', 'linestyle': ':'},
  'qat': {'color': '#0072B2', 'marker': 'o', 'linestyle': '-'},
  'saq': {'color': '#D55E00', 'marker': 'D', 'linestyle': '--'},
}
_STYLE: Any = {**STYLE, 'svg.fonttype': 'path', 'svg.hashsalt': 'saq_jax', 'lines.markersize': 5}
_WIDTH, _HEIGHT = 10.0, 3.9
_NAMED_LAYERS = 16


def draw_all(stages: Figures) -> dict[str, str]:
  """Draws every picture that there are figures for.

  Args:
    stages: the figures of each stage, of `flatness.measure`.

  Returns:
    SVG documents by name: 'sharpness', 'curvature', 'line', 'plane'; where a stage is quantized
    'diminishment' and 'mismatch', and where its codes were followed 'oscillation'.
  """
  quantized = [stage for stage in stages if stage['diminishment'] is not None]
  followed = [stage for stage in stages if stage['oscillation'] is not None]
  drawings: dict[str, tuple[Callable[[Figures], Figure], Figures]] = {
    'sharpness': (_sharpness, stages),
    'curvature': (_curvature, stages),
    'line': (_line, stages),
    'plane': (_plane, stages),
    'diminishment': (_diminishment, quantized),
    'mismatch': (_mismatch, quantized),
    'oscillation': (_oscillation, followed),
  }
  with mpl.rc_context(_STYLE):
    return {name: _svg(draw(chosen)) for name, (draw, chosen) in drawings.items() if chosen}


def _svg(figure: Figure) -> str:
  """A figure as text, without the date, so that the same figures give the same file."""
  file = io.StringIO()
  figure.savefig(file, format='svg', metadata={'Date': None})
  return file.getvalue()


def _panels(
  count: int, height: float = _HEIGHT, width: float = _WIDTH
) -> tuple[Figure, list[Axes]]:
  """A figure of so many panels side by side."""
  figure = Figure((width, height), layout='constrained')
  FigureCanvasAgg(figure)
  figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
  return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _look(stage: Mapping[str, Any], **more: Any) -> dict[str, Any]:
  """How the lines of a stage are drawn."""
  return {**_LOOK[stage['name']], 'label': stage['label'], 'linewidth': 1.8, **more}


def _legend(figure: Figure, axes: Axes) -> None:
  """One legend for all panels, above them."""
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper left', ncols=4, frameon=False)


def _log_x(axes: Axes, values: Sequence[float]) -> None:
  """A logarithmic axis with plain numbers at the values that were measured."""
  axes.set_xscale('log')
  axes.set_xticks(list(values), [f'{value:g}' for value in values])
  axes.xaxis.set_minor_formatter(NullFormatter())
  axes.minorticks_off()


def _log_y(axes: Axes, values: Sequence[float]) -> None:
  """A logarithmic axis where all values are above 0, with plain numbers."""
  values = [value for value in values if math.isfinite(value)]
  if values and min(values) > 0:
    axes.set_yscale('log')
    wide = max(values) / min(values) > 300
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.yaxis.set_minor_formatter(NullFormatter())
  else:
    axes.axhline(0, color='#888888', linewidth=0.8)


def _sharpness(stages: Figures) -> Figure:
  """The rise of the loss over the radius, plain and scale-invariant."""
  figure, panels = _panels(2)
  kinds = ('sharpness', 'Rise of the loss'), ('adaptive_sharpness', 'Scale-invariant (ASAM)')
  for axes, (kind, title) in zip(panels, kinds):
    for stage in stages:
      x, y = ([point[key] for point in stage[kind]] for key in ('rho', 'rise'))
      axes.plot(x, y, **_look(stage))
    _log_x(axes, [point['rho'] for point in stages[0][kind]])
    _log_y(axes, [point['rise'] for stage in stages for point in stage[kind]])
    axes.set(title=title, xlabel='radius ρ', ylabel='loss(z + ε) − loss(z)')
  _legend(figure, panels[0])
  return figure


def _curvature(stages: Figures) -> Figure:
  """The largest eigenvalues of the Hessian, and its trace."""
  figure, (values, trace) = _panels(2)
  for i, stage in enumerate(stages):
    found = stage['eigenvalues']
    aside = 0.14 * (i - (len(stages) - 1) / 2)
    look = _look(stage, linestyle='none', capsize=3)
    values.errorbar(
      [k + 1 + aside for k in range(len(found))],
      [pair['value'] for pair in found],
      [pair['residual'] for pair in found],
      **look,
    )
    trace.errorbar([i], [stage['trace']['mean']], [stage['trace']['standard_error']], **look)
    trace.annotate(
      f'{stage["trace"]["mean"]:.3g}', (i, stage['trace']['mean']), (9, 0),
      textcoords='offset points', va='center', color=look['color'],
    )  # fmt: skip
  values.set(title='Largest Hessian eigenvalues', xlabel='rank by size', ylabel='eigenvalue')
  values.xaxis.set_major_locator(MaxNLocator(integer=True))
  trace.set(title='Hessian trace', ylabel='trace ± standard error')
  trace.set_xticks(range(len(stages)), [stage['label'] for stage in stages])
  trace.set_xlim(-0.6, len(stages) - 0.3)
  for axes in (values, trace):
    axes.axhline(0, color='#888888', linewidth=0.8)
  _legend(figure, values)
  return figure


def _line(stages: Figures) -> Figure:
  """The loss along the gradient, and along a random direction."""
  figure, panels = _panels(2)
  words = {
    'gradient': ('Along the gradient', 'distance from the trained weights'),
    'random': ('Along a random direction', 'share of each filter’s norm'),
  }
  for axes, (kind, (title, xlabel)) in zip(panels, words.items()):
    for stage in stages:
      line = stage['line'][kind]
      axes.plot(line['radii'], line['loss'], **_look(stage, markersize=3.5))
    axes.axvline(0, color='#888888', linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'.replace('-', '−')))
    axes.set(title=title, xlabel=xlabel, ylabel='loss')
    _log_y(axes, [y for stage in stages for y in stage['line'][kind]['loss']])
  _legend(figure, panels[0])
  return figure


def _plane(stages: Figures) -> Figure:
  """The loss in a plane of two random directions, with one scale of colours for all stages."""
  count = len(stages)
  figure, panels = _panels(count, 3.1 if count > 2 else 4.2, _WIDTH if count > 1 else 5.4)
  losses = [np.asarray(stage['plane']['loss'], float) for stage in stages]
  finite = np.concatenate([[1.0], *(loss[np.isfinite(loss)] for loss in losses)])
  low, high = max(finite[1:].min(initial=1.0), 1e-6), max(finite[1:].max(initial=0.0), 2e-6)
  levels = np.geomspace(low, high * 1.0001, 13) if high > 1.01 * low else [low, 1.02 * low]
  filled = None
  for axes, stage, loss in zip(panels, stages, losses):
    radii, loss = stage['plane']['radii'], np.clip(np.nan_to_num(loss, nan=high), low, high).T
    norm = LogNorm(levels[0], levels[-1])
    filled = axes.contourf(radii, radii, loss, levels, norm=norm, cmap='cividis_r')
    axes.contour(radii, radii, loss, levels, colors='white', linewidths=0.5)
    axes.plot(0, 0, '+', color='#D55E00', markersize=11, markeredgewidth=2)
    axes.set(title=stage['label'], xlabel='direction 1', aspect='equal')
    axes.grid(visible=False)
  panels[0].set_ylabel('direction 2')
  bar = figure.colorbar(filled, ax=panels, label='loss', pad=0.02)  # type: ignore[arg-type]
  bar.set_ticks(list(levels[::3]), labels=[f'{float(f"{level:.2g}"):g}' for level in levels[::3]])
  bar.minorticks_off()
  return figure


def _diminishment(stages: Figures) -> Figure:
  """What rounding leaves of a perturbation, over its radius."""
  figure, (flips, norms) = _panels(2)
  for stage in stages:
    points = stage['diminishment']
    rho = [point['rho'] for point in points]
    flips.plot(rho, [100 * point['flipped'] for point in points], **_look(stage))
    norms.plot(rho, [point['seen'] for point in points], **_look(stage))
  added = [point['added'] for point in stages[0]['diminishment']]
  norms.plot(rho, added, color='#888888', linewidth=1.2)
  middle = len(rho) // 2
  norms.annotate('what was added', (rho[middle], added[middle]), (8, -12), color='#666666',
                 textcoords='offset points', va='center')  # fmt: skip
  flips.set(title='Codes that change', xlabel='radius ρ', ylabel='% of the codes', ylim=(0, None))
  norms.set(title='What the loss sees', xlabel='radius ρ', ylabel='|Q(w + ε) − Q(w)|')
  for axes in (flips, norms):
    _log_x(axes, rho)
  seen = [point['seen'] for stage in stages for point in stage['diminishment']]
  _log_y(norms, seen + added)
  _legend(figure, flips)
  return figure


def _mismatch(stages: Figures) -> Figure:
  """The angle between the gradients at the quantized and at the latent weights, by layer."""
  figure, (axes,) = _panels(1)
  layers = list(stages[0]['mismatch']['by_path'])
  for i, stage in enumerate(stages):
    found = stage['mismatch']
    aside = 0.1 * (i - (len(stages) - 1) / 2)
    at = [k + aside for k in range(len(layers))]
    look = _look(stage, linestyle='none', clip_on=False, zorder=3)
    axes.plot(at, list(found['by_path'].values()), **look)
    axes.axhline(
      found['degrees'], color=_LOOK[stage['name']]['color'],
      linestyle=_LOOK[stage['name']]['linestyle'], linewidth=1.2,
    )  # fmt: skip
  axes.set(title='Angle of each layer (points), and of all together (lines)', ylabel='degrees')
  axes.set_ylim(0, None)
  if len(layers) <= _NAMED_LAYERS:
    names = [path.removesuffix('/kernel') for path in layers]
    axes.set_xticks(range(len(layers)), names, rotation=35, ha='right', rotation_mode='anchor')
  else:
    axes.set_xlabel('layer, in the order of its path')
  _legend(figure, axes)
  return figure


def _oscillation(stages: Figures) -> Figure:
  """How many codes change and swing, over the steps of training."""
  figure, panels = _panels(2)
  words = {'changed': 'Codes that changed in a step', 'oscillating': 'Codes that oscillate'}
  for axes, (key, title) in zip(panels, words.items()):
    for stage in stages:
      found = stage['oscillation']
      values = [100 * value for value in found[key]]
      axes.plot(found['step'], values, **_look(stage, marker=''))
    axes.set(title=title, xlabel='step', ylabel='% of the codes', ylim=(0, None))
  _legend(figure, panels[0])
  return figure

"""The page of a flatness report: one HTML file with its pictures, tables and words inside."""

import base64
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .4rem; }
p { max-width: 46rem; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th { background: #f4f4f4; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; } summary { cursor: pointer; color: #0072b2; }
details { margin: .3rem 0 1rem; } code { background: #f4f4f4; padding: .1rem .3rem;
  overflow-wrap: anywhere; } .note { border-left: 4px solid #b8860b; padding: .2rem 0 .2rem 1rem; }
"""
# What a section is called, and what its picture shows, in the order of the page.
_SECTIONS = {
  'sharpness': (
    'Sharpness',
    'How much the mean loss rises when the weights that the network computes with are moved one '
    'step of length ρ up the gradient: ε = ρ g/|g|, over weights, biases and norms. Less is '
    'flatter. On the right each weight moves in proportion to its own size, so that networks '
    'which differ only in the scale of their weights get about the same figure (ASAM with η = '
    '0.01; its radii are ten times as large). Where activations are quantized the gradient is the '
    'straight-through one, which need not lead uphill: the rise may be below 0.',
  ),
  'curvature': (
    'Curvature',
    'Left: the largest eigenvalues of the Hessian, the curvature of the loss in its steepest '
    'directions; the bars are the residuals |Hv − λv|, within which an eigenvalue lies. A bar as '
    'long as its value says that the iteration has not found it. Right: the trace, the sum of all '
    'eigenvalues, estimated from random vectors, with its standard error. Less is flatter. Both '
    'follow straight-through gradients where activations are quantized.',
  ),
  'line': (
    'The loss along a line',
    'Left: along the normalised gradient, to both sides; at distance ρ to the right it has risen '
    'by the sharpness above. Right: along one random direction in which each filter has the norm '
    'of the network’s own filter, so that 1 changes every filter by its own size. A wide, low '
    'valley is flat.',
  ),
  'plane': (
    'The loss in a plane',
    'Two random directions, each filter scaled to the norm of the network’s own. The cross is the '
    'trained network. Yellow is a low loss and dark blue a high one, on one logarithmic scale for '
    'all pictures. A wide yellow valley is flat.',
  ),
  'diminishment': (
    'Diminishment: a perturbation before rounding',
    'Case 2 of SAQ adds its perturbation ε = ρ p/|p| to the latent weights, before they are '
    'rounded. Left: the share of the integer codes that change at all; the other weights do not '
    'move. Right: the norm of what the loss sees of it, against what was added to the quantized '
    'layers (grey). Far above the grey line: few weights moved, each by a whole step of the '
    'grid. (Where a quantizer normalises weights the loss sees them on another scale, which moves '
    'the curves as a whole.) SAQ itself, Case 3, adds ε after rounding, and the loss sees all of '
    'it.',
  ),
  'mismatch': (
    'Mismatch: the gradient before and after the straight-through estimator',
    'The angle between the gradient at the quantized weights and what the straight-through '
    'estimator makes of it for the latent weights, along which Case 1 perturbs. 0° is no '
    'mismatch. A layer is turned where its weights are clipped. All layers together (lines) are '
    'turned also where the estimator multiplies each layer by a number of its own, as the '
    'normalisation of weights does.',
  ),
  'oscillation': (
    'Oscillation during training',
    'Left: the share of the integer codes that changed in a step. Right: the share that '
    'oscillates, that is, whose moving average of changes back and forth is above the threshold '
    '(Nagel et al., 2022). Codes that still swing at the end hold weights at the border between '
    'two values.',
  ),
}


def write_page(report: Report, pictures: Mapping[str, str]) -> str:
  """Makes the page; it holds all that it shows and loads nothing.

  Args:
    report: the figures: 'title', 'stages' and what `flatness.measure_run` puts beside them.
    pictures: SVG documents by the name of their section.

  Returns:
    An HTML document.
  """
  stages = report['stages']
  sections = ''.join(
    f'<h2>{title}</h2>\n<p>{words}</p>\n{_image(pictures[name], title)}\n{_details(name, stages)}'
    for name, (title, words) in _SECTIONS.items()
    if name in pictures
  )
  title = html.escape(report['title'])
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n'
    f'<p>{html.escape(_introduction(report))}</p>\n{_summary(stages)}\n{_notes(report)}'
    f'{sections}\n{_made_by(report)}</body>\n</html>\n'
  )


def _introduction(report: Report) -> str:
  """What was measured on what."""
  return (
    f'How flat the loss is around the trained weights. All figures but the test accuracy are over '
    f'the first {report["examples"]:,} examples of {report["split"]!r}, not augmented, with the '
    'running statistics of the norms, computed in float32.'
  )


def _summary(stages: Sequence[Report]) -> str:
  """The table at the top: a row a stage."""
  rho = stages[0]['sharpness'][_middle(stages[0]['sharpness'])]['rho']
  header = [
    'Network', 'Loss', 'Accuracy', 'Test accuracy', f'Sharpness, ρ = {rho:g}', 'λ max', 'Trace',
    'Mismatch',
  ]  # fmt: skip
  rows = []
  for stage in stages:
    test, angle = stage['test_accuracy'], stage['mismatch']
    rows.append([
      stage['label'],
      _number(stage['loss']),
      f'{100 * stage["accuracy"]:.1f} % ({stage["correct"]}/{stage["examples"]})',
      '–' if test is None else f'{100 * test:.1f} %',
      _number(stage['sharpness'][_middle(stage['sharpness'])]['rise']),
      _number(stage['eigenvalues'][0]['value']),
      f'{_number(stage["trace"]["mean"])} ± {stage["trace"]["standard_error"]:.2g}',
      '–' if angle is None else f'{angle["degrees"]:.1f}°',
    ])  # fmt: skip
  return _table(header, rows)


def _notes(report: Report) -> str:
  """What a reader should know before comparing."""
  notes = [
    f'{stage["label"]} was not trained to its end: its newest checkpoint is of step '
    f'{stage["step"]:,} of {stage["total_steps"]:,}.'
    for stage in report['stages']
    if stage['step'] < stage['total_steps']
  ]
  kinds = {stage['diminishment'] is None for stage in report['stages']}
  if len(kinds) == 2:
    notes.append(
      'Compare the quantized networks with each other. A quantizer that normalises weights gives '
      'them another scale than full precision has, which changes every figure that is not '
      'scale-invariant: the plain sharpness, the Hessian, and the line along the gradient.'
    )
  return ''.join(f'<p class="note">{html.escape(note)}</p>\n' for note in notes)


def _image(svg: str, title: str) -> str:
  """A picture inside the page, apart from its other pictures, whose ids may be the same."""
  code = base64.b64encode(svg.encode()).decode()
  return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{code}">'


def _details(name: str, stages: Sequence[Report]) -> str:
  """The figures of a picture as a table that a reader can open; none for the largest."""
  if name not in _TABLES:
    return ''
  header, rows = _TABLES[name](stages)
  return f'<details><summary>Figures</summary>{_table(header, rows)}</details>\n'


def _sharpness_rows(stages: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
  """A row for each radius."""
  kinds = ('sharpness', ''), ('adaptive_sharpness', 'scale-invariant, ')
  rows = [
    [f'{words}ρ = {point["rho"]:g}', *(_number(stage[kind][k]['rise']) for stage in stages)]
    for kind, words in kinds
    for k, point in enumerate(stages[0][kind])
  ]
  return ['', *(stage['label'] for stage in stages)], rows


def _curvature_rows(stages: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
  """A row for each eigenvalue, and the trace."""
  most = max(len(stage['eigenvalues']) for stage in stages)
  rows = [
    [f'λ {k + 1}', *(_pair(stage['eigenvalues'], k) for stage in stages)] for k in range(most)
  ]
  traces = [stage['trace'] for stage in stages]
  words = [f'{_number(t["mean"])} ± {t["standard_error"]:.2g}' for t in traces]
  return ['', *(stage['label'] for stage in stages)], [*rows, ['trace', *words]]


def _pair(found: Sequence[Report], k: int) -> str:
  """An eigenvalue with its residual."""
  if k >= len(found):
    return '–'
  return f'{_number(found[k]["value"])} (residual {_number(found[k]["residual"])})'


def _diminishment_rows(stages: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
  """A row for each radius of each quantized stage."""
  rows = [
    [
      stage['label'], f'{point["rho"]:g}', f'{100 * point["flipped"]:.2f} %',
      _number(point['added']), _number(point['seen']),
    ]
    for stage in stages
    for point in stage['diminishment'] or ()
  ]  # fmt: skip
  return ['', 'ρ', 'codes that change', 'added', 'seen'], rows


def _mismatch_rows(stages: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
  """A row for each layer."""
  chosen = [stage for stage in stages if stage['mismatch'] is not None]
  rows = [
    [path, *(f'{stage["mismatch"]["by_path"][path]:.2f}°' for stage in chosen)]
    for path in chosen[0]['mismatch']['by_path']
  ]
  rows.append(['all together', *(f'{stage["mismatch"]["degrees"]:.2f}°' for stage in chosen)])
  return ['', *(stage['label'] for stage in chosen)], rows


_TABLES: dict[str, Callable[[Sequence[Report]], tuple[list[str], list[list[str]]]]] = {
  'sharpness': _sharpness_rows,
  'curvature': _curvature_rows,
  'diminishment': _diminishment_rows,
  'mismatch': _mismatch_rows,
}


def _made_by(report: Report) -> str:
  """How to get the same figures again."""
  versions = ', '.join(f'{name} {version}' for name, version in report['versions'].items())
  return (
    '<h2>How this was made</h2>\n'
    f'<p><code>{html.escape(report["command"])}</code></p>\n'
    f'<p>{html.escape(versions)}, on {html.escape(report["device"])}. Seed {report["seed"]}: the '
    'same for all networks, whose random directions are therefore the same draws. All figures '
    f'are in <code>{html.escape(report["json"])}</code> beside this page.</p>\n'
  )


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """An HTML table."""
  head = ''.join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
  body = ''.join(
    '<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>\n' for row in rows
  )
  return (
    f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
    f'<tbody>\n{body}</tbody></table></div>\n'
  )


def _middle(points: Sequence[Any]) -> int:
  """Which of the radii stands in the summary."""
  return len(points) // 2


def _number(value: float) -> str:
  """A figure with three digits; a word where it is not finite."""
  if not math.isfinite(value):
    return 'not finite'
  return f'{value:.3g}'.replace('-', '−')

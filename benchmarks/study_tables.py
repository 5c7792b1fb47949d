"""The tables of a study in Markdown."""

from collections.abc import Sequence

from study_figures import Difference, Place, Study, geometric_mean
from study_plan import ADAPTIVE_ETA, ADAPTIVE_RHO, METHODS, SHARPNESS_RHO, TUNING_BITS, Setting

from saq_jax.analysis.statistics import Interval

NONE = '–'
NETWORKS = {'cnn': 'PreResNet-8', 'vit': 'ViT'}
DATA = {'digits': 'digits', 'hard': 'hard digits'}


def tables(study: Study) -> str:
  """All tables, each with its title.

  Args:
    study: the figures.

  Returns:
    Markdown.
  """
  sections = [
    '### All networks, data and bit-widths together',
    overall_table(study),
    _how_to_read(study),
  ]
  for cell in study.cells:
    places = [(cell, bits) for bits in study.bits]
    sections += [
      f'### {title_of(cell)}',
      'Test accuracy in %:',
      value_table(study, places, 'test_accuracy', 100, 2),
      'Test accuracy less that of QAT, in percentage points, paired by seed:',
      difference_table(study, places, 'qat', 'test_accuracy', 100, 2),
      'Test accuracy less that of SAQ, in percentage points, paired by seed:',
      difference_table(study, places, 'saq', 'test_accuracy', 100, 2),
      'Test loss:',
      value_table(study, places, 'test_loss', 1, 3),
      'Training loss, without augmentation, of the labels that were trained on:',
      value_table(study, places, 'train_loss', 1, 3),
      f'Sharpness at radius {SHARPNESS_RHO:g}, and its ratio to that of QAT:',
      sharpness_table(study, places),
    ]
  sections += [f'### Settings chosen, at {TUNING_BITS} bits', choices_table(study)]
  return '\n\n'.join(sections) + '\n'


def title_of(cell: str) -> str:
  """A cell for a reader.

  Args:
    cell: such as 'cnn-digits'.

  Returns:
    Such as 'PreResNet-8, digits'.
  """
  network, data = cell.split('-')
  return f'{NETWORKS[network]}, {DATA[data]}'


def overall_table(study: Study) -> str:
  """What each method does in the mean over all places.

  Args:
    study: the figures.

  Returns:
    A table: differences to QAT and to SAQ, flatness, gradients a step.
  """
  to_qat = study.overall('qat', 'test_accuracy')
  to_saq = study.overall('saq', 'test_accuracy')
  loss = study.overall('qat', 'test_loss')
  rows = []
  for method in study.methods:
    if method == 'ptq':
      continue
    rows.append(
      [
        label(method),
        _difference(to_qat.get(method), 100, 2),
        _difference(to_saq.get(method), 100, 2),
        _difference(loss.get(method), 1, 4),
        _overall_ratio(study, method, 'sharpness'),
        _overall_ratio(study, method, 'adaptive_sharpness'),
        f'{study.gradients(method):.3f}',
      ]
    )
  header = (
    'Method',
    'Accuracy less QAT',
    'less SAQ',
    'Test loss less QAT',
    'Sharpness / QAT',
    'adaptive',
    'Gradients a step',
  )
  return markdown(header, rows)


def value_table(
  study: Study, places: Sequence[Place], figure: str, unit: float, digits: int
) -> str:
  """The means of a figure with their intervals, a row a method.

  Args:
    study: the figures.
    places: the columns.
    figure: such as 'test_accuracy'.
    unit: what it is multiplied by.
    digits: after the point.

  Returns:
    A table.
  """
  rows = [
    [
      label(method),
      *(_interval(study.interval(place, method, figure), unit, digits) for place in places),
    ]
    for method in ('float', *study.methods)
  ]
  return markdown(('Method', *_columns(places)), rows)


def difference_table(
  study: Study, places: Sequence[Place], against: str, figure: str, unit: float, digits: int
) -> str:
  """Each method less another one, with a star where a difference is shown.

  Args:
    study: the figures.
    places: the columns.
    against: the other method.
    figure: as in `value_table`, like the rest.
    unit: likewise.
    digits: likewise.

  Returns:
    A table, which is one family of tests.
  """
  found = study.differences(places, against, figure)
  rows = [
    [label(method), *(_difference(found.get((place, method)), unit, digits) for place in places)]
    for method in study.methods
    if method not in (against, 'ptq')
  ]
  return markdown(('Method', *_columns(places)), rows)


def sharpness_table(study: Study, places: Sequence[Place]) -> str:
  """The sharpness of each method and its ratio to QAT's, with a star where they differ.

  Args:
    study: the figures.
    places: the columns.

  Returns:
    A table, which is one family of tests.
  """
  found = study.differences(places, 'qat', 'sharpness')
  rows = []
  for method in study.methods:
    row = [label(method)]
    for place in places:
      interval = study.interval(place, method, 'sharpness')
      ratio = study.ratio(place, method, 'sharpness')
      difference = found.get((place, method))
      times = f' ({ratio:.2f}x)' if ratio is not None and method != 'qat' else ''
      star = ' *' if difference is not None and difference.shown else ''
      row.append(_interval(interval, 1, 4) + times + star)
    rows.append(row)
  return markdown(('Method', *_columns(places)), rows)


def choices_table(study: Study) -> str:
  """The setting that validation chose for each method, a column a cell.

  Args:
    study: the figures.

  Returns:
    A table.
  """
  rows = []
  for method in study.methods:
    if method != 'ptq':
      chosen = [Setting(**study.choices[cell][method]['chosen']) for cell in study.cells]
      rows.append([label(method), *(setting.words for setting in chosen)])
  return markdown(('Method', *map(title_of, study.cells)), rows)


def label(method: str) -> str:
  """A method for a reader, with a mark where its strategy is this package's own.

  Args:
    method: its name.

  Returns:
    Its label.
  """
  return METHODS[method].label + (' [ours]' if METHODS[method].ours else '')


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table.

  Args:
    header: of the columns.
    rows: cells.

  Returns:
    Markdown.
  """
  lines = ['| ' + ' | '.join(header) + ' |', '|:--|' + '--:|' * (len(header) - 1)]
  return '\n'.join([*lines, *('| ' + ' | '.join(row) + ' |' for row in rows)])


def _columns(places: Sequence[Place]) -> list[str]:
  return [f'{bits} bits' for _, bits in places]


def _interval(interval: Interval | None, unit: float, digits: int) -> str:
  if interval is None:
    return NONE
  half = interval.high - interval.mean
  return f'{unit * interval.mean:.{digits}f} ± {unit * half:.{digits}f}'


def _difference(difference: Difference | None, unit: float, digits: int) -> str:
  """A mean with its sign, half its interval, and a star where it is shown."""
  if difference is None:
    return NONE
  found = difference.paired.difference
  half = found.high - found.mean
  star = ' *' if difference.shown else ''
  return f'{unit * found.mean:+.{digits}f} ± {unit * half:.{digits}f}{star}'


def _overall_ratio(study: Study, method: str, figure: str) -> str:
  """The geometric mean over the places of the ratio to QAT, with a star where it is shown."""
  if method == 'qat':
    return '1'
  ratios = [study.ratio(place, method, figure) for place in study.places]
  if any(ratio is None for ratio in ratios):
    return NONE
  difference = study.overall('qat', figure, relative=True).get(method)
  star = ' *' if difference is not None and difference.shown else ''
  return f'{geometric_mean([ratio for ratio in ratios if ratio is not None]):.2f}{star}'


def _how_to_read(study: Study) -> str:
  """What the figures mean, and what they do not show."""
  return (
    f'**How to read it.** {study.seeds} seeds; of a seed all methods begin from the same float '
    'weights and see the same batches, augmented alike, for the same number of steps. Figures are '
    "means over the seeds, with half of Student's 95 % interval: they hold for other seeds on "
    'these same data, not for other data. Differences are taken seed by seed, in this table those '
    'of the means over all places. A star: p of the paired t-test, by Holm over all comparisons of '
    'the table (here: of the column), is below 0.05; intervals are not widened for that. Each '
    'method had four settings, chosen on validation accuracy by runs of other seeds at '
    f"{TUNING_BITS} bits and used at all bit-widths; the learning rate is QAT's best for all. "
    'Test figures had no part in that. What a strategy draws at random (SWP, RST) is the same for '
    'all seeds. Sharpness is the rise of the mean training loss after one step of length '
    f'{SHARPNESS_RHO:g} along the gradient from the quantized weights; adaptive, the same with '
    f"ASAM's scaling, radius {ADAPTIVE_RHO:g} and eta {ADAPTIVE_ETA:g}. The ratio is the geometric "
    "mean over the places of the ratio of means; its star is of the differences in parts of QAT's "
    'mean at each place. In the columns of accuracy and loss places count by the size of their '
    'differences, so that the hard digits decide most of them. Gradients a step: a gradient of the '
    'whole batch counts 1, of a part of it that part, and the forward pass by which SDS chooses '
    'examples 1/3.'
  )

"""The report: intervals against scipy's, tables cell by cell, files whole and readable."""

import dataclasses
import io
import json
import math
import os

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import binomtest

from saq_jax.analysis import curves, report
from saq_jax.analysis.report import markdown_table, results_table, write_report
from saq_jax.analysis.results import Result, human, wilson_interval


def history(steps=60, epochs=3):
  rows = [
    {'step': step, 'epoch': step * epochs / steps, 'loss': 2.0 / step, 'accuracy': 0.5}
    for step in range(1, steps + 1)
  ]
  for epoch in range(1, epochs + 1):
    rows[epoch * steps // epochs - 1] |= {'test_accuracy': 0.9 + 0.02 * epoch, 'test_loss': 0.3}
  return rows


FLOAT = Result('float', 'Float', None, None, 0.99, 99, 100, 0.5, 800_000, 4_096_000, history())
SAQ = Result('saq', 'SAQ | 4-bit', 4, 3, 0.97, 97, 100, 0.25, 160_000, 128_000, history())


@pytest.mark.parametrize('total', [1, 7, 359, 50_000])
@pytest.mark.parametrize('share', [0.0, 0.3, 0.989, 1.0])
def test_wilson_interval_is_scipys(share, total):
  correct = round(share * total)
  known = binomtest(correct, total).proportion_ci(0.95, method='wilson')
  assert wilson_interval(correct, total, 1.959963984540054) == pytest.approx(known, abs=1e-12)


def test_wilson_interval_ends_solve_its_equation():
  # Both ends are the proportions q with (p - q)^2 = z^2 q (1 - q) / n.
  for end in wilson_interval(355, 359, 2.5):
    assert (355 / 359 - end) ** 2 == pytest.approx(2.5**2 * end * (1 - end) / 359)


@pytest.mark.parametrize(('correct', 'total'), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_interval_refuses_impossible_counts(correct, total):
  with pytest.raises(ValueError, match='correct='):
    wilson_interval(correct, total)


def test_accuracy_must_be_the_counted_fraction():
  with pytest.raises(ValueError, match='fraction'):
    dataclasses.replace(SAQ, accuracy=97.0)


def test_markdown_table():
  assert markdown_table([FLOAT, SAQ]).splitlines() == [
    '| Network | Bits W/A | Test accuracy | Loss | Size | BOPs |',
    '|:--|--:|--:|--:|--:|--:|',
    '| Float | 32/32 | 99.0% (94.6–99.8%, 99/100) | 0.5000 | 100.0 kB (800,000 bits) | 4.1M |',
    r'| SAQ \| 4-bit | 4/3 | 97.0% (91.5–99.0%, 97/100) | 0.2500 '
    '| 20.0 kB (160,000 bits, 5.0x smaller) | 128.0k (32.0x fewer) |',
  ]


def test_table_without_full_precision_has_no_ratios():
  table = markdown_table([SAQ])
  assert 'smaller' not in table
  assert 'fewer' not in table


def test_terminal_table_fits_80_columns_and_keeps_brackets():
  console = Console(width=80, file=io.StringIO())
  console.print(results_table([FLOAT, dataclasses.replace(SAQ, label='SAQ [case 3]')]))
  text = console.file.getvalue()
  for part in ('SAQ [case 3]', '91.5–99.0%', '97/100', '160,000 bits', '5.0x smaller', '128.0k'):
    assert part in text
  assert '…' not in text


@pytest.mark.parametrize(('value', 'text'), [
  (0, '0'), (999, '999'), (1000, '1.0k'), (999_949, '999.9k'), (999_950, '1.0M'),
  (674_643_968, '674.6M'), (34.7e9, '34.7G'), (5e15, '5000.0T'),
])  # fmt: skip
def test_human(value, text):
  assert human(value) == text


def test_report_is_three_whole_files(tmp_path):
  rows = [*history(), {'step': np.int32(61), 'loss': np.float32('nan')}]
  saq = dataclasses.replace(SAQ, loss=math.inf, history=rows)
  paths = write_report([FLOAT, saq], tmp_path / 'new' / 'folder', 'Digits')
  assert {name: path.name for name, path in paths.items()} == {
    'results': 'results.json', 'report': 'report.md', 'curves': 'curves.png',
  }  # fmt: skip
  assert sorted(os.listdir(tmp_path / 'new' / 'folder')) == sorted(p.name for p in paths.values())
  text = paths['report'].read_text(encoding='utf-8')
  assert text.startswith('# Digits\n\n| Network')
  assert '](curves.png)' in text
  figures = json.loads(paths['results'].read_text(), parse_constant=pytest.fail)
  assert figures['title'] == 'Digits'
  first, second = figures['results']
  assert first == dataclasses.asdict(FLOAT) | {'interval': list(wilson_interval(99, 100))}
  assert second['loss'] is None
  assert second['history'][-1] == {'step': 61, 'loss': None}


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
  old = write_report([FLOAT], tmp_path, 'old')['report'].read_text()
  monkeypatch.setattr(report, 'draw_curves', lambda results: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    write_report([FLOAT], tmp_path, 'new')
  assert (tmp_path / 'report.md').read_text() == old
  assert json.loads((tmp_path / 'results.json').read_text())['title'] == 'old'


def test_no_result_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='at least one'):
    write_report([], tmp_path, 'Empty')


CASES = {
  'usual': [FLOAT, SAQ],
  'identical': [dataclasses.replace(SAQ, name=str(i), label=f'Net {i}') for i in range(4)],
  'perfect': [dataclasses.replace(SAQ, correct=100, accuracy=1.0)] * 2,
  'wrong': [dataclasses.replace(SAQ, correct=0, accuracy=0.0)],
  'one epoch': [dataclasses.replace(SAQ, history=history(1, 1))],
  'no history': [dataclasses.replace(SAQ, history=[])],
  'zero loss': [dataclasses.replace(SAQ, history=[{'step': 0, 'epoch': 0, 'loss': 0.0}])],
}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('results', CASES.values(), ids=CASES)
def test_picture_has_no_overlapping_labels(results):
  figure = curves.draw_curves(results)
  figure.draw_without_rendering()
  labels = {result.label for result in results}
  for axes in figure.axes:
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text() in labels]
    for i, box in enumerate(boxes):
      assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_picture_shows_every_label_in_one_colour():
  figure = curves.draw_curves([FLOAT, SAQ])
  for label in (FLOAT.label, SAQ.label):
    texts = [text for axes in figure.axes for text in axes.texts if text.get_text() == label]
    assert len(texts) == 3
    assert len({text.get_color() for text in texts}) == 1


def test_picture_is_wide_enough_to_read(tmp_path):
  with Image.open(write_report([FLOAT, SAQ], tmp_path, 'Digits')['curves']) as image:
    assert image.format == 'PNG'
    assert image.width >= 1800


def test_smoothing_keeps_a_constant_and_averages_the_middle():
  y = np.arange(60.0)
  smooth = curves._moving_average(y)
  assert smooth.shape == y.shape
  assert smooth[1:-1] == pytest.approx(y[1:-1])
  assert curves._moving_average(np.full(60, 3.0)) == pytest.approx(np.full(60, 3.0))


def test_labels_are_moved_apart_and_stay_below_the_top():
  assert curves._apart([0.2, 0.5], 0.1) == [0.2, 0.5]
  moved = curves._apart([0.5, 0.5, 0.99, 1.0], 0.1)
  assert np.diff(moved).min() >= 0.1 - 1e-9
  assert max(moved) <= 1

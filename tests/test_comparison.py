"""What a comparison says it found: only what its tests show, whatever the sign of the figures."""

import numpy as np
import pytest

from saq_jax.analysis.compare_report import write_comparison
from saq_jax.analysis.comparison import METHODS, Comparison, Runs, Scores

SEEDS = tuple(range(8))
NOISE = np.random.default_rng(0).normal(size=8) * 1e-3
NOISE -= NOISE.mean()


def runs(method, sharpness, accuracy=0.9):
  """Runs of one method whose figures scatter little about a mean."""
  scores = Scores(tuple(accuracy + NOISE), (0.3,) * 8)
  # Another order of the noise for each method, so that differences have a spread.
  spread = np.roll(NOISE, METHODS.index(method) if method in METHODS else 0)
  return Runs(method, 0.1, SEEDS, scores, scores, (0.1,) * 8, tuple(sharpness + spread))


def comparison(**sharpness):
  chosen = {method: runs(method, sharpness[method]) for method in METHODS}
  tried = {method: (found,) for method, found in chosen.items()}
  return Comparison(runs('float', 0.0), tried, chosen, 0.1)


def against_qat(found, tmp_path):
  """The last column of the first table, by method."""
  report = write_comparison(found, tmp_path, 'title')['report'].read_text()
  rows = [line.split('|') for line in report.splitlines() if line.startswith('| Case')]
  return {row[1].strip(): row[-2].strip() for row in rows[:3]}


def test_a_ratio_stands_only_where_a_difference_is_shown(tmp_path):
  found = comparison(qat=0.04, case1=0.02, case2=0.04, case3=0.08)
  words = against_qat(found, tmp_path)
  assert words['Case 1'] == '2.00x flatter'
  assert words['Case 2'] == 'no difference shown'
  assert words['Case 3 (SAQ)'] == '2.00x sharper'


def test_no_ratio_of_what_is_not_positive(tmp_path):
  found = comparison(qat=0.04, case1=-0.02, case2=-0.01, case3=-0.04)
  assert set(against_qat(found, tmp_path).values()) == {'flatter'}


@pytest.mark.parametrize(('p', 'shown'), [(0.009, True), (0.011, False), (0.049, False)])
def test_shown_is_below_five_percent_over_the_five_pairs(p, shown):
  from saq_jax.analysis.comparison import Difference
  from saq_jax.analysis.statistics import Interval, Paired

  paired = Paired(Interval(0.1, 0.05, 0.15), p, 8, 0, 0)
  difference = Difference('case3', 'qat', 'accuracy', paired)
  assert difference.finding == ('more accurate' if shown else 'no difference shown')


@pytest.mark.parametrize(
  ('train_loss', 'sharpness', 'finite'),
  [((0.1,), (0.1,), True), ((float('nan'),), (0.1,), False), ((0.1,), (float('inf'),), False)],
)
def test_runs_with_a_figure_that_is_not_finite_are_known(train_loss, sharpness, finite):
  scores = Scores((0.9,), (0.3,))
  assert Runs('case1', 0.1, (0,), scores, scores, train_loss, sharpness).finite is finite

"""Intervals and paired differences against SciPy's own tests and a table's values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from saq_jax.analysis.statistics import mean_interval, paired

RNG = np.random.default_rng(0)
A, B = RNG.normal(0.5, 0.1, 16).tolist(), RNG.normal(0.45, 0.1, 16).tolist()
accuracies = st.lists(st.integers(0, 359).map(lambda correct: correct / 359), min_size=2)


def test_interval_has_the_tabled_quantile():
  # t(0.975, 4) = 2.776; the deviation of 1..5 is sqrt(2.5).
  found = mean_interval([1, 2, 3, 4, 5])
  half = 2.776 * np.sqrt(2.5 / 5)
  np.testing.assert_allclose([found.mean, found.low, found.high], [3, 3 - half, 3 + half], 1e-3)


def test_interval_covers_as_often_as_it_says():
  draws = RNG.normal(2.0, 3.0, (2000, 5))
  inside = [i.low <= 2.0 <= i.high for i in (mean_interval(row.tolist()) for row in draws)]
  assert abs(np.mean(inside) - 0.95) < 0.02


def test_paired_is_the_paired_t_test():
  found, want = paired(A, B), stats.ttest_rel(A, B)
  ends = want.confidence_interval(0.95)
  np.testing.assert_allclose(found.p, want.pvalue, rtol=1e-12)
  np.testing.assert_allclose([found.difference.low, found.difference.high], [ends.low, ends.high])
  assert found.shown == (want.pvalue < 0.05)


def test_counts_of_seeds():
  found = paired([1, 2, 3, 4], [0, 2, 4, 3])
  assert (found.above, found.equal, found.below) == (2, 1, 1)


@given(accuracies)
def test_a_method_does_not_differ_from_itself(values):
  found = paired(values, values)
  assert (found.difference.mean, found.p, found.shown) == (0, 1, False)


@given(accuracies)
def test_swapping_turns_the_sign(values):
  other = values[::-1]
  found, turned = paired(values, other), paired(other, values)
  np.testing.assert_allclose(found.difference.low, -turned.difference.high, atol=1e-12)
  assert (found.above, found.equal, found.below) == (turned.below, turned.equal, turned.above)


def test_differences_all_alike_are_shown():
  found = paired([2.0, 3.0], [1.0, 2.0])
  assert (found.difference.low, found.difference.high, found.p, found.shown) == (1, 1, 0, True)


@pytest.mark.parametrize('values', [[1.0], [], [1.0, float('nan')], [1.0, float('inf')]])
def test_too_few_or_not_finite(values):
  with pytest.raises(ValueError, match='at least two values'):
    mean_interval(values)


def test_other_number_of_seeds():
  with pytest.raises(ValueError, match='cannot be paired'):
    paired([1.0, 2.0, 3.0], [1.0, 2.0])

"""Means over seeds with their intervals, and differences between two methods paired by seed."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and its interval of confidence.

  Attributes:
    mean: the mean.
    low: the lower end.
    high: the upper end.
  """

  mean: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Paired:
  """What two methods differ by, seed for seed.

  Attributes:
    difference: the mean of the first less the second, and its interval.
    p: of the two-sided paired t-test that there is no difference; not corrected for the number
      of tests made.
    above: seeds in which the first is greater.
    equal: seeds in which both are the same.
    below: seeds in which the first is less.
  """

  difference: Interval
  p: float
  above: int
  equal: int
  below: int

  @property
  def shown(self) -> bool:
    """Whether a difference is shown: the interval does not hold zero."""
    return self.difference.low > 0 or self.difference.high < 0


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
  """The mean of independent values with Student's interval, `mean ± t s/sqrt(n)`.

  Args:
    values: at least two, such as one a seed.
    confidence: above 0 and below 1.

  Returns:
    The mean and the ends of its interval.

  Raises:
    ValueError: for less than two values, or one that is not finite.

  Example:
    >>> mean_interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.484..., high=4.484...)
  """
  x = _checked(values)
  mean, error = float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x))
  half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1)) * error
  return Interval(mean, mean - half, mean + half)


def paired(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Paired:
  """Compares two methods that were run with the same seeds.

  Args:
    first: a figure of the first method, one a seed, at least two.
    second: the same of the second method, in the same order.
    confidence: of the interval.

  Returns:
    The mean difference with its interval, the p-value, and in how many seeds which is greater.
    Differences that are all alike have no spread: the interval is then their value alone, and p
    is 1 where that is zero, else 0.

  Raises:
    ValueError: for less than two seeds, another number of seeds, or a value that is not finite.

  Example:
    >>> result = paired([0.9, 0.8, 0.9], [0.8, 0.8, 0.7])
    >>> result.above, result.equal, result.below, result.shown
    (2, 1, 0, False)
  """
  a, b = _checked(first), _checked(second)
  if len(a) != len(b):
    raise ValueError(f'{len(a)} and {len(b)} values cannot be paired: give one a seed of each.')
  d = a - b
  difference = mean_interval(d.tolist(), confidence)
  error = float(d.std(ddof=1)) / math.sqrt(len(d))
  if error:
    p = 2 * float(stats.t.sf(abs(difference.mean) / error, len(d) - 1))
  else:
    p = float(difference.mean == 0)
  return Paired(difference, p, int(np.sum(d > 0)), int(np.sum(d == 0)), int(np.sum(d < 0)))


def _checked(values: Sequence[float]) -> np.ndarray:
  """The values as float64, if there are two and all are finite."""
  x = np.asarray(values, np.float64)
  if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
    raise ValueError(f'{values}: an interval needs at least two values, all of them finite.')
  return x

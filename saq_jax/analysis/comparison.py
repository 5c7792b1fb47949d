"""What a comparison over seeds found: the figures of every run, and what follows from them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from saq_jax.analysis.statistics import Interval, Paired, mean_interval, paired

CASES: dict[str, int] = {'case1': 1, 'case2': 2, 'case3': 3}
METHODS = ('qat', *CASES)
LABELS = {
  'float': 'Full precision',
  'qat': 'QAT',
  'case1': 'Case 1',
  'case2': 'Case 2',
  'case3': 'Case 3 (SAQ)',
}
PAIRS = (
  ('case1', 'qat'),
  ('case2', 'qat'),
  ('case3', 'qat'),
  ('case3', 'case1'),
  ('case3', 'case2'),
)


@dataclasses.dataclass(frozen=True)
class Scores:
  """What was found on one split, an entry a seed.

  Attributes:
    accuracy: the fraction of the examples answered right.
    loss: mean cross-entropy.
  """

  accuracy: tuple[float, ...]
  loss: tuple[float, ...]

  @property
  def finite(self) -> bool:
    """Whether every loss is finite."""
    return all(map(math.isfinite, self.loss))


@dataclasses.dataclass(frozen=True)
class Runs:
  """The runs of one method at one radius, an entry a seed in every tuple.

  Attributes:
    method: 'float', 'qat', 'case1', 'case2' or 'case3'.
    rho: the radius of the training; 0 for the first two.
    seeds: the seeds, in ascending order.
    validation: on the split that the radius is chosen on.
    test: on the split of the final figures.
    train_loss: over the training split in evaluation mode, without augmentation.
    sharpness: the change of `train_loss` after one ascent step of the comparison's length.
  """

  method: str
  rho: float
  seeds: tuple[int, ...]
  validation: Scores
  test: Scores
  train_loss: tuple[float, ...]
  sharpness: tuple[float, ...]

  @property
  def finite(self) -> bool:
    """Whether every training loss and sharpness is finite."""
    return all(map(math.isfinite, self.train_loss + self.sharpness))

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> 'Runs':
    """Reads what `dataclasses.asdict` gave, after JSON.

    Args:
      value: the dict that JSON read.

    Returns:
      The runs.
    """
    fields: dict[str, Any] = {
      split: Scores(**{name: tuple(x) for name, x in value[split].items()})
      for split in ('validation', 'test')
    }
    fields |= {name: tuple(value[name]) for name in ('seeds', 'train_loss', 'sharpness')}
    return cls(method=value['method'], rho=value['rho'], **fields)

  def joined(self, other: 'Runs') -> 'Runs':
    """These runs, then those of other seeds.

    Args:
      other: of the same method and radius.

    Returns:
      Runs of both groups of seeds.
    """

    def join(split: str) -> Scores:
      a, b = getattr(self, split), getattr(other, split)
      return Scores(a.accuracy + b.accuracy, a.loss + b.loss)

    return Runs(
      self.method,
      self.rho,
      self.seeds + other.seeds,
      join('validation'),
      join('test'),
      self.train_loss + other.train_loss,
      self.sharpness + other.sharpness,
    )


@dataclasses.dataclass(frozen=True)
class Difference:
  """What two methods differ by in one figure.

  Attributes:
    first: a method.
    second: the one it is compared with.
    figure: 'accuracy' or 'sharpness'.
    paired: first less second.
  """

  first: str
  second: str
  figure: str
  paired: Paired

  @property
  def shown(self) -> bool:
    """Whether p is below 5 % in all: Bonferroni's, over the pairs compared in one figure."""
    return self.paired.p < 0.05 / len(PAIRS)

  @property
  def finding(self) -> str:
    """What is shown of the first method, in words: p below 0.05 over the number of pairs."""
    if not self.shown:
      return 'no difference shown'
    above = self.paired.difference.mean > 0
    if self.figure == 'accuracy':
      return 'more accurate' if above else 'less accurate'
    return 'sharper' if above else 'flatter'


@dataclasses.dataclass(frozen=True)
class Comparison:
  """All figures of a comparison.

  Attributes:
    floating: the float networks that all methods began from.
    tried: by method, the runs at each radius.
    chosen: by method, the runs at the radius chosen on the validation split.
    sharpness_rho: the radius of the sharpness.
  """

  floating: Runs
  tried: Mapping[str, Sequence[Runs]]
  chosen: Mapping[str, Runs]
  sharpness_rho: float

  @property
  def rows(self) -> tuple[Runs, ...]:
    """The float networks and the chosen runs, in the order of a table."""
    return (self.floating, *(self.chosen[method] for method in METHODS))

  def values(self, method: str, figure: str) -> tuple[float, ...]:
    """A figure of the chosen runs, an entry a seed: 'accuracy' (of the test) or 'sharpness'.

    Args:
      method: 'qat' or a case.
      figure: which one.

    Returns:
      Fractions for the accuracy, losses for the sharpness.
    """
    runs = self.chosen[method]
    return runs.test.accuracy if figure == 'accuracy' else runs.sharpness

  def interval(self, method: str, figure: str) -> Interval:
    """The mean of a figure over the seeds, with its 95 % interval.

    Args:
      method: 'qat' or a case.
      figure: 'accuracy' or 'sharpness'.

    Returns:
      The interval of Student's t.
    """
    return mean_interval(self.values(method, figure))

  def differences(self, figure: str) -> tuple[Difference, ...]:
    """Every pair of `PAIRS`, compared seed by seed.

    Args:
      figure: 'accuracy' or 'sharpness'.

    Returns:
      A difference a pair.
    """
    return tuple(
      Difference(a, b, figure, paired(self.values(a, figure), self.values(b, figure)))
      for a, b in PAIRS
    )

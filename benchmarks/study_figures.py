"""The figures of a finished study, and what is shown by them: means, paired differences, costs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from study_plan import METHODS

from saq_jax.analysis.statistics import Interval, Paired, mean_interval, paired

Place = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Study:
  """The figures of all final runs.

  Attributes:
    runs: by cell ('cnn-digits'), bits and method, each figure's values, an entry a seed.
    choices: by cell and method, what was tried and what was chosen.
  """

  runs: Mapping[str, Mapping[int, Mapping[str, Mapping[str, Any]]]]
  choices: Mapping[str, Mapping[str, Any]]

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> 'Study':
    """Takes what `study_collect.collect` made, after JSON.

    Args:
      value: what JSON read.

    Returns:
      The study.
    """
    runs = {
      cell: {int(bits): methods for bits, methods in by_bits.items()}
      for cell, by_bits in value['runs'].items()
    }
    return cls(runs, value['choices'])

  @property
  def cells(self) -> list[str]:
    """All cells, in order."""
    return list(self.runs)

  @property
  def bits(self) -> list[int]:
    """The bit-widths but full precision, ascending."""
    return sorted({bits for by_bits in self.runs.values() for bits in by_bits} - {32})

  @property
  def places(self) -> list[Place]:
    """Every cell at every bit-width."""
    return [(cell, bits) for cell in self.cells for bits in self.bits]

  @property
  def methods(self) -> list[str]:
    """The quantized methods, in the order of a table."""
    there = {method for cell, bits in self.places for method in self.runs[cell][bits]}
    return [name for name in METHODS if name in there]

  @property
  def seeds(self) -> int:
    """How many there are."""
    return len(next(iter(self.runs[self.cells[0]][32].values()))['seeds'])

  def values(self, place: Place, method: str, figure: str) -> np.ndarray | None:
    """A figure, an entry a seed.

    Args:
      place: cell and bits, of no matter for full precision.
      method: its name.
      figure: such as 'test_accuracy'.

    Returns:
      [seeds], or None if a run diverged or there is none.
    """
    cell, bits = place
    found = self.runs[cell][32 if method == 'float' else bits].get(method)
    if found is None or None in found[figure]:
      return None
    return np.array(found[figure], np.float64)

  def interval(self, place: Place, method: str, figure: str) -> Interval | None:
    """The mean with its 95 % interval.

    Args:
      place: as in `values`, like the others.
      method: its name.
      figure: which.

    Returns:
      Of Student's t, or None where there are no values.
    """
    values = self.values(place, method, figure)
    return None if values is None else mean_interval(values.tolist())

  def differences(
    self, places: Sequence[Place], against: str, figure: str
  ) -> dict[tuple[Place, str], 'Difference']:
    """Each trained method less another one at each place, seed by seed: one family of tests.

    Args:
      places: where.
      against: the other method.
      figure: of what.

    Returns:
      By place and method, with p by Holm over all of them.
    """
    found = {}
    for place in places:
      base = self.values(place, against, figure)
      for method in self.methods:
        values = self.values(place, method, figure)
        if method not in (against, 'ptq') and values is not None and base is not None:
          found[place, method] = paired(values.tolist(), base.tolist())
    return _corrected(found)

  def overall(
    self, against: str, figure: str, *, relative: bool = False
  ) -> dict[str, 'Difference']:
    """Each trained method less another one, each seed's mean over all places: a family of tests.

    Args:
      against: the other method.
      figure: of what.
      relative: a difference counts in parts of the other method's mean at its place, so that all
        places have the same weight; that mean must be positive.

    Returns:
      By method, with p by Holm over all of them.
    """
    base = [self.values(place, against, figure) for place in self.places]
    if any(values is None or (relative and values.mean() <= 0) for values in base):
      return {}
    found = {}
    for method in self.methods:
      ours = [self.values(place, method, figure) for place in self.places]
      if method not in (against, 'ptq') and all(values is not None for values in ours):
        found[method] = paired(*(_mean_of(rows, base, relative) for rows in (ours, base)))
    return _corrected(found)

  def gradients(self, method: str) -> float:
    """The cost of a step in gradients of a whole batch, the mean over all runs.

    Args:
      method: its name.

    Returns:
      1 for QAT; 0 for what is not trained.
    """
    if method in ('float', 'ptq'):
      return 0.0
    parts = [self.values(place, method, 'second') for place in self.places]
    second = np.mean([part for part in parts if part is not None])
    return METHODS[method].gradients(float(second))

  def ratio(self, place: Place, method: str, figure: str) -> float | None:
    """The mean of a figure over that of QAT.

    Args:
      place: as in `values`, like the others.
      method: its name.
      figure: which.

    Returns:
      The ratio, or None where either mean is not positive.
    """
    ours, theirs = (self.values(place, name, figure) for name in (method, 'qat'))
    if ours is None or theirs is None or min(ours.mean(), theirs.mean()) <= 0:
      return None
    return float(ours.mean() / theirs.mean())


@dataclasses.dataclass(frozen=True)
class Difference:
  """A paired difference and its p-value, corrected for all tests of its family.

  Attributes:
    paired: seed by seed.
    p: Holm's.
  """

  paired: Paired
  p: float

  @property
  def shown(self) -> bool:
    """Whether it is shown, at 5 % for the family."""
    return self.p < 0.05


def holm(values: Sequence[float]) -> list[float]:
  """Corrects p-values for their number so that a false finding among them has at most the level.

  Args:
    values: p-values of one family of tests.

  Returns:
    Holm's, in the same order: the k-th smallest of n times n - k + 1, at least those before it.

  Example:
    >>> holm([0.02, 0.01, 0.5])
    [0.04, 0.03, 0.5]
  """
  out, highest = [0.0] * len(values), 0.0
  for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
    highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
    out[index] = highest
  return out


def geometric_mean(values: Sequence[float]) -> float:
  """The mean of ratios.

  Args:
    values: positive.

  Returns:
    exp of the mean logarithm.
  """
  return math.exp(math.fsum(map(math.log, values)) / len(values))


def _mean_of(
  rows: Sequence[np.ndarray | None], base: Sequence[np.ndarray | None], relative: bool
) -> list[float]:
  """Each seed's mean over the places, of which each is divided by its mean in `base` if asked."""
  there = [(row, other) for row, other in zip(rows, base, strict=True) if row is not None]
  scaled = [row / (other.mean() if relative and other is not None else 1.0) for row, other in there]
  return [float(x) for x in np.mean(scaled, 0)]


def _corrected(found: Mapping[Any, Paired]) -> dict[Any, Difference]:
  """Puts Holm's p-values to the differences of a family."""
  corrected = holm([difference.p for difference in found.values()])
  return {key: Difference(found[key], p) for key, p in zip(found, corrected, strict=True)}

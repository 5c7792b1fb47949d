"""What became of one network, its interval of confidence, and how numbers are shown."""

import dataclasses
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of one network, or of one stage of its training.

  Attributes:
    name: a key: 'saq'.
    label: what a reader sees: 'SAQ 4-bit'.
    weight_bits: of most weights; None for full precision.
    act_bits: of most activations; None for full precision.
    accuracy: on the test set, from 0 to 1.
    correct: test examples answered right.
    examples: test examples.
    loss: on the test set.
    size_bits: what inference has to hold (`cost.model_size`).
    bops: bit operations for one image (`cost.product_costs`).
    history: rows with 'step', 'epoch', 'loss', 'accuracy', some also with 'test_accuracy' and
      'test_loss'.

  Raises:
    ValueError: if `correct` is not within 0 and `examples`, or `accuracy` is not their ratio.
  """

  name: str
  label: str
  weight_bits: int | None
  act_bits: int | None
  accuracy: float
  correct: int
  examples: int
  loss: float
  size_bits: int
  bops: int
  history: Sequence[Mapping[str, float]] = ()

  def __post_init__(self) -> None:
    wilson_interval(self.correct, self.examples)  # Checks the counts.
    if not abs(self.accuracy - self.correct / self.examples) < 1e-3:
      raise ValueError(
        f'Result({self.name!r}): accuracy={self.accuracy} is not {self.correct}/{self.examples}; '
        'give it as a fraction.'
      )


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
  """Gives Wilson's interval of a proportion; it stays within 0 and 1 and holds near both.

      (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),   p = correct/n, n = total

  Args:
    correct: successes.
    total: trials.
    z: standard deviations of the normal distribution: 1.96 for 95 %.

  Returns:
    The lower and the upper end.

  Raises:
    ValueError: if `total` is not positive or `correct` not within 0 and `total`.

  Example:
    >>> low, high = wilson_interval(355, 359)
    >>> f'{low:.4f} {high:.4f}'
    '0.9717 0.9957'

  References:
    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
  """
  if total < 1 or not 0 <= correct <= total:
    raise ValueError(f'correct={correct} is not within 0 and total={total}, or that is below 1')
  p, shrink = correct / total, 1 + z**2 / total
  centre = (p + z**2 / (2 * total)) / shrink
  half = z / shrink * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
  return max(centre - half, 0.0), min(centre + half, 1.0)


def human(value: float, space: str = '') -> str:
  """A number with one decimal and the prefix of its thousands.

  Args:
    value: at least 0.
    space: what stands between number and prefix.

  Returns:
    Text, such as '12.7M'.

  Example:
    >>> human(12_690_000)
    '12.7M'
  """
  power = 0
  while value >= 999.95 and power < 4:
    value, power = value / 1000, power + 1
  return f'{value:.{min(power, 1)}f}{space}{("", "k", "M", "G", "T")[power]}'

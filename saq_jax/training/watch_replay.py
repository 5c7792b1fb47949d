"""Going back: where to, once a run has diverged, and how it differs from then on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from saq_jax._paths import PyTree

__all__ = ['StepsBack', 'origin', 'slowed']


@dataclasses.dataclass(frozen=True)
class StepsBack:
  """How a run differs that went back to a checkpoint because it had diverged.

  Attributes:
    count: how often it did.
    to: the step that it last went back to.
    skipped: batches that are left out of the stream from there on.
  """

  count: int = 0
  to: int = 0
  skipped: int = 0

  def again(self, to: int, step: int) -> 'StepsBack':
    """One more of them.

    Args:
      to: the step that it goes back to.
      step: the last step, whose batch is left out like all from `to` on.

    Returns:
      The new difference.

    Example:
      >>> StepsBack().again(40, 52)
      StepsBack(count=1, to=40, skipped=12)
    """
    return StepsBack(self.count + 1, to, self.skipped + step - to)


def origin(last_good: int, saved: Sequence[int], every: int, before: StepsBack) -> int | None:
  """The step that a run which diverged goes back to.

  It depends on the checkpoints that were due alone, so that it is the same for a run that was
  stopped and resumed. Where the run went back before and diverged again without a new good
  checkpoint, the one before that is taken.

  Args:
    last_good: the last step after which the parameters were good.
    saved: the steps of the checkpoints that were due, oldest first.
    every: steps between those.
    before: the times it went back already.

  Returns:
    The step, 0 for the beginning; None where no checkpoint is good but one should be.

  Example:
    >>> origin(50, [20, 30, 40], 10, StepsBack())
    40
    >>> origin(50, [20, 30, 40], 10, StepsBack(count=1, to=40, skipped=12))
    30
  """
  good = [step for step in saved if step <= last_good]
  if not good:
    return 0 if last_good < every else None
  again = before.count > 0 and good[-1] <= before.to
  return good[-2] if again and len(good) > 1 else good[-1]


def slowed(optimizer: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
  """An optimizer of a lower learning rate, with the state of the optimizer itself.

  Args:
    optimizer: whose updates are proportional to its learning rate.
    factor: what they are multiplied by.

  Returns:
    The slower one.

  Example:
    >>> half = slowed(optax.sgd(1.0), 0.5)
    >>> float(half.update(2.0, half.init(1.0))[0])
    -1.0
  """

  def update(*args: Any) -> tuple[PyTree, PyTree]:
    updates, state = optimizer.update(*args)
    return jax.tree.map(lambda u: factor * u, updates), state

  return optax.GradientTransformation(optimizer.init, update)

"""Which checkpoints of a run stay when another one is written."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any


class Retention:
  """Keeps the newest that were due, the newest of all, and the best.

  Those that were not due, saved when a run was asked to stop or found a new best, do not push out
  those that were: which of these are there depends on the step alone, not on how often a run was
  stopped.

  Args:
    keep: how many of the newest that were due.
    keep_best: keep the best too.
    every: steps between those that are due.
    score: gives how good a step's state is, or None; more is better.

  Example:
    >>> retention = Retention(2, True, 10, {3: 0.9, 10: 0.8}.get)
    >>> sorted(retention.staying([3, 10, 20, 30, 34]))
    [3, 20, 30, 34]
  """

  def __init__(
    self, keep: int, keep_best: bool, every: int, score: Callable[[int], float | None]
  ) -> None:
    self._keep, self._keep_best, self._every, self._score = keep, keep_best, every, score

  def due(self, steps: Iterable[int]) -> list[int]:
    """The steps that were due.

    Args:
      steps: in any order.

    Returns:
      Those of them, oldest first.
    """
    return sorted(step for step in steps if step % self._every == 0)

  def best(self, steps: Iterable[int]) -> tuple[int, float] | None:
    """The best of some steps, the earliest of equal ones.

    Args:
      steps: in any order.

    Returns:
      The step and its score; None where no step has a score.
    """
    scores = [(score, -step) for step in steps if (score := self._score(step)) is not None]
    if not scores:
      return None
    score, earliest = max(scores)
    return -earliest, score

  def staying(self, steps: Sequence[int]) -> set[int]:
    """The steps to keep.

    Args:
      steps: all that are there.

    Returns:
      Those that stay.
    """
    best = self.best(steps) if self._keep_best else None
    return {max(steps)} | set(self.due(steps)[-self._keep :]) | ({best[0]} if best else set())

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    """Answers Orbax, whose policies have this form.

    Args:
      checkpoints: what is there, each with its `step`.
      context: not used.

    Returns:
      For each whether it stays.
    """
    del context
    stay = self.staying([info.step for info in checkpoints])
    return [info.step in stay for info in checkpoints]

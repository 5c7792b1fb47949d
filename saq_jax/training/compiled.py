"""The compiled step of a stage: one program, or one for each kind of step where that is known."""

from collections.abc import Callable

import numpy as np

from saq_jax.training.state import TrainState
from saq_jax.training.step import Batch, Metrics, TrainStep


class CompiledStep:
  """Calls the program of a step: with or without a second gradient, where that is known before.

  So nothing is chosen on the device, which on CPUs would make convolutions slow, and which on
  accelerators waits for the choice.

  Args:
    make: the jitted step for `taken` of `train_step`: true, false, or None for a choice in it.
    taken: bool [total_steps], which steps take the second gradient; None where it is not known.
  """

  def __init__(
    self, make: Callable[[bool | None], TrainStep], taken: np.ndarray | None = None
  ) -> None:
    self._make, self._taken = make, taken
    self._made: dict[bool | None, TrainStep] = {}

  def is_new(self, step: int) -> bool:
    """Whether a step compiles a program first.

    Args:
      step: its number, from 1.

    Returns:
      True at the first step of its kind.
    """
    return self._kind(step) not in self._made

  def __call__(self, state: TrainState, batch: Batch, step: int) -> tuple[TrainState, Metrics]:
    """Takes a step.

    Args:
      state: before it; its memory is reused.
      batch: of the step.
      step: its number, from 1.

    Returns:
      The next state and the metrics of the step.
    """
    kind = self._kind(step)
    if kind not in self._made:
      self._made[kind] = self._make(kind)
    return self._made[kind](state, batch)

  def _kind(self, step: int) -> bool | None:
    return None if self._taken is None else bool(self._taken[step - 1])

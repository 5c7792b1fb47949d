"""Divergence: how it is seen in the figures of the steps."""

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from saq_jax.training.watch_config import WatchConfig
from saq_jax.training.watch_replay import StepsBack

__all__ = ['Divergence', 'LossWatch']

# Losses whose median a spike is held against.
_WINDOW = 100


@dataclasses.dataclass(frozen=True)
class Divergence:
  """A run that diverged.

  Attributes:
    step: whose metrics showed it.
    first: the first step in a row whose metrics were bad.
    words: what was seen.
  """

  step: int
  first: int
  words: str

  @property
  def last_good(self) -> int:
    """The last step after which the parameters were good, as far as the metrics tell.

    Those of a step tell of the parameters before it, so what is saved after a step shows at the
    next one.
    """
    return self.first - 2


class LossWatch:
  """Looks at the figures of each step. What it knows is saved with every checkpoint.

  Args:
    config: what counts as diverged.
    notes: of the checkpoint that is gone on from.
    steps_back: how the run differs now, where that is not what the checkpoint has noted.

  Example:
    >>> watch = LossWatch(WatchConfig())
    >>> watch.see(7, {'loss': float('nan'), 'sharp_grad_norm': 2.0, 'lr': 0.1}).words
    'loss nan, gradient norm 2.0, learning rate 0.1'
  """

  def __init__(
    self,
    config: WatchConfig,
    notes: Mapping[str, Any] | None = None,
    steps_back: StepsBack | None = None,
  ) -> None:
    known = notes or {}
    seen = known if config.spike_factor is not None else {}
    self._config = config
    self._losses = deque[float](seen.get('losses', ()), maxlen=_WINDOW)
    self._above: int = seen.get('above', 0)
    self.steps_back = steps_back or StepsBack(**known.get('steps_back', {}))

  def see(self, step: int, figures: Mapping[str, float]) -> Divergence | None:
    """Takes the figures of the next step.

    Args:
      step: finished steps.
      figures: with 'loss', 'sharp_grad_norm' and 'lr'.

    Returns:
      The divergence; None if all is well.
    """
    loss, norm = figures['loss'], figures['sharp_grad_norm']
    found = f'loss {loss}, gradient norm {norm}, learning rate {figures["lr"]:.3g}'
    if not (math.isfinite(loss) and math.isfinite(norm)):
      return Divergence(step, step - self._above, found)
    factor = self._config.spike_factor
    if factor is None:
      return None
    median = statistics.median(self._losses) if len(self._losses) == _WINDOW else math.inf
    if loss <= factor * median:
      self._above = 0
      self._losses.append(loss)
      return None
    self._above += 1
    if self._above < self._config.spike_steps:
      return None
    steps = f'{self._above} step{"s" if self._above > 1 else ""}'
    seen = f'for {steps} the loss was above {factor:g} times its median of {median:.4g}'
    return Divergence(step, step - self._above + 1, f'{found}; {seen}')

  @property
  def notes(self) -> dict[str, Any]:
    """What it has to know to go on, as JSON values; empty for a run that needs nothing."""
    notes: dict[str, Any] = {}
    if self._losses:
      notes |= {'losses': list(self._losses), 'above': self._above}
    if self.steps_back.count:
      notes['steps_back'] = dataclasses.asdict(self.steps_back)
    return notes

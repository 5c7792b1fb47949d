"""The settings of what a run looks out for while it trains."""

import dataclasses

from saq_jax.training.bounds import ABOVE_0, within


@dataclasses.dataclass(frozen=True)
class WatchConfig:
  """What a run looks out for, and what it does then. All but `backoff` and
  `oscillation` may change between starts.

  Attributes:
    stall_seconds: a line tells what the loop waits for once it has waited so long for the devices
      or the disk. The first step and the first evaluation, which are compiled, are left out, and a
      later evaluation has the time of the slowest before it in addition. None: no line. For data
      there is `data.timeout`.
    stall_abort_seconds: after so long the process ends with exit code 1, for whoever started it to
      start it again. None: it waits on.
    spike_factor: a loss above so many times the median of the hundred before counts as diverged,
      as one that is not finite does, once `spike_steps` in a row were. None: it does not.
    spike_steps: how many.
    retries: how often a stage that diverged goes back to its last good checkpoint by itself and on
      from there, without the batches that it diverged with; 0: it stops.
    backoff: what the learning rate of the rest of the stage is multiplied by each time it does.
    oscillation: count the codes of weights that change, and that change to and fro, in the
      quantized stages: `codes_changed` and `codes_oscillating` in the metrics. It costs one
      rounding of the weights a step and 6 bytes a weight; see `saq_jax.oscillation`.
  """

  stall_seconds: float | None = within(300.0, ABOVE_0)
  stall_abort_seconds: float | None = within(3600.0, ABOVE_0)
  spike_factor: float | None = within(None, 1)
  spike_steps: int = within(20, 1)
  retries: int = within(0, 0)
  backoff: float = within(0.5, ABOVE_0, 1)
  oscillation: bool = False

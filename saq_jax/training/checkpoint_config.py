"""The settings of the checkpoints: which of them are kept."""

import dataclasses

from saq_jax.training.bounds import within


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Which checkpoints of a stage are kept. How often they are due: `checkpoint_every_epochs`.

  Attributes:
    keep: how many of the newest that were due.
    keep_best: also the one that an evaluation found most accurate so far, saved as soon as it did.
      Reports tell of the last, for the best was chosen by the split that it was evaluated on.
  """

  keep: int = within(3, 1)
  keep_best: bool = True

"""Exact evaluation: every example counts once, whatever the batch size and the devices."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from saq_jax._paths import PyTree
from saq_jax.data.datasets import Dataset
from saq_jax.data.source import eval_batches
from saq_jax.training.network import Network
from saq_jax.training.sharding import over_batch, replicated, to_devices
from saq_jax.training.step import StepConfig, eval_step


@dataclasses.dataclass(frozen=True)
class Score:
  """What an evaluation found.

  Attributes:
    correct: examples whose largest logit is that of their label.
    examples: examples seen.
    loss: mean cross-entropy, without label smoothing.
  """

  correct: int
  examples: int
  loss: float

  @property
  def accuracy(self) -> float:
    """The fraction that is correct."""
    return self.correct / self.examples


def make_evaluator(
  network: Network, config: StepConfig, mesh: Mesh, examples: Dataset, batch_size: int
) -> Callable[[PyTree, PyTree], Score]:
  """Makes the function that evaluates parameters on a split.

  Args:
    network: model and weight quantizer; the weights are quantized once an evaluation.
    config: for the normalisation.
    mesh: the devices the batches are spread over.
    examples: the split.
    batch_size: global; the last batch is padded, and the padding masked.

  Returns:
    A function of (params, batch_stats), compiled once.
  """
  whole, split = replicated(mesh), over_batch(mesh)
  quantize = jax.jit(network.quantize, out_shardings=whole)
  step = jax.jit(
    functools.partial(eval_step, network=network, config=config),
    in_shardings=(whole, whole, split),
    out_shardings=whole,
  )

  def evaluate(params: PyTree, batch_stats: PyTree) -> Score:
    z = quantize(params)
    batches = eval_batches(
      examples,
      batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    sums = [step(z, batch_stats, to_devices(batch, mesh)) for batch in batches]
    totals = {name: sum(float(s[name]) for s in sums) for name in ('correct', 'loss', 'count')}
    count = round(totals['count'])
    return Score(round(totals['correct']), count, totals['loss'] / count)

  return evaluate

"""Exact evaluation: every example counts once, whatever the batch size and the devices."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from saq_jax._paths import PyTree
from saq_jax.data.datasets import Dataset
from saq_jax.data.decode import RecordError
from saq_jax.data.loader import Loader, Reading
from saq_jax.data.source import eval_source
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
    damaged: examples that could not be decoded and were left out (`data.skip_damaged`).
  """

  correct: int
  examples: int
  loss: float
  damaged: int = 0

  @property
  def accuracy(self) -> float:
    """The fraction that is correct."""
    return self.correct / self.examples


def make_evaluator(
  network: Network,
  config: StepConfig,
  mesh: Mesh,
  examples: Dataset,
  batch_size: int,
  reading: Reading,
) -> Callable[[PyTree, PyTree], Score]:
  """Makes the function that evaluates parameters on a split.

  Args:
    network: model and weight quantizer; the weights are quantized once an evaluation.
    config: for the normalisation.
    mesh: the devices the batches are spread over.
    examples: the split.
    batch_size: global; the last batch is padded, and the padding masked.
    reading: how long to wait for a batch. Threads make them: processes would take longer to begin
      than most evaluations do.

  Returns:
    A function of (params, batch_stats), compiled once.
  """
  whole, split = replicated(mesh), over_batch(mesh)

  # Wherever the state lies, each device evaluates with all of it.
  @functools.partial(jax.jit, out_shardings=whole)
  def bring(params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    return network.quantize(params), batch_stats

  step = jax.jit(
    functools.partial(eval_step, network=network, config=config),
    in_shardings=(whole, whole, split),
    out_shardings=whole,
  )

  def evaluate(params: PyTree, batch_stats: PyTree) -> Score:
    z, batch_stats = bring(params, batch_stats)
    source = eval_source(
      examples,
      batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    transfer = functools.partial(to_devices, mesh=mesh)
    threads = dataclasses.replace(reading, workers=0)
    with Loader(source, 0, len(source), transfer, threads, decodes=examples.decodes) as batches:
      sums = [step(z, batch_stats, batch) for batch in batches]
    totals = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
    count, damaged = round(totals['count']), round(totals.get('damaged', 0))
    if not count:
      raise RecordError(f'none of the {damaged} images to evaluate on can be decoded')
    return Score(round(totals['correct']), count, totals['loss'] / count, damaged)

  return evaluate

"""Scores the networks of several seeds at once: accuracy, loss and sharpness."""

import copy
import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array

from saq_jax._paths import PyTree
from saq_jax.analysis.comparison import Scores
from saq_jax.analysis.sharpness import sharpness
from saq_jax.data.datasets import Dataset
from saq_jax.data.source import eval_source
from saq_jax.training.loop import Stage
from saq_jax.training.state import TrainState
from saq_jax.training.step import Batch, eval_step


class SeedScorer:
  """Scores groups of seeds exactly: every example counts once.

  Args:
    stage: how the network and its inputs are made; one of any method of the same network.
    train: for the sharpness, in evaluation mode and without augmentation.
    validation: the split that choices are made on.
    test: the split of the final figures.
    rho: the radius of the sharpness, common to all methods.
    adaptive_rho: of the sharpness with ASAM's scaling; None leaves that out.
    adaptive_eta: of that scaling.
  """

  def __init__(
    self,
    stage: Stage,
    train: Dataset,
    validation: Dataset,
    test: Dataset,
    rho: float,
    *,
    adaptive_rho: float | None = None,
    adaptive_eta: float = 0.01,
  ) -> None:
    self._stage, self._rho = stage, rho
    self._adaptive = adaptive_rho, adaptive_eta
    self._train, self._validation, self._test = (
      [jax.device_put(batch) for batch in eval_source(split, stage.eval_batch_size)]
      for split in (train, validation, test)
    )
    self._quantize = jax.jit(jax.vmap(stage.network.quantize))
    self._sums = jax.jit(jax.vmap(self._eval, in_axes=(0, 0, None)))
    self._grad = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

  def on(self, train: Dataset) -> 'SeedScorer':
    """The same scorer with another training split, with what was compiled.

    Args:
      train: for the sharpness.

    Returns:
      A scorer.
    """
    other = copy.copy(self)
    source = eval_source(train, self._stage.eval_batch_size)
    other._train = [jax.device_put(batch) for batch in source]
    return other

  def score(self, state: TrainState) -> dict[str, Any]:
    """Scores a state that has an axis of seeds in front.

    Args:
      state: what `SeedTrainer.train` returned.

    Returns:
      'validation' and 'test', each a `Scores`; 'train_loss' and 'sharpness', an entry a seed, and
      'adaptive_sharpness' where its radius was given.
    """
    z, batch_stats = self._quantize(state.params), state.batch_stats
    found, adaptive = jax.vmap(self._sharpness)(z, batch_stats)
    more = {} if adaptive is None else {'adaptive_sharpness': _floats(adaptive.rise)}
    return more | {
      'validation': self._scores(z, batch_stats, self._validation),
      'test': self._scores(z, batch_stats, self._test),
      'train_loss': _floats(found.loss),
      'sharpness': _floats(found.rise),
    }

  def validate(self, state: TrainState) -> Scores:
    """Scores a state on the validation split alone: what choices are made on.

    Args:
      state: what `SeedTrainer.train` returned.

    Returns:
      The scores, an entry a seed.
    """
    return self._scores(self._quantize(state.params), state.batch_stats, self._validation)

  def _scores(self, z: PyTree, batch_stats: PyTree, batches: list[Batch]) -> Scores:
    sums = jax.device_get([self._sums(z, batch_stats, batch) for batch in batches])
    totals = {name: sum(s[name].astype(np.float64) for s in sums) for name in sums[0]}
    return Scores(
      _floats(totals['correct'] / totals['count']), _floats(totals['loss'] / totals['count'])
    )

  def _sharpness(self, z: PyTree, batch_stats: PyTree) -> Any:
    """The sharpness, and that with ASAM's scaling or None."""
    begin, clean = z, {}

    def value_and_grad_fn(z: PyTree, batch: Batch) -> Any:
      if z is not begin:
        return self._grad(z, batch_stats, batch)
      # Both kinds begin with the same gradient.
      if id(batch) not in clean:
        clean[id(batch)] = self._grad(z, batch_stats, batch)
      return clean[id(batch)]

    found = sharpness(value_and_grad_fn, z, self._train, self._rho)
    radius, eta = self._adaptive
    if radius is None:
      return found, None
    return found, sharpness(value_and_grad_fn, z, self._train, radius, eta=eta)

  def _loss(self, z: PyTree, batch_stats: PyTree, batch: Batch) -> tuple[Array, Array]:
    # In float32: in bfloat16 most of the perturbation would be rounded away.
    model = self._stage.network.model.clone(dtype=None)
    network = dataclasses.replace(self._stage.network, model=model)
    sums = eval_step(z, batch_stats, batch, network=network, config=self._stage.step)
    return sums['loss'], sums['count']

  def _eval(self, z: PyTree, batch_stats: PyTree, batch: Batch) -> dict[str, Array]:
    network, config = self._stage.network, self._stage.step
    return eval_step(z, batch_stats, batch, network=network, config=config)


def _floats(values: Any) -> tuple[float, ...]:
  """An array as numbers that JSON takes."""
  return tuple(np.asarray(values, np.float64).tolist())

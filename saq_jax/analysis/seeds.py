"""Trains and scores one method for several seeds at once, each seed a run of its own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from saq_jax._paths import PyTree
from saq_jax.analysis.comparison import CASES, Scores
from saq_jax.analysis.sharpness import sharpness
from saq_jax.data.datasets import Dataset
from saq_jax.data.source import eval_source, train_source
from saq_jax.training.config import ExperimentConfig
from saq_jax.training.loop import Stage
from saq_jax.training.stages import make_stage
from saq_jax.training.state import TrainState, new_state, state_from_weights
from saq_jax.training.step import Batch, eval_step, prepare_images, train_step

Weights = tuple[PyTree, PyTree]


class SeedTrainer:
  """Trains groups of seeds, `jax.vmap` of the step that the training loop takes.

  Seed s has the weights, the order of the examples and the augmentation of a run with
  `config.seed + s`. A method is compiled once, whatever its radius. The loop over steps stays in
  Python: convolutions inside `lax.scan` are slow on CPUs.

  Args:
    config: the experiment; `saq.case` and `saq.rho` are replaced by those of each method.
    train: the training examples.
    on_step: called after each step with the mean loss over the seeds, of the step before (None
      at first); may raise to stop.
  """

  def __init__(
    self, config: ExperimentConfig, train: Dataset, on_step: Callable[[float | None], None]
  ) -> None:
    self._config, self._train, self._on_step = config, train, on_step
    self._begin: dict[bool, Any] = {}
    self._step: dict[str, Any] = {}

  def stage(self, method: str, rho: float | Array = 0.0) -> Stage:
    """The stage of a method: 'float', 'qat', or a case of `CASES` with its radius.

    Args:
      method: its name.
      rho: the radius of a case; may be traced.

    Returns:
      The stage, as the training loop would run it.
    """
    if method not in CASES:
      return make_stage(self._config, method, self._train)
    # `rho` may be a traced array: the schedule in the optimizer's chain closes over it.
    perturbation: Any = {'case': CASES[method], 'rho': rho}
    config = dataclasses.replace(
      self._config, saq=dataclasses.replace(self._config.saq, **perturbation)
    )
    return make_stage(config, 'saq', self._train)

  def train(
    self, method: str, rho: float, seeds: Sequence[int], weights: Weights | None
  ) -> TrainState:
    """Trains a method to its end.

    Args:
      method: 'float', 'qat' or a case of `CASES`.
      rho: the radius, for a case.
      seeds: trained at once.
      weights: parameters and running statistics to begin from, each leaf with an axis of seeds
        in front; None for random ones.

    Returns:
      The final state, each leaf with an axis of seeds in front.
    """
    stage = self.stage(method, rho)
    # All methods but 'float' begin alike, so that one compiled function serves them.
    begin = self._begin.setdefault(weights is None, _compiled_begin(stage, weights))
    step = self._step.setdefault(method, self._compiled_step(method))
    offsets = [self._config.seed + seed for seed in seeds]
    sources = [
      train_source(self._train, stage.batch_size, seed=seed, repeats=stage.repeats)
      for seed in offsets
    ]
    state = begin(jnp.array(offsets, jnp.uint32), _stack(sources, 0)['image'], weights)
    before: Array | None = None
    for t in range(stage.total_steps):
      state, metrics = step(state, _stack(sources, t), rho)
      # Read one step late, so that the device never waits.
      self._on_step(None if before is None else float(before.mean()))
      before = metrics['loss']
    return state

  def _compiled_step(self, method: str) -> Any:
    """The training step of all seeds, compiled, as a function of (state, batch, rho)."""

    def step(state: TrainState, batch: Batch, rho: Array) -> Any:
      stage = self.stage(method, rho)
      return train_step(
        state, batch, network=stage.network, tx=stage.tx, lr=stage.lr, config=stage.step
      )

    return jax.jit(jax.vmap(step, in_axes=(0, 0, None)), donate_argnums=0)


class SeedScorer:
  """Scores groups of seeds exactly: every example counts once.

  Args:
    stage: how the network and its inputs are made; one of any method of the same network.
    train: for the sharpness, in evaluation mode and without augmentation.
    validation: the split that choices are made on.
    test: the split of the final figures.
    rho: the radius of the sharpness, common to all methods.
  """

  def __init__(
    self, stage: Stage, train: Dataset, validation: Dataset, test: Dataset, rho: float
  ) -> None:
    self._stage, self._rho = stage, rho
    self._train, self._validation, self._test = (
      [jax.device_put(batch) for batch in eval_source(split, stage.eval_batch_size)]
      for split in (train, validation, test)
    )
    self._quantize = jax.jit(jax.vmap(stage.network.quantize))
    self._sums = jax.jit(jax.vmap(self._eval, in_axes=(0, 0, None)))
    self._grad = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

  def score(self, state: TrainState) -> dict[str, Any]:
    """Scores a state that has an axis of seeds in front.

    Args:
      state: what `SeedTrainer.train` returned.

    Returns:
      'validation' and 'test', each a `Scores`; 'train_loss' and 'sharpness', an entry a seed.
    """
    z, batch_stats = self._quantize(state.params), state.batch_stats
    found = jax.vmap(self._sharpness)(z, batch_stats)
    return {
      'validation': self._scores(z, batch_stats, self._validation),
      'test': self._scores(z, batch_stats, self._test),
      'train_loss': _floats(found.loss),
      'sharpness': _floats(found.rise),
    }

  def _scores(self, z: PyTree, batch_stats: PyTree, batches: list[Batch]) -> Scores:
    sums = jax.device_get([self._sums(z, batch_stats, batch) for batch in batches])
    totals = {name: sum(s[name].astype(np.float64) for s in sums) for name in sums[0]}
    return Scores(
      _floats(totals['correct'] / totals['count']), _floats(totals['loss'] / totals['count'])
    )

  def _sharpness(self, z: PyTree, batch_stats: PyTree) -> Any:
    def value_and_grad_fn(z: PyTree, batch: Batch) -> Any:
      return self._grad(z, batch_stats, batch)

    return sharpness(value_and_grad_fn, z, self._train, self._rho)

  def _loss(self, z: PyTree, batch_stats: PyTree, batch: Batch) -> tuple[Array, Array]:
    # In float32: in bfloat16 most of the perturbation would be rounded away.
    model = self._stage.network.model.clone(dtype=None)
    network = dataclasses.replace(self._stage.network, model=model)
    sums = eval_step(z, batch_stats, batch, network=network, config=self._stage.step)
    return sums['loss'], sums['count']

  def _eval(self, z: PyTree, batch_stats: PyTree, batch: Batch) -> dict[str, Array]:
    network, config = self._stage.network, self._stage.step
    return eval_step(z, batch_stats, batch, network=network, config=config)


def _compiled_begin(stage: Stage, weights: Weights | None) -> Any:
  """The states at step 0 as a function of (seeds, images, weights), compiled."""

  def begin(seed: Array, images: Array, weights: Weights | None) -> TrainState:
    inputs = prepare_images(images, stage.step)
    if weights is None:
      return new_state(stage.network, stage.tx, seed, inputs)
    return state_from_weights(stage.network, stage.tx, seed, inputs, *weights)

  return jax.jit(jax.vmap(begin, in_axes=(0, 0, None if weights is None else 0)))


def _stack(sources: Sequence[Any], step: int) -> dict[str, np.ndarray]:
  """The batches of a step, [seeds, batch, ...]."""
  batches = [source[step] for source in sources]
  return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _floats(values: Any) -> tuple[float, ...]:
  """An array as numbers that JSON takes."""
  return tuple(np.asarray(values, np.float64).tolist())

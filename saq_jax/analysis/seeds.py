"""Trains one method for several seeds at once, each seed a run of its own."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from saq_jax._paths import PyTree
from saq_jax.analysis.comparison import CASES
from saq_jax.analysis.seed_scorer import SeedScorer
from saq_jax.data.datasets import Dataset
from saq_jax.data.source import train_source
from saq_jax.training.config import ExperimentConfig
from saq_jax.training.loop import Stage
from saq_jax.training.stages import make_stage
from saq_jax.training.state import TrainState, new_state, state_from_weights
from saq_jax.training.step import Batch, prepare_images, train_step

__all__ = ['SeedScorer', 'SeedTrainer', 'Trained', 'Weights']

Weights = tuple[PyTree, PyTree]

_RATES = ('lr', 'scale_lr')


class Trained(NamedTuple):
  """What training some seeds gave.

  Attributes:
    state: at the end, each leaf with an axis of seeds in front; only counts of steps have none.
    second: [seeds], the part of the steps that took a second gradient.
  """

  state: TrainState
  second: Array


class SeedTrainer:
  """Trains groups of seeds, `jax.vmap` of the step that the training loop takes.

  Seed s has the weights, the order of the examples and the augmentation of a run with
  `config.seed + s`. A method is compiled once, whatever its radius. The loop over steps stays in
  Python: convolutions inside `lax.scan` are slow on CPUs. Counts of steps are common to the seeds,
  so that a step in which none of them takes a second gradient computes none; what a strategy
  draws at random is common to them too.

  Args:
    config: the experiment; `saq.case` and `saq.rho` are replaced by those of each method.
    train: the training examples.
    on_step: called after each step with the mean loss over the seeds, of the step before (None
      at first); may raise to stop.
    variants: further methods by name: each the 'saq' stage of an experiment like `config`, from
      which it may differ in `saq` and `strategy`.
  """

  def __init__(
    self,
    config: ExperimentConfig,
    train: Dataset,
    on_step: Callable[[float | None], None],
    variants: Mapping[str, ExperimentConfig] | None = None,
  ) -> None:
    self._config, self._train, self._on_step = config, train, on_step
    self._examples, self._variants = train, dict(variants or {})
    self._begin: dict[tuple[str, bool], Any] = {}
    self._step: dict[str, Any] = {}

  def on(self, examples: Dataset) -> 'SeedTrainer':
    """The same trainer over other examples of the same shape, with what was compiled.

    Args:
      examples: to train on. As many steps are taken as on `train`.

    Returns:
      A trainer.
    """
    other = copy.copy(self)
    other._examples = examples
    return other

  def stage(self, method: str, rho: float | Array = 0.0, lr_factor: float | Array = 1.0) -> Stage:
    """The stage of a method: 'float', 'qat', a case of `CASES` or a variant, with its radius.

    Args:
      method: its name.
      rho: the radius of all but the first two; may be traced.
      lr_factor: multiplies both learning rates of all but 'float'; may be traced.

    Returns:
      The stage, as the training loop would run it.
    """
    stage = self._stage(method, rho, lr_factor)
    # The examples of a seed are all on one device.
    return dataclasses.replace(stage, step=dataclasses.replace(stage.step, shards=1))

  def _stage(self, method: str, rho: float | Array, lr_factor: float | Array) -> Stage:
    if method == 'float':
      return make_stage(self._config, method, self._train)
    config = self._variants.get(method, self._config)
    # Traced arrays will do: the schedules in the optimizer's chain close over them.
    rates: Any = {name: lr_factor * getattr(config.quant_stage, name) for name in _RATES}
    config = dataclasses.replace(
      config, quant_stage=dataclasses.replace(config.quant_stage, **rates)
    )
    if method == 'qat':
      return make_stage(config, method, self._train)
    perturbation: Any = {'case': CASES.get(method, config.saq.case), 'rho': rho}
    config = dataclasses.replace(config, saq=dataclasses.replace(config.saq, **perturbation))
    return make_stage(config, 'saq', self._train)

  def train(
    self, method: str, rho: float, seeds: Sequence[int], weights: Weights | None
  ) -> TrainState:
    """Trains a method to its end.

    Args:
      method: 'float', 'qat', a case of `CASES` or a variant.
      rho: the radius, for a case or a variant.
      seeds: trained at once.
      weights: parameters and running statistics to begin from, each leaf with an axis of seeds
        in front; None for random ones.

    Returns:
      The final state, as in `Trained`.
    """
    return self.run(method, rho, seeds, weights).state

  def run(
    self,
    method: str,
    rho: float,
    seeds: Sequence[int],
    weights: Weights | None,
    *,
    lr_factor: float = 1.0,
  ) -> Trained:
    """Trains a method to its end, and counts the second gradients.

    Args:
      method: as in `train`, like the next three.
      rho: the radius.
      seeds: trained at once.
      weights: to begin from.
      lr_factor: as in `stage`.

    Returns:
      The final state, and the part of the steps that took a second gradient.
    """
    stage, sources = self.stage(method), self._sources(seeds)
    state = self.begin(method, seeds, weights)
    step = self._step.setdefault(method, self._compiled_step(method, _axes(state)))
    before: Array | None = None
    second: Array | float = 0.0
    for t in range(stage.total_steps):
      state, metrics = step(state, _stack(sources, t), rho, lr_factor)
      # Read one step late, so that the device never waits.
      self._on_step(None if before is None else float(before.mean()))
      before, second = metrics['loss'], second + metrics['second']
    return Trained(state, jnp.asarray(second) / stage.total_steps)

  def begin(self, method: str, seeds: Sequence[int], weights: Weights | None) -> TrainState:
    """The state at step 0, with the scales found from the weights and the first batch.

    Args:
      method: as in `train`, like the others.
      seeds: trained at once.
      weights: to begin from.

    Returns:
      The state, as in `Trained`.
    """
    # All methods but 'float' begin alike, so that one compiled function serves them.
    kind = 'float' if method == 'float' else 'qat'
    compiled = _compiled_begin(self.stage(kind), weights)
    begin = self._begin.setdefault((kind, weights is None), compiled)
    offsets = jnp.array([self._config.seed + seed for seed in seeds], jnp.uint32)
    state = begin(offsets, _stack(self._sources(seeds), 0)['image'], weights)
    opt_state = jax.vmap(self.stage(method).tx.init)(state.params)
    return _without_axis_of_counts(state.replace(opt_state=opt_state))

  def _sources(self, seeds: Sequence[int]) -> list[Any]:
    """The batches of each seed."""
    data, repeats = self._config.data, self._config.augment.repeats
    return [
      train_source(self._examples, data.batch_size, seed=self._config.seed + s, repeats=repeats)
      for s in seeds
    ]

  def _compiled_step(self, method: str, axes: Any) -> Any:
    """The training step of all seeds, compiled, as a function of (state, batch, rho, lr_factor)."""

    def step(state: TrainState, batch: Batch, rho: Array, lr_factor: Array) -> Any:
      stage, slot = self.stage(method, rho, lr_factor), state.opt_state[0]
      after, metrics = train_step(
        state, batch, network=stage.network, tx=stage.tx, lr=stage.lr, config=stage.step
      )
      # Where each seed chooses whether to take a second gradient, all that the choice returns has
      # an axis of seeds, this count too.
      begun, *rest = after.opt_state
      counted = begun._replace(step=optax.safe_increment(slot.step))
      return after.replace(opt_state=(counted, *rest)), metrics  # type: ignore[attr-defined]

    mapped = jax.vmap(step, in_axes=(axes, 0, None, None), out_axes=(axes, 0))
    return jax.jit(mapped, donate_argnums=0)


def _compiled_begin(stage: Stage, weights: Weights | None) -> Any:
  """The states at step 0 as a function of (seeds, images, weights), compiled."""

  def begin(seed: Array, images: Array, weights: Weights | None) -> TrainState:
    inputs = prepare_images(images, stage.step)
    if weights is None:
      return new_state(stage.network, stage.tx, seed, inputs)
    return state_from_weights(stage.network, stage.tx, seed, inputs, *weights)

  return jax.jit(jax.vmap(begin, in_axes=(0, 0, None if weights is None else 0)))


def _axes(state: TrainState) -> Any:
  """For `jax.vmap`: None for each count of steps, 0 for all other leaves of a state."""
  return jax.tree_util.tree_map_with_path(lambda path, _: None if _is_count(path) else 0, state)


def _without_axis_of_counts(state: TrainState) -> TrainState:
  """A state whose leaves all have an axis of seeds, with counts of steps as one number."""
  return jax.tree_util.tree_map_with_path(lambda path, x: x[0] if _is_count(path) else x, state)


def _is_count(path: Any) -> bool:
  """Whether a leaf of the state is a count of steps, the same for all seeds."""
  return jax.tree_util.keystr(path[-1:], simple=True) in ('step', 'count')


def _stack(sources: Sequence[Any], step: int) -> dict[str, np.ndarray]:
  """The batches of a step, [seeds, batch, ...]."""
  batches = [source[step] for source in sources]
  return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

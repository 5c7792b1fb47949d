"""How flat the loss is around the networks of a run: every figure of the flatness report."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from saq_jax._paths import PyTree
from saq_jax.analysis.codes import diminishment, mismatch
from saq_jax.analysis.flatness_run import Trained
from saq_jax.analysis.hessian import hessian_eigenvalues, hessian_trace
from saq_jax.analysis.landscape import filter_normalized, landscape_1d, landscape_2d
from saq_jax.analysis.sharpness import mean_gradient, sharpness
from saq_jax.perturbation import mask_tree, perturb, perturbed_by_default
from saq_jax.training.step import eval_step

Batch = dict[str, Any]

# What a gradient and a product with the Hessian take, in forward passes.
_GRADIENT, _PRODUCT = 3, 8
# ASAM moves each weight by a share of its size; its authors take ten times the radius of SAM.
ADAPTIVE_FACTOR = 10
_ETA = 0.01
_LABELS = {'float': 'Full precision', 'qat': 'QAT', 'saq': 'SAQ'}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is measured.

  Attributes:
    rhos: radii of sharpness and diminishment, ascending.
    eigenvalues: how many of the largest.
    grid: points a side of the plane; odd, so that the trained weights are one of them.
    seed: of the random directions.
    samples: random vectors for the trace.
  """

  rhos: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
  eigenvalues: int = 3
  grid: int = 11
  seed: int = 0
  samples: int = 10

  @property
  def steps(self) -> int:
    """Products with the Hessian for the eigenvalues, at most."""
    return max(30, 5 * self.eigenvalues)

  @property
  def passes(self) -> int:
    """What one network takes, in forward passes over all examples, about."""
    gradients, products = 1 + 4 * len(self.rhos), self.steps + self.samples
    points = 1 + 2 * (2 * self.grid - 1) + self.grid**2
    return points + _GRADIENT * gradients + _PRODUCT * products


class Losses:
  """The loss of a trained network, as a function of its quantized weights, over some examples.

  Args:
    trained: the network.
    batches: the examples.
  """

  def __init__(self, trained: Trained, batches: Sequence[Batch]) -> None:
    self.trained, self.batches = trained, batches
    self.z = jax.jit(trained.stage.network.quantize)(trained.params)
    self.loss_fn = jax.jit(self._loss)
    self.value_and_grad_fn = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

  def _loss(self, z: PyTree, batch: Batch) -> tuple[Array, Array]:
    """The sum of the losses of a batch, and their number."""
    sums = self._sums(z, batch)
    return sums['loss'], sums['count']

  def _sums(self, z: PyTree, batch: Batch) -> dict[str, Array]:
    stage = self.trained.stage
    return eval_step(
      z, self.trained.batch_stats, batch, network=stage.network, config=stage.step
    )  # fmt: skip

  def score(self) -> dict[str, Any]:
    """The mean loss and the share of right answers.

    Returns:
      'loss', 'accuracy', 'correct' and 'examples'.
    """
    step = jax.jit(self._sums)
    sums = [step(self.z, batch) for batch in self.batches]
    totals = {name: sum(float(s[name]) for s in sums) for name in ('loss', 'correct', 'count')}
    count, correct = round(totals['count']), round(totals['correct'])
    return {
      'loss': totals['loss'] / count,
      'accuracy': correct / count,
      'correct': correct,
      'examples': count,
    }

  def gradient(self) -> PyTree:
    """The gradient of the mean loss at the quantized weights.

    Returns:
      A tree like z.
    """
    return mean_gradient(self.value_and_grad_fn, self.z, self.batches)[1]


def measure(
  trained: Trained,
  batches: Sequence[Batch],
  plan: Plan,
  on_pass: Callable[[int], None] = lambda passes: None,
) -> dict[str, Any]:
  """Measures one network.

  Args:
    trained: the network.
    batches: the examples.
    plan: what is measured.
    on_pass: is told after each piece of work how many forward passes it took, or would take.

  Returns:
    JSON values, of which numbers may be NaN: 'name', 'label', 'step', 'total_steps', the score,
    'sharpness' and 'adaptive_sharpness' (lists of rho and rise), 'eigenvalues' (value, residual),
    'trace', 'line', 'plane' (loss[i][k] is at radii[i] of direction 1 and radii[k] of 2), and
    'diminishment', 'mismatch' and 'oscillation', each None where there is nothing to measure.
  """
  losses = Losses(trained, batches)
  figures: dict[str, Any] = {
    'name': trained.stage.name,
    'label': _LABELS[trained.stage.name],
    'step': trained.step,
    'total_steps': trained.stage.total_steps,
    'test_accuracy': trained.test_accuracy,
    **losses.score(),
  }
  g = losses.gradient()
  on_pass(1 + _GRADIENT)
  figures |= _sharpness(losses, plan, on_pass)
  figures |= _curvature(losses, plan, on_pass)
  figures |= _landscape(losses, g, plan, on_pass)
  figures |= _rounding(trained, g, plan)
  return figures | {'oscillation': trained.codes}


def _sharpness(losses: Losses, plan: Plan, on_pass: Callable[[int], None]) -> dict[str, Any]:
  """The rise of the loss at every radius, plain and scale-invariant."""
  found: dict[str, Any] = {'sharpness': [], 'adaptive_sharpness': []}
  for rho in plan.rhos:
    kinds = ('sharpness', rho, None), ('adaptive_sharpness', ADAPTIVE_FACTOR * rho, _ETA)
    for kind, radius, eta in kinds:
      rise = sharpness(losses.value_and_grad_fn, losses.z, losses.batches, radius, eta=eta).rise
      found[kind].append({'rho': radius, 'rise': float(rise)})
      on_pass(2 * _GRADIENT)
  return found


def _curvature(losses: Losses, plan: Plan, on_pass: Callable[[int], None]) -> dict[str, Any]:
  """The largest eigenvalues of the Hessian with their residuals, and its trace."""
  at = losses.value_and_grad_fn, losses.z, losses.batches
  first, signs = jax.random.split(jax.random.key(plan.seed))

  def on_step(*_: int) -> None:
    on_pass(_PRODUCT)

  try:
    found = hessian_eigenvalues(
      *at, plan.eigenvalues, steps=plan.steps, key=first, on_step=on_step
    )  # fmt: skip
    pairs = list(zip(_floats(found.values), _floats(found.residuals), strict=True))
  except FloatingPointError:  # of a network whose loss is not finite
    pairs = [(math.nan, math.nan)] * plan.eigenvalues
  mean, error = hessian_trace(*at, plan.samples, key=signs, on_step=on_step)
  return {
    'eigenvalues': [{'value': value, 'residual': residual} for value, residual in pairs],
    'trace': {'mean': mean, 'standard_error': error, 'samples': plan.samples},
  }


def _landscape(
  losses: Losses, g: PyTree, plan: Plan, on_pass: Callable[[int], None]
) -> dict[str, Any]:
  """The loss along the gradient, along a random direction, and in a plane."""

  def on_step(*_: int) -> None:
    on_pass(1)

  z = losses.z
  at = losses.loss_fn, z, losses.batches
  draw = jax.jit(functools.partial(filter_normalized, mask=perturbed_by_default))
  first, second = (draw(key, z) for key in jax.random.split(jax.random.key(plan.seed + 1)))
  widest = plan.rhos[-1]
  zero = jax.tree.map(jnp.zeros_like, z)
  uphill, _ = perturb(zero, g, 1.0, mask_tree(perturbed_by_default, z))
  line: dict[str, Any] = {}
  for kind, direction, end in (('gradient', uphill, widest), ('random', first, 1.0)):
    radii = np.linspace(-end, end, 2 * plan.grid - 1)
    found = landscape_1d(*at, direction, radii, on_step=on_step)
    line[kind] = {'radii': _floats(radii), 'loss': _floats(found)}
  radii = np.linspace(-1, 1, plan.grid)
  plane = landscape_2d(*at, (first, second), radii, on_step=on_step)
  return {'line': line, 'plane': {'radii': _floats(radii), 'loss': plane.tolist()}}


def _rounding(trained: Trained, g: PyTree, plan: Plan) -> dict[str, Any]:
  """What rounding does to a perturbation and to the gradient; None at full precision."""
  if not trained.quantized:
    return {'diminishment': None, 'mismatch': None}
  quantize, params = trained.stage.network.quantize, trained.params
  (p,) = jax.jit(lambda at, g: jax.vjp(quantize, at)[1](g))(params, g)
  at = jax.jit(functools.partial(diminishment, quantize))
  found = []
  for rho in plan.rhos:
    flips, added, seen = at(params, p, rho)
    figures = {'flipped': flips.fraction, 'added': added, 'seen': seen}
    found.append({'rho': rho} | {name: float(value) for name, value in figures.items()})
  angle = jax.jit(functools.partial(mismatch, quantize))(params, g)
  return {
    'diminishment': found,
    'mismatch': {
      'degrees': float(angle.degrees),
      'cosine': float(angle.cosine),
      'by_path': {path: float(degrees) for path, degrees in angle.by_path.items()},
    },
  }


def _floats(values: Any) -> list[float]:
  """An array as numbers that JSON takes."""
  found: list[float] = np.asarray(values, np.float64).tolist()
  return found

"""Which tensors a perturbation is of, and which examples the second gradient is of."""

import jax.numpy as jnp
import numpy as np
import pytest
from transform_reference import NO_SCALES, RHO, B, S, ThreeBitLIQ, V, W, flat, grad_fn, tree

from saq_jax import hardest, only, saq


def perturbed_points(slot, steps):
  points = []

  def second(z):
    points.append(flat(z))
    return grad_fn(z)

  params = tree(V)
  g, state = grad_fn(ThreeBitLIQ.fn(params)), slot.init(params)
  for _ in range(steps):
    _, state = slot.update(g, state, params, grad_fn=second)
  return np.array(points) - flat(ThreeBitLIQ.fn(params))


def test_tensors_are_drawn_and_their_perturbation_is_divided_by_the_probability():
  beta, steps = 0.6, 300
  whole = perturbed_points(saq(ThreeBitLIQ.fn, RHO), 1)[0]
  drawn = perturbed_points(saq(ThreeBitLIQ.fn, RHO, tensors=beta, seed=3), steps)
  for part in (B, W):
    moved = np.abs(drawn[:, part]).sum(1) > 0
    np.testing.assert_allclose(
      drawn[moved][:, part], np.tile(whole[part] / beta, (moved.sum(), 1)), rtol=1e-4, atol=1e-6
    )
    assert abs(moved.mean() - beta) < 4 * np.sqrt(beta * (1 - beta) / steps)
  np.testing.assert_array_equal(drawn[:, S], 0)
  together = np.corrcoef(*(np.abs(drawn[:, part]).sum(1) > 0 for part in (B, W)))[0, 1]
  assert abs(together) < 4 / np.sqrt(steps)


def test_only_the_chosen_leaves_are_perturbed():
  moved = perturbed_points(saq(ThreeBitLIQ.fn, RHO, mask=only('model/b')), 1)[0]
  np.testing.assert_array_equal(moved[3:], 0)
  np.testing.assert_allclose(np.linalg.norm(moved[B]), RHO, rtol=1e-5)
  # Of another mask, which leaves the scales out.
  both = only('model/b', 'scales/w')
  np.testing.assert_allclose(perturbed_points(saq(ThreeBitLIQ.fn, RHO, mask=both), 1)[0], moved)
  every_leaf = only('.*', among=lambda _: True)
  assert perturbed_points(saq(ThreeBitLIQ.fn, RHO, mask=every_leaf), 1)[0].all()
  assert NO_SCALES.sum() == np.count_nonzero(perturbed_points(saq(ThreeBitLIQ.fn, RHO), 1)[0])


@pytest.mark.parametrize('fraction', [0.01, 0.3, 0.5, 1.0])
def test_the_hardest_examples_are_those_whose_loss_rises_most(fraction):
  rng = np.random.default_rng(0)
  clean, perturbed = rng.normal(size=(2, 24))
  for groups in (1, 2, 8):
    found = np.asarray(hardest(jnp.array(clean), jnp.array(perturbed), fraction, groups))
    rise = (perturbed - clean).reshape(groups, -1)
    count = int(np.ceil(fraction * 24 / groups))
    np.testing.assert_array_equal(found, np.argsort(-rise, axis=1)[:, :count])


@pytest.mark.parametrize(('fraction', 'count'), [(0.07, 7), (0.55, 55), (0.071, 8), (1e-9, 1)])
def test_the_number_of_the_hardest_is_not_that_of_a_rounded_product(fraction, count):
  assert hardest(jnp.zeros(100), jnp.arange(100.0), fraction).shape == (1, count)

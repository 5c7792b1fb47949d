"""Filter norms by NumPy, and landscapes against a quadratic's closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saq_jax.analysis.landscape import filter_normalized, landscape_1d, landscape_2d

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
A = RNG.normal(size=(4, 3)).astype(np.float32)
Z = RNG.normal(size=3).astype(np.float32)
ROWS = RNG.normal(size=(7, 4)).astype(np.float32)
D, E = RNG.normal(size=(2, 3)).astype(np.float32)
RADII = [-1.0, -0.25, 0.0, 0.5, 2.0]
WEIGHTS = {
  'model': {
    'conv': {'kernel': RNG.normal(size=(3, 3, 2, 5)), 'bias': RNG.normal(size=5)},
    'norm': {'scale': np.ones(5), 'bias': np.zeros(5)},
    'fc': {
      'kernel': RNG.normal(size=(5, 4)) * [0, 1, 1e-3, 1e3],
      'input': {'quant_scale': np.ones((1, 5))},
    },
  },
  'scales': {'model/fc/kernel': np.ones((1, 4))},
}
WEIGHTS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), WEIGHTS)


def quadratic(z, batch):
  """Half the squared distance of each real row of the batch to A z, summed; NaN is padding."""
  real = ~jnp.isnan(batch[:, 0])
  losses = 0.5 * jnp.sum((A @ z - jnp.nan_to_num(batch)) ** 2, axis=1)
  return jnp.sum(losses * real), jnp.sum(real)


def padded(*sizes):
  """The rows in batches of these sizes, each with a row that must not count."""
  nothing = np.full((1, 4), np.nan, np.float32)
  return [np.concatenate([rows, nothing]) for rows in np.split(ROWS, np.cumsum(sizes)[:-1])]


def closed_form(z):
  return 0.5 * np.mean(np.sum((A.astype(np.float64) @ z - ROWS) ** 2, axis=1))


# Directions.


@pytest.mark.parametrize('path', ['conv', 'fc'])
def test_filters_have_the_norms_of_those_of_the_weights(path):
  kernel = np.asarray(WEIGHTS['model'][path]['kernel'])
  found = np.asarray(filter_normalized(KEY, WEIGHTS)['model'][path]['kernel'])
  for i in range(kernel.shape[-1]):
    wanted = np.sqrt(np.sum(kernel[..., i].astype(np.float64) ** 2))
    np.testing.assert_allclose(np.linalg.norm(found[..., i]), wanted, rtol=1e-6)


def test_biases_norms_and_scales_stay():
  found = filter_normalized(KEY, WEIGHTS)
  still = [
    found['model']['conv']['bias'],
    found['model']['norm'],
    found['model']['fc']['input'],
    found['scales'],
  ]
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(still))
  assert jax.tree.structure(found) == jax.tree.structure(WEIGHTS)


def test_the_mask_chooses_what_is_moved():
  found = filter_normalized(KEY, WEIGHTS, lambda path: 'fc/kernel' in path)
  assert np.any(found['model']['fc']['kernel'])
  assert not np.any(found['model']['conv']['kernel'])
  with pytest.raises(ValueError, match='chooses no leaf'):
    filter_normalized(KEY, WEIGHTS, lambda path: False)


def test_directions_are_normal_and_unlike_each_other():
  kernel = {'a': jnp.ones((4000, 2)), 'b': jnp.ones((4000, 2))}
  one, two = (filter_normalized(key, kernel) for key in jax.random.split(KEY))
  for x in (one['a'], one['b']):
    # The norm of 4000 ones is that of 4000 standard normal numbers, nearly.
    assert abs(np.mean(x)) < 0.05
    assert abs(np.mean(x**4) - 3) < 0.4
  for x, y in [(one['a'], one['b']), (one['a'], two['a']), (one['a'][:, 0], one['a'][:, 1])]:
    assert abs(np.corrcoef(np.ravel(x), np.ravel(y))[0, 1]) < 0.05


def test_half_precision_weights_are_moved_in_float32():
  z = {'w': jnp.ones((2, 2), jnp.bfloat16)}
  found = filter_normalized(KEY, z)
  assert found['w'].dtype == jnp.float32
  step = {'w': jnp.full((2, 2), 1e-4)}
  losses = landscape_1d(lambda z, batch: (jnp.sum(z['w'] - 1), 1), z, [None], step, [0, 1])
  np.testing.assert_allclose(losses, [0, 4e-4], rtol=1e-3)


# Landscapes.


@pytest.mark.parametrize('sizes', [[7], [3, 4], [1, 1, 5]])
def test_line_through_a_quadratic(sizes):
  found = landscape_1d(quadratic, Z, padded(*sizes), D, RADII)
  np.testing.assert_allclose(found, [closed_form(Z + a * D) for a in RADII], rtol=1e-5)
  assert found.dtype == np.float64


def test_plane_through_a_quadratic():
  found = landscape_2d(quadratic, Z, padded(3, 4), (D, E), np.array(RADII))
  wanted = [[closed_form(Z + a * D + b * E) for b in RADII] for a in RADII]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_compiled_once_and_each_point_is_told():
  traces, seen = [], []

  def loss_sum(z, batch):
    traces.append(len(batch))
    return quadratic(z, batch)

  batches = [ROWS[:3], ROWS[3:6], ROWS[6:]]
  landscape_2d(loss_sum, Z, batches, (D, E), RADII, on_step=lambda *step: seen.append(step))
  landscape_2d(loss_sum, 2 * Z, batches, (E, D), [0.1])
  assert sorted(traces) == [1, 3]
  assert seen == [(i + 1, 25) for i in range(25)]


def test_a_loss_that_diverges_stays_so():
  found = landscape_1d(lambda z, batch: (jnp.exp(z), 1), jnp.array(0.0), [None], 1.0, [0, 1e3])
  assert found.tolist() == [1, np.inf]


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'batches': []}, 'at least one batch'),
    ({'radii': []}, 'at least one'),
    ({'radii': [[1.0]]}, 'a list of finite numbers'),
    ({'radii': [np.nan]}, 'a list of finite numbers'),
    ({'direction': {'w': D}}, 'the direction has another structure'),
  ],
)
def test_bad_arguments(given, message):
  arguments = {'batches': [ROWS], 'radii': RADII, 'direction': D, **given}
  with pytest.raises(ValueError, match=message) as error:
    landscape_1d(quadratic, Z, **arguments)
  assert '\n' not in str(error.value)


def test_a_plane_takes_two_directions():
  with pytest.raises(ValueError, match='two directions, and was given 1'):
    landscape_2d(quadratic, Z, [ROWS], (D,), RADII)

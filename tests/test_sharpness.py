"""Sharpness against its closed form on a quadratic, and against NumPy on softmax regression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saq_jax.analysis.sharpness import sharpness

RNG = np.random.default_rng(0)
RHO = 0.3


def quadratic(z, batch):
  """Half the squared distance of each row of A z to a row of the batch, summed."""
  return 0.5 * jnp.sum((A @ z - batch) ** 2), len(batch)


A = RNG.normal(size=(4, 3)).astype(np.float32)
Z = RNG.normal(size=3).astype(np.float32)
ROWS = RNG.normal(size=(7, 4)).astype(np.float32)


@pytest.mark.parametrize('sizes', [[7], [3, 4], [1, 1, 5]])
def test_quadratic_has_its_closed_form(sizes):
  batches = np.split(ROWS, np.cumsum(sizes)[:-1])
  found = sharpness(jax.value_and_grad(quadratic, has_aux=True), Z, batches, RHO)
  g = A.T @ (A @ Z - ROWS.mean(0))
  norm = np.linalg.norm(g)
  rise = RHO * norm + 0.5 * (RHO / norm) ** 2 * np.sum((A @ g) ** 2)
  np.testing.assert_allclose(found.rise, rise, rtol=1e-5)
  np.testing.assert_allclose(found.grad_norm, norm, rtol=1e-5)
  np.testing.assert_allclose(found.perturbed_loss - found.loss, found.rise)


# Softmax regression with parameters as `saq` sees them: some are shifted, scales are not.

X = RNG.normal(size=(10, 5)).astype(np.float32)
Y = RNG.integers(0, 3, 10)
PARAMS = {
  'model': {
    'fc': {
      'kernel': RNG.normal(size=(5, 3)).astype(np.float32),
      'bias': RNG.normal(size=3).astype(np.float32),
      'input': {'quant_scale': np.float32(1.7)},
    }
  },
  'scales': {'model/fc/kernel': np.float32(0.6)},
}


def padded(size):
  """The examples in batches of one size, the last one filled up with what must not count."""
  for start in range(0, len(X), size):
    here = slice(start, start + size)
    fill = size - len(X[here])
    yield {
      'x': np.concatenate([X[here], np.full((fill, 5), 1e3, np.float32)]),
      'y': np.concatenate([Y[here], np.zeros(fill, Y.dtype)]),
      'mask': np.concatenate([np.ones(size - fill), np.zeros(fill)]).astype(np.float32),
    }


def regression(z, batch):
  fc = z['model']['fc']
  scale = fc['input']['quant_scale'] * z['scales']['model/fc/kernel']
  logits = scale * batch['x'] @ fc['kernel'] + fc['bias']
  losses = -jax.nn.log_softmax(logits)[jnp.arange(len(batch['y'])), batch['y']]
  return jnp.sum(losses * batch['mask']), jnp.sum(batch['mask'])


def numpy_loss(kernel, bias):
  """The mean loss and its gradients by the textbook, in float64."""
  logits = 1.7 * 0.6 * X.astype(np.float64) @ kernel + bias
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  error = (p - np.eye(3)[Y]) / len(X)
  return -np.log(p[np.arange(len(X)), Y]).mean(), 1.7 * 0.6 * X.T @ error, error.sum(0)


@pytest.mark.parametrize('size', [1, 4, 10, 16])
def test_regression_equals_numpy_whatever_the_padding(size):
  fn = jax.value_and_grad(regression, has_aux=True)
  found = jax.jit(lambda z: sharpness(fn, z, list(padded(size)), RHO))(PARAMS)
  fc = PARAMS['model']['fc']
  loss, g_kernel, g_bias = numpy_loss(fc['kernel'], fc['bias'])
  norm = np.sqrt(np.sum(g_kernel**2) + np.sum(g_bias**2))
  moved, _, _ = numpy_loss(fc['kernel'] + RHO * g_kernel / norm, fc['bias'] + RHO * g_bias / norm)
  np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
  np.testing.assert_allclose(found.rise, moved - loss, rtol=1e-4)


def test_mask_leaves_out_what_it_names():
  fn = jax.value_and_grad(regression, has_aux=True)
  found = sharpness(fn, PARAMS, list(padded(4)), RHO, mask=lambda path: path.endswith('/bias'))
  fc = PARAMS['model']['fc']
  loss, _, g_bias = numpy_loss(fc['kernel'], fc['bias'])
  moved, _, _ = numpy_loss(fc['kernel'], fc['bias'] + RHO * g_bias / np.linalg.norm(g_bias))
  np.testing.assert_allclose(found.rise, moved - loss, rtol=1e-4)


def test_vmap_is_one_after_another():
  fn = jax.jit(jax.value_and_grad(quadratic, has_aux=True))
  many = RNG.normal(size=(3, 3)).astype(np.float32)
  together = jax.vmap(lambda z: sharpness(fn, z, [ROWS[:4], ROWS[4:]], RHO))(many)
  alone = [sharpness(fn, z, [ROWS[:4], ROWS[4:]], RHO) for z in many]
  np.testing.assert_allclose(together.rise, [found.rise for found in alone], rtol=1e-5)


def test_zero_gradient_and_zero_radius_give_no_rise():
  fn = jax.value_and_grad(lambda z, batch: (jnp.sum(0.0 * z), 1), has_aux=True)
  assert float(sharpness(fn, Z, [None], RHO).rise) == 0
  fn = jax.value_and_grad(quadratic, has_aux=True)
  assert float(sharpness(fn, Z, [ROWS], 0.0).rise) == 0


def test_no_batch():
  with pytest.raises(ValueError, match='at least one batch'):
    sharpness(jax.value_and_grad(quadratic, has_aux=True), Z, [], RHO)


# ASAM's sharpness.


@pytest.mark.parametrize('eta', [0.0, 0.01, 1.0])
def test_adaptive_step_has_its_closed_form(eta):
  found = sharpness(jax.value_and_grad(quadratic, has_aux=True), Z, [ROWS], RHO, eta=eta)
  g, t = A.T @ (A @ Z - ROWS.mean(0)), np.abs(Z) + eta
  eps = RHO * t**2 * g / np.linalg.norm(t * g)
  np.testing.assert_allclose(found.rise, g @ eps + 0.5 * np.sum((A @ eps) ** 2), rtol=1e-5)
  np.testing.assert_allclose(found.grad_norm, np.linalg.norm(t * g), rtol=1e-5)


def test_adaptive_sharpness_does_not_see_scales_that_cancel():
  """c W1 and W2 / c with a ReLU between are one function."""

  def loss_sum(z, batch):
    hidden = jax.nn.relu(batch @ z['in'])
    return jnp.sum(jax.nn.logsumexp(hidden @ z['out'], axis=-1)), len(batch)

  z = {'in': RNG.normal(size=(5, 6)), 'out': RNG.normal(size=(6, 3))}
  z = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), z)
  scaled = {'in': 8 * z['in'], 'out': z['out'] / 8}
  fn = jax.value_and_grad(loss_sum, has_aux=True)
  plain, same = (sharpness(fn, here, [X], RHO, eta=0.0).rise for here in (z, scaled))
  np.testing.assert_allclose(same, plain, rtol=1e-4)
  plain, other = (sharpness(fn, here, [X], RHO).rise for here in (z, scaled))
  assert other > 2 * plain


@pytest.mark.parametrize('eta', [-0.1, np.inf, np.nan])
def test_bad_eta(eta):
  with pytest.raises(ValueError, match=r'sharpness\(eta='):
    sharpness(jax.value_and_grad(quadratic, has_aux=True), Z, [ROWS], RHO, eta=eta)

"""The Hessian's eigenvalues and trace against closed forms and against the dense Hessian."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from saq_jax import LIQ, QuantRule, weight_quantizer
from saq_jax import _ste as ste
from saq_jax.analysis.hessian import hessian_eigenvalues, hessian_trace
from saq_jax.layers import Conv, Dense
from saq_jax.perturbation import mask_tree, perturbed_by_default
from saq_jax.training.config import ModelConfig, QuantConfig
from saq_jax.training.network import Network, build_network

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
ROTATION = np.linalg.qr(RNG.normal(size=(12, 12)))[0]


def grad_of(loss_sum):
  return jax.value_and_grad(loss_sum, has_aux=True)


def quadratic(spectrum):
  """A gradient function whose Hessian has that spectrum, rotated, and its dense Hessian."""
  rotation = np.linalg.qr(ROTATION[: len(spectrum), : len(spectrum)])[0]
  dense = rotation @ np.diag(spectrum) @ rotation.T
  matrix = jnp.asarray(dense, jnp.float32)
  return grad_of(lambda z, batch: (0.5 * len(batch) * z @ matrix @ z, len(batch))), dense


# Every one: spectrum, how many are asked for, and the steps that may be needed.
SPECTRA = {
  'distinct': ([9.0, 4.0, 3.5, 1.0, 0.2, 0.0], 3, 6),
  'negative': ([5.0, 1.0, -8.0, -2.0, -3.0], 4, 5),
  'all below zero': ([-1.0, -2.0, -3.0], 2, 3),
  'repeated': ([5.0, 5.0, 5.0, 3.0, 3.0, 1.0, -2.0, -2.0], 6, 8),
  'low rank': ([7.0, 2.0, *[0.0] * 10], 4, 4),
  'one eigenspace': ([2.0] * 9, 5, 1),
  'zero': ([0.0] * 7, 3, 1),
  'one parameter': ([-4.0], 1, 1),
}


@pytest.mark.parametrize('name', SPECTRA)
def test_spectrum_of_a_quadratic(name):
  spectrum, count, most = SPECTRA[name]
  fn, dense = quadratic(spectrum)
  z = jnp.asarray(RNG.normal(size=len(spectrum)), jnp.float32)
  found = hessian_eigenvalues(fn, z, [np.zeros(3)], count, steps=30, key=KEY)
  scale = max(map(abs, spectrum))
  np.testing.assert_allclose(found.values, sorted(spectrum)[::-1][:count], atol=1e-5 * scale)
  assert found.steps <= most
  assert (found.residuals <= 3e-5 * scale).all()
  assert found.asymmetry < 1e-5
  vectors = np.array(found.vectors, np.float64)
  np.testing.assert_allclose(vectors @ vectors.T, np.eye(count), atol=1e-5)
  np.testing.assert_allclose(vectors @ dense, found.values[:, None] * vectors, atol=3e-5 * scale)


def test_residuals_bound_the_error_before_convergence():
  spectrum = np.linspace(0, 1, 12) ** 2
  fn, dense = quadratic(spectrum)
  for steps in (2, 4, 7):
    found = hessian_eigenvalues(fn, jnp.ones(12), [np.zeros(1)], 2, steps=steps, key=KEY)
    assert found.steps == steps
    vectors = np.array(found.vectors, np.float64)
    error = np.linalg.norm(vectors @ dense - found.values[:, None] * vectors, axis=1)
    np.testing.assert_allclose(found.residuals, error, atol=1e-5)
    assert found.residuals[0] > 1e-3
    assert (np.abs(found.values[:, None] - spectrum).min(1) <= found.residuals + 1e-6).all()


def test_float64_is_used_where_the_weights_are():
  with jax.enable_x64(True):
    matrix = jnp.asarray(ROTATION @ np.diag(np.arange(12.0)) @ ROTATION.T)
    fn = grad_of(lambda z, batch: (0.5 * z @ matrix @ z, 1))
    found = hessian_eigenvalues(fn, jnp.ones(12), [None], 3, steps=12, key=KEY)
    np.testing.assert_allclose(found.values, [11, 10, 9], rtol=1e-12)


def test_half_precision_weights_are_widened():
  fn, _ = quadratic([4.0, 2.0, 1.0])
  found = hessian_eigenvalues(fn, jnp.ones(3, jnp.bfloat16), [np.zeros(1)], 3, key=KEY)
  np.testing.assert_allclose(found.values, [4, 2, 1], rtol=1e-5)
  assert found.vectors[0].dtype == jnp.float32


def test_a_hessian_that_is_not_symmetric_is_told():
  """A 'gradient' of no function, (z, A z): values are those of the symmetric part."""
  matrix = jnp.array([[3.0, 1.0], [0.0, 1.0]])
  symmetric = np.array([[3.0, 0.5], [0.5, 1.0]])
  found = hessian_eigenvalues(
    lambda z, batch: ((0.0, 1), matrix @ z), jnp.ones(2), [None], 2, key=KEY
  )
  np.testing.assert_allclose(found.values, np.linalg.eigvalsh(symmetric)[::-1], rtol=1e-5)
  # |A - A'| / |A| is unchanged by a rotation.
  np.testing.assert_allclose(found.asymmetry, np.sqrt(2 / 11), rtol=1e-5)
  assert (found.residuals > 0.1).all()


# Real networks, with the examples in batches of unequal size and padding.

IMAGES = np.asarray(RNG.normal(size=(7, 6, 6, 1)), np.float32)
LABELS = RNG.integers(0, 3, 7)


class TwoConvolutions(nn.Module):
  """Two convolutions and a last layer; what follows the first ReLU is quantized."""

  @nn.compact
  def __call__(self, x, *, train):
    act = LIQ(bits=4, signed=False)
    x = nn.relu(Conv(3, (3, 3), strides=2, name='conv1')(x))
    x = nn.relu(Conv(4, (3, 3), strides=2, input_quantizer=act, name='conv2')(x))
    return Dense(3, input_quantizer=act, name='fc')(jnp.mean(x, (1, 2)))


def network(kind):
  """A network and its weights: a small ViT at 4 bits, or convolutions at 4 bits."""
  if kind == 'ViT':
    config = ModelConfig(name='vit', size='Ti', depth=1, width=4, heads=1, patch=3)
    net = build_network(config, QuantConfig(weights='lsq', acts='lsq'), 3)
  else:
    net = Network(TwoConvolutions(), weight_quantizer([QuantRule('.*/kernel', LIQ(bits=4))]))

  @jax.jit
  def weights(key):
    params = net.model.init(key, IMAGES, train=False)['params']
    leaves, structure = jax.tree.flatten(params)
    # Not at its random start, where the last layer of a ViT is zero.
    shifts = [0.5 * jax.random.normal(jax.random.fold_in(key, x.size), x.shape) for x in leaves]
    leaves = [x + shift if x.ndim else x for x, shift in zip(leaves, shifts)]
    return net.quantize(net.quantize.init(jax.tree.unflatten(structure, leaves)))

  return net, weights(KEY)


def parts(*sizes, padding):
  """The examples in batches of these sizes, each with padding that must not count."""
  for size, fill, stop in zip(sizes, padding, np.cumsum(sizes)):
    here = slice(stop - size, stop)
    yield {
      'image': np.concatenate([IMAGES[here], np.full((fill, 6, 6, 1), 3, np.float32)]),
      'label': np.concatenate([LABELS[here], np.zeros(fill, int)]),
      'mask': np.concatenate([np.ones(size), np.zeros(fill)]).astype(np.float32),
    }


WHOLE = next(parts(7, padding=[0]))
BATCHES = [*parts(2, 4, 1, padding=[2, 0, 3])]


def loss_of(net):
  def loss_sum(z, batch):
    logits = net.model.apply({'params': z['model']}, batch['image'], train=False)
    losses = -jax.nn.log_softmax(logits)[jnp.arange(len(batch['label'])), batch['label']]
    return jnp.sum(losses * batch['mask']), jnp.sum(batch['mask'])

  return loss_sum


def use_lines(patch):
  """Makes quantizers lines through their input, of slope 1 inside the clip and 0 outside."""
  lsq, clipped, stop = ste.lsq, ste.clipped, jax.lax.stop_gradient

  def lsq_line(bounds, factor, x, scale):
    inside = (x > bounds[0] * scale) & (x < bounds[1] * scale)
    return lsq(bounds, factor, stop(x), stop(scale)) + inside * (x - stop(x))

  def clipped_line(signed, n, x, clip):
    inside = (x >= -clip * signed) & (x <= clip)
    return clipped(signed, n, stop(x), stop(clip)) + inside * (x - stop(x))

  patch.setattr(ste, 'lsq', lsq_line)
  patch.setattr(ste, 'clipped', clipped_line)


def dense_hessian(loss_sum, z):
  """By forward over reverse mode, of the masked leaves, all examples in one batch."""
  leaves, structure = jax.tree.flatten(z)
  chosen = jax.tree.leaves(mask_tree(perturbed_by_default, z))
  flat, unravel = ravel_pytree([leaf for leaf, here in zip(leaves, chosen) if here])

  def loss(flat):
    new = iter(unravel(flat))
    tree = jax.tree.unflatten(structure, [next(new) if c else x for x, c in zip(leaves, chosen)])
    total, count = loss_sum(tree, WHOLE)
    return total / count

  return np.asarray(jax.jit(jax.hessian(loss))(flat), np.float64)


@pytest.fixture(scope='module', params=['ViT', 'convolutions'])
def real(request):
  """A network's z and gradient function, and its dense Hessian with lines for quantizers."""
  net, z = network(request.param)
  with pytest.MonkeyPatch.context() as patch:
    use_lines(patch)
    dense = dense_hessian(loss_of(net), z)
  return z, grad_of(loss_of(net)), dense


def test_top_eigenvalues_of_a_network_are_those_of_its_dense_hessian(real):
  z, fn, dense = real
  np.testing.assert_allclose(dense, dense.T, atol=1e-5 * np.abs(dense).max())
  wanted = np.linalg.eigvalsh(dense)[::-1][:4]
  assert wanted[3] > 1e-3 * wanted[0]
  found = hessian_eigenvalues(fn, z, BATCHES, 4, steps=50, key=KEY)
  np.testing.assert_allclose(found.values, wanted, rtol=1e-4)
  assert (found.residuals < 1e-3 * wanted[0]).all()
  assert found.asymmetry < 1e-5
  shown = mask_tree(perturbed_by_default, z)
  for vector in found.vectors:
    assert not any(jax.tree.leaves(jax.tree.map(lambda m, v: not m and np.any(v), shown, vector)))


def test_trace_of_a_network(real):
  z, fn, dense = real
  seen = []
  found = hessian_trace(fn, z, BATCHES, 60, key=KEY, on_step=lambda *step: seen.append(step))
  assert abs(found.mean - np.trace(dense)) < 4 * found.standard_error
  assert seen == [(k + 1, 60) for k in range(60)]


def test_scales_of_quantizers_make_it_asymmetric():
  net, z = network('convolutions')
  fn = grad_of(loss_of(net))
  found = hessian_eigenvalues(fn, z, BATCHES, 1, steps=10, key=KEY, mask=lambda path: True)
  assert found.asymmetry > 1e-3
  assert found.residuals[0] > 1e-3 * found.values[0]


def test_batches_of_other_shapes_are_the_whole_and_each_shape_is_compiled_once():
  traces, seen = [], []

  def loss_sum(z, batch):
    traces.append(len(batch))
    return jnp.sum(jnp.cos(batch @ z)), len(batch)

  rows, z = RNG.normal(size=(7, 5)).astype(np.float32), np.ones(5, np.float32)
  fn, batches = grad_of(loss_sum), np.split(rows, [3, 6])
  arguments = {'steps': 5, 'key': KEY, 'on_step': lambda *step: seen.append(step)}
  found = hessian_eigenvalues(fn, z, batches, 5, **arguments)
  wanted = np.linalg.eigvalsh(-(rows.T * np.cos(rows @ z)) @ rows / 7)[::-1]
  np.testing.assert_allclose(found.values, wanted, atol=1e-5 * np.abs(wanted).max())
  hessian_eigenvalues(fn, 2 * z, batches, 1, steps=3, key=KEY)
  hessian_trace(fn, z, batches, 3, key=KEY)
  assert sorted(traces) == [1, 3]
  assert seen == [(k + 1, 5) for k in range(5)]


# The trace.


def test_trace_of_a_diagonal_hessian_is_exact():
  diagonal = jnp.array([3.0, -1.0, 0.5, 8.0])
  fn = grad_of(lambda z, batch: (0.5 * jnp.sum(diagonal * z**2), 1))
  found = hessian_trace(fn, jnp.ones(4), [None], 5, key=KEY)
  assert found.mean == 10.5
  assert found.standard_error == 0


def test_trace_of_a_dense_hessian_is_within_its_error():
  fn, dense = quadratic(np.linspace(-1, 3, 12))
  found = hessian_trace(fn, jnp.ones(12), [np.zeros(4)], 400, key=KEY)
  one = np.sqrt(2 * np.sum((dense - np.diag(np.diag(dense))) ** 2))
  np.testing.assert_allclose(found.standard_error, one / 20, rtol=0.15)
  assert abs(found.mean - np.trace(dense)) < 3 * found.standard_error


# What is refused.


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'count': 0}, r'count=0\): must be a whole number, at least 1'),
    ({'count': 3, 'steps': 2}, r'count=3\): must be at most steps=2'),
    ({'count': 9}, 'the number of parameters, 5'),
    ({'batches': []}, 'at least one batch'),
    ({'mask': lambda path: False}, 'chooses no leaf'),
  ],
)
def test_bad_eigenvalue_arguments(given, message):
  fn, _ = quadratic([1.0] * 5)
  arguments = {'batches': [np.zeros(1)], 'count': 2, **given}
  with pytest.raises(ValueError, match=message) as error:
    hessian_eigenvalues(fn, jnp.ones(5), key=KEY, **arguments)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('batches', 'samples'), [([], 5), ([None], 0), ([None], 1)])
def test_bad_trace_arguments(batches, samples):
  with pytest.raises(ValueError, match='at least'):
    hessian_trace(quadratic([1.0])[0], jnp.ones(1), batches, samples, key=KEY)


def test_a_loss_that_is_not_finite_is_told():
  fn = grad_of(lambda z, batch: (jnp.nan * jnp.sum(z**2), 1))
  with pytest.raises(FloatingPointError, match='not finite'):
    hessian_eigenvalues(fn, jnp.ones(3), [None], 1, key=KEY)

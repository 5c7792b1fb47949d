"""The method's table in NumPy float64, and quantizers with their pullbacks written out.

What the tests of `saq` compare against. Nothing here calls the code under test but for the `fn`
of each quantizer, which is what is handed to it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from saq_jax import LIQ, LSQ, QuantRule, weight_quantizer

# Flat order of the tree below, which is the order of its leaves: b, w, then the scale of w.
B, W, S = slice(0, 3), slice(3, 9), 9
ALL = np.ones(10, bool)
NO_SCALES = np.arange(10) != S
RHO = 0.7

_rng = np.random.default_rng(7)
_half = _rng.normal(size=(10, 10))
A = _half @ _half.T / 4 + np.eye(10)
C = _rng.normal(size=10)
# Entries of w on both sides of the clip, so that the pullback loses some of the gradient.
V = np.concatenate([[0.3, -0.8, 0.5], [0.11, -0.43, 0.97, -1.6, 1.9, 0.28], [0.9]])


def tree(v):
  v = jnp.asarray(v, float)
  return {'model': {'b': v[B], 'w': v[W]}, 'scales': {'w': v[S]}}


def flat(t):
  return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)])


def loss(z):
  v = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(z)])
  return 0.5 * v @ jnp.asarray(A, v.dtype) @ v - jnp.asarray(C, v.dtype) @ v


grad_fn = jax.grad(loss)


class Identity:
  fn = staticmethod(lambda t: t)

  def forward(self, v):
    return v

  def pullback(self, v, ct):
    del v
    return ct


class ThreeBitLIQ:
  """Q = a (2 round(u n)/n - 1) with u = (clip(w/a, -1, 1) + 1)/2 and n = 7."""

  fn = weight_quantizer([QuantRule('w', LIQ(bits=3))])

  def forward(self, v):
    out = v.copy()
    out[W] = v[S] * self._unit(v)
    return out

  def pullback(self, v, ct):
    inside = np.abs(v[W] / v[S]) <= 1
    out = ct.copy()
    out[W] = ct[W] * inside
    out[S] += np.sum(ct[W] * (self._unit(v) - np.where(inside, v[W] / v[S], 0)))
    return out

  def _unit(self, v):
    return 2 * np.round((np.clip(v[W] / v[S], -1, 1) + 1) / 2 * 7) / 7 - 1


class ThreeBitLSQ:
  """Q = s round(clip(w/s, -4, 3)), with a scale at which both ends of the clip are reached."""

  fn = weight_quantizer([QuantRule('w', LSQ(bits=3, grad_scale=1.0))])

  def forward(self, v):
    out = v.copy()
    out[W] = v[S] * np.clip(np.round(v[W] / v[S]), -4, 3)
    return out

  def pullback(self, v, ct):
    u = v[W] / v[S]
    inside = (u > -4) & (u < 3)
    out = ct.copy()
    out[W] = ct[W] * inside
    out[S] += np.sum(ct[W] * np.where(inside, np.round(u) - u, np.clip(u, -4, 3)))
    return out


class Smooth:
  """s tanh(w) and b/2: a pullback that depends on where it is taken."""

  @staticmethod
  def fn(t):
    s = t['scales']['w']
    return {'model': {'b': 0.5 * t['model']['b'], 'w': s * jnp.tanh(t['model']['w'])}} | {
      'scales': {'w': s}
    }

  def forward(self, v):
    return np.concatenate([0.5 * v[B], v[S] * np.tanh(v[W]), v[S:]])

  def pullback(self, v, ct):
    t = np.tanh(v[W])
    return np.concatenate([0.5 * ct[B], ct[W] * v[S] * (1 - t**2), [ct[S] + np.sum(ct[W] * t)]])


def start(quantizer):
  """V, with the scale of LSQ at which 3 bits clip it."""
  v = V.copy()
  if isinstance(quantizer, ThreeBitLSQ):
    v[S] = 0.35
  return v


def quadratic(z):
  """The gradient of `loss`."""
  return A @ z - C


def closed_form(
  quantizer,
  v,
  case,
  *,
  rho=RHO,
  mask=NO_SCALES,
  eta=None,
  accumulate=False,
  gradient=quadratic,
  second=None,
):
  """The table of the method, on flat vectors; `second` is the gradient of the second pass."""
  z = quantizer.forward(v)
  g = gradient(z)
  p = quantizer.pullback(v, g)
  d, x = {1: (p, z), 2: (p, v), 3: (g, z)}[case]
  t = np.ones(10) if eta is None else np.abs(x) + eta
  norm = np.sqrt(np.sum((t * d)[mask] ** 2))
  eps = np.where(mask, rho * t**2 * d / norm, 0)
  base = v + eps if case == 2 else v
  point = quantizer.forward(base) if case == 2 else z + eps
  g2 = (second or gradient)(point)
  out = quantizer.pullback(base, g2) + (p if accumulate else 0)
  cosine = out @ p / np.linalg.norm(out) / np.linalg.norm(p)
  return {'point': point, 'g2': g2, 'out': out, 'norm': norm, 'cosine': cosine, 'clean': p}


def close(actual, desired, rtol=2e-5):
  np.testing.assert_allclose(actual, desired, rtol=rtol, atol=rtol * np.max(np.abs(desired)))

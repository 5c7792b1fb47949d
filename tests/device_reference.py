"""A batch cut over eight devices, `saq`'s steps on it, and loops over the shards in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from transform_reference import RHO, S, ThreeBitLIQ, V, closed_form, tree

from saq_jax import saq

DEVICES = 8

_rng = np.random.default_rng(11)
# Shards that disagree, so that a device's own gradient is far from the mean.
X = _rng.normal(size=(32, 9)) * np.repeat(np.linspace(0.2, 2.0, DEVICES), 4)[:, None]
Y = _rng.normal(size=32) + np.repeat(np.linspace(-3, 3, DEVICES), 4)

quantize = ThreeBitLIQ.fn


def loss(z, x, y):
  """A mean over examples, quadratic in the weights; the scale counts too."""
  out = x @ jnp.append(z['model']['b'], z['model']['w']) - y
  return jnp.mean(0.5 * out**2) + z['scales']['w'] ** 2


def make_mesh(*sizes_and_names):
  sizes, names = zip(*sizes_and_names)
  return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def batch():
  return jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)


def step(tx, params, state, x, y):
  """A step as under plain jit, on whatever part of the batch is given."""
  fn = jax.grad(lambda z: loss(z, x, y))
  return tx.update(fn(quantize(params)), state, params, grad_fn=fn)


def mapped(tx, *, check_vma=True, varying='data', over='data', given=()):
  """The step in `jax.shard_map`: the batch split, params and state the same on all devices.

  `over` names the axes over which the batch is split, `varying` those of the `pcast`, if any,
  and `given` those of a second one, of the params that the update is given.
  """

  def own_step(params, state, x, y):
    fn = jax.grad(lambda z: loss(z, x, y))
    own = jax.lax.pcast(params, varying, to='varying') if varying else params
    params = jax.lax.pcast(params, given, to='varying')
    return tx.update(fn(quantize(own)), state, params, grad_fn=fn)

  sizes = ((DEVICES, 'data'),) if over == 'data' else ((4, 'data'), (2, 'fsdp'))
  return jax.jit(
    jax.shard_map(
      own_step,
      mesh=make_mesh(*sizes),
      in_specs=(P(), P(), P(over), P(over)),
      out_specs=P(),
      check_vma=check_vma,
    )
  )


def run(fn, tx, params=None):
  params = tree(V) if params is None else params
  return fn(params, tx.init(params), *batch())


def close(actual, desired, rtol=2e-5):
  for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)


@functools.cache
def global_step(case):
  tx = saq(quantize, RHO, case=case)
  return run(jax.jit(functools.partial(step, tx)), tx)


def batch_gradient(z, x=X, y=Y):
  """The gradient of `loss` in NumPy float64."""
  error = (x @ z[:S] - y) / len(y)
  return np.append(x.T @ error, 2 * z[S])


def per_device(case, shards=DEVICES, accumulate=False):
  """A loop over the shards: each its own eps, then one mean of what they return."""
  parts = []
  for x, y in zip(np.split(X, shards), np.split(Y, shards)):
    gradient = functools.partial(batch_gradient, x=x, y=y)
    parts.append(closed_form(ThreeBitLIQ(), V, case, gradient=gradient, accumulate=accumulate))
  return {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}

"""Strategies over eight devices, each with its own gradient, against loops over the shards."""

import functools

import jax
import numpy as np
import optax
import pytest
from device_reference import X, Y, batch, batch_gradient, close, mapped, quantize, run, step
from transform_reference import RHO, ThreeBitLIQ, V, closed_form, flat, tree

from saq_jax import along_momentum, every, looksam, qat, saq, sometimes, where_steep

QUANTIZER = ThreeBitLIQ()
SHARDS = [
  functools.partial(batch_gradient, x=x, y=y) for x, y in zip(np.split(X, 8), np.split(Y, 8))
]
ON = {'axis_name': 'data'}

checked = pytest.mark.parametrize('check_vma', [True, False], ids=['vma', 'no_vma'])
sync = pytest.mark.parametrize('sync', [True, False], ids=['sync', 'per_device'])


def links(sync, **options):
  return saq(quantize, RHO, sync_perturbation=sync, **ON, **options), qat(quantize, **ON)


def two_steps(slot, check_vma=True):
  """What two steps at the same weights return, and the state after them."""
  fn, state, found = mapped(slot, check_vma=check_vma, varying=check_vma and 'data'), None, []
  params = tree(V)
  state = slot.init(params)
  for _ in range(2):
    out, state = fn(params, state, *batch())
    found.append(flat(out))
  return found, jax.device_get(state)


def gradients(point):
  return np.array([shard(point) for shard in SHARDS])


def full(sync, direction=None):
  """SAQ over the shards: the mean of what they return, and of their second gradients."""
  mean = gradients(QUANTIZER.forward(V)).mean(0)
  found = []
  for shard in SHARDS:
    own = direction if direction is not None else mean if sync else shard(QUANTIZER.forward(V))
    found.append(closed_form(QUANTIZER, V, 3, gradient=lambda _, own=own: own, second=shard))
  return np.mean([f['out'] for f in found], 0), np.mean([f['g2'] for f in found], 0)


def norm(v):
  return np.sqrt(np.sum(v**2))


@checked
@sync
def test_every_second_step_is_full(sync, check_vma):
  slot = sometimes(*links(sync), every(2), **ON)
  (first, second), state = two_steps(slot, check_vma)
  close(first, full(sync)[0])
  close(second, QUANTIZER.pullback(V, gradients(QUANTIZER.forward(V)).mean(0)))
  assert float(state.second) == 0


@checked
@sync
def test_looksam_carries_what_the_mean_gradients_say(sync, check_vma):
  (first, second), state = two_steps(looksam(*links(sync), k=2, alpha=0.6, **ON), check_vma)
  out, g2 = full(sync)
  g = gradients(QUANTIZER.forward(V)).mean(0)
  v = g2 - (g @ g2) / norm(g) ** 2 * g
  close(first, out)
  close(flat(state.memory), v, rtol=2e-4)
  close(second, QUANTIZER.pullback(V, g + 0.6 * norm(g) / norm(v) * v), rtol=1e-4)


@checked
@sync
def test_the_momentum_is_of_the_mean_gradients(sync, check_vma):
  slot = along_momentum(links(sync)[0], decay=0.5, **ON)
  (first, second), state = two_steps(slot, check_vma)
  g = gradients(QUANTIZER.forward(V)).mean(0)
  close(first, QUANTIZER.pullback(V, g))
  out, moved = full(sync, direction=0.5 * g)
  close(second, out)
  close(flat(state.memory), 0.25 * g + 0.5 * moved)


@checked
def test_all_devices_decide_alike_by_the_mean_of_their_squared_norms(check_vma):
  slot = sometimes(*links(False), where_steep(10, first=0.0, last=0.0, decay=0.5), **ON)
  (first, second), state = two_steps(slot, check_vma)
  square = np.mean(np.sum(gradients(QUANTIZER.forward(V)) ** 2, 1))
  # The same square twice: as long as the mean, so both steps are full.
  close(first, full(False)[0])
  close(second, full(False)[0])
  close(state.memory[0], square)


@checked
def test_what_comes_beside_is_each_devices_own(check_vma):
  sharp, plain = links(False, has_aux=True)
  slot = sometimes(sharp, plain, every(2), **ON)

  def twice(params, state, x, y):
    fn = jax.grad(lambda z: ((x @ flat_of(z) - y) ** 2).mean())
    if check_vma:
      params = jax.lax.pcast(params, 'data', to='varying')
    seen = []
    for _ in range(2):
      g = fn(quantize(params))
      _, state = slot.update(g, state, params, grad_fn=lambda z: (fn(z), x[0, 0]))
      seen.append(jax.lax.psum(state.aux, 'data'))
      state = state._replace(aux=None)
    return seen

  found = jax.jit(
    jax.shard_map(
      twice,
      mesh=jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)),
      in_specs=(jax.P(), jax.P(), jax.P('data'), jax.P('data')),
      out_specs=jax.P(),
      check_vma=check_vma,
    )
  )(tree(V), slot.init(tree(V)), *batch())
  close(found, [X[::4, 0].sum(), 0.0])


def flat_of(z):
  return jax.numpy.append(z['model']['b'], z['model']['w'])


def test_under_plain_jit_strategies_need_no_axis():
  """One device with the whole batch is the reference of eight that perturb together."""
  for make in (
    lambda s, q, **on: looksam(s, q, k=2, alpha=0.6, **on),
    lambda s, q, **on: sometimes(s, q, every(2), **on),
  ):
    alone = make(saq(quantize, RHO), qat(quantize))
    tx = optax.chain(alone)
    fn = jax.jit(functools.partial(step, tx))
    params = tree(V)
    out, state = run(fn, tx)
    again, _ = fn(params, state, *batch())
    (first, second), _ = two_steps(make(*links(True), **ON))
    close(first, flat(out))
    close(second, flat(again), rtol=1e-4)

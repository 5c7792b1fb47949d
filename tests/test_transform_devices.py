"""`saq` and `qat` over eight devices: the global batch under jit, and each device's own gradient.

Everything is compared with one device that sees the whole batch, or, where each device perturbs
by itself, with a NumPy loop over the shards.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_reference import (
  DEVICES,
  X,
  Y,
  batch,
  close,
  global_step,
  loss,
  make_mesh,
  mapped,
  per_device,
  quantize,
  run,
  step,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transform_reference import RHO, S, V, flat, tree

from saq_jax import LIQ, QuantRule, qat, saq, weight_quantizer

every_case = pytest.mark.parametrize('case', [1, 2, 3])
checked = pytest.mark.parametrize('check_vma', [True, False], ids=['vma', 'no_vma'])


def test_there_are_eight_devices():
  assert jax.device_count() == DEVICES


@every_case
def test_the_loop_over_one_shard_is_the_global_step(case):
  """Ties the two references together, and shows that they differ where they should."""
  out, state = global_step(case)
  want = per_device(case, shards=1)
  close([*flat(out), state.grad_norm, state.cosine], [*want['out'], want['norm'], want['cosine']])
  own = per_device(case)
  assert np.max(np.abs(own['out'] - want['out'])) > 0.02
  assert abs(own['cosine'] - want['cosine']) > 2e-4
  assert abs(own['norm'] - want['norm']) > 0.02


# Plain jit: the perturbation of the global batch.


@every_case
@pytest.mark.parametrize('axes', [(('data', 8),), (('data', 4), ('fsdp', 2))])
def test_jit_with_a_sharded_batch_is_the_single_device_step(case, axes):
  mesh = make_mesh(*((size, name) for name, size in axes))
  split = NamedSharding(mesh, P('data'))
  same = NamedSharding(mesh, P())
  tx = saq(quantize, RHO, case=case)
  params = jax.device_put(tree(V), same)
  state = jax.device_put(tx.init(params), same)
  x, y = jax.device_put(batch(), split)
  assert not x.sharding.is_fully_replicated
  got = jax.jit(functools.partial(step, tx), out_shardings=same)(params, state, x, y)
  close(got, global_step(case))


@every_case
def test_jit_with_sharded_parameters_is_the_single_device_step(case):
  """The norm runs over all shards of a parameter."""
  mesh = make_mesh((4, 'data'), (2, 'fsdp'))
  rng = np.random.default_rng(3)
  q = weight_quantizer([QuantRule('w', LIQ(bits=3))])
  params = q.init({'w': jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), 'b': jnp.ones(4)})
  x = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)

  def update(params, state, x):
    fn = jax.grad(
      lambda z: (
        jnp.mean(jnp.tanh(x @ z['model']['w'] + z['model']['b']) ** 2) + z['scales']['w'] ** 2
      )
    )
    return tx.update(fn(q(params)), state, params, grad_fn=fn)

  tx = saq(q, RHO, case=case)
  want = update(params, tx.init(params), x)
  split = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
  split['model']['w'] = NamedSharding(mesh, P('fsdp'))
  placed = jax.device_put(params, split)
  assert not placed['model']['w'].sharding.is_fully_replicated
  got = jax.jit(update)(placed, tx.init(placed), jax.device_put(x, NamedSharding(mesh, P('data'))))
  close(got, want)


# shard_map.


@every_case
@checked
@pytest.mark.parametrize('all_options', [False, True], ids=['', 'all_options'])
def test_a_synchronised_perturbation_is_the_global_step(case, check_vma, all_options):
  options = {'case': case, 'adaptive': all_options, 'accumulate_clean_grad': all_options}
  one = saq(quantize, RHO, **options)
  want = run(jax.jit(functools.partial(step, one)), one)
  tx = saq(quantize, RHO, **options, axis_name='data')
  got = run(mapped(tx, check_vma=check_vma, varying=check_vma and 'data'), tx)
  close(got, want)


@every_case
@checked
@pytest.mark.parametrize('accumulate', [False, True], ids=['', 'accumulate'])
def test_a_perturbation_per_device_is_the_mean_over_shards(case, check_vma, accumulate):
  tx = saq(
    quantize,
    RHO,
    case=case,
    axis_name='data',
    sync_perturbation=False,
    accumulate_clean_grad=accumulate,
  )
  out, state = run(mapped(tx, check_vma=check_vma, varying=check_vma and 'data'), tx)
  want = per_device(case, accumulate=accumulate)
  close(flat(out), want['out'])
  close(
    [state.grad_norm, state.cosine, state.sharp_grad_norm],
    [want['norm'], want['cosine'], np.linalg.norm(want['out'])],
  )
  assert int(state.step) == 1


@checked
def test_qat_returns_the_mean_gradient(check_vma):
  tx = qat(quantize, axis_name='data')
  got = run(mapped(tx, check_vma=check_vma, varying=check_vma and 'data'), tx)
  one = qat(quantize)
  want = run(jax.jit(functools.partial(step, one)), one)
  close(got, want)
  close(flat(got[0]), per_device(3, shards=1)['clean'])


BOTH = ('data', 'fsdp')


@every_case
def test_a_batch_may_be_split_over_two_axes(case):
  tx = saq(quantize, RHO, case=case, axis_name=BOTH)
  for check_vma in (True, False):
    got = run(mapped(tx, check_vma=check_vma, varying=check_vma and BOTH, over=BOTH), tx)
    close(got, global_step(case))
  own = saq(quantize, RHO, case=case, axis_name=BOTH, sync_perturbation=False)
  out, _ = run(mapped(own, varying=BOTH, over=BOTH), own)
  close(flat(out), per_device(case)['out'])


@pytest.mark.parametrize('given', [('data',), BOTH])
def test_params_may_be_given_as_varying_already(given):
  tx = saq(quantize, RHO, axis_name=BOTH)
  close(run(mapped(tx, varying=BOTH, over=BOTH, given=given), tx), global_step(3))


@pytest.mark.parametrize(
  ('axis_name', 'varying'), [('data', None), (BOTH, None), (BOTH, 'data')], ids=str
)
@pytest.mark.parametrize(
  'make',
  [saq, functools.partial(saq, sync_perturbation=False), qat],
  ids=['sync', 'per_device', 'qat'],
)
def test_a_gradient_that_is_summed_already_is_an_error(make, axis_name, varying):
  """Without pcast JAX sums the gradient over the devices, and everything is eight times too big."""
  tx = make(quantize, axis_name=axis_name)
  message = f"params = jax.lax.pcast(params, {axis_name!r}, to='varying')"
  with pytest.raises(ValueError, match=re.escape(message)):
    run(mapped(tx, varying=varying, over=axis_name), tx)


def test_several_steps_stay_the_same_on_all_devices():
  """The state and the parameters that come out go in again, and a schedule advances."""

  def schedule(count):
    return 0.2 * (count + 1)

  one, tx = saq(quantize, schedule), saq(quantize, schedule, axis_name='data')
  fns = jax.jit(functools.partial(step, one)), mapped(tx)
  ends = []
  for transform, fn in zip((one, tx), fns):
    params, state = tree(V), transform.init(tree(V))
    for _ in range(4):
      grads, state = fn(params, state, *batch())
      params = jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)
    ends.append((params, state))
  close(ends[1], ends[0], rtol=1e-4)
  np.testing.assert_allclose(ends[1][1].rho, 0.8, rtol=1e-6)


def test_an_axis_that_is_not_split_is_left_alone():
  """On a mesh of two axes, saq averages over the one it is told of."""
  tx = saq(quantize, RHO, axis_name='data')

  def own_step(params, state, x, y):
    fn = jax.grad(lambda z: loss(z, x, y))
    own = jax.lax.pcast(params, 'data', to='varying')
    return tx.update(fn(quantize(own)), state, params, grad_fn=fn)

  fn = jax.shard_map(
    own_step,
    mesh=make_mesh((4, 'data'), (2, 'fsdp')),
    in_specs=(P(), P(), P('data'), P('data')),
    out_specs=P(),
  )
  close(run(jax.jit(fn), tx), global_step(3))


def test_aux_is_averaged_by_the_grad_fn_that_returns_it():
  tx = saq(quantize, RHO, axis_name='data', has_aux=True)

  def own_step(params, state, x, y):
    def with_aux(z):
      value, g = jax.value_and_grad(loss)(z, x, y)
      return g, jax.lax.pmean(value, 'data')

    own = jax.lax.pcast(params, 'data', to='varying')
    g = jax.grad(loss)(quantize(own), x, y)
    return tx.update(g, state, params, grad_fn=with_aux)

  fn = jax.shard_map(
    own_step,
    mesh=make_mesh((DEVICES, 'data')),
    in_specs=(P(), P(), P('data'), P('data')),
    out_specs=P(),
  )
  out, state = run(jax.jit(fn), tx)
  want, _ = global_step(3)
  close(out, want)
  z = per_device(3, shards=1)['point']
  close(state.aux, np.mean(0.5 * (X @ z[:S] - Y) ** 2) + z[S] ** 2)


# What it costs: collectives in the compiled program.


def all_reduces(tx):
  """The all-reduces of a compiled step; an asynchronous one counts by its start."""
  text = mapped(tx).lower(tree(V), tx.init(tree(V)), *batch()).compile().as_text()
  return len(re.findall(r'\ball-reduce(?:-start)?\(', text))


def test_a_perturbation_per_device_needs_no_collective_beyond_qat():
  plain = all_reduces(qat(quantize, axis_name='data'))
  assert plain > 0
  for case in (1, 2, 3):
    own = saq(quantize, RHO, case=case, axis_name='data', sync_perturbation=False)
    assert all_reduces(own) == plain
    assert all_reduces(saq(quantize, RHO, case=case, axis_name='data')) > plain


# vmap has mapped axes too.


@every_case
def test_vmap_with_an_axis_name_is_the_mean_over_shards(case):
  x, y = (a.reshape(DEVICES, -1, *a.shape[1:]) for a in batch())

  def update(tx):
    fn = functools.partial(step, tx, tree(V), tx.init(tree(V)))
    out, state = jax.jit(jax.vmap(fn, axis_name='data'))(x, y)
    for leaf in jax.tree.leaves((out, state)):
      np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], (out, state))

  close(update(saq(quantize, RHO, case=case, axis_name='data')), global_step(case))
  out, _ = update(saq(quantize, RHO, case=case, axis_name='data', sync_perturbation=False))
  close(flat(out), per_device(case)['out'])

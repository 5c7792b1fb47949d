"""`saq` among the other parts of optax and Flax: each composition against a loop in NumPy.

The compositions that do not work are here too, with what they do instead.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from transform_reference import (
  NO_SCALES,
  Identity,
  Smooth,
  ThreeBitLIQ,
  V,
  close,
  closed_form,
  flat,
  grad_fn,
  quadratic,
  tree,
)

from saq_jax import qat, saq

QUANTIZER = ThreeBitLIQ()
quantize = QUANTIZER.fn
RATE = 0.05
RHO = 0.3

every_case = pytest.mark.parametrize('case', [1, 2, 3])

# Four microbatches that disagree: L_i(z) = 1/2 z'A_i z - c_i'z.
_rng = np.random.default_rng(5)
_halves = _rng.normal(size=(4, 10, 10)) / 2
A_MICRO = _halves @ _halves.transpose(0, 2, 1) + 0.3 * np.eye(10)
C_MICRO = 3 * _rng.normal(size=(4, 10))


def micro(i):
  """The gradient of microbatch i, in NumPy."""
  return lambda z: A_MICRO[i] @ z - C_MICRO[i]


def mean_of_micro(z):
  return np.mean([micro(i)(z) for i in range(4)], axis=0)


def micro_loss(z, a, c):
  v = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(z)])
  return 0.5 * v @ a @ v - c @ v


def update(tx, params, state, fn=grad_fn):
  """One step of a user's loop."""
  updates, state = tx.update(fn(quantize(params)), state, params, grad_fn=fn)
  return optax.apply_updates(params, updates), state


def micro_steps(tx, v, rounds=1):
  """A user's loop over the microbatches; also the parameters after each."""
  params = tree(v)
  state, path = tx.init(params), []

  @jax.jit
  def step(params, state, a, c):
    return update(tx, params, state, jax.grad(lambda z: micro_loss(z, a, c)))

  for _ in range(rounds):
    for a, c in zip(jnp.asarray(A_MICRO, float), jnp.asarray(C_MICRO, float)):
      params, state = step(params, state, a, c)
      path.append(flat(params))
  return path


class AdamW:
  """AdamW on a flat vector."""

  def __init__(self, rate, weight_decay):
    self.rate, self.weight_decay = rate, weight_decay
    self.m = self.n = np.zeros(10)
    self.count = 0

  def __call__(self, v, g):
    self.count += 1
    self.m = 0.9 * self.m + 0.1 * g
    self.n = 0.999 * self.n + 0.001 * g**2
    m, n = self.m / (1 - 0.9**self.count), self.n / (1 - 0.999**self.count)
    return v - self.rate * (m / (np.sqrt(n) + 1e-8) + self.weight_decay * v)


# In a chain.


@every_case
def test_before_clipping_and_adamw(case):
  tx = optax.chain(
    saq(quantize, RHO, case=case),
    optax.clip_by_global_norm(1.0),
    optax.adamw(RATE, weight_decay=0.1),
  )
  params, v, adamw = tree(V), V, AdamW(RATE, 0.1)
  state, step = tx.init(params), jax.jit(functools.partial(update, tx))
  clipped = []
  for _ in range(6):
    params, state = step(params, state)
    g = closed_form(QUANTIZER, v, case, rho=RHO)['out']
    norm = np.linalg.norm(g)
    clipped.append(norm > 1)
    v = adamw(v, g / max(norm, 1))
    close(flat(params), v, rtol=1e-4)
  assert any(clipped)


def test_the_norm_reported_is_the_one_before_clipping():
  tx = optax.named_chain(('saq', saq(quantize, RHO)), ('clip', optax.clip_by_global_norm(0.1)))
  params = tree(V)
  updates, state = tx.update(grad_fn(quantize(params)), tx.init(params), params, grad_fn=grad_fn)
  want = closed_form(QUANTIZER, V, 3, rho=RHO)
  close(optax.tree.norm(updates), 0.1)
  close(state['saq'].sharp_grad_norm, np.linalg.norm(want['out']))
  close(optax.tree.get(state, 'cosine'), want['cosine'])


def test_schedules_of_rho_and_of_the_rate_advance_together():
  tx = optax.chain(
    saq(quantize, optax.linear_schedule(0.0, 0.8, 4)),
    optax.sgd(optax.linear_schedule(0.08, 0.0, 4)),
  )
  params, v = tree(V), V
  state, step = tx.init(params), jax.jit(functools.partial(update, tx))
  for count in range(4):
    params, state = step(params, state)
    rate = 0.08 - 0.02 * count
    v = v - rate * closed_form(QUANTIZER, v, 3, rho=0.2 * count)['out']
    close(flat(params), v, rtol=1e-4)


def test_partition_after_saq_gives_the_scales_their_own_rate():
  tx = optax.chain(
    saq(quantize, RHO),
    optax.partition(
      {'model': optax.sgd(0.1), 'scales': optax.sgd(0.001)},
      {'model': 'model', 'scales': 'scales'},
    ),
  )
  params, _ = update(tx, tree(V), tx.init(tree(V)))
  rates = np.where(NO_SCALES, 0.1, 0.001)
  close(flat(params), V - rates * closed_form(QUANTIZER, V, 3, rho=RHO)['out'])


def test_masked_after_saq_decays_the_weights_alone():
  tx = optax.chain(
    saq(quantize, RHO),
    optax.masked(optax.add_decayed_weights(0.5), {'model': True, 'scales': False}),
  )
  params = tree(V)
  out, _ = tx.update(grad_fn(quantize(params)), tx.init(params), params, grad_fn=grad_fn)
  decay = np.where(NO_SCALES, 0.5 * V, 0)
  close(flat(out), closed_form(QUANTIZER, V, 3, rho=RHO)['out'] + decay)


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.masked(tx, {'model': True, 'scales': False}),
    lambda tx: optax.partition({'a': tx, 'b': optax.sgd(0.1)}, {'model': 'a', 'scales': 'b'}),
  ],
  ids=['masked', 'partition'],
)
@pytest.mark.parametrize('make', [saq, qat])
def test_inside_masked_or_partition_is_an_error(wrap, make):
  tx, params = wrap(make(quantize)), tree(V)
  with pytest.raises(ValueError, match=r"saq's own mask says what is perturbed"):
    tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)


# Microbatches.


@every_case
def test_multisteps_after_saq_is_sharpness_by_microbatch(case):
  """eps from each microbatch, one step along the mean of the sharp gradients."""
  multi = optax.MultiSteps(optax.sgd(RATE), 4).gradient_transformation()
  path = micro_steps(optax.chain(saq(quantize, RHO, case=case), multi), V, rounds=2)
  v = V
  for start in (0, 4):
    sharp = [closed_form(QUANTIZER, v, case, rho=RHO, gradient=micro(i))['out'] for i in range(4)]
    for i in range(3):
      close(path[start + i], v)
    v = v - RATE * np.mean(sharp, axis=0)
    close(path[start + 3], v)


@every_case
def test_a_grad_fn_that_accumulates_is_the_full_batch(case):
  @jax.grad
  def accumulated(z):
    a, c = jnp.asarray(A_MICRO, float), jnp.asarray(C_MICRO, float)

    def add(total, i):
      return total + micro_loss(z, a[i], c[i]) / 4, None

    return jax.lax.scan(add, 0.0, jnp.arange(4))[0]

  tx = optax.chain(saq(quantize, RHO, case=case), optax.sgd(RATE))
  step = jax.jit(functools.partial(update, tx, fn=accumulated))
  params, state, v = tree(V), tx.init(tree(V)), V
  for _ in range(2):
    params, state = step(params, state)
    v = v - RATE * closed_form(QUANTIZER, v, case, rho=RHO, gradient=mean_of_micro)['out']
    close(flat(params), v)


@every_case
def test_multisteps_around_saq_is_something_else(case):
  """eps from the mean gradient, and then the last microbatch's descent alone."""
  inner = optax.chain(saq(quantize, RHO, case=case), optax.sgd(RATE))
  end = micro_steps(optax.MultiSteps(inner, 4), V)[-1]
  mixed = closed_form(QUANTIZER, V, case, rho=RHO, gradient=mean_of_micro, second=micro(3))
  close(end, V - RATE * mixed['out'])
  full = closed_form(QUANTIZER, V, case, rho=RHO, gradient=mean_of_micro)['out']
  by_micro = [closed_form(QUANTIZER, V, case, rho=RHO, gradient=micro(i))['out'] for i in range(4)]
  for right in (full, np.mean(by_micro, axis=0)):
    assert np.linalg.norm(mixed['out'] - right) > 0.3 * np.linalg.norm(right)


# Steps that are not finite.


def test_apply_if_finite_after_saq_skips_the_step():
  tx = optax.chain(saq(quantize, RHO), optax.apply_if_finite(optax.adam(RATE), 3))

  @jax.jit
  def step(params, state, factor):
    return update(tx, params, state, jax.grad(lambda z: factor * loss_of(z)))

  def loss_of(z):
    v = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(z)])
    return jnp.sum((v - 1.0) ** 2)

  def run(factors):
    params, path = tree(V), []
    state = tx.init(params)
    for factor in factors:
      params, state = step(params, state, factor)
      path.append(flat(params))
    return path, state

  (first, skipped, last), state = run([1.0, np.nan, 1.0])
  (_, without), _ = run([1.0, 1.0])
  np.testing.assert_array_equal(skipped, first)
  np.testing.assert_array_equal(last, without)
  assert np.any(last != first)
  assert int(optax.tree.get(state, 'total_notfinite')) == 1


def test_apply_if_finite_around_saq_misses_the_second_gradient():
  """Why it belongs after saq: outside it sees the clean gradient only."""
  bad = jax.grad(lambda z: jnp.nan * z['model']['b'][0])
  good = grad_fn(quantize(tree(V)))

  def end(tx):
    updates, _ = tx.update(good, tx.init(tree(V)), tree(V), grad_fn=bad)
    return flat(updates)

  assert np.isnan(end(optax.apply_if_finite(optax.chain(saq(quantize), optax.sgd(RATE)), 3))).any()
  inside = end(optax.chain(saq(quantize), optax.apply_if_finite(optax.sgd(RATE), 3)))
  np.testing.assert_array_equal(inside, 0)


# Hyperparameters that change at run time.


@pytest.mark.parametrize(
  'make',
  [
    lambda: optax.inject_hyperparams(saq, static_args=('quantize', 'case', 'mask'))(
      quantize, rho=0.1, mask=lambda path: path != 'scales/w'
    ),
    lambda: optax.inject_hyperparams(lambda rho: saq(quantize, rho))(rho=0.1),
  ],
  ids=['static_args', 'closure'],
)
def test_rho_changes_at_run_time_without_recompilation(make):
  tx, params, traces = make(), tree(V), []

  @jax.jit
  def step(params, state):
    traces.append(1)
    return tx.update(grad_fn(quantize(params)), state, params, grad_fn=grad_fn)

  state = tx.init(params)
  for rho in (0.1, 0.5, 0.0, 0.9):
    state.hyperparams['rho'] = jnp.asarray(rho)
    out, state = step(params, state)
    close(flat(out), closed_form(QUANTIZER, V, 3, rho=rho)['out'])
    close(state.inner_state.rho, rho)
  assert len(traces) == 1


def test_inject_hyperparams_takes_a_schedule_of_rho():
  schedule = optax.linear_schedule(0.0, 0.8, 4)
  tx = optax.inject_hyperparams(saq, static_args=('quantize', 'case'))(quantize, rho=schedule)
  params = tree(V)
  state = tx.init(params)
  for rho in (0.0, 0.2, 0.4):
    out, state = tx.update(grad_fn(quantize(params)), state, params, grad_fn=grad_fn)
    close(flat(out), closed_form(QUANTIZER, V, 3, rho=rho)['out'])


@pytest.mark.parametrize(
  ('static', 'message'),
  [
    (('quantize',), r'saq\(case=\.\.\.\).*inject_hyperparams name it in static_args'),
    (('case',), r'saq\(quantize=\.\.\.\).*inject_hyperparams name it in static_args'),
  ],
)
def test_a_structural_argument_that_is_not_static_is_an_error(static, message):
  tx = optax.inject_hyperparams(saq, static_args=static)(Identity.fn, rho=0.1)
  with pytest.raises(ValueError, match=message):
    tx.init(tree(V))


# Loops, compilation, buffers.


def optimizers():
  """Both transformations in a chain; saq with a schedule, so that rho moves too."""
  moving = optax.linear_schedule(0.1, 0.5, 5)
  return [
    optax.chain(saq(quantize, moving), optax.adamw(RATE)),
    optax.chain(qat(quantize), optax.adamw(RATE)),
  ]


both = pytest.mark.parametrize('tx', optimizers(), ids=['saq', 'qat'])


@both
def test_scan_over_steps_is_the_loop(tx):
  params, state, step = tree(V), tx.init(tree(V)), jax.jit(functools.partial(update, tx))
  kinds = jax.tree.map(jax.typeof, state)

  @jax.jit
  def scanned(params, state):
    return jax.lax.scan(lambda carry, _: (update(tx, *carry), None), (params, state), length=5)[0]

  last, end = scanned(params, state)
  assert jax.tree.map(jax.typeof, end) == kinds
  for _ in range(5):
    params, state = step(params, state)
  close(flat(last), flat(params))
  close(flat(end[0]), flat(state[0]))
  assert int(end[0].step) == 5
  assert np.linalg.norm(flat(last) - V) > 0.1


@both
def test_many_steps_compile_once(tx):
  traces = []

  @jax.jit
  def step(params, state):
    traces.append(1)
    return update(tx, params, state)

  params, state = tree(V), tx.init(tree(V))
  for _ in range(5):
    params, state = step(params, state)
  assert len(traces) == 1


@both
def test_donated_buffers(tx):
  """The first state too: none of its buffers may stand in two fields."""

  def step(params, state):
    new_params, new_state = update(tx, params, state)
    finite = jnp.isfinite(optax.tree.norm(new_params))
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    return keep((new_params, new_state), (params, state))

  donating, plain = jax.jit(step, donate_argnums=(0, 1)), jax.jit(step)
  carry, kept = (tree(V), tx.init(tree(V))), (tree(V), tx.init(tree(V)))
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    for _ in range(3):
      given, carry, kept = carry, donating(*carry), plain(*kept)
      assert all(x.is_deleted() for x in jax.tree.leaves(given))
  np.testing.assert_array_equal(flat(carry), flat(kept))


# Flax.


def train_state(tx):
  return TrainState.create(apply_fn=lambda z: z, params=tree(V), tx=tx)


@pytest.mark.parametrize('extra', [{}, {'grad_fn': grad_fn}], ids=['', 'grad_fn'])
def test_apply_gradients_of_flax_drops_grad_fn_and_says_so(extra):
  state = train_state(optax.chain(saq(quantize), optax.sgd(RATE)))
  with pytest.raises(ValueError, match=r'as TrainState\.apply_gradients does, cannot be used'):
    state.apply_gradients(grads=grad_fn(quantize(state.params)), **extra)


def test_a_train_state_of_flax_is_updated_by_hand():
  state = train_state(optax.chain(saq(quantize, RHO), optax.sgd(RATE)))

  @jax.jit
  def step(state):
    params, opt_state = update(state.tx, state.params, state.opt_state)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

  state = step(state)
  close(flat(state.params), V - RATE * closed_form(QUANTIZER, V, 3, rho=RHO)['out'])
  assert int(state.step) == int(state.opt_state[0].step) == 1


def test_qat_works_with_apply_gradients_of_flax():
  state = train_state(optax.chain(qat(quantize), optax.sgd(RATE)))
  state = state.apply_gradients(grads=grad_fn(quantize(state.params)))
  want = QUANTIZER.pullback(V, quadratic(QUANTIZER.forward(V)))
  close(flat(state.params), V - RATE * want)


# What the two are for.


def test_a_chain_may_hold_qat_where_saq_was():
  """The same call of update serves both, so that a configuration can choose."""
  for tx, want in (
    (saq(Smooth.fn, 0.0), closed_form(Smooth(), V, 3, rho=0.0)['out']),
    (qat(Smooth.fn), closed_form(Smooth(), V, 3)['clean']),
  ):
    params = tree(V)
    chain = optax.chain(tx, optax.sgd(RATE))
    updates, _ = chain.update(
      grad_fn(Smooth.fn(params)), chain.init(params), params, grad_fn=grad_fn
    )
    close(flat(updates), -RATE * want)

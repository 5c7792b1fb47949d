"""Each strategy against a run of it in NumPy, and whether what it skips is really skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from strategy_reference import LR, Run
from transform_reference import (
  RHO,
  Identity,
  Smooth,
  ThreeBitLIQ,
  ThreeBitLSQ,
  V,
  close,
  flat,
  grad_fn,
  start,
  tree,
)

from saq_jax import (
  along_momentum,
  at_random,
  every,
  hardest,
  looksam,
  only,
  qat,
  saq,
  sometimes,
  where_steep,
)

STEPS = 7

every_case = pytest.mark.parametrize('case', [1, 2, 3])
quantizers = pytest.mark.parametrize(
  'quantizer', [Identity(), ThreeBitLIQ(), ThreeBitLSQ(), Smooth()], ids=lambda q: type(q).__name__
)


def run(slot, quantizer, steps=STEPS, second=grad_fn):
  """The latent weights after gradient descent, and the states after each step.

  In float64, so that no code is rounded otherwise than in NumPy.
  """
  with jax.enable_x64(True):
    return _run(slot, quantizer, steps, second)


def _run(slot, quantizer, steps, second):
  tx = optax.chain(slot, optax.sgd(LR))

  @jax.jit
  def step(params, state):
    g = grad_fn(quantizer.fn(params))
    updates, state = tx.update(g, state, params, grad_fn=second)
    return optax.apply_updates(params, updates), state

  params = tree(start(quantizer))
  state, states = tx.init(params), []
  for _ in range(steps):
    params, state = step(params, state)
    states.append(jax.device_get(state[0]))
  return flat(params), states


def pair(quantizer, case, **how):
  return saq(quantizer.fn, RHO, case=case, **how), qat(quantizer.fn)


def assert_same_run(found, reference):
  params, states = found
  assert [bool(state.second) for state in states] == [bool(taken) for taken in reference.taken]
  close(params, reference.v, rtol=1e-9)


@every_case
@quantizers
def test_every_kth_step_is_full(quantizer, case):
  reference = Run(quantizer, case)
  for t in range(STEPS):
    reference.sometimes(t % 3 == 0)
  assert_same_run(run(sometimes(*pair(quantizer, case), every(3)), quantizer), reference)


@every_case
@quantizers
def test_looksam_uses_again_what_sharpness_added(quantizer, case):
  reference = Run(quantizer, case)
  for t in range(STEPS):
    reference.looksam(t, 3, 0.6)
  found = run(looksam(*pair(quantizer, case), k=3, alpha=0.6), quantizer)
  assert_same_run(found, reference)
  close(flat(found[1][-1].memory), reference.memory, rtol=1e-9)


@every_case
@quantizers
def test_one_gradient_along_the_momentum(quantizer, case):
  reference = Run(quantizer, case)
  for _ in range(STEPS):
    reference.momentum(0.7)
  found = run(along_momentum(saq(quantizer.fn, RHO, case=case), decay=0.7), quantizer)
  assert_same_run(found, reference)
  close(flat(found[1][-1].memory), reference.memory, rtol=1e-9)


@every_case
def test_a_long_gradient_is_taken_twice(case):
  quantizer = ThreeBitLIQ()
  reference = Run(quantizer, case)
  for t in range(12):
    reference.adaptive(t, 12, 0.5, -1.0, 0.6)
  when = where_steep(12, first=0.5, last=-1.0, decay=0.6)
  assert_same_run(run(sometimes(*pair(quantizer, case), when), quantizer, 12), reference)
  assert {True, False} == set(map(bool, reference.taken))


@every_case
def test_adaptive_scaling_and_the_clean_gradient_go_with_strategies(case):
  quantizer, how = ThreeBitLIQ(), {'adaptive': True, 'eta': 0.1, 'accumulate_clean_grad': True}
  reference, other = (Run(quantizer, case, eta=0.1, accumulate=True) for _ in range(2))
  for t in range(STEPS):
    reference.looksam(t, 2, 0.6)
    other.sometimes(t % 2 == 0)
  links = pair(quantizer, case, **how)
  assert_same_run(run(looksam(*links, k=2, alpha=0.6), quantizer), reference)
  assert_same_run(run(sometimes(*links, every(2)), quantizer), other)


@pytest.mark.parametrize('rho', [0.0, 1e-12])
def test_what_rounding_left_is_not_used_again(rho):
  quantizer = ThreeBitLSQ()

  def rounded(z):
    noise = 1e-3 if rho == 0 else 1e-9  # such as between products in bfloat16 and in float32

    def with_noise(x):
      return x * (1 + noise * jnp.cos(jnp.arange(x.size)).reshape(x.shape))

    return jax.tree.map(with_noise, grad_fn(z))

  slots = looksam(saq(quantizer.fn, rho), qat(quantizer.fn), k=2, alpha=1.0), qat(quantizer.fn)
  with_it, without = (run(slot, quantizer, second=rounded) for slot in slots)
  close(with_it[0], without[0], rtol=1e-2)


def test_draws_of_the_same_seed_are_independent():
  count = 4000
  slot = saq(lambda p: p, 1.0, tensors=0.5, seed=3, has_aux=True)
  params = {'a': jnp.ones(()), 'b': jnp.ones(())}

  def moved(step):
    state = slot.init(params)._replace(step=step)
    _, state = slot.update(params, state, params, grad_fn=lambda z: (params, z))
    return state.aux['a'] != 1

  steps = jnp.arange(count)
  some = np.asarray(jax.vmap(moved)(steps))
  taken = np.asarray(jax.vmap(lambda t: at_random(0.5, seed=3).choose(t, 1.0, None)[0])(steps))
  assert abs(np.corrcoef(some, taken)[0, 1]) < 4 / np.sqrt(count)


def test_at_random_steps_come_as_often_as_they_should():
  count, p = 4000, 0.3
  choose = jax.vmap(lambda t: at_random(p, seed=1).choose(t, 1.0, None)[0])
  taken = np.asarray(choose(jnp.arange(count)))
  assert abs(taken.mean() - p) < 4 * np.sqrt(p * (1 - p) / count)
  # Neither in a rhythm: a step says nothing of the next one.
  assert abs(np.corrcoef(taken[1:], taken[:-1])[0, 1]) < 4 / np.sqrt(count)
  other = jax.vmap(lambda t: at_random(p, seed=2).choose(t, 1.0, None)[0])(jnp.arange(count))
  assert np.mean(taken == other) < 0.7


def test_the_probability_may_change_over_the_steps():
  when = at_random(lambda step: jnp.where(step < 3, 0.0, 1.0))
  quantizer = ThreeBitLIQ()
  reference = Run(quantizer, 3)
  for t in range(STEPS):
    reference.sometimes(t >= 3)
  assert_same_run(run(sometimes(*pair(quantizer, 3), when), quantizer), reference)


def counted():
  """A second gradient that counts how often it is computed."""
  calls = []

  def second(z):
    jax.debug.callback(lambda _: calls.append(1), z['scales']['w'])
    return grad_fn(z)

  return second, calls


@pytest.mark.parametrize(
  ('make', 'wanted'),
  [
    (lambda *links: sometimes(*links, every(3)), 3),
    (lambda *links: looksam(*links, k=4), 2),
    (lambda *links: sometimes(*links, at_random(0.0)), 0),
    (lambda sharp, _: along_momentum(sharp), STEPS),
    (lambda sharp, _: sharp, STEPS),
  ],
  ids=['interval', 'looksam', 'random', 'momentum', 'full'],
)
def test_a_skipped_gradient_is_not_computed(make, wanted):
  second, calls = counted()
  run(make(*pair(ThreeBitLIQ(), 3)), ThreeBitLIQ(), second=second)
  jax.effects_barrier()
  assert len(calls) == wanted


def test_a_choice_that_is_known_is_compiled_alone():
  quantizer = ThreeBitLIQ()
  params = tree(V)
  g = grad_fn(quantizer.fn(params))
  for slot in (sometimes(*pair(quantizer, 3), every(2)), looksam(*pair(quantizer, 3), k=2)):
    state = slot.init(params)
    for step in range(3):

      def update(state, taken):
        return slot.update(g, state, params, grad_fn=grad_fn, taken=taken)  # noqa: B023

      known = functools.partial(update, taken=step % 2 == 0)
      assert ' cond' not in str(jax.make_jaxpr(known)(state))
      chosen = functools.partial(update, taken=None)
      assert ' cond' in str(jax.make_jaxpr(chosen)(state))
      want, wanted = jax.jit(chosen)(state)
      found, state = jax.jit(known)(state)
      close(flat(found), flat(want), rtol=1e-6)
      for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_came_beside_the_gradient_is_zero_where_it_was_skipped():
  quantizer = ThreeBitLIQ()
  links = pair(quantizer, 3, has_aux=True)

  def second(z):
    return grad_fn(z), {'loss': jnp.float32(7.0), 'seen': jnp.int32(3)}

  params = tree(V)
  for slot in (sometimes(*links, every(2)), looksam(*links, k=2)):
    state, g = slot.init(params), grad_fn(quantizer.fn(params))
    found = []
    for _ in range(2):
      _, state = slot.update(g, state._replace(aux=None), params, grad_fn=second)
      found.append((float(state.aux['loss']), int(state.aux['seen']), float(state.second)))
    assert found == [(7.0, 3, 1.0), (0.0, 0, 0.0)]


def test_the_cosine_of_a_reused_step_is_that_of_the_gradient_returned():
  quantizer = ThreeBitLIQ()
  slot = looksam(*pair(quantizer, 3), k=2, alpha=0.8)
  params = tree(V)
  g = grad_fn(quantizer.fn(params))
  _, state = slot.update(g, slot.init(params), params, grad_fn=grad_fn)
  sharp, state = slot.update(g, state, params, grad_fn=grad_fn)
  clean = quantizer.pullback(V, flat(g))
  a = flat(sharp)
  want = a @ clean / np.linalg.norm(a) / np.linalg.norm(clean)
  assert 0.5 < want < 0.999
  np.testing.assert_allclose(state.cosine, want, rtol=1e-5)
  np.testing.assert_allclose(state.sharp_grad_norm, np.linalg.norm(a), rtol=1e-5)


@pytest.mark.parametrize('k', [1, 2])
def test_a_period_of_one_is_saq_itself(k):
  quantizer = ThreeBitLIQ()
  reference = run(saq(quantizer.fn, RHO), quantizer)[0]
  for slot in (
    sometimes(*pair(quantizer, 3), every(k)),
    looksam(*pair(quantizer, 3), k=k, alpha=0.5),
  ):
    assert np.allclose(run(slot, quantizer)[0], reference, rtol=1e-12) == (k == 1)


def test_a_zero_gradient_gives_no_nan():
  flat_loss = jax.grad(lambda z: 0.0 * sum(jnp.sum(x) for x in jax.tree.leaves(z)))
  params, quantizer = tree(V), ThreeBitLIQ()
  links = pair(quantizer, 3)
  for slot in (
    looksam(*links, k=2),
    along_momentum(links[0]),
    sometimes(*links, where_steep(10)),
  ):
    state = slot.init(params)
    for _ in range(3):
      updates, state = slot.update(flat_loss(params), state, params, grad_fn=flat_loss)
      assert not flat(updates).any()
      assert np.isfinite(flat(state._replace(aux=None))).all()


# What cannot be.


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: every(0), r'every\(k=0\): must be a whole number'),
    (lambda: every(2.5), r'every\(k=2.5\)'),
    (lambda: looksam(*pair(Identity(), 3), k=0), r'looksam\(k=0\)'),
    (lambda: looksam(*pair(Identity(), 3), alpha=-0.1), 'alpha=-0.1'),
    (lambda: at_random(1.5), r'probability=1.5.*from 0 to 1'),
    (lambda: where_steep(0), 'total_steps=0'),
    (lambda: where_steep(9, decay=1.0), 'decay=1.0'),
    (lambda: along_momentum(pair(Identity(), 3)[0], decay=-1), 'decay=-1'),
    (lambda: saq(lambda p: p, tensors=0.0), r'tensors=0.0.*above 0 and at most 1'),
    (lambda: saq(lambda p: p, tensors=1.5), 'tensors=1.5'),
    (lambda: hardest(V, V, 0.0), 'fraction=0.0'),
    (lambda: only(), 'needs a pattern'),
    (lambda: only('a('), 'not a regular expression'),
    (lambda: saq(lambda p: p, mask=only('model/norm')).init(tree(V)), r"'model/norm'.*'model/b'"),
    (
      lambda: saq(lambda p: p, mask=only('model/b', 'nothing')).init(tree(V)),
      r"only\('nothing'\) matches no leaf",
    ),
    (lambda: saq(lambda p: p, mask=only('scales/w')).init(tree(V)), 'chooses no leaf'),
  ],
)
def test_what_cannot_be_is_said(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_a_missing_gradient_function_is_said_in_a_skipped_step_too():
  links = pair(Identity(), 3)
  for slot in (sometimes(*links, at_random(0.0)), looksam(*links), along_momentum(links[0])):
    state = slot.init(tree(V))
    with pytest.raises(ValueError, match='needs grad_fn'):
      slot.update(tree(V), state, tree(V))
    with pytest.raises(ValueError, match='params are missing'):
      slot.update(tree(V), state, grad_fn=grad_fn)


# Where several are run at once.


def test_mapped_over_runs_each_is_itself():
  quantizer = ThreeBitLIQ()
  slot = looksam(*pair(quantizer, 3), k=2, alpha=0.6)
  starts = np.stack([V, 1.1 * V, 0.7 * V])

  def two(params):
    state = slot.init(params)
    for _ in range(2):
      g, state = slot.update(grad_fn(quantizer.fn(params)), state, params, grad_fn=grad_fn)
    return g

  together = jax.jit(jax.vmap(two))(jax.vmap(tree)(jnp.asarray(starts, jnp.float32)))
  for i, v in enumerate(starts):
    alone = jax.jit(functools.partial(two))(tree(v))
    close(flat(jax.tree.map(lambda x, i=i: x[i], together)), flat(alone), rtol=1e-5)

"""`saq` and `qat` against closed forms in NumPy float64, and the errors at their boundary."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transform_reference import (
  ALL,
  RHO,
  A,
  C,
  Identity,
  Smooth,
  ThreeBitLIQ,
  ThreeBitLSQ,
  V,
  W,
  close,
  closed_form,
  flat,
  grad_fn,
  loss,
  start,
  tree,
)

from saq_jax import qat, saq


def one_step(tx, quantizer, v, state=None, fn=grad_fn):
  """The update at v, with the points at which `grad_fn` was called."""
  params, seen = tree(v), []

  def recorded(z):
    seen.append(z)
    return fn(z)

  g = fn(quantizer.fn(params))
  state = tx.init(params) if state is None else state
  out, state = tx.update(g, state, params, grad_fn=recorded)
  return out, state, seen


QUANTIZERS = [ThreeBitLIQ(), ThreeBitLSQ(), Smooth()]
every_quantizer = pytest.mark.parametrize(
  'quantizer', QUANTIZERS, ids=[type(q).__name__ for q in QUANTIZERS]
)
every_case = pytest.mark.parametrize('case', [1, 2, 3])


# The three cases.


@every_quantizer
@every_case
@pytest.mark.parametrize('eta', [None, 0.4], ids=['sam', 'asam'])
@pytest.mark.parametrize('accumulate', [False, True], ids=['', 'accumulate'])
def test_a_case_equals_its_closed_form(quantizer, case, eta, accumulate):
  v = start(quantizer)
  want = closed_form(quantizer, v, case, eta=eta, accumulate=accumulate)
  tx = saq(
    quantizer.fn,
    RHO,
    case=case,
    adaptive=eta is not None,
    eta=eta or 0.01,
    accumulate_clean_grad=accumulate,
  )
  out, state, (seen,) = one_step(tx, quantizer, v)
  close(flat(seen), want['point'])
  close(flat(grad_fn(seen)), want['g2'])
  close(flat(out), want['out'])
  close(state.grad_norm, want['norm'])
  close(state.sharp_grad_norm, np.linalg.norm(want['out']))
  close(state.cosine, want['cosine'])
  close(state.rho, RHO)
  assert int(state.step) == 1


@every_quantizer
def test_the_cases_differ_where_the_closed_forms_are_compared(quantizer):
  """Else the test above could not tell them apart."""
  v = start(quantizer)
  for eta in (None, 0.4):
    outs = [closed_form(quantizer, v, case, eta=eta) for case in (1, 2, 3)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
      assert np.max(np.abs(outs[i]['out'] - outs[j]['out'])) > 0.05
    for want in outs:
      assert np.max(np.abs(want['out'] - want['clean'])) > 0.05
      assert want['cosine'] < 0.9999


@every_case
def test_float64_is_kept(case):
  quantizer = Smooth()
  with jax.enable_x64(True):
    out, state, _ = one_step(saq(quantizer.fn, RHO, case=case), quantizer, V)
    want = closed_form(quantizer, V, case)
    np.testing.assert_allclose(flat(out), want['out'], rtol=1e-12)
    np.testing.assert_allclose(state.grad_norm, want['norm'], rtol=1e-12)


@every_quantizer
def test_qat_returns_the_pullback(quantizer):
  v = start(quantizer)
  params = tree(v)
  tx = qat(quantizer.fn)
  out, state = tx.update(grad_fn(quantizer.fn(params)), tx.init(params), params)
  want = closed_form(quantizer, v, 3)['clean']
  close(flat(out), want)
  close(state.grad_norm, np.linalg.norm(want))
  close(state.sharp_grad_norm, np.linalg.norm(want))
  close(state.cosine, 1.0)
  assert float(state.rho) == 0
  assert int(state.step) == 1


@every_quantizer
@every_case
@pytest.mark.parametrize('adaptive', [False, True])
def test_rho_zero_is_qat_bit_for_bit(quantizer, case, adaptive):
  params = tree(start(quantizer))

  def step(tx):
    state = tx.init(params)
    return tx.update(grad_fn(quantizer.fn(params)), state, params, grad_fn=grad_fn)[0]

  sharp = step(saq(quantizer.fn, 0.0, case=case, adaptive=adaptive))
  plain = step(qat(quantizer.fn))
  np.testing.assert_array_equal(flat(sharp), flat(plain))


# Without quantization: SAM.


@every_case
def test_with_the_identity_every_case_is_sam(case):
  g = A @ V - C
  want = A @ (V + RHO * g / np.linalg.norm(g)) - C
  tx = saq(Identity.fn, RHO, case=case, mask=lambda path: True)
  out, _, _ = one_step(tx, Identity(), V)
  close(flat(out), want)


@every_case
def test_with_the_identity_every_case_is_asam(case):
  g, t = A @ V - C, np.abs(V) + 0.2
  want = A @ (V + RHO * t**2 * g / np.linalg.norm(t * g)) - C
  tx = saq(Identity.fn, RHO, case=case, mask=lambda path: True, adaptive=True, eta=0.2)
  out, _, _ = one_step(tx, Identity(), V)
  close(flat(out), want)


@every_case
def test_agrees_with_the_sam_of_optax(case):
  params, rate = tree(V), 0.1
  g = grad_fn(params)
  theirs = optax.contrib.sam(
    optax.sgd(rate),
    optax.chain(optax.contrib.normalize(), optax.sgd(RHO)),
    sync_period=2,
    opaque_mode=True,
  )
  want, _ = theirs.update(g, theirs.init(params), params, grad_fn=lambda z, _: grad_fn(z))
  ours = optax.chain(saq(Identity.fn, RHO, case=case, mask=lambda path: True), optax.sgd(rate))
  out, _ = ours.update(g, ours.init(params), params, grad_fn=grad_fn)
  close(flat(out), flat(want))


# Gradients that are zero, not finite, or of half precision.


@every_case
@pytest.mark.parametrize('adaptive', [False, True])
def test_a_zero_gradient_perturbs_nothing(case, adaptive):
  quantizer = Smooth()
  flat_loss = jax.grad(lambda z: 0.0 * loss(z))
  tx = saq(quantizer.fn, RHO, case=case, adaptive=adaptive)
  out, state, (seen,) = one_step(tx, quantizer, V, fn=flat_loss)
  np.testing.assert_array_equal(flat(seen), flat(quantizer.fn(tree(V))))
  np.testing.assert_array_equal(flat(out), 0)
  for value in (state.grad_norm, state.sharp_grad_norm, state.cosine):
    assert float(value) == 0


@every_case
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_shows(case, bad):
  quantizer = Smooth()
  params = tree(V)
  g = grad_fn(quantizer.fn(params))
  g['model']['b'] = g['model']['b'].at[1].set(bad)
  tx = saq(quantizer.fn, RHO, case=case)
  out, state = tx.update(g, tx.init(params), params, grad_fn=grad_fn)
  # One bad entry spoils the norm, and thereby every other leaf.
  assert not np.isfinite(flat(out['model']['w'])).any()
  assert not np.isfinite(state.grad_norm)
  assert not np.isfinite(state.sharp_grad_norm)
  assert not np.isfinite(state.cosine)


@every_case
def test_a_nan_of_the_second_gradient_shows(case):
  quantizer = Smooth()
  params = tree(V)
  tx = saq(quantizer.fn, RHO, case=case)
  out, state = tx.update(
    grad_fn(quantizer.fn(params)),
    tx.init(params),
    params,
    grad_fn=lambda z: jax.tree.map(lambda x: x * jnp.nan, z),
  )
  assert np.isnan(flat(out)).all()
  assert np.isnan(state.sharp_grad_norm)


@every_case
def test_the_norm_of_half_precision_is_taken_in_float32(case):
  n = 4133
  params = {'a': jnp.ones(n, jnp.bfloat16), 'b': jnp.full(3, 2.0, jnp.bfloat16)}
  want = np.sqrt(n * 1.0 + 3 * 4.0)
  naive = float(optax.tree.norm(params))
  assert abs(naive / want - 1) > 1e-4, 'bfloat16 would do; choose another n'
  seen = []

  def half_square(z):
    seen.append(z)
    return z

  tx = saq(lambda t: t, 100.0, case=case)
  out, state = tx.update(params, tx.init(params), params, grad_fn=half_square)
  np.testing.assert_allclose(state.grad_norm, want, rtol=1e-6)
  eps = 100 / want
  np.testing.assert_array_equal(
    seen[0]['b'], np.asarray(2 * (1 + eps), jnp.bfloat16) * np.ones(3, jnp.bfloat16)
  )
  assert {x.dtype for x in jax.tree.leaves((out, seen))} == {jnp.dtype(jnp.bfloat16)}
  assert state.grad_norm.dtype == state.cosine.dtype == jnp.float32


# What is perturbed.


@every_case
def test_the_default_mask_leaves_learnable_scales_out(case):
  """Out of eps and out of the norm, at their places in this package's trees."""
  params = {
    'model': {'conv': {'kernel': jnp.array([3.0]), 'quant_scale': jnp.array([100.0])}},
    'scales': {'conv/kernel': jnp.array([1000.0])},
  }
  seen = []
  tx = saq(lambda t: t, 1.0, case=case)
  _, state = tx.update(params, tx.init(params), params, grad_fn=lambda z: (seen.append(z), z)[1])
  assert float(state.grad_norm) == 3
  np.testing.assert_array_equal(flat(seen[0]), [4, 100, 1000])


@every_case
def test_the_default_mask_keeps_other_scales(case):
  """The affine scale of a norm is perturbed, and so is a layer that is named scales."""
  params = {'model': {'norm': {'scale': jnp.array([3.0])}, 'scales': {'w': jnp.array([4.0])}}}
  seen = []
  tx = saq(lambda t: t, 5.0, case=case)
  _, state = tx.update(params, tx.init(params), params, grad_fn=lambda z: (seen.append(z), z)[1])
  assert float(state.grad_norm) == 5
  np.testing.assert_allclose(flat(seen[0]), [6, 8], rtol=1e-6)


@every_quantizer
@every_case
@pytest.mark.parametrize('eta', [None, 0.4])
def test_masks_by_predicate_and_by_tree_agree_with_the_closed_form(quantizer, case, eta):
  v = start(quantizer)
  only_w = np.zeros(10, bool)
  only_w[W] = True
  want = closed_form(quantizer, v, case, mask=only_w, eta=eta)
  wanted = {'model': {'b': False, 'w': True}, 'scales': {'w': False}}
  for mask in (lambda path: path == 'model/w', wanted):
    tx = saq(quantizer.fn, RHO, case=case, mask=mask, adaptive=eta is not None, eta=eta or 0)
    out, state, (seen,) = one_step(tx, quantizer, v)
    close(flat(seen), want['point'])
    close(flat(out), want['out'])
    close(state.grad_norm, want['norm'])


@every_case
def test_a_mask_of_everything_counts_the_scales_too(case):
  quantizer = Smooth()
  want = closed_form(quantizer, V, case, mask=ALL)
  assert abs(want['norm'] - closed_form(quantizer, V, case)['norm']) > 0.01
  out, state, _ = one_step(saq(quantizer.fn, RHO, case=case, mask=lambda _: True), quantizer, V)
  close(flat(out), want['out'])
  close(state.grad_norm, want['norm'])


def test_a_mask_of_nothing_is_an_error_that_names_paths():
  params = {'stem': {'kernel': jnp.ones(3)}}
  for nothing in (lambda path: path.endswith('kernle'), {'stem': {'kernel': False}}):
    tx = saq(lambda p: p, RHO, mask=nothing)
    with pytest.raises(ValueError, match=r'chooses no leaf.* stem/kernel'):
      tx.update(params, tx.init(params), params, grad_fn=lambda z: z)


# Schedules, aux, and what a step costs.


@every_case
def test_a_schedule_of_rho_follows_the_step(case):
  """Through a warm-up at zero, which is plain QAT."""
  quantizer = Smooth()
  radii = [0.0, 0.0, 0.3, 0.6]
  tx = saq(quantizer.fn, lambda count: jnp.asarray(radii)[count], case=case)
  state = tx.init(tree(V))
  for count, rho in enumerate(radii):
    assert int(state.step) == count
    out, state, _ = one_step(tx, quantizer, V, state)
    close(state.rho, rho)
    close(flat(out), closed_form(quantizer, V, case, rho=rho)['out'])


@every_case
def test_a_schedule_advances_inside_jit(case):
  quantizer = Smooth()
  tx = saq(quantizer.fn, optax.linear_schedule(0.0, 0.8, 4), case=case)

  @jax.jit
  def step(state):
    params = tree(V)
    return tx.update(grad_fn(quantizer.fn(params)), state, params, grad_fn=grad_fn)

  state = tx.init(tree(V))
  for rho in (0.0, 0.2, 0.4):
    out, state = step(state)
    close(flat(out), closed_form(quantizer, V, case, rho=rho)['out'])


@every_case
def test_aux_is_left_in_the_state(case):
  quantizer = ThreeBitLIQ()
  params = tree(V)
  with_aux = jax.grad(lambda z: (loss(z), {'loss': loss(z)}), has_aux=True)
  tx = saq(quantizer.fn, RHO, case=case, has_aux=True)
  g = grad_fn(quantizer.fn(params))
  assert tx.init(params).aux is None
  out, state = tx.update(g, tx.init(params), params, grad_fn=with_aux)
  want = closed_form(quantizer, V, case)
  point = want['point']
  close(state.aux['loss'], 0.5 * point @ A @ point - C @ point)
  close(flat(out), want['out'])


@every_case
@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
def test_grad_fn_is_called_once(case, jit):
  quantizer = Smooth()
  params, calls = tree(V), []
  tx = saq(quantizer.fn, RHO, case=case, adaptive=True, accumulate_clean_grad=True)

  def counted(z):
    calls.append(1)
    return grad_fn(z)

  def step(state):
    return tx.update(grad_fn(quantizer.fn(params)), state, params, grad_fn=counted)

  (jax.jit(step) if jit else step)(tx.init(params))
  assert len(calls) == 1


@pytest.mark.parametrize(
  ('make', 'gradients'),
  [(lambda fn, c=c: saq(fn, RHO, case=c), 2) for c in (1, 2, 3)] + [(qat, 1)],
  ids=['case1', 'case2', 'case3', 'qat'],
)
def test_a_compiled_step_runs_as_many_gradients_as_it_says(make, gradients):
  quantizer, ran = Smooth(), []

  @jax.custom_vjp
  def marked(x):
    return x

  def backward(_, ct):
    jax.debug.callback(lambda _: ran.append(1), ct)
    return (ct,)

  marked.defvjp(lambda x: (x, None), backward)
  fn = jax.grad(lambda z: marked(loss(z)))
  params, tx = tree(V), make(quantizer.fn)

  @jax.jit
  def step(params, state):
    return tx.update(fn(quantizer.fn(params)), state, params, grad_fn=fn)

  jax.block_until_ready(step(params, tx.init(params)))
  jax.effects_barrier()
  assert len(ran) == gradients


def test_qat_takes_a_grad_fn_and_does_not_call_it():
  def never(z):
    raise AssertionError('called')

  params = tree(V)
  tx = qat(Smooth.fn)
  tx.update(grad_fn(Smooth.fn(params)), tx.init(params), params, grad_fn=never)


def test_unknown_extra_arguments_pass_by():
  params = tree(V)
  for tx in (saq(Smooth.fn), qat(Smooth.fn)):
    tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn, value=jnp.ones(()))


def test_leaves_that_are_neither_float32_nor_vectors():
  """A scalar, an empty leaf and a bfloat16 leaf beside float32 ones keep shape and dtype."""
  params = {
    's': jnp.asarray(2.0),
    'none': jnp.zeros((0, 3)),
    'h': jnp.full((2, 2), 0.5, jnp.bfloat16),
  }
  tx = saq(lambda t: t, 0.1)
  out, state = tx.update(params, tx.init(params), params, grad_fn=lambda z: z)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(
    lambda x: (x.shape, x.dtype), params
  )
  close(state.grad_norm, np.sqrt(4 + 4 * 0.25))


# Errors, each with what mends it.


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'case': 4}, r'saq\(case=4\): case must be 1, 2 or 3'),
    ({'case': '3'}, r"saq\(case='3'\): case must be 1, 2 or 3"),
    ({'rho': -0.1}, r'saq\(rho=-0\.1\): must be a finite number, at least 0'),
    ({'rho': float('nan')}, r'saq\(rho=nan\): must be a finite number'),
    ({'rho': float('inf')}, r'saq\(rho=inf\): must be a finite number'),
    ({'eta': -1.0}, r'saq\(eta=-1\.0\): must be a finite number, at least 0'),
    ({'eta': float('nan')}, r'saq\(eta=nan\): must be a finite number'),
    ({'sync_perturbation': False}, r'sync_perturbation=False\) needs axis_name'),
    ({'case': jnp.asarray(3)}, r'saq\(case=\.\.\.\).*static_args'),
    ({'adaptive': jnp.asarray(True)}, r'saq\(adaptive=\.\.\.\).*static_args'),
    ({'has_aux': jnp.asarray(True)}, r'saq\(has_aux=\.\.\.\).*static_args'),
    (
      {'accumulate_clean_grad': jnp.asarray(True)},
      r'saq\(accumulate_clean_grad=\.\.\.\).*static_args',
    ),
    ({'sync_perturbation': jnp.asarray(True)}, r'saq\(sync_perturbation=\.\.\.\).*static_args'),
  ],
)
def test_construction_refuses(arguments, message):
  with pytest.raises(ValueError, match=message):
    saq(Smooth.fn, **arguments)


@pytest.mark.parametrize('rho', [0, 0.0, 1, np.float32(0.1), jnp.asarray(0.1)])
def test_construction_takes_any_number_from_zero_on(rho):
  out, state, _ = one_step(saq(Smooth.fn, rho), Smooth(), V)
  close(state.rho, float(rho))
  close(flat(out), closed_form(Smooth(), V, 3, rho=float(rho))['out'])


@pytest.mark.parametrize('make', [saq, qat])
def test_update_needs_params(make):
  tx = make(Smooth.fn)
  with pytest.raises(ValueError, match=r'params are missing: call tx\.update\(g, state, params'):
    tx.update(tree(V), tx.init(tree(V)), grad_fn=grad_fn)


def test_update_needs_grad_fn():
  tx = saq(Smooth.fn)
  with pytest.raises(ValueError, match=r'saq needs grad_fn: call tx\.update.*grad_fn=jax\.grad'):
    tx.update(tree(V), tx.init(tree(V)), tree(V))


@pytest.mark.parametrize('make', [saq, qat])
def test_update_refuses_a_gradient_of_the_model_alone(make):
  """The easiest mistake: a gradient taken at the model's part of z."""
  tx = make(Smooth.fn)
  with pytest.raises(ValueError, match='gradient has another structure than params: take it at'):
    tx.update(tree(V)['model'], tx.init(tree(V)), tree(V), grad_fn=grad_fn)


@pytest.mark.parametrize('make', [saq, qat])
def test_update_refuses_masked_nodes(make):
  tx = make(Smooth.fn)
  g = tree(V) | {'scales': optax.MaskedNode()}
  with pytest.raises(ValueError, match=r'cannot stand inside optax\.masked or optax\.partition'):
    tx.update(g, tx.init(tree(V)), tree(V), grad_fn=grad_fn)


def test_update_refuses_a_mask_of_another_structure():
  tx = saq(Smooth.fn, mask={'model': True, 'scales': False})
  with pytest.raises(ValueError, match=r'saq\(mask=\.\.\.\) has another structure than params'):
    tx.update(tree(V), tx.init(tree(V)), tree(V), grad_fn=grad_fn)


@pytest.mark.parametrize(
  ('has_aux', 'make', 'message'),
  [
    (False, jax.value_and_grad, 'what grad_fn returned has another structure'),
    (True, jax.grad, r'did not return \(gradient, aux\)'),
  ],
)
def test_a_grad_fn_that_returns_something_else_is_an_error(has_aux, make, message):
  params = {'w': jnp.ones(3)}

  def loss(z):
    return jnp.sum(z['w'] ** 2)

  tx = saq(lambda p: p, 0.1, has_aux=has_aux)
  with pytest.raises(ValueError, match=message):
    tx.update(jax.grad(loss)(params), tx.init(params), params, grad_fn=make(loss))

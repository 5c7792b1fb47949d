"""Flipped codes, diminishment and mismatch against NumPy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saq_jax import LIQ, LSQ, QuantRule, weight_quantizer
from saq_jax.analysis.codes import diminishment, flipped_codes, mismatch

RNG = np.random.default_rng(0)
QUANTIZE = weight_quantizer(
  [QuantRule('a/kernel', LSQ(bits=4)), QuantRule('b/kernel', LSQ(bits=2))]
)
SCALES = {'a/kernel': 0.21, 'b/kernel': 0.6}
BOUNDS = {'a/kernel': (-8, 7), 'b/kernel': (-2, 1)}


def like_params(a, b, bias, scales=(0.0, 0.0)):
  return {
    'model': {
      'a': {'kernel': jnp.asarray(a, jnp.float32), 'bias': jnp.asarray(bias, jnp.float32)},
      'b': {'kernel': jnp.asarray(b, jnp.float32)},
    },
    'scales': {path: jnp.float32(s) for path, s in zip(SCALES, scales)},
  }


A, B, BIAS = RNG.normal(size=(40, 5)), RNG.normal(size=(7, 3)), RNG.normal(size=5)
PARAMS = like_params(A, B, BIAS, SCALES.values())
P = [RNG.normal(size=x.shape) for x in (A, B, BIAS)]
G = like_params(*P, (3.0, -2.0))


def codes_of(path, w):
  return np.rint(np.clip(np.asarray(w, np.float64) / SCALES[path], *BOUNDS[path]))


def moved(rho):
  """The weights after a step of norm rho along P, biases counted, scales not."""
  length = np.sqrt(sum(np.sum(p**2) for p in P))
  return [x + rho * p / length for x, p in zip((A, B, BIAS), P)]


@pytest.mark.parametrize('rho', [0.0, 0.05, 0.5, 5.0])
def test_a_perturbation_before_rounding_is_seen_as_in_numpy(rho):
  found = jax.jit(lambda p: diminishment(QUANTIZE, p, G, rho))(PARAMS)
  a, b, _ = moved(rho)
  flips, jumps, added = [], [], []
  for path, w, there in (('a/kernel', A, a), ('b/kernel', B, b)):
    before, after = codes_of(path, w), codes_of(path, there)
    flips.append((before != after).ravel())
    jumps.append(SCALES[path] * (after - before).ravel())
    added.append((there - w).ravel())
    assert float(found.flips.by_path[path]) == pytest.approx(flips[-1].mean())
  assert float(found.flips.fraction) == pytest.approx(np.concatenate(flips).mean())
  assert float(found.seen) == pytest.approx(
    np.linalg.norm(np.concatenate(jumps)), rel=1e-5, abs=1e-6
  )
  assert float(found.added) == pytest.approx(np.linalg.norm(np.concatenate(added)), abs=1e-5)


def test_what_is_seen_is_sparse_and_wrongly_scaled_at_the_usual_radius():
  count, rho = 10_000, 0.05
  w = 0.07 * RNG.normal(size=count).astype(np.float32)
  quantize = weight_quantizer([QuantRule('w', LSQ(bits=4))])
  params = quantize.init({'w': w})
  p = {'model': {'w': RNG.normal(size=count)}, 'scales': {'w': np.zeros(())}}
  found = diminishment(quantize, params, jax.tree.map(jnp.float32, p), rho)
  # A weight that is uniform within a step s flips with probability E|eps_i| / s, and each flip is
  # seen as s.
  step = float(params['scales']['w'])
  flips = rho / np.sqrt(count) * np.sqrt(2 / np.pi) / step
  assert float(found.added) == pytest.approx(rho, rel=1e-3)
  assert float(found.flips.fraction) == pytest.approx(flips, rel=0.2)
  assert 0.01 < float(found.flips.fraction) < 0.02
  assert float(found.seen) == pytest.approx(step * np.sqrt(count * flips), rel=0.1)
  assert float(found.seen) > 5 * rho


def test_a_mask_keeps_what_it_leaves_out_where_it_is():
  found = diminishment(QUANTIZE, PARAMS, G, 2.0, mask=lambda path: path == 'model/b/kernel')
  assert float(found.flips.by_path['a/kernel']) == 0
  assert float(found.added) == pytest.approx(2.0)


def test_flips_of_scales_alone():
  other = PARAMS | {'scales': PARAMS['scales'] | {'b/kernel': jnp.float32(0.3)}}
  found = flipped_codes(QUANTIZE, PARAMS, other)
  want = codes_of('b/kernel', B) != np.rint(np.clip(B / 0.3, -2, 1))
  assert float(found.by_path['b/kernel']) == pytest.approx(want.mean())
  assert float(found.fraction) == pytest.approx(want.sum() / (A.size + B.size))


def angle(u, v):
  u, v = np.ravel(u), np.ravel(v)
  return np.degrees(np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))


def test_mismatch_of_a_clip_is_the_part_of_the_gradient_that_it_stops():
  found = jax.jit(lambda g: mismatch(QUANTIZE, PARAMS, g))(G)
  kept = []
  for path, w, g in (('a/kernel', A, P[0]), ('b/kernel', B, P[1])):
    low, high = BOUNDS[path]
    kept.append(g * ((w / SCALES[path] > low) & (w / SCALES[path] < high)))
    assert float(found.by_path[path]) == pytest.approx(angle(g, kept[-1]), rel=1e-4)
  both, through = (np.concatenate([x.ravel() for x in pair]) for pair in (P[:2], kept))
  assert float(found.degrees) == pytest.approx(angle(both, through), rel=1e-4)
  assert float(found.cosine) == pytest.approx(np.cos(np.radians(angle(both, through))), rel=1e-4)


def test_a_normalisation_turns_the_whole_but_no_leaf():
  quantize = weight_quantizer([QuantRule('.*/kernel', LIQ(bits=4, normalize=True, clip_init=9.0))])
  params = quantize.init(like_params(A, 10 * B, BIAS)['model'])
  found = mismatch(quantize, params, G)
  through = np.concatenate([P[0].ravel() / A.std(ddof=1), P[1].ravel() / (10 * B).std(ddof=1)])
  assert max(float(x) for x in found.by_path.values()) < 0.01
  both = np.concatenate([x.ravel() for x in P[:2]])
  assert float(found.degrees) == pytest.approx(angle(both, through), rel=1e-3)


def test_no_clip_and_no_gradient():
  wide = PARAMS | {'scales': {path: jnp.float32(9.0) for path in SCALES}}
  assert float(mismatch(QUANTIZE, wide, G).degrees) < 1e-3
  zero = mismatch(QUANTIZE, PARAMS, jax.tree.map(jnp.zeros_like, G))
  assert float(zero.degrees) == pytest.approx(90)
  assert float(zero.cosine) == pytest.approx(0, abs=1e-6)
  assert float(diminishment(QUANTIZE, PARAMS, jax.tree.map(jnp.zeros_like, G), 1.0).seen) == 0


def test_a_network_of_full_precision_has_no_codes():
  quantize = weight_quantizer([QuantRule('.*/kernel', LSQ(bits=None))])
  for found in (flipped_codes, mismatch):
    with pytest.raises(ValueError, match='no weight is quantized'):
      found(quantize, PARAMS, G)

"""The quantizers against the authors' recorded values and formulas written again in NumPy."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from saq_jax import LIQ, LSQ, PACT, DoReFa

REFERENCE = np.load(Path(__file__).parent / 'reference' / 'liq_quantizers.npz')
LEARNS = [LSQ(bits=3), LIQ(bits=3), PACT(bits=3)]


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def draw(shape, seed=0, width=2.0):
  """Normal float64 numbers and a cotangent for them."""
  rng = np.random.default_rng(seed)
  return width * rng.standard_normal(shape), rng.standard_normal(shape)


def pull(quantizer, x, scale, ct):
  """The value and the gradients of x and scale, in NumPy."""
  value, vjp = jax.vjp(quantizer, jnp.asarray(x), jnp.asarray(scale))
  return [np.asarray(t) for t in (value, *vjp(jnp.asarray(ct)))]


def sum_like(full, scale):
  """Sums a full-size gradient to the shape of a scale that has lengths of one."""
  axes = tuple(i for i in range(full.ndim) if scale.ndim == 0 or scale.shape[i] == 1)
  return full.sum(axes, keepdims=scale.ndim > 0)


def lsq_numpy(x, s, ct, low, high, factor):
  """Equations 1, 3 and 5 of LSQ."""
  v = x / s
  value = s * np.rint(np.minimum(np.maximum(v, low), high))
  d_s = np.where(v <= low, low, np.where(v >= high, high, np.rint(v) - v))
  return value, np.where((v > low) & (v < high), ct, 0.0), factor * sum_like(ct * d_s, s)


def check(got, want):
  for mine, theirs in zip(got, want, strict=True):
    assert mine.shape == theirs.shape
    np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('clip', [0.7, 1.5])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('kind', ['normalized', 'plain', 'unsigned'])
def test_liq_is_the_authors(kind, bits, clip):
  prefix, x, quantizer = {
    'normalized': (f'w{bits}_clip{clip}_', 'weight', LIQ(bits=bits, normalize=True)),
    'plain': (f'w{bits}_clip{clip}_nonorm_', 'weight', LIQ(bits=bits)),
    'unsigned': (f'a{bits}_clip{clip}_', 'act', LIQ(bits=bits, signed=False)),
  }[kind]
  got = pull(quantizer, REFERENCE[x], clip, REFERENCE[f'{x}_cotangent'])
  d_clip = REFERENCE[f'{prefix}dclip'].reshape(())
  check(got, [REFERENCE[f'{prefix}value'], REFERENCE[f'{prefix}d{x}'], d_clip])


def test_liq_passes_the_gradient_at_the_edges_of_its_clip():
  x, ct = np.array([-1.6, -1.5, 0.0, 1.5, 1.6]), np.arange(1.0, 6.0)
  assert pull(LIQ(bits=4), x, 1.5, ct)[1].tolist() == [0, 2, 3, 4, 0]
  assert pull(LIQ(bits=4, signed=False), x, 1.5, ct)[1].tolist() == [0, 0, 3, 4, 0]


@pytest.mark.parametrize('normalize', [False, True])
def test_liq_per_channel_is_each_channel_by_itself(normalize):
  x, ct = draw((4, 3, 5))
  clips = np.array([0.6, 1.1, 2.0])
  got = pull(LIQ(bits=3, axis=1, normalize=normalize), x, clips.reshape(1, 3, 1), ct)
  alone = LIQ(bits=3, normalize=normalize)
  each = [pull(alone, x[:, i], clips[i], ct[:, i]) for i in range(3)]
  value, d_x, d_clip = zip(*each, strict=True)
  check(got, [np.stack(value, 1), np.stack(d_x, 1), np.stack(d_clip).reshape(1, 3, 1)])


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('axis', [None, 0, -1])
@pytest.mark.parametrize('choice', ['scale', 'tensor', 'feature', 0.25])
def test_lsq_is_the_published_formula(choice, axis, signed):
  x, ct = draw((4, 3, 5))
  low, high = (-4, 3) if signed else (0, 7)
  shape = {None: (), 0: (4, 1, 1), -1: (1, 1, 5)}[axis]
  scale = np.random.default_rng(1).uniform(0.2, 0.9, shape)
  count = {'scale': {None: 60, 0: 15, -1: 12}[axis], 'tensor': 60, 'feature': 15}
  factor = choice if choice == 0.25 else 1 / np.sqrt(count[choice] * high)
  quantizer = LSQ(bits=3, signed=signed, axis=axis, grad_scale=choice)
  check(pull(quantizer, x, scale, ct), lsq_numpy(x, scale, ct, low, high, factor))


@pytest.mark.parametrize('signed', [True, False])
def test_lsq_stops_the_gradient_at_the_outermost_codes(signed):
  low, high = (-2, 1) if signed else (0, 3)
  x = 0.5 * np.array([low - 1, low, low + 0.25, high - 0.25, high, high + 1])
  _, d_x, d_s = pull(LSQ(bits=2, signed=signed, grad_scale=1.0), x, 0.5, np.ones(6))
  assert d_x.tolist() == [0, 0, 1, 1, 0, 0]
  assert d_s == 2 * low - 0.25 + 0.25 + 2 * high


@pytest.mark.parametrize(('bits', 'signed', 'high'), [(2, True, 1), (4, True, 7), (4, False, 15)])
def test_lsq_first_scale_is_the_published_one(bits, signed, high):
  x, _ = draw((4, 3, 5))
  whole = LSQ(bits=bits, signed=signed).init(jnp.asarray(x))
  np.testing.assert_allclose(whole, 2 * np.abs(x).mean() / np.sqrt(high), rtol=1e-12)
  each = LSQ(bits=bits, signed=signed, axis=1).init(jnp.asarray(x))
  assert each.shape == (1, 3, 1)
  want = [2 * np.abs(x[:, i]).mean() / np.sqrt(high) for i in range(3)]
  np.testing.assert_allclose(each.ravel(), want, rtol=1e-12)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('axis', [None, 1])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_least_squares_scale_is_a_fixed_point_near_the_best_scale(bits, axis, signed):
  x = draw((200, 3), seed=bits)[0] * [1.0, 10.0, 0.1]
  x = x if signed else np.abs(x)
  low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
  quantizer = LSQ(bits=bits, signed=signed, axis=axis, init_by='least_squares')
  s = np.asarray(quantizer.init(jnp.asarray(x)))

  def codes(s):
    return np.clip(np.rint(x / s), low, high)

  def error(s):
    return sum_like((x - s * codes(s)) ** 2, s)

  fixed = sum_like(x * codes(s), s) / sum_like(codes(s) ** 2, s)
  np.testing.assert_allclose(s, fixed, rtol=2e-5)
  # Nearest codes for a scale, then the best scale for them: no round can raise the error, but
  # where the iteration stops depends on its start, and a scan finds what there was to reach.
  start = np.abs(x).max(None if axis is None else 0, keepdims=axis is not None) / high
  assert np.all(error(s) < error(start))
  best = np.min([error(s * shift) for shift in np.geomspace(0.1, 10, 400)], 0)
  assert np.all(error(s) <= 1.3 * best)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('axis', [None, 1])
def test_pact_is_the_published_formula(axis, signed):
  x, ct = draw((6, 3))
  clip = np.array(1.5) if axis is None else np.array([[0.5, 1.5, 49.0]])  # 49 (1/49) < 1
  x[0], x[1], x[2] = clip, -clip, 0.0
  n, bottom = (3, -clip) if signed else (7, 0 * clip)
  value = np.rint(np.minimum(np.maximum(x, bottom), clip) * n / clip) * clip / n
  above, below = x >= clip, (x <= -clip) if signed else (x < 0)
  slope = np.where(above, 1.0, np.where(below, -1.0 if signed else 0.0, 0.0))
  want = [value, np.where(above | below, 0.0, ct), sum_like(ct * slope, clip)]
  check(pull(PACT(bits=3, signed=signed, axis=axis), x, clip, ct), want)


@pytest.mark.parametrize('axis', [None, 0])
@pytest.mark.parametrize('bits', [2, 5])
def test_signed_dorefa_sends_its_gradient_through_the_maximum(bits, axis):
  x, ct = draw((3, 20))
  value, vjp = jax.vjp(DoReFa(bits=bits, axis=axis), jnp.asarray(x))
  n = 2**bits - 1
  groups = [np.s_[:]] if axis is None else [np.s_[i] for i in range(3)]
  want, d_x = np.empty_like(x), np.empty_like(x)
  for g in groups:
    t, c = np.tanh(x[g]), ct[g]
    peak, top = np.abs(t).max(), np.abs(t) == np.abs(t).max()
    want[g] = 2 * np.rint((t / (2 * peak) + 0.5) * n) / n - 1
    d_t = c / peak - top * np.sign(t) * (c * t).sum() / peak**2
    d_x[g] = d_t * (1 - t**2)
  check([value, *vjp(jnp.asarray(ct))], [want, d_x])


def test_unsigned_dorefa_is_the_published_formula():
  x, ct = draw(50)
  value, vjp = jax.vjp(DoReFa(bits=3, signed=False), jnp.asarray(x))
  inside = (x >= 0) & (x <= 1)
  assert 0 < inside.sum() < 50
  want = np.rint(np.clip(x, 0, 1) * 7) / 7
  check([value, *vjp(jnp.asarray(ct))], [want, np.where(inside, ct, 0.0)])


@pytest.mark.parametrize(('quantizer', 'factor'), [(LIQ, 0.8), (PACT, 1.0)])
def test_first_clips(quantizer, factor):
  x = jnp.array([[1.0, -3.0], [-2.0, 0.5]])
  assert quantizer(bits=4).init(x) == pytest.approx(3.0 * factor)
  np.testing.assert_allclose(quantizer(bits=4, axis=0).init(x), [[3 * factor], [2 * factor]])
  np.testing.assert_array_equal(quantizer(bits=4, axis=1, clip_init=0.3).init(x), [[0.3, 0.3]])
  assert LIQ(bits=4, normalize=True).init(x) == 1.0
  assert LIQ(bits=4, normalize=True, clip_init=2.5).init(x) == 2.5


@pytest.mark.parametrize('quantizer', [*LEARNS, LSQ(bits=3, init_by='least_squares')])
def test_first_scale_of_zeros_is_one_and_of_half_precision_is_float32(quantizer):
  assert quantizer.init(jnp.zeros((2, 3))) == 1.0
  x = jnp.ones((2, 3), jnp.bfloat16)
  assert quantizer.init(x).dtype == jnp.float32
  assert quantizer.init(x.astype(jnp.float64)).dtype == jnp.float64
  assert quantizer.init(x).shape == ()


@pytest.mark.parametrize('quantizer', LEARNS)
def test_a_scale_counts_by_its_size_and_is_floored(quantizer):
  x, ct = draw((5, 4))
  for size in (0.7, 1e-3):
    value, d_x, d_s = pull(quantizer, x, size, ct)
    assert d_s != 0
    check(pull(quantizer, x, -size, ct), [value, d_x, -d_s])
  floor = pull(quantizer, x, 1e-10, ct)
  assert floor[2] != 0
  np.testing.assert_allclose(3 * floor[0], pull(quantizer, x, 3e-10, ct)[0], rtol=1e-12)
  check(pull(quantizer, x, 0.0, ct), floor)
  check(pull(quantizer, x, 1e-13, ct), floor)
  check(pull(quantizer, x, -1e-13, ct), [floor[0], floor[1], -floor[2]])


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_computes_in_float32(dtype):
  x, ct = (t.astype(dtype) for t in draw(400))
  scale = np.float32(0.0173)
  value, d_x, d_s = pull(LSQ(bits=8), x, scale, ct)
  assert value.dtype == d_x.dtype == dtype
  assert d_s.dtype == np.float32
  wide, wide_ct = x.astype(np.float32), ct.astype(np.float32)
  factor = 1 / np.sqrt(400 * 127)
  want = lsq_numpy(wide, scale, wide_ct, np.float32(-128), np.float32(127), factor)
  np.testing.assert_array_equal(value, want[0].astype(dtype))
  np.testing.assert_array_equal(d_x, want[1].astype(dtype))
  np.testing.assert_allclose(d_s, want[2], rtol=1e-5)


def test_every_quantizer_widens_half_precision():
  x = draw(400)[0].astype(ml_dtypes.bfloat16)
  for q in (*LEARNS, LIQ(bits=8, normalize=True), DoReFa(bits=8), DoReFa(bits=8, signed=False)):
    wide = np.asarray(q(jnp.asarray(x, jnp.float32), jnp.float32(0.913)))
    np.testing.assert_array_equal(q(jnp.asarray(x), 0.913), wide.astype(ml_dtypes.bfloat16))
    assert q(jnp.asarray(x), 0.913).dtype == jnp.bfloat16


@pytest.mark.parametrize('kind', [LSQ, LIQ, PACT, DoReFa])
def test_no_bits_leaves_the_tensor(kind):
  quantizer, x = kind(bits=None), jnp.ones(3)
  assert quantizer(x) is x
  for scaleless in (quantizer, DoReFa(bits=4)):
    assert not scaleless.has_scale
    assert scaleless.init(x) is None
  for coded in (quantizer.encode, quantizer.decode):
    with pytest.raises(ValueError, match='no codes'):
      coded(x)


@pytest.mark.parametrize('kind', [LSQ, LIQ, PACT, DoReFa])
@pytest.mark.parametrize('bits', [0, 1, 9, -4, 2.5, 4.0, True, '4'])
def test_bits_are_whole_numbers_from_2_to_8(kind, bits):
  with pytest.raises(ValueError, match=f'{kind.__name__}.*whole number from 2'):
    kind(bits=bits)


@pytest.mark.parametrize('quantizer', [*LEARNS, DoReFa(bits=3)])
def test_misuse_is_refused(quantizer):
  whole = jnp.arange(3, dtype=jnp.int32)
  for use in (quantizer, quantizer.encode):
    with pytest.raises(TypeError, match='int32'):
      use(whole, 1.0)
  if quantizer.has_scale:
    with pytest.raises(TypeError, match='int32'):
      quantizer.init(whole)
    for use in (quantizer, quantizer.encode, quantizer.decode):
      with pytest.raises(ValueError, match='needs its scale'):
        use(jnp.ones(3))


@pytest.mark.parametrize('axis', [2, -3])
def test_an_axis_out_of_range_is_refused(axis):
  for kind in (LSQ, LIQ, PACT):
    with pytest.raises(ValueError, match=f'axis={axis}'):
      kind(bits=4, axis=axis).init(jnp.ones((2, 3)))
  with pytest.raises(ValueError, match=f'axis={axis}'):
    DoReFa(bits=4, axis=axis)(jnp.ones((2, 3)))


@pytest.mark.parametrize('clip', [0, -1.0, float('nan')])
def test_a_first_clip_is_positive(clip):
  for kind in (LIQ, PACT):
    with pytest.raises(ValueError, match='must be positive'):
      kind(bits=4, clip_init=clip)


@pytest.mark.parametrize('value', ['channel', None])
@pytest.mark.parametrize('option', ['grad_scale', 'init_by'])
def test_unknown_choices_of_lsq_are_refused(option, value):
  with pytest.raises(ValueError, match=f'{option}={value!r}'):
    LSQ(bits=4, **{option: value})


@pytest.mark.parametrize('call', ['__call__', 'encode', 'decode'])
@pytest.mark.parametrize('shape', [(1,), (2, 1), (1, 2)])
def test_scale_that_does_not_fit_is_an_error(call, shape):
  x = jnp.zeros((1, 3), jnp.int8 if call == 'decode' else jnp.float32)
  with pytest.raises(ValueError, match='for a tensor of shape'):
    getattr(LSQ(bits=4), call)(x, jnp.ones(shape))

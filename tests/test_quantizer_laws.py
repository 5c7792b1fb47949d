"""Laws that every quantizer obeys, on drawn tensors and scales."""

import contextlib
import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optimised
import pytest
from hypothesis import strategies as st

from saq_jax import LIQ, LSQ, PACT, DoReFa

KINDS = {
  'LSQ': LSQ(bits=2),
  'LIQ': LIQ(bits=2),
  'LIQ normalized': LIQ(bits=2, normalize=True),
  'PACT': PACT(bits=2),
  'DoReFa': DoReFa(bits=2),
}
SHAPE = (5, 3)
AXES = (None, 1)
CASES = tuple((bits, axis) for bits in range(2, 9) for axis in AXES)

laws = functools.partial(hypothesis.settings, deadline=None, derandomize=True)
every_kind = pytest.mark.parametrize('kind', KINDS)
both_signs = pytest.mark.parametrize('signed', [True, False])


@st.composite
def tensors(draw, ordinary, special, shape=SHAPE):
  """Ordinary random numbers, of which some are replaced by special ones."""
  x = ordinary(np.random.default_rng(draw(st.integers(0, 2**32))), shape)
  places = st.lists(st.tuples(st.integers(0, x.size - 1), st.sampled_from(special)), max_size=8)
  for place, number in draw(places):
    x.flat[place] = number
  return x


# With a scale of 1 or 0.5, halves lie on thresholds. Zeros have two signs.
HALVES = [0.0, -0.0, 0.5, -0.5, 0.75, 1.5, -2.5, 1.0, -1.0, 7.0, 127.5, -128.5]
INPUTS = tensors(lambda rng, n: 2 * rng.standard_normal(n), [*HALVES, 1e-30, -1e-30, 1e30, -1e30])
SCALES = tensors(
  lambda rng, n: rng.uniform(0.05, 3, n), [1.0, 0.5, -0.5, 0.0, -0.0, 1e-12, -1e-12, 1e25]
)


def make(kind, signed, bits, axis=None):
  return dataclasses.replace(KINDS[kind], bits=bits, signed=signed, axis=axis)


def scale_for(axis, scales):
  """The part of a full-size array of scales that has the shape of a scale."""
  return scales[0, 0] if axis is None else scales[:1]


def fake(quantizer, x, scale):
  return quantizer(x, scale)


def encode(quantizer, x, scale):
  return quantizer.encode(x, scale)


def recode(quantizer, x, scale):
  return quantizer.decode(quantizer.encode(x, scale), scale, dtype=x.dtype)


def gradients(quantizer, x, scale):
  value, vjp = jax.vjp(quantizer, x, scale)
  return vjp(jnp.ones_like(value))


@functools.partial(optimised.jit, static_argnums=(0, 1, 2, 3))
def in_cases(cases, use, kind, signed, x, scales):
  """One compilation for many bit-widths and axes."""
  return [use(make(kind, signed, *case), x, scale_for(case[1], scales)) for case in cases]


def same_bits(a, b):
  """Equality that tells -0 from 0."""
  a, b = np.asarray(a), np.asarray(b)
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
@both_signs
@every_kind
@laws(max_examples=20)
@hypothesis.given(INPUTS, SCALES, st.integers(0, len(CASES) - 1))
def test_decoded_codes_are_the_fake_quantized_values(kind, signed, dtype, x, scales, one):
  wide = dtype == 'float64'
  cases = CASES if dtype == 'float32' else CASES[::3]
  with jax.enable_x64(True) if wide else contextlib.nullcontext():
    x = jnp.asarray(x, dtype)
    scales = jnp.asarray(scales, jnp.float64 if wide else jnp.float32)
    values, decoded = (in_cases(cases, use, kind, signed, x, scales) for use in (fake, recode))
    for case, value, again in zip(cases, values, decoded, strict=True):
      assert same_bits(value, again), case
      assert np.all(np.isfinite(np.asarray(value, np.float64))), case
    one %= len(cases)
    quantizer, scale = make(kind, signed, *cases[one]), scale_for(cases[one][1], scales)
    eager = quantizer(x, scale)
    assert eager.dtype == x.dtype
    assert same_bits(eager, recode(quantizer, x, scale))
    if kind not in ('LIQ normalized', 'DoReFa'):  # theirs hang on the order of a reduction
      assert same_bits(eager, values[one])


@both_signs
@pytest.mark.parametrize('kind', ['LSQ', 'LIQ', 'PACT'])
def test_codes_next_to_a_threshold_do_not_depend_on_what_is_compiled(kind, signed):
  quantizer = make(kind, signed, 8)
  call, code = optimised.jit(quantizer), optimised.jit(quantizer.encode)
  rng = np.random.default_rng(0)
  for scale in np.float32(rng.uniform(0.1, 5, 20)):
    steps = np.arange(-127.5, 128) if kind == 'LSQ' else np.linspace(-1, 1, 511)
    ulps = 1 + np.arange(-4, 5) * 2.0**-24
    x = jnp.float32(np.multiply.outer(steps, ulps) * scale)
    eager = quantizer.decode(quantizer.encode(x, scale), scale)
    assert same_bits(call(x, scale), eager)
    assert same_bits(quantizer(x, scale), eager)
    assert same_bits(quantizer.decode(code(x, scale), scale), eager)


@pytest.mark.parametrize('bits', range(2, 9))
@both_signs
@every_kind
def test_codes_fill_their_range_and_rise_with_x(kind, signed, bits):
  quantizer, scale = make(kind, signed, bits), jnp.float32(0.75)
  x = np.linspace(-1.8, 1.8, 4001, dtype=np.float32) * (110 if kind == 'LSQ' else 1)
  values, codes = (np.asarray(use(x, scale)) for use in (quantizer, quantizer.encode))
  assert codes.dtype == (np.int8 if signed else np.uint8)
  low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
  low += kind == 'PACT' and signed  # its grid is symmetric about a zero
  assert (codes.min(), codes.max()) == (low, high)
  assert len(np.unique(values)) == len(np.unique(codes)) == high - low + 1
  assert np.all(np.diff(codes.astype(int)) >= 0)
  assert np.all(np.diff(values) >= 0)


@both_signs
@every_kind
@laws(max_examples=20)
@hypothesis.given(INPUTS, SCALES)
def test_values_keep_the_order_of_the_tensor(kind, signed, x, scales):
  x = np.float32(x)
  values = in_cases(CASES, fake, kind, signed, x, jnp.float32(scales))
  for (bits, axis), value in zip(CASES, values, strict=True):
    columns, inputs = (np.asarray(t).reshape(-1, 1 if axis is None else 3) for t in (value, x))
    ordered = np.take_along_axis(columns, np.argsort(inputs, 0), 0)
    assert np.all(np.diff(ordered, axis=0) >= 0), (bits, axis)


@both_signs
@pytest.mark.parametrize('kind', ['LSQ', 'LIQ', 'PACT'])
@laws(max_examples=20)
@hypothesis.given(INPUTS, SCALES)
def test_the_grid_keeps_its_own_values(kind, signed, x, scales):
  scales = jnp.float32(scales)
  values = in_cases(CASES, fake, kind, signed, jnp.float32(x), scales)
  for (bits, axis), value in zip(CASES, values, strict=True):
    quantizer, scale = make(kind, signed, bits, axis), scale_for(axis, scales)
    assert same_bits(quantizer(value, scale), value), (bits, axis)


@pytest.mark.parametrize('size', [0.0, 1e-30, 1e-12, 0.1, 1.0, 1e30])
@every_kind
def test_extreme_tensors_give_finite_values_and_gradients(kind, size):
  drawn = np.random.default_rng(0).uniform(-1, 1, SHAPE)
  for x in (jnp.float32(size * drawn), jnp.full(SHAPE, size), jnp.full(SHAPE, -size)):
    for signed in (True, False):
      for axis in AXES:
        quantizer = make(kind, signed, 4, axis)
        own, given = quantizer.init(x), scale_for(axis, jnp.full(SHAPE, 0.5))
        assert not quantizer.has_scale or np.all(np.isfinite(own) & (own > 0))
        for scale in (own, given, -1e30 * given, 0 * given):
          if scale is None:
            continue
          results = (quantizer(x, scale), *gradients(quantizer, x, scale))
          assert all(np.all(np.isfinite(t)) for t in results), (signed, axis, scale)


@both_signs
@every_kind
@laws(max_examples=5)
@hypothesis.given(tensors(lambda rng, n: rng.standard_normal(n), HALVES, (4, *SHAPE)))
def test_vmap_is_a_loop_and_jit_keeps_the_gradient(kind, signed, batch):
  quantizer, scale = make(kind, signed, 4, 1), jnp.float32([[0.5, 0.75, 2.0]])
  batch = jnp.float32(batch)
  loop = [quantizer(x, scale) for x in batch]
  np.testing.assert_allclose(jax.vmap(quantizer, (0, None))(batch, scale), loop, rtol=1e-6)
  mapped = batched_gradients(quantizer, batch, scale)
  alone = [gradients(quantizer, x, scale) for x in batch]
  for got, want in zip(mapped, zip(*alone, strict=True), strict=True):
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-5)


@functools.partial(optimised.jit, static_argnums=0)
def batched_gradients(quantizer, batch, scale):
  return jax.vmap(functools.partial(gradients, quantizer), (0, None))(batch, scale)


@every_kind
def test_a_quantizer_is_a_static_argument(kind):
  traced = []

  @functools.partial(jax.jit, static_argnums=0)
  def use(quantizer, x, scale):
    traced.append(quantizer)
    return quantizer(x, scale)

  four, three = make(kind, True, 4), make(kind, True, 3)
  x, scale = jnp.linspace(-1, 1, 9), jnp.float32(0.4)
  for quantizer in (four, make(kind, True, 4), three):
    np.testing.assert_allclose(use(quantizer, x, scale), quantizer(x, scale), rtol=1e-6)
  assert traced == [four, three]
  others = {make(k, s, b, a) for k in KINDS for s in (True, False) for b in (3, 4) for a in AXES}
  assert len(others) == 40

"""Laws that every quantizer obeys, on drawn tensors and scales."""

import contextlib
import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from saq_jax import LIQ, LSQ, PACT, DoReFa

KINDS = {
  'LSQ': LSQ(bits=2),
  'LIQ': LIQ(bits=2),
  'LIQ normalized': LIQ(bits=2, normalize=True),
  'PACT': PACT(bits=2),
  'DoReFa': DoReFa(bits=2),
}
LEARNS = [kind for kind, quantizer in KINDS.items() if quantizer.has_scale]
SHAPE = (5, 3)
DTYPES = ['float32', 'bfloat16', 'float64']
BITS = range(2, 9)
AXES = (None, 0, 1)
CASES = [(bits, axis) for bits in BITS for axis in AXES]

# Halves lie on the thresholds of the grids whose steps are whole, zeros have two signs.
SPECIAL = [0.0, -0.0, 0.5, -0.5, 1.5, -2.5, 1.0, -1.0, 7.0, 1e-30, -1e-30, 1e30, -1e30]
NUMBERS = st.one_of(st.floats(-8, 8, width=32), st.sampled_from(SPECIAL))
SCALES = st.one_of(
  st.floats(0.0625, 8, width=32), st.sampled_from([1.0, -0.5, 0.0, -0.0, 1e-12, -1e-12, 1e25])
)
TENSORS = hnp.arrays(np.float64, SHAPE, elements=NUMBERS)
SCALE_SETS = hnp.arrays(np.float64, SHAPE, elements=SCALES)

laws = functools.partial(hypothesis.settings, deadline=None, derandomize=True)
every_kind = pytest.mark.parametrize('kind', KINDS)
both_signs = pytest.mark.parametrize('signed', [True, False])


def make(kind, signed, bits, axis=None):
  return dataclasses.replace(KINDS[kind], bits=bits, signed=signed, axis=axis)


def scale_for(axis, scales):
  """The part of a full-size array of scales that has the shape of a scale."""
  return {None: scales[0, 0], 0: scales[:, :1], 1: scales[:1]}[axis]


def x64(dtype):
  return jax.enable_x64(True) if dtype == 'float64' else contextlib.nullcontext()


def fake(quantizer, x, scale):
  return quantizer(x, scale)


def recode(quantizer, x, scale):
  return quantizer.decode(quantizer.encode(x, scale), scale, dtype=x.dtype)


def same_bits(a, b):
  """Equality that tells -0 from 0."""
  a, b = np.asarray(a), np.asarray(b)
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def all_of(use, kind, signed, x, scales):
  """One compilation for every bit-width and axis."""
  return [use(make(kind, signed, *case), x, scale_for(case[1], scales)) for case in CASES]


@pytest.mark.parametrize('dtype', DTYPES)
@both_signs
@every_kind
@laws(max_examples=30)
@hypothesis.given(TENSORS, SCALE_SETS, st.sampled_from(CASES))
def test_decoded_codes_are_the_fake_quantized_values(kind, signed, dtype, x, scales, case):
  with x64(dtype):
    x = jnp.asarray(x, dtype)
    scales = jnp.asarray(scales, jnp.float64 if dtype == 'float64' else jnp.float32)
    values, decoded = (all_of(use, kind, signed, x, scales) for use in (fake, recode))
    for case, value, again in zip(CASES, values, decoded, strict=True):
      assert same_bits(value, again), case
      assert np.all(np.isfinite(np.asarray(value, np.float64))), case
    quantizer, scale = make(kind, signed, *case), scale_for(case[1], scales)
    eager = quantizer(x, scale)
    assert eager.dtype == x.dtype
    assert same_bits(eager, recode(quantizer, x, scale))
    if kind not in ('LIQ normalized', 'DoReFa'):  # theirs depend on the order of a reduction
      assert same_bits(eager, values[CASES.index(case)])


@pytest.mark.parametrize('bits', BITS)
@both_signs
@every_kind
def test_codes_fill_their_range_and_rise_with_x(kind, signed, bits):
  quantizer, scale = make(kind, signed, bits), jnp.float32(0.75)
  x = jnp.linspace(-200, 200, 4001) if kind == 'LSQ' else jnp.linspace(-1.8, 1.8, 4001)
  values, codes = (np.asarray(use(x, scale)) for use in (quantizer, quantizer.encode))
  assert codes.dtype == (np.int8 if signed else np.uint8)
  low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
  low += kind == 'PACT' and signed  # its grid is symmetric about a zero
  assert (codes.min(), codes.max()) == (low, high)
  assert len(np.unique(values)) == high - low + 1 <= 2**bits
  assert np.all(np.diff(codes.astype(int)) >= 0)
  assert np.all(np.diff(values) >= 0)
  assert np.unique(values)[1:].tolist() == sorted({*values} - {values[0]})


@both_signs
@every_kind
@laws(max_examples=30)
@hypothesis.given(TENSORS, SCALE_SETS)
def test_values_are_few_and_in_order(kind, signed, x, scales):
  values = all_of(fake, kind, signed, jnp.float32(x), jnp.float32(scales))
  order = np.argsort(x, axis=None)
  for (bits, axis), value in zip(CASES, values, strict=True):
    value = np.asarray(value)
    if axis is None:
      assert np.all(np.diff(value.ravel()[order]) >= 0), bits
    else:
      rows, inputs = (np.moveaxis(t, axis, 0).reshape(SHAPE[axis], -1) for t in (value, x))
      sorted_rows = np.take_along_axis(rows, np.argsort(inputs, 1), 1)
      assert np.all(np.diff(sorted_rows, axis=1) >= 0), (bits, axis)


@both_signs
@pytest.mark.parametrize('kind', ['LSQ', 'LIQ', 'PACT'])
@laws(max_examples=30)
@hypothesis.given(TENSORS, SCALE_SETS)
def test_the_grid_keeps_its_own_values(kind, signed, x, scales):
  scales = jnp.float32(scales)
  once = all_of(fake, kind, signed, jnp.float32(x), scales)
  codes = all_of(encode, kind, signed, jnp.float32(x), scales)
  for (bits, axis), value, code in zip(CASES, once, codes, strict=True):
    quantizer, scale = make(kind, signed, bits, axis), scale_for(axis, scales)
    np.testing.assert_array_equal(quantizer.encode(value, scale), code)


def encode(quantizer, x, scale):
  return quantizer.encode(x, scale)


def gradients(quantizer, x, scale):
  _, vjp = jax.vjp(quantizer, x, scale)
  return vjp(jnp.ones_like(x))


@pytest.mark.parametrize('size', [0.0, 1e-30, 1e-12, 0.1, 1.0, 1e30])
@pytest.mark.parametrize('constant', [True, False])
@both_signs
@every_kind
def test_extreme_tensors_give_finite_values_and_gradients(kind, signed, constant, size):
  x = size * (np.ones(SHAPE) if constant else np.random.default_rng(0).uniform(-1, 1, SHAPE))
  x = jnp.float32(x)
  own = {a: make(kind, signed, 4, a).init(x) for a in AXES}
  if kind in LEARNS:
    assert all(np.all(np.isfinite(s) & (s > 0)) for s in own.values())
  given = {a: scale_for(a, jnp.full(SHAPE, 0.5)) for a in AXES}
  for axis in AXES:
    quantizer = make(kind, signed, 4, axis)
    for scale in (own[axis], given[axis]):
      for tensor in (quantizer(x, scale), *jax.tree.leaves(gradients(quantizer, x, scale))):
        assert np.all(np.isfinite(tensor)), (axis, scale)


@both_signs
@every_kind
@laws(max_examples=10)
@hypothesis.given(hnp.arrays(np.float32, (4, *SHAPE), elements=st.floats(-4, 4, width=32)))
def test_vmap_is_a_loop_and_jit_keeps_the_gradient(kind, signed, batch):
  quantizer, scale = make(kind, signed, 4, 1), jnp.float32([[0.5, 0.75, 2.0]])
  loop = [quantizer(jnp.asarray(x), scale) for x in batch]
  np.testing.assert_array_equal(jax.vmap(quantizer, (0, None))(batch, scale), np.stack(loop))
  mapped = batched_gradients(quantizer, batch, scale)
  alone = [gradients(quantizer, jnp.asarray(x), scale) for x in batch]
  for got, want in zip(mapped, zip(*alone, strict=True), strict=True):
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def batched_gradients(quantizer, batch, scale):
  return jax.vmap(functools.partial(gradients, quantizer), (0, None))(batch, scale)


@every_kind
def test_a_quantizer_is_a_static_argument(kind):
  traces = []

  @functools.partial(jax.jit, static_argnums=0)
  def use(quantizer, x, scale):
    traces.append(quantizer)
    return quantizer(x, scale)

  x, scale = jnp.linspace(-1, 1, 9), jnp.float32(0.4)
  for bits in (4, 4, 3):
    np.testing.assert_array_equal(use(make(kind, True, bits), x, scale), make(kind, True, bits)(x, scale))
  assert traces == [make(kind, True, 4), make(kind, True, 3)]
  assert len({make(k, s, b) for k in KINDS for s in (True, False) for b in (3, 4, 4)}) == 20

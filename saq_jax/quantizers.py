"""Fake quantizers: frozen dataclasses over pure functions with straight-through gradients.

Every quantizer `q` holds no array. What it learns (a scale or a clip, here called `scale`) is an
array that `q.init` finds and that the caller keeps, so that it trains like any other parameter:

    scale = q.init(x)                  # float array, None where nothing is learnt (DoReFa)
    x_hat = q(x, scale)                # differentiable, the dtype and shape of x
    codes = q.encode(x, scale)         # int8 (signed) or uint8 (unsigned)
    x_hat = q.decode(codes, scale)     # bit for bit q(x, scale)

Scales are used as `max(|scale|, 1e-10)`, so they stay positive whatever an optimizer does to
them; the gradient passes the floor, so a scale that reached it can leave it again. Arithmetic is
in float32 or better: half-precision inputs are widened inside and the result is cast back.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

from saq_jax import _ste as ste
from saq_jax._quantizer import Quantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSQ(Quantizer):
  r"""Learned step size quantization (Esser et al., arXiv 1902.08153).

  With `Q_n = 2^(b-1)`, `Q_p = 2^(b-1) - 1` (signed) or `Q_n = 0`, `Q_p = 2^b - 1`:

      x_hat     = s round(clip(x / s, -Q_n, Q_p))
      dx_hat/dx = 1 if -Q_n < x/s < Q_p else 0
      dx_hat/ds = round(x/s) - x/s inside, -Q_n below, Q_p above, times g

  The gradient scale is `g = 1 / sqrt(N Q_p)`. Libraries disagree on what N counts, so it can be
  chosen by `grad_scale`:
    'scale': the elements of x that share a scale (for activations the batch counts); the default.
    'tensor': all elements of x, also with one scale a channel.
    'feature': all elements of x but its first axis: activations without the batch.
    a float: g itself; 1.0 leaves the gradient as it is.

  The first scale: `init_by='mean'`, as published, `s = 2 mean|x| / sqrt(Q_p)`; or
  `'least_squares'`, the fixed point of `s <- <x, q> / <q, q>` with `q = round(clip(x/s, ...))`,
  which is a least-squares fit of the grid, from `s = max|x| / Q_p` until s changes by less than
  1e-5 of itself.

  Example:
    >>> import jax.numpy as jnp
    >>> q = LSQ(bits=2)
    >>> q(jnp.array([-0.9, 0.2, 0.3, 5.0]), jnp.array(0.5))
    Array([-1. ,  0. ,  0.5,  0.5], dtype=float32)
  """

  grad_scale: Literal['scale', 'tensor', 'feature'] | float = 'scale'
  init_by: Literal['mean', 'least_squares'] = 'mean'

  def __post_init__(self) -> None:
    super().__post_init__()
    named = self.grad_scale in ('scale', 'tensor', 'feature')
    if not named and not (isinstance(self.grad_scale, int | float) and self.grad_scale > 0):
      raise ValueError(
        f"LSQ(grad_scale={self.grad_scale!r}): take 'scale', 'tensor', 'feature' or a number "
        'above 0.'
      )
    if self.init_by not in ('mean', 'least_squares'):
      raise ValueError(f"LSQ(init_by={self.init_by!r}): take 'mean' or 'least_squares'.")

  @property
  def bounds(self) -> tuple[int, int]:
    """The lowest and the highest code."""
    assert self.bits is not None
    half = 2 ** (self.bits - 1)
    return (-half, half - 1) if self.signed else (0, 2 * half - 1)

  def _gradient_factor(self, x: Array, scale: Array) -> float:
    if not isinstance(self.grad_scale, str):
      return float(self.grad_scale)
    count = {
      'scale': x.size / max(scale.size, 1),
      'tensor': x.size,
      'feature': x.size / (x.shape[0] if x.ndim else 1),
    }[self.grad_scale]
    return (max(count, 1) * self.bounds[1]) ** -0.5

  def _init(self, x: Array, axes: tuple[int, ...] | None) -> Array:
    keep = axes is not None
    if self.init_by == 'mean':
      return 2 * jnp.mean(jnp.abs(x), axes, keepdims=keep) / self.bounds[1] ** 0.5
    # From the published start the iteration would stop far above the best scale at 8 bits.
    widest = jnp.max(jnp.abs(x), axes, keepdims=keep) / self.bounds[1]
    return ste.least_squares_scale(x, jnp.where(widest > 0, widest, 1.0), self.bounds, axes)

  def _fake(self, x: Array, scale: Array) -> Array:
    return ste.lsq(self.bounds, self._gradient_factor(x, scale), x, scale)

  def _codes(self, x: Array, scale: Array) -> Array:
    return ste.lsq_codes(x, scale, self.bounds)

  def _values(self, codes: Array, scale: Array) -> Array:
    return codes * scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Clipped(Quantizer):
  """What LIQ and PACT share: the scale is a clip, and it may be given a first value."""

  clip_init: float | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.clip_init is not None and not self.clip_init > 0:
      raise ValueError(f'{type(self).__name__}(clip_init={self.clip_init}): must be positive.')

  def _init(self, x: Array, axes: tuple[int, ...] | None) -> Array:
    peak = jnp.max(jnp.abs(x), axes, keepdims=axes is not None)
    return self._first_clip(peak) if self.clip_init is None else jnp.full_like(peak, self.clip_init)

  def _first_clip(self, peak: Array) -> Array:
    return peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class LIQ(_Clipped):
  r"""Learned clip quantization, as the SAQ authors' networks use it (github ziplab/SAQ).

  With `n = 2^b - 1` and the learnable clip `a`, signed (weights; the grid has no zero):

      u = (clip(x/a, -1, 1) + 1) / 2,   x_hat = a (2 round(u n)/n - 1)

  and unsigned (activations): `x_hat = a round(clip(x/a, 0, 1) n) / n`. The straight-through
  estimator replaces the derivative of `round` alone; clip and division differentiate as they
  stand, and the gradient passes at the edges of the clip.

  With `normalize`, x is first `(x - mean x) / std x`, the statistics detached, `std` with ddof 1;
  the result is not scaled back. A tensor without variance is only centred.

  The first clip is 1 with `normalize`, else `0.8 max|x|`, or `clip_init` where given.

  Example:
    >>> import jax.numpy as jnp
    >>> q = LIQ(bits=2)
    >>> q(jnp.array([-0.9, 0.1, 0.3, 5.0]), jnp.array(0.75))
    Array([-0.75,  0.25,  0.25,  0.75], dtype=float32)
  """

  normalize: bool = False

  def _first_clip(self, peak: Array) -> Array:
    return jnp.ones_like(peak) if self.normalize else 0.8 * peak

  def _normalized(self, x: Array) -> Array:
    if not self.normalize:
      return x
    return ste.standardize(x, ste.reduced_axes(x, self.axis))

  def _fake(self, x: Array, scale: Array) -> Array:
    return ste.clipped(self.signed, self._steps, self._normalized(x), scale)

  @property
  def _steps(self) -> int:
    assert self.bits is not None
    return 2**self.bits - 1

  def _codes(self, x: Array, scale: Array) -> Array:
    codes = ste.clipped_codes(self.signed, self._steps, self._normalized(x), scale)
    return codes - (self._steps + 1) // 2 if self.signed else codes

  def _values(self, codes: Array, scale: Array) -> Array:
    codes = codes + (self._steps + 1) // 2 if self.signed else codes
    return ste.clipped_values(self.signed, self._steps, codes, scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PACT(_Clipped):
  r"""Parameterized clipping activation (Choi et al., arXiv 1805.06085).

      y = clip(x, 0, a),   x_hat = round(y n/a) a/n,   n = 2^b - 1
      dx_hat/dx = 1 if 0 <= x < a else 0,   dx_hat/da = 1 if x >= a else 0

  The paper's is unsigned, for what follows a ReLU. With `signed` the clip is at -a and a and
  `n = 2^(b-1) - 1`, a symmetric grid with a zero (ours). The first clip is `max|x|`, or
  `clip_init`; the paper holds `a` small by an L2 penalty, which here is the weight decay.

  Example:
    >>> import jax.numpy as jnp
    >>> q = PACT(bits=2, signed=False)
    >>> q(jnp.array([-0.9, 0.3, 0.9, 5.0]), jnp.array(1.5))
    Array([0. , 0.5, 1. , 1.5], dtype=float32)
  """

  @property
  def _steps(self) -> int:
    assert self.bits is not None
    return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

  def _fake(self, x: Array, scale: Array) -> Array:
    return ste.pact(self.signed, self._steps, x, scale)

  def _codes(self, x: Array, scale: Array) -> Array:
    return ste.pact_codes(self.signed, self._steps, x, scale)

  def _values(self, codes: Array, scale: Array) -> Array:
    return codes * ste.grid_step(self._steps, scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoReFa(LIQ):
  r"""DoReFa quantization (Zhou et al., arXiv 1606.06160); it learns no scale.

  With `n = 2^b - 1`, signed (weights) and unsigned (activations):

      x_hat = 2 round(u n)/n - 1,   u = tanh(x) / (2 max|tanh x|) + 1/2
      x_hat = round(clip(x, 0, 1) n) / n

  The straight-through estimator replaces the derivative of `round` alone: the gradient also
  flows through the maximum. Values lie in [-1, 1] whatever the size of the weights was.

  Example:
    >>> import jax.numpy as jnp
    >>> DoReFa(bits=2)(jnp.array([-2.0, 0.1, 0.5]))
    Array([-1.        ,  0.33333334,  0.33333334], dtype=float32)
  """

  normalize: bool = dataclasses.field(default=False, init=False)
  clip_init: float | None = dataclasses.field(default=None, init=False)

  @property
  def has_scale(self) -> bool:
    """False: the grid is fixed."""
    return False

  def _normalized(self, x: Array) -> Array:
    if not self.signed:
      return x
    t = jnp.tanh(x.astype(ste.compute_dtype(x)))
    peak = jnp.max(jnp.abs(t), ste.reduced_axes(x, self.axis), keepdims=True)
    # Below the floor the gradient through the maximum, of 1/peak^2, would overflow.
    return ste.quotient(t, jnp.where(peak > ste.MIN_SCALE, peak, 1.0))

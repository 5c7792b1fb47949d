"""The arithmetic of the quantizers: rounding with straight-through gradients by `custom_vjp`.

Each fake quantizer here saves only its input and its scale for the backward pass. `codes` are
whole floating numbers, and a value is one product of an exact whole number and a step, so that
no fused multiply-add can make two compilations of it differ.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

MIN_SCALE = 1e-10


def compute_dtype(x: Array) -> jnp.dtype:
  """Float32, or the dtype of `x` where that is wider."""
  return jnp.promote_types(jnp.asarray(x).dtype, jnp.float32)


def floating(x: Array, owner: object) -> Array:
  """Returns `x` as an array, or raises TypeError if it is not floating."""
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'{owner} quantizes floating arrays; this one has dtype {x.dtype}.')
  return x


def reduced_axes(x: Array, axis: int | None) -> tuple[int, ...] | None:
  """All axes of `x` but `axis`; None, for all, if `axis` is None."""
  if axis is None:
    return None
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f'axis={axis} is not an axis of a tensor of shape {x.shape}.')
  return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
  """Sums `x` over the axes along which an array of `shape` was broadcast."""
  if not shape:
    return jnp.sum(x)
  axes = tuple(i for i, n in enumerate(shape) if n == 1)
  return jnp.sum(x, axes, keepdims=True)


def _whole(x: Array) -> Array:
  """Rounds half to even; -0 becomes 0, which is what an integer code decodes to."""
  codes = jnp.round(x)
  return jnp.where(codes == 0, 0.0, codes)


@jax.custom_vjp
def positive(scale: Array) -> Array:
  """`max(|scale|, 1e-10)`; the gradient is that of |scale| and passes the floor."""
  return jnp.maximum(jnp.abs(scale), MIN_SCALE)


positive.defvjp(
  lambda scale: (positive(scale), scale),
  lambda scale, ct: (jnp.where(scale < 0, -ct, ct),),
)


def quotient(x: Array, scale: Array) -> Array:
  """`x / scale` by the reciprocal, one a scale.

  XLA does this to a division itself, but only where the scale has no other use: a few codes in a
  million would then depend on what else was compiled with them.
  """
  return x * (1 / scale)


def grid_step(n: int, clip: Array) -> Array:
  """`clip / n` by the reciprocal, which XLA takes only where n is known to it."""
  return clip * (1 / n)


def standardize(x: Array, axes: tuple[int, ...] | None) -> Array:
  """`(x - mean) / std` with detached statistics, ddof 1; std counts as 1 where it is 0."""
  wide = jax.lax.stop_gradient(x).astype(compute_dtype(x))
  mean = jnp.mean(wide, axes, keepdims=True)
  count = wide.size // mean.size
  std = jnp.sqrt(jnp.sum((wide - mean) ** 2, axes, keepdims=True) / max(count - 1, 1))
  # The mean of equal numbers rounds, which leaves a deviation of that size and no variance.
  flat = std <= jnp.abs(mean) * jnp.finfo(wide.dtype).eps * 4
  return quotient(x - mean, jnp.where(flat, 1.0, std))


# LSQ: s round(clip(x / s, low, high)).


def lsq_codes(x: Array, scale: Array, bounds: tuple[int, int]) -> Array:
  """Codes of LSQ."""
  return _whole(jnp.clip(quotient(x, scale), *bounds))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def lsq(bounds: tuple[int, int], factor: float, x: Array, scale: Array) -> Array:
  """LSQ with the published gradients; that of the scale is multiplied by `factor`."""
  return (lsq_codes(x.astype(scale.dtype), scale, bounds) * scale).astype(x.dtype)


def _lsq_fwd(
  bounds: tuple[int, int], factor: float, x: Array, scale: Array
) -> tuple[Array, tuple[Array, Array]]:
  return lsq(bounds, factor, x, scale), (x, scale)


def _lsq_bwd(
  bounds: tuple[int, int], factor: float, saved: tuple[Array, Array], ct: Array
) -> tuple[Array, Array]:
  x, scale = saved
  wide = x.astype(scale.dtype)
  v = quotient(wide, scale)
  inside = (wide > bounds[0] * scale) & (wide < bounds[1] * scale)
  d_scale = jnp.where(inside, jnp.round(v) - v, jnp.clip(v, *bounds)) * ct.astype(scale.dtype)
  return jnp.where(inside, ct, 0), _sum_to(d_scale, scale.shape) * factor


lsq.defvjp(_lsq_fwd, _lsq_bwd)


def least_squares_scale(
  x: Array, scale: Array, bounds: tuple[int, int], axes: tuple[int, ...] | None
) -> Array:
  """The fixed point of `s <- <x, q> / <q, q>`, q the codes of x at s; at most 200 rounds."""
  keep = axes is not None

  def refine(carry: tuple[Array, Array, int]) -> tuple[Array, Array, int]:
    old, _, i = carry
    q = lsq_codes(x, old, bounds)
    power = jnp.sum(q * q, axes, keepdims=keep)
    new = jnp.sum(x * q, axes, keepdims=keep) / jnp.where(power > 0, power, 1.0)
    new = jnp.where(new > 0, new, old)
    return new, jnp.max(jnp.abs(new - old) / old), i + 1

  def unsettled(carry: tuple[Array, Array, int]) -> Array:
    return (carry[1] > 1e-5) & (carry[2] < 200)

  return jax.lax.while_loop(unsettled, refine, (scale, jnp.asarray(jnp.inf, scale.dtype), 0))[0]


# LIQ and DoReFa: the clip range in n equal steps, signed without a zero, or from zero up.


def clipped_codes(signed: bool, n: int, x: Array, clip: Array) -> Array:
  """Codes 0 to n of the range [-clip, clip] (signed) or [0, clip]."""
  if signed:
    return _whole((jnp.clip(quotient(x, clip), -1, 1) + 1) * (n / 2))
  return _whole(jnp.clip(quotient(x, clip), 0, 1) * n)


def clipped_values(signed: bool, n: int, codes: Array, clip: Array) -> Array:
  """The value of each code 0 to n."""
  return (2 * codes - n if signed else codes) * grid_step(n, clip)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def clipped(signed: bool, n: int, x: Array, clip: Array) -> Array:
  """LIQ; its gradient replaces only that of `round` by one, and passes at the clip's edges."""
  codes = clipped_codes(signed, n, x.astype(clip.dtype), clip)
  return clipped_values(signed, n, codes, clip).astype(x.dtype)


def _clipped_fwd(signed: bool, n: int, x: Array, clip: Array) -> tuple[Array, tuple[Array, Array]]:
  return clipped(signed, n, x, clip), (x, clip)


def _clipped_bwd(
  signed: bool, n: int, saved: tuple[Array, Array], ct: Array
) -> tuple[Array, Array]:
  x, clip = saved
  wide = x.astype(clip.dtype)
  v = quotient(wide, clip)
  inside = (wide >= (-clip if signed else 0)) & (wide <= clip)
  one = jnp.ones_like(clip)
  unit = clipped_values(signed, n, clipped_codes(signed, n, v, one), one)
  d_clip = (unit - jnp.where(inside, v, 0)) * ct.astype(clip.dtype)
  return jnp.where(inside, ct, 0), _sum_to(d_clip, clip.shape)


clipped.defvjp(_clipped_fwd, _clipped_bwd)


# PACT: the clip alone learns from what it cuts off.


def pact_codes(signed: bool, n: int, x: Array, clip: Array) -> Array:
  """Codes -n to n (signed) or 0 to n."""
  return _whole(jnp.clip(quotient(x, clip), -1 if signed else 0, 1) * n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def pact(signed: bool, n: int, x: Array, clip: Array) -> Array:
  """PACT with its published gradients."""
  return (pact_codes(signed, n, x.astype(clip.dtype), clip) * grid_step(n, clip)).astype(x.dtype)


def _pact_fwd(signed: bool, n: int, x: Array, clip: Array) -> tuple[Array, tuple[Array, Array]]:
  return pact(signed, n, x, clip), (x, clip)


def _pact_bwd(signed: bool, n: int, saved: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
  x, clip = saved
  wide = x.astype(clip.dtype)
  above = wide >= clip
  below = (wide <= -clip) if signed else (wide < 0)
  d_clip = jnp.where(above, 1.0, jnp.where(below & signed, -1.0, 0.0)) * ct.astype(clip.dtype)
  return jnp.where(above | below, 0, ct), _sum_to(d_clip, clip.shape)


pact.defvjp(_pact_fwd, _pact_bwd)

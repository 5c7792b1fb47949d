"""What every quantizer is: the dataclass and the laws that `quantizers` fills with arithmetic."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from saq_jax import _ste as ste

MIN_BITS, MAX_BITS = 2, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer(abc.ABC):
  """What every quantizer has: a bit-width, a sign, and the axis that has a scale of its own.

  Attributes:
    bits: 2 to 8, or None: the tensor is left as it is and no scale is made.
    signed: whether codes lie in [-2^(bits-1), 2^(bits-1) - 1] (int8) or in [0, 2^bits - 1] (uint8).
    axis: None for one scale a tensor; an int for one scale an entry of that axis. A scale has
      shape () in the first case and, in the second, the rank of the tensor with length 1 on all
      other axes, so that it broadcasts.

  Raises:
    ValueError: at construction, if `bits` is not None and not a whole number from 2 to 8.
  """

  bits: int | None
  signed: bool = True
  axis: int | None = None

  def __post_init__(self) -> None:
    if self.bits is not None and (
      isinstance(self.bits, bool)
      or not isinstance(self.bits, int)
      or not MIN_BITS <= self.bits <= MAX_BITS
    ):
      raise ValueError(
        f'{type(self).__name__}(bits={self.bits!r}): bits must be a whole number from {MIN_BITS} '
        f'to {MAX_BITS}, or None to leave the tensor unquantized.'
      )

  @property
  def has_scale(self) -> bool:
    """Whether `init` gives an array, that is, whether there is something to learn."""
    return self.bits is not None

  def init(self, x: Array) -> Array | None:
    """Finds the first scale from a tensor.

    Args:
      x: the weights, or one batch of activations, of any shape; floating.

    Returns:
      A positive array (shape: see `axis`), of float32 or x's dtype if that is wider; None where
      there is nothing to learn. An all-zero tensor gives ones.

    Raises:
      TypeError: if `x` is not floating.
      ValueError: if `axis` is not an axis of `x`.
    """
    if not self.has_scale:
      return None
    x = jnp.asarray(ste.floating(x, self), ste.compute_dtype(x))
    scale = self._init(x, ste.reduced_axes(x, self.axis))
    return jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1.0)

  def __call__(self, x: Array, scale: Array | None = None) -> Array:
    """Quantizes and dequantizes `x`, differentiable in `x` and `scale`.

    Args:
      x: floating array.
      scale: what `init` gave, or its trained value.

    Returns:
      An array of the shape and dtype of `x` with at most 2^bits distinct values a scale.

    Raises:
      TypeError: if `x` is not floating.
      ValueError: if the scale is missing, or its shape does not fit that of `x`.
    """
    if self.bits is None:
      return x
    x = ste.floating(x, self)
    return self._fake(x, self._positive(scale, ste.compute_dtype(x), x.shape)).astype(x.dtype)

  def encode(self, x: Array, scale: Array | None = None) -> Array:
    """Gives the integer codes of `x`.

    Args:
      x: floating array.
      scale: what `init` gave, or its trained value.

    Returns:
      An array of the shape of `x`, int8 if signed, uint8 if not.

    Raises:
      TypeError: if `x` is not floating.
      ValueError: if `bits` is None, or as `__call__`.
    """
    self._require_codes()
    dtype = ste.compute_dtype(ste.floating(x, self))
    codes = self._codes(jnp.asarray(x, dtype), self._positive(scale, dtype, jnp.shape(x)))
    return codes.astype(jnp.int8 if self.signed else jnp.uint8)

  def decode(
    self, codes: Array, scale: Array | None = None, dtype: jax.typing.DTypeLike | None = None
  ) -> Array:
    """Gives the values that `codes` stand for.

    Args:
      codes: what `encode` gave.
      scale: the scale that was used there.
      dtype: of the result; by default the scale's, or float32 where there is none.

    Returns:
      A floating array of the shape of `codes`.
    """
    self._require_codes()
    if dtype is None:
      dtype = jnp.float32 if scale is None else jnp.asarray(scale).dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    return self._values(codes.astype(wide), self._positive(scale, wide, codes.shape)).astype(dtype)

  def _positive(
    self, scale: Array | None, dtype: jax.typing.DTypeLike, shape: tuple[int, ...]
  ) -> Array:
    """The scale that is computed with, for a tensor of that shape; one where nothing is learnt."""
    if not self.has_scale:
      return jnp.ones((), dtype)
    if scale is None:
      raise ValueError(f'{type(self).__name__} needs its scale: pass what init(x) returned.')
    own = jnp.shape(scale)
    if own and (len(own) != len(shape) or any(n not in (1, m) for n, m in zip(own, shape))):
      raise ValueError(
        f'{type(self).__name__}: a scale of shape {own} for a tensor of shape {shape}; it must '
        'have shape (), or length 1 on all axes but `axis`.'
      )
    return ste.positive(jnp.asarray(scale, dtype))

  def _require_codes(self) -> None:
    if self.bits is None:
      raise ValueError(f'{type(self).__name__}(bits=None) has no codes: the tensor stays floating.')

  @abc.abstractmethod
  def _init(self, x: Array, axes: tuple[int, ...] | None) -> Array:
    """The first scale of `x`, reduced over `axes` (None: all)."""

  @abc.abstractmethod
  def _fake(self, x: Array, scale: Array) -> Array:
    """Quantize-dequantize with gradients; `scale` is positive and wide."""

  @abc.abstractmethod
  def _codes(self, x: Array, scale: Array) -> Array:
    """Codes of a wide `x`, as whole floating numbers."""

  @abc.abstractmethod
  def _values(self, codes: Array, scale: Array) -> Array:
    """The values of codes given as whole floating numbers."""

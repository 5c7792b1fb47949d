"""The convolution of `layers.Conv`: XLA's own, but for depthwise ones on a CPU."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def conv_general_dilated(
  lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Any, **kwargs: Any
) -> Array:
  """`jax.lax.conv_general_dilated`; a depthwise one is a sum of shifted products on a CPU.

      y[b, i, j, c] = sum_(u, v) x[b, s i + u, s j + v, c] k[u, v, 0, c]

  XLA's grouped convolution is many times slower there (docs/benchmarks.md); on other platforms it
  is used as it is. The choice is made where the program is compiled for a platform.
  """

  def whole(lhs: Array, rhs: Array) -> Array:
    return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)

  if not _depthwise(lhs, rhs, kwargs):
    return whole(lhs, rhs)
  if isinstance(padding, str):
    pads = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
  else:
    pads = padding
  shifted = functools.partial(_shifted, strides=window_strides, padding=pads)
  return jax.lax.platform_dependent(lhs, rhs, cpu=shifted, default=whole)


def _depthwise(lhs: Array, rhs: Array, kwargs: dict[str, Any]) -> bool:
  """Whether each channel of images [B, H, W, C] has a kernel of its own, without dilation."""
  spec = kwargs.get('dimension_numbers')
  usual = isinstance(spec, jax.lax.ConvDimensionNumbers) and spec.lhs_spec == (0, 3, 1, 2)
  dilations = [kwargs.get(name) for name in ('lhs_dilation', 'rhs_dilation')]
  plain = all(value is None or set(value) == {1} for value in dilations)
  groups = kwargs.get('feature_group_count', 1)
  return usual and plain and lhs.ndim == 4 and 1 < groups == lhs.shape[-1] == rhs.shape[-1]


def _shifted(x: Array, kernel: Array, strides: Sequence[int], padding: Any) -> Array:
  """A depthwise convolution as a sum over the places of its kernel."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:3], kernel.shape, strides)]

  def part(u: int, v: int) -> Array:
    rows, columns = (
      slice(start, start + (size - 1) * s + 1, s) for start, size, s in zip((u, v), sizes, strides)
    )
    return x[:, rows, columns] * kernel[u, v, 0]

  places = itertools.product(range(kernel.shape[0]), range(kernel.shape[1]))
  return functools.reduce(jnp.add, itertools.starmap(part, places))

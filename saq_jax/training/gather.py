"""Quantized weights brought together from the devices that share them, as integer codes."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from saq_jax._paths import PyTree, map_named
from saq_jax.training.sharding import Layout
from saq_jax.weights import WeightQuantizer


def gather_weights(
  quantize: WeightQuantizer, params: PyTree, layout: Layout, *, codes: bool
) -> PyTree:
  """Quantizes weights that are cut over devices, and gives each device all of them.

  With `codes` the integers cross the wire instead of floats: a quarter of the bytes of float32, and
  an eighth where two codes of at most 4 bits go into a byte. The values are the same bit for bit,
  as `decode(encode(x)) == q(x)`.

  Args:
    quantize: of the parameters.
    params: {'model': ..., 'scales': ...}, cut as the layout says.
    layout: of the parameters.
    codes: whether codes are sent.

  Returns:
    `quantize(params)`, whole on every device. It is not to be differentiated.
  """
  if not layout.cuts or not codes:
    return layout.whole(quantize(params))
  quantizers, scales = quantize.assign(params['model']), params['scales']

  def leaf(path: str, x: Array) -> Array:
    quantizer, axis = quantizers.get(path), layout.axis(x)
    if quantizer is None or quantizer.bits is None or axis is None:
      return layout.whole(x if quantizer is None else quantizer(x, scales.get(path)))
    sent = quantizer.encode(x, scales.get(path))
    pair = _pair_axis(quantizer.bits, x.shape, axis)
    lowest = -(2 ** (quantizer.bits - 1)) if quantizer.signed else 0
    if pair is not None:
      sent = _packed((sent.astype(jnp.int32) - lowest).astype(jnp.uint8), pair)
    whole = _all_gathered(sent, layout, axis)
    if pair is not None:
      whole = _unpacked(whole, pair).astype(jnp.int32) + lowest
    # The scales of channels may be cut as well, and would cut the weights again.
    return quantizer.decode(whole, layout.whole(scales.get(path)), x.dtype)

  return {'model': map_named(leaf, params['model']), 'scales': layout.whole(scales)}


def _all_gathered(x: Array, layout: Layout, axis: int) -> Array:
  """The pieces of all devices put together. Left to the compiler, floats would be sent."""
  gather = functools.partial(jax.lax.all_gather, axis_name='fsdp', axis=axis, tiled=True)
  cut = PartitionSpec(*[None] * axis, 'fsdp')
  return jax.shard_map(
    gather, mesh=layout.mesh, in_specs=cut, out_specs=PartitionSpec(), check_vma=False
  )(x)


def _pair_axis(bits: int, shape: tuple[int, ...], cut: int) -> int | None:
  """The axis along which two codes go into a byte; None where they do not fit in half of one."""
  if bits > 4:
    return None
  return next((i for i, n in enumerate(shape) if i != cut and n % 2 == 0), None)


def _packed(codes: Array, axis: int) -> Array:
  """Two codes of 0..15 a byte: the first half of the axis in the low bits."""
  low, high = jnp.split(codes, 2, axis)
  return low | (high << 4)


def _unpacked(packed: Array, axis: int) -> Array:
  """The codes of `_packed`."""
  return jnp.concatenate([packed & 15, packed >> 4], axis)

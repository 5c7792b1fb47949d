"""Layers whose inputs are quantized: every product of every model goes through one of these.

A weight arrives here already quantized (see `saq_jax.weights`); what a layer owns is the
quantizer of its inputs. `Conv`, `Dense` and `Einsum` are the only places where a model
multiplies, so an integer or a faster product has one door to come in by: the fields
`conv_general_dilated`, `dot_general` and `einsum`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array

from saq_jax._convolution import conv_general_dilated
from saq_jax._paths import ACT_SCALE
from saq_jax.quantizers import Quantizer


class ActQuant(nn.Module):
  """Quantizes an activation, with a learnable scale where the quantizer has one.

  The scale is the parameter 'quant_scale'. `model.init` finds it from the batch that it is given
  (zeros give one), `calibrate` from a batch at any later time, through the collection
  'calibration': where that is mutable and 'params' is not, the scale is found anew. A quantizer
  with `bits=None` has no parameter and costs nothing.

  Attributes:
    quantizer: any quantizer; unsigned ones for what is never negative.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from saq_jax import LSQ
    >>> layer = ActQuant(LSQ(bits=2, signed=False))
    >>> variables = layer.init(jax.random.key(0), jnp.zeros(3))
    >>> layer.apply(variables, jnp.array([0.2, 0.7, 2.4, 9.0]))
    Array([0., 1., 2., 3.], dtype=float32)
  """

  quantizer: Quantizer

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Quantizes `x`: any shape, floating; the same shape and dtype come back."""
    if not self.quantizer.has_scale:
      return self.quantizer(x)
    scale = self.param(ACT_SCALE, lambda _: self.quantizer.init(x))
    # In `init`, and in an apply that may change everything, the parameters stand.
    if self.is_mutable_collection('calibration') and not self.is_mutable_collection('params'):
      scale = self.quantizer.init(x)
      self.put_variable('calibration', ACT_SCALE, scale)
    return self.quantizer(x, scale)


class Conv(nn.Conv):
  """`flax.linen.Conv` that quantizes its input first.

  Attributes:
    input_quantizer: the quantizer of the input; None leaves it as it is. Its scale is the
      parameter 'input/quant_scale'. All other fields are those of `flax.linen.Conv`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from saq_jax import LSQ
    >>> layer = Conv(8, (3, 3), input_quantizer=LSQ(bits=4, signed=False))
    >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    >>> sorted(variables['params'])
    ['bias', 'input', 'kernel']
  """

  input_quantizer: Quantizer | None = None
  conv_general_dilated: Callable[..., Array] | None = conv_general_dilated

  @nn.compact
  def __call__(self, inputs: Array) -> Array:
    """Convolves a batch [..., H, W, C]."""
    return super().__call__(_quantized(self.input_quantizer, inputs, 'input'))


class Dense(nn.Dense):
  """`flax.linen.Dense` that quantizes its input first.

  Attributes:
    input_quantizer: the quantizer of the input; None leaves it as it is. Its scale is the
      parameter 'input/quant_scale'.
    input_is_quantized: the input comes out of an `ActQuant` that several layers share, as
      attention's q, k and v do. Nothing is quantized again then and no scale is made;
      `input_quantizer` only says with what it was, for the cost. All other fields are those of
      `flax.linen.Dense`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from saq_jax import LSQ
    >>> layer = Dense(2, input_quantizer=LSQ(bits=4))
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((5, 3)))[0].shape
    (5, 2)
  """

  input_quantizer: Quantizer | None = None
  input_is_quantized: bool = False

  @nn.compact
  def __call__(self, inputs: Array) -> Array:
    """Multiplies a batch [..., features]."""
    if self.input_is_quantized:
      return super().__call__(inputs)
    return super().__call__(_quantized(self.input_quantizer, inputs, 'input'))


class Einsum(nn.Module):
  """The product of two activations, both quantized: attention's `q k` and `attention v`.

  Attributes:
    equation: of `jax.numpy.einsum`, with two operands.
    lhs_quantizer: of the first operand; None leaves it as it is. Parameter 'lhs/quant_scale'.
    rhs_quantizer: of the second one. Parameter 'rhs/quant_scale'.
    einsum: what multiplies.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from saq_jax import LSQ
    >>> product = Einsum('id,jd->ij', LSQ(bits=8), LSQ(bits=8))
    >>> q, k = jnp.ones((2, 4)), jnp.ones((3, 4))
    >>> product.init_with_output(jax.random.key(0), q, k)[0].shape
    (2, 3)
  """

  equation: str
  lhs_quantizer: Quantizer | None = None
  rhs_quantizer: Quantizer | None = None
  einsum: Callable[..., Array] = jnp.einsum

  @nn.compact
  def __call__(self, lhs: Array, rhs: Array) -> Array:
    """Multiplies two activations as the equation says."""
    lhs = _quantized(self.lhs_quantizer, lhs, 'lhs')
    return self.einsum(self.equation, lhs, _quantized(self.rhs_quantizer, rhs, 'rhs'))


class BatchNorm(nn.BatchNorm):
  """`flax.linen.BatchNorm` whose running variance is unbiased, as PyTorch's is.

  A batch is normalised by its biased variance `v` in both libraries; into the running average
  goes `v n/(n-1)` here, n being the number of values a channel. Networks trained there then give
  the same statistics here. Under a sharded `jax.jit` the batch is the global one.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> norm, x = BatchNorm(use_running_average=False, momentum=0.9), jnp.array([[0.0], [2.0]])
    >>> variables = norm.init(jax.random.key(0), x)
    >>> _, moved = norm.apply(variables, x, mutable=['batch_stats'])
    >>> round(float(moved['batch_stats']['var'][0]), 4)  # 0.9 * 1 + 0.1 * (1 * 2/1)
    1.1
  """

  @nn.compact
  def __call__(
    self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
  ) -> Array:
    """Normalises a batch [..., C] over all axes but the last."""
    old: Array = self.get_variable('batch_stats', 'var')
    y = super().__call__(x, use_running_average, mask=mask)
    frozen = nn.merge_param('use_running_average', self.use_running_average, use_running_average)
    if not frozen and not self.is_initializing():
      n: int | Array = x.size // x.shape[-1]
      if mask is not None:
        n = jnp.sum(jnp.broadcast_to(mask, x.shape) != 0, tuple(range(x.ndim - 1)))
      if self.axis_name is not None:
        n = jax.lax.psum(n, self.axis_name)
      new: Array = self.get_variable('batch_stats', 'var')
      update = new - self.momentum * old
      self.put_variable('batch_stats', 'var', new + update / jnp.maximum(n - 1, 1))
    return y


def with_sign(quantizer: Quantizer | None, signed: bool) -> Quantizer | None:
  """Gives a quantizer the sign that its place asks for.

  Args:
    quantizer: any quantizer, or None.
    signed: whether what it quantizes may be negative.

  Returns:
    The same quantizer with that sign; None for None.

  Example:
    >>> from saq_jax import LSQ
    >>> with_sign(LSQ(bits=4), False).bounds
    (0, 15)
  """
  return None if quantizer is None else dataclasses.replace(quantizer, signed=signed)


def calibrate(
  model: nn.Module,
  variables: dict[str, Any],
  *inputs: Any,
  into: dict[str, Any] | None = None,
  **kwargs: Any,
) -> dict[str, Any]:
  """Finds every activation scale from one batch, in one forward pass.

  Each layer finds its scale from its input as it comes, that is, made by layers before it that
  quantize already. Nothing else changes, and the model has no mode: it is a pure function, also
  under `jax.jit`.

  Args:
    model: a Linen module.
    variables: its variables. For quantized weights give `{'params': quantize(params)['model']}`.
    *inputs: the arguments of `model.apply`: one batch.
    into: the parameters to put the scales into, where those are not `variables['params']`: the
      latent ones, while the model computes with quantized ones.
    **kwargs: the keyword arguments of `model.apply`. A network with batch norms wants
      `train=True`: quantization may change the size of the weights (LIQ's normalisation does),
      and running statistics that were found before do not fit then. Here they do not move.

  Returns:
    The parameters with all their activation scales replaced.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from saq_jax import LSQ
    >>> layer = Dense(2, input_quantizer=LSQ(bits=8, signed=False))
    >>> variables = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> params = calibrate(layer, variables, jnp.ones((4, 3)))
    >>> round(float(params['input']['quant_scale']), 4)  # 2 mean|x| / sqrt(255)
    0.1252
  """
  moving = ['calibration', *(name for name in variables if name != 'params')]
  _, found = model.apply(variables, *inputs, mutable=moving, **kwargs)
  params = traverse_util.flatten_dict(variables['params'] if into is None else into)
  scales = traverse_util.flatten_dict(found.get('calibration', {}))
  like = {path: jnp.asarray(scale, params[path].dtype) for path, scale in scales.items()}
  return traverse_util.unflatten_dict(params | like)


def _quantized(quantizer: Quantizer | None, x: Array, name: str) -> Array:
  """An operand of a product, quantized by a submodule of the layer that is running."""
  return x if quantizer is None else ActQuant(quantizer, name=name)(x)

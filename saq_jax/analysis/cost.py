"""What a network costs: bit operations, found by tracing the model, and the size of its weights."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jax import Array
from jax.extend import core

from saq_jax._paths import PyTree, is_quant_scale, named_leaves
from saq_jax.attention import DotProductAttention
from saq_jax.layers import Conv, Dense, Einsum
from saq_jax.quantizers import Quantizer
from saq_jax.weights import WeightQuantizer

__all__ = ['FLOAT_BITS', 'ModelSize', 'ProductCost', 'model_size', 'product_costs']

FLOAT_BITS = 32  # Of an operand that is not quantized, whatever dtype it was trained in.


@dataclasses.dataclass(frozen=True)
class ProductCost:
  """The cost of one product of a network, for one image.

  Attributes:
    path: of the layer: 'layer1_0/conv1'.
    macs: multiply-accumulates. For a convolution `k^2 C_in (C_out/groups) H_out W_out`.
    weight_bits: of the kernel; of the first operand, where two activations are multiplied.
    act_bits: of the layer's input; of the second operand, where two activations are multiplied.
  """

  path: str
  macs: int
  weight_bits: int
  act_bits: int

  @property
  def bops(self) -> int:
    """Bit operations: `macs weight_bits act_bits`."""
    return self.macs * self.weight_bits * self.act_bits


@dataclasses.dataclass(frozen=True)
class ModelSize:
  """What inference has to hold of a network.

  Attributes:
    parameters: the network's own; the quantizers' scales are not counted.
    quantized_bits: of the codes of the quantized parameters.
    float_bits: of all else, each value 32: other parameters, scales, running statistics.
  """

  parameters: int
  quantized_bits: int
  float_bits: int

  @property
  def bits(self) -> int:
    """All bits."""
    return self.quantized_bits + self.float_bits

  @property
  def bytes(self) -> int:
    """All bits in bytes, codes packed without gaps; rounded up."""
    return -(-self.bits // 8)


def product_costs(
  model: nn.Module,
  input_shape: Sequence[int],
  quantize: WeightQuantizer | None,
  *,
  image_bits: int = 8,
) -> tuple[ProductCost, ...]:
  r"""Finds the bit operations of every product of a model, by tracing it; nothing is computed.

      BOPs = k^2 C_in (C_out/groups) H_out W_out b_w b_a

  and likewise for a dense layer and for the product of two activations. What is not quantized
  counts 32 bits. The images that the first layer multiplies come as integers: where its weights
  are quantized and its input is not, its input counts `image_bits`, as the SAQ authors count it.

  Args:
    model: a Linen module that is called as `model.apply(variables, images, train=False)` and
      multiplies in `saq_jax.layers` and `saq_jax.attention` only.
    input_shape: of one image: (32, 32, 3).
    quantize: the quantizer of the weights; None where they are not quantized.
    image_bits: of the images.

  Returns:
    The costs in the order in which the model multiplies; a layer called twice stands there twice.

  Raises:
    ValueError: if the model multiplies outside of `saq_jax.layers`, or in a loop where the layers
      cannot be counted (`nn.scan`, `nn.vmap`); or if a rule of `quantize` matches no parameter.

  Example:
    The 674.6M that the paper gives for PreResNet-20, CIFAR-100, 4 bits:

    >>> from saq_jax import LSQ, QuantRule, weight_quantizer
    >>> from saq_jax.models.preresnet import PreResNet
    >>> act, last_act = LSQ(bits=4, signed=False), LSQ(bits=8, signed=False)
    >>> model = PreResNet(num_classes=100, depth=20, act=act, last_act=last_act)
    >>> quantize = weight_quantizer(
    ...   [QuantRule(r'(conv|fc)/kernel', LSQ(bits=8)), QuantRule(r'.*/kernel', LSQ(bits=4))]
    ... )
    >>> sum(cost.bops for cost in product_costs(model, (32, 32, 3), quantize))
    674643968
  """
  images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  record = _Recorder(_Weights(variables.get('params', {}), quantize), image_bits)

  def apply(variables: PyTree, x: Array) -> Any:
    with nn.intercept_methods(record):
      return model.apply(variables, x, train=False)

  _check_complete(record.costs, jax.make_jaxpr(apply)(variables, images).jaxpr)
  return tuple(record.costs)


def model_size(
  model_params: PyTree, batch_stats: PyTree, quantize: WeightQuantizer | None
) -> ModelSize:
  """Counts the bits that inference has to hold.

  Args:
    model_params: the model's parameters; arrays or `jax.ShapeDtypeStruct`s.
    batch_stats: the running statistics of its norms; None or {} where it has none.
    quantize: the quantizer of the weights; None where they are not quantized.

  Returns:
    The size: quantized parameters at their bit-width, and at 32 bits all else: other parameters,
    the scales of weights and of activations, running statistics.

  Raises:
    ValueError: if a rule of `quantize` matches no parameter.

  Example:
    >>> import jax.numpy as jnp
    >>> from saq_jax import LSQ, QuantRule, weight_quantizer
    >>> quantize = weight_quantizer([QuantRule('kernel', LSQ(bits=4))])
    >>> size = model_size({'kernel': jnp.ones((3, 3)), 'bias': jnp.ones(3)}, {}, quantize)
    >>> size.quantized_bits, size.float_bits  # 9 codes; the bias and a scale
    (36, 128)
    >>> size.bytes
    21
  """
  weights = _Weights(model_params, quantize)
  plain = [leaf for path, leaf in weights.shapes.items() if path not in weights.chosen]
  scales = jax.eval_shape(quantize.init, model_params)['scales'] if quantize is not None else {}
  plain += [*jax.tree.leaves(scales), *jax.tree.leaves(batch_stats)]
  return ModelSize(
    parameters=sum(_size(x) for path, x in weights.shapes.items() if not is_quant_scale(path)),
    quantized_bits=sum(weights.bits(x) * _size(weights.shapes[x]) for x in weights.chosen),
    float_bits=FLOAT_BITS * sum(map(_size, plain)),
  )


class _Weights:
  """The shapes of a model's parameters by path, and the quantizers of those that have one."""

  def __init__(self, params: PyTree, quantize: WeightQuantizer | None) -> None:
    self.shapes = named_leaves(params)
    chosen = quantize.assign(params) if quantize is not None else {}
    self.chosen = {path: q for path, q in chosen.items() if q.bits is not None}

  def bits(self, path: str) -> int:
    """The bit-width of a parameter."""
    return _bits(self.chosen.get(path))


class _Recorder:
  """A method interceptor of Flax that notes the cost of each call of a layer."""

  def __init__(self, weights: _Weights, image_bits: int) -> None:
    self.costs: list[ProductCost] = []
    self._weights, self._image_bits = weights, image_bits
    self._inside = False

  def __call__(
    self, method: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext
  ) -> Any:
    if isinstance(context.module, DotProductAttention) and context.method_name == '__call__':
      # Where one fused call does both products, they are counted as the `Einsum`s it stands for.
      return context.module.unfused(*args, **kwargs)
    # A layer's `super().__call__` is intercepted as well, and is the same product.
    if self._inside or not isinstance(context.module, Conv | Dense | Einsum):
      return method(*args, **kwargs)
    self._inside = True
    out = method(*args, **kwargs)
    self._inside = False
    self.costs.append(self._cost(context.module, (*args, *kwargs.values()), out))
    return out

  def _cost(
    self, layer: Conv | Dense | Einsum, operands: Sequence[Array], out: Array
  ) -> ProductCost:
    """The cost of one call of a layer."""
    path = '/'.join(layer.path)
    if isinstance(layer, Einsum):
      macs = out.size * _contracted(layer.equation, *(x.shape for x in operands))
      return ProductCost(path, macs, _bits(layer.lhs_quantizer), _bits(layer.rhs_quantizer))
    kernel = '/'.join((*layer.path, 'kernel'))
    macs = out.size // out.shape[-1] * _size(self._weights.shapes[kernel])
    act_bits = _bits(layer.input_quantizer)
    if not self.costs and act_bits == FLOAT_BITS and kernel in self._weights.chosen:
      act_bits = self._image_bits
    return ProductCost(path, macs, self._weights.bits(kernel), act_bits)


def _bits(quantizer: Quantizer | None) -> int:
  """The bit-width of what a quantizer leaves."""
  return FLOAT_BITS if quantizer is None or quantizer.bits is None else quantizer.bits


def _size(x: Any) -> int:
  """The number of values of an array or of its shape."""
  return math.prod(x.shape)


def _contracted(equation: str, *shapes: tuple[int, ...]) -> int:
  """The number of products summed into one value of an einsum."""
  terms, arrow, out = equation.replace(' ', '').partition('->')
  if not arrow:
    out = ''.join(label for label, count in Counter(terms).items() if count == 1)
  sizes: dict[str, int] = {}
  for term, shape in zip(terms.split(','), shapes, strict=True):
    left, _, right = term.partition('...')
    sizes.update(zip(left, shape))
    sizes.update(zip(reversed(right), reversed(shape)))
  return math.prod(size for label, size in sizes.items() if label not in out)


def _check_complete(costs: Sequence[ProductCost], jaxpr: core.Jaxpr) -> None:
  """Raises unless the traced layers do all the multiplying that the model does."""
  found = Counter[str]()
  for name, macs in _macs(jaxpr):
    found[name] += macs
  counted = sum(cost.macs for cost in costs)
  if found.total() == counted:
    return
  paths = [cost.path for cost in costs]
  strays = [name for name in found if not any(path in name for path in paths)]
  where = 'in a lifted loop (nn.scan, nn.vmap)'
  if strays:
    where = f'outside of the layers, in {", ".join(strays[:5])}'
  raise ValueError(
    f'the model multiplies {found.total()} times, its layers of saq_jax.layers {counted} times. '
    f'The difference is {where}. Multiply with saq_jax.layers and saq_jax.attention only.'
  )


def _macs(jaxpr: core.Jaxpr, within: str = '') -> list[tuple[str, int]]:
  """The multiply-accumulates of each convolution and dot product, with its place in the model."""
  found = []
  for eqn in jaxpr.eqns:
    name = f'{within}/{eqn.source_info.name_stack}'
    operands: list[Any] = [x.aval for x in eqn.invars]
    outs: list[Any] = [x.aval for x in eqn.outvars]
    if eqn.primitive is jax.lax.conv_general_dilated_p:
      features = operands[1].shape[eqn.params['dimension_numbers'].rhs_spec[0]]
      found.append((name, outs[0].size // features * operands[1].size))
    elif eqn.primitive is jax.lax.dot_general_p:
      (contracted, _), _ = eqn.params['dimension_numbers']
      summed = math.prod(operands[0].shape[axis] for axis in contracted)
      found.append((name, outs[0].size * summed))
    else:
      times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
      for inner in core.jaxprs_in_params(eqn.params):
        found += [(place, times * macs) for place, macs in _macs(inner, name)]
  return found

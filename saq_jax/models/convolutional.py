"""What the convolutional networks share: their convolution and their norm, as the authors' are."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from saq_jax.layers import BatchNorm, Conv, with_sign
from saq_jax.quantizers import Quantizer

_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def batch_norm(train: bool, eps: float, dtype: Any) -> Callable[..., BatchNorm]:
  """A norm that moves its running statistics by a tenth a step.

  Args:
    train: whether it normalises by the batch's statistics.
    eps: added to the variance.
    dtype: of the computation.

  Returns:
    What makes the module from its name.
  """
  return functools.partial(
    BatchNorm, use_running_average=not train, epsilon=eps, dtype=dtype, momentum=0.9
  )


def quantized_conv(act: Quantizer | None, dtype: Any) -> Callable[..., Conv]:
  """A convolution without a bias, its input quantized.

  Args:
    act: the quantizer of the input, or None.
    dtype: of the computation.

  Returns:
    What makes the module from its features, the size of its kernel and its name.
  """
  return functools.partial(
    Conv, use_bias=False, dtype=dtype, kernel_init=_fan_out, input_quantizer=act
  )


def first_conv(first_act: Quantizer | None, dtype: Any) -> Callable[..., Conv]:
  """The convolution of the images, which may be negative.

  Args:
    first_act: the quantizer of the images, made signed here; None leaves them.
    dtype: of the computation.

  Returns:
    As `quantized_conv`.
  """
  return quantized_conv(with_sign(first_act, True), dtype)

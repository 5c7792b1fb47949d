"""PreResNet for small images (He et al., arXiv 1603.05027), as the SAQ authors' networks are.

Paths are theirs: 'conv', 'layer1_0/bn1', 'layer1_0/conv1', 'layer2_0/downsample', 'bn', 'fc'.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from saq_jax.layers import Dense
from saq_jax.models.convolutional import batch_norm, first_conv, quantized_conv
from saq_jax.quantizers import Quantizer


class PreResNetBlock(nn.Module):
  """Two 3x3 convolutions, each after a norm and a ReLU, and a shortcut.

  Attributes:
    features: output channels.
    strides: of the first convolution and of the shortcut.
    first_of_stage: the shortcut then starts after the first norm and ReLU ("half preactivation").
    act: the quantizer of the inputs of all convolutions, or None.
    train: whether norms use the batch's statistics.
    norm_eps: added to the variance in the norms.
    dtype: of the computation.
  """

  features: int
  strides: int
  first_of_stage: bool
  act: Quantizer | None
  train: bool
  norm_eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, H, W, C] to [B, H/strides, W/strides, features]."""
    norm = batch_norm(self.train, self.norm_eps, self.dtype)
    conv = functools.partial(quantized_conv(self.act, self.dtype), self.features)
    y = nn.relu(norm(name='bn1')(x))
    shortcut = y if self.first_of_stage else x
    y = conv((3, 3), strides=self.strides, padding=1, name='conv1')(y)
    y = nn.relu(norm(name='bn2')(y))
    y = conv((3, 3), padding=1, name='conv2')(y)
    if shortcut.shape != y.shape:
      shortcut = conv((1, 1), strides=self.strides, padding=0, name='downsample')(shortcut)
    return y + shortcut


class PreResNet(nn.Module):
  """PreResNet-20, 32, 44, 56, 110 and smaller ones: three stages of (depth - 2) / 6 blocks.

  Weights are quantized from outside, by rules over the paths, for which the class names its ends.

  Attributes:
    num_classes: outputs.
    depth: 6 n + 2.
    width: channels of the first stage; the next ones have twice and four times as many.
    act: the quantizer of the convolutions' inputs (what follows a ReLU: unsigned), or None.
    last_act: the quantizer of the last layer's input, or None.
    first_act: the quantizer of the images, made signed; None leaves them, as the authors do.
    norm_eps: added to the variance in every norm.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation; None follows the parameters.

  Raises:
    ValueError: if depth is not 6 n + 2.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model = PreResNet(num_classes=10, depth=8, width=4)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    >>> model.apply(variables, jnp.zeros((2, 8, 8, 1)), train=False).shape
    (2, 10)
  """

  first_kernel: ClassVar[str] = r'conv/kernel'
  last_kernel: ClassVar[str] = r'fc/kernel'

  num_classes: int
  depth: int = 20
  width: int = 16
  act: Quantizer | None = None
  last_act: Quantizer | None = None
  first_act: Quantizer | None = None
  norm_eps: float = 1e-5
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, num_classes]."""
    if self.depth < 8 or (self.depth - 2) % 6:
      raise ValueError(f'PreResNet(depth={self.depth}): must be 6 n + 2: 8, 14, 20, 32, 44, ...')
    conv = first_conv(self.first_act, self.dtype)
    x = conv(self.width, (3, 3), padding=1, name='conv')(x)
    block = nn.remat(PreResNetBlock) if self.remat else PreResNetBlock
    for stage in range(3):
      for i in range((self.depth - 2) // 6):
        first = i == 0
        x = block(
          features=self.width * 2**stage,
          strides=2 if first and stage > 0 else 1,
          first_of_stage=first,
          act=self.act,
          train=train,
          norm_eps=self.norm_eps,
          dtype=self.dtype,
          name=f'layer{stage + 1}_{i}',
        )(x)
    norm = batch_norm(train, self.norm_eps, self.dtype)(name='bn')
    x = jnp.mean(nn.relu(norm(x)), axis=(1, 2))
    return Dense(self.num_classes, dtype=self.dtype, input_quantizer=self.last_act, name='fc')(x)

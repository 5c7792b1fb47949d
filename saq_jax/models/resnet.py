"""ResNet for ImageNet (He et al., arXiv 1512.03385), as the SAQ authors' networks are.

Paths: 'conv1', 'bn1', 'layer1_0/conv1', 'layer1_0/bn1', 'layer2_0/downsample_conv',
'layer2_0/downsample_bn', 'fc'.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from saq_jax.layers import Dense
from saq_jax.models.convolutional import batch_norm, first_conv, quantized_conv
from saq_jax.quantizers import Quantizer

# Blocks of each stage; from 50 on they are bottlenecks.
_BLOCKS = {
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
}


class ResNetBlock(nn.Module):
  """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, and a shortcut.

  A ReLU follows each norm but the last one, and the sum. The shortcut has a 1x1 convolution and
  a norm where the stride is not 1 or the channels change.

  Attributes:
    features: channels of the 3x3 convolutions; a bottleneck puts out four times as many.
    strides: of the first 3x3 convolution and of the shortcut.
    bottleneck: which of the two kinds.
    act: the quantizer of the inputs of all convolutions, or None.
    train: whether the norms use the batch's statistics.
    norm_eps: of the norms.
    dtype: of the computation.
  """

  features: int
  strides: int
  bottleneck: bool
  act: Quantizer | None
  train: bool
  norm_eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, H, W, C] to [B, H/strides, W/strides, features or 4 features]."""
    norm = batch_norm(self.train, self.norm_eps, self.dtype)
    conv = quantized_conv(self.act, self.dtype)
    thin, wide = self.features, self.features * (4 if self.bottleneck else 1)
    if self.bottleneck:
      kinds = [(thin, 1, 1), (thin, 3, self.strides), (wide, 1, 1)]
    else:
      kinds = [(thin, 3, self.strides), (thin, 3, 1)]
    y = x
    for i, (features, size, strides) in enumerate(kinds, 1):
      y = conv(features, (size, size), strides=strides, padding=size // 2, name=f'conv{i}')(y)
      y = norm(name=f'bn{i}')(y)
      y = nn.relu(y) if i < len(kinds) else y
    if self.strides != 1 or x.shape[-1] != wide:
      x = conv(wide, (1, 1), strides=self.strides, padding=0, name='downsample_conv')(x)
      x = norm(name='downsample_bn')(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet-18, 34, 50, 101 and 152, whose bottlenecks have their stride in the 3x3 convolution.

  Weights are quantized from outside, by rules over the paths, for which the class names its ends.

  Attributes:
    num_classes: outputs.
    depth: 18, 34, 50, 101 or 152.
    width: channels of the first stage's 3x3 convolutions; each later stage has twice as many.
    act: the quantizer of the inputs of all convolutions but the first (what follows a ReLU:
      unsigned), or None.
    last_act: the quantizer of the last layer's input, or None.
    first_act: the quantizer of the images, made signed here; None leaves them as they are.
    norm_eps: of all norms.
    remat: compute the blocks' activations again in the backward pass, instead of keeping them.
    dtype: of the computation; None follows the parameters.

  Raises:
    ValueError: if there is no such depth.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model = ResNet(num_classes=10, depth=18, width=4)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    >>> model.apply(variables, jnp.zeros((2, 32, 32, 3)), train=False).shape
    (2, 10)
  """

  first_kernel: ClassVar[str] = r'conv1/kernel'
  last_kernel: ClassVar[str] = r'fc/kernel'

  num_classes: int
  depth: int = 18
  width: int = 64
  act: Quantizer | None = None
  last_act: Quantizer | None = None
  first_act: Quantizer | None = None
  norm_eps: float = 1e-5
  remat: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, num_classes]."""
    if self.depth not in _BLOCKS:
      raise ValueError(f'ResNet(depth={self.depth}): take one of {", ".join(map(str, _BLOCKS))}.')
    first = first_conv(self.first_act, self.dtype)
    x = first(self.width, (7, 7), strides=2, padding=3, name='conv1')(x)
    x = batch_norm(train, self.norm_eps, self.dtype)(name='bn1')(x)
    # The padding of this pool is minus infinity.
    x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    block = nn.remat(ResNetBlock) if self.remat else ResNetBlock
    for stage, blocks in enumerate(_BLOCKS[self.depth], 1):
      for i in range(blocks):
        x = block(
          features=self.width * 2 ** (stage - 1),
          strides=2 if i == 0 and stage > 1 else 1,
          bottleneck=self.depth >= 50,
          act=self.act,
          train=train,
          norm_eps=self.norm_eps,
          dtype=self.dtype,
          name=f'layer{stage}_{i}',
        )(x)
    x = jnp.mean(x, axis=(1, 2))
    return Dense(self.num_classes, dtype=self.dtype, input_quantizer=self.last_act, name='fc')(x)

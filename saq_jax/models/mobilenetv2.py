"""MobileNetV2 (Sandler et al., arXiv 1801.04381) for ImageNet and for small images.

Both are as the SAQ authors' networks are. Paths: 'conv1', 'bn1', 'layer2_0/conv1',
'layer2_0/bn1', 'conv2', 'bn2', 'fc'; of the one for small images 'layers_3/conv1',
'layers_3/shortcut_conv', 'linear'.
"""

from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from saq_jax.layers import Dense
from saq_jax.models.convolutional import batch_norm, first_conv, quantized_conv
from saq_jax.quantizers import Quantizer

_FEATURES = (16, 24, 32, 64, 96, 160, 320)
_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
# k k C_out, for depthwise kernels too.


class InvertedResidual(nn.Module):
  """A 1x1 convolution that expands, a depthwise 3x3 one, and a linear 1x1 one that reduces.

  Where the stride is 1 and the channels stay, the input is added. The variant for small images
  differs in three things: ReLU in the place of ReLU6; the first convolution is there without an
  expansion too; and where the stride is 1 and the channels change, the input is added after a
  1x1 convolution and a norm.

  Attributes:
    features: output channels.
    expansion: of the input channels, in between.
    strides: of the depthwise convolution.
    small_images: which of the two variants.
    padding: of the depthwise convolution.
    act: the quantizer of the inputs of all convolutions, or None.
    train: whether the norms use the batch's statistics.
    norm_eps: of the norms.
    dtype: of the computation.
  """

  features: int
  expansion: int
  strides: int
  small_images: bool
  padding: int | str
  act: Quantizer | None
  train: bool
  norm_eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, H, W, C] to [B, H/strides, W/strides, features]."""
    norm = batch_norm(self.train, self.norm_eps, self.dtype)
    conv = quantized_conv(self.act, self.dtype)
    relu = nn.relu if self.small_images else nn.relu6
    middle = x.shape[-1] * self.expansion
    y = x
    if self.small_images or self.expansion != 1:
      y = relu(norm(name='bn1')(conv(middle, (1, 1), name='conv1')(y)))
    depthwise = conv(
      middle,
      (3, 3),
      strides=self.strides,
      padding=self.padding,
      feature_group_count=middle,
      name='conv2',
    )
    y = relu(norm(name='bn2')(depthwise(y)))
    y = norm(name='bn3')(conv(self.features, (1, 1), name='conv3')(y))
    if self.strides != 1:
      return y
    if x.shape[-1] == self.features:
      return x + y
    if not self.small_images:
      return y
    return y + norm(name='shortcut_bn')(conv(self.features, (1, 1), name='shortcut_conv')(x))


class _MobileNet(nn.Module):
  """What both networks are: a 3x3 convolution, 17 blocks, a 1x1 convolution, a mean, a layer.

  `_strides` are those of the first convolution and of the stages.
  """

  first_kernel: ClassVar[str] = r'conv1/kernel'
  last_kernel: ClassVar[str]
  _small_images: ClassVar[bool]
  _strides: ClassVar[tuple[int, ...]]

  num_classes: int
  act: Quantizer | None = None
  last_act: Quantizer | None = None
  first_act: Quantizer | None = None
  norm_eps: float = 1e-5
  remat: bool = False
  dtype: Any = None

  @property
  def _padding(self) -> int | str:
    """Of the 3x3 convolutions, as `Conv` takes it."""
    return 1

  def _block_name(self, stage: int, i: int) -> str:
    """Of block i of a stage, which count from 1."""
    raise NotImplementedError

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, num_classes]."""
    norm = batch_norm(train, self.norm_eps, self.dtype)
    relu = nn.relu if self._small_images else nn.relu6
    first = first_conv(self.first_act, self.dtype)(
      32, (3, 3), strides=self._strides[0], padding=self._padding, name='conv1'
    )
    x = relu(norm(name='bn1')(first(x)))
    block = nn.remat(InvertedResidual) if self.remat else InvertedResidual
    for stage, (features, blocks) in enumerate(zip(_FEATURES, _BLOCKS), 1):
      for i in range(blocks):
        x = block(
          features=features,
          expansion=1 if stage == 1 else 6,
          strides=self._strides[stage] if i == 0 else 1,
          small_images=self._small_images,
          padding=self._padding,
          act=self.act,
          train=train,
          norm_eps=self.norm_eps,
          dtype=self.dtype,
          name=self._block_name(stage, i),
        )(x)
    widening = quantized_conv(self.act, self.dtype)(1280, (1, 1), name='conv2')
    x = relu(norm(name='bn2')(widening(x)))
    last = Dense(
      self.num_classes,
      dtype=self.dtype,
      input_quantizer=self.last_act,
      name=self.last_kernel.split('/')[0],
    )
    return last(jnp.mean(x, axis=(1, 2)))


class MobileNetV2(_MobileNet):
  """MobileNetV2 for ImageNet.

  Weights are quantized from outside, by rules over the paths, for which the class names its
  ends. An unsigned `act` clips the outputs of the linear bottlenecks at zero, as it does in the
  authors' networks.

  Attributes:
    num_classes: outputs.
    act: the quantizer of the inputs of all convolutions but the first, or None.
    last_act: the quantizer of the last layer's input, or None.
    first_act: the quantizer of the images, made signed here; None leaves them as they are.
    norm_eps: of all norms.
    remat: compute the blocks' activations again in the backward pass, instead of keeping them.
    dtype: of the computation; None follows the parameters.
    padding: of the 3x3 convolutions. 'torch' is one on each side, 'same' is TensorFlow's, which
      puts less on the left and on top where the stride is 2.

  Raises:
    ValueError: if there is no such padding.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model, x = MobileNetV2(num_classes=10), jnp.zeros((2, 32, 32, 3))
    >>> init = lambda: model.init_with_output(jax.random.key(0), x, train=False)
    >>> logits, variables = jax.eval_shape(init)
    >>> logits.shape
    (2, 10)
  """

  last_kernel: ClassVar[str] = r'fc/kernel'
  _small_images: ClassVar[bool] = False
  _strides: ClassVar[tuple[int, ...]] = (2, 1, 2, 2, 2, 1, 2, 1)

  padding: Literal['torch', 'same'] = 'torch'

  @property
  def _padding(self) -> int | str:
    if self.padding not in ('torch', 'same'):
      raise ValueError(f"MobileNetV2(padding={self.padding!r}): take 'torch' or 'same'.")
    return 1 if self.padding == 'torch' else 'SAME'

  def _block_name(self, stage: int, i: int) -> str:
    return f'layer{stage}_{i}'


class MobileNetV2Cifar(_MobileNet):
  """MobileNetV2 for images of 32x32.

  Against the one for ImageNet it has stride 1 in the first convolution and in the second stage,
  ReLU in the place of ReLU6, and the blocks' variant for small images.

  Attributes:
    num_classes: outputs.
    act: the quantizer of the inputs of all convolutions but the first, or None.
    last_act: the quantizer of the last layer's input, or None.
    first_act: the quantizer of the images, made signed here; None leaves them as they are.
    norm_eps: of all norms.
    remat: compute the blocks' activations again in the backward pass, instead of keeping them.
    dtype: of the computation; None follows the parameters.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model, x = MobileNetV2Cifar(num_classes=100), jnp.zeros((2, 32, 32, 3))
    >>> init = lambda: model.init_with_output(jax.random.key(0), x, train=False)
    >>> logits, variables = jax.eval_shape(init)
    >>> logits.shape
    (2, 100)
  """

  last_kernel: ClassVar[str] = r'linear/kernel'
  _small_images: ClassVar[bool] = True
  _strides: ClassVar[tuple[int, ...]] = (1, 1, 1, 2, 2, 1, 2, 1)

  def _block_name(self, stage: int, i: int) -> str:
    return f'layers_{sum(_BLOCKS[: stage - 1]) + i}'

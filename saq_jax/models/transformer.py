"""What the transformers share: the block, the patch embedding and the head."""

import functools
from typing import Any

import flax.linen as nn
from jax import Array

from saq_jax.attention import (
  Implementation,
  Mlp,
  SelfAttention,
  StochasticDepth,
  kernel_init,
  layer_norm,
)
from saq_jax.layers import Conv, Dense, with_sign
from saq_jax.quantizers import Quantizer


class TransformerBlock(nn.Module):
  """Self-attention and an MLP, each after a norm and added to what it came from.

  Attributes:
    heads: of the attention.
    mlp_ratio: hidden channels of the MLP over channels.
    act: the quantizer of all operands of products, or None; its sign is set inside.
    dropout: the rate after the attention's projection and the MLP's layers.
    attn_dropout: the rate on the attention's probabilities.
    drop_path: the rate at which each of the two branches is dropped.
    norm_eps: of the norms.
    implementation: of `jax.nn.dot_product_attention`.
    dtype: of the computation.
  """

  heads: int
  mlp_ratio: int
  act: Quantizer | None
  dropout: float
  attn_dropout: float
  drop_path: float
  norm_eps: float
  implementation: Implementation
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Maps tokens [B, ..., C] to the same shape."""
    norm = functools.partial(layer_norm, self.norm_eps, self.dtype)
    y = self.attend(norm(name='norm1')(x), train)
    x = x + StochasticDepth(self.drop_path)(y, train=train)
    mlp = Mlp(self.mlp_ratio * x.shape[-1], self.act, self.dropout, self.dtype, name='mlp')
    return x + StochasticDepth(self.drop_path)(mlp(norm(name='norm2')(x), train=train), train=train)

  @nn.nowrap
  def attend(self, x: Array, train: bool) -> Array:
    """Lets all tokens of an image attend to each other.

    Args:
      x: [B, N, C].
      train: whether dropout is active.

    Returns:
      An array of the same shape.
    """
    return self.attention(SelfAttention)(x, train=train)

  @nn.nowrap
  def attention(self, kind: type[SelfAttention]) -> SelfAttention:
    """Makes the attention of the block.

    Args:
      kind: its class.

    Returns:
      The module 'attn'.
    """
    return kind(
      self.heads,
      self.act,
      dropout=self.dropout,
      attn_dropout=self.attn_dropout,
      implementation=self.implementation,
      dtype=self.dtype,
      name='attn',
    )


def embed_patches(
  images: Array, patch: int, width: int, first_act: Quantizer | None, dtype: Any
) -> Array:
  """Maps each patch of an image to a token, inside of a compact method.

  Args:
    images: [B, H, W, C].
    patch: side of a patch in pixels.
    width: channels of a token.
    first_act: the quantizer of the images, made signed here; None leaves them.
    dtype: of the computation.

  Returns:
    [B, H/patch, W/patch, width], of the module 'patch_embed'.

  Raises:
    ValueError: if patches do not tile the images.
  """
  if images.shape[1] % patch or images.shape[2] % patch:
    raise ValueError(
      f'images of {images.shape[1]}x{images.shape[2]} pixels: patches of patch={patch} do not tile '
      'them.'
    )
  return Conv(
    width,
    (patch, patch),
    strides=patch,
    padding='VALID',
    dtype=dtype,
    input_quantizer=with_sign(first_act, True),
    name='patch_embed',
  )(images)


def head(num_classes: int, last_act: Quantizer | None, dtype: Any, name: str = 'head') -> Dense:
  """Makes a last layer.

  Args:
    num_classes: outputs.
    last_act: the quantizer of its input, made signed here; or None.
    dtype: of the computation.
    name: of the module.

  Returns:
    The module.
  """
  return Dense(
    num_classes,
    dtype=dtype,
    kernel_init=kernel_init,
    input_quantizer=with_sign(last_act, True),
    name=name,
  )

"""Swin Transformers (Liu et al., arXiv 2103.14030).

Paths: 'patch_embed', 'patch_norm', 'stage0_0/attn/q', 'stage0_0/mlp/fc1', 'merge0/reduction',
'norm', 'head'. What is quantized is said in `saq_jax.attention`.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from saq_jax.attention import Implementation, kernel_init, layer_norm
from saq_jax.layers import Dense, with_sign
from saq_jax.models.transformer import TransformerBlock, embed_patches, head
from saq_jax.models.vit import resize_grid
from saq_jax.models.windows import WindowAttention, in_windows
from saq_jax.quantizers import Quantizer

SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
  {
    'T': MappingProxyType({'width': 96, 'depths': (2, 2, 6, 2), 'heads': (3, 6, 12, 24)}),
    'S': MappingProxyType({'width': 96, 'depths': (2, 2, 18, 2), 'heads': (3, 6, 12, 24)}),
    'B': MappingProxyType({'width': 128, 'depths': (2, 2, 18, 2), 'heads': (4, 8, 16, 32)}),
  }
)


class SwinBlock(TransformerBlock):
  """A block whose attention stays in windows of the map.

  A map that windows do not tile is padded after the norm, with zeros on the right and below. One
  that is no larger than a window is a single window of the map's smaller side and is not shifted.

  Attributes:
    window: side of a window in pixels of the map.
    shifted: whether windows begin half a window away from the map's corner, around its edges. All
      other fields are those of `TransformerBlock`.
  """

  window: int
  shifted: bool

  @nn.nowrap
  def attend(self, x: Array, train: bool) -> Array:
    """Lets the tokens of a window attend to each other.

    Args:
      x: [B, H, W, C].
      train: whether dropout is active.

    Returns:
      An array of the same shape.
    """
    windows, mask, put_back = in_windows(x, self.window, self.shifted)
    return put_back(self.attention(WindowAttention)(windows, mask, train=train))


class PatchMerging(nn.Module):
  """Halves a map: the four pixels of each 2x2 square side by side, a norm, and a dense layer.

  Attributes:
    act: the quantizer of the dense layer's input, made signed here; or None.
    norm_eps: of the norm.
    dtype: of the computation.
  """

  act: Quantizer | None
  norm_eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, H, W, C] to [B, ceil(H/2), ceil(W/2), 2C]."""
    x = jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)])
    corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    x = layer_norm(self.norm_eps, self.dtype, name='norm')(jnp.concatenate(corners, axis=-1))
    return Dense(
      x.shape[-1] // 2,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=kernel_init,
      input_quantizer=with_sign(self.act, True),
      name='reduction',
    )(x)


class Swin(nn.Module):
  """Swin: stages of attention in windows, of which every other block's are shifted.

  Images of any size that patches tile are taken.

  Attributes:
    num_classes: outputs.
    patch: side of a patch in pixels.
    width: channels of the first stage; each next one has twice as many.
    depths: blocks of each stage.
    heads: of the attention of each stage.
    window: side of a window in pixels of a stage's map.
    mlp_ratio: hidden channels of the MLPs over channels.
    dropout: the rate after the patch embedding, the attentions' projections and the MLPs' layers.
      Whatever is dropped in training takes the random key 'dropout'.
    attn_dropout: the rate on the attention's probabilities.
    drop_path: the rate at which the last block's branches are dropped; the first block's is 0, and
      between them it grows linearly.
    remat: whether blocks are computed anew in the backward pass, which saves memory.
    act: the quantizer of all operands of products between first and last layer, or None. The sign
      is set by the model: unsigned for the attention's probabilities, signed for all else.
    last_act: the quantizer of the head's input, made signed here; or None.
    first_act: the quantizer of the images, made signed here; None leaves them as they are.
    norm_eps: of all norms.
    implementation: of `jax.nn.dot_product_attention`, used where nothing is quantized. In training
      'cudnn' takes windows of an even side only, since they come with a bias.
    dtype: of the computation; None follows the parameters.

  Raises:
    ValueError: if patches do not tile the images, if there are not as many heads as depths, if a
      table of relative positions is that of another window, or if heads do not divide channels.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model = Swin(num_classes=10, width=4, depths=(2, 1), heads=(1, 2), window=2)
    >>> x = jnp.zeros((2, 16, 16, 3))
    >>> init = lambda key: model.init_with_output(key, x, train=False)
    >>> logits, variables = jax.eval_shape(init, jax.random.key(0))
    >>> logits.shape
    (2, 10)
  """

  first_kernel: ClassVar[str] = r'patch_embed/kernel'
  last_kernel: ClassVar[str] = r'head/kernel'

  num_classes: int
  patch: int = 4
  width: int = 96
  depths: tuple[int, ...] = (2, 2, 6, 2)
  heads: tuple[int, ...] = (3, 6, 12, 24)
  window: int = 7
  mlp_ratio: int = 4
  dropout: float = 0.0
  attn_dropout: float = 0.0
  drop_path: float = 0.0
  remat: bool = False
  act: Quantizer | None = None
  last_act: Quantizer | None = None
  first_act: Quantizer | None = None
  norm_eps: float = 1e-5
  implementation: Implementation = None
  dtype: Any = None

  @classmethod
  def of_size(cls, size: str, num_classes: int, **fields: Any) -> 'Swin':
    """Builds a network of a published size.

    Args:
      size: 'T', 'S' or 'B'.
      num_classes: outputs.
      **fields: any other field.

    Returns:
      The network.

    Raises:
      ValueError: if there is no such size.

    Example:
      >>> Swin.of_size('B', num_classes=10).heads
      (4, 8, 16, 32)
    """
    if size not in SIZES:
      raise ValueError(f'Swin.of_size({size!r}): take one of {", ".join(SIZES)}.')
    return cls(num_classes=num_classes, **{**SIZES[size], **fields})

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, num_classes]."""
    if len(self.heads) != len(self.depths):
      raise ValueError(f'Swin(depths={self.depths}, heads={self.heads}): of different lengths.')
    norm = functools.partial(layer_norm, self.norm_eps, self.dtype)
    x = embed_patches(x, self.patch, self.width, self.first_act, self.dtype)
    x = nn.Dropout(self.dropout)(norm(name='patch_norm')(x), deterministic=not train)
    for stage in range(len(self.depths)):
      if stage > 0:
        x = PatchMerging(self.act, self.norm_eps, self.dtype, name=f'merge{stage - 1}')(x)
      x = self._stage(stage, x, train)
    x = jnp.mean(norm(name='norm')(x), axis=(1, 2))
    return head(self.num_classes, self.last_act, self.dtype)(x)

  def _stage(self, stage: int, x: Array, train: bool) -> Array:
    """The blocks of one stage."""
    block = nn.remat(SwinBlock, static_argnums=(2,)) if self.remat else SwinBlock
    before = sum(self.depths[:stage])
    for i in range(self.depths[stage]):
      x = block(
        heads=self.heads[stage],
        window=self.window,
        shifted=i % 2 == 1,
        mlp_ratio=self.mlp_ratio,
        act=self.act,
        dropout=self.dropout,
        attn_dropout=self.attn_dropout,
        drop_path=self.drop_path * (before + i) / max(sum(self.depths) - 1, 1),
        norm_eps=self.norm_eps,
        implementation=self.implementation,
        dtype=self.dtype,
        name=f'stage{stage}_{i}',
      )(x, train)
    return x


def resize_relative_bias(table: Array, window: int) -> Array:
  """Resamples a table of relative positions for windows of another size.

  Args:
    table: [(2w - 1)^2, heads]: the parameter 'relative_bias' of windows of side w.
    window: the side wanted.

  Returns:
    [(2 window - 1)^2, heads] of the same dtype, by `saq_jax.models.vit.resize_grid`.

  Raises:
    ValueError: if the table is not that of a square.

  Example:
    >>> import jax.numpy as jnp
    >>> resize_relative_bias(jnp.zeros((13 * 13, 3)), window=12).shape
    (529, 3)
  """
  return resize_grid(jnp.asarray(table), (2 * window - 1, 2 * window - 1))

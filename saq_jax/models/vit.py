"""Vision Transformers (Dosovitskiy et al., arXiv 2010.11929) and distilled DeiT (2012.12877).

Paths: 'patch_embed', 'pos_embed', 'block_0/attn/q', 'block_0/mlp/fc1', 'norm', 'head'. What is
quantized is said in `saq_jax.attention`.
"""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from saq_jax.attention import Implementation, kernel_init, layer_norm
from saq_jax.models.transformer import TransformerBlock, embed_patches, head
from saq_jax.quantizers import Quantizer

SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
  {
    'Ti': MappingProxyType({'width': 192, 'depth': 12, 'heads': 3}),
    'S': MappingProxyType({'width': 384, 'depth': 12, 'heads': 6}),
    'B': MappingProxyType({'width': 768, 'depth': 12, 'heads': 12}),
    'L': MappingProxyType({'width': 1024, 'depth': 24, 'heads': 16}),
  }
)


class ViT(nn.Module):
  """ViT, and DeiT with a distillation token.

  Images of any size that patches tile are taken; the position embedding has the size that those
  given to `init` ask for. In `distilled` networks the result is the mean of the two heads' logits,
  as DeiT evaluates; here also in training, since there is no teacher (this project's choice).

  Attributes:
    num_classes: outputs.
    patch: side of a patch in pixels.
    width: channels.
    depth: blocks.
    heads: of each attention; a divisor of the width.
    mlp_ratio: hidden channels of the MLPs over width.
    distilled: whether there are a 'dist_token' and a 'head_dist', as in distilled DeiT.
    dropout: the rate after the position embedding, the attentions' projections and the MLPs'
      layers. Whatever is dropped in training takes the random key 'dropout'.
    attn_dropout: the rate on the attention's probabilities.
    drop_path: the rate at which the last block's branches are dropped; the first block's is 0, and
      between them it grows linearly.
    remat: whether blocks are computed anew in the backward pass, which saves memory.
    act: the quantizer of all operands of products between first and last layer, or None. The sign
      is set by the model: unsigned for the attention's probabilities, signed for all else.
    last_act: the quantizer of the heads' inputs, made signed here; or None.
    first_act: the quantizer of the images, made signed here; None leaves them as they are.
    norm_eps: of all norms.
    implementation: of `jax.nn.dot_product_attention`, used where nothing is quantized.
    dtype: of the computation; None follows the parameters.

  Raises:
    ValueError: if patches do not tile the images, if the position embedding is that of another
      grid, or if the heads do not divide the width.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> model = ViT(num_classes=10, patch=4, width=8, depth=2, heads=2)
    >>> x = jnp.zeros((2, 8, 8, 3))
    >>> init = lambda key: model.init_with_output(key, x, train=False)
    >>> logits, variables = jax.eval_shape(init, jax.random.key(0))
    >>> logits.shape
    (2, 10)
  """

  first_kernel: ClassVar[str] = r'patch_embed/kernel'
  last_kernel: ClassVar[str] = r'(head|head_dist)/kernel'

  num_classes: int
  patch: int = 16
  width: int = 768
  depth: int = 12
  heads: int = 12
  mlp_ratio: int = 4
  distilled: bool = False
  dropout: float = 0.0
  attn_dropout: float = 0.0
  drop_path: float = 0.0
  remat: bool = False
  act: Quantizer | None = None
  last_act: Quantizer | None = None
  first_act: Quantizer | None = None
  norm_eps: float = 1e-6
  implementation: Implementation = None
  dtype: Any = None

  @classmethod
  def of_size(cls, size: str, num_classes: int, **fields: Any) -> 'ViT':
    """Builds a network of a published size.

    Args:
      size: 'Ti', 'S', 'B' or 'L'.
      num_classes: outputs.
      **fields: any other field.

    Returns:
      The network.

    Raises:
      ValueError: if there is no such size.

    Example:
      >>> ViT.of_size('S', num_classes=10, patch=32).width
      384
    """
    if size not in SIZES:
      raise ValueError(f'ViT.of_size({size!r}): take one of {", ".join(SIZES)}.')
    return cls(num_classes=num_classes, **{**SIZES[size], **fields})

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Maps images [B, H, W, C] to logits [B, num_classes]."""
    x = embed_patches(x, self.patch, self.width, self.first_act, self.dtype)
    x = self._with_tokens(x)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    block = nn.remat(TransformerBlock, static_argnums=(2,)) if self.remat else TransformerBlock
    for i in range(self.depth):
      x = block(
        heads=self.heads,
        mlp_ratio=self.mlp_ratio,
        act=self.act,
        dropout=self.dropout,
        attn_dropout=self.attn_dropout,
        drop_path=self.drop_path * i / max(self.depth - 1, 1),
        norm_eps=self.norm_eps,
        implementation=self.implementation,
        dtype=self.dtype,
        name=f'block_{i}',
      )(x, train)
    x = layer_norm(self.norm_eps, self.dtype, name='norm')(x)
    last = functools.partial(head, self.num_classes, self.last_act, self.dtype)
    logits = last('head')(x[:, 0])
    return (logits + last('head_dist')(x[:, 1])) / 2 if self.distilled else logits

  def _with_tokens(self, x: Array) -> Array:
    """Tokens [B, T, C] of the patches [B, h, w, C], after the class token, with positions."""
    batch, *grid, width = x.shape
    names = ('cls_token', 'dist_token') if self.distilled else ('cls_token',)
    prefix = [self.param(name, kernel_init, (1, 1, width)) for name in names]
    patches = math.prod(grid)
    held: Array | None = self.get_variable('params', 'pos_embed')
    if held is not None and held.shape[1] != len(prefix) + patches:
      old = held.shape[1] - len(prefix)
      side = math.isqrt(max(old, 0))
      found = f'{side}x{side}' if side**2 == old else str(old)
      raise ValueError(
        f'the position embedding is that of {found} patches, and these images have '
        f'{grid[0]}x{grid[1]}. Weights are interpolated when they are loaded: give the loader the '
        'size of the images, or use saq_jax.models.vit.resize_position_embedding.'
      )
    positions = self.param('pos_embed', kernel_init, (1, len(prefix) + patches, width))
    first = [jnp.broadcast_to(token.astype(x.dtype), (batch, 1, width)) for token in prefix]
    x = jnp.concatenate([*first, x.reshape(batch, patches, width)], axis=1)
    return x + positions.astype(x.dtype)


def resize_position_embedding(pos_embed: Array, grid: tuple[int, int], prefix: int) -> Array:
  """Resamples a position embedding for images of another size.

  Args:
    pos_embed: [1, prefix + n^2, C]: entries of the prefix, then those of a square grid by rows.
    grid: rows and columns of patches wanted.
    prefix: entries before the grid, which stay: 1, and 2 in distilled networks.

  Returns:
    [1, prefix + rows columns, C] of the same dtype, by `resize_grid`.

  Raises:
    ValueError: if the old grid is not a square.

  Example:
    >>> import jax.numpy as jnp
    >>> resize_position_embedding(jnp.zeros((1, 1 + 14 * 14, 8)), (24, 20), prefix=1).shape
    (1, 481, 8)
  """
  pos_embed = jnp.asarray(pos_embed)
  resized = resize_grid(pos_embed[0, prefix:], grid)
  return jnp.concatenate([pos_embed[:, :prefix], resized[None]], axis=1)


def resize_grid(rows: Array, grid: tuple[int, int]) -> Array:
  """Resamples a square grid bicubically, with antialiasing where it shrinks.

  The cubic is Keys's with a = -1/2 and is widened where the grid shrinks, as in PyTorch's
  `interpolate(..., mode='bicubic', antialias=True)`.

  Args:
    rows: [n^2, C]: the entries of the grid by rows.
    grid: rows and columns wanted.

  Returns:
    [rows columns, C] of the same dtype; `rows` itself where the grid is the one wanted.

  Raises:
    ValueError: if the old grid is not a square.

  Example:
    >>> import jax.numpy as jnp
    >>> resize_grid(jnp.ones((9, 1)), (1, 2)).shape
    (2, 1)
  """
  count, width = rows.shape
  side = math.isqrt(count)
  if side**2 != count:
    raise ValueError(f'{count} entries are not those of a square grid, and cannot be resized.')
  if grid == (side, side):
    return rows
  wide = rows.reshape(side, side, width).astype(jnp.promote_types(rows.dtype, jnp.float32))
  resized = jax.image.resize(wide, (*grid, width), 'bicubic', antialias=True)
  return resized.reshape(-1, width).astype(rows.dtype)

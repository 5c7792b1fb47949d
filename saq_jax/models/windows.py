"""Windows of a map, their attention mask, and attention in them, as Swin has it (2103.14030)."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from saq_jax.attention import SelfAttention, kernel_init

_FAR = -100.0  # Joins the logits of pixels that a window holds but that are not neighbours.


class WindowAttention(SelfAttention):
  """Self-attention in windows, with a learnt bias for each relative position.

  With `i` and `j` at rows and columns `(r, c)` of a window of side w, the logits of head h get

      table[(r_i - r_j + w - 1)(2w - 1) + c_i - c_j + w - 1, h]

  the table being the parameter 'relative_bias' [(2w-1)^2, heads]. The fields are those of
  `saq_jax.attention.SelfAttention`.
  """

  @nn.compact
  def __call__(self, x: Array, bias: Array | None = None, *, train: bool) -> Array:
    """Maps windows [B, n, w^2, C] to the same shape; the bias is [n, 1, w^2, w^2] or None."""
    window = math.isqrt(x.shape[-2])
    entries = (2 * window - 1) ** 2
    held: Array | None = self.get_variable('params', 'relative_bias')
    if held is not None and held.shape[0] != entries:
      raise ValueError(
        f'the table of relative positions has {held.shape[0]} rows, and a window of '
        f'{window}x{window} pixels asks for {entries}. Weights are interpolated when they are '
        'loaded: give the loader the size of the images, or use '
        'saq_jax.models.swin.resize_relative_bias.'
      )
    table = self.param('relative_bias', kernel_init, (entries, self.heads))
    relative = table[_relative_index(window)].transpose(2, 0, 1)
    return super().__call__(x, relative if bias is None else relative + bias, train=train)


def in_windows(
  x: Array, window: int, shifted: bool
) -> tuple[Array, Array | None, Callable[[Array], Array]]:
  """Cuts a map into windows.

  A map that windows do not tile is padded with zeros on the right and below. One that is no larger
  than a window along a side has windows of its smaller side, and they are not shifted.

  Args:
    x: [B, H, W, C].
    window: side of a window.
    shifted: whether the windows begin half a window away from the corner, around the edges.

  Returns:
    The windows [B, n, w^2, C]; what joins their logits [n, 1, w^2, w^2], or None where all pixels
    of a window are neighbours; and the function from windows to the map [B, H, W, C].

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 7, 8, 3))
    >>> windows, mask, put_back = in_windows(x, 4, shifted=True)
    >>> windows.shape, mask.shape, put_back(windows).shape
    ((2, 4, 16, 3), (4, 1, 16, 16), (2, 7, 8, 3))
  """
  batch, height, width, channels = x.shape
  whole = min(height, width) <= window
  window = min(height, width) if whole else window
  shift = window // 2 if shifted and not whole else 0
  x = jnp.pad(x, [(0, 0), (0, -height % window), (0, -width % window), (0, 0)])
  x = jnp.roll(x, (-shift, -shift), (1, 2))
  rows, columns = x.shape[1] // window, x.shape[2] // window

  def put_back(y: Array) -> Array:
    y = y.reshape(batch, rows, columns, window, window, channels).swapaxes(2, 3)
    y = y.reshape(batch, rows * window, columns * window, channels)
    return jnp.roll(y, (shift, shift), (1, 2))[:, :height, :width]

  x = x.reshape(batch, rows, window, columns, window, channels).swapaxes(2, 3)
  x = x.reshape(batch, rows * columns, window**2, channels)
  return x, _mask(rows, columns, window, shift) if shift else None, put_back


def _relative_index(window: int) -> np.ndarray:
  """The row of the table of relative positions for each pair of pixels of a window."""
  row, column = (x.ravel() for x in np.indices((window, window)))
  rows, columns = (x[:, None] - x + window - 1 for x in (row, column))
  return rows * (2 * window - 1) + columns


def _mask(rows: int, columns: int, window: int, shift: int) -> Array:
  """What joins the logits of shifted windows [rows columns, 1, w^2, w^2]: 0 among neighbours.

  After the shift the last window of each row and column holds pixels from both ends of the map.
  """
  wrapped = [np.arange(n * window) >= n * window - shift for n in (rows, columns)]
  side = 2 * wrapped[0][:, None] + wrapped[1]
  side = side.reshape(rows, window, columns, window).swapaxes(1, 2).reshape(-1, 1, window**2)
  return jnp.asarray(np.where(side[..., None] == side[:, :, None], 0.0, _FAR), jnp.float32)

"""The part of an image that is taken, and how it is brought to the size that the model sees."""

import dataclasses
import math
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from saq_jax.data.decode import Box, from_pil, to_pil

Interpolation = Literal['bilinear', 'bicubic', 'fast']

_TRIES = 10
DRAWS = 4 * _TRIES
_LOG_RATIO = math.log(4 / 3)
_FILTERS = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}

# Images are spread over threads and processes already; more threads an image only get in the way.
cv2.setNumThreads(0)


@dataclasses.dataclass(frozen=True)
class Resizing:
  """How images come to one size.

  Attributes:
    size: side of the square that the model sees.
    resize: to evaluate, the shorter side before the centre is cut out; at least `size`.
    crop_scale: to train, least and largest share of the area that a random crop takes.
    interpolation: 'bilinear' or 'bicubic' with PIL's filters, which widen where an image shrinks,
      as torchvision and timm have them; 'fast' trains with a bilinear one that does not, as
      TensorFlow's pipelines do, and evaluates as 'bilinear'.
  """

  size: int = 224
  resize: int = 256
  crop_scale: tuple[float, float] = (0.08, 1.0)
  interpolation: Interpolation = 'bilinear'


def random_box(width: int, height: int, draws: np.ndarray, scale: tuple[float, float]) -> Box:
  """Chooses a part of an image: Inception's random crop (arXiv 1409.4842), as torchvision's.

  Ten times, an area of `scale` times the image's and a log-uniform aspect ratio from 3/4 to 4/3
  are drawn; the first pair that fits is put at a uniform place. Where none fits: the largest part
  in the centre whose aspect ratio is within those limits.

  Args:
    width: of the image, pixels.
    height: of the image, pixels.
    draws: uniform numbers in [0, 1), [40].
    scale: least and largest share of the area.

  Returns:
    (left, top, right, bottom) in pixels.

  Example:
    >>> random_box(400, 300, np.full(40, 0.5), (0.5, 0.5))
    (78, 28, 323, 273)
  """
  for share, ratio, x, y in draws.reshape(_TRIES, 4).tolist():
    area = width * height * (scale[0] + share * (scale[1] - scale[0]))
    aspect = math.exp((2 * ratio - 1) * _LOG_RATIO)
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = math.floor(x * (width - w + 1)), math.floor(y * (height - h + 1))
      return left, top, left + w, top + h
  limit = 4 / 3
  w, h = min(width, round(height * limit)), min(height, round(width * limit))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def resize(
  pixels: np.ndarray,
  width: int,
  height: int,
  interpolation: Interpolation,
  out: np.ndarray | None = None,
) -> np.ndarray:
  """Brings an image to another size.

  'bilinear' and 'bicubic' are PIL's: the filter's width is that of an output pixel where the image
  shrinks. 'fast' weighs the four nearest pixels, whatever the scale: with u = (j + 1/2) W/w - 1/2,

      y[j] = (1 - u + floor(u)) x[floor(u)] + (u - floor(u)) x[floor(u) + 1]

  along both axes, the edges repeated (the formula of TensorFlow's `tf.image.resize`).

  Args:
    pixels: uint8 [H, W, C].
    width: w, pixels.
    height: of the result, pixels.
    interpolation: 'bilinear', 'bicubic' or 'fast'.
    out: uint8 [height, width, C], contiguous, to hold the result; None makes it anew.

  Returns:
    uint8 [height, width, C].

  Example:
    >>> resize(np.array([[[0], [100]]], np.uint8), 4, 1, 'fast')[0, :, 0].tolist()
    [0, 25, 75, 100]
  """
  out = np.empty((height, width, pixels.shape[-1]), np.uint8) if out is None else out
  if interpolation == 'fast':
    cv2.resize(pixels, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
  else:
    out[...] = from_pil(to_pil(pixels).resize((width, height), _FILTERS[interpolation]))
  return out


def centre(pixels: np.ndarray, size: int, shorter: int, interpolation: Interpolation) -> np.ndarray:
  """Scales the shorter side of an image and cuts out the centre, as torchvision does.

  Args:
    pixels: uint8 [H, W, C].
    size: side of the square that is cut out.
    shorter: what the shorter side is scaled to, >= size; the other one in proportion, rounded down.
    interpolation: as in `resize`; 'fast' stands for 'bilinear' here.

  Returns:
    uint8 [size, size, C].
  """
  height, width, _ = pixels.shape
  short = min(height, width)
  height, width = int(shorter * height / short), int(shorter * width / short)
  kind: Interpolation = 'bilinear' if interpolation == 'fast' else interpolation
  scaled = resize(pixels, width, height, kind)
  top, left = round((height - size) / 2), round((width - size) / 2)
  return scaled[top : top + size, left : left + size]

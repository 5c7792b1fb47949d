"""Images of any size, decoded and brought to one size when a batch asks for them."""

import concurrent.futures
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

Batch = dict[str, np.ndarray]
Box = tuple[float, float, float, float]

_TRIES = 10
_LOG_RATIO = math.log(4 / 3)
_FILTERS = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}


class RecordError(ValueError):
  """A record that cannot be used; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Resizing:
  """How images come to one size.

  Attributes:
    size: side of the square that the model sees.
    resize: to evaluate, the shorter side before the centre is cut out; at least `size`.
    crop_scale: to train, least and largest share of the area that a random crop takes.
    interpolation: 'bilinear' or 'bicubic'.
  """

  size: int = 224
  resize: int = 256
  crop_scale: tuple[float, float] = (0.08, 1.0)
  interpolation: Literal['bilinear', 'bicubic'] = 'bilinear'


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
  """A labelled set of encoded images.

  Attributes:
    records: a random-access sequence of {'image': bytes, 'label': int}.
    num_classes: the number of classes.
    channels: 3, or 1 for grey images.
    resizing: how images come to one size.
  """

  records: Sequence[dict[str, Any]]
  num_classes: int
  channels: int
  resizing: Resizing

  def __len__(self) -> int:
    return len(self.records)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """The shape of each image of a batch, [H, W, C]."""
    return self.resizing.size, self.resizing.size, self.channels

  def train_batch(self, indices: np.ndarray, seed: int, positions: Sequence[int]) -> Batch:
    """Decodes examples and cuts a random part out of each, as a pure function of the arguments.

    Args:
      indices: of the examples, [b].
      seed: of the crops.
      positions: of the examples in the whole stream, [b]; with the seed they give the crops.

    Returns:
      {'image': uint8 [b, size, size, C], 'label': int32 [b]}.

    Raises:
      RecordError: an image cannot be decoded, or a label is not a class.
    """

    def one(index: int, position: int) -> tuple[np.ndarray, int]:
      image, label = self._decode(index)
      draws = _uniform(seed, position, 4 * _TRIES)
      box = random_box(image.width, image.height, draws, self.resizing.crop_scale)
      return self._scaled(image, (self.resizing.size,) * 2, box), label

    return _stacked(one, indices, positions)

  def eval_batch(self, indices: np.ndarray) -> Batch:
    """Decodes examples, scales the shorter side to `resize` and cuts out the centre.

    Args:
      indices: of the examples, [b].

    Returns:
      As `train_batch`.

    Raises:
      RecordError: an image cannot be decoded, or a label is not a class.
    """

    def one(index: int) -> tuple[np.ndarray, int]:
      image, label = self._decode(index)
      short, size = min(image.size), self.resizing.size
      width, height = (int(self.resizing.resize * side / short) for side in image.size)
      pixels = self._scaled(image, (width, height), (0, 0, *image.size))
      top, left = (round((side - size) / 2) for side in (height, width))
      return pixels[top : top + size, left : left + size], label

    return _stacked(one, indices)

  def _decode(self, index: int) -> tuple[Image.Image, int]:
    """One image in its own size, in RGB or grey, and its label."""
    record = self.records[int(index)]
    label = int(record['label'])
    if not 0 <= label < self.num_classes:
      raise RecordError(f'record {index}: label {label} is not one of {self.num_classes} classes')
    try:
      image = Image.open(io.BytesIO(record['image']))
      return image.convert('L' if self.channels == 1 else 'RGB'), label
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
      raise RecordError(f'record {index}: its image cannot be decoded ({error})') from error

  def _scaled(self, image: Image.Image, size: tuple[int, int], box: Box) -> np.ndarray:
    """A part of an image at another size, uint8 [H, W, C]."""
    scaled = image.resize(size, _FILTERS[self.resizing.interpolation], box)
    return np.asarray(scaled).reshape(size[1], size[0], self.channels)


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
    (78.0, 28.0, 323.0, 273.0)
  """
  for share, ratio, x, y in draws.reshape(_TRIES, 4):
    area = width * height * (scale[0] + share * (scale[1] - scale[0]))
    aspect = math.exp((2 * ratio - 1) * _LOG_RATIO)
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = math.floor(x * (width - w + 1)), math.floor(y * (height - h + 1))
      return float(left), float(top), float(left + w), float(top + h)
  limit = 4 / 3
  w, h = min(width, round(height * limit)), min(height, round(width * limit))
  left, top = (width - w) // 2, (height - h) // 2
  return float(left), float(top), float(left + w), float(top + h)


def _uniform(seed: int, position: int, count: int) -> np.ndarray:
  """Uniform numbers in [0, 1) that belong to one place of the stream."""
  bits = np.random.Philox(np.random.SeedSequence((seed, position))).random_raw(count)
  return (bits >> np.uint64(11)) * 2.0**-53


def _stacked(one: Any, *columns: Sequence[int] | np.ndarray) -> Batch:
  """A batch of `one` at every row; PIL decodes and scales outside of Python's lock."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    images, labels = zip(*pool.map(one, *columns))
  return {'image': np.stack(images), 'label': np.array(labels, np.int32)}

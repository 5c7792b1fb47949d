"""RandAugment on the host: a few random operations an image, all of one strength."""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Resample = Literal['bilinear', 'bicubic']

_FILTERS = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}
_IMAGENET_MEAN = (124, 116, 104)
_LARGEST = 10.0
_DRAWS_A_LAYER = 4
_NORMAL = statistics.NormalDist()

# An image, a signed level in -1..1, and how pixels between and outside the image's own are found.
_Operation = Callable[[Image.Image, float, dict[str, Any]], Image.Image]


def _looked_up(value_of: Callable[[float, int], int]) -> _Operation:
  """An operation on each value by itself; it has no direction."""

  def operation(image: Image.Image, level: float, _: dict[str, Any]) -> Image.Image:
    table = [value_of(abs(level), value) for value in range(256)]
    return image.point(table * len(image.getbands()))

  return operation


def _enhanced(kind: Callable[[Image.Image], Any]) -> _Operation:
  """A blend of the image and one without colour, contrast, brightness or edges."""

  def operation(image: Image.Image, level: float, _: dict[str, Any]) -> Image.Image:
    return kind(image).enhance(1.0 + level * 0.9)

  return operation


def _moved(matrix: Callable[[float, int, int], tuple[float, ...]]) -> _Operation:
  """An affine map; `matrix` of level, width and height takes places of the result to the image."""

  def operation(image: Image.Image, level: float, how: dict[str, Any]) -> Image.Image:
    return image.transform(
      image.size, Image.Transform.AFFINE, matrix(level, image.width, image.height), **how
    )

  return operation


# The ranges are timm's. What acts on single values is a table of them, for Pillow 13 refuses to
# posterize to 0 bits, the end of that scale.
_OPERATIONS: dict[str, _Operation] = {
  'AutoContrast': lambda image, level, how: ImageOps.autocontrast(image),
  'Equalize': lambda image, level, how: ImageOps.equalize(image),
  'Invert': _looked_up(lambda level, value: 255 - value),
  'Rotate': lambda image, level, how: image.rotate(level * 30, **how),
  # 4 bits are cleared at first, 8 at last.
  'PosterizeIncreasing': _looked_up(lambda level, value: value & -(16 << int(level * 4))),
  'SolarizeIncreasing': _looked_up(
    lambda level, value: value if value < 256 - int(level * 256) else 255 - value
  ),
  'SolarizeAdd': _looked_up(
    lambda level, value: min(255, value + int(level * 110)) if value < 128 else value
  ),
  'ColorIncreasing': _enhanced(ImageEnhance.Color),
  'ContrastIncreasing': _enhanced(ImageEnhance.Contrast),
  'BrightnessIncreasing': _enhanced(ImageEnhance.Brightness),
  'SharpnessIncreasing': _enhanced(ImageEnhance.Sharpness),
  'ShearX': _moved(lambda level, width, height: (1, level * 0.3, 0, 0, 1, 0)),
  'ShearY': _moved(lambda level, width, height: (1, 0, 0, level * 0.3, 1, 0)),
  'TranslateXRel': _moved(lambda level, width, height: (1, 0, level * 0.45 * width, 0, 1, 0)),
  'TranslateYRel': _moved(lambda level, width, height: (1, 0, 0, 0, 1, level * 0.45 * height)),
}

OPERATIONS = tuple(_OPERATIONS)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """A random policy with two numbers to set (RandAugment, arXiv 1909.13719), as timm's and DeiT's.

  Each layer picks one of `OPERATIONS` uniformly and independently, and applies it with
  `probability`, with a fair sign and at the magnitude

      m = min(max(magnitude + std z, 0), 10),  z ~ N(0, 1)

  The defaults are timm's 'rand-m9-mstd0.5-inc1', with which DeiT (arXiv 2012.12877) trains.

  Attributes:
    magnitude: the mean of m, 0 to 10.
    std: the deviation of m before it is clipped, at least 0.
    layers: operations an image.
    probability: that a layer does anything.
    fill: the colour outside the image, 0..255: a value a channel, or one for all.
    resample: 'bilinear' or 'bicubic', where pixels move.

  Example:
    >>> augment = RandAugment(layers=1)
    >>> image = Image.new('RGB', (8, 8), (255, 0, 10))
    >>> augment(image, np.array([2.5 / 15, 0.0, 0.5, 0.0])).getpixel((0, 0))
    (0, 255, 245)
  """

  magnitude: float = 9.0
  std: float = 0.5
  layers: int = 2
  probability: float = 0.5
  fill: tuple[int, ...] = _IMAGENET_MEAN
  resample: Resample = 'bicubic'

  def __post_init__(self) -> None:
    _check_magnitude(self.magnitude)
    if not 0 <= self.std < math.inf:
      raise ValueError(f'std must be finite and at least 0, got {self.std}')
    if self.layers < 0:
      raise ValueError(f'layers must be 0 or more, got {self.layers}')
    if not 0 <= self.probability <= 1:
      raise ValueError(f'probability must be in 0..1, got {self.probability}')
    _check_pixels(self.fill, self.resample)

  @property
  def num_draws(self) -> int:
    """How many uniform numbers one image needs."""
    return _DRAWS_A_LAYER * self.layers

  def __call__(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
    """Augments an image, as a pure function of it and of uniform numbers.

    Args:
      image: in mode RGB or L, of any size; it stays as it is.
      draws: uniform numbers in [0, 1), [num_draws]; four a layer choose the operation, whether
        it is applied, its magnitude and its sign.

    Returns:
      An image of the same mode and size; the very one given where no layer does anything.

    Raises:
      ValueError: the image has another mode, or the draws another shape.
    """
    _check_mode(image)
    if np.shape(draws) != (self.num_draws,):
      raise ValueError(f'draws must be [{self.num_draws}] (num_draws), got {np.shape(draws)}')
    for choice, use, size, side in np.reshape(draws, (-1, _DRAWS_A_LAYER)).tolist():
      if use < self.probability:
        # 0 stands for all below the generator's step of 2^-53; the normal law has no value there.
        m = self.magnitude + self.std * _NORMAL.inv_cdf(max(size, 2.0**-54))
        m = min(max(m, 0.0), _LARGEST)
        name = OPERATIONS[math.floor(choice * len(OPERATIONS))]
        image = apply(name, image, m, 1 if side < 0.5 else -1, self.fill, self.resample)
    return image


def apply(
  name: str,
  image: Image.Image,
  magnitude: float,
  sign: int = 1,
  fill: tuple[int, ...] = _IMAGENET_MEAN,
  resample: Resample = 'bicubic',
) -> Image.Image:
  """Applies one operation of RandAugment (arXiv 1909.13719), with the ranges of timm's 'inc1'.

  AutoContrast, Equalize and Invert have no magnitude. With l = magnitude / 10 and s the sign,

      Rotate                  by 30 s l degrees, against the clock
      PosterizeIncreasing     the highest 4 - floor(4 l) bits stay
      SolarizeIncreasing      v -> 255 - v from v = 256 - floor(256 l) on
      SolarizeAdd             v -> min(v + floor(110 l), 255) below 128
      Color-, Contrast-, Brightness-, SharpnessIncreasing
                              v -> d + (1 + 0.9 s l) (v - d)
      ShearX, ShearY          y(i, j) = x(i, j + 0.3 s l i) and x(i + 0.3 s l j, j)
      TranslateXRel, -YRel    y(i, j) = x(i, j + 0.45 s l W) and x(i + 0.45 s l H, j)

  with rows i and columns j, and d the grey image, its mean grey, black, and the smoothed image. On
  a grey image ColorIncreasing changes nothing.

  Args:
    name: one of `OPERATIONS`.
    image: in mode RGB or L, of any size; it stays as it is.
    magnitude: 0 to 10.
    sign: 1 or -1.
    fill: the colour outside the image, 0..255: a value a channel, or one for all. On a grey image
      three are taken as their grey.
    resample: 'bilinear' or 'bicubic', where pixels move.

  Returns:
    A new image of the same mode and size.

  Raises:
    ValueError: an argument is not one of those.

  Example:
    >>> image = Image.new('L', (4, 4), 100)
    >>> apply('SolarizeAdd', image, 5.0).getpixel((0, 0))
    155
  """
  if name not in _OPERATIONS:
    raise ValueError(f'{name!r} is not an operation: take one of {", ".join(OPERATIONS)}')
  _check_mode(image)
  _check_magnitude(magnitude)
  if sign not in (1, -1):
    raise ValueError(f'sign must be 1 or -1, got {sign}')
  _check_pixels(fill, resample)
  how = {'resample': _FILTERS[resample], 'fillcolor': _fill_of(image, fill)}
  return _OPERATIONS[name](image, sign * (magnitude / _LARGEST), how)


def _fill_of(image: Image.Image, fill: tuple[int, ...]) -> int | tuple[int, ...]:
  """The fill in the image's own mode."""
  if image.mode == 'RGB':
    return fill if len(fill) == 3 else fill * 3
  if len(fill) == 1:
    return fill[0]
  return np.asarray(Image.new('RGB', (1, 1), fill).convert('L')).item()


def _check_mode(image: Image.Image) -> None:
  """Raises ValueError unless the image is in RGB or grey."""
  if image.mode not in ('RGB', 'L'):
    raise ValueError(f"an image must be in mode RGB or L, got {image.mode}: image.convert('RGB')")


def _check_magnitude(magnitude: float) -> None:
  """Raises ValueError unless a magnitude is on the scale."""
  if not 0 <= magnitude <= _LARGEST:
    raise ValueError(f'magnitude must be in 0..10, got {magnitude}')


def _check_pixels(fill: tuple[int, ...], resample: str) -> None:
  """Raises ValueError unless the fill is a colour and the resampling one of the two."""
  if len(fill) not in (1, 3) or not all(0 <= value <= 255 for value in fill):
    raise ValueError(f'fill must hold 1 or 3 values in 0..255, got {fill}')
  if resample not in _FILTERS:
    raise ValueError(f"resample must be 'bilinear' or 'bicubic', got {resample!r}")

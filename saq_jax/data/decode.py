"""From the bytes of an image file to pixels: the whole image, or the part that is asked for."""

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

# left, top, right, bottom in pixels
Box = tuple[int, int, int, int]

_START_OF_FRAME = b'\xc0\xc1'  # sequential: one scan may be cut short; a progressive file's may not
_END = b'\xff\xd9'
# libjpeg's word for what is left of a scan that was cut short; any other warning is a damage.
_LEFT_OVER = ('extraneous bytes before marker 0xd9',)


class RecordError(ValueError):
  """A record that cannot be used; the message says which and why."""


def decode(data: bytes, channels: int) -> np.ndarray:
  """Decodes a whole image, with the very pixels that PIL gives.

  Args:
    data: an image file of any kind that PIL reads.
    channels: 3 for RGB, 1 for grey.

  Returns:
    uint8 [H, W, channels].

  Raises:
    RecordError: it cannot be decoded; the message says why.

  Example:
    >>> file = io.BytesIO()
    >>> Image.new('RGB', (4, 2), (255, 0, 0)).save(file, 'PNG')
    >>> decode(file.getvalue(), 3)[0, 0].tolist()
    [255, 0, 0]
  """
  return decode_part(data, channels, lambda width, height: (0, 0, width, height))


def decode_part(
  data: bytes,
  channels: int,
  choose: Callable[[int, int], Box],
  *,
  fast: bool = False,
  size: int = 0,
) -> np.ndarray:
  """Decodes the part of an image that is chosen when its size is known.

  Of a sequential JPEG the rows below the part are not decoded: its header is given fewer rows. So
  damage below the part may go unseen, but not that a file was cut short. Files that libjpeg-turbo
  does not bring to RGB (CMYK, other kinds of files whatever their name) and those it complains
  about are left to PIL.

  Args:
    data: an image file of any kind that PIL reads.
    channels: 3 for RGB, 1 for grey.
    choose: the part, of the image's width and height.
    fast: leaves out the smoothing between colour samples, which PIL has, and decodes at a half, a
      fourth or an eighth of the size where the part remains at least `size` on both sides.
    size: of the square that the part will be brought to, pixels; for `fast`.

  Returns:
    uint8 [h, w, channels], the part.

  Raises:
    RecordError: it cannot be decoded; the message says why.
  """
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in ('YCbCr', 'RGB', 'Gray') or (channels == 1 and colours != 'Gray'):
      raise ValueError(colours)
    left, top, right, bottom = box = choose(width, height)
    shortest = min(right - left, bottom - top) if fast else 0
    factor = next((f for f in (8, 4, 2) if shortest >= f * size > 0), 1)
    if factor > 1:
      pixels = _shrunk(data, channels, height, width, factor)
      left, top, right, bottom = (side // factor for side in box)
    else:
      pixels = _upper_rows(data, channels, height, width, bottom, fast)
  except ValueError:
    pixels = _with_pil(data, channels)
    left, top, right, bottom = choose(pixels.shape[1], pixels.shape[0])
  return pixels[top:bottom, left:right]


def _shrunk(data: bytes, channels: int, height: int, width: int, factor: int) -> np.ndarray:
  """A JPEG at a fraction of its size, from the low frequencies of its blocks."""
  return simplejpeg.decode_jpeg(
    data,
    _colours(channels),
    fastupsample=True,
    min_height=height // factor,
    min_width=width // factor,
    min_factor=factor,
  )


def _upper_rows(
  data: bytes, channels: int, height: int, width: int, bottom: int, fast: bool
) -> np.ndarray:
  """A JPEG down to the row `bottom`, and maybe some more; ValueError if it is not a sound one."""
  place = _height_field(data) if data[-2:] == _END else None
  # Blocks have at most 16 rows for two colour samples; smoothing looks at one block more.
  rows = height if place is None else min(height, -(-bottom // 16) * 16 + 16)
  if rows == height or place is None:
    return simplejpeg.decode_jpeg(data, _colours(channels), fastupsample=fast)
  shortened = bytearray(data)
  shortened[place : place + 2] = rows.to_bytes(2, 'big')
  pixels = np.empty((rows, width, channels), np.uint8)
  try:
    simplejpeg.decode_jpeg(shortened, _colours(channels), fastupsample=fast, buffer=pixels)
  except ValueError as error:
    # libjpeg tells its first complaint. The pixels are all there when it is about the rest.
    if not str(error).endswith(_LEFT_OVER):
      raise
  return pixels


def _height_field(data: bytes) -> int | None:
  """Where the frame header of a sequential JPEG has the number of rows; None of another."""
  place = 2
  while place + 9 < len(data) and data[place] == 0xFF:
    if data[place + 1] in _START_OF_FRAME:
      return place + 5
    if data[place + 1] == 0xC2 or data[place + 1] == 0xDA:
      return None
    place += 2 + int.from_bytes(data[place + 2 : place + 4], 'big')
  return None


def _colours(channels: int) -> str:
  """libjpeg's name of the channels."""
  return 'GRAY' if channels == 1 else 'RGB'


def _with_pil(data: bytes, channels: int) -> np.ndarray:
  """The whole image by PIL."""
  try:
    return from_pil(Image.open(io.BytesIO(data)).convert('L' if channels == 1 else 'RGB'))
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    reason = str(error).replace('\n', ' ')
    raise RecordError(f'its image cannot be decoded ({reason})') from error


def to_pil(pixels: np.ndarray) -> Image.Image:
  """The pixels as an image of PIL's.

  Args:
    pixels: uint8 [H, W, C], C of 1 or 3.

  Returns:
    An image in mode 'L' or 'RGB'.
  """
  return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def from_pil(image: Image.Image) -> np.ndarray:
  """The pixels of an image of PIL's.

  Args:
    image: in mode 'L' or 'RGB'.

  Returns:
    uint8 [H, W, C], C of 1 or 3.
  """
  return np.asarray(image).reshape(image.height, image.width, len(image.getbands()))

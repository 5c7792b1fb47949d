"""Decoding: the pixels of PIL for any kind of file and any part; damage is told."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from saq_jax.data.decode import RecordError, decode, decode_part
from saq_jax.data.resize import centre, resize

RNG = np.random.default_rng(1)


def photograph(height, width):
  """Smooth colours with some noise, for which chroma sampling and smoothing matter."""
  y, x = np.mgrid[:height, :width]
  waves = [127 + 90 * np.sin(x / a + y / b) for a, b in ((7, 11), (5, -9), (13, 6))]
  pixels = np.stack(waves, -1) + RNG.normal(0, 12, (height, width, 3))
  return np.clip(pixels, 0, 255).astype(np.uint8)


def encoded(image, form='JPEG', **how):
  file = io.BytesIO()
  image.save(file, form, **how)
  return file.getvalue()


def by_cv2(pixels, factor):
  """A JPEG with a chroma sampling that PIL does not write."""
  ok, data = cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor])
  assert ok
  return data.tobytes()


PIXELS = photograph(120, 150)
PICTURE = Image.fromarray(PIXELS)
KINDS = {
  '444': encoded(PICTURE, subsampling=0),
  '422': encoded(PICTURE, subsampling=1),
  '420': encoded(PICTURE, subsampling=2),
  '411': by_cv2(PIXELS, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
  '440': by_cv2(PIXELS, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
  'restarts': encoded(PICTURE, restart_marker_rows=1),
  'progressive': encoded(PICTURE, progressive=True),
  'optimized': encoded(PICTURE, optimize=True, quality=97),
  'comment': encoded(PICTURE, comment=b'\xff\xd9 a word \xff\xc0'),
  'grey': encoded(PICTURE.convert('L')),
  'cmyk': encoded(PICTURE.convert('CMYK')),
  'png': encoded(PICTURE, 'PNG'),
  'palette': encoded(PICTURE.convert('P'), 'PNG'),
  'alpha': encoded(PICTURE.convert('RGBA'), 'PNG'),
  'webp': encoded(PICTURE, 'WEBP'),
  'garbage behind': encoded(PICTURE) + b'garbage',
  'zeros behind': encoded(PICTURE) + bytes(9),
}


def by_pil(data, channels=3):
  image = Image.open(io.BytesIO(data)).convert('L' if channels == 1 else 'RGB')
  return np.asarray(image).reshape(*image.size[::-1], channels)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('channels', [3, 1])
def test_whole_images_are_those_of_pil(kind, channels):
  np.testing.assert_array_equal(decode(KINDS[kind], channels), by_pil(KINDS[kind], channels))


@pytest.mark.parametrize('kind', KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_part_is_that_of_pil(kind, data):
  top = data.draw(st.integers(0, 119))
  left = data.draw(st.integers(0, 149))
  bottom = data.draw(st.integers(top + 1, 120))
  right = data.draw(st.integers(left + 1, 150))
  seen = []

  def choose(width, height):
    seen.append((width, height))
    return left, top, right, bottom

  part = decode_part(KINDS[kind], 3, choose)
  np.testing.assert_array_equal(part, by_pil(KINDS[kind])[top:bottom, left:right])
  assert set(seen) == {(150, 120)}


def test_rows_below_the_part_are_not_decoded(monkeypatch):
  import simplejpeg

  rows = []
  real = simplejpeg.decode_jpeg

  def counting(data, *args, **kw):
    rows.append(simplejpeg.decode_jpeg_header(data)[0])
    return real(data, *args, **kw)

  monkeypatch.setattr(simplejpeg, 'decode_jpeg', counting)
  for kind, wanted in (('420', 48), ('progressive', 120), ('garbage behind', 120)):
    rows.clear()
    decode_part(KINDS[kind], 3, lambda w, h: (0, 0, 10, 20))
    assert rows == [wanted], kind


def test_fast_leaves_out_smoothing_alone():
  box = (10, 10, 140, 110)
  for kind in ('444', '420'):
    fast = decode_part(KINDS[kind], 3, lambda w, h: box, fast=True, size=224).astype(int)
    exact = decode_part(KINDS[kind], 3, lambda w, h: box).astype(int)
    assert fast.shape == exact.shape
    # Brightness is the same, but for rounding; without chroma sampling all is.
    weights = np.array([0.299, 0.587, 0.114])
    inside = (slice(None),) * 2
    limit = 1.5 if kind == '420' else 0
    unclipped = ((exact > 8) & (exact < 247)).all(-1) & ((fast > 8) & (fast < 247)).all(-1)
    assert np.abs((fast - exact)[inside] @ weights)[unclipped].max() <= limit
    assert (kind == '420') == bool(np.any(fast != exact))


@pytest.mark.parametrize('factor', [2, 4, 8])
def test_a_part_many_times_the_size_is_decoded_at_a_fraction_of_it(factor):
  large = photograph(67, 97)
  data = encoded(Image.fromarray(large), quality=100, subsampling=0)
  size = 64 // factor
  small = decode_part(data, 3, lambda w, h: (16, 0, 96, 64), fast=True, size=size)
  assert small.shape == (size, 80 // factor, 3)
  means = large[:64, 16:96].reshape(size, factor, 80 // factor, factor, 3).mean((1, 3))
  # Low frequencies of the blocks against means: alike, but for what aliases.
  assert np.abs(small - means).mean() < 3
  # One row short of it: the next larger fraction.
  short = decode_part(data, 3, lambda w, h: (16, 0, 96, 63), fast=True, size=size)
  assert short.shape == (63 * 2 // factor, 160 // factor, 3)


@pytest.mark.parametrize(
  'data',
  [
    b'',
    b'no image at all',
    KINDS['420'][:200],
    KINDS['420'][: len(KINDS['420']) * 2 // 3],
    KINDS['420'][:-2],
    KINDS['png'][:400],
    KINDS['progressive'][:900],
  ],
  ids=['empty', 'text', 'header', 'two thirds', 'no end', 'png', 'progressive'],
)
def test_files_that_are_cut_short_are_told_whatever_part_is_wanted(data):
  # PIL takes a JPEG that lacks its last two bytes alone; so it is for us.
  try:
    by_pil(data)
  except (OSError, SyntaxError):
    for box in ((0, 0, 150, 120), (0, 0, 9, 9)):
      with pytest.raises(RecordError, match='its image cannot be decoded') as caught:
        decode_part(data, 3, lambda w, h, box=box: box)
      assert '\n' not in str(caught.value)
  else:
    np.testing.assert_array_equal(decode(data, 3), by_pil(data))


# Resizing.


def bilinear(pixels, width, height):
  """The formula of two half-pixel-centred axes, in float64."""

  def matrix(inputs, outputs):
    places = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    low = np.floor(places).astype(int)
    out = np.zeros((outputs, inputs))
    for j, (i, share) in enumerate(zip(low, places - low, strict=True)):
      out[j, min(max(i, 0), inputs - 1)] += 1 - share
      out[j, min(max(i + 1, 0), inputs - 1)] += share
    return out

  rows, columns = matrix(pixels.shape[0], height), matrix(pixels.shape[1], width)
  return np.einsum('yh,hwc,xw->yxc', rows, pixels.astype(float), columns)


@pytest.mark.parametrize('size', [(40, 30), (224, 224), (13, 7), (150, 120), (1, 1)])
@pytest.mark.parametrize('channels', [1, 3])
def test_fast_resizing_is_the_formula(size, channels):
  pixels = np.ascontiguousarray(PIXELS[..., :channels])
  found = resize(pixels, *size, 'fast')
  assert found.shape == (size[1], size[0], channels)
  np.testing.assert_allclose(found, bilinear(pixels, *size), atol=1)


def test_resizing_into_a_given_array_writes_there():
  for kind in ('fast', 'bilinear', 'bicubic'):
    out = np.zeros((2, 20, 30, 3), np.uint8)
    resize(PIXELS, 30, 20, kind, out[1])
    np.testing.assert_array_equal(out[1], resize(PIXELS, 30, 20, kind))
    assert not out[0].any()
    part = np.zeros((20, 30, 3), np.uint8)
    resize(PIXELS[5:90, 20:110], 30, 20, kind, part)  # a view with gaps
    np.testing.assert_array_equal(part, resize(PIXELS[5:90, 20:110].copy(), 30, 20, kind))


def test_evaluation_is_never_fast():
  np.testing.assert_array_equal(centre(PIXELS, 20, 25, 'fast'), centre(PIXELS, 20, 25, 'bilinear'))

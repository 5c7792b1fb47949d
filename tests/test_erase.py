"""Random erasing against timm's values, independent formulas, and the laws of what is drawn."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mix import batch, every_dtype

from saq_jax.data.mix import erase, erase_boxes, fill_boxes

RECORD = np.load(Path(__file__).parent / 'reference' / 'augment_record.npz')
KEY = jax.random.key(0)


def erase_loop(draws: np.ndarray, height: int, width: int) -> tuple[list[int], bool]:
  """The published loop over one image's tries, and whether float32 might round otherwise."""
  close = False
  for u in draws.astype(float):
    area = (0.02 * (1 - u[0]) + u[0] / 3) * height * width
    aspect = 0.3 ** (1 - u[1]) * (1 / 0.3) ** u[1]
    sides = [math.sqrt(area * aspect), math.sqrt(area / aspect)]
    h, w = round(sides[0]), round(sides[1])
    close |= any(abs(side % 1 - 0.5) < 1e-4 for side in sides)
    if w < width and h < height:
      places = [u[2] * (height - h + 1), u[3] * (width - w + 1)]
      close |= any(abs(place - round(place)) < 1e-4 for place in places)
      return [int(places[0]), int(places[1]), h, w], close
  return [0, 0, 0, 0], close


@pytest.mark.parametrize('size', ['32x48', '40x12'])
def test_boxes_are_timms(size: str) -> None:
  height, width = map(int, size.split('x'))
  boxes = erase_boxes(jnp.asarray(RECORD[f'erase/{size}/draws']), height, width)
  assert boxes.dtype == jnp.int32
  np.testing.assert_array_equal(boxes, RECORD[f'erase/{size}/boxes'])


@pytest.mark.parametrize(('height', 'width'), [(224, 224), (32, 48), (64, 3), (2, 40), (1, 1)])
def test_boxes_are_those_of_the_loop(height: int, width: int) -> None:
  draws = np.random.default_rng(2).random((2000, 10, 4), np.float32)
  boxes = np.asarray(jax.jit(erase_boxes, static_argnums=(1, 2))(draws, height, width))
  expected, close = zip(*(erase_loop(tries, height, width) for tries in draws))
  sure = ~np.array(close)
  assert sure.mean() > 0.98
  np.testing.assert_array_equal(boxes[sure], np.array(expected)[sure])
  top, left, h, w = boxes.T
  assert np.all((top >= 0) & (left >= 0) & (top + h <= height) & (left + w <= width))


@pytest.mark.parametrize('end', [0.0, 0.999999, 1 - 2**-24])
def test_boxes_of_extreme_draws(end: float) -> None:
  draws = jnp.full((2, 10, 4), end, jnp.float32)
  draws = draws.at[0, :, :2].set(0.5)
  inner, outer = erase_boxes(draws, 32, 32).tolist()
  assert inner == ([0, 0, 13, 13] if end == 0 else [19, 19, 13, 13])
  # The least area has a place; a third of the area, 3.3 times as high as wide, is too high.
  assert outer == ([0, 0, 2, 8] if end == 0 else [0, 0, 0, 0])


@every_dtype
def test_a_filled_box_leaves_the_rest(dtype: jax.typing.DTypeLike) -> None:
  images, content = (batch(4, seed)[0].astype(dtype) for seed in range(2))
  boxes = np.array([[0, 0, 12, 10], [3, 4, 5, 6], [11, 9, 1, 1], [2, 2, 0, 0]], np.int32)
  expected = np.array(images)
  for b, (top, left, h, w) in enumerate(boxes):
    expected[b, top : top + h, left : left + w] = content[b, top : top + h, left : left + w]
  filled = jax.jit(fill_boxes)(images, boxes, content)
  assert filled.dtype == dtype
  np.testing.assert_array_equal(filled, expected)


def test_erased_shares_and_boxes_have_the_law_of_the_procedure() -> None:
  count, height, width = 20_000, 32, 24
  images = jnp.full((count, height, width, 1), 99.0)
  erased = np.asarray(erase(KEY, images, 0.25))[..., 0] != 99
  chosen = erased.any(axis=(1, 2))
  assert abs(chosen.sum() - count / 4) < 5 * math.sqrt(count * 3 / 16)
  tries = np.random.default_rng(5).random((count, 10, 4))
  theirs = np.array([erase_loop(u, height, width)[0] for u in tries], float)
  rows, columns = erased[chosen].any(axis=2), erased[chosen].any(axis=1)
  ours = np.array([rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)], float).T
  # All that is erased is the whole box.
  np.testing.assert_array_equal(erased[chosen].sum(axis=(1, 2)), ours[:, 2] * ours[:, 3])

  def statistics(boxes: np.ndarray) -> np.ndarray:
    top, left, h, w = boxes.T
    return np.stack([top, left, h, w, h * w, np.log(h / w), h**2, w**2, top**2, left * w], axis=1)

  ours, theirs = statistics(ours), statistics(theirs)
  error = np.sqrt(ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs))
  assert np.all(np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * error)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_noise_is_standard_normal_and_the_rest_stays(dtype: jax.typing.DTypeLike) -> None:
  images = jnp.full((200, 32, 32, 3), 99.0, dtype)
  result = erase(KEY, images, 1.0)
  assert result.dtype == dtype
  values = np.asarray(result.astype(jnp.float32))
  noise = values[values != 99]
  n = len(noise)
  assert n > 50_000
  assert abs(noise.mean()) < 5 / math.sqrt(n)
  assert abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
  # The fourth moment is 3, and its own variance 96.
  assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / n)
  # Pixels, channels and images each have their own.
  assert len(np.unique(noise)) > (1000 if dtype != jnp.float32 else 0.9 * n)
  assert np.all((values == 99).sum(axis=-1) % 3 == 0)


def test_erasing_never_and_always() -> None:
  images, _ = batch(64)
  np.testing.assert_array_equal(erase(KEY, images, 0.0), images)
  assert np.all(np.any(np.asarray(erase(KEY, images, 1.0) != images), axis=(1, 2, 3)))

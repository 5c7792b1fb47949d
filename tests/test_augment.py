"""Tests of augmentation against NumPy formulas, and of what is drawn."""

import doctest
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from saq_jax.data import augment


def _images(batch: int, height: int, width: int, channels: int) -> np.ndarray:
  shape = (batch, height, width, channels)
  return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize('channels', [1, 3, 5])
@pytest.mark.parametrize('padding', [0, 1, 4])
def test_crop_is_the_slice_of_the_padded_image(channels: int, padding: int) -> None:
  images = _images(6, 8, 5, channels)
  offsets = np.random.RandomState(1).randint(0, 2 * padding + 1, (6, 2)).astype(np.int32)
  offsets[:2] = [[0, 0], [2 * padding, 2 * padding]]
  padded = np.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
  expected = np.stack([image[i : i + 8, j : j + 5] for image, (i, j) in zip(padded, offsets)])
  cropped = jax.jit(augment.crop, static_argnums=2)(images, offsets, padding)
  assert cropped.dtype == jnp.uint8
  np.testing.assert_array_equal(cropped, expected)


def test_crop_offsets_are_uniform_and_independent() -> None:
  offsets = np.asarray(augment.crop_offsets(jax.random.key(0), 20_000, 2))
  assert (offsets.shape, offsets.dtype) == ((20_000, 2), np.int32)
  cells = np.bincount(5 * offsets[:, 0] + offsets[:, 1], minlength=25)
  # 25 equal cells: the chi-squared of 24 degrees of freedom exceeds 60 once in 15,000 draws.
  assert np.sum((cells - 800) ** 2 / 800) < 60


@pytest.mark.parametrize('channels', [1, 3])
def test_mirror_reverses_the_chosen_rows(channels: int) -> None:
  images = _images(4, 3, 5, channels)
  flips = np.array([True, False, False, True])
  mirrored = np.asarray(augment.mirror(jnp.asarray(images), flips))
  for image, result, chosen in zip(images, mirrored, flips):
    np.testing.assert_array_equal(result, image[:, ::-1] if chosen else image)


def test_flip_is_a_fair_coin_an_image() -> None:
  images = np.broadcast_to(np.array([0, 1], np.uint8)[:, None], (4000, 1, 2, 1))
  flipped = np.asarray(augment.flip(jax.random.key(0), jnp.asarray(images)))[:, 0, 0, 0]
  assert abs(flipped.sum() - 2000) < 5 * np.sqrt(1000)
  # Neighbours agree half the time, so that it is no one coin for the batch.
  assert abs((flipped[1:] == flipped[:-1]).sum() - 2000) < 5 * np.sqrt(1000)


def test_random_functions_apply_their_draws() -> None:
  images = jnp.asarray(_images(16, 8, 8, 3))
  key = jax.random.key(7)
  offsets = augment.crop_offsets(key, 16, 2)
  np.testing.assert_array_equal(augment.pad_crop(key, images, 2), augment.crop(images, offsets, 2))
  assert np.any(augment.pad_crop(jax.random.key(8), images, 2) != augment.pad_crop(key, images, 2))
  np.testing.assert_array_equal(augment.flip(key, images), augment.flip(key, images))


@pytest.mark.parametrize(
  ('mean', 'std'), [([0.5], [0.25]), ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))]
)
def test_normalize_is_the_formula(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
  images = _images(2, 4, 4, 3)
  expected = (images / 255 - np.array(mean)) / np.array(std)
  jitted = jax.jit(lambda images: augment.normalize(images, mean, std))
  for result in (augment.normalize(jnp.asarray(images), mean, std), jitted(images)):
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
  half = augment.normalize(jnp.asarray(images), mean, std, jnp.bfloat16)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


def test_sharded_batches_stay_where_they_are() -> None:
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  images = _images(16, 8, 8, 3)

  def both(key: jax.Array, images: jax.Array) -> jax.Array:
    return augment.flip(key, augment.pad_crop(key, images, 2))

  key = jax.random.key(0)
  sharded = jax.jit(both, in_shardings=(None, sharding), out_shardings=sharding)
  on_mesh = jax.device_put(images, sharding)
  np.testing.assert_array_equal(sharded(key, on_mesh), both(key, jnp.asarray(images)))
  # No image crosses a wire; the offsets, a few int32, may.
  hlo = sharded.lower(key, on_mesh).compile().as_text()
  assert not re.search(r'u8\[[\d,]*\]\S* (all-gather|all-reduce|all-to-all|collective)', hlo)


@pytest.mark.parametrize('shape', [(8, 8, 3), (2, 8, 8)])
def test_wrong_images(shape: tuple[int, ...]) -> None:
  for images in (jnp.zeros(shape, jnp.uint8), jnp.zeros((2, 8, 8, 3))):
    with pytest.raises(ValueError, match=r'images must be uint8 \[B, H, W, C\], got'):
      augment.flip(jax.random.key(0), images)
    with pytest.raises(ValueError, match=r'images must be uint8 \[B, H, W, C\], got'):
      augment.pad_crop(jax.random.key(0), images, 1)
    with pytest.raises(ValueError, match=r'images must be uint8 \[B, H, W, C\], got'):
      augment.normalize(images, [0.0], [1.0])


def test_wrong_numbers() -> None:
  images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
  with pytest.raises(ValueError, match='padding must be 0 or more, got -1'):
    augment.pad_crop(jax.random.key(0), images, -1)
  with pytest.raises(ValueError, match='mean must hold 1 or 3 values'):
    augment.normalize(images, [0.5, 0.5], [1.0])
  with pytest.raises(ValueError, match='std must be positive'):
    augment.normalize(images, [0.5], [1.0, 0.0, 1.0])


def test_doctests() -> None:
  assert doctest.testmod(augment).failed == 0

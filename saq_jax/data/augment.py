"""Augmentation and normalisation of image batches on the device, as pure functions of a key."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def normalize(
  images: jax.Array,
  mean: Sequence[float],
  std: Sequence[float],
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Scales uint8 images to zero mean and unit deviation.

      y = (x / 255 - mean) / std

  Args:
    images: uint8 [B, H, W, C].
    mean: One value a channel, or one for all, in units of the full range: 0..1.
    std: Likewise, each > 0.
    dtype: The result's; the arithmetic itself is float32.

  Returns:
    dtype [B, H, W, C].

  Raises:
    ValueError: The images are not uint8 [B, H, W, C], or mean or std does not fit.

  Example:
    >>> normalize(jnp.full((1, 2, 2, 1), 255, jnp.uint8), [0.5], [0.25])[0, 0, 0, 0].item()
    2.0
  """
  _check_images(images)
  channels = images.shape[-1]
  for name, values in (('mean', mean), ('std', std)):
    if np.shape(values) not in ((1,), (channels,)):
      raise ValueError(f'{name} must hold 1 or {channels} values, one a channel, got {values}')
  if not np.all(np.asarray(std) > 0):
    raise ValueError(f'std must be positive, got {std}')
  shift, scale = (np.asarray(values, np.float32) for values in (mean, std))
  return ((images.astype(jnp.float32) / 255.0 - shift) / scale).astype(dtype)


def pad_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
  """Pads each image with zeros on all sides and crops it back to its size at a random place.

  Args:
    key: A JAX random key.
    images: uint8 [B, H, W, C].
    padding: Pixels added on each side, >= 0; static under jit.

  Returns:
    uint8 [B, H, W, C]: `crop(images, crop_offsets(key, B, padding), padding)`.

  Raises:
    ValueError: The images are not uint8 [B, H, W, C], or padding < 0.

  Example:
    >>> images = jnp.ones((2, 8, 8, 3), jnp.uint8)
    >>> pad_crop(jax.random.key(0), images, 1).shape
    (2, 8, 8, 3)
  """
  if padding < 0:
    raise ValueError(f'padding must be 0 or more, got {padding}')
  return crop(images, crop_offsets(key, len(images), padding), padding)


def crop_offsets(key: jax.Array, count: int, padding: int) -> jax.Array:
  """Draws the places of `count` crops.

  Args:
    key: A JAX random key.
    count: The number of images, B.
    padding: As in `pad_crop`.

  Returns:
    int32 [B, 2]: each crop's first row and column in the padded image, uniform on 0..2 * padding.

  Example:
    >>> crop_offsets(jax.random.key(0), 3, 0).tolist()
    [[0, 0], [0, 0], [0, 0]]
  """
  return jax.random.randint(key, (count, 2), 0, 2 * padding + 1, jnp.int32)


def crop(images: jax.Array, offsets: jax.Array, padding: int) -> jax.Array:
  """Crops zero-padded images at given places, to their own size.

      y[b, i, j] = padded[b, i + offsets[b, 0], j + offsets[b, 1]]

  Args:
    images: uint8 [B, H, W, C].
    offsets: int32 [B, 2], rows and columns in 0..2 * padding.
    padding: As in `pad_crop`.

  Returns:
    uint8 [B, H, W, C].

  Raises:
    ValueError: The images are not uint8 [B, H, W, C].

  Example:
    >>> image = jnp.arange(1, 5, dtype=jnp.uint8).reshape(1, 2, 2, 1)
    >>> crop(image, jnp.array([[0, 1]]), 1)[0, :, :, 0].tolist()
    [[0, 0], [1, 2]]
  """
  _check_images(images)
  padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

  def crop_one(image: jax.Array, offset: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

  return jax.vmap(crop_one)(padded, offsets)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image left to right with probability one half.

  Args:
    key: A JAX random key.
    images: uint8 [B, H, W, C].

  Returns:
    uint8 [B, H, W, C]: `mirror(images, flips)` with B fair coins for `flips`.

  Raises:
    ValueError: The images are not uint8 [B, H, W, C].

  Example:
    >>> flip(jax.random.key(0), jnp.ones((2, 8, 8, 3), jnp.uint8)).shape
    (2, 8, 8, 3)
  """
  return mirror(images, jax.random.bernoulli(key, 0.5, (len(images),)))


def mirror(images: jax.Array, flips: jax.Array) -> jax.Array:
  """Mirrors the chosen images left to right.

  Args:
    images: uint8 [B, H, W, C].
    flips: bool [B], true for the images to mirror.

  Returns:
    uint8 [B, H, W, C].

  Raises:
    ValueError: The images are not uint8 [B, H, W, C].

  Example:
    >>> image = jnp.array([[[[1], [2]]]], jnp.uint8)
    >>> mirror(image, jnp.array([True]))[0, 0, :, 0].tolist()
    [2, 1]
  """
  _check_images(images)
  return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def _check_images(images: jax.Array) -> None:
  """Raises ValueError unless the batch is of uint8 images."""
  if images.ndim != 4 or images.dtype != jnp.uint8:
    raise ValueError(f'images must be uint8 [B, H, W, C], got {images.dtype} {images.shape}')

"""Random erasing, mixup and CutMix of normalised batches on the device, as pure functions."""

import math

import jax
import jax.numpy as jnp

_TRIES = 10
_LEAST_AREA, _LARGEST_AREA = 0.02, 1 / 3
_LOG_ASPECT = math.log(1 / 0.3)


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
  """Puts noise in place of a random box of an image (random erasing, arXiv 1708.04896).

  Each image by itself, as timm's mode 'pixel' with one box: with the probability, the box of
  `erase_boxes` is filled with standard normal noise, a number a pixel and channel.

  Args:
    key: a JAX random key.
    images: floating [B, H, W, C], normalised to zero mean and unit deviation.
    probability: that an image has a box, 0..1; static under jit.

  Returns:
    [B, H, W, C] in the images' dtype.

  Raises:
    ValueError: the images are not floating [B, H, W, C], or the probability is not one.

  Example:
    >>> images = jnp.zeros((4, 16, 16, 3))
    >>> bool(jnp.any(erase(jax.random.key(0), images, 0.0)))
    False
  """
  _check_images(images)
  if not 0 <= probability <= 1:
    raise ValueError(f'probability must be in 0..1, got {probability}')
  count, height, width, _ = images.shape
  which, where, what = jax.random.split(key, 3)
  chosen = jax.random.bernoulli(which, probability, (count, 1))
  draws = jax.random.uniform(where, (count, _TRIES, 4), jnp.float32)
  boxes = jnp.where(chosen, erase_boxes(draws, height, width), 0)
  noise = jax.random.normal(what, images.shape, _exact(images))
  return fill_boxes(images, boxes, noise)


def erase_boxes(draws: jax.Array, height: int, width: int) -> jax.Array:
  """Chooses a box an image to erase (arXiv 1708.04896): the first of ten tries that fits.

      area = (0.02 + u0 (1/3 - 0.02)) H W,  aspect = 0.3^(1 - 2 u1)
      h = round(sqrt(area aspect)),  w = round(sqrt(area / aspect))

  with uniform u; a try fits where h < H and w < W. The box's first row is uniform on 0..H - h and
  its first column on 0..W - w.

  Args:
    draws: float32 uniform numbers in [0, 1), [B, 10, 4]: for each try u0, u1, and those of the
      row and the column.
    height: of the images in pixels, H.
    width: of the images in pixels, W.

  Returns:
    int32 [B, 4]: top, left, height and width in pixels; zeros where no try fits.

  Raises:
    ValueError: the draws have another shape.

  Example:
    >>> erase_boxes(jnp.full((1, 10, 4), 0.5), 32, 32).tolist()
    [[10, 10, 13, 13]]
  """
  if draws.ndim != 3 or draws.shape[1:] != (_TRIES, 4):
    raise ValueError(f'draws must be [B, {_TRIES}, 4], got {draws.shape}')
  share, ratio, row, column = jnp.unstack(draws, axis=-1)
  area = (_LEAST_AREA + share * (_LARGEST_AREA - _LEAST_AREA)) * (height * width)
  aspect = jnp.exp((2 * ratio - 1) * _LOG_ASPECT)
  h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  fits = (h < height) & (w < width)
  first = fits & (jnp.cumsum(fits, axis=1) == 1)
  top = jnp.floor(row * (height - h + 1)).astype(jnp.int32)
  left = jnp.floor(column * (width - w + 1)).astype(jnp.int32)
  tries = jnp.stack([top, left, h, w], axis=-1)
  return jnp.sum(jnp.where(first[..., None], tries, 0), axis=1, dtype=jnp.int32)


def fill_boxes(images: jax.Array, boxes: jax.Array, content: jax.Array) -> jax.Array:
  """Puts other pixels into a box of each image.

      y[b, i, j] = content[b, i, j] if (i, j) lies in box b, else images[b, i, j]

  Args:
    images: floating [B, H, W, C].
    boxes: int32 [B, 4], or [4] for one box in all: top, left, height and width in pixels.
    content: [B, H, W, C].

  Returns:
    [B, H, W, C] in the images' dtype.

  Example:
    >>> images = jnp.zeros((1, 2, 3, 1))
    >>> fill_boxes(images, jnp.array([0, 1, 2, 1]), images + 5)[0, :, :, 0].tolist()
    [[0.0, 5.0, 0.0], [0.0, 5.0, 0.0]]
  """
  top, left, height, width = jnp.unstack(boxes[..., None, None, None], axis=-4)
  rows = jnp.arange(images.shape[1])[:, None, None]
  columns = jnp.arange(images.shape[2])[None, :, None]
  inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
  return jnp.where(inside, content.astype(images.dtype), images)


def mix(
  key: jax.Array, images: jax.Array, targets: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
  """Mixes every example with another one, by mixup or by CutMix.

  One lam ~ Beta(alpha, alpha) for the batch; where both alphas are positive a fair coin says
  which of `mixup_with` and `cutmix_with` it is, else the one whose alpha is.

  The other one of example i is its neighbour: 0 and 1, 2 and 3, and so on. That is a choice of
  this project; timm takes the batch in reverse. The examples of a shuffled batch are
  exchangeable, so that the law is the same; and neighbours lie on one device of a sharded batch,
  where each device's share is even, so that nothing crosses the wire. The result does not depend
  on the number of devices.

  Args:
    key: a JAX random key.
    images: floating [B, H, W, C], B even.
    targets: floating [B, K]: one-hot or smoothed labels.
    mixup: alpha of mixup, at least 0; 0 for none; static under jit.
    cutmix: alpha of CutMix, likewise; one of the two is positive.

  Returns:
    (images, targets) in their dtypes.

  Raises:
    ValueError: an argument is not one of those.

  Example:
    >>> images, targets = jnp.ones((2, 8, 8, 3)), jnp.eye(2)
    >>> mixed, labels = mix(jax.random.key(0), images, targets, 0.8, 1.0)
    >>> mixed.shape, labels.sum(axis=1).tolist()
    ((2, 8, 8, 3), [1.0, 1.0])
  """
  _check_batch(images, targets)
  for name, alpha in (('mixup', mixup), ('cutmix', cutmix)):
    if not 0 <= alpha < math.inf:
      raise ValueError(f'{name} must be finite and at least 0, got {alpha}')
  if not (mixup or cutmix):
    raise ValueError('mixup and cutmix are both 0: make one positive, or leave mix out')
  height, width = images.shape[1:3]
  coin_key, lam_key, centre_key = jax.random.split(key, 3)

  def by_mixup(images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    return mixup_with(images, targets, jax.random.beta(lam_key, mixup, mixup, dtype=jnp.float32))

  def by_cutmix(images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    lam = jax.random.beta(lam_key, cutmix, cutmix, dtype=jnp.float32)
    row, column = jax.random.randint(centre_key, (2,), 0, jnp.array([height, width]))
    return cutmix_with(images, targets, cutmix_box(lam, row, column, height, width))

  if not (mixup and cutmix):
    return (by_mixup if mixup else by_cutmix)(images, targets)
  return jax.lax.cond(jax.random.bernoulli(coin_key), by_cutmix, by_mixup, images, targets)


def mixup_with(
  images: jax.Array, targets: jax.Array, lam: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """Averages every example and its neighbour (mixup, arXiv 1710.09412).

      y[i] = lam x[i] + (1 - lam) x[i'],  i' = i + 1 for even i, i - 1 for odd

  Args:
    images: floating [B, H, W, C], B even.
    targets: floating [B, K].
    lam: a scalar in 0..1.

  Returns:
    (images, targets) in their dtypes; the arithmetic is float32 or better.

  Raises:
    ValueError: the images or targets are not those.

  Example:
    >>> images = jnp.array([0.0, 8.0]).reshape(2, 1, 1, 1)
    >>> mixed, labels = mixup_with(images, jnp.eye(2), 0.75)
    >>> mixed.ravel().tolist(), labels[0].tolist()
    ([2.0, 6.0], [0.75, 0.25])
  """
  _check_batch(images, targets)
  return _averaged(images, lam), _averaged(targets, lam)


def cutmix_box(
  lam: jax.typing.ArrayLike,
  centre_row: jax.typing.ArrayLike,
  centre_col: jax.typing.ArrayLike,
  height: int,
  width: int,
) -> jax.Array:
  """The box that CutMix (arXiv 1905.04899) pastes: about 1 - lam of the area around a pixel.

      h = floor(H sqrt(1 - lam)),  rows centre - floor(h / 2) to centre + floor((h + 1) / 2),

  likewise columns, clipped to the image.

  Args:
    lam: a float32 scalar in 0..1.
    centre_row: an integer scalar in 0..H - 1.
    centre_col: an integer scalar in 0..W - 1.
    height: of the images in pixels, H.
    width: of the images in pixels, W.

  Returns:
    int32 [4]: top, left, height and width in pixels.

  Example:
    >>> cutmix_box(0.75, 1, 4, 8, 8).tolist()
    [0, 2, 3, 4]
  """
  share = jnp.sqrt(1 - jnp.asarray(lam, jnp.float32))
  sides = jnp.array([height, width])
  cut = jnp.floor(sides * share).astype(jnp.int32)
  centre = jnp.stack([jnp.asarray(centre_row), jnp.asarray(centre_col)])
  start = jnp.clip(centre - cut // 2, 0, sides)
  end = jnp.clip(centre + (cut + 1) // 2, 0, sides)
  return jnp.concatenate([start, end - start]).astype(jnp.int32)


def cutmix_with(
  images: jax.Array, targets: jax.Array, box: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Pastes a box of its neighbour into every image (CutMix, arXiv 1905.04899).

  The targets are averaged as in `mixup_with`, with the share of the image that stays:

      lam = 1 - h w / (H W)

  Args:
    images: floating [B, H, W, C], B even.
    targets: floating [B, K].
    box: int32 [4]: top, left, height h and width w in pixels, within the image.

  Returns:
    (images, targets) in their dtypes.

  Raises:
    ValueError: the images or targets are not those.

  Example:
    >>> images = jnp.array([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]).reshape(2, 1, 4, 1)
    >>> mixed, labels = cutmix_with(images, jnp.eye(2), jnp.array([0, 3, 1, 1]))
    >>> mixed[0].ravel().tolist(), labels[0].tolist()
    ([0.0, 0.0, 0.0, 4.0], [0.75, 0.25])
  """
  _check_batch(images, targets)
  lam = 1 - (box[2] * box[3]).astype(jnp.float32) / (images.shape[1] * images.shape[2])
  return fill_boxes(images, box, _neighbours(images)), _averaged(targets, lam)


def _neighbours(x: jax.Array) -> jax.Array:
  """Each example's neighbour in its place."""
  return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _averaged(x: jax.Array, lam: jax.typing.ArrayLike) -> jax.Array:
  """Lam of each example and the rest of its neighbour, rounded to their dtype once."""
  exact, lam = x.astype(_exact(x)), jnp.asarray(lam, jnp.float32)
  return (exact * lam + _neighbours(exact) * (1 - lam)).astype(x.dtype)


def _exact(x: jax.Array) -> jnp.dtype:
  """The dtype to compute in: the array's own, but at least float32."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _check_images(images: jax.Array) -> None:
  """Raises ValueError unless the batch is of floating images."""
  if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f'images must be floating [B, H, W, C], got {images.dtype} {images.shape}: normalise them '
      f'first'
    )


def _check_batch(images: jax.Array, targets: jax.Array) -> None:
  """Raises ValueError unless images and targets belong to one batch of pairs."""
  _check_images(images)
  count = len(images)
  floating = jnp.issubdtype(targets.dtype, jnp.floating)
  if targets.ndim != 2 or len(targets) != count or not floating:
    raise ValueError(
      f'targets must be floating [{count}, K], got {targets.dtype} {targets.shape}: take one-hot '
      f'or smoothed labels'
    )
  if count % 2:
    raise ValueError(f'neighbours mix in pairs, got a batch of {count}: take an even batch')

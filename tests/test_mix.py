"""Erasing, mixup and CutMix against values recorded from timm, NumPy formulas and their laws."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from saq_jax.data.mix import (
  cutmix_box,
  cutmix_with,
  erase,
  erase_boxes,
  mix,
  mixup_with,
)

RECORD = np.load(Path(__file__).parent / 'reference' / 'augment_record.npz')
KEY = jax.random.key(0)

every_dtype = pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
every_kind = pytest.mark.parametrize(('mixup', 'cutmix'), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])


def batch(count: int = 8, seed: int = 0) -> tuple[jax.Array, jax.Array]:
  """Images [count, 12, 10, 3] and smoothed labels of 5 classes."""
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(count, 12, 10, 3)).astype(np.float32)
  targets = np.eye(5)[rng.integers(5, size=count)] * 0.9 + 0.02
  return jnp.asarray(images), jnp.asarray(targets, jnp.float32)


def swapped(x: np.ndarray) -> np.ndarray:
  """Each example's neighbour, by index."""
  return x[[i ^ 1 for i in range(len(x))]]


# Mixup and CutMix with given numbers.


@pytest.mark.parametrize('name', ['mixup', 'cutmix', 'cutmix_clipped'])
def test_mixed_batches_are_timms(name: str) -> None:
  images, targets = jnp.asarray(RECORD['mix/images']), jnp.asarray(RECORD['mix/targets'])
  lam, row, column = RECORD[f'mix/{name}/drawn'].tolist()
  if name == 'mixup':
    mixed = mixup_with(images, targets, lam)
  else:
    mixed = cutmix_with(images, targets, cutmix_box(lam, int(row), int(column), 10, 7))
  for ours, part in zip(mixed, ('images', 'targets')):
    np.testing.assert_allclose(ours, RECORD[f'mix/{name}/{part}'], rtol=1e-6, atol=1e-6)


def test_boxes_of_cutmix_are_timms() -> None:
  boxed = jax.jit(cutmix_box, static_argnums=(3, 4))
  for height, width, lam, row, column, *box, after in RECORD['mix/boxes'].tolist():
    height, width = int(height), int(width)
    ours = boxed(lam, int(row), int(column), height, width)
    assert ours.dtype == jnp.int32
    assert ours.tolist() == box
    targets = cutmix_with(jnp.zeros((2, height, width, 1)), jnp.eye(2), ours)[1]
    np.testing.assert_allclose(targets, [[after, 1 - after], [1 - after, after]], atol=1e-6)


@pytest.mark.parametrize(('lam', 'area'), [(0.0, 12 * 10), (1.0, 0)])
def test_cutmix_at_the_ends(lam: float, area: int) -> None:
  images, targets = batch()
  box = cutmix_box(lam, 6, 5, 12, 10)
  assert box[2] * box[3] == area
  for ours, x in zip(cutmix_with(images, targets, box), (images, targets)):
    np.testing.assert_array_equal(ours, swapped(np.asarray(x)) if area else x)


@pytest.mark.parametrize('lam', [0.0, 0.3, 1.0])
@every_dtype
def test_mixup_is_the_formula(lam: float, dtype: jax.typing.DTypeLike) -> None:
  images, targets = batch()
  images = images.astype(dtype)
  mixed = jax.jit(mixup_with)(images, targets, lam)
  # One rounding to the dtype, beside those of float32.
  tolerances = (2.0**-8 if dtype == jnp.bfloat16 else 1e-6, 1e-6)
  for ours, x, tolerance in zip(mixed, (images, targets), tolerances):
    assert ours.dtype == x.dtype
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    expected = lam * exact + (1 - lam) * swapped(exact)
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=tolerance, atol=1e-6)


@every_dtype
def test_cutmix_is_the_formula(dtype: jax.typing.DTypeLike) -> None:
  images, targets = batch()
  images = images.astype(dtype)
  mixed, labels = jax.jit(cutmix_with)(images, targets, jnp.array([2, 3, 5, 4]))
  assert (mixed.dtype, labels.dtype) == (dtype, jnp.float32)
  expected = np.array(images)
  expected[:, 2:7, 3:7] = swapped(np.asarray(images))[:, 2:7, 3:7]
  np.testing.assert_array_equal(mixed, expected)
  exact, lam = np.asarray(targets, np.float64), 1 - 20 / 120
  np.testing.assert_allclose(labels, lam * exact + (1 - lam) * swapped(exact), rtol=1e-6)


# The law of what is drawn.


def draws_of(mixup: float, cutmix: float, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Whether a batch was cut, and its lam, by key: of 16x16 images, 0 beside 1."""
  images = jnp.broadcast_to(jnp.arange(2.0)[:, None, None, None], (2, 16, 16, 1))

  def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    mixed, targets = mix(key, images, jnp.eye(2), mixup, cutmix)
    return jnp.all((mixed == 0) | (mixed == 1)), targets[0, 0]

  # A map keeps the branches apart, as a step does.
  keys = jax.random.split(jax.random.key(3), count)
  cut, lam = jax.jit(lambda keys: jax.lax.map(one, keys))(keys)
  return np.asarray(cut), np.asarray(lam, np.float64)


def test_the_coin_is_fair_and_lam_has_its_law_on_either_side() -> None:
  count = 4000
  cut, lam = draws_of(0.8, 1.0, count)
  assert abs(cut.sum() - count / 2) < 5 * math.sqrt(count / 4)
  check_beta(lam[~cut], 0.8)
  # Boxes are clipped, so that less than 1 - lam is pasted.
  assert lam[cut].mean() > 0.55


@pytest.mark.parametrize('alpha', [0.2, 0.8, 1.0, 4.0])
def test_mixup_alone_draws_from_beta(alpha: float) -> None:
  cut, lam = draws_of(alpha, 0.0, 4000)
  # A lam of 0 or 1, to rounding, looks like a cut.
  assert cut.mean() < 0.05
  check_beta(lam, alpha)


def check_beta(lam: np.ndarray, alpha: float) -> None:
  """Mean 1/2, variance 1 / (4 (2 alpha + 1)), fourth moment 3 v^2 (2 alpha + 1) / (2 alpha + 3)."""
  variance = 1 / (4 * (2 * alpha + 1))
  fourth = 3 * variance**2 * (2 * alpha + 1) / (2 * alpha + 3)
  n = len(lam)
  assert abs(lam.mean() - 0.5) < 5 * math.sqrt(variance / n)
  assert abs(((lam - 0.5) ** 2).mean() - variance) < 5 * math.sqrt((fourth - variance**2) / n)


@pytest.mark.parametrize('alpha', [0.3, 1.0])
def test_cutmix_alone_has_the_law_of_the_procedure(alpha: float) -> None:
  cut, ours = draws_of(0.0, alpha, 4000)
  assert cut.all()
  rng = np.random.default_rng(6)
  theirs = []
  for _ in range(4000):
    side = int(16 * math.sqrt(1 - rng.beta(alpha, alpha)))
    pixels = np.zeros((16, 16))
    row, column = rng.integers(16, size=2)
    low, high = side // 2, (side + 1) // 2
    pixels[max(row - low, 0) : row + high, max(column - low, 0) : column + high] = 1
    theirs.append(1 - pixels.mean())
  for power in (1, 2):
    a, b = ours**power, np.array(theirs) ** power
    assert abs(a.mean() - b.mean()) < 5 * math.sqrt((a.var() + b.var()) / 4000)


@every_kind
def test_mixed_targets_say_what_the_images_are(mixup: float, cutmix: float) -> None:
  targets = batch(6)[1]
  # Of images that are their own targets, the mean pixel is the mixed target.
  images = jnp.broadcast_to(targets[:, None, None, :], (6, 12, 10, 5))
  jitted = jax.jit(mix, static_argnums=(3, 4))
  for seed in range(4):
    mixed, labels = jitted(jax.random.key(seed), images, targets, mixup, cutmix)
    np.testing.assert_allclose(labels.sum(axis=1), targets.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(mixed.mean(axis=(1, 2)), labels, rtol=1e-5)
    again = jitted(jax.random.key(seed), images, targets, mixup, cutmix)
    np.testing.assert_array_equal(again[0], mixed)
  eager = mix(jax.random.key(seed), images, targets, mixup, cutmix)
  np.testing.assert_allclose(eager[0], mixed, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(eager[1], labels, rtol=1e-5, atol=1e-6)


def test_erasing_is_the_same_under_jit() -> None:
  images, _ = batch()
  erased = jax.jit(erase, static_argnums=2)(KEY, images, 0.5)
  np.testing.assert_allclose(erased, erase(KEY, images, 0.5), rtol=1e-5, atol=1e-6)


# Over devices.


def augmented(key: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What a step does with its batch."""
  mix_key, erase_key = jax.random.split(key)
  images, targets = mix(mix_key, images, targets, 0.8, 1.0)
  return erase(erase_key, images, 0.25), targets


def collectives(fn: Callable[..., object], *arguments: jax.Array) -> list[str]:
  """The transfers between devices in the compiled program."""
  kinds = 'all-reduce|all-gather|all-to-all|collective-[a-z]+|reduce-scatter|ragged-all-to-all'
  hlo = jax.jit(fn).lower(*arguments).compile().as_text()
  return re.findall(rf'\b(?:{kinds})(?:-start)?\(', hlo)


def placed(*arrays: jax.Array) -> list[jax.Array]:
  """Arrays over the eight devices by their first axis."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  return jax.device_put(list(arrays), NamedSharding(mesh, PartitionSpec('data')))


def test_nothing_crosses_the_wire_and_the_devices_do_not_show() -> None:
  images, targets = batch(32)
  split = placed(images, targets)
  assert not collectives(augmented, KEY, *split)
  for seed in range(4):
    key = jax.random.key(seed)
    results = jax.jit(augmented)(key, *split)
    for ours, x, part in zip(results, jax.jit(augmented)(key, images, targets), split):
      assert ours.sharding.is_equivalent_to(part.sharding, ours.ndim)
      np.testing.assert_allclose(ours, x, rtol=1e-6, atol=1e-6)


def test_a_neighbour_on_another_device_would_be_seen() -> None:
  """One example a device is the case that the docstring leaves out; it still gives the values."""
  images, targets = batch(8)
  split = placed(images, targets)
  assert collectives(augmented, KEY, *split)
  for ours, x in zip(jax.jit(augmented)(KEY, *split), augmented(KEY, images, targets)):
    np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-6)


# What is refused.


@pytest.mark.parametrize('images', [jnp.zeros((2, 8, 8)), jnp.zeros((2, 8, 8, 3), jnp.uint8)])
def test_wrong_images(images: jax.Array) -> None:
  for call in (lambda: erase(KEY, images, 0.5), lambda: mix(KEY, images, jnp.eye(2), 0.8, 1.0)):
    with pytest.raises(ValueError, match=r'images must be floating \[B, H, W, C\], got .*: norm'):
      call()


@pytest.mark.parametrize('targets', [jnp.eye(3), jnp.zeros(2), jnp.eye(2, dtype=jnp.int32)])
def test_wrong_targets(targets: jax.Array) -> None:
  with pytest.raises(ValueError, match=r'targets must be floating \[2, K\], got .*: take one-hot'):
    mix(KEY, jnp.zeros((2, 8, 8, 3)), targets, 0.8, 1.0)


def test_wrong_numbers() -> None:
  images, targets = batch(2)
  for probability in (-0.1, 1.1, math.nan):
    with pytest.raises(ValueError, match=f'probability must be in 0..1, got {probability}'):
      erase(KEY, images, probability)
  with pytest.raises(ValueError, match=r'draws must be \[B, 10, 4\], got \(2, 4\)'):
    erase_boxes(jnp.zeros((2, 4)), 8, 8)
  with pytest.raises(ValueError, match='mixup must be finite and at least 0, got -1'):
    mix(KEY, images, targets, -1.0, 1.0)
  with pytest.raises(ValueError, match='cutmix must be finite and at least 0, got inf'):
    mix(KEY, images, targets, 0.8, math.inf)
  with pytest.raises(ValueError, match='mixup and cutmix are both 0: make one positive'):
    mix(KEY, images, targets, 0.0, 0.0)
  odd = batch(7)
  for call in (
    lambda: mix(KEY, *odd, 0.8, 1.0),
    lambda: mixup_with(*odd, 0.5),
    lambda: cutmix_with(*odd, jnp.zeros(4, jnp.int32)),
  ):
    with pytest.raises(ValueError, match='got a batch of 7: take an even batch'):
      call()

"""RandAugment against values recorded from timm, and the law of what it draws."""

import dataclasses
import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saq_jax.data import randaugment
from saq_jax.data.randaugment import OPERATIONS, RandAugment, apply

RECORD = np.load(Path(__file__).parent / 'reference' / 'augment_record.npz')
FILL, GREY_FILL = (124, 116, 104), (116,)
SIGNS = (1, -1)
MOVING = ('Rotate', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel')
ENHANCING = ('ColorIncreasing', 'ContrastIncreasing', 'BrightnessIncreasing', 'SharpnessIncreasing')
SIGNED = MOVING + ENHANCING

every_operation = pytest.mark.parametrize('name', OPERATIONS)


def color() -> Image.Image:
  return Image.fromarray(RECORD['image'])


def grey() -> Image.Image:
  return Image.fromarray(RECORD['grey'])


def check(image: Image.Image, recorded: np.ndarray, name: str) -> None:
  """Compares values; a level apart is allowed where Pillow blends or interpolates.

  It does that in floating point and rounds: another version or processor may round a tie the
  other way. With Pillow 10.0, 11.3, 12.3 and 13.0 on x86-64 all values are equal.
  """
  apart = 1 if name in (*SIGNED, 'policy') else 0
  values = np.asarray(image)
  assert (values.shape, values.dtype) == (recorded.shape, np.uint8)
  assert np.max(np.abs(values.astype(int) - recorded)) <= apart


# Against timm.


def test_the_operations_are_fifteen_and_those_recorded() -> None:
  assert len(OPERATIONS) == 15
  assert sorted(OPERATIONS) == sorted(k.removeprefix('rgb/') for k in RECORD if k.startswith('rgb'))


@every_operation
@pytest.mark.parametrize('sign', SIGNS)
def test_an_operation_is_timms(name: str, sign: int) -> None:
  recorded = RECORD[f'rgb/{name}'][:, SIGNS.index(sign)]
  assert len(recorded) >= 4
  for magnitude, values in zip(RECORD['magnitudes'].tolist(), recorded):
    check(apply(name, color(), magnitude, sign, FILL, 'bicubic'), values, name)


@every_operation
def test_an_operation_on_grey_is_timms(name: str) -> None:
  for sign, values in zip(SIGNS, RECORD[f'grey/{name}']):
    check(apply(name, grey(), 9.0, sign, GREY_FILL), values, name)


@pytest.mark.parametrize('name', MOVING)
def test_bilinear_interpolation_is_timms(name: str) -> None:
  for sign, values in zip(SIGNS, RECORD[f'bilinear/{name}']):
    check(apply(name, color(), 9.0, sign, FILL, 'bilinear'), values, name)
    assert np.any(np.asarray(apply(name, color(), 9.0, sign, FILL)) != values)


def test_the_whole_policy_is_timms() -> None:
  augment = RandAugment()
  changed = 0
  for draws, values in zip(RECORD['policy/draws'], RECORD['policy/images']):
    check(augment(color(), draws), values, 'policy')
    changed += np.any(values != RECORD['image'])
  assert changed > 8


# Each operation.


@every_operation
def test_the_sign_matters_where_there_is_one(name: str) -> None:
  ahead, back = (np.asarray(apply(name, color(), 9.0, sign)) for sign in SIGNS)
  assert np.any(ahead != back) == (name in SIGNED)


@pytest.mark.parametrize('name', [*SIGNED, 'SolarizeAdd', 'SolarizeIncreasing'])
def test_magnitude_zero_changes_nothing(name: str) -> None:
  for sign in SIGNS:
    np.testing.assert_array_equal(apply(name, color(), 0.0, sign), RECORD['image'])


def test_posterizing_keeps_four_bits_down_to_none() -> None:
  """At magnitude 10, where Pillow 13 has no answer, timm's scale ends at 0 bits: black."""
  values = RECORD['image'].astype(int)
  for magnitude, bits in [(0, 4), (2.4, 4), (2.5, 3), (5, 2), (7.5, 1), (9.99, 1), (10, 0)]:
    kept = values // 2 ** (8 - bits) * 2 ** (8 - bits)
    np.testing.assert_array_equal(apply('PosterizeIncreasing', color(), magnitude), kept)


@every_operation
@pytest.mark.parametrize('image', [color(), grey()], ids=['RGB', 'L'])
def test_an_image_keeps_its_mode_and_size_and_is_left_alone(name: str, image: Image.Image) -> None:
  before = np.array(image)
  result = apply(name, image, 10.0, -1)
  assert result is not image
  assert (result.mode, result.size) == (image.mode, image.size)
  np.testing.assert_array_equal(image, before)


def test_color_is_the_identity_on_grey() -> None:
  np.testing.assert_array_equal(apply('ColorIncreasing', grey(), 9.0), RECORD['grey'])


@pytest.mark.parametrize('name', MOVING)
def test_the_fill_stands_outside_the_image(name: str) -> None:
  black, dark = Image.new('RGB', (12, 12)), Image.new('L', (12, 12))

  def colours(image: Image.Image) -> list[list[int]]:
    return np.asarray(image).reshape(144, -1).tolist()

  assert list(FILL) in colours(apply(name, black, 10.0, 1, FILL))
  assert [7, 7, 7] in colours(apply(name, black, 10.0, 1, (7,)))
  assert [7] in colours(apply(name, dark, 10.0, 1, (7,)))
  # The grey of the colour, as Pillow has it.
  shade = Image.new('RGB', (1, 1), FILL).convert('L').getpixel((0, 0))
  assert [shade] in colours(apply(name, dark, 10.0, 1, FILL))


# The law of the draws.


@dataclasses.dataclass(frozen=True)
class Call:
  name: str
  magnitude: float
  sign: int


def test_choices_signs_and_magnitudes_have_their_laws(monkeypatch: pytest.MonkeyPatch) -> None:
  calls: list[Call] = []

  def noted(name: str, image: Image.Image, magnitude: float, sign: int, *_: object) -> Image.Image:
    calls.append(Call(name, magnitude, sign))
    return image

  monkeypatch.setattr(randaugment, 'apply', noted)
  augment, count = RandAugment(std=0.4, layers=3, probability=0.3, magnitude=5.0), 20_000
  for draws in np.random.default_rng(0).random((count, augment.num_draws)):
    augment(color(), draws)
  n = len(calls)
  assert abs(n - 0.3 * 3 * count) < 5 * math.sqrt(0.3 * 0.7 * 3 * count)
  each = Counter(call.name for call in calls)
  for name in OPERATIONS:
    assert abs(each[name] - n / 15) < 5 * math.sqrt(n * 14 / 15**2)
  assert abs(sum(call.sign for call in calls)) < 5 * math.sqrt(n)
  # A normal law: the deviation of the sample's deviation is std / sqrt(2 n).
  magnitudes = np.array([call.magnitude for call in calls])
  assert abs(magnitudes.mean() - 5.0) < 5 * 0.4 / math.sqrt(n)
  assert abs(magnitudes.std() - 0.4) < 5 * 0.4 / math.sqrt(2 * n)
  # What one says tells nothing of the other.
  tie = np.corrcoef(magnitudes, [call.sign for call in calls])[0, 1]
  assert abs(tie) < 5 / math.sqrt(n)


def test_magnitudes_are_clipped_to_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
  seen: list[float] = []
  monkeypatch.setattr(randaugment, 'apply', lambda _, image, m, *__: seen.append(m) or image)
  for mean in (0.0, 9.0, 10.0):
    augment = RandAugment(magnitude=mean, std=2.0, layers=1, probability=1.0)
    for u in np.linspace(0, 1, 1001)[:-1]:
      augment(color(), np.array([0.0, 0.0, u, 0.0]))
  assert (min(seen), max(seen)) == (0.0, 10.0)
  # At 9, as far as N(0, 1) is over 1/2.
  share = np.mean(np.array(seen[1000:2000]) == 10.0)
  assert abs(share - 0.5 * math.erfc(0.5 / math.sqrt(2))) < 2e-3


@pytest.mark.parametrize('draw', [0.0, 0.999999, 1 - 2**-53])
@pytest.mark.parametrize('magnitude', [0.0, 10.0])
@pytest.mark.parametrize('std', [0.0, 0.5, 100.0])
@pytest.mark.parametrize('image', [color(), grey()], ids=['RGB', 'L'])
def test_extremes(draw: float, magnitude: float, std: float, image: Image.Image) -> None:
  augment = RandAugment(magnitude, std, layers=3, probability=1.0)
  result = augment(image, np.full(augment.num_draws, draw))
  assert (result.mode, result.size) == (image.mode, image.size)


def test_it_is_a_pure_function_of_image_and_draws() -> None:
  augment = RandAugment(probability=1.0)
  draws = np.random.default_rng(1).random(augment.num_draws)
  image, copy = color(), draws.copy()
  first = augment(image, draws)
  np.testing.assert_array_equal(augment(image, draws), first)
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(augment))(image, draws), first)
  np.testing.assert_array_equal(image, RECORD['image'])
  np.testing.assert_array_equal(draws, copy)


def test_nothing_happens_at_probability_or_layers_zero() -> None:
  image = color()
  assert RandAugment(probability=0.0)(image, np.zeros(8)) is image
  assert RandAugment(layers=0)(image, np.zeros(0)) is image
  assert RandAugment().num_draws == 8


# What is refused.


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'magnitude': 11.0}, 'magnitude must be in 0..10, got 11.0'),
    ({'magnitude': math.nan}, 'magnitude must be in 0..10, got nan'),
    ({'std': -1.0}, 'std must be finite and at least 0, got -1.0'),
    ({'std': math.inf}, 'std must be finite and at least 0, got inf'),
    ({'layers': -1}, 'layers must be 0 or more, got -1'),
    ({'probability': 1.5}, r'probability must be in 0..1, got 1.5'),
    ({'fill': (1, 2)}, r'fill must hold 1 or 3 values in 0..255, got \(1, 2\)'),
    ({'fill': (256,)}, r'fill must hold 1 or 3 values in 0..255, got \(256,\)'),
    ({'resample': 'nearest'}, "resample must be 'bilinear' or 'bicubic', got 'nearest'"),
  ],
)
def test_wrong_settings(wrong: dict[str, object], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    RandAugment(**wrong)


def test_wrong_arguments() -> None:
  with pytest.raises(ValueError, match="'Blur' is not an operation: take one of AutoContrast, "):
    apply('Blur', color(), 1.0)
  with pytest.raises(ValueError, match='sign must be 1 or -1, got 0'):
    apply('Rotate', color(), 1.0, 0)
  with pytest.raises(ValueError, match=r'magnitude must be in 0..10, got -1'):
    apply('Rotate', color(), -1)
  with pytest.raises(ValueError, match=r'draws must be \[8\] \(num_draws\), got \(4,\)'):
    RandAugment()(color(), np.zeros(4))
  for mode in ('RGBA', 'P', 'CMYK', '1'):
    image = Image.new(mode, (4, 4))
    with pytest.raises(ValueError, match=f'must be in mode RGB or L, got {mode}'):
      RandAugment()(image, np.ones(8))

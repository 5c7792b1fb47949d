"""Makes tests/reference/augment_record.npz: what timm's augmentation makes of small arrays.

Run with PyTorch and timm installed, from the root of the repository:
python tests/make_augment_record.py

Everything that timm draws is given to it, so that both sides see the same numbers. The record
has been made with timm 1.0.31 and Pillow 13.0.
"""

import contextlib
import random
import statistics
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, mixup, random_erasing

# Posterizing to 0 bits, at magnitude 10, is an error in Pillow 13.
MAGNITUDES = [0.0, 3.3, 6.5, 9.2, 10.0]
GEOMETRIC = ['Rotate', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel']
FILL, GREY_FILL = (124, 116, 104), 116
FILTERS = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}


def small_image() -> np.ndarray:
  """uint8 [24, 20, 3]: slopes, a disc, stripes and a flat part, in a part of the range."""
  i, j = np.mgrid[:24, :20]
  planes = [
    30 + 7 * i + 2 * j,
    200 - 5 * i + 3 * (j % 5),
    60 + 110 * ((i - 10) ** 2 + (j - 9) ** 2 < 36) + (i * j) % 13,
  ]
  image = np.stack(planes, axis=-1)
  image[18:, 14:] = [90, 140, 40]
  return image.astype(np.uint8)


def operation(name, image, magnitude, sign, fill, resample='bicubic'):
  """timm's operation with the sign that is wanted."""
  hparams = {'img_mean': fill, 'interpolation': FILTERS[resample], 'magnitude_std': 0}
  op = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
  with mock.patch.object(random, 'random', return_value=0.25 if sign > 0 else 0.75):
    return np.asarray(op(image))


def operations() -> dict[str, np.ndarray]:
  """Each operation by magnitude and sign, and in grey and bilinearly at magnitude 9."""
  color = Image.fromarray(small_image())
  grey = color.convert('L')
  record = {'image': small_image(), 'grey': np.asarray(grey), 'magnitudes': np.array(MAGNITUDES)}
  for name in auto_augment._RAND_INCREASING_TRANSFORMS:
    steps = [m for m in MAGNITUDES if name != 'PosterizeIncreasing' or m < 10]
    rows = [[operation(name, color, m, sign, FILL) for sign in (1, -1)] for m in steps]
    record[f'rgb/{name}'] = np.array(rows)
    record[f'grey/{name}'] = np.array([operation(name, grey, 9.0, s, GREY_FILL) for s in (1, -1)])
  for name in GEOMETRIC:
    rows = [operation(name, color, 9.0, sign, FILL, 'bilinear') for sign in (1, -1)]
    record[f'bilinear/{name}'] = np.array(rows)
  return record


def policies() -> dict[str, np.ndarray]:
  """Whole images through timm's policy, with the numbers it draws in its own order."""
  hparams = {'img_mean': FILL, 'interpolation': FILTERS['bicubic']}
  policy = auto_augment.rand_augment_transform('rand-m9-mstd0.5-inc1', hparams)
  draws = np.random.default_rng(0).random((16, 2, 4))
  results = []
  for rows in draws:
    numbers, sizes = [], []
    for row in rows:
      op = policy.ops[int(row[0] * len(policy.ops))]
      # A sign is drawn only by an operation that has one.
      signed = not op.name.startswith(('Auto', 'Equ', 'Inv', 'Pos', 'Sol'))
      if row[1] <= 0.5:
        sizes.append(statistics.NormalDist(9.0, 0.5).inv_cdf(row[2]))
      numbers += [row[1], row[3]] if row[1] <= 0.5 and signed else [row[1]]
    chosen = [policy.ops[int(row[0] * len(policy.ops))] for row in rows]
    with (
      mock.patch.object(np.random, 'choice', return_value=chosen),
      mock.patch.object(random, 'random', side_effect=numbers) as drawn,
      mock.patch.object(random, 'gauss', side_effect=sizes),
    ):
      results.append(np.asarray(policy(Image.fromarray(small_image()))))
    assert drawn.call_count == len(numbers)
  return {'policy/draws': draws.reshape(16, 8), 'policy/images': np.array(results)}


class Tries:
  """What timm's erasing draws, from four uniform numbers a try."""

  def __init__(self, draws):
    self.draws, self.calls = draws, 0

  def uniform(self, low, high):
    self.calls += 1
    return low + (high - low) * self.draws[(self.calls - 1) // 2][(self.calls - 1) % 2]

  def randint(self, low, high):
    # The row is asked for first, then the column.
    self.column = not getattr(self, 'column', True)
    return low + int(self.draws[self.calls // 2 - 1][2 + self.column] * (high - low + 1))

  def random(self):
    return 0.0


def erasing() -> dict[str, np.ndarray]:
  """Boxes that timm erases: top, left, height, width; zeros for none."""
  record = {}
  for height, width in [(32, 48), (40, 12)]:
    draws = np.random.default_rng(height).random((48, 10, 4)).astype(np.float32)
    boxes = []
    for tries in draws.astype(float):
      image = torch.full((1, height, width), 99.0)
      with mock.patch.object(random_erasing, 'random', Tries(tries)):
        random_erasing.RandomErasing(1.0, mode='pixel', device='cpu')(image)
      rows, columns = np.nonzero((image[0] != 99).numpy())
      box = [rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1] if len(rows) else 0
      boxes.append(np.broadcast_to(box, 4))
    record[f'erase/{height}x{width}/draws'] = draws
    record[f'erase/{height}x{width}/boxes'] = np.array(boxes)
  return record


@contextlib.contextmanager
def given(lam, coin=0.0, centre=(0, 0)):
  """NumPy's generator, which gives what timm is to draw."""
  with (
    mock.patch.object(np.random, 'beta', return_value=lam),
    mock.patch.object(np.random, 'rand', return_value=coin),
    mock.patch.object(np.random, 'randint', side_effect=centre),
  ):
    yield


def mixing() -> dict[str, np.ndarray]:
  """Boxes of CutMix with their lam, and mixed batches in which neighbours are partners."""
  rng = np.random.default_rng(1)
  boxes = []
  for height, width in [(10, 7), (32, 32), (224, 224)] * 12:
    lam, centre = np.float32(rng.random()), (rng.integers(height), rng.integers(width))
    with given(lam, centre=centre):
      (top, bottom, left, right), after = mixup.cutmix_bbox_and_lam((height, width), float(lam))
    boxes.append([height, width, lam, *centre, top, left, bottom - top, right - left, after])
  images = rng.normal(size=(6, 10, 7, 3)).astype(np.float32)
  labels = torch.tensor([0, 3, 3, 1, 4, 2])
  record = {'mix/boxes': np.array(boxes, np.float64), 'mix/images': images}
  record['mix/targets'] = mixup.mixup_target(labels, 5, 1.0, 0.1).numpy()
  # timm pairs an example with that in its place from the end.
  order = [0, 2, 4, 5, 3, 1]
  for name, coin, lam, centre in [
    ('mixup', 0.75, 0.3, (0, 0)),
    ('cutmix', 0.25, 0.6, (5, 3)),
    ('cutmix_clipped', 0.25, 0.4, (9, 1)),
  ]:
    x = torch.tensor(images[order]).permute(0, 3, 1, 2).contiguous()
    mixer = mixup.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
    with given(lam, coin, centre):
      x, y = mixer(x, labels[order])
    mixed, targets = np.empty_like(images), np.empty((6, 5), np.float32)
    mixed[order], targets[order] = x.permute(0, 2, 3, 1).numpy(), y.numpy()
    record[f'mix/{name}/images'], record[f'mix/{name}/targets'] = mixed, targets
    record[f'mix/{name}/drawn'] = np.array([lam, *centre])
  return record


if __name__ == '__main__':
  path = Path(__file__).parent / 'reference' / 'augment_record.npz'
  np.savez_compressed(path, **operations(), **policies(), **erasing(), **mixing())
  print(f'{path}: {path.stat().st_size} bytes')

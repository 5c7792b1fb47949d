"""Images of any size: random parts to train on, centres to evaluate on, and what cannot be read."""

import dataclasses
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_datasets import prepare
from PIL import Image

from saq_jax.data.datasets import load_examples, load_records
from saq_jax.data.decode import RecordError
from saq_jax.data.loader import Loader, Reading
from saq_jax.data.records import Records
from saq_jax.data.resize import Resizing, random_box
from saq_jax.data.source import eval_source, train_source

SMALL = Resizing(size=8, resize=10)
RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('tfds'))
  prepare('imagenet2012', folder, train=12, validation=5)
  prepare('oxford_flowers102', folder, train=3)
  return folder


def encoded(image, form='PNG'):
  file = io.BytesIO()
  image.save(file, form)
  return file.getvalue()


def records(*images, labels=None, resizing=SMALL, channels=3):
  rows = [{'image': x, 'label': k} for x, k in zip(images, labels or range(len(images)))]
  return Records(rows, 10, channels, resizing)


# The random crop.


@given(
  width=st.integers(1, 2000),
  height=st.integers(1, 2000),
  draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=40, max_size=40),
  low=st.floats(0.05, 1.0),
)
def test_a_crop_lies_in_the_image_and_keeps_its_bounds(width, height, draws, low):
  left, top, right, bottom = random_box(width, height, np.array(draws), (low, 1.0))
  w, h = right - left, bottom - top
  assert 0 <= left < right <= width
  assert 0 <= top < bottom <= height
  assert all(side == int(side) for side in (left, top, right, bottom))
  # Each side is rounded by at most a half.
  if min(w, h) > 20:
    assert 3 / 4 * 0.94 <= w / h <= 4 / 3 * 1.06


def torchvision_crop(width, height, draws, scale):
  """The published procedure, written with other words: area, then aspect, then a place."""
  for i in range(10):
    u = draws[4 * i : 4 * i + 4]
    area = (scale[0] * (1 - u[0]) + scale[1] * u[0]) * width * height
    aspect = (3 / 4) ** (1 - u[1]) * (4 / 3) ** u[1]
    w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    if w <= width and h <= height and w > 0 and h > 0:
      left, top = int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1))
      return left, top, left + w, top + h
  raise AssertionError


def test_the_crop_is_the_published_one():
  for _ in range(200):
    draws = RNG.random(40)
    assert random_box(320, 240, draws, (0.08, 1.0)) == torchvision_crop(320, 240, draws, (0.08, 1))


def test_shares_of_the_area_are_uniform():
  shares = []
  for _ in range(2000):
    left, top, right, bottom = random_box(1000, 1000, RNG.random(40), (0.2, 0.6))
    shares.append((right - left) * (bottom - top) / 1e6)
  assert 0.199 < min(shares) < 0.21
  assert 0.59 < max(shares) < 0.601
  # The mean of a uniform law, within five standard errors.
  assert abs(np.mean(shares) - 0.4) < 5 * 0.4 / math.sqrt(12 * 2000)


@pytest.mark.parametrize(
  ('size', 'box'),
  [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520)), ((1, 1), (0, 0, 1, 1))],
)
def test_an_image_of_extreme_shape_gives_its_centre(size, box):
  assert random_box(*size, np.full(40, 0.999), (1.0, 1.0)) == box


# Batches.


def test_training_images_are_the_scaled_crops():
  pixels = RNG.integers(0, 256, (30, 50, 3), np.uint8)
  data = records(encoded(Image.fromarray(pixels)))
  batch = data.train_batch(np.array([0]), seed=3, positions=[7])
  bits = np.random.Philox(np.random.SeedSequence((3, 7, 1))).random_raw(40)
  left, top, right, bottom = map(
    int, torchvision_crop(50, 30, (bits >> np.uint64(11)) / 2.0**53, (0.08, 1.0))
  )
  part = Image.fromarray(pixels[top:bottom, left:right])
  want = np.asarray(part.resize((8, 8), Image.Resampling.BILINEAR))
  np.testing.assert_array_equal(batch['image'][0], want)


def test_training_images_depend_on_seed_and_position_alone():
  data = records(*[encoded(Image.fromarray(RNG.integers(0, 256, (40, 30, 3), np.uint8)))] * 2)
  indices = np.array([0, 1])
  one = data.train_batch(indices, 1, [5, 6])['image']
  np.testing.assert_array_equal(one, data.train_batch(indices, 1, [5, 6])['image'])
  np.testing.assert_array_equal(one[1], data.train_batch(np.array([0]), 1, [6])['image'][0])
  assert np.any(one != data.train_batch(indices, 2, [5, 6])['image'])
  assert np.any(one[0] != one[1])


@pytest.mark.parametrize('shape', [(30, 50), (50, 30), (10, 10), (7, 90)])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_evaluation_scales_the_shorter_side_and_cuts_the_centre(shape, interpolation):
  pixels = RNG.integers(0, 256, (*shape, 3), np.uint8)
  resizing = Resizing(size=8, resize=10, interpolation=interpolation)
  batch = records(encoded(Image.fromarray(pixels)), resizing=resizing).eval_batch(np.array([0]))
  height, width = shape
  size = (int(10 * width / height), 10) if height < width else (10, int(10 * height / width))
  kind = {'bilinear': Image.BILINEAR, 'bicubic': Image.BICUBIC}[interpolation]
  scaled = np.asarray(Image.fromarray(pixels).resize(size, kind))
  left, top = round((size[0] - 8) / 2), round((size[1] - 8) / 2)
  np.testing.assert_array_equal(batch['image'][0], scaled[top : top + 8, left : left + 8])


def test_other_kinds_of_images_come_in_the_channels_wanted():
  grey = Image.fromarray(np.full((20, 20), 100, np.uint8))
  cmyk = Image.new('CMYK', (20, 20), (0, 0, 0, 155))
  palette = Image.new('P', (20, 20), 0)
  data = records(
    encoded(grey, 'JPEG'), encoded(cmyk, 'JPEG'), encoded(palette), encoded(grey.convert('RGBA'))
  )
  images = data.eval_batch(np.arange(4))['image']
  assert images.shape == (4, 8, 8, 3)
  np.testing.assert_allclose(images[[0, 1, 3]].astype(int), 100, atol=2)
  (one,) = records(encoded(cmyk, 'JPEG'), channels=1).eval_batch(np.array([0]))['image']
  assert one.shape == (8, 8, 1)


@pytest.mark.parametrize(
  ('image', 'label', 'words'),
  [
    (b'no image at all', 1, 'record 1: its image cannot be decoded'),
    (encoded(Image.new('RGB', (20, 20)), 'JPEG')[:200], 1, 'record 1: its image cannot be decoded'),
    (encoded(Image.new('RGB', (20, 20))), -1, 'record 1: label -1 is not one of 10 classes'),
    (encoded(Image.new('RGB', (20, 20))), 10, 'record 1: label 10'),
  ],
)
def test_what_cannot_be_used_is_named(image, label, words):
  data = records(encoded(Image.new('RGB', (9, 9))), image, labels=[0, label])
  with pytest.raises(ValueError, match=words):
    data.eval_batch(np.array([0, 1]))
  with pytest.raises(ValueError, match=words):
    data.train_batch(np.array([0, 1]), 0, [0, 1])


# Real builders.


def test_real_builders_read_local_files(data_dir):
  train = load_records('imagenet2012', 'train', data_dir, SMALL)
  assert (len(train), train.num_classes, train.image_shape) == (12, 1000, (8, 8, 3))
  flowers = load_records('oxford_flowers102', 'train[:2]', data_dir, SMALL)
  assert (len(flowers), flowers.num_classes) == (2, 102)
  seen = np.concatenate([b['label'] for b in eval_source(train, 5)])[:12]
  assert sorted(seen.tolist()) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
  # Images of one size can be brought to another one too.
  digits = load_records('digits', 'test[:3]', data_dir, SMALL)
  assert digits.eval_batch(np.arange(3))['image'].shape == (3, 8, 8, 1)


def test_images_of_any_size_need_one(data_dir):
  with pytest.raises(ValueError, match=r'one fixed shape .*set config\.data\.image_size'):
    load_examples('imagenet2012', 'train', data_dir)


def test_two_processes_share_a_batch_and_a_run_resumes(data_dir):
  data = load_records('imagenet2012', 'train', data_dir, SMALL)
  whole = train_source(data, 8, seed=4)
  shares = [train_source(data, 8, seed=4, process_index=i, process_count=2) for i in range(2)]
  for step in (0, 1, 5):
    for key in ('image', 'label'):
      parts = np.concatenate([share[step][key] for share in shares])
      np.testing.assert_array_equal(parts, whole[step][key])
  np.testing.assert_array_equal(whole[3:][2]['image'], whole[5]['image'])


def test_padded_evaluation_counts_every_record_once(data_dir):
  data = load_records('imagenet2012', 'validation', data_dir, SMALL)
  for i in range(2):
    batches = list(eval_source(data, 8, process_index=i, process_count=2))
    assert [b['image'].shape for b in batches] == [(4, 8, 8, 3)]
    assert batches[0]['mask'].tolist() == ([1.0] * 4 if i == 0 else [1.0, 0, 0, 0])


# Damaged files of records.


@pytest.fixture
def flipped(tmp_path):
  """A data directory in which a few bytes of one record are others; the record."""
  prepare('imagenet2012', tmp_path, train=12)
  (shard,) = tmp_path.glob('*/*/*array_record*')
  data = bytearray(shard.read_bytes())
  for place in range(3000, 3004):
    data[place] ^= 0xFF
  shard.write_bytes(data)
  whole = load_records('imagenet2012', 'train', str(tmp_path), SMALL)
  (name,) = whole.find_damaged(lambda count: None)
  return str(tmp_path), int(name.removeprefix('record '))


def test_a_record_whose_file_is_damaged_is_named(flipped):
  data_dir, bad = flipped
  data = load_records('imagenet2012', 'train', data_dir, SMALL)
  for call in (data.eval_batch, lambda i: data.train_batch(i, 0, [0])):
    with pytest.raises(RecordError) as caught:
      call(np.array([bad]))
    message = str(caught.value)
    assert message.startswith(f"imagenet2012 'train', record {bad} cannot be read from its file (")
    assert "delete the dataset's directory and run `python -m saq_jax.data.prepare`" in message
    assert message.endswith('config.data.skip_damaged=True leaves such records out')
    assert '\n' not in message


def test_a_record_whose_file_is_damaged_is_left_out(flipped):
  data_dir, bad = flipped
  data = load_records('imagenet2012', 'train', data_dir, SMALL, skip_damaged=True)
  batch = data.train_batch(np.arange(12), 0, range(12))
  assert np.flatnonzero(batch['damaged']).tolist() == [bad]
  assert batch['label'][bad] == data.records[(bad + 1) % 12]['label']
  assert np.flatnonzero(data.eval_batch(np.arange(12))['damaged']).tolist() == [bad]


@pytest.mark.parametrize('workers', [0, 2])
def test_damaged_files_end_a_loader_with_one_line(flipped, workers):
  data = load_records('imagenet2012', 'train', flipped[0], SMALL)
  with (
    pytest.raises(RecordError, match=f'record {flipped[1]} cannot be read'),
    Loader(train_source(data, 12, seed=0), 0, 2, lambda batch: batch, Reading(workers)) as batches,
  ):
    list(batches)


def test_labels_of_a_damaged_file(flipped):
  with pytest.raises(ValueError, match=rf"'train', record {flipped[1]} cannot be read from its"):
    load_records('imagenet2012', 'train', flipped[0], SMALL, classes=('n01440764', 'n01443537'))


def test_a_wrong_label_is_no_damage():
  data = records(
    encoded(Image.new('RGB', (9, 9))), encoded(Image.new('RGB', (9, 9))), labels=[0, 10]
  )
  data = dataclasses.replace(data, skip_damaged=True)
  for call in (data.eval_batch, lambda i: data.train_batch(i, 0, [0])):
    with pytest.raises(RecordError, match='label 10 is not one of 10 classes'):
      call(np.array([1]))


def test_where_nothing_is_sound_few_records_are_tried():
  read = []

  class Broken(list):
    def __getitem__(self, index):
      read.append(index)
      return super().__getitem__(index)

  rows = Broken([{'image': b'no image', 'label': 0}] * 500)
  data = Records(rows, 10, 3, SMALL, skip_damaged=True)
  with pytest.raises(RecordError, match='100 records in a row are damaged, too many') as caught:
    data.train_batch(np.array([450]), 0, [0])
  assert 'skip_damaged' not in str(caught.value)
  # Each is read once, for the message too.
  assert read == [*range(450, 500), *range(50)]
  assert len(data.find_damaged(lambda count: None)) == 500

"""A folder of images becomes a dataset: its layout, its order, its changes, and what is refused."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from local_datasets import fill, names, photo_folder, prepared

from saq_jax.data import folder as folder_lib
from saq_jax.data import folder_listing
from saq_jax.data.datasets import load_records
from saq_jax.data.folder import folder_builder, prepare_folder
from saq_jax.data.resize import Resizing


@pytest.fixture
def photos(tmp_path):
  return photo_folder(tmp_path / 'photos')


@pytest.fixture
def data_dir(tmp_path):
  return str(tmp_path / 'data')


def refusal(photos, data_dir, **options):
  with pytest.raises(ValueError) as error:
    prepared(photos, data_dir, **options)
  assert '\n' not in str(error.value)
  assert not list(Path(data_dir).glob('*/*'))
  return str(error.value)


# What is stored.


def test_files_are_stored_as_they_are(photos, data_dir):
  builder, notes = prepared(photos, data_dir)
  assert [note.split(' in ')[0] for note in notes] == ['Storing 20 images (0.0 MB)']
  assert {s: i.num_examples for s, i in builder.info.splits.items()} == {
    'train': 16,
    'validation': 4,
  }
  assert builder.info.features['label'].names == ['ant', 'bee']
  records = load_records(f'folder:{photos}', 'train+validation', data_dir, Resizing(8, 8))
  assert (len(records), records.num_classes) == (20, 2)
  seen = set()
  for record in records.records:
    path = record['file_name'].decode()
    seen.add(path)
    assert record['image'] == (photos / path).read_bytes()
    assert record['label'] == ('ant', 'bee').index(path.split('/')[1])
  assert len(seen) == 20
  # Every format is decoded; a photograph's colour says its class.
  batch = records.eval_batch(np.arange(20))
  colours = 40 + np.outer(batch['label'], (37, 91, 53)) % 180
  assert np.abs(batch['image'].mean((1, 2)) - colours).max() < 25


def test_classes_alone_are_one_split_in_a_random_order(tmp_path, data_dir):
  for label, name in enumerate(('b', 'a', 'c')):
    fill(tmp_path / 'photos' / name, 60, label)
  builder, _ = prepared(tmp_path / 'photos', data_dir)
  assert list(builder.info.splits) == ['train']
  assert builder.info.features['label'].names == ['a', 'b', 'c']
  labels = np.array([record['label'] for record in builder.as_data_source('train')])
  assert np.bincount(labels).tolist() == [60, 60, 60]
  # Runs of one class, and what a tenth holds, are those of a random order.
  assert 90 < np.sum(labels[1:] != labels[:-1]) < 150
  assert (np.bincount(labels[162:], minlength=3) >= 2).all()
  # The slices have all images once.
  parts = names(builder, 'train[:90%]'), names(builder, 'train[90%:]')
  assert [len(set(part)) for part in parts] == [162, 18]
  assert [*parts[0], *parts[1]] == names(builder, 'train')


def test_the_order_is_that_of_a_hash_and_does_not_hang_on_shards(
  photos, data_dir, tmp_path, monkeypatch
):
  # A slice must stay the same images on every machine.
  order = names(prepared(photos, data_dir)[0], 'train')
  assert order == sorted(order, key=lambda p: hashlib.sha256(f'train/{p}'.encode()).digest())
  monkeypatch.setattr(folder_lib, '_SHARD_BYTES', 1500)
  builder, _ = prepared(photos, str(tmp_path / 'other'))
  assert builder.info.splits['train'].num_shards > 4
  assert names(builder, 'train') == order
  records = builder.as_data_source('train', decoders={'image': tfds.decode.SkipDecoding()})
  assert [len(r['image']) for r in records] == [(photos / name).stat().st_size for name in order]


def test_links_are_followed_and_hidden_names_passed_over(photos, data_dir, tmp_path):
  fill(tmp_path / 'elsewhere', 2)
  (photos / 'train' / 'cow').symlink_to(tmp_path / 'elsewhere')
  (photos / 'train' / 'ant' / 'link.jpg').symlink_to(tmp_path / 'elsewhere' / '0.jpg')
  (photos / 'train' / '.cache').mkdir()
  (photos / 'train' / 'ant' / '._0.jpg').write_bytes(b'of another system')
  (photos / 'notes.txt').touch()
  (photos / 'val' / 'bee' / 'list.csv').touch()
  builder, notes = prepared(photos, data_dir)
  assert builder.info.features['label'].names == ['ant', 'bee', 'cow']
  assert {'train/cow/0.jpg', 'train/cow/1.jpg', 'train/ant/link.jpg'} < set(names(builder, 'train'))
  assert builder.info.splits['train'].num_examples == 19
  assert notes[0] == '2 other files or folders are not read: notes.txt, val/bee/list.csv'


def test_names_that_are_not_unicode(photos, data_dir):
  odd = os.fsdecode(b'caf\xe9.jpg')
  shutil.copy(photos / 'train' / 'ant' / '0.jpg', photos / 'train' / 'ant' / odd)
  assert 'train/ant/caf\\xe9.jpg' in names(prepared(photos, data_dir)[0], 'train')


def test_a_class_may_be_called_train(tmp_path, data_dir):
  for name in ('car', 'train'):
    fill(tmp_path / 'photos' / name)
  builder, _ = prepared(tmp_path / 'photos', data_dir)
  assert builder.info.features['label'].names == ['car', 'train']
  assert builder.info.splits['train'].num_examples == 6


# Damage.


def test_damaged_images_are_named_and_may_be_left_out(photos, data_dir):
  for i in range(6):
    (photos / 'train' / 'bee' / f'bad{i}.png').write_bytes(b'no image')
  (photos / 'val' / 'ant' / 'nowhere.jpg').symlink_to('/nowhere.jpg')
  message = refusal(photos, data_dir)
  assert '7 of 27 images cannot be opened: train/bee/bad0.png, ' in message
  assert 'train/bee/bad4.png and 2 more; mend or delete them, or' in message
  builder, notes = prepared(photos, data_dir, skip_damaged=True)
  assert builder.info.splits.total_num_examples == 20
  assert notes[-1].startswith('7 damaged images are left out: train/bee/bad0.png, ')
  _, again = prepared(photos, data_dir)
  assert again == [f'{photos} is prepared already', notes[-1]]


def test_progress_is_told(photos, data_dir, monkeypatch):
  monkeypatch.setattr(folder_listing, '_SECONDS', -1.0)
  _, notes = prepared(photos, data_dir)
  assert '0 of 20 images looked at' in notes
  assert '19 of 20 images stored' in notes


# What is refused.


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda p: shutil.rmtree(p), 'is not a folder'),
    (lambda p: shutil.rmtree(p / 'train' / 'ant'), 'has 1 class folders to train on and needs two'),
    (lambda p: shutil.rmtree(p / 'train'), 'has 0 class folders'),
    (lambda p: (p / 'train' / 'eel').mkdir(), 'classes without an image to train on: eel'),
    (lambda p: fill(p / 'train' / 'eel' / 'images'), 'classes without an image to train on: eel'),
    (lambda p: fill(p / 'val' / 'eel'), "'validation' has classes that 'train' has not: eel"),
    (lambda p: fill(p / 'validation' / 'ant'), "both 'val' and 'validation'"),
    (lambda p: (p / 'test' / 'ant').mkdir(parents=True), "split 'test' has no images"),
    (lambda p: fill(p / 'train' / 'line\nbreak'), 'a name that can be printed'),
    (lambda p: fill(p / 'train' / ' ant'), 'a name that can be printed'),
  ],
)
def test_another_layout_is_refused(photos, data_dir, change, words):
  change(photos)
  assert words in refusal(photos, data_dir)


def test_a_class_without_a_whole_image_is_refused(photos, data_dir):
  fill(photos / 'train' / 'eel', 0)
  (photos / 'train' / 'eel' / 'bad.png').write_bytes(b'no image')
  message = refusal(photos, data_dir, skip_damaged=True)
  assert 'classes without an image to train on: eel' in message


def test_names_and_places_that_cannot_be(photos, data_dir):
  with pytest.raises(ValueError, match='data_dir lies within'):
    prepare_folder(f'folder:{photos}', str(photos / 'data'))
  with pytest.raises(ValueError, match="'folder:' names no folder"):
    prepare_folder('folder:', data_dir)
  with pytest.raises(ValueError, match=r'is not prepared in .*: run `python -m saq_jax'):
    folder_builder(f'folder:{photos}', data_dir)
  (photos.parent / 'file').touch()
  with pytest.raises(OSError, match='Not a directory'):
    prepare_folder(f'folder:{photos}', str(photos.parent / 'file'))


def test_a_full_disk_is_seen_before_it_is_full(photos, data_dir, monkeypatch):
  usage = shutil.disk_usage('/')._replace(free=10)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(OSError, match=r'needs 0\.0 GB and has 0\.0 GB free'):
    prepared(photos, data_dir)

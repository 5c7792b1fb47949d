"""Prepares small local datasets under real tfds names, for the real builders to read."""

import io
import tempfile
import zlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from saq_jax.data.folder import prepare_folder

_CIFAR10 = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship']
_CIFAR10 += ['truck']
FORMATS = {'.jpg': 'JPEG', '.JPEG': 'JPEG', '.png': 'PNG', '.bmp': 'BMP', '.gif': 'GIF'}
FORMATS |= {'.webp': 'WEBP', '.tif': 'TIFF', '.TIFF': 'TIFF'}
SMALL_IMAGES = ('cifar10', 'cifar100')


def features_of(dataset):
  """The layout that tfds's builder has, written out here, with the real names of classes."""
  text, jpeg_image = tfds.features.Text(), tfds.features.Image(encoding_format='jpeg')
  if dataset in SMALL_IMAGES:
    count = int(dataset.removeprefix('cifar'))
    names = {'names': _CIFAR10} if count == 10 else {'num_classes': count}
    small = {
      'id': text,
      'image': tfds.features.Image(shape=(32, 32, 3)),
      'label': tfds.features.ClassLabel(**names),
    }
    coarse = {'coarse_label': tfds.features.ClassLabel(num_classes=20)}
    return small | coarse if count == 100 else small
  with tempfile.TemporaryDirectory() as empty:
    label = tfds.builder(dataset, data_dir=empty).info.features['label']
  photo = {'label': tfds.features.ClassLabel(names=label.names), 'file_name': text}
  if dataset == 'oxford_iiit_pet':
    photo |= {
      'species': tfds.features.ClassLabel(names=['Cat', 'Dog']),
      'segmentation_mask': tfds.features.Image(shape=(None, None, 1), use_colormap=True),
      'head_bbox': tfds.features.BBoxFeature(),
    }
  return photo | {'image': tfds.features.Image() if dataset == 'oxford_flowers102' else jpeg_image}


def jpeg(rng, label, height, width):
  """A noisy photograph whose colour says its class, as a JPEG file."""
  colour = np.array([40 + 37 * label % 180, 40 + 91 * label % 180, 40 + 53 * label % 180])
  pixels = np.clip(rng.normal(colour, 20, (height, width, 3)), 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'JPEG', quality=90)
  file.seek(0)
  return file


def fill(folder, count=3, label=0, endings=('.jpg',)):
  """Puts images of a class into a folder, of the formats of these endings in turn."""
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    ending = endings[i % len(endings)]
    image = Image.open(jpeg(np.random.default_rng(i), label, 12 + i % 5, 15))
    image.save(folder / f'{i}{ending}', FORMATS[ending])
  return folder


def photo_folder(folder):
  """A folder of ants and bees, 8 of each to train on and 2 of each to evaluate."""
  for split, count in (('train', 8), ('val', 2)):
    for label, name in enumerate(('ant', 'bee')):
      fill(folder / split / name, count, label, tuple(FORMATS))
  return folder


def prepared(photos, data_dir, **options):
  """The builder of a prepared folder, and what was told."""
  notes = []
  return prepare_folder(f'folder:{photos}', data_dir, note=notes.append, **options), notes


def names(builder, split):
  """The files of a split, in the order in which they are stored."""
  return [record['file_name'].decode() for record in builder.as_data_source(split)]


def small_pixels(split, i):
  """The pixels of CIFAR's image i of a split, uint8 [32, 32, 3]."""
  rng = np.random.default_rng((zlib.crc32(split.encode()), i))
  return rng.integers(0, 256, (32, 32, 3), np.uint8)


def example(dataset, split, i, rng):
  """Example i of a split, of class i % 4."""
  label = i % 4
  if dataset in SMALL_IMAGES:
    record = {'id': f'{split}_{i:05d}', 'image': Image.fromarray(small_pixels(split, i))}
    return record | {'label': label} | ({'coarse_label': i % 20} if dataset == 'cifar100' else {})
  height, width = rng.integers(14, 40, 2)
  record = {'image': jpeg(rng, label, height, width), 'label': label}
  record['file_name'] = f'{split}_{i}.JPEG'
  if dataset == 'oxford_iiit_pet':
    mask = Image.fromarray(rng.integers(1, 4, (height, width), np.uint8))
    box = tfds.features.BBox(0.1, 0.2, 0.5, 0.6)
    record |= {'species': label % 2, 'segmentation_mask': mask, 'head_bbox': box}
  return record


def prepare(dataset, data_dir, *, damaged=(), **counts):
  """Prepares as many examples a split as are named, with 4 classes among the dataset's own.

  The images of the `damaged` indices are files that cannot be decoded.
  """
  version, features = tfds.builder_cls(dataset).VERSION, features_of(dataset)

  # A keyword and not tfds's context manager: within that, tfds's own builders, which are imported
  # when the first is asked for, would not be registered either.
  class Local(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = dataset
    VERSION = tfds.core.Version(str(version))

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, description='local', features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in counts}

    def _generate_examples(self, split):
      rng = np.random.default_rng(sorted(counts).index(split))
      for i in range(counts[split]):
        record = example(dataset, split, i, rng)
        if i in damaged:
          record['image'] = io.BytesIO(b'no image')
        yield i, record

  Local(data_dir=str(data_dir)).download_and_prepare(file_format='array_record')

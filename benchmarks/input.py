"""Measures the input pipelines for ImageNet and CIFAR beside tf.data's, on one core.

    pip install 'saq_jax[prepare]'
    python benchmarks/input.py [--rounds 7] [--json FILE]

Everything runs on one core. ImageNet: JPEG files of 500x375 pixels, cut from scikit-learn's two
sample photographs, read from array_record (tf.data: from TFRecord), a random part of each decoded
and brought to 224x224, uint8, in batches of 64. CIFAR: 50,000 random 32x32 images in memory (as
tensors for tf.data), random crops after padding by 4 and flips, uint8, in batches of 512. The
pipelines take turns; printed are images/s (median, least, most) and the ratio to tf.data, turn by
turn. Without TensorFlow only ours are measured.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_sample_images

from saq_jax.data import augment
from saq_jax.data.datasets import Examples, load_records
from saq_jax.data.loader import Loader, Reading
from saq_jax.data.resize import Interpolation, Resizing
from saq_jax.data.source import train_source

FILES, BATCH, SIZE = 512, 64, 224
CIFAR_BATCH = 512
Pull = Callable[[], Any]


class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """ImageNet's image and label, of parts of two photographs."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(num_classes=1000),
    }
    return tfds.core.DatasetInfo(
      builder=self, description='parts', features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager: Any) -> Any:
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Iterator[Any]:
    for key, file in enumerate(jpeg_files()):
      yield key, {'image': io.BytesIO(file), 'label': key % 1000}


def jpeg_files() -> Iterator[bytes]:
  """Parts of 500x375 pixels, as JPEG files of quality 95."""
  photographs, draw = load_sample_images().images, np.random.default_rng(0)
  for i in range(FILES):
    pixels = photographs[i % 2]
    top, left = (int(draw.integers(0, pixels.shape[k] - n + 1)) for k, n in ((0, 375), (1, 500)))
    file = io.BytesIO()
    Image.fromarray(pixels[top : top + 375, left : left + 500]).save(file, 'JPEG', quality=95)
    yield file.getvalue()


def ours_imagenet(data_dir: str, interpolation: Interpolation, stack: Any) -> Pull:
  """A batch of this package's pipeline at each call."""
  resizing = Resizing(SIZE, 256, interpolation=interpolation)
  records = load_records('photographs', 'train', data_dir, resizing)
  source = train_source(records, BATCH, seed=0)
  loader = stack.enter_context(
    Loader(source, 0, 10**6, lambda batch: batch['image'], Reading(workers=0))
  )
  return iter(loader).__next__


def ours_cifar(images: np.ndarray, labels: np.ndarray) -> Pull:
  """A batch from memory, cropped and flipped by a compiled function as inside the step."""
  source = train_source(Examples(images, labels, 10), CIFAR_BATCH, seed=0)

  @jax.jit
  def crop_and_flip(step: jax.Array, batch: jax.Array) -> jax.Array:
    crop_key, flip_key = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
    return augment.flip(flip_key, augment.pad_crop(crop_key, batch, 4))

  steps = itertools.count()

  def pull() -> Any:
    step = next(steps)
    return crop_and_flip(step, source[step]['image']).block_until_ready()

  return pull


def tf_imagenet(path: str) -> Pull:
  """tf.data's fused decode-and-crop, as in TensorFlow's own ImageNet examples."""
  import tensorflow as tf

  with tf.io.TFRecordWriter(path) as writer:
    for key, file in enumerate(jpeg_files()):
      image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[file]))
      label = tf.train.Feature(int64_list=tf.train.Int64List(value=[key % 1000]))
      features = tf.train.Features(feature={'image': image, 'label': label})
      writer.write(tf.train.Example(features=features).SerializeToString())

  def parse(record: Any) -> Any:
    kinds = {
      k: tf.io.FixedLenFeature([], t) for k, t in (('image', tf.string), ('label', tf.int64))
    }
    example = tf.io.parse_single_example(record, kinds)
    start, size, _ = tf.image.sample_distorted_bounding_box(
      tf.io.extract_jpeg_shape(example['image']),
      tf.zeros([0, 0, 4]),
      min_object_covered=0.0,
      aspect_ratio_range=(3 / 4, 4 / 3),
      area_range=(0.08, 1.0),
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([start[:2], size[:2]], 0)
    image = tf.image.decode_and_crop_jpeg(example['image'], window, channels=3)
    return tf.cast(tf.image.resize(image, (SIZE, SIZE)), tf.uint8), example['label']

  return tf_batches(tf.data.TFRecordDataset(path).repeat().shuffle(FILES), parse, BATCH)


def tf_cifar(images: np.ndarray, labels: np.ndarray) -> Pull:
  """tf.data on tensors in memory."""
  import tensorflow as tf

  def augmented(image: Any, label: Any) -> Any:
    image = tf.pad(image, [[4, 4], [4, 4], [0, 0]])
    image = tf.image.random_crop(image, (32, 32, 3))
    return tf.image.random_flip_left_right(image), label

  data = tf.data.Dataset.from_tensor_slices((images, labels)).repeat().shuffle(10_000)
  return tf_batches(data, augmented, CIFAR_BATCH)


def tf_batches(data: Any, function: Any, batch_size: int) -> Pull:
  """A batch at each call, made by one thread."""
  import tensorflow as tf

  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  options.deterministic = True
  data = data.map(function, num_parallel_calls=1).batch(batch_size).prefetch(2)
  batches = data.with_options(options).as_numpy_iterator()
  return lambda: next(batches)


def measure(pulls: dict[str, Pull], images: int, batch: int, rounds: int) -> dict[str, list[float]]:
  """Images/s of each in turn, after a round that is not counted."""
  rates: dict[str, list[float]] = {name: [] for name in pulls}
  for i in range(rounds + 1):
    for name, pull in pulls.items():
      time.sleep(2)  # the one before fills its buffers again
      for _ in range(8):
        pull()  # what lies in its own
      began = time.perf_counter()
      for _ in range(images // batch):
        pull()
      if i:
        rates[name].append(images / (time.perf_counter() - began))
  return rates


def spread(values: list[float], digits: int) -> str:
  return (
    f'{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})'
  )


def show(title: str, rates: dict[str, list[float]]) -> None:
  print(f'\n| {title} | images/s | ratio to tf.data |\n|---|---|---|')
  base = rates.get('tf.data')
  for name, values in rates.items():
    ratio = spread([a / b for a, b in zip(values, base, strict=True)], 2) if base else ''
    print(f'| {name} | {spread(values, 0)} | {ratio} |')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--json', type=Path)
  args = parser.parse_args()
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  with_tf = importlib.util.find_spec('tensorflow') is not None
  draw = np.random.default_rng(0)
  pixels = draw.integers(0, 256, (50_000, 32, 32, 3), np.uint8)
  labels = draw.integers(0, 10, 50_000).astype(np.int32)
  with contextlib.ExitStack() as stack:
    data_dir = stack.enter_context(tempfile.TemporaryDirectory())
    Photographs(data_dir=data_dir).download_and_prepare(file_format='array_record')
    photos = {
      'fast (the default of configs/)': ours_imagenet(data_dir, 'fast', stack),
      'bilinear, as PIL': ours_imagenet(data_dir, 'bilinear', stack),
      'bicubic, as PIL': ours_imagenet(data_dir, 'bicubic', stack),
    }
    small = {'in memory, augmented by XLA': ours_cifar(pixels, labels)}
    if with_tf:
      photos = {'tf.data': tf_imagenet(f'{data_dir}/photographs.tfrecord'), **photos}
      small = {'tf.data': tf_cifar(pixels, labels), **small}
    found = {
      'ImageNet, 224x224': measure(photos, 1024, BATCH, args.rounds),
      'CIFAR, 32x32': measure(small, 100 * CIFAR_BATCH, CIFAR_BATCH, args.rounds),
    }
  versions = {'jax': jax.__version__, 'python': platform.python_version()}
  if with_tf:
    import tensorflow as tf

    versions['tensorflow'] = tf.__version__
  print(f'one core of {platform.processor() or platform.machine()}, {versions}')
  for title, rates in found.items():
    show(title, rates)
  if args.json:
    args.json.write_text(json.dumps({'versions': versions, 'images_per_second': found}, indent=1))


if __name__ == '__main__':
  # Before any thread is started, so that all of them stay on it.
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  main()

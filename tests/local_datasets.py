"""Prepares small local datasets under real tfds names, for the real builders to read."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

# The features of tfds's builders; images of any size as JPEG, as the originals are.
_JPEG = tfds.features.Image(encoding_format='jpeg')
FEATURES = {
  'imagenet2012': {'image': _JPEG, 'label': 1000, 'file_name': tfds.features.Text()},
  'oxford_flowers102': {'image': _JPEG, 'label': 102, 'file_name': tfds.features.Text()},
}


def jpeg(rng, label, height, width):
  """A noisy photograph whose colour says its class, as a JPEG file."""
  colour = np.array([40 + 37 * label % 180, 40 + 91 * label % 180, 40 + 53 * label % 180])
  pixels = np.clip(rng.normal(colour, 20, (height, width, 3)), 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'JPEG', quality=90)
  file.seek(0)
  return file


def prepare(dataset, data_dir, *, damaged=(), **counts):
  """Prepares as many examples a split as are named, with 4 classes among the dataset's own.

  The images of the `damaged` indices are files that cannot be decoded.
  """
  features = dict(FEATURES[dataset])
  features['label'] = tfds.features.ClassLabel(num_classes=features['label'])
  with tfds.core.registered.skip_registration():

    class Local(tfds.core.GeneratorBasedBuilder):
      name = dataset
      VERSION = tfds.core.Version(str(tfds.builder_cls(dataset).VERSION))

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self, description='local', features=tfds.features.FeaturesDict(features)
        )

      def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in counts}

      def _generate_examples(self, split):
        rng = np.random.default_rng(sorted(counts).index(split))
        for i in range(counts[split]):
          image = jpeg(rng, i % 4, *rng.integers(14, 40, 2))
          image = io.BytesIO(b'no image') if i in damaged else image
          yield i, {'image': image, 'label': i % 4, 'file_name': f'{split}_{i}.JPEG'}

  Local(data_dir=str(data_dir)).download_and_prepare(file_format='array_record')

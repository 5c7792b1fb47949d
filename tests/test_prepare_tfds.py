"""What tfds does for the command, from files like the originals; some of it needs TensorFlow."""

import hashlib
import importlib.util
import io
import tarfile

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from local_datasets import jpeg, small_pixels

from saq_jax.data import catalog
from saq_jax.data import prepare as prepare_lib
from saq_jax.data.datasets import load_examples, load_records
from saq_jax.data.prepare import main
from saq_jax.data.resize import Resizing

needs_tensorflow = pytest.mark.skipif(
  importlib.util.find_spec('tensorflow') is None, reason='TensorFlow is not installed'
)


@pytest.fixture
def command(tmp_path, capsys):
  """Runs the command in a data directory of its own: its exit code and its lines."""

  def run(*args):
    capsys.readouterr()
    code = main([*map(str, args), '--data_dir', str(tmp_path / 'data')])
    return code, *(text.splitlines() for text in capsys.readouterr())

  return run


@pytest.fixture
def seeming_tensorflow(monkeypatch):
  """For what comes before TensorFlow is used."""
  monkeypatch.setattr(prepare_lib, '_has_tensorflow', lambda: True)


def tar_of(files, mode='w'):
  """A tar file of names and contents."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode=mode) as archive:
    for name, data in files.items():
      entry = tarfile.TarInfo(name)
      entry.size = len(data)
      archive.addfile(entry, io.BytesIO(data))
  return file.getvalue()


@pytest.fixture
def tars(tmp_path):
  """ImageNet's two files, with 2 images of 3 classes to train on and 5 to evaluate."""
  rng, folder = np.random.default_rng(0), tmp_path / 'tars'
  folder.mkdir()
  train = {
    wnid: {f'{wnid}_{i}.JPEG': jpeg(rng, label, 30, 40).read() for i in range(2)}
    for label, wnid in enumerate(('n01440764', 'n01443537', 'n02123045'))
  }
  outer = {f'{wnid}.tar': tar_of(files) for wnid, files in train.items()}
  val = {f'ILSVRC2012_val_{i:08}.JPEG': jpeg(rng, i, 30, 40).read() for i in range(1, 6)}
  (folder / 'ILSVRC2012_img_train.tar').write_bytes(tar_of(outer))
  (folder / 'ILSVRC2012_img_val.tar').write_bytes(tar_of(val))
  images = {name: data for files in train.values() for name, data in files.items()}
  return folder, images, val


# Before tfds begins.


def test_files_that_are_to_be_fetched_by_hand(command, tmp_path, seeming_tensorflow):
  both = 'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar'
  code, _, (line,) = command('imagenet2012')
  assert code == 2
  assert f'imagenet2012 needs {both} in {tmp_path}/data/downloads/manual: fetch them from' in line
  assert 'https://image-net.org/download-images, after registering there' in line
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'ILSVRC2012_img_train.tar').touch()
  code, _, (line,) = command('imagenet2012', '--manual_dir', tmp_path / 'mine')
  assert f'imagenet2012 needs ILSVRC2012_img_val.tar in {tmp_path}/mine: ' in line
  code, _, (line,) = command('imagenet2012', '--manual_dir', tmp_path / 'yours')
  assert (code, line) == (2, f'saq_jax: --manual_dir {tmp_path}/yours is not a directory')
  assert not (tmp_path / 'data').exists()


def test_a_failed_download(command, tmp_path, monkeypatch, seeming_tensorflow):
  def refuse(*args, **kwargs):
    raise requests.ConnectionError('no\nnetwork')

  monkeypatch.setattr(requests.Session, 'get', refuse)
  code, lines, errors = command('oxford_flowers102')
  assert code == 1
  assert lines == [f'Preparing oxford_flowers102 in {tmp_path}/data/oxford_flowers102/2.1.1']
  assert errors[-1] == (
    'saq_jax: cannot prepare oxford_flowers102 (ConnectionError: no network); run it again when'
    ' the network is there, or fetch 102flowers.tgz, imagelabels.mat, setid.mat into --manual_dir'
  )
  assert not list((tmp_path / 'data' / 'oxford_flowers102').iterdir())


# The real thing.


@needs_tensorflow
def test_imagenet_is_prepared_from_its_tar_files(command, tars, tmp_path, monkeypatch):
  folder, images, val = tars
  killed = tmp_path / 'data' / 'imagenet2012' / 'incomplete.ABC_5.1.0'
  killed.mkdir(parents=True)
  code, lines, errors = command('imagenet2012', '--manual_dir', folder)
  assert code == 1
  assert f'{folder}/ILSVRC2012_img_val.tar is not the published file, which has 6.28 GiB' in lines
  assert f'{killed} is of an earlier preparation: delete it when nothing uses it any more' in lines
  assert errors[-1].startswith('saq_jax: imagenet2012 is not complete: train has 6 examples and')
  assert 'validation has 5 examples and should have 50,000: delete ' in errors[-1]
  assert errors[-1].endswith('with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar whole')

  facts = catalog.KnownDataset(1000, {'train': 6, 'validation': 5})
  monkeypatch.setitem(catalog._KNOWN, 'imagenet2012', facts)
  code, lines, errors = command('imagenet2012')
  assert (code, errors) == (0, [])
  assert lines[0] == 'imagenet2012 is prepared already'

  resizing, data_dir = Resizing(8, 8), str(tmp_path / 'data')
  train = load_records('imagenet2012', 'train', data_dir, resizing).records
  wnids = tfds.builder('imagenet2012', data_dir=data_dir).info.features['label'].names
  assert {r['file_name'].decode(): r['image'] for r in train} == images
  assert all(r['file_name'].decode().startswith(wnids[r['label']]) for r in train)
  test = load_records('imagenet2012', 'validation', data_dir, resizing).records
  assert {r['file_name'].decode(): r['image'] for r in test} == val
  # As published: a sea snake, an alp, a Shetland sheepdog, a soup bowl and a cradle.
  labels = {r['file_name'].decode()[-6:-5]: wnids[r['label']] for r in test}
  assert labels == dict(
    zip('12345', ('n01751748', 'n09193705', 'n02105855', 'n04263257', 'n03125729'))
  )


@needs_tensorflow
def test_a_tar_file_cut_short(command, tars, tmp_path):
  file = tars[0] / 'ILSVRC2012_img_train.tar'
  file.write_bytes(file.read_bytes()[:3000])
  code, _, errors = command('imagenet2012', '--manual_dir', tars[0])
  assert code == 1
  assert errors[-1].startswith('saq_jax: cannot prepare imagenet2012 (ReadError: ')
  assert not list((tmp_path / 'data' / 'imagenet2012').iterdir())


@needs_tensorflow
def test_cifar_is_prepared_from_a_file_that_was_fetched_by_hand(command, tmp_path, monkeypatch):
  def batch(split, indices):
    pixels = [small_pixels(split, i).transpose(2, 0, 1).tobytes() for i in indices]
    return b''.join(bytes([i % 4]) + one for i, one in zip(indices, pixels))

  files = {f'data_batch_{k + 1}.bin': batch('train', range(2 * k, 2 * k + 2)) for k in range(5)}
  files |= {'test_batch.bin': batch('test', range(3))}
  files['batches.meta.txt'] = b'\n'.join(b'class%d' % i for i in range(10))
  data = tar_of({f'cifar-10-batches-bin/{name}': data for name, data in files.items()}, 'w:gz')
  (tmp_path / 'cifar-10-binary.tar.gz').write_bytes(data)
  # tfds holds a file against the published size and sum.
  info = tfds.download.checksums.UrlInfo(
    size=len(data), checksum=hashlib.sha256(data).hexdigest(), filename='cifar-10-binary.tar.gz'
  )
  cifar = tfds.builder_cls('cifar10')
  (url,) = cifar.url_infos
  monkeypatch.setattr(cifar, 'url_infos', {url: info})
  facts = catalog.KnownDataset(10, {'train': 10, 'test': 3})
  monkeypatch.setitem(catalog._KNOWN, 'cifar10', facts)

  code, lines, _ = command('cifar10', '--manual_dir', tmp_path)
  assert code == 0
  assert 'train                10  as published' in lines
  for split, count in facts.counts.items():
    examples = load_examples('cifar10', split, str(tmp_path / 'data'))
    want = {small_pixels(split, i).tobytes(): i % 4 for i in range(count)}
    assert dict(zip((x.tobytes() for x in examples.images), examples.labels.tolist())) == want

"""The picture of a batch: the images and labels of the first step, and one line for bad input."""

import numpy as np
import pytest
from local_datasets import photo_folder
from PIL import Image

from saq_jax.analysis import batch_sheet
from saq_jax.data.folder import prepare_folder
from saq_jax.data.source import train_source
from saq_jax.training.flags import read_flags
from saq_jax.training.inputs import load_splits

PHOTOS = ['--config.data.image_size=12', '--config.data.resize=12', '--config.data.batch_size=8']
PHOTOS += ['--config.data.mean=0.5', '--config.data.std=0.2', '--config.augment.pad_crop=0']
PHOTOS += ['--config.data.eval_split=validation']


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder, data_dir = (tmp_path_factory.mktemp(name) for name in ('photos', 'tfds'))
  prepare_folder(f'folder:{photo_folder(folder)}', str(data_dir), note=len)
  return [f'--config.data.name=folder:{folder}', f'--config.data.data_dir={data_dir}', *PHOTOS]


def drawn(arguments):
  config, name, _ = read_flags(arguments)
  figure = batch_sheet.draw_batches(config, name)
  shown = [axes for part in figure.subfigs for axes in part.axes if axes.images]
  return config, [(axes.get_title(), axes.images[0].get_array()) for axes in shown]


def test_plain_images_are_those_of_the_first_batch_with_the_names_of_their_classes(photos):
  config, shown = drawn(photos)
  train, _ = load_splits(config)
  batch = train_source(train, 8, seed=0)[0]
  assert [title for title, _ in shown[:8]] == [('ant', 'bee')[k] for k in batch['label']]
  for (_, pixels), image in zip(shown[:8], batch['image'], strict=True):
    np.testing.assert_allclose(pixels, image / 255, atol=1e-6)
  assert sorted(title for title, _ in shown[8:]) == ['ant', 'ant', 'bee', 'bee']


def test_mixed_images_have_the_shares_of_their_labels(photos):
  _, shown = drawn([*photos, '--config.augment.mixup=0.8'])
  for title, _ in shown[:8]:
    shares = [int(line.split(' %')[0]) for line in title.splitlines()]
    assert sum(shares) in (99, 100, 101)
  titles = [title for title, _ in shown[:8]]
  assert any('\n' in title for title in titles)
  # Neighbours of two classes have each other's shares.
  for one, two in zip(titles[::2], titles[1::2]):
    if '\n' in one:
      assert {line.split()[2] for line in one.splitlines()} == {'ant', 'bee'}
      assert [line.split()[0] for line in one.splitlines()] == [
        line.split()[0] for line in two.splitlines()
      ]


def test_the_command_writes_a_picture(tmp_path, digits_dir, capsys):
  path = tmp_path / 'digits.png'
  assert batch_sheet.main([f'--config.data.data_dir={digits_dir}', f'--png={path}']) == 0
  assert capsys.readouterr().out == f'{path}\n'
  with Image.open(path) as image:
    assert min(image.size) > 500
  assert batch_sheet.main(['--help']) == 0


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['--config.data.train_split=nope'], "no split 'nope'"),
    (['--config.data.batch_size=99999'], 'larger than the 1438 examples'),
    (['--workdir=x'], '--workdir is not a flag'),
    (['--png'], '--png needs a value'),
    (['--png=/nowhere/x.png'], '/nowhere/x.png'),
  ],
)
def test_bad_input_is_one_line(digits_dir, capsys, arguments, words):
  assert batch_sheet.main([f'--config.data.data_dir={digits_dir}', *arguments]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert words in line

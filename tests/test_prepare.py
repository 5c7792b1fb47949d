"""The command that prepares datasets: what it writes, prints and refuses."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from local_datasets import fill, photo_folder, prepare
from PIL import Image

from saq_jax.data import catalog
from saq_jax.data import prepare as prepare_lib
from saq_jax.data.datasets import load_records
from saq_jax.data.prepare import _Lines, main
from saq_jax.data.resize import Resizing
from saq_jax.training.flags import read_flags
from saq_jax.training.inputs import load_splits, require_enough

ROOT = Path(__file__).parent.parent


def run(*args, code=None):
  """The command as a process: its exit code, and the lines of what it printed."""
  program = ['-c', code] if code else ['-m', 'saq_jax.data.prepare']
  done = subprocess.run(
    [sys.executable, *program, *map(str, args)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


@pytest.fixture
def refusal(capsys, monkeypatch):
  """Runs the command, which must fail; gives its exit code and its only line on stderr."""
  monkeypatch.chdir(ROOT)

  def refuse(*args):
    capsys.readouterr()
    code = main([str(a) for a in args])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('saq_jax: ')
    return code, line.removeprefix('saq_jax: ')

  return refuse


@pytest.fixture
def without_tensorflow(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)


def trained_on(line, monkeypatch):
  """The data settings of the training command that was printed, which must be able to begin."""
  monkeypatch.chdir(ROOT)
  words = shlex.split(line)
  assert words[:3] == ['python', '-m', 'saq_jax.main']
  config, _, _ = read_flags(words[3:])
  train, test = load_splits(config)
  require_enough(config, train)
  assert len(test)
  return config.data


# Whole runs.


def test_digits_twice(tmp_path, monkeypatch):
  first, again = (run('digits', '--data_dir', tmp_path / 'new') for _ in range(2))
  code, lines, errors = first
  assert (code, errors) == (0, [])
  assert lines[:3] == [
    'split          examples',
    'test                359  as published',
    'train             1,438  as published',
  ]
  assert lines[3].startswith('10 classes, ')
  assert lines[3].endswith(f'in {tmp_path}/new/digits/1.0.0')
  assert lines[4] == 'Train on it:'
  data = trained_on(lines[5], monkeypatch)
  assert (data.name, data.data_dir) == ('digits', f'{tmp_path}/new')
  assert again == (0, ['digits is prepared already', *lines], [])


def test_a_folder_twice(tmp_path, monkeypatch):
  photos = photo_folder(tmp_path / 'my photos')
  first, again = (run(f'folder:{photos}', f'--data_dir={tmp_path}/new') for _ in range(2))
  code, lines, errors = first
  assert (code, errors) == (0, [])
  assert lines[0].startswith('Storing 20 images (0.0 MB) in ')
  assert lines[2:4] == ['train                16', 'validation            4']
  data = trained_on(lines[-1], monkeypatch)
  assert (data.name, data.splits) == (f'folder:{photos}', ('train', 'validation'))
  assert data.batch_size == 16
  assert again == (0, [f'{photos} is prepared already', *lines[1:]], [])


@pytest.mark.parametrize(('each', 'share', 'batch_size'), [(2, 50, 2), (3, 50, 2), (8, 90, 8)])
def test_the_line_for_a_folder_of_one_split_holds_a_part_out(
  tmp_path, monkeypatch, capsys, each, share, batch_size
):
  for name in ('ant', 'bee'):
    fill(tmp_path / 'photos' / name, each)
  monkeypatch.chdir(tmp_path)
  assert main(['folder:photos', '--data_dir', f'{tmp_path}/new']) == 0
  data = trained_on(capsys.readouterr().out.splitlines()[-1], monkeypatch)
  # From wherever it is run.
  assert data.name == f'folder:{tmp_path}/photos'
  assert data.splits == (f'train[:{share}%]', f'train[{share}%:]')
  assert data.batch_size == batch_size


@pytest.mark.parametrize('name', catalog._CONFIGS)
def test_the_experiment_of_a_dataset_is_there(name):
  facts = catalog.known(name)
  line = catalog.training_command(name, None, (None, None, 3), facts.counts).splitlines()[1]
  words = shlex.split(line)[3:]
  assert words[0] == '--config'
  assert len(words) == 2
  data = read_flags(['--config', str(ROOT / words[1])])[0].data
  # Nothing is to be said about what the experiment has already.
  assert (data.name, data.batch_size) == (name, catalog._CONFIGS[name][1])


def test_splits_that_are_to_be_named():
  said, line = catalog.training_command('x', None, (8, 8, 3), {'dev': 9, 'rest': 9}).splitlines()
  assert said == 'Train on it, with splits for TRAIN and EVAL, of dev, rest or slices of them:'
  assert line.endswith('--config.data.train_split=TRAIN --config.data.eval_split=EVAL')


def test_grey_photographs():
  line = catalog.training_command('x', None, (None, None, 1), {'train': 999, 'test': 9})
  config, _, _ = read_flags(shlex.split(line.splitlines()[1])[3:])
  assert (config.data.mean, config.data.std, config.init_from) == ((0.5,), (0.5,), None)


# Runs the command, and stops for good when so many images are stored.
_STALL = """
import sys, time
from saq_jax.data import folder, prepare
def tell(self, count):
  if 'stored' in self._what and count == 9:
    print('half', flush=True)
    time.sleep(600)
folder.Progress.tell = tell
prepare.main(sys.argv[1:])
"""


def test_killed_in_the_middle(tmp_path):
  photos = photo_folder(tmp_path / 'photos')
  args = (f'folder:{photos}', f'--data_dir={tmp_path}/new')
  process = subprocess.Popen(
    [sys.executable, '-c', _STALL, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  try:
    assert process.stdout.readline().startswith('Storing')
    assert process.stdout.readline() == 'half\n'
  finally:
    process.kill()
    process.communicate()
  code, lines, errors = run(*args)
  assert (code, errors) == (0, [])
  assert any('incomplete' in line and 'delete it' in line for line in lines)
  assert 'train                16' in lines


def test_help(capsys):
  assert main(['--help']) == 0
  printed = capsys.readouterr().out
  for word in ('folder:/path', 'saq_jax[prepare]', '--manual_dir', '--check_all', 'Exit codes'):
    assert word in printed


# Datasets of tfds that are on disk.


@pytest.fixture
def cifar(tmp_path, monkeypatch):
  """CIFAR-10 as if it had 20 and 7 images."""
  prepare('cifar10', tmp_path, train=20, test=7)
  facts = catalog.KnownDataset(10, {'train': 20, 'test': 7})
  monkeypatch.setitem(catalog._KNOWN, 'cifar10', facts)
  return tmp_path / 'cifar10' / '3.0.2'


def test_what_is_prepared_is_checked_without_tensorflow(
  cifar, tmp_path, monkeypatch, capsys, without_tensorflow
):
  assert main(['cifar10', f'--data_dir={tmp_path}']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == 'cifar10 is prepared already'
  assert 'train                20  as published' in lines
  data = trained_on(lines[-1], monkeypatch)
  assert (data.name, data.data_dir, data.splits) == ('cifar10', str(tmp_path), ('train', 'test'))
  assert main(['cifar10:3.0.2', f'--data_dir={tmp_path}']) == 0
  data = trained_on(capsys.readouterr().out.splitlines()[-1], monkeypatch)
  assert (data.name, data.batch_size) == ('cifar10:3.0.2', 16)


def test_wrong_counts(cifar, tmp_path, monkeypatch, refusal):
  facts = catalog.KnownDataset(10, {'train': 50_000, 'test': 7, 'validation': 5})
  monkeypatch.setitem(catalog._KNOWN, 'cifar10', facts)
  code, line = refusal('cifar10', '--data_dir', tmp_path)
  assert code == 1
  assert 'train has 20 examples and should have 50,000; validation has 0 examples' in line
  assert f'delete {cifar} and run `python -m saq_jax.data.prepare cifar10 --data_dir=' in line


@pytest.mark.parametrize('damage', ['cut', 'gone', 'fewer'])
def test_files_that_are_not_what_the_metadata_say(cifar, tmp_path, monkeypatch, refusal, damage):
  (shard,) = cifar.glob('*train*')
  if damage == 'cut':
    shard.write_bytes(shard.read_bytes()[:-1000])
  elif damage == 'gone':
    shard.unlink()
  else:
    info = cifar / 'dataset_info.json'
    info.write_text(info.read_text().replace('"20"', '"19"'))
    monkeypatch.delitem(catalog._KNOWN, 'cifar10')
  code, line = refusal('cifar10', '--data_dir', tmp_path)
  assert code == 1
  words = 'train has 20 records of 19' if damage == 'fewer' else 'train cannot be read'
  assert words in line
  assert f'delete {cifar} and run' in line


def test_an_image_that_cannot_be_decoded(tmp_path, monkeypatch, refusal, capsys):
  prepare('oxford_flowers102', tmp_path, damaged=(0,), train=1)
  monkeypatch.setitem(catalog._KNOWN, 'oxford_flowers102', None)
  code, line = refusal('oxford_flowers102', '--data_dir', tmp_path)
  assert code == 1
  assert 'an image of train cannot be decoded' in line
  # In a folder it is the user's own, which preparing anew would not mend.
  for name in ('ant', 'bee'):
    image = fill(tmp_path / 'photos' / name, 1) / '0.jpg'
    image.write_bytes(image.read_bytes()[:-30])
  assert main([f'folder:{tmp_path}/photos', '--data_dir', str(tmp_path)]) == 0
  printed = capsys.readouterr().out
  assert 'ant/0.jpg; training ends at it, unless config.data.skip_damaged is set' in printed


def test_every_image_is_checked_on_request(tmp_path, monkeypatch, refusal, capsys):
  prepare('oxford_flowers102', tmp_path, damaged=range(3, 10), train=12, test=2)
  monkeypatch.setitem(catalog._KNOWN, 'oxford_flowers102', None)
  records = load_records('oxford_flowers102', 'train', str(tmp_path), Resizing(1, 1)).records
  bad = [i for i in range(12) if 3 <= int(records[i]['file_name'][6:-5]) < 10]
  # Where the first or the last is damaged, that ends the check.
  monkeypatch.setattr(prepare_lib, '_check_split', lambda *args: None)
  code, line = refusal('oxford_flowers102', '--check_all', f'--data_dir={tmp_path}')
  assert code == 1
  names = [f'train record {i} ({records[i]["file_name"].decode()})' for i in bad[:5]]
  words = f'7 of 14 images are damaged: {", ".join(names)} and 2 more: delete {tmp_path}/oxford_'
  assert words in line
  for name in ('ant', 'bee'):
    fill(tmp_path / 'photos' / name, 2)
  args = [f'folder:{tmp_path}/photos', '--check_all', f'--data_dir={tmp_path}']
  assert main(args) == 0
  assert 'all 4 images can be decoded' in capsys.readouterr().out
  image = tmp_path / 'photos' / 'ant' / '0.jpg'
  image.write_bytes(image.read_bytes()[:-30])
  code, line = refusal(*args)
  assert code == 1
  assert '1 of 4 images are damaged: train record ' in line
  assert '(ant/0.jpg): mend or delete them and prepare it again, or set config.data.skip' in line


def test_a_dataset_that_is_not_in_the_catalog(tmp_path, monkeypatch, capsys):
  class Local(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = 'mnist'
    VERSION = tfds.core.Version(str(tfds.builder_cls('mnist').VERSION))

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.builder('mnist').info.features)

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(), 'test': self._generate_examples()}

    def _generate_examples(self):
      for i in range(5):
        yield i, {'image': Image.new('L', (28, 28), 50 * i), 'label': i}

  Local(data_dir=tmp_path).download_and_prepare(file_format='array_record')
  capsys.readouterr()
  assert main(['mnist', f'--data_dir={tmp_path}']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[2:4] == ['test                  5', 'train                 5']
  data = trained_on(lines[-1], monkeypatch)
  assert (data.name, data.mean, data.std, data.batch_size) == ('mnist', (0.5,), (0.5,), 4)


# What is refused.


def test_without_tensorflow_nothing_is_begun(tmp_path, refusal, without_tensorflow):
  code, line = refusal('cifar10', '--data_dir', tmp_path / 'new')
  assert code == 2
  assert line == "to prepare cifar10, tfds needs TensorFlow: pip install 'saq_jax[prepare]'"
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    ([], 'the following arguments are required: NAME; see python -m saq_jax.data.prepare --help'),
    (['digits', '--datadir=x'], 'unrecognized arguments: --datadir=x'),
    (['cifar'], "perhaps 'cifar"),
    (['cifar10', '--skip_damaged'], '--skip_damaged is for folder:/path alone'),
    (['folder:/no/such/folder'], '/no/such/folder is not a folder'),
    (['imdb_reviews'], "it needs an 'image' and a 'label'"),
  ],
)
def test_wrong_input(refusal, tmp_path, args, words):
  code, line = refusal(*args, *(['--data_dir', tmp_path] if args else []))
  assert code == 2
  assert words in line


def test_places_that_cannot_be_written(refusal, tmp_path):
  photos = photo_folder(tmp_path / 'photos')
  (tmp_path / 'file').touch()
  for name in ('digits', f'folder:{photos}'):
    code, line = refusal(name, '--data_dir', tmp_path / 'file')
    assert code == 1
    assert str(tmp_path / 'file') in line


def test_bars_become_lines():
  written = []

  class Stream:
    write = staticmethod(written.append)

  lines = _Lines(Stream(), seconds=-1.0)
  for text in ('a warning\n', '\r 10%|#', '\n', '\r 20%|##', '\x1b[A', '\r      \r', 'x', '\n'):
    assert lines.write(text) == len(text)
  assert written == ['a warning\n', '10%|#\n', '20%|##\n', 'x', '\n']
  patient = _Lines(Stream())
  patient.write('\r 30%|###')
  assert len(written) == 5

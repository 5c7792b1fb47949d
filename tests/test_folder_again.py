"""A folder that is prepared again: unchanged, changed, gone, killed on the way, by two at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from local_datasets import fill, names, photo_folder, prepared

from saq_jax.data import folder as folder_lib
from saq_jax.data import folder_listing
from saq_jax.data.builders import open_builder
from saq_jax.data.folder import folder_builder, prepare_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def photos(tmp_path):
  return photo_folder(tmp_path / 'photos')


@pytest.fixture
def data_dir(tmp_path):
  return str(tmp_path / 'data')


# Unchanged, changed, gone.


def test_the_second_time_nothing_is_written(photos, data_dir):
  builder, _ = prepared(photos, data_dir)
  times = {p: p.stat().st_mtime_ns for p in Path(builder.data_dir).iterdir()}
  again, notes = prepared(photos, data_dir)
  assert notes == [f'{photos} is prepared already']
  assert {p: p.stat().st_mtime_ns for p in Path(again.data_dir).iterdir()} == times


@pytest.mark.parametrize(
  'change', ['new', 'gone', 'other size', 'other time of a bitmap', 'bad layout']
)
def test_a_change_is_seen(photos, data_dir, change):
  builder, _ = prepared(photos, data_dir)
  image = photos / 'train' / 'ant' / '0.jpg'
  if change == 'new':
    shutil.copy(image, photos / 'train' / 'bee' / 'new.jpg')
  elif change == 'gone':
    image.unlink()
  elif change == 'other size':
    image.write_bytes((photos / 'train' / 'bee' / '1.JPEG').read_bytes())
    os.utime(image, (0, 0))
  elif change == 'other time of a bitmap':
    os.utime(photos / 'train' / 'ant' / '3.bmp', (1e9, 1e9))
  else:
    fill(photos / 'val' / 'unknown')
  command = rf'run `python -m saq_jax\.data\.prepare folder:{photos} --data_dir={data_dir}`'
  with pytest.raises(ValueError, match=f'has changed since it was prepared: {command}'):
    open_builder(f'folder:{photos}', data_dir)
  if change == 'bad layout':
    shutil.rmtree(photos / 'val' / 'unknown')
    return
  again, notes = prepared(photos, data_dir)
  # What a run may still read stays.
  assert notes[-1].startswith(f'{builder.data_dir} is of an earlier preparation: delete it')
  assert [Path(b.data_dir).name for b in (builder, again)] == ['1.0.0', '2.0.0']
  assert {'train/bee/new.jpg', 'train/ant/0.jpg'} & set(names(again, 'train')) == {
    *({'train/bee/new.jpg'} if change == 'new' else ()),
    *({'train/ant/0.jpg'} if change != 'gone' else ()),
  }
  shutil.rmtree(builder.data_dir)
  assert names(folder_builder(f'folder:{photos}', data_dir), 'train') == names(again, 'train')


def test_a_copy_without_its_times_is_no_change(photos, data_dir):
  builder, _ = prepared(photos, data_dir)
  for image in photos.rglob('*.*'):
    if image.suffix in ('.jpg', '.JPEG', '.png', '.gif', '.webp'):
      os.utime(image, (1e9, 1e9))
  assert open_builder(f'folder:{photos}', data_dir).data_dir == builder.data_dir
  assert prepared(photos, data_dir)[1] == [f'{photos} is prepared already']


def test_a_run_lists_a_folder_once_and_the_command_each_time(photos, data_dir, monkeypatch):
  prepared(photos, data_dir)
  listed = []
  list_folder = folder_listing.list_folder
  for module in (folder_lib, folder_listing):
    monkeypatch.setattr(module, 'list_folder', lambda root: listed.append(1) or list_folder(root))
  for _ in range(3):
    open_builder(f'folder:{photos}', data_dir)
  assert len(listed) == 1
  fill(photos / 'train' / 'cow')
  builder, _ = prepared(photos, data_dir)
  assert builder.info.features['label'].names == ['ant', 'bee', 'cow']
  shutil.rmtree(photos / 'train' / 'cow')
  with pytest.raises(ValueError, match='has changed since'):
    open_builder(f'folder:{photos}', data_dir)
  # What was found before a preparation does not count after it.
  fill(photos / 'train' / 'cow')
  prepared(photos, data_dir)
  open_builder(f'folder:{photos}', data_dir)


def test_data_are_read_where_the_folder_is_not(photos, data_dir, tmp_path):
  name, want = f'folder:{photos}', names(prepared(photos, data_dir)[0], 'train')
  shutil.move(data_dir, tmp_path / 'moved')
  shutil.rmtree(photos)
  builder = open_builder(name, str(tmp_path / 'moved'))
  assert names(builder, 'train') == want
  assert builder.info.features['label'].names == ['ant', 'bee']
  with pytest.raises(ValueError, match='is not a folder'):
    prepare_folder(name, str(tmp_path / 'moved'))


def test_a_name_finds_its_data_however_it_is_written(photos, data_dir, monkeypatch):
  builder, _ = prepared(photos, data_dir)
  monkeypatch.chdir(photos.parent)
  monkeypatch.setenv('HOME', str(photos.parent))
  for name in ('folder:photos', 'folder:./photos/', 'folder:~/photos', f'folder:{photos}/val/..'):
    assert folder_builder(name, data_dir).data_dir == builder.data_dir
  assert Path(builder.data_dir).parent.name.startswith('folder_photos_')


# Processes.

# Prepares a folder; with a third argument it stops for good after so many images.
_PREPARE = """
import sys, time
from saq_jax.data import folder
if len(sys.argv) > 3:
  def tell(self, count):
    if 'stored' in self._what and count == int(sys.argv[3]):
      print('half', flush=True)
      time.sleep(600)
  folder.Progress.tell = tell
builder = folder.prepare_folder('folder:' + sys.argv[1], sys.argv[2], note=lambda line: None)
print(builder.data_dir, flush=True)
"""


@pytest.fixture
def process():
  """Starts processes that end with the test, however it ends."""
  started = []

  def start(*args):
    command = [sys.executable, '-c', _PREPARE, *map(str, args)]
    started.append(subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True))
    return started[-1]

  try:
    yield start
  finally:
    for one in started:
      one.kill()
      one.wait()


def test_a_killed_preparation_is_made_good(photos, data_dir, process):
  killed = process(photos, data_dir, 9)
  assert killed.stdout.readline() == 'half\n'
  killed.kill()
  killed.communicate()
  with pytest.raises(ValueError, match='is not prepared in'):
    folder_builder(f'folder:{photos}', data_dir)
  builder, notes = prepared(photos, data_dir)
  assert len(names(builder, 'train')) == 16
  (left,) = Path(data_dir).glob('*/incomplete*')
  assert f'{left} is of an earlier preparation: delete it when nothing uses it any more' in notes


def test_two_processes_at_once(photos, data_dir, process):
  both = [process(photos, data_dir) for _ in range(2)]
  outputs = [p.communicate() for p in both]
  assert outputs[0] == outputs[1] == (f'{next(Path(data_dir).glob("folder*"))}/1.0.0\n', '')
  assert not list(Path(data_dir).glob('*/incomplete*'))


def test_the_loser_of_the_race_reads_the_winners_files(photos, data_dir, monkeypatch):
  tell = folder_lib.Progress.tell

  def overtaken(self, count):
    if count == 9:
      monkeypatch.setattr(folder_lib.Progress, 'tell', tell)
      prepared(photos, data_dir)  # The winner, while this one is half way.

  monkeypatch.setattr(folder_lib.Progress, 'tell', overtaken)
  builder, _ = prepared(photos, data_dir)
  assert len(names(builder, 'train')) == 16
  assert [path.name for path in Path(data_dir).glob('folder*/*')] == ['1.0.0']


def test_data_whose_facts_are_gone(photos, data_dir):
  builder, _ = prepared(photos, data_dir)
  facts = Path(builder.data_dir, 'folder.json')
  assert json.loads(facts.read_text())['folder'] == str(photos)
  facts.unlink()
  with pytest.raises(ValueError, match=r'1\.0\.0 is incomplete .*: delete it and prepare it anew'):
    folder_builder(f'folder:{photos}', data_dir)

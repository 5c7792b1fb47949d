"""The work directory on a disk that is full."""

import errno
import os
from pathlib import Path

import pytest

from saq_jax.training.workdir import WorkdirError, claim, write_json


@pytest.fixture
def full(monkeypatch):
  """A disk that takes the beginning of a file."""
  write = Path.write_text

  def fail(path, text, **more):
    write(path, text[:3], **more)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(Path, 'write_text', fail)


@pytest.mark.usefixtures('full')
def test_a_full_disk_leaves_nothing_of_a_file(tmp_path):
  with pytest.raises(OSError, match='No space'):
    write_json(tmp_path / 'a.json', {})
  assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures('full')
@pytest.mark.parametrize('there', [False, True])
def test_a_full_disk_at_the_start_is_one_line_and_leaves_all_as_it_was(tmp_path, there):
  folder = tmp_path / 'run'
  if there:
    folder.mkdir()
  words = r'cannot be used \(No space left on device\)'
  with pytest.raises(WorkdirError, match=words), claim(folder, {'seed': 0}, '1.0'):
    pass
  assert folder.exists() == there
  assert not there or list(folder.iterdir()) == []

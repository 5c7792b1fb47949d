"""What a stage writes: metrics with their epoch, and the speed beside them, on a full disk too."""

import errno
import io
import os
import types

import pytest

from saq_jax.training import append, log
from saq_jax.training.append import AppendedFile
from saq_jax.training.evaluate import Score
from saq_jax.training.log import TIMING, StageLog
from saq_jax.training.metrics import FILE_NAME, read_metrics
from saq_jax.training.progress import Progress


def test_the_share_of_time_without_data_is_of_the_time_since_the_last_line(tmp_path, monkeypatch):
  times = iter([10.0, 14.0, 16.0, 16.5])
  monkeypatch.setattr(log, 'time', types.SimpleNamespace(monotonic=lambda: next(times)))
  with StageLog(tmp_path, 5.0, None) as writer:
    assert writer.write_timing(1, 0.25) is None
    assert writer.write_timing(9, 1.25) == pytest.approx(1 / 4)
    assert writer.write_timing(10, 1.25) == 0
    assert writer.write_timing(11, 1.85) == 1  # no more than all of it
  assert read_metrics(tmp_path / TIMING) == [
    {'step': 9, 'data_wait': 0.25, 'steps_per_second': 2.0},
    {'step': 10, 'data_wait': 0.0, 'steps_per_second': 0.5},
    {'step': 11, 'data_wait': 1.0, 'steps_per_second': 2.0},
  ]


def test_metrics_have_their_epoch_and_damage_where_there_is_any(tmp_path):
  with StageLog(tmp_path, 5.0, None) as writer:
    writer.write(2, {'loss': 1.0})
    writer.write_score(5, Score(3, 4, 0.5))
    writer.write_score(10, Score(3, 4, 0.5, damaged=2))
  lines = read_metrics(tmp_path)
  assert lines[0] == {'step': 2, 'epoch': 0.4, 'loss': 1.0}
  assert lines[1] == {'step': 5, 'epoch': 1.0, 'test_loss': 0.5, 'test_accuracy': 0.75}
  assert lines[2]['test_damaged'] == 2


def test_lines_after_the_resumed_step_are_dropped_of_both(tmp_path, monkeypatch):
  times = iter(range(10))
  monkeypatch.setattr(log, 'time', types.SimpleNamespace(monotonic=lambda: next(times)))
  with StageLog(tmp_path, 1.0, None) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'loss': 1.0})
      writer.write_timing(step, 0.0)
  with StageLog(tmp_path, 1.0, 2):
    pass
  assert [line['step'] for line in read_metrics(tmp_path)] == [1, 2]
  assert [line['step'] for line in read_metrics(tmp_path / TIMING)] == [2]


def test_timing_has_the_spread_of_the_steps_and_the_memory_of_the_fullest_device(
  tmp_path, monkeypatch
):
  def device(**stats):
    return types.SimpleNamespace(memory_stats=lambda: stats or None)

  devices = [device(), device(bytes_in_use=5, peak_bytes_in_use=9), device(bytes_in_use=7)]
  monkeypatch.setattr(log.jax, 'local_devices', lambda: devices)
  times = iter([0.0, 10.0, 20.0])
  monkeypatch.setattr(log, 'time', types.SimpleNamespace(monotonic=lambda: next(times)))
  with StageLog(tmp_path, 5.0, None) as writer:
    writer.write_timing(1, 0.0)
    writer.write_timing(21, 0.0, [0.1] * 19 + [2.0])
    writer.write_timing(22, 0.0)
  first, second = read_metrics(tmp_path / TIMING)
  assert first['step_p50'] == pytest.approx(0.1)
  assert 0.1 < first['step_p95'] < 0.3
  assert (first['step_max'], first['memory_in_use'], first['memory_peak']) == (2.0, 7, 9)
  assert 'step_p50' not in second


def test_a_run_that_went_back_says_so_in_each_line(tmp_path):
  with StageLog(tmp_path, 1.0, 3, steps_back=2) as writer:
    writer.write(4, {'loss': 1.0})
    writer.write_score(4, Score(1, 2, 0.5))
  assert [line['steps_back'] for line in read_metrics(tmp_path)] == [2, 2]


class Disk:
  """Takes so many bytes and no more, in place of `os.write`."""

  def __init__(self, monkeypatch, room):
    self.room, self._write = room, os.write
    monkeypatch.setattr(append, 'os', types.SimpleNamespace(write=self, fsync=os.fsync))

  def __call__(self, descriptor, data):
    if not self.room:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = self._write(descriptor, data[: self.room])
    self.room -= written
    return written


def test_an_appended_file_is_always_a_beginning_of_what_was_written(tmp_path, monkeypatch):
  path = tmp_path / 'file'
  disk = Disk(monkeypatch, 5)
  file = AppendedFile(path)
  with pytest.raises(OSError, match='No space left'):
    file.write(b'first line\n')
  assert path.read_bytes() == b'first'
  with pytest.raises(OSError, match='No space left'):
    file.write(b'second\n')
  disk.room = 100
  file.flush()
  assert path.read_bytes() == b'first line\nsecond\n'
  disk.room = 2
  with pytest.raises(OSError, match='No space left'):
    file.write(b'third\n')
  with pytest.raises(OSError, match='No space left'):
    file.close()
  file.close()
  assert path.read_bytes() == b'first line\nsecond\nth'


def test_on_a_full_disk_lines_are_kept_told_of_once_and_written_later(
  tmp_path, monkeypatch, caplog
):
  disk = Disk(monkeypatch, 10_000)
  with StageLog(tmp_path, 1.0, None) as writer:
    writer.write(1, {'loss': 1.0})
    disk.room = 7
    for step in range(2, 30):
      writer.write(step, {'loss': 1.0})
    writer.write_timing(29, 0.0)
    assert caplog.text.count('cannot be written: No space left on device; ') == 1
    assert f'the metrics in {tmp_path} cannot' in caplog.text
    assert 'They are kept in memory, and the run goes on.' in caplog.text
    with pytest.raises(
      OSError, match=r'^the metrics in .* No space left on device; .* are free\.$'
    ):
      writer.sync()
    assert [line['step'] for line in read_metrics(tmp_path)] == [1]  # and a torn one
    disk.room = 100_000
    writer.sync()
  assert [line['step'] for line in read_metrics(tmp_path)] == list(range(1, 30))


class FullStream(io.StringIO):
  def __init__(self, error):
    super().__init__()
    self.error = error

  def flush(self):
    raise self.error


def test_a_log_on_a_full_disk_does_not_end_the_run_but_a_closed_pipe_does():
  with Progress('saq', 2, live=False, stream=FullStream(OSError(errno.ENOSPC, 'full'))) as progress:
    progress.update(2, loss=0.5)
  with pytest.raises(BrokenPipeError):
    Progress('saq', 2, live=False, stream=FullStream(BrokenPipeError())).__enter__()


def fail_after(writer):
  writer.write(1, {'loss': 1.0})
  raise KeyError


def test_lines_that_are_never_taken_end_the_run_but_hide_no_other_error(tmp_path, monkeypatch):
  disk = Disk(monkeypatch, 0)
  with pytest.raises(OSError, match='No space left'), StageLog(tmp_path, 1.0, None) as writer:
    writer.write(1, {'loss': 1.0})
  with pytest.raises(KeyError), StageLog(tmp_path, 1.0, None) as writer:
    fail_after(writer)
  assert disk.room == 0
  assert (tmp_path / FILE_NAME).read_bytes() == b''

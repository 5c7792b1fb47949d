"""What a stage writes: metrics with their epoch, and the speed beside them."""

import types

import pytest

from saq_jax.training import log
from saq_jax.training.evaluate import Score
from saq_jax.training.log import TIMING, StageLog
from saq_jax.training.metrics import read_metrics


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

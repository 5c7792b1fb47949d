"""Metrics on disk: strict JSON, resumption without lost or doubled lines, kills, TensorBoard."""

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from saq_jax.training.metrics import FILE_NAME, MetricWriter, read_metrics


def strict(line):
  def refuse(word):
    raise AssertionError(f'{word} is not JSON')

  return json.loads(line, parse_constant=refuse)


def write_steps(folder, steps, resume_step=None):
  with MetricWriter(folder, resume_step=resume_step) as writer:
    for step in steps:
      writer.write(step, {'loss': 1 / step})


def test_numbers_of_every_kind_come_back_exactly(tmp_path):
  figures = {
    'python': 0.1,
    'int': 3,
    'bool': True,
    'numpy': np.float32(0.1),
    'numpy_int': np.int64(2**40),
    'jax': jnp.float32(1 / 3),
    'jax_vector': jnp.ones(1),
    'bfloat16': jnp.bfloat16(0.5),
    'tiny': 5e-324,
  }
  with MetricWriter(tmp_path / 'deep' / 'run') as writer:
    writer.write(np.int32(7), figures)
  (record,) = read_metrics(tmp_path / 'deep' / 'run')
  assert record == {'step': 7} | {
    name: np.asarray(value).reshape(()).astype(float) for name, value in figures.items()
  }
  assert isinstance(record['numpy_int'], int)


def test_nan_and_infinities_are_strict_json(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(1, {'a': math.nan, 'b': np.float32('inf'), 'c': jnp.float32(-jnp.inf)})
  line = (tmp_path / FILE_NAME).read_text()
  assert strict(line) == {'step': 1, 'a': 'NaN', 'b': 'Infinity', 'c': '-Infinity'}
  (record,) = read_metrics(tmp_path / FILE_NAME)
  assert math.isnan(record['a'])
  assert (record['b'], record['c']) == (math.inf, -math.inf)


@pytest.mark.parametrize('value', [np.ones(2), 'high', None, 1j, {}])
def test_what_is_not_one_number_is_refused_by_name(tmp_path, value):
  with MetricWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match="'odd'"):
      writer.write(1, {'loss': 1.0, 'odd': value})
    with pytest.raises(ValueError, match='step'):
      writer.write(1, {'step': 2})
  assert read_metrics(tmp_path) == []


def test_a_resumed_run_has_each_line_once(tmp_path):
  write_steps(tmp_path, range(1, 8))
  write_steps(tmp_path, range(5, 11), resume_step=4)
  assert read_metrics(tmp_path) == [{'step': step, 'loss': 1 / step} for step in range(1, 11)]
  write_steps(tmp_path, [1, 2])
  assert [record['step'] for record in read_metrics(tmp_path)] == [1, 2]
  assert not list(tmp_path.glob('*.new'))


def test_resuming_keeps_words_for_nan_and_several_lines_of_a_step(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(3, {'loss': math.nan})
    writer.write(3, {'accuracy': 0.5})
  before = (tmp_path / FILE_NAME).read_bytes()
  MetricWriter(tmp_path, resume_step=3).close()
  assert (tmp_path / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize('cut', [1, 2, 9])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
  write_steps(tmp_path, [1, 2, 3])
  path = tmp_path / FILE_NAME
  path.write_bytes(path.read_bytes()[:-cut])
  # Without its newline alone, a line is still whole.
  whole = [1, 2, 3] if cut == 1 else [1, 2]
  assert [record['step'] for record in read_metrics(tmp_path)] == whole
  write_steps(tmp_path, [4], resume_step=3)
  assert [strict(line)['step'] for line in path.read_text().splitlines()] == [*whole, 4]


@pytest.mark.parametrize('bad', ['{"step": 2, "loss"', '[1]', '{"loss": 1}', '{"step": "x"}', '7'])
def test_a_bad_line_amid_others_is_an_error_with_its_number(tmp_path, bad):
  (tmp_path / FILE_NAME).write_text('{"step": 1}\n' + bad + '\n{"step": 3}\n')
  with pytest.raises(ValueError, match='line 2'):
    read_metrics(tmp_path)
  with pytest.raises(ValueError, match='line 2'):
    MetricWriter(tmp_path, resume_step=3)
  assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 3


KILLED = """
import sys
from saq_jax.training.metrics import MetricWriter
writer = MetricWriter(sys.argv[1])
for step in range(1, 10**6):
  writer.write(step, {'loss': step / 7})
  print(step, flush=True)
"""


def test_a_kill_loses_no_written_line(tmp_path):
  child = subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path)], stdout=subprocess.PIPE)
  seen = [int(next(child.stdout)) for _ in range(200)]
  child.kill()
  seen += [int(line) for line in child.stdout.read().splitlines() if line]
  child.wait()
  steps = [record['step'] for record in read_metrics(tmp_path)]
  assert steps == list(range(1, len(steps) + 1))
  assert len(steps) >= max(seen) - 1  # the last number printed may itself be torn
  write_steps(tmp_path, range(101, 104), resume_step=100)
  assert [record['step'] for record in read_metrics(tmp_path)] == list(range(1, 104))


def events(folder):
  for path in sorted(folder.glob('events.*')):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], 'little')
      yield Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def test_tensorboard_gets_the_figures_and_the_step_to_purge_from(tmp_path):
  write_steps(tmp_path, [1, 2])
  assert {
    (event.step, value.tag, round(value.simple_value, 6))
    for event in events(tmp_path)
    for value in event.summary.value
  } == {(1, 'loss', 1.0), (2, 'loss', 0.5)}
  folder = tmp_path / 'resumed'
  write_steps(folder, [6], resume_step=5)
  assert [event.step for event in events(folder) if event.HasField('session_log')] == [6]

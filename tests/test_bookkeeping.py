"""Bookkeeping: what it waits for is announced to the watch over the loop."""

import contextlib
import types

import jax
import numpy as np
import pytest

from saq_jax.training import bookkeeping
from saq_jax.training.bookkeeping import Bookkeeping, PreemptedError, has_line
from saq_jax.training.checkpoint_config import CheckpointConfig
from saq_jax.training.signals import Stop

FIGURES = {'loss': 1.0, 'sharp_grad_norm': 1.0, 'lr': 0.1, 'accuracy': 0.5}


class Waits:
  """Notes what is done within which wait."""

  def __init__(self):
    self.now, self.seen = [], []

  @contextlib.contextmanager
  def waiting(self, step, what, grows=False):
    self.now.append(what)
    yield
    self.now.pop()

  def note(self, deed, answer=None):
    self.seen.append((deed, self.now[-1] if self.now else None))
    return answer


class Steps:
  """Steps that do nothing but tell when they are begun."""

  def __init__(self, waits):
    self._waits = waits

  def is_new(self, step):
    return step == 1

  def __call__(self, *_):
    return None, self._waits.note('step', FIGURES)


@pytest.fixture
def books(monkeypatch):
  """Books of a stage of ten steps, with lines of metrics at every second one."""
  waits = Waits()
  stage = types.SimpleNamespace(
    name='saq',
    log_every=2,
    total_steps=10,
    taken=None,
    checkpoint_every=4,
    checkpoint=CheckpointConfig(),
  )
  checkpoints = types.SimpleNamespace(
    check=lambda: None,
    save=lambda *_: waits.note('save'),
    wait=lambda: waits.note('wait'),
    best=None,
  )
  losses = types.SimpleNamespace(see=lambda *_: None, notes={})
  leg = types.SimpleNamespace(stage=stage, stop=Stop(), losses=losses, profile=None)
  log = types.SimpleNamespace(write=lambda *_: None, sync=lambda: None)
  progress = types.SimpleNamespace(update=lambda *_, **__: None)
  get = jax.device_get
  monkeypatch.setattr(jax, 'device_get', lambda tree: waits.note('read', get(tree)))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(bookkeeping, 'all_agree', lambda sound: waits.note('agree', sound))
  return Bookkeeping(leg, Steps(waits), checkpoints, log, progress, waits), waits, leg.stop


def test_whatever_may_take_forever_is_watched(books):
  books, waits, _ = books
  for step in (1, 9, 10):
    books.advance(None, None, step)
    books.save_if_due(None, step, None)
  # The last save of a stage is waited for before the watch is over.
  assert waits.seen == [
    ('step', 'the step'),
    ('step', 'the step'),
    ('read', 'the step'),
    ('step', 'the step'),
    ('read', 'the step'),
    ('read', 'the step'),
    ('save', 'the checkpoint'),
    ('wait', 'the checkpoint'),
  ]


def test_the_agreement_to_stop_is_watched(books):
  books, waits, stop = books
  stop.request('SIGTERM')
  books.save_if_due(None, 1, None)  # no line of metrics, no agreement
  with pytest.raises(PreemptedError, match='SIGTERM: saved'):
    books.save_if_due(None, 2, None)
  assert waits.seen == [
    ('agree', 'the agreement of the processes'),
    ('save', 'the checkpoint'),
    ('wait', 'the checkpoint'),
  ]


@pytest.mark.parametrize(
  ('taken', 'more'),
  [
    (None, []),
    ([1] * 26, []),
    ([1, 0, 0, 0, 0] * 6, [11, 21]),  # of steps 1, 6, 11, ...
    ([1, 0] * 13, [11, 21]),
    ([0] * 6 + [1] + [0] * 19, [7]),
    ([0, 0, 1, 1] + [0] * 5 + [1] + [0] * 16, [3]),  # step 10 itself is one
    ([0] * 26, []),
  ],
)
def test_a_second_gradient_is_seen_whatever_its_period(taken, more):
  taken = None if taken is None else np.array(taken, bool)
  stage = types.SimpleNamespace(log_every=10, total_steps=26, taken=taken)
  lines = [step for step in range(1, 27) if has_line(step, stage)]
  assert lines == sorted([1, 10, 20, 26, *more])

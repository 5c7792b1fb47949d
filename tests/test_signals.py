"""Preemption: real signals to real processes."""

import signal
import subprocess
import sys
import threading

import pytest

from saq_jax.training.signals import preemption

CHILD = """
import sys, time
from saq_jax.training.signals import preemption
with preemption() as stop:
  print('ready', flush=True)
  while not stop.requested:
    time.sleep(0.01)
  print(stop.reason, flush=True)
  if 'hang' in sys.argv:
    time.sleep(60)
print('saved', flush=True)
"""


def start(*args):
  child = subprocess.Popen(
    [sys.executable, '-c', CHILD, *args],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert child.stdout.readline() == 'ready\n'
  return child


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_one_signal_lets_the_run_end_by_itself(name):
  child = start()
  child.send_signal(getattr(signal, name))
  out, err = child.communicate(timeout=30)
  assert (out, err, child.returncode) == (f'{name}\nsaved\n', '', 0)


@pytest.mark.parametrize(
  ('first', 'second'), [('SIGINT', 'SIGINT'), ('SIGTERM', 'SIGTERM'), ('SIGTERM', 'SIGINT')]
)
def test_a_second_signal_kills(first, second):
  child = start('hang')
  child.send_signal(getattr(signal, first))
  assert child.stdout.readline() == f'{first}\n'
  child.send_signal(getattr(signal, second))
  out, err = child.communicate(timeout=30)
  assert out == ''
  assert child.returncode == -getattr(signal, second)
  assert ('KeyboardInterrupt' in err) == (second == 'SIGINT')


def test_former_handlers_are_back_at_the_end():
  def mine(number, frame):
    calls.append(number)

  calls = []
  former = signal.signal(signal.SIGTERM, mine)
  try:
    with preemption():
      assert signal.getsignal(signal.SIGTERM) is not mine
    assert signal.getsignal(signal.SIGTERM) is mine
    with pytest.raises(RuntimeError), preemption():
      raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is mine
    with preemption() as stop:
      signal.raise_signal(signal.SIGTERM)
      assert (stop.requested, stop.reason, calls) == (True, 'SIGTERM', [])
      signal.raise_signal(signal.SIGTERM)
      assert calls == [signal.SIGTERM]
  finally:
    signal.signal(signal.SIGTERM, former)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_only_the_named_signals_are_taken():
  former = signal.getsignal(signal.SIGTERM)
  with preemption(signals=[signal.SIGINT]) as stop:
    assert signal.getsignal(signal.SIGTERM) is former
    signal.raise_signal(signal.SIGINT)
    assert stop.reason == 'SIGINT'


def test_in_another_thread_signals_are_left_alone():
  def run():
    with preemption() as stop:
      same.append(signal.getsignal(signal.SIGTERM) is former)
      same.append(not stop.requested)
      stop.request('the scheduler')
      stop.request('a later one')
      same.append(stop.reason == 'the scheduler')

  same = []
  former = signal.getsignal(signal.SIGTERM)
  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert same == [True, True, True]

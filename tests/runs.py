"""Whole runs that tests start: of several processes, their metrics, and comparing two of them."""

import contextlib
import random
import socket
import subprocess
import time

import jax
import numpy as np

from saq_jax.training.checkpoint import restore_subtrees
from saq_jax.training.metrics import read_metrics

PARTS = ('step', 'params', 'batch_stats', 'opt_state')
# Seconds that a test waits for what should come: enough on a machine that is slow and busy.
PATIENCE = 900


def lines(path):
  return path.read_text().count('\n') if path.exists() else 0


def wait_for_line(process, path, count):
  """Waits until a file of metrics has so many lines."""
  deadline = time.monotonic() + PATIENCE
  while lines(path) < count:
    assert process.poll() is None, f'it ended before line {count}: {process.stdout.read()}'
    assert time.monotonic() < deadline, 'it takes too long'
    time.sleep(0.002)


def assert_same_stage(one, two, parts=PARTS):
  """That the newest checkpoints of two stages have the same bits, and their metrics agree."""
  ours, theirs = (restore_subtrees(stage, *parts) for stage in (one, two))
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert read_metrics(one) == read_metrics(two)


def free_port():
  """A port that nothing listens on; below those that the system gives to connections by itself."""
  while True:
    port = random.SystemRandom().randrange(20000, 32000)
    with socket.socket() as tried, contextlib.suppress(OSError):
      tried.bind(('127.0.0.1', port))
      return port


@contextlib.contextmanager
def processes(count, words, env):
  """Starts the processes of one run, `words(port, index)` each; at the end none is left."""
  port, started = free_port(), []
  try:
    for index in range(count):
      command = [str(word) for word in words(port, index)]
      started.append(
        subprocess.Popen(
          command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
      )
    yield started
  finally:
    for process in started:
      process.kill()
      process.wait()


def outputs(started, timeout=PATIENCE):
  """What each printed, and its errors, once all have ended."""
  return [process.communicate(timeout=timeout) for process in started]


def succeed(count, words, env, timeout=PATIENCE):
  """Runs the processes of one run, which must end with code 0, and returns their outputs."""
  with processes(count, words, env) as started:
    told = outputs(started, timeout)
    assert [process.returncode for process in started] == [0] * count, told
  return told

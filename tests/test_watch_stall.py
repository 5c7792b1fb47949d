"""The watch over the loop: what is told of a hung step, when the process ends, what is left out."""

import io
import signal
import subprocess
import sys
import time

from test_resume import command

from saq_jax.training.watch_config import WatchConfig
from saq_jax.training.watch_stall import StallWatch


def watch(tell, abort, ended=None):
  stream = io.StringIO()
  config = WatchConfig(stall_seconds=tell, stall_abort_seconds=abort)
  end = None if ended is None else ended.append
  return StallWatch(config, 'saq', 90, stream=stream, end=end), stream


def hang(seconds):
  time.sleep(seconds)


def test_a_long_wait_is_told_once_with_where_it_is_and_again_when_it_ends():
  stalls, stream = watch(0.1, None)
  with stalls:
    with stalls.waiting(6, 'the step'):
      pass
    with stalls.waiting(7, 'the step'):
      hang(0.5)
  told, over = stream.getvalue().splitlines()
  assert told.startswith("saq_jax: stage 'saq' has waited for 0 s at step 7 of 90: the step does ")
  assert 'hang in test_watch_stall.py:' in told
  assert 'test_a_long_wait' in told  # its caller
  assert over.startswith("saq_jax: stage 'saq' goes on at step 7, after")


def test_a_far_too_long_wait_ends_the_process_with_a_reason():
  ended = []
  stalls, stream = watch(0.05, 0.2, ended)
  with stalls, stalls.waiting(7, 'the checkpoint'):
    hang(0.6)
  assert ended[0] == 1
  last = stream.getvalue().splitlines()[1]
  assert 'the checkpoint does not end' in last
  assert 'config.watch.stall_abort_seconds=0.2: the process ends with exit code 1' in last


def test_short_waits_and_what_is_compiled_are_silent():
  ended = []
  stalls, stream = watch(0.2, 0.3, ended)
  with stalls:
    for _ in range(20):  # long together
      with stalls.waiting(1, 'the step'):
        hang(0.03)
    with stalls.waiting(1, 'the evaluation', grows=True):
      hang(0.6)
    with stalls.waiting(2, 'the evaluation', grows=True):
      hang(0.6)  # no longer than the first and a bit
    hang(0.6)  # no wait at all
  assert (stream.getvalue(), ended) == ('', [])


def test_a_wait_within_another_stands_in_for_it():
  stalls, stream = watch(0.1, None)
  with stalls, stalls.waiting(7, 'the checkpoint'):
    with stalls.waiting(6, 'the step'):
      hang(0.5)
    hang(0.5)
  told = [line.split(': ')[2] for line in stream.getvalue().splitlines() if 'waited' in line]
  assert [words.split(' does not')[0] for words in told] == ['the step', 'the checkpoint']


def test_without_limits_nothing_is_watched():
  stalls, stream = watch(None, None)
  with stalls, stalls.waiting(1, 'the step'):
    hang(0.01)
  assert stream.getvalue() == ''


ASLEEP = """
import time
from saq_jax.training.watch_config import WatchConfig
from saq_jax.training.watch_stall import StallWatch
config = WatchConfig(stall_seconds=1.0, stall_abort_seconds=1.5)
with StallWatch(config, 'saq', 90) as stalls, stalls.waiting(7, 'the step'):
  print('waits', flush=True)
  time.sleep(0.3)
"""


def test_time_in_which_the_process_itself_is_stopped_does_not_count():
  child = subprocess.Popen(
    [sys.executable, '-c', ASLEEP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert child.stdout.readline() == 'waits\n'
  child.send_signal(signal.SIGSTOP)
  time.sleep(2.5)
  child.send_signal(signal.SIGCONT)
  _, errors = child.communicate(timeout=30)
  assert (child.returncode, errors) == (0, '')


# A device that hangs at a step, and a compilation that takes long.
HUNG = """
import sys, time
from saq_jax.main import main
from saq_jax.training.bookkeeping import jax
from saq_jax.training.compiled import CompiledStep

def hung_device_get(tree, real=jax.device_get):
  global read
  read += 'sharp_grad_norm' in tree
  if read == 9:
    time.sleep(60)
  return real(tree)

def slow_to_compile(self, state, batch, step, real=CompiledStep.__call__):
  if self.is_new(step):
    time.sleep(4)
  return real(self, state, batch, step)

read = 0
if sys.argv[1] == 'hang':
  jax.device_get, CompiledStep.__call__ = hung_device_get, slow_to_compile
sys.exit(main(sys.argv[2:]))
"""


def test_a_hung_device_ends_the_run_and_the_same_command_goes_on(tmp_path, digits_dir, user_env):
  flags = [
    *command(tmp_path / 'run', digits_dir)[3:],
    '--config.methods=saq',
    '--config.quant_stage.epochs=1',
  ]

  def run(how, *more):
    words = [sys.executable, '-c', HUNG, how, *flags, *more]
    return subprocess.run(
      words, check=False, capture_output=True, text=True, env=user_env, timeout=90
    )

  hung = run('hang', '--config.watch.stall_seconds=1', '--config.watch.stall_abort_seconds=2')
  assert hung.returncode == 1, hung.stderr
  told, ended = [line for line in hung.stderr.splitlines() if line.startswith('saq_jax: ')]
  assert "stage 'float' has waited for 1 s at step 9 of 22: the step does not end" in told
  assert 'hung_device_get in <string>:' in told
  assert 'the process ends with exit code 1, and the same command goes on' in ended
  assert 'Traceback' not in hung.stderr
  done = run('do not', '--config.watch.stall_seconds=None')
  assert done.returncode == 0, done.stderr

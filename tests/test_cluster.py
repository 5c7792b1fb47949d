"""Several processes as one run: found by flags or by the environment, through kills, and errors."""

import os
import signal
import sys
import time

import jax
import pytest
from runs import PATIENCE, assert_same_stage, lines, outputs, processes, succeed

from saq_jax import main as program
from saq_jax.training.cluster import Cluster, find_cluster
from saq_jax.training.flags import UsageError

COUNT, FOUR = 2, 4
SETTINGS = [
  '--config.model.width=2',
  '--config.data.batch_size=128',
  '--config.data.eval_batch_size=100',
  '--config.float_stage.epochs=2',
  '--config.quant_stage.epochs=2',
  '--config.methods=saq',
  '--config.checkpoint_every_epochs=0.5',
  '--config.log_every_steps=1',
  '--config.mesh.fsdp=2',
]
SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'a[1-2]',
  'SLURM_PROCID': '0',
  'SLURM_LOCALID': '0',
}
OPEN_MPI = {'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:34911'}


@pytest.mark.parametrize(
  ('environ', 'found'),
  [
    ({}, None),
    ({**SLURM, 'SLURM_NTASKS': '1'}, None),
    ({**SLURM, 'SLURM_NTASKS': '2'}, Cluster()),
    # A shell of salloc, without srun: no step, and no other processes.
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2'}, None),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, None),
    ({**OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '8'}, Cluster()),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, Cluster()),
    ({'MEGASCALE_COORDINATOR_ADDRESS': 'a:1'}, Cluster()),
  ],
)
def test_a_cluster_is_found_where_there_is_one(environ, found):
  assert find_cluster([], {'JAX_PLATFORMS': 'cpu', **environ}) == found


@pytest.mark.parametrize(
  ('environ', 'found'),
  [
    ({**SLURM, 'SLURM_NTASKS': '2'}, 'slurm'),
    ({**OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '8'}, 'ompi'),
  ],
)
def test_where_one_is_found_jax_finds_it_too(monkeypatch, environ, found):
  """Else it fails at the start, or takes this for one process."""
  clusters = pytest.importorskip('jax._src.clusters.cluster')
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  present = [env.name for env in clusters.ClusterEnv._cluster_types if env.is_env_present()]
  assert found in present


def test_open_mpi_that_does_not_tell_where_the_others_are_needs_the_flags():
  arguments = ['--coordinator=h:99', '--processes=8', '--process=2']
  environ = {'OMPI_COMM_WORLD_SIZE': '8'}
  with pytest.raises(UsageError, match='give --coordinator, --processes and --process'):
    find_cluster([], environ)
  assert find_cluster(arguments, environ) == Cluster('h:99', 8, 2)


def test_flags_describe_it_and_are_taken_out():
  arguments = ['--coordinator=h:99', '--config.seed=1', '--processes', '3', '--process=2']
  assert find_cluster(arguments, {}) == Cluster('h:99', 3, 2)
  assert arguments == ['--config.seed=1']


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['--coordinator=h:1', '--processes=2'], '--process is missing'),
    (['--process=0'], '--coordinator is missing'),
    (['--coordinator=h:1', '--processes=2', '--process=2'], 'the second below the first'),
    (['--coordinator=h:1', '--processes=x', '--process=0'], 'must be whole numbers'),
    (['--coordinator=h', '--processes=2', '--process=0'], 'must be HOST:PORT'),
    (['--coordinator=h:p', '--processes=2', '--process=0'], 'must be HOST:PORT'),
  ],
)
def test_impossible_flags_are_said(arguments, words):
  with pytest.raises(UsageError, match=words):
    find_cluster(arguments, {})


# ---- How a process of several ends


class Ended(BaseException):
  """Stands for the end of the process."""


@pytest.fixture
def ended(monkeypatch):
  """A run of several, in this process: its end raises Ended with the code."""

  def end(code):
    raise Ended(code)

  monkeypatch.setattr(program, 'join', lambda cluster: None)
  monkeypatch.setattr(program, 'differing', lambda values: [])
  monkeypatch.setattr(program, '_MOMENT', 0.01)
  monkeypatch.setattr(os, '_exit', end)
  return ['--coordinator=h:1', '--processes=2', '--process=0']


@pytest.mark.parametrize('error', [KeyError('a fault of ours'), KeyboardInterrupt()])
def test_a_traceback_is_printed_and_nothing_waited_for(ended, monkeypatch, capsys, error):
  def fail(*_):
    raise error

  monkeypatch.setattr(program, '_run', fail)
  with pytest.raises(Ended, match='1'):
    program.main(ended)
  told = capsys.readouterr().err
  assert 'Traceback' in told
  assert type(error).__name__ in told


def test_wrong_input_ends_at_once_too(ended, tmp_path, capsys):
  (tmp_path / 'thesis.tex').write_text('years of work')
  with pytest.raises(Ended, match='2'):
    program.main([*ended, f'--workdir={tmp_path}'])
  assert 'another --workdir' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('words', 'told'),
  [
    ('UNKNOWN: Gloo AllReduce failed: Connection closed by peer [::1]:3', 'another process of the'),
    ('DEADLINE_EXCEEDED: Barrier timed out.\nmore', 'another process of the run is gone'),
    ('RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes', 'process 0 cannot go on: RESOURCE_E'),
    ('INTERNAL: a kernel failed', 'process 0 cannot go on: INTERNAL: a kernel failed'),
  ],
)
def test_a_lost_peer_and_a_lack_of_memory_are_told_apart(
  tmp_path, monkeypatch, capsys, words, told
):
  from saq_jax import experiment

  def fail(*_):
    raise jax.errors.JaxRuntimeError(words)

  monkeypatch.setattr(experiment, 'run', fail)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert program._train(None, 'a', tmp_path, None) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'saq_jax: {told}')


def test_a_lack_of_memory_is_one_line_and_another_error_of_the_device_keeps_its_traceback(
  tmp_path, monkeypatch, capsys
):
  from saq_jax import experiment

  words = ('RESOURCE_EXHAUSTED: so', 'INTERNAL: so')
  errors = [jax.errors.JaxRuntimeError(word) for word in words]

  def fail(*_):
    raise errors.pop(0)

  monkeypatch.setattr(experiment, 'run', fail)
  assert program._train(None, 'a', tmp_path, None) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('saq_jax: the run cannot go on: RESOURCE_EXHAUSTED: so (a smaller data.')
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    program._train(None, 'a', tmp_path, None)


# ---- Whole runs of several processes, each with a part of the state


def words_of(workdir, digits_dir, *more, count=COUNT):
  def words(port, index):
    return [
      *(sys.executable, '-m', 'saq_jax.main', f'--workdir={workdir}', *SETTINGS),
      f'--config.data.data_dir={digits_dir}',
      *(f'--coordinator=127.0.0.1:{port}', f'--processes={count}', f'--process={index}'),
      *(word.format(index=index) for word in more),
    ]

  return words


def wait_for_lines(started, path, count):
  until = time.monotonic() + PATIENCE
  while lines(path) < count:
    assert time.monotonic() < until, 'it takes too long'
    assert all(p.poll() is None for p in started), outputs(started)
    time.sleep(0.01)


def assert_tells_of_a_lost_peer(errors):
  """The sentence, or the words of jax, where its own watch is the first to see it."""
  lost = 'another process of the run is gone', 'the JAX distributed service detected fatal errors'
  assert any(words in errors for words in lost), errors
  assert 'Traceback' not in errors


def test_four_processes_are_one_run_through_a_stop_and_a_kill_of_one(
  tmp_path, digits_dir, quick_env
):
  one, two = tmp_path / 'unbroken', tmp_path / 'broken'
  unbroken, broken = (words_of(workdir, digits_dir, count=FOUR) for workdir in (one, two))
  told = succeed(FOUR, unbroken, quick_env)
  # The first alone speaks, and writes the report.
  assert '/359' in told[0][0]
  said = [line for out, _ in told[1:] for line in out.splitlines()]
  assert not [line for line in said if not line.startswith('[Gloo]')]
  assert (one / 'report.md').exists()
  with processes(FOUR, broken, quick_env) as started:
    wait_for_lines(started, two / 'float' / 'metrics.jsonl', 8)
    started[1].send_signal(signal.SIGTERM)
    told = outputs(started, 60)
    assert [process.returncode for process in started] == [0] * FOUR, told
    assert "a signal to another process: saved stage 'float' at step" in told[0][0]
  with processes(FOUR, broken, quick_env) as started:
    wait_for_lines(started, two / 'saq' / 'metrics.jsonl', 8)
    started[2].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    told = outputs(started, 120)
    assert time.monotonic() - killed < 100
    for process, (_, errors) in zip(started, told, strict=True):
      if process is not started[2]:
        assert process.returncode != 0
        assert_tells_of_a_lost_peer(errors)
  succeed(FOUR, broken, quick_env)
  for stage in ('float', 'saq'):
    assert_same_stage(one / stage, two / stage)


# A record that only the second process cannot decode, at its ninth batch.
FAILING = """
import sys
import jax
from saq_jax.data.decode import RecordError
from saq_jax.main import main
from saq_jax.training import loop

def to_devices(batch, mesh, real=loop.to_devices):
  global seen
  seen += 1
  if jax.process_index() == 1 and seen == 9:
    raise RecordError('image 7 cannot be decoded')
  return real(batch, mesh)

seen = 0
loop.to_devices = to_devices
sys.exit(main(sys.argv[1:]))
"""


def test_what_fails_in_one_process_ends_both_soon(tmp_path, digits_dir, user_env):
  def words(port, index):
    given = words_of(tmp_path / 'run', digits_dir)(port, index)
    return [sys.executable, '-c', FAILING, *given[3:]]

  with processes(COUNT, words, user_env) as started:
    (_, first), (_, second) = outputs(started, 150)
  assert started[1].returncode == 1
  assert second.splitlines()[-1] == 'saq_jax: image 7 cannot be decoded'
  assert started[0].returncode != 0
  assert_tells_of_a_lost_peer(first)


def test_processes_that_mean_different_runs_are_told_so(tmp_path, digits_dir, user_env):
  words = words_of(tmp_path / 'run', digits_dir, '--config.seed={index}')
  with processes(COUNT, words, user_env) as started:
    told = outputs(started, 120)
  for index, (_, errors) in enumerate(told):
    assert started[index].returncode == 2
    (line,) = [line for line in errors.splitlines() if line.startswith('saq_jax: ')]
    assert 'the processes differ in command: give all of them the same arguments' in line
  assert not (tmp_path / 'run').exists()


# A SIGTERM right after the processes met ends them: nothing has begun that could be saved.
MET = """
import os, signal, sys, time
import jax
from saq_jax.training.cluster import Cluster, join
join(Cluster('127.0.0.1:' + sys.argv[1], 2, int(sys.argv[2])))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""


def test_a_signal_while_starting_is_not_lost(user_env):
  words = sys.executable, '-c', MET
  with processes(COUNT, lambda *which: [*words, *which], user_env) as started:
    outputs(started, 60)
  assert [process.returncode for process in started] == [-signal.SIGTERM] * 2

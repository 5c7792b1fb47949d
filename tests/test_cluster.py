"""Several processes as one run: found by flags or by the environment, and through a kill."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_resume import lines

from saq_jax.training.checkpoint import restore_subtrees
from saq_jax.training.cluster import Cluster, find_cluster
from saq_jax.training.flags import UsageError
from saq_jax.training.metrics import read_metrics

COUNT = 4
SETTINGS = [
  '--config.model.width=2',
  '--config.data.batch_size=128',
  '--config.data.eval_batch_size=100',
  '--config.float_stage.epochs=3',
  '--config.quant_stage.epochs=3',
  '--config.methods=saq',
  '--config.checkpoint_every_epochs=0.5',
  '--config.log_every_steps=1',
]


@pytest.mark.parametrize(
  ('environ', 'found'),
  [
    ({}, None),
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '1'}, None),
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2'}, Cluster()),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, None),
    ({'OMPI_COMM_WORLD_SIZE': '8'}, Cluster()),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, Cluster()),
    ({'MEGASCALE_COORDINATOR_ADDRESS': 'a:1'}, Cluster()),
  ],
)
def test_a_cluster_is_found_where_there_is_one(environ, found):
  assert find_cluster([], {'JAX_PLATFORMS': 'cpu', **environ}) == found


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


def start(workdir, digits_dir, env):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [
    subprocess.Popen(
      [
        *(sys.executable, '-m', 'saq_jax.main', f'--workdir={workdir}', *SETTINGS),
        f'--config.data.data_dir={digits_dir}',
        *(f'--coordinator=127.0.0.1:{port}', f'--processes={COUNT}', f'--process={i}'),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=env,
    )
    for i in range(COUNT)
  ]


@contextlib.contextmanager
def running(*args):
  processes = start(*args)
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()


def finish(*args):
  with running(*args) as processes:
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [p.returncode for p in processes] == [0] * COUNT, outputs
  return outputs


def test_four_processes_train_as_one_and_through_the_kill_of_one(tmp_path, digits_dir, user_env):
  one, two = tmp_path / 'unbroken', tmp_path / 'broken'
  outputs = finish(one, digits_dir, user_env)
  # The first alone speaks, and writes the report.
  assert '/359' in outputs[0][0]
  said = [line for out, _ in outputs[1:] for line in out.splitlines()]
  assert not [line for line in said if not line.startswith('[Gloo]')]
  assert (one / 'report.md').exists()
  with running(two, digits_dir, user_env) as processes:
    until = time.monotonic() + 240
    while lines(two / 'saq' / 'metrics.jsonl') < 8:
      assert time.monotonic() < until, 'it takes too long'
      assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
      time.sleep(0.01)
    os.kill(processes[2].pid, signal.SIGKILL)
    killed = time.monotonic()
    ended = [process.communicate(timeout=120) for process in processes]
    assert time.monotonic() - killed < 100
    others = [i for i in range(COUNT) if i != 2]
    assert all(processes[i].returncode != 0 for i in others)
    assert any('another process of the run is gone' in ended[i][1] for i in others) or all(
      ended[i][1] for i in others
    )
  finish(two, digits_dir, user_env)
  for stage in ('float', 'saq'):
    ours, theirs = (
      restore_subtrees(w / stage, 'params', 'batch_stats', 'opt_state') for w in (one, two)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert read_metrics(one / stage) == read_metrics(two / stage)

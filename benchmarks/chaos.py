"""Kills one run of the digits over and over, and holds what is left against an unbroken run.

    python benchmarks/chaos.py [--kills 20] [--seed 0] [--short]

The same command starts again after every kill. The kinds take turns, the moments are random:

- kill: SIGKILL at some step;
- kill while starting: SIGKILL some seconds after the start, whatever it does then;
- kill in a save: SIGKILL while a checkpoint is half written;
- kill and damage: SIGKILL, and a byte of the newest checkpoint is changed;
- stop: SIGTERM;
- full disk, kill; full disk, stop; full disk for a while, kill: there is no room left on the disk
  of the run, until after the kill, the stop or the run's own complaint.

The disk is a tmpfs in a namespace of this process (Linux's `unshare`); where that is not allowed, a
limit on the size of the run's files stands for it. In the end the whole state has to be that of the
unbroken run bit for bit, and metrics and results its very bytes: else the exit code is 1.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

KINDS = (
  'kill',
  'kill in a save',
  'full disk, stop',
  'stop',
  'full disk for a while, kill',
  'kill while starting',
  'kill and damage',
  'full disk, kill',
)
SHORT_KINDS = KINDS[:4]
STAGES = ('float', 'qat', 'saq')
FLAGS = ['--config.checkpoint_every_epochs=1', '--config.log_every_steps=1']
SHORT_FLAGS = [
  '--config.model.width=2',
  '--config.data.batch_size=128',
  '--config.float_stage.epochs=2',
  '--config.quant_stage.epochs=3',
  '--config.checkpoint_every_epochs=0.5',
  '--config.log_every_steps=1',
  '--config.methods=saq',
]
NAMESPACE = 'SAQ_CHAOS_NAMESPACE'
PATIENCE = 300.0


class Disk:
  """The disk that the run is on, which can be filled and emptied."""

  def __init__(self, folder: Path) -> None:
    self.folder = folder
    self._ballast = folder / 'ballast'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', str(folder)]
    inside = NAMESPACE in os.environ
    self.own = inside and subprocess.run(mount, capture_output=True, check=False).returncode == 0

  @contextlib.contextmanager
  def full(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """No room for the run within the block."""
    unlimited = resource.RLIM_INFINITY
    if not self.own:
      with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, unlimited))
      yield
      with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
      return
    self.fill()
    yield
    self._ballast.unlink()

  def fill(self) -> None:
    """Takes the room that is left, if it can be."""
    if self.own:
      with self._ballast.open('ab', buffering=0) as file, contextlib.suppress(OSError):
        while True:
          file.write(bytes(4096))


class Run:
  """One experiment, started again and again in one work directory."""

  def __init__(self, workdir: Path, flags: list[str]) -> None:
    self.workdir = workdir
    self.printed: list[str] = []
    self._command = [sys.executable, '-m', 'saq_jax.main', f'--workdir={workdir}', *flags]

  def start(self) -> subprocess.Popen[bytes]:
    """Starts the command; a thread takes what it prints."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(self._command, stdout=pipe, stderr=subprocess.STDOUT)
    threading.Thread(target=self._take, args=(process.stdout,), daemon=True).start()
    return process

  def _take(self, output: IO[bytes]) -> None:
    """Keeps the lines of one start."""
    for line in output:
      self.printed.append(line.decode(errors='replace'))

  def place(self) -> tuple[str, int]:
    """The stage under way and its last step that has a line."""
    for stage in reversed(STAGES):
      with contextlib.suppress(OSError, IndexError, ValueError):
        lines = (self.workdir / stage / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
        whole = [line for line in lines[-2:] if line.endswith(b'\n')]
        return stage, int(json.loads(whole[-1])['step'])
    return '', 0

  def half_written(self) -> bool:
    """Whether a checkpoint is being written, or was when the run was killed."""
    return any(self.workdir.glob('*/checkpoints/*.orbax-checkpoint-tmp'))

  def complaints(self) -> int:
    """How often it said so far that the disk is full."""
    return sum('No space left' in line or 'File too large' in line for line in self.printed[:])


def steps_of(flags: list[str]) -> dict[str, int]:
  """The steps of each stage that the flags describe."""
  from saq_jax.training.build import total_steps
  from saq_jax.training.flags import read_flags

  config, _, _ = read_flags(flags)
  per_epoch = 1438 / config.data.batch_size
  settings = {'float': config.float_stage} | dict.fromkeys(config.methods, config.quant_stage)
  return {name: total_steps(stage, per_epoch) for name, stage in settings.items()}


def wait(process: subprocess.Popen[bytes], until: Callable[[], bool], what: str) -> None:
  """Waits for something to happen while the process lives."""
  deadline = time.monotonic() + PATIENCE
  while not until():
    if process.poll() is not None:
      raise RuntimeError(f'the run ended with code {process.returncode} before {what}')
    if time.monotonic() > deadline:
      process.kill()
      raise RuntimeError(f'the run takes too long: {what}')
    time.sleep(0.0005)


def end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
  """Sends a signal and waits for the end."""
  process.send_signal(number)
  process.wait(PATIENCE)


def strike(
  kind: str, run: Run, disk: Disk, reached: Callable[[], bool], draw: random.Random
) -> str:
  """Starts the run, ends it in one way and checks how it ended; gives a row of the table."""
  process, told, seen = run.start(), run.complaints(), ''
  try:
    if kind == 'kill while starting':
      seconds = draw.uniform(0, 8)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
      seen = f'after {seconds:.1f} s'
    else:
      wait(process, reached, 'the step')
    if kind == 'kill in a save':
      wait(process, run.half_written, 'a save')
    if kind.startswith('full disk'):
      with disk.full(process):
        wait(process, lambda: run.complaints() > told, 'a word of the full disk')
        disk.fill()  # what a save that failed has left
        if kind != 'full disk for a while, kill':
          end(process, signal.SIGTERM if kind == 'full disk, stop' else signal.SIGKILL)
      if process.poll() is None:
        place = run.place()
        wait(process, lambda: run.place() != place, 'the next line')
    if process.poll() is None:
      end(process, signal.SIGTERM if kind == 'stop' else signal.SIGKILL)
  finally:
    process.kill()
    process.wait()
  # A stop on a full disk may still find the room of a save that failed at the last moment.
  codes = {'stop': (0,), 'full disk, stop': (0, 1)}.get(kind, (-signal.SIGKILL,))
  if process.returncode not in codes:
    raise RuntimeError(f'{kind}: exit code {process.returncode}')
  if kind == 'kill in a save':
    seen = 'half written' if run.half_written() else 'just finished'
  elif kind == 'kill and damage':
    seen = damage(run, draw)
  where = '{} {}'.format(*run.place()) if run.place()[0] else 'before the first step'
  return f'| {kind} | {where} | {process.returncode} | {seen} |'


def damage(run: Run, draw: random.Random) -> str:
  """Changes a byte of the newest checkpoint of the stage under way, if there is one before it."""
  folder = run.workdir / run.place()[0] / 'checkpoints'
  steps = sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit())
  if len(steps) < 2:
    return 'none to damage'
  files = [path for path in (folder / str(steps[-1])).rglob('*') if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[draw.randrange(len(data))] ^= 0x55
  largest.write_bytes(bytes(data))
  return f'step {steps[-1]} damaged'


def differences(broken: Path, whole: Path, stages: list[str]) -> list[str]:
  """What is not the same in the two runs."""
  import jax
  import numpy as np

  from saq_jax.training.checkpoint import restore_subtrees

  parts = 'step', 'params', 'batch_stats', 'opt_state'
  found = []
  for stage in stages:
    trees = [jax.tree.leaves(restore_subtrees(w / stage, *parts)) for w in (broken, whole)]
    pairs = zip(*trees, strict=True)
    if any(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs):
      found.append(f'the state of {stage}')
  names = [f'{stage}/metrics.jsonl' for stage in stages] + ['results.json']
  return found + [n for n in names if (broken / n).read_bytes() != (whole / n).read_bytes()]


def chaos(kills: int, seed: int, short: bool, scratch: Path) -> tuple[list[str], bool]:
  """Prints the kills; gives what differs in the end, and whether the disk was one of its own."""
  flags = SHORT_FLAGS if short else FLAGS
  kinds = SHORT_KINDS if short else KINDS
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(scratch / 'cache'))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  whole = Run(scratch / 'whole', flags)
  beside = whole.start()
  draw = random.Random(seed)
  disk = Disk(scratch / 'disk')
  run = Run(disk.folder / 'run', flags)
  steps = steps_of(flags)
  offsets = {stage: sum(list(steps.values())[:i]) for i, stage in enumerate(steps)}
  # Room for what a kill waits for after its step.
  moments = sorted(draw.randrange(1, int(0.9 * sum(steps.values()))) for _ in range(kills))
  for i, moment in enumerate(moments):

    def reached(moment: int = moment) -> bool:
      stage, step = run.place()
      return bool(stage) and offsets[stage] + step >= moment

    try:
      row = strike(kinds[i % len(kinds)], run, disk, reached, draw)
    except RuntimeError as error:
      raise RuntimeError(f'{error}\n{"".join(run.printed[-20:])}') from error
    print(f'| {i + 1} {row}', flush=True)
  for process in (run.start(), beside):
    if process.wait(4 * PATIENCE):
      raise RuntimeError(f'exit code {process.returncode} at the end')
  return differences(run.workdir, whole.workdir, list(steps)), disk.own


def main() -> int:
  """Reads the flags, and enters a namespace of its own, in which a disk can be mounted."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument('--kills', type=int)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--short', action='store_true', help='a small network and four kinds')
  options = parser.parse_args()
  unshare = ['unshare', '--user', '--map-root-user', '--mount']
  if NAMESPACE not in os.environ and shutil.which('unshare'):
    os.environ[NAMESPACE] = '1'
    if subprocess.run([*unshare, 'true'], capture_output=True, check=False).returncode == 0:
      os.execvp('unshare', [*unshare, sys.executable, *sys.argv])
    del os.environ[NAMESPACE]
  print('| | how | last line before it | exit code | found |\n|--:|---|---|--:|---|', flush=True)
  kills = options.kills or (4 if options.short else 20)
  with tempfile.TemporaryDirectory() as scratch:
    try:
      differ, own = chaos(kills, options.seed, options.short, Path(scratch))
    except RuntimeError as error:
      print(f'\nFailed: {error}')
      return 1
    finally:
      if NAMESPACE in os.environ:
        subprocess.run(['umount', f'{scratch}/disk'], capture_output=True, check=False)
  verdict = f'differs: {", ".join(differ)}' if differ else 'bit for bit the unbroken run'
  print(f'\n{kills} kills, {"a tmpfs" if own else "a limit on files"} for the full disk: {verdict}')
  return 1 if differ else 0


if __name__ == '__main__':
  sys.exit(main())

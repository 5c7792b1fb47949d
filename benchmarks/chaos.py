"""Kills one run of the digits over and over, and holds what is left against an unbroken run.

    python benchmarks/chaos.py [--kills 20] [--seed 0] [--short]

The same command starts again after every kill. The kinds take turns, the moments are random:

- kill: SIGKILL at some step;
- kill while starting: SIGKILL some seconds after the start, whatever it does then;
- kill in a save: SIGKILL while a checkpoint is half written;
- kill and damage: SIGKILL, and a byte of the newest checkpoint is changed: it has to be told of;
- stop: SIGTERM;
- full disk, kill; full disk, stop; full disk for a while, kill: there is no room left on the disk
  of the run, until after the kill, the stop or the run's own complaint.

The disk is a tmpfs in a namespace of this process (Linux's `unshare`); where that is not allowed, a
limit on the size of the run's files stands for it. In the end the whole state has to be that of the
unbroken run bit for bit, and metrics and results its very bytes: else the exit code is 1.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos_parts import NAMESPACE, PATIENCE, Disk, Run, end, finish, no_process_left, wait

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
SHORT_KINDS = 'kill', 'kill in a save', 'full disk, stop', 'kill and damage', 'stop'
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


def steps_of(flags: list[str]) -> dict[str, int]:
  """The steps of each stage that the flags describe."""
  from saq_jax.training.build import total_steps
  from saq_jax.training.flags import read_flags

  config, _, _ = read_flags(flags)
  per_epoch = 1438 / config.data.batch_size
  settings = {'float': config.float_stage} | dict.fromkeys(config.methods, config.quant_stage)
  return {name: total_steps(stage, per_epoch) for name, stage in settings.items()}


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
    elif kind == 'kill and damage':
      wait(process, lambda: len(run.saved()) > 1, 'a second checkpoint')
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
    no_process_left(process)
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
  saved = run.saved()
  if len(saved) < 2:
    return 'none to damage'
  files = [path for path in saved[-1].rglob('*') if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[draw.randrange(len(data))] ^= 0x55
  largest.write_bytes(bytes(data))
  run.damaged.append((len(run.printed), str(saved[-1])))
  return f'step {saved[-1].name} damaged'


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
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(scratch / 'cache'))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  whole = Run(scratch / 'whole', flags)
  disk = Disk(scratch / 'disk')
  run = Run(disk.folder / 'run', flags)
  processes = [whole.start()]
  try:
    strikes(kills, random.Random(seed), SHORT_KINDS if short else KINDS, run, disk, flags)
    processes.append(run.start())
    for process in processes:
      if finish(process, 4 * PATIENCE):
        raise RuntimeError(f'exit code {process.returncode} at the end')
  finally:
    no_process_left(*processes)
  unnoticed = [f'no word of the damage of {path}' for path in run.unnoticed()]
  return unnoticed + differences(run.workdir, whole.workdir, list(steps_of(flags))), disk.own


def strikes(
  kills: int, draw: random.Random, kinds: Sequence[str], run: Run, disk: Disk, flags: list[str]
) -> None:
  """Ends the run so many times, at moments that are drawn, and prints a row for each."""
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


def main() -> int:
  """Reads the flags, and enters a namespace of its own, in which a disk can be mounted."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument('--kills', type=int)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--short', action='store_true', help='a small network and five kinds')
  options = parser.parse_args()
  kills = options.kills
  if kills is None:
    kills = len(SHORT_KINDS) if options.short else 20
  if kills < 0:
    parser.error(f'--kills={kills} must be a number from 0')
  unshare = ['unshare', '--user', '--map-root-user', '--mount']
  if NAMESPACE not in os.environ and shutil.which('unshare'):
    os.environ[NAMESPACE] = '1'
    if subprocess.run([*unshare, 'true'], capture_output=True, check=False).returncode == 0:
      os.execvp('unshare', [*unshare, sys.executable, *sys.argv])
    del os.environ[NAMESPACE]
  print('| | how | last line before it | exit code | found |\n|--:|---|---|--:|---|', flush=True)
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

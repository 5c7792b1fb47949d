"""The run that chaos.py ends over and over, the disk it is on, and the waits for both."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

STAGES = ('float', 'qat', 'saq')
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
    self.damaged: list[tuple[int, str]] = []
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

  def saved(self) -> list[Path]:
    """The checkpoints of the stage under way, oldest first."""
    found = (self.workdir / self.place()[0] / 'checkpoints').glob('*')
    return sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))

  def unnoticed(self) -> list[str]:
    """The damaged checkpoints of which no later start has told."""
    lines = self.printed[:]
    return [
      path
      for first, path in self.damaged
      if not any(f'{path} is damaged' in line for line in lines[first:])
    ]

  def complaints(self) -> int:
    """How often it said so far that the disk is full."""
    return sum('No space left' in line or 'File too large' in line for line in self.printed[:])


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
  finish(process, PATIENCE)


def finish(process: subprocess.Popen[bytes], seconds: float) -> int:
  """Waits for the end, which has to come; gives the exit code."""
  try:
    return process.wait(seconds)
  except subprocess.TimeoutExpired:
    raise RuntimeError(f'the run does not end in {seconds:.0f} s') from None


def no_process_left(*processes: subprocess.Popen[bytes]) -> None:
  """Kills those that are still there."""
  for process in processes:
    process.kill()
    process.wait()

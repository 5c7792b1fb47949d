"""Batches made ahead of the step that needs them, by threads or processes, and watched over."""

import contextlib
import functools
import gc
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grain
import jax
from absl import flags

from saq_jax.data.decode import RecordError
from saq_jax.data.records import Batch

T = TypeVar('T')

# Batches on their way to the device or there already, beside the one that is computed on.
_AHEAD = 2
# From here on, one process's interpreter lock is what limits threads.
_CORES_FOR_THREADS = 4
# Seconds that workers may take to begin, beside those for a batch.
_START = 60.0
# Seconds in which workers may end by themselves.
_GRACE = 1.0
_DEATHS = {
  '-9': 'killed, often for want of memory, of which fewer config.data.workers need less',
  '-7': '/dev/shm is full, which in Docker --shm-size mends',
  '-15': 'it was sent SIGTERM',
}


class LoaderError(RuntimeError):
  """No batch comes; the message says from whom and what to do."""


@dataclass(frozen=True)
class Reading:
  """Who makes the batches. The batches themselves are the same for any of it.

  Attributes:
    workers: processes that make them; 0 for threads of this process. None takes threads on up to 4
      cores, and else a process a core less two, of at most 32. Each holds up to four batches.
    timeout: seconds without a batch after which the run gives up.
  """

  workers: int | None = None
  timeout: float = 600.0

  def processes(self) -> int:
    """The number of worker processes, 0 for none.

    Returns:
      `workers`, or what suits the cores that this process may use.

    Example:
      >>> Reading(workers=3).processes()
      3
    """
    if self.workers is not None:
      return self.workers
    cores = _cores()
    return 0 if cores <= _CORES_FOR_THREADS else min(cores - 2, 32)


class Loader(Generic[T]):
  """Iterates over the batches of steps start .. stop - 1, two of them ahead.

  A thread takes the batches from grain, hands each to `transfer` and keeps the results, so that
  they travel to the device while it computes. Iterate inside `with`.

  Args:
    source: `source[t]` is step t's batch, from `train_source` or `eval_source`.
    start: the first step.
    stop: the step after the last.
    transfer: what is done with each batch, such as putting it on devices.
    reading: who makes the batches.
    decodes: whether processes are worth while: else a thread makes the batches.

  Raises:
    LoaderError: from the iteration, when a worker died or none delivers.
    RecordError: from the iteration, when a record cannot be used.

  Example:
    >>> source = grain.MapDataset.range(10).map(lambda t: {'step': t})
    >>> with Loader(source, 3, 6, lambda batch: batch['step'], Reading(workers=0)) as loader:
    ...   list(loader)
    [3, 4, 5]
  """

  def __init__(
    self,
    source: grain.MapDataset,
    start: int,
    stop: int,
    transfer: Callable[[Batch], T],
    reading: Reading = Reading(),
    *,
    decodes: bool = True,
  ) -> None:
    self._start, self._stop, self._transfer = start, stop, transfer
    self._timeout = reading.timeout
    self._workers = min(reading.processes() if decodes else 0, stop - start)
    self._threads = min(_cores(), 16) if decodes else 1
    self._source = source[start:stop]
    self._queue: queue.Queue[Any] = queue.Queue(_AHEAD)
    self._closing = threading.Event()
    self._taken = 0
    self._waited = 0.0

  @property
  def waited(self) -> float:
    """Seconds for which the iteration had to wait for batches so far."""
    return self._waited

  def __enter__(self) -> 'Loader[T]':
    self._cleanup = contextlib.ExitStack()
    self._notes = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory()))
    self._thread = threading.Thread(target=self._fill, name='batches', daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._closing.set()
    with contextlib.suppress(queue.Empty):
      while True:
        self._queue.get_nowait()
    if self._workers:
      # grain waits for its workers one after the other, and for the batches they are at.
      self._thread.join(timeout=_GRACE)
      self._kill_workers()
    # A thread that waits for a dead disk cannot be ended; being a daemon, it does not keep us.
    self._thread.join(timeout=5)
    self._cleanup.close()
    # Exceptions of grain's threads hold the last batches in cycles, and with them shared memory.
    gc.collect()

  def __iter__(self) -> Iterator[T]:
    for step in range(self._start, self._stop):
      began = time.monotonic()
      try:
        begins = self._workers and step == self._start
        item = self._queue.get(timeout=self._timeout + (_START if begins else 0.0))
      except queue.Empty:
        raise LoaderError(self._silence(step)) from None
      finally:
        self._waited += time.monotonic() - began
      if isinstance(item, BaseException):
        explained = self._explained(item)
        raise explained from (None if explained is item else item)
      yield item

  def _fill(self) -> None:
    """Runs in the thread: makes the batches in order, until the end, an error or the closing."""
    try:
      with contextlib.closing(iter(self._dataset())) as batches:
        for _ in range(self._start, self._stop):
          item = self._transfer(next(batches))
          self._taken += 1
          if not self._put(item):
            return
    except BaseException as error:  # raised where the batches are used
      self._put(error)

  def _put(self, item: Any) -> bool:
    """Waits for a place in the queue; false if nobody wants the item any more."""
    while not self._closing.is_set():
      with contextlib.suppress(queue.Full):
        self._queue.put(item, timeout=0.1)
        return True
    return False

  def _dataset(self) -> grain.IterDataset:
    """grain's dataset of the batches, made by threads or processes."""
    if not self._workers:
      ahead = self._threads if self._threads > 1 else _AHEAD
      return self._source.to_iter_dataset(
        grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead)
      )
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain reads flags of its own, which nobody sets here
    options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=1)
    one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return self._source.to_iter_dataset(one).mp_prefetch(
      options, functools.partial(_begin_worker, str(self._notes))
    )

  def _explained(self, error: BaseException) -> BaseException:
    """The error to raise in place of one from the thread."""
    if isinstance(error, RuntimeError) and 'exit code' in str(error):
      worker = self._taken % self._workers
      if _read_pid(self._notes / str(worker)) is None:
        return LoaderError(
          f'worker {worker} of {self._workers} could not begin: its error stands above. A script '
          "of your own that trains needs `if __name__ == '__main__':`, or config.data.workers=0."
        )
      code = str(error).split('exit code ')[1].split('.')[0]
      why = f' ({_DEATHS[code]})' if code in _DEATHS else ''
      return LoaderError(
        f'{self._worker_name(worker)} died with exit code {code}{why} while it made the batch of '
        f'step {self._start + self._taken}. The same command goes on from the last checkpoint.'
      )
    return type(error)(*error.args) if isinstance(error, RecordError) else error

  def _silence(self, step: int) -> str:
    """What to say when no batch came in time."""
    who = 'this process, which reads its own data,'
    if self._workers:
      who = self._worker_name(self._taken % self._workers)
    return (
      f'no batch for {self._timeout:g} s: {who} is silent at step {step}. Look at the disk or the '
      'network that the data are on (or give it more time: config.data.timeout). The same command '
      'goes on from the last checkpoint.'
    )

  def _worker_name(self, worker: int) -> str:
    """A worker as a reader can find it."""
    pid = _read_pid(self._notes / str(worker))
    return f'worker {worker} of {self._workers} ({"process " + str(pid) if pid else "not begun"})'

  def _kill_workers(self) -> None:
    """Ends the workers at once, for one that hangs would be waited for."""
    for note in self._notes.iterdir():
      pid = _read_pid(note)
      if pid:
        with contextlib.suppress(OSError):
          os.kill(pid, signal.SIGKILL)


def _read_pid(note: Path) -> int | None:
  """The process number that a worker left."""
  with contextlib.suppress(OSError, ValueError):
    return int(note.read_text(encoding='utf-8'))
  return None


def _begin_worker(notes: str, worker: int, workers: int) -> None:
  """Runs first in each worker: leaves its process number, and ends with its parent."""
  del workers
  (Path(notes) / str(worker)).write_text(str(os.getpid()), encoding='utf-8')
  jax.config.update('jax_platforms', 'cpu')  # the accelerator is the parent's
  # A terminal's Ctrl-C and a scheduler's SIGTERM may reach all processes of a run; the parent saves
  # first and then ends its workers. A second SIGTERM is Python's own, at the parent's end.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
  """Waits for the parent's end, which may be a kill that closes nothing, and ends too."""
  parent.join()
  os._exit(1)


def _cores() -> int:
  """The cores that this process may use, by its affinity and by its container's quota."""
  affinity = hasattr(os, 'sched_getaffinity')
  cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
  with contextlib.suppress(OSError, ValueError):
    quota, period = Path('/sys/fs/cgroup/cpu.max').read_text(encoding='utf-8').split()
    cores = min(cores, max(1, int(quota) // int(period)))
  return cores

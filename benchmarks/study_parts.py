"""The study's work directory: a file a part, whole or absent, and claims of processes on jobs."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax import serialization
from study_plan import TUNING_BITS, Plan, Setting

from saq_jax._paths import PyTree
from saq_jax.analysis.compare import choose_rho
from saq_jax.analysis.comparison import Scores


@dataclasses.dataclass(frozen=True)
class Cell:
  """A network on some data.

  Attributes:
    network: 'cnn' or 'vit'.
    data: 'digits' or 'hard'.
  """

  network: str
  data: str

  @property
  def name(self) -> str:
    """Such as 'cnn-digits'."""
    return f'{self.network}-{self.data}'


@dataclasses.dataclass(frozen=True)
class Parts:
  """The files of a study.

  Attributes:
    directory: where they are.
  """

  directory: Path

  def tuning(self, cell: Cell, method: str, setting: int) -> Path:
    """Where the validation scores of a setting go; a test score is nowhere near.

    Args:
      cell: the network and data.
      method: its name.
      setting: the place among the method's settings.

    Returns:
      The file.
    """
    return self.directory / cell.name / 'tuning' / f'{method}-{setting}.json'

  def final(self, cell: Cell, method: str, bits: int) -> Path:
    """Where the figures of a method's final runs go.

    Args:
      cell: the network and data.
      method: its name.
      bits: of the network; 32 for full precision.

    Returns:
      The file.
    """
    return self.directory / cell.name / f'{bits}bit' / f'{method}.json'

  def weights(self, cell: Cell, seeds: tuple[int, ...]) -> Path:
    """Where the float weights of a group of seeds are.

    Args:
      cell: the network and data.
      seeds: of the group.

    Returns:
      The file.
    """
    return self.directory / cell.name / 'weights' / f'{seeds[0]}-{seeds[-1]}.msgpack'

  def chosen(self, plan: Plan, cell: Cell, method: str) -> Setting:
    """The setting of the best validation accuracy; of several that of the lowest loss.

    Args:
      plan: the settings tried.
      cell: the network and data.
      method: its name.

    Returns:
      The setting; for all but QAT with QAT's learning rate.

    Raises:
      ValueError: if every setting diverged.
    """
    scores: dict[float, Scores] = {}
    for i in range(len(plan.tried(method))):
      found = read(self.tuning(cell, method, i))['validation']
      loss = [math.nan if x is None else x for x in found['loss']]
      scores[i] = Scores(tuple(found['accuracy']), tuple(loss))
    best = plan.tried(method)[int(choose_rho(scores))]
    if method == 'qat':
      return best
    return dataclasses.replace(best, lr_factor=self.chosen(plan, cell, 'qat').lr_factor)

  @contextlib.contextmanager
  def claim(self, name: str) -> Iterator[bool]:
    """Tries to be the only process that does a job; the system ends the claim of a dead one.

    Args:
      name: of the job.

    Yields:
      Whether it is ours.
    """
    path = self.directory / 'claims' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        yield False
      else:
        yield True


@dataclasses.dataclass(frozen=True)
class Job:
  """What one process does in one go, on all data, as it is compiled once: see `jobs`.

  Attributes:
    network: 'cnn' or 'vit'.
    bits: of the network.
    method: 'float', 'ptq' or one that is trained.
    tunes: whether its settings are to be chosen first.
  """

  network: str
  bits: int
  method: str
  tunes: bool = False

  @property
  def name(self) -> str:
    """A file name."""
    return f'{self.network}-{self.bits}-{self.method}'

  def files(self, plan: Plan, parts: Parts) -> list[Path]:
    """All that it writes.

    Args:
      plan: how much is trained.
      parts: the directory.

    Returns:
      The files, without weights.
    """
    cells = [Cell(self.network, data) for data in plan.data]
    tuned = len(plan.tried(self.method)) if self.tunes else 0
    tuning = [parts.tuning(cell, self.method, i) for cell in cells for i in range(tuned)]
    return tuning + [parts.final(cell, self.method, self.bits) for cell in cells]

  def waits_for(self, plan: Plan, parts: Parts) -> list[Path]:
    """What must be there before it can start.

    Args:
      plan: how much is trained.
      parts: the directory.

    Returns:
      The files.
    """
    if self.method == 'float':
      return []
    cells = [Cell(self.network, data) for data in plan.data]
    files = [parts.final(cell, 'float', 32) for cell in cells]
    if self.method == 'ptq' or (self.method == 'qat' and self.tunes):
      return files
    needed = {'qat'} if self.tunes else {'qat', self.method}
    return files + [
      parts.tuning(cell, method, i)
      for cell in cells
      for method in sorted(needed)
      for i in range(len(plan.tried(method)))
    ]


def jobs(plan: Plan) -> list[Job]:
  """All jobs, in an order in which each follows what it waits for.

  Args:
    plan: how much is trained.

  Returns:
    For each network: full precision; then at 3 bits each method's choice and its final runs; then
    the final runs at the other bit-widths.
  """
  out = []
  for network in plan.networks:
    out.append(Job(network, 32, 'float'))
    for bits in sorted(plan.bits, key=lambda b: b != TUNING_BITS):
      tunes = bits == TUNING_BITS
      out += [Job(network, bits, method, tunes=tunes) for method in plan.methods]
      out.append(Job(network, bits, 'ptq'))
  return out


def read(path: Path) -> Any:
  """Reads a part.

  Args:
    path: of the file.

  Returns:
    What JSON gives.
  """
  return json.loads(path.read_text(encoding='utf-8'))


def write(path: Path, content: bytes | dict[str, Any]) -> None:
  """Writes a file, whole or not at all.

  Args:
    path: of the file.
    content: bytes, or what JSON takes; numbers that are not finite become null.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  if not isinstance(content, bytes):
    content = json.dumps(plain(content), separators=(',', ':')).encode()
  beside = path.with_name(f'.{path.name}.{os.getpid()}')
  beside.write_bytes(content)
  beside.replace(path)


def plain(value: Any) -> Any:
  """A value for JSON.

  Args:
    value: dicts, lists and numbers.

  Returns:
    The same, with six digits of each float.
  """
  if isinstance(value, dict):
    return {key: plain(x) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [plain(x) for x in value]
  if isinstance(value, float):
    return float(f'{value:.6g}') if math.isfinite(value) else None
  return value


def save_weights(path: Path, weights: PyTree) -> None:
  """Saves a tree of arrays.

  Args:
    path: of the file.
    weights: nested dicts.
  """
  write(path, serialization.msgpack_serialize(weights))


def load_weights(path: Path) -> PyTree:
  """Reads what `save_weights` wrote.

  Args:
    path: of the file.

  Returns:
    The tree.
  """
  return serialization.msgpack_restore(path.read_bytes())

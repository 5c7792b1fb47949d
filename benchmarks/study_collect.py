"""Puts the parts of a finished study together in one value for JSON."""

import dataclasses
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from study_parts import Cell, Parts, jobs, read
from study_plan import Plan

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


def collect(plan: Plan, parts: Parts) -> dict[str, Any]:
  """Reads all parts.

  Args:
    plan: what was to be done.
    parts: where the results are.

  Returns:
    The plan, the machine and versions, what was tried and chosen, and every figure of every seed.

  Raises:
    FileNotFoundError: if a part is not there yet.
  """
  cells = [Cell(network, data) for network in plan.networks for data in plan.data]
  runs: dict[str, Any] = {cell.name: {} for cell in cells}
  for job in jobs(plan):
    for cell in cells:
      if cell.network == job.network:
        found = read(parts.final(cell, job.method, job.bits))
        runs[cell.name].setdefault(str(job.bits), {})[job.method] = found
  choices = {
    cell.name: {method: _choice(plan, parts, cell, method) for method in plan.methods}
    for cell in cells
  }
  return {
    'plan': dataclasses.asdict(plan),
    'machine': machine(),
    'choices': choices,
    'runs': runs,
  }


def machine() -> dict[str, Any]:
  """What it runs on.

  Returns:
    Processor, cores, and versions.
  """
  processor = platform.processor() or platform.machine()
  info = Path('/proc/cpuinfo')
  if info.exists():
    lines = info.read_text(encoding='utf-8').splitlines()
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    processor = names[0] if names else processor
  versions = {name: metadata.version(name) for name in _PACKAGES}
  return {
    'processor': processor,
    'cores': os.cpu_count(),
    'python': platform.python_version(),
    **versions,
  }


def _choice(plan: Plan, parts: Parts, cell: Cell, method: str) -> dict[str, Any]:
  """What was tried for a method, and what was chosen."""
  tried = [read(parts.tuning(cell, method, i)) for i in range(len(plan.tried(method)))]
  return {
    'chosen': dataclasses.asdict(parts.chosen(plan, cell, method)),
    'tried': [{'setting': part['setting'], **part['validation']} for part in tried],
  }

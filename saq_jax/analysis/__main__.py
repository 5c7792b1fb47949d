"""How flat the loss is around the networks of a finished run: one page, and its figures as JSON.

python -m saq_jax.analysis --workdir runs/digits_4bit-0123abcd
"""

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from saq_jax.analysis.flatness import Plan
from saq_jax.analysis.flatness_report import Request, report_flatness
from saq_jax.data.decode import RecordError
from saq_jax.training.bounds import ConfigError
from saq_jax.training.checkpoint_format import DamagedCheckpointError
from saq_jax.training.flags import UsageError, take_flag
from saq_jax.training.workdir import WorkdirError

HELP = """\
Measures how flat the loss is around the networks of a run (sharpness, Hessian, landscapes, what
rounding does), and writes one HTML page that needs nothing else, and its figures as JSON.

usage: python -m saq_jax.analysis --workdir DIR [--stages float,qat,saq] [--examples N] ...

  --workdir DIR      of the run: the --workdir that saq_jax.main was given, or runs/NAME-HASH.
  --stages NAMES     of float, qat, saq. Default: all that have a checkpoint.
  --examples N       the first N training examples, on which all is measured. Default: 512.
  --batch N          examples at a time; fewer where memory is short. Default: 128.
  --rhos NUMBERS     radii of the perturbations. Default: 0.01,0.02,0.05,0.1,0.2.
  --eigenvalues N    the largest of the Hessian. Default: 3.
  --grid N           points a side of the loss landscape, an odd number. Default: 11.
  --seed N           of the random directions. Default: 0.
  --data_dir DIR     where the data lie, if no longer where the run had them.
  --output DIR       where flatness.html and flatness.json go. Default: flatness in the workdir.
  --help             this text.

With the defaults a network takes as long as some 550 forward passes over the examples.
Exit codes: 0 done; 1 damaged data or checkpoint, a failing disk or too little memory; 2 wrong
input.
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: the arguments after the program's name; those of the process by default.

  Returns:
    The exit code: 0, 1 or 2, as `--help` says.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  if any(a in ('--help', '-h') for a in arguments):
    print(HELP, end='')
    return 0
  command = shlex.join(['python', '-m', 'saq_jax.analysis', *arguments])
  try:
    for path in report_flatness(_read(arguments), command).values():
      print(path)
  except (UsageError, ConfigError, WorkdirError) as error:
    return _fail(error, 2)
  except (RecordError, DamagedCheckpointError, OSError) as error:
    return _fail(error, 1)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return _fail('there is too little memory: name a smaller --batch.', 1)
  return 0


def _read(arguments: list[str]) -> Request:
  """The arguments, checked."""
  workdir = take_flag(arguments, '--workdir')
  output, stages = take_flag(arguments, '--output'), take_flag(arguments, '--stages') or ''
  rhos = take_flag(arguments, '--rhos')
  request = Request(
    workdir=Path(workdir or '.'),
    output=Path(output or Path(workdir or '.') / 'flatness'),
    stages=tuple(name.strip() for name in stages.split(',') if name.strip()),
    examples=_whole(arguments, '--examples', Request.examples, 1),
    batch=_whole(arguments, '--batch', Request.batch, 1),
    data_dir=take_flag(arguments, '--data_dir'),
    plan=Plan(
      rhos=Plan.rhos if rhos is None else _radii(rhos),
      eigenvalues=_whole(arguments, '--eigenvalues', Plan.eigenvalues, 1, 100),
      grid=_whole(arguments, '--grid', Plan.grid, 3, 501),
      seed=_whole(arguments, '--seed', Plan.seed, 0),
    ),
  )
  if arguments:
    raise UsageError(f'{arguments[0]!r} is not a flag of this program; see --help.')
  if not workdir:
    raise UsageError('--workdir is missing: name the directory of a run; see --help.')
  if request.plan.grid % 2 == 0:
    raise UsageError(
      f'--grid={request.plan.grid}: must be odd, so that the trained weights are in the middle.'
    )
  return request


def _whole(arguments: list[str], flag: str, default: int, least: int, most: int = 2**31 - 1) -> int:
  """A whole number of the command line, within bounds."""
  text = take_flag(arguments, flag)
  if text is None:
    return default
  if not text.isdecimal() or not least <= int(text) <= most:
    raise UsageError(f'{flag}={text}: must be a whole number from {least} to {most}.')
  return int(text)


def _radii(text: str) -> tuple[float, ...]:
  """Numbers above 0, put in order."""
  try:
    values = sorted({float(part) for part in text.split(',')})
  except ValueError:
    values = []
  if not values or values[0] <= 0 or not all(map(math.isfinite, values)):
    raise UsageError(f'--rhos={text}: must be numbers above 0, such as 0.05,0.1.')
  return tuple(values)


def _fail(error: BaseException | str, code: int) -> int:
  """Prints the message, and gives the exit code."""
  print(f'saq_jax: {error}', file=sys.stderr)
  return code


if __name__ == '__main__':
  sys.exit(main())

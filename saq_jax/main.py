"""The command line: flags, the work directory, and one line for whatever is wrong."""

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from saq_jax._version import __version__
from saq_jax.training.bounds import ConfigError
from saq_jax.training.cluster import (
  all_agree,
  differing,
  find_cluster,
  join,
  tells_of_a_peer,
)
from saq_jax.training.config import ExperimentConfig
from saq_jax.training.flags import UsageError, read_flags, take_profile
from saq_jax.training.parsing import to_json
from saq_jax.training.profile import Profile
from saq_jax.training.workdir import WorkdirError, claim, identity

HELP = """\
Trains a network at full precision, then quantized, without and with SAQ, and reports on it.

usage: python -m saq_jax.main [--config FILE] [--workdir DIR] [--config.KEY=VALUE ...]

  --config FILE       an experiment, such as configs/digits_2bit.py; without it, the digits at
                      4 bits. A config is Python code and is run: use files you trust.
  --workdir DIR       where checkpoints, metrics and the report go. Default: runs/NAME-HASH, of
                      the config. The same command goes on where a stopped run ended.
  --config.KEY=VALUE  changes one setting, for instance:
                        --config.saq.rho=0.2            the radius of the perturbation
                        --config.quant.bits=3 --config.quant.act_bits=3
                        --config.quant_stage.epochs=60  of each quantized stage
                        --config.model.depth=20         of a ResNet: docs/models.md
                        --config.init_from=PATH         start from weights: safetensors, .npz,
                                                        .pth, hf://org/name, RUN/float
                      All settings with their meaning: saq_jax/training/*config.py.
  --profile=M:N       a trace of what the devices do in steps M to N: WORKDIR/STAGE/profile.
  --coordinator HOST:PORT --processes N --process I    one of several (docs/scaling.md).
  --help              this text.

Exit codes: 0 done, or stopped by a signal and saved; 1 diverged, damaged data, a failing disk, too
little memory or a worker that died; 2 wrong input.
"""
_NO_MEMORY = 'RESOURCE_EXHAUSTED'  # how XLA's messages begin where a device has too little
# Seconds for the others to tell of what they fail of too: they end with process 0, where they meet.
_MOMENT = 2.0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: the arguments after the program's name; those of the process by default.

  Returns:
    The exit code: 0, 1 or 2, as `--help` says.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  if any(a in ('--help', '-h', '-help', '--helpfull') for a in arguments):
    print(HELP, end='')
    return 0
  # What a worker that was ended leaves in shared memory is removed, with words that help nobody.
  os.environ.setdefault('PYTHONWARNINGS', 'ignore::UserWarning:multiprocessing.resource_tracker')
  logging.basicConfig(format='%(name)s: %(message)s')
  try:
    cluster = find_cluster(arguments)
    profile = take_profile(arguments)
    config, name, workdir = read_flags(arguments)
  except (UsageError, ConfigError) as error:
    return _fail(error, 2)
  path = workdir or _default_workdir(name, to_json(config))
  if cluster is None:
    return _run(config, name, path, profile)
  try:
    join(cluster)
  except UsageError as error:
    _leave(_fail(error, 2))
  try:
    code = _run_together(config, name, path, profile)
  except BaseException:  # Ctrl-C too
    traceback.print_exc()
    code = 1
  return code if code == 0 else _leave(code, _MOMENT)


def _run_together(config: ExperimentConfig, name: str, path: str, profile: Profile | None) -> int:
  """Runs as one of several processes, once it is certain that they mean the same run."""
  command = json.dumps([to_json(config), path, str(profile)], sort_keys=True)
  unlike = differing({'command': command, 'saq_jax': __version__, 'jax': jax.__version__})
  if not unlike:
    return _run(config, name, path, profile)
  return _fail(
    f'the processes differ in {", ".join(unlike)}: give all of them the same arguments, config '
    f'file and packages. This is process {jax.process_index()}, with saq_jax {__version__} and '
    f'jax {jax.__version__}.',
    2,
  )


def _run(config: ExperimentConfig, name: str, path: str, profile: Profile | None) -> int:
  """Takes the work directory, trains and reports; the first process speaks for all."""
  try:
    with contextlib.ExitStack() as stack:
      claimed: WorkdirError | None = None
      if jax.process_index() == 0:
        try:
          stack.enter_context(claim(path, to_json(config), __version__))
        except WorkdirError as error:
          claimed = error
      else:
        quiet = stack.enter_context(open(os.devnull, 'w'))
        stack.enter_context(contextlib.redirect_stdout(quiet))
      if not all_agree(claimed is None):
        raise claimed or WorkdirError(f'{path}: process 0 cannot use it.')
      print(f'saq_jax {__version__}: {name}, in {path}', flush=True)
      return _train(config, name, Path(path), profile)
  except (ConfigError, WorkdirError) as error:
    return _fail(error, 2)


def _train(config: ExperimentConfig, name: str, directory: Path, profile: Profile | None) -> int:
  """Trains and reports, and turns what ends a run into a message and an exit code."""
  # Now that the input is sound: these take seconds to import.
  from saq_jax import experiment
  from saq_jax.data.decode import RecordError
  from saq_jax.data.loader import LoaderError
  from saq_jax.training.loop import DivergedError, PreemptedError
  from saq_jax.training.signals import preemption

  try:
    with preemption() as stop:
      experiment.run(config, name, directory, stop, profile)
  except PreemptedError as notice:
    print(notice)
  except (DivergedError, RecordError, OSError) as error:
    return _fail(error, 1)
  except LoaderError as error:
    return _leave(_fail(error, 1))  # threads that wait for a disk would keep it from its end
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1 and _NO_MEMORY not in str(error):
      raise
    return _fail(_one_line(error), 1)
  return 0


def _one_line(error: jax.errors.JaxRuntimeError) -> str:
  """What the runtime says, and whether it is of another process or of this one."""
  words = str(error).strip().splitlines()[0][:400]
  again = 'the same command, on all hosts, goes on from the last checkpoint.'
  if tells_of_a_peer(error):
    return f'another process of the run is gone ({words}): {again}'
  if _NO_MEMORY in str(error):
    words += ' (a smaller data.batch_size, a larger quant_stage.accumulate, or model.remat)'
  who = f'process {jax.process_index()}' if jax.process_count() > 1 else 'the run'
  return f'{who} cannot go on: {words}'


def _leave(code: int, moment: float = 0.0) -> NoReturn:
  """Ends the process at once; in the usual way, one that fails alone waits for the others' end."""
  sys.stdout.flush()
  sys.stderr.flush()
  try:
    if moment and jax.process_index() == 0:
      time.sleep(moment)
  finally:
    os._exit(code)


def _default_workdir(name: str, settings: dict[str, Any]) -> str:
  """runs/NAME-HASH: the same settings find their run again, others get a directory of their own."""
  digest = hashlib.sha256(json.dumps(identity(settings), sort_keys=True).encode()).hexdigest()
  return os.path.join('runs', f'{name}-{digest[:8]}')


def _fail(error: BaseException | str, code: int) -> int:
  """Prints the message, and gives the exit code."""
  print(f'saq_jax: {error}', file=sys.stderr)
  return code


if __name__ == '__main__':
  sys.exit(main())

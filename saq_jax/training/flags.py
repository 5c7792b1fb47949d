"""The arguments of a command that runs an experiment: its config file, and changes to it."""

import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from saq_jax.training.config import ExperimentConfig
from saq_jax.training.parsing import default_config, parse
from saq_jax.training.profile import Profile


class UsageError(ValueError):
  """A command line that cannot be run; the message says what to change."""


def read_flags(arguments: Sequence[str]) -> tuple[ExperimentConfig, str, str | None]:
  """Reads the arguments.

  Args:
    arguments: those after the program's name.

  Returns:
    The experiment, its name, and the work directory if one was given.

  Raises:
    UsageError: for an unknown flag or argument, or a config file that is not there or fails.
    ConfigError: for an unknown key, a wrong type or an impossible value.
  """
  given: dict[str, str] = {}
  rest = list(arguments)
  while rest:
    flag, equals, text = rest.pop(0).partition('=')
    name = flag.removeprefix('--')
    if name == flag or not (name in ('config', 'workdir') or name.startswith('config.')):
      raise UsageError(f'{flag!r} is not a flag of this program; see --help.')
    if not equals and (not rest or rest[0].startswith('--')):
      raise UsageError(f'{flag} needs a value: {flag}=VALUE.')
    given[name] = text if equals else rest.pop(0)
  path, workdir = given.pop('config', None), given.pop('workdir', None)
  config = default_config() if path is None else _read_config(Path(path))
  overrides = {name.removeprefix('config.'): text for name, text in given.items()}
  return parse(config, overrides), 'digits_4bit' if path is None else Path(path).stem, workdir


def take_flag(arguments: list[str], flag: str) -> str | None:
  """Takes a flag and its value out of the arguments, for a program that has flags of its own.

  Args:
    arguments: is changed.
    flag: such as '--json'.

  Returns:
    The value; None where the flag is not there.

  Raises:
    UsageError: if it has no value.

  Example:
    >>> arguments = ['--json=a', '--config', 'b']
    >>> take_flag(arguments, '--json'), arguments
    ('a', ['--config', 'b'])
  """
  for i, argument in enumerate(arguments):
    name, equals, text = argument.partition('=')
    if name == flag:
      if not equals and i + 1 == len(arguments):
        raise UsageError(f'{flag} needs a value: {flag}=VALUE.')
      value = text if equals else arguments.pop(i + 1)
      del arguments[i]
      return value
  return None


def take_profile(arguments: list[str]) -> Profile | None:
  """Takes `--profile=M:N` out of the arguments.

  Args:
    arguments: is changed.

  Returns:
    What is to be recorded, if anything.

  Raises:
    UsageError: if its value is no pair of steps.

  Example:
    >>> arguments = ['--profile=10:20', '--config.seed=1']
    >>> take_profile(arguments).wants(15), arguments
    (True, ['--config.seed=1'])
  """
  text = take_flag(arguments, '--profile')
  try:
    return None if text is None else Profile.parse(text)
  except ValueError as error:
    raise UsageError(f'--profile={text}: {error}.') from None


def _read_config(path: Path) -> config_dict.ConfigDict:
  """Runs a config file's get_config()."""
  if not path.is_file():
    raise UsageError(f'--config={path}: there is no such file.')
  try:
    get_config = runpy.run_path(str(path)).get('get_config')
    config = None if get_config is None else get_config()
  except Exception as error:  # a config file is code: anything may come out of it
    frames = traceback.extract_tb(error.__traceback__)
    where: Any = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
    where = where or getattr(error, 'lineno', None) or '?'
    what = _first_line(error).split(' Other fields present')[0].lstrip('"\'')
    raise UsageError(f'--config={path}, line {where}: {type(error).__name__}: {what}') from error
  if not isinstance(config, config_dict.ConfigDict):
    raise UsageError(f'--config={path}: it must define a get_config() that returns a ConfigDict.')
  return config


def _first_line(error: BaseException) -> str:
  """An exception as one line."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]

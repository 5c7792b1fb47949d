"""From a config file's ConfigDict to the dataclasses, with every key known and every value checked.

A file in configs/ starts from `default_config()` and sets what differs. That ConfigDict has
exactly the fields of `ExperimentConfig`, so that a misspelt key raises where it is written.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ml_collections import config_dict

from saq_jax.training.bounds import ABOVE_0, ConfigError
from saq_jax.training.config import ExperimentConfig, QuantConfig
from saq_jax.training.data_config import check_data
from saq_jax.training.families import check_model
from saq_jax.training.strategy_config import check_strategy

T = TypeVar('T')


def default_config() -> config_dict.ConfigDict:
  """The defaults as a ConfigDict that a config file changes: the digits at 4 bits.

  Returns:
    A locked ConfigDict: setting a key that does not exist, or one of another type, raises.

  Example:
    >>> config = default_config()
    >>> config.quant.bits = 2
    >>> config.saq.case
    3
  """
  return config_dict.ConfigDict(_as_dict(ExperimentConfig())).lock()


def parse(
  config: config_dict.ConfigDict, overrides: Mapping[str, str] | None = None
) -> ExperimentConfig:
  """Makes the dataclasses of a ConfigDict, and checks every value.

  Args:
    config: with the keys of `default_config()`; keys left out have their defaults.
    overrides: values as text by dotted key, as they come from a command line.

  Returns:
    The experiment.

  Raises:
    ConfigError: for an unknown key, a value of the wrong type, or an impossible one.

  Example:
    >>> parse(default_config(), {'quant.bits': '3', 'saq.rho': '0.2'}).quant.bits
    3
  """
  values = config.to_dict()
  for key, text in (overrides or {}).items():
    _override(ExperimentConfig, values, key.split('.'), text, f'config.{key}')
  experiment = _build(ExperimentConfig, values, '')
  _check(experiment)
  return experiment


def to_json(experiment: ExperimentConfig) -> dict[str, Any]:
  """The experiment as plain values: what a work directory is marked with.

  Args:
    experiment: the dataclasses.

  Returns:
    Nested dicts that JSON takes.
  """
  return dataclasses.asdict(experiment)


def _as_dict(value: Any) -> dict[str, Any]:
  """A dataclass as nested dicts, with a typed placeholder for each None."""
  hints = typing.get_type_hints(type(value))
  out: dict[str, Any] = {}
  for field in dataclasses.fields(value):
    item = getattr(value, field.name)
    if dataclasses.is_dataclass(item):
      out[field.name] = _as_dict(item)
    elif (inner := _optional(hints[field.name])) is not None:
      kind = str if typing.get_origin(inner) is Literal else inner
      out[field.name] = config_dict.FieldReference(item, field_type=kind)
    else:
      out[field.name] = item
  return out


def _optional(hint: Any) -> Any:
  """The type X of `X | None`; None for other hints."""
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    return next(arg for arg in typing.get_args(hint) if arg is not type(None))
  return None


def _override(cls: Any, values: dict[str, Any], keys: list[str], text: str, name: str) -> None:
  """Sets one value, given as text, in nested dicts."""
  hints = typing.get_type_hints(cls)
  key = keys[0]
  group = dataclasses.is_dataclass(hints.get(key))
  if key not in hints:
    # Without the keys below it, which are not looked at.
    raise ConfigError(_unknown(cls, '.'.join(name.split('.')[: 1 - len(keys) or None])))
  if len(keys) > 1 and not group:
    raise ConfigError(_unknown(cls, name))
  if group and len(keys) == 1:
    known = ', '.join(f'{name}.{k}' for k in typing.get_type_hints(hints[key]))
    raise ConfigError(f'{name} is a group of settings: set one of {known}.')
  if group:
    _override(hints[key], values.setdefault(key, {}), keys[1:], text, name)
  else:
    values[key] = _from_text(hints[key], text, name)


def _from_text(hint: Any, text: str, name: str) -> Any:
  """A value of the hinted type from what was typed for it."""
  inner = _optional(hint)
  if inner is not None:
    return None if text in ('None', 'none') else _from_text(inner, text, name)
  if typing.get_origin(hint) is tuple:
    text = text.strip()
    if (text[:1], text[-1:]) in (('(', ')'), ('[', ']')):  # but for those of a regular expression
      text = text[1:-1]
    items = [item.strip(' \'"') for item in text.split(',')]
    return tuple(_from_text(typing.get_args(hint)[0], item, name) for item in items if item)
  if hint is bool:
    if text.lower() not in ('true', 'false', '1', '0'):
      raise ConfigError(f'{name}={text}: must be true or false.')
    return text.lower() in ('true', '1')
  try:
    return hint(text) if hint in (int, float) else text
  except ValueError:
    kind = 'a whole number' if hint is int else 'a number'
    raise ConfigError(f'{name}={text}: must be {kind}.') from None


def _unknown(cls: Any, name: str) -> str:
  """The message for a key that does not exist, with what might have been meant."""
  near = difflib.get_close_matches(name.rsplit('.', 1)[-1], typing.get_type_hints(cls), n=1)
  where = name.rpartition('.')[0]
  meant = f' Did you mean {where}.{near[0]}?' if near else ''
  known = ', '.join(typing.get_type_hints(cls))
  return f'{name} is not a setting.{meant} {where} has: {known}.'


def _build(cls: type[T], values: dict[str, Any], where: str) -> T:
  """A dataclass from nested dicts, with every key known and every value of its type."""
  if not isinstance(values, dict):
    raise ConfigError(f'config.{where.rstrip(".")}={values!r}: it is a group of settings.')
  hints = typing.get_type_hints(cls)
  unknown = sorted(set(values) - set(hints))
  if unknown:
    raise ConfigError(_unknown(cls, f'config.{where}{unknown[0]}'))
  out = {}
  for field in dataclasses.fields(cls):  # type: ignore[arg-type]
    if field.name not in values:
      continue
    value, name = values[field.name], f'{where}{field.name}'
    if dataclasses.is_dataclass(hints[field.name]):
      out[field.name] = _build(hints[field.name], value, f'{name}.')
    else:
      out[field.name] = _typed(hints[field.name], value, f'config.{name}')
      if 'low' in field.metadata:
        _require_within(field, out[field.name], f'config.{name}')
  return cls(**out)


def _typed(hint: Any, value: Any, name: str) -> Any:
  """The value, if it is of the hinted type; whole numbers may stand for floats."""
  inner = _optional(hint)
  if inner is not None:
    return None if value is None else _typed(inner, value, name)
  if typing.get_origin(hint) is Literal:
    choices = typing.get_args(hint)
    if value not in choices:
      raise ConfigError(f'{name}={value!r}: take one of {", ".join(map(repr, choices))}.')
    return value
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, tuple | list):
      raise ConfigError(f'{name}={value!r}: must be a tuple, such as (0.1, 0.2).')
    return tuple(_typed(typing.get_args(hint)[0], item, name) for item in value)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ConfigError(f'{name}={value!r}: must be of type {hint.__name__}.')
  return value


def _require_within(field: dataclasses.Field[Any], value: Any, name: str) -> None:
  """Raises ConfigError if a number is out of its field's bounds."""
  low, high = field.metadata['low'], field.metadata['high']
  for number in value if isinstance(value, tuple) else (value,):
    if number is not None and not (low <= number <= high and math.isfinite(number)):
      least = 'above 0' if low == ABOVE_0 else f'at least {low}'
      bounds = f'{least} and ' + (f'at most {high}' if math.isfinite(high) else 'finite')
      if low != ABOVE_0 and math.isfinite(high):
        bounds = f'from {low} to {high}'
      raise ConfigError(f'{name}={value}: must be {bounds}.')


def _check(experiment: ExperimentConfig) -> None:
  """Raises ConfigError for values that do not go together."""
  check_model(experiment.model)
  quant = experiment.quant
  methods = experiment.methods
  if not methods or len(set(methods)) < len(methods):
    raise ConfigError(f"config.methods={methods}: name at least one of 'qat' and 'saq', each once.")
  for name in ('float_stage', 'quant_stage'):
    stage = getattr(experiment, name)
    if stage.warmup_epochs >= stage.epochs:
      raise ConfigError(
        f'config.{name}.warmup_epochs={stage.warmup_epochs}: must be below its epochs, '
        f'{stage.epochs}.'
      )
  check_data(experiment.data, experiment.augment)
  perturbed = experiment.saq
  if (perturbed.perturbation == 'group') != (perturbed.group_size is not None):
    raise ConfigError(
      f'config.saq.perturbation={perturbed.perturbation!r}, group_size={perturbed.group_size}: '
      "'group' needs a group_size, and nothing else takes one."
    )
  if perturbed.perturb_weight_scales and (perturbed.case != 2 or experiment.compare.seeds):
    raise ConfigError(
      'config.saq.perturb_weight_scales: goes with saq.case=2 alone; the other cases perturb '
      'weights that are quantized already, to which the scales are nothing any more.'
    )
  if 'saq' in methods and perturbed.warmup_epochs >= experiment.quant_stage.epochs:
    raise ConfigError(
      f'config.saq.warmup_epochs={perturbed.warmup_epochs}: must be below quant_stage.epochs, '
      f'{experiment.quant_stage.epochs}, as rho is 0 before.'
    )
  check_strategy(
    experiment.strategy,
    accumulate=experiment.quant_stage.accumulate,
    accumulate_clean_grad=perturbed.accumulate_clean_grad,
  )
  lsq = QuantConfig()
  if 'lsq' not in (quant.weights, quant.acts) and (quant.lsq_init, quant.lsq_grad_scale) != (
    lsq.lsq_init,
    lsq.lsq_grad_scale,
  ):
    raise ConfigError('config.quant.lsq_init and lsq_grad_scale: nothing is quantized with lsq.')

"""Which format a file is in, by the names of its tensors alone."""

import re
from collections.abc import Mapping

import numpy as np

from saq_jax.pretrained import names_cnn, names_transformer
from saq_jax.pretrained.errors import PretrainedError
from saq_jax.pretrained.files import WeightFile
from saq_jax.pretrained.rules import Format

FORMATS: tuple[Format, ...] = (*names_cnn.FORMATS, *names_transformer.FORMATS)

# What wrapping a module for several devices, or compiling it, puts before its names.
_WRAPPING = re.compile(r'^(module\.|_orig_mod\.)+')
_NAMES_SHOWN = 6

Named = dict[str, tuple[str, np.ndarray]]


def detect(file: WeightFile) -> Format:
  """Finds the library and the family whose names a file has.

  Args:
    file: what `open_weights` gave.

  Returns:
    The format; its `family` is the name of the class of model.

  Raises:
    PretrainedError: if the names are those of no format here.
  """
  return recognise(file)[0]


def recognise(file: WeightFile) -> tuple[Format, Named]:
  """Finds the format, and takes from the names what may stand before them.

  Args:
    file: what `open_weights` gave.

  Returns:
    The format; and by its names, the name in the file and the tensor.

  Raises:
    PretrainedError: if the names are those of no format here.
  """
  named = {_WRAPPING.sub('', name, count=1): (name, x) for name, x in file.tensors.items()}
  for candidate in (named, _without_common_beginning(named)):
    for form in FORMATS:
      stripped = {_without_prefix(name, form.prefixes): held for name, held in candidate.items()}
      if all(any(re.fullmatch(tell, name) for name in stripped) for tell in form.tells):
        return form, stripped
  names = list(file.tensors)
  shown = ', '.join(names[:_NAMES_SHOWN]) + (', ...' if len(names) > _NAMES_SHOWN else '')
  known = ', '.join(sorted({form.family for form in FORMATS}))
  raise PretrainedError(
    f'{file.description}: its {len(names)} tensors are named as in no known format of {known}. '
    f'The first are {shown}'
  )


def _without_prefix(name: str, prefixes: tuple[str, ...]) -> str:
  return next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)


def _without_common_beginning(named: Mapping[str, tuple[str, np.ndarray]]) -> Named:
  """The tensors without the first part of their names, where all share it."""
  beginnings = {re.split(r'(?<=[./])', name, maxsplit=1)[0] for name in named}
  if len(beginnings) != 1:
    return {}
  beginning = beginnings.pop()
  return {name.removeprefix(beginning): held for name, held in named.items()}

"""Given weights: what `config.init_from` names, held fast for the whole life of a run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import traverse_util
from jax import Array

from saq_jax._paths import PyTree, is_quant_scale
from saq_jax.training.checkpoint import find_checkpoint, restore_subtrees
from saq_jax.training.config import ConfigError, QuantConfig
from saq_jax.training.workdir import MARK, PIN, write_json

Weights = tuple[PyTree, PyTree, dict[str, Array]]

_LEVELS_UP = 4


def given_weights(init_from: str, quant: QuantConfig, workdir: Path) -> Weights:
  """Reads the weights that a run starts from, and says on the screen which they are.

  The checkpoint is chosen once, the newest at or below the path, and noted in the work directory:
  a run that is stopped and started again begins its later stages from the same one. Learnt scales
  are kept where the other run quantized just as this one does; else they are left out, and found
  anew from the weights and a batch.

  Args:
    init_from: a work directory, a stage's, or a checkpoint.
    quant: how this run quantizes.
    workdir: of this run.

  Returns:
    The model's parameters, its running statistics, and its scales of weights.

  Raises:
    ConfigError: if there is no checkpoint, or it cannot be read.
  """
  pin = workdir / PIN
  try:
    noted = json.loads(pin.read_text(encoding='utf-8')) if pin.exists() else None
    path = str(find_checkpoint(init_from)) if noted is None else noted['checkpoint']
    params, batch_stats = restore_subtrees(path, 'params', 'batch_stats')
  except ValueError as error:
    raise ConfigError(f'config.init_from: {error}.') from error
  model, scales = params['model'], params['scales']
  words = ''
  learnt = bool(scales) or any(map(is_quant_scale, traverse_util.flatten_dict(model, sep='/')))
  if learnt and not _quantized_alike(Path(path), quant):
    model, scales = _without_scales(model), {}
    words = '; its scales are found anew, for it is quantized otherwise'
  print(f'weights from {path}{words}', flush=True)
  if noted is None:
    write_json(pin, {'checkpoint': path})
  return model, batch_stats, scales


def _quantized_alike(checkpoint: Path, quant: QuantConfig) -> bool:
  """Whether the run that a checkpoint lies in has the same settings of quantization."""
  for folder in list(checkpoint.parents)[:_LEVELS_UP]:
    if (folder / MARK).is_file():
      settings = json.loads((folder / MARK).read_text(encoding='utf-8'))
      theirs: Any = settings.get('config', {}).get('quant')
      return theirs == dataclasses.asdict(quant)
  return False


def _without_scales(model: PyTree) -> PyTree:
  """The parameters without the scales of activations."""
  flat = traverse_util.flatten_dict(model, sep='/')
  return traverse_util.unflatten_dict(
    {path: x for path, x in flat.items() if not is_quant_scale(path)}, sep='/'
  )

"""Given weights: what `config.init_from` names, held fast for the whole life of a run."""

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import Array

from saq_jax._paths import PyTree, is_quant_scale
from saq_jax.pretrained.errors import PretrainedError
from saq_jax.pretrained.files import WeightFile, holds_weights, open_weights
from saq_jax.pretrained.fit import Origin, fit
from saq_jax.pretrained.load import Loaded, load_pretrained, model_leaves
from saq_jax.pretrained.settings import image_statistics, model_settings
from saq_jax.training.bounds import ConfigError
from saq_jax.training.checkpoint import find_checkpoint, restore_subtrees
from saq_jax.training.cluster import all_agree, from_first
from saq_jax.training.config import ExperimentConfig, ModelConfig, QuantConfig
from saq_jax.training.network import Network, build_network
from saq_jax.training.workdir import MARK, PIN, usable, write_json

Weights = tuple[PyTree, PyTree, dict[str, Array]]
Note = dict[str, Any]

_LEVELS_UP = 4


@dataclasses.dataclass(frozen=True)
class Given:
  """Weights to begin from.

  Attributes:
    weights: the model's parameters, its running statistics, and its scales of weights.
    fresh: paths of what has no given value: the head, where the number of classes differs.
    model: the settings of the model, with those that were left to the weights.
    quantized: whether they were trained with quantizers, so that alone they are no network.
  """

  weights: Weights
  fresh: frozenset[str]
  model: ModelConfig
  quantized: bool

  @property
  def floating(self) -> bool:
    """Whether they are a whole full-precision network: trained as one, and with its head."""
    return not (self.fresh or self.quantized)


# The weights, what to note of them, and what to say.
Found = tuple[Given, Note, str]


def given_weights(
  config: ExperimentConfig, num_classes: int, image_shape: tuple[int, ...], workdir: Path
) -> Given:
  """Reads the weights that a run starts from, and says on the screen which they are.

  They are chosen once, of several processes by the first, and noted in the work directory: of this
  package's own checkpoints the newest at or below the path, of a repository its commit, of a file a
  sum of its bits. So a run that is stopped and started again begins its later stages from the same
  ones, and so does each process. Learnt scales are kept where they were found for the quantization
  of this run; else they are left out, and found anew from the weights and a batch.

  Args:
    config: the experiment, with `init_from`.
    num_classes: of the data.
    image_shape: of the data, [H, W, C].
    workdir: of this run.

  Returns:
    The weights, each of the shape that the model has.

  Raises:
    ConfigError: if there are none, they cannot be read, or they do not fit the model.
    WorkdirError: if the disk does not take the note.
  """
  assert config.init_from is not None
  pin = workdir / PIN
  first = jax.process_index() == 0
  found: Found | None = None
  failure: ConfigError | None = None
  if first:
    noted = json.loads(pin.read_text(encoding='utf-8')) if pin.exists() else None
    try:
      found = _find(noted, config, num_classes, image_shape)
    except ConfigError as error:
      failure = error
  told = from_first(json.dumps(found[1] if found else None))
  if not first and told != 'null':
    try:
      found = _find(json.loads(told), config, num_classes, image_shape)
    except ConfigError as error:
      failure = error
  if not all_agree(found is not None) or found is None:
    raise failure or ConfigError('config.init_from: another process cannot use it, and tells why.')
  given, note, message = found
  print(message, flush=True)
  if first and noted is None:
    with usable(workdir):
      write_json(pin, note)
  return given


def _find(
  noted: Note | None, config: ExperimentConfig, num_classes: int, image_shape: tuple[int, ...]
) -> Found:
  """Reads the weights that a run began from, or those that it begins from."""
  assert config.init_from is not None
  source = config.init_from if noted is None else noted['source']
  try:
    read = _public if holds_weights(source) else _own
    found = read(source, config, num_classes, image_shape)
  except ValueError as error:
    raise ConfigError(f'config.init_from: {error}{_hint(source, noted is not None)}') from error
  if noted is not None and noted != found[1]:
    raise ConfigError(
      f'config.init_from: {source} has changed since this run began: name another --workdir.'
    )
  return found


def _hint(source: str, begun: bool) -> str:
  """What may help where weights are not there."""
  if Path(source).exists():
    return ''
  if begun:
    return '. This run began from it: put it back'
  if '://' not in source and re.fullmatch(r'[\w.-]+/[\w.-]+', source):
    return f'. For a repository of the Hugging Face Hub write hf://{source}'
  return ''


def _public(
  source: str, config: ExperimentConfig, num_classes: int, image_shape: tuple[int, ...]
) -> Found:
  """The weights of a public format, what to note of them, and what to say."""
  file = open_weights(source)
  asked = model_settings(file)
  model = _completed(config.model, asked, file.description)
  network = build_network(model, config.quant, num_classes)
  height, width, channels = image_shape
  loaded: Loaded = load_pretrained(
    file,
    network.model,
    (height, width, channels),
    keep_scales=config.quant.weights == config.quant.acts == 'liq',
    scale_paths=_scaled_paths(network, image_shape),
  )
  weights = loaded.params, loaded.batch_stats, loaded.scales
  note = {'source': file.source, 'model': asked, 'sum': _sum(file)}
  given = Given(weights, loaded.fresh, model, quantized=loaded.quantized)
  return given, note, loaded.message + _normalisation(file, config)


def _own(
  source: str, config: ExperimentConfig, num_classes: int, image_shape: tuple[int, ...]
) -> Found:
  """The weights of a checkpoint of this package, what to note of them, and what to say."""
  path = find_checkpoint(source)
  quantized = Path(path).parent.parent.name != 'float'
  params, batch_stats = restore_subtrees(path, 'params', 'batch_stats')
  asked = _settings_of_run(Path(path))
  model = _completed(config.model, asked, str(path))
  network = build_network(model, config.quant, num_classes)
  leaves = traverse_util.flatten_dict(
    {'params': params['model'], 'batch_stats': batch_stats}, sep='/'
  )
  scales = params['scales']
  words = ', trained with quantizers (name RUN/float for those before)' if quantized else ''
  learnt = bool(scales) or any(map(is_quant_scale, leaves))
  if learnt and not _quantized_alike(Path(path), config.quant):
    leaves = {p: x for p, x in leaves.items() if not is_quant_scale(p)}
    scales, words = {}, f'{words}; its scales are found anew, for it is quantized otherwise'
  height, width, _ = image_shape
  fitted = fit(
    leaves,
    model_leaves(network.model, image_shape),
    last_kernel=_last_kernel(network),
    image_size=(height, width),
    scales=scales,
    scale_paths=_scaled_paths(network, image_shape),
    origin=Origin(f'checkpoint {path}'),
  )
  tree = traverse_util.unflatten_dict(fitted.leaves, sep='/')
  weights = tree['params'], tree.get('batch_stats', {}), fitted.scales
  message = '\n  '.join([f'weights from {path}{words}', *fitted.notes])
  given = Given(weights, fitted.fresh, model, quantized or learnt)
  return given, {'source': str(path), 'model': asked}, message


def _last_kernel(network: Network) -> str:
  model: Any = network.model
  return model.last_kernel


def _scaled_paths(network: Network, image_shape: tuple[int, ...]) -> set[str]:
  """The paths of the kernels that have a learnable scale."""
  leaves = model_leaves(network.model, image_shape)
  params = {p.removeprefix('params/'): x for p, x in leaves.items() if p.startswith('params/')}
  chosen = network.quantize.assign(traverse_util.unflatten_dict(params, sep='/'))
  return {path for path, quantizer in chosen.items() if quantizer.has_scale}


def _completed(model: ModelConfig, asked: Mapping[str, Any], where: str) -> ModelConfig:
  """The settings of the model, those that were None being what the weights ask for."""
  for name, value in asked.items():
    own = getattr(model, name)
    if own is not None and own != value:
      raise PretrainedError(
        f'{where} was trained with {name}={value!r}, and config.model.{name}={own!r}: leave it out'
      )
  return dataclasses.replace(model, **asked)


def _sum(file: WeightFile) -> int:
  """A sum of all bits of a file's tensors."""
  total = 0
  for name in sorted(file.tensors):
    total = zlib.crc32(file.tensors[name].tobytes(), zlib.crc32(name.encode(), total))
  return total


def _normalisation(file: WeightFile, config: ExperimentConfig) -> str:
  """A line for the case that the weights have seen images normalised otherwise; else nothing."""
  statistics = image_statistics(file)
  ours = config.data.mean, config.data.std
  if statistics is None or all(np.allclose(a, b, atol=2e-3) for a, b in zip(statistics, ours)):
    return ''
  mean, std = (','.join(f'{value:g}' for value in values) for values in statistics)
  return (
    f'\n  they were trained on images normalised by other values than this run: '
    f'--config.data.mean={mean} --config.data.std={std} are theirs'
  )


def _run_of(checkpoint: Path) -> Path | None:
  """The work directory that a checkpoint lies in."""
  above = list(checkpoint.parents)[:_LEVELS_UP]
  return next((folder for folder in above if (folder / MARK).is_file()), None)


def _settings_of_run(checkpoint: Path) -> dict[str, Any]:
  """What the run of a checkpoint took from weights that it was given itself, or was told."""
  run = _run_of(checkpoint)
  if run is None:
    return {}
  mark = json.loads((run / MARK).read_text(encoding='utf-8'))
  theirs = mark.get('config', {}).get('model', {})
  told = {name: theirs[name] for name in ('norm_eps', 'padding') if theirs.get(name) is not None}
  pin = run / PIN
  noted = json.loads(pin.read_text(encoding='utf-8')) if pin.is_file() else {}
  return told | noted.get('model', {})


def _quantized_alike(checkpoint: Path, quant: QuantConfig) -> bool:
  """Whether the run that a checkpoint lies in has the same settings of quantization."""
  run = _run_of(checkpoint)
  if run is None:
    return False
  mark = json.loads((run / MARK).read_text(encoding='utf-8'))
  theirs: Any = mark.get('config', {}).get('quant')
  return theirs == dataclasses.asdict(quant)

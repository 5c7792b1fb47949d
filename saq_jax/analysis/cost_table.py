"""What each layer of an experiment's network costs, as a table and as JSON.

    python -m saq_jax.analysis.cost_table --config configs/resnet18_4bit.py [--json FILE]

Nothing is trained, computed or read: the dataset need not be prepared, nor the weights be there.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from rich.console import Console
from rich.table import Table

from saq_jax.analysis.cost import ModelSize, ProductCost, model_size, product_costs
from saq_jax.data.digits import Digits
from saq_jax.data.folder import FOLDER, folder_builder
from saq_jax.pretrained.load import model_leaves
from saq_jax.training.bounds import ConfigError
from saq_jax.training.config import ExperimentConfig
from saq_jax.training.data_config import DataConfig
from saq_jax.training.flags import UsageError, read_flags, take_flag
from saq_jax.training.network import build_network

HELP = """\
Prints what each layer of a network costs: multiply-accumulates, bits, bit operations (BOPs), and
the bytes of its weights.

usage: python -m saq_jax.analysis.cost_table [--config FILE] [--json FILE] [--config.KEY=VALUE ...]

  --config FILE       an experiment, as for saq_jax.main.
  --config.KEY=VALUE  changes one setting: --config.quant.bits=3, --config.data.image_size=384.
  --json FILE         writes the figures there too.
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: the arguments after the program's name; those of the process by default.

  Returns:
    The exit code: 0, or 2 for wrong input.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  if any(a in ('--help', '-h') for a in arguments):
    print(HELP, end='')
    return 0
  try:
    target = take_flag(arguments, '--json')
    config, name, workdir = read_flags(arguments)
    if workdir is not None:
      raise UsageError('--workdir is not a flag of this program; see --help.')
    figures = experiment_costs(config)
    if target is not None:
      Path(target).write_text(json.dumps(figures, indent=2) + '\n', encoding='utf-8')
  except (UsageError, ConfigError, OSError) as error:
    print(f'saq_jax: {error}', file=sys.stderr)
    return 2
  Console(width=None if Console().is_terminal else 110).print(cost_table(figures, name))
  return 0


def experiment_costs(config: ExperimentConfig) -> dict[str, Any]:
  """Finds what the quantized network of an experiment costs, by tracing it.

  Args:
    config: the experiment.

  Returns:
    JSON values: 'layers', a list with path, macs, weight_bits, act_bits, bops and weight_bytes
    (None for the product of two activations); and the totals 'macs', 'bops', 'parameters',
    'weight_bytes' and 'model_bytes' (with biases, norms, scales and running statistics).

  Raises:
    ConfigError: if the dataset is unknown, or the network cannot be built.
  """
  shape, classes = image_shape(config.data)
  network = build_network(config.model, config.quant, classes)
  try:
    leaves = model_leaves(network.model, shape)
    costs = product_costs(network.model, shape, network.quantize)
  except ValueError as error:
    raise ConfigError(f'config.model: {error}') from error
  params, stats = (
    {p.removeprefix(kind): x for p, x in leaves.items() if p.startswith(kind)}
    for kind in ('params/', 'batch_stats/')
  )
  size = model_size(params, stats, network.quantize)
  return _figures(costs, size, {path: x.size for path, x in params.items()})


def image_shape(data: DataConfig) -> tuple[tuple[int, ...], int]:
  """Tells the shape of the images and the number of classes of a dataset that may not be there.

  A folder of the user's must be prepared.

  Args:
    data: the settings of the data.

  Returns:
    [H, W, C] as the model sees an image, and the number of classes.

  Raises:
    ConfigError: for an unknown dataset, or images of no fixed shape and no `image_size`.
  """
  try:
    if data.name.startswith(FOLDER):
      features = folder_builder(data.name, data.data_dir).info.features
    else:
      make = Digits if data.name == Digits.name else tfds.builder_cls(data.name)
      features = make(data_dir=data.data_dir).info.features
    shape, classes = features['image'].shape, features['label'].num_classes
  except (ValueError, KeyError, AttributeError, ImportError) as error:
    reason = str(error).strip().splitlines()[0]
    raise ConfigError(
      f'config.data.name={data.name!r}: not an image dataset ({reason}).'
    ) from error
  classes = len(data.classes) or classes
  if data.image_size is not None:
    return (data.image_size, data.image_size, shape[-1]), classes
  if None in shape:
    raise ConfigError(f'config.data.image_size: set it, for {data.name!r} has images of any size.')
  return shape, classes


def cost_table(figures: dict[str, Any], title: str) -> Table:
  """Lays the figures out.

  Args:
    figures: of `experiment_costs`.
    title: above the table.

  Returns:
    A table for a `rich.console.Console`, with the totals below.
  """
  table = Table(title=title, show_footer=True)
  columns = (
    ('layer', 'all'),
    ('MACs', f'{figures["macs"]:,}'),
    ('W/A bits', ''),
    ('BOPs', short(figures['bops'])),
    ('share', '100.0 %'),
    ('weights', f'{figures["weight_bytes"]:,} B'),
  )
  for name, total in columns:
    table.add_column(name, footer=total, justify='left' if name == 'layer' else 'right')
  for layer in figures['layers']:
    held = layer['weight_bytes']
    table.add_row(
      layer['path'],
      f'{layer["macs"]:,}',
      f'{layer["weight_bits"]}/{layer["act_bits"]}',
      short(layer['bops']),
      f'{layer["bops"] / figures["bops"]:.1%}'.replace('%', ' %'),
      '' if held is None else f'{held:,} B',
    )
  table.caption = (
    f'{figures["parameters"]:,} parameters; the whole model is {figures["model_bytes"]:,} bytes'
  )
  return table


def short(bops: int) -> str:
  """Writes bit operations as the paper does: in millions for small images, else in billions.

  Args:
    bops: how many.

  Returns:
    With one digit after the point.

  Example:
    >>> short(674643968), short(34_700_000_000)
    ('674.6M', '34.7G')
  """
  return f'{bops / 1e6:.1f}M' if bops < 5e9 else f'{bops / 1e9:.1f}G'


def _figures(
  costs: Sequence[ProductCost], size: ModelSize, elements: dict[str, int]
) -> dict[str, Any]:
  """The figures as JSON values."""
  layers = []
  for cost in costs:
    count = elements.get(f'{cost.path}/kernel')
    layers.append(
      {
        'path': cost.path,
        'macs': cost.macs,
        'weight_bits': cost.weight_bits,
        'act_bits': cost.act_bits,
        'bops': cost.bops,
        'weight_bytes': None if count is None else -(-count * cost.weight_bits // 8),
      }
    )
  return {
    'layers': layers,
    'macs': sum(cost.macs for cost in costs),
    'bops': sum(cost.bops for cost in costs),
    'parameters': size.parameters,
    'weight_bytes': sum(layer['weight_bytes'] or 0 for layer in layers),
    'model_bytes': size.bytes,
  }


if __name__ == '__main__':
  sys.exit(main())

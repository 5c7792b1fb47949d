"""All networks of this package with their size, their cost at 4 bits, and where weights are.

    python -m saq_jax.analysis.model_list

prints the table of docs/models.md. It takes about a minute: each network is traced.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from saq_jax.analysis.cost_table import experiment_costs, short
from saq_jax.training.config import ExperimentConfig, ModelConfig, QuantConfig
from saq_jax.training.data_config import DataConfig

_CIFAR = DataConfig(name='cifar100')
_IMAGENET = DataConfig(name='imagenet2012', image_size=224)
_CNN = QuantConfig()
_TRANSFORMER = QuantConfig(weights='lsq', acts='lsq', first_act_bits=8)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A network.

  Attributes:
    label: what it is called.
    model: its settings.
    data: the images and classes of the figures.
    quant: how it is quantized at 4 bits.
    weights: where full-precision weights are: of the Hub, or what else.
  """

  label: str
  model: ModelConfig
  data: DataConfig
  quant: QuantConfig
  weights: str

  @property
  def flags(self) -> str:
    """The settings of the model as on a command line."""
    default = ModelConfig()
    given = {
      field.name: getattr(self.model, field.name)
      for field in dataclasses.fields(default)
      if getattr(self.model, field.name) != getattr(default, field.name)
    }
    return ' '.join(f'--config.model.{name}={value}' for name, value in given.items())

  def costs(self) -> dict[str, Any]:
    """Finds what it costs.

    Returns:
      The figures of `experiment_costs`.
    """
    return experiment_costs(ExperimentConfig(data=self.data, model=self.model, quant=self.quant))


def entries() -> Iterator[Entry]:
  """Lists the networks.

  Returns:
    Every family in every published size.

  Example:
    >>> next(entries()).flags
    '--config.model.depth=20'
  """
  small = functools.partial(Entry, data=_CIFAR, quant=_CNN)
  image = functools.partial(Entry, data=_IMAGENET, quant=_CNN)
  tokens = functools.partial(Entry, data=_IMAGENET, quant=_TRANSFORMER)
  for depth in (20, 32, 44, 56, 110):
    own = "the authors' checkpoints, or a float stage"
    yield small(f'PreResNet-{depth}', ModelConfig(depth=depth), weights=own)
  for depth in (18, 34, 50, 101, 152):
    hub = f'`timm/resnet{depth}.tv_in1k`, `microsoft/resnet-{depth}`'
    yield image(f'ResNet-{depth}', ModelConfig(name='resnet', depth=depth), weights=hub)
  hub = '`timm/mobilenetv2_100.ra_in1k`, `google/mobilenet_v2_1.0_224`'
  yield image('MobileNetV2', ModelConfig(name='mobilenetv2'), weights=hub)
  own = "the authors' checkpoints, or a float stage"
  yield small('MobileNetV2, CIFAR', ModelConfig(name='mobilenetv2_cifar'), weights=own)
  sizes: tuple[tuple[Any, str], ...] = (
    ('Ti', 'tiny'),
    ('S', 'small'),
    ('B', 'base'),
    ('L', 'large'),
  )
  for size, word in sizes:
    for patch in (16, 32):
      hub = f'`timm/vit_{word}_patch{patch}_224.augreg_in21k_ft_in1k`'
      if (size, patch) in (('Ti', 32), ('L', 32)):
        hub = 'none that we know of at 224 pixels'
      model = ModelConfig(name='vit', size=size, patch=None if patch == 16 else patch)
      yield tokens(f'ViT-{size}/{patch}', model, weights=hub)
  for distilled in (False, True):
    for size, word in sizes[:3]:
      middle = 'distilled_' if distilled else ''
      hub = f'`timm/deit_{word}_{middle}patch16_224.fb_in1k`'
      model = ModelConfig(name='deit', size=size, distilled=distilled)
      yield tokens(f'DeiT-{size}{", distilled" if distilled else ""}', model, weights=hub)
  for size, word in (('T', 'tiny'), *sizes[1:3]):
    hub = f'`timm/swin_{word}_patch4_window7_224.ms_in1k`'
    hub += f', `microsoft/swin-{word}-patch4-window7-224`'
    yield tokens(f'Swin-{size}', ModelConfig(name='swin', size=size), weights=hub)


def row(entry: Entry) -> str:
  """Writes a network as a row of Markdown.

  Args:
    entry: the network.

  Returns:
    Name, parameters, bit operations and megabytes at 4 bits, flags, and weights.
  """
  figures = entry.costs()
  cells = (
    entry.label,
    f'{figures["parameters"]:,}',
    short(figures['bops']),
    f'{figures["model_bytes"] / 1e6:.2f}',
    f'`{entry.flags}`',
    entry.weights,
  )
  return f'| {" | ".join(cells)} |'


def main() -> None:
  """Prints the table."""
  argparse.ArgumentParser(
    prog='python -m saq_jax.analysis.model_list', description=__doc__.splitlines()[0]
  ).parse_args()
  print('| network | parameters | BOPs, 4 bits | MB, 4 bits | settings | weights |')
  print('|:--|--:|--:|--:|:--|:--|')
  for entry in entries():
    print(row(entry), flush=True)


if __name__ == '__main__':
  main()

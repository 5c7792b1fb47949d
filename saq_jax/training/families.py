"""What each family of networks reads of `ModelConfig`, known without importing a network."""

import dataclasses

from saq_jax.training.bounds import ConfigError
from saq_jax.training.config import ModelConfig

_SHARED = frozenset({'name', 'norm_eps', 'remat', 'dtype'})
_DROPS = frozenset({'dropout', 'attn_dropout', 'drop_path'})
_VIT = _DROPS | {'size', 'depth', 'width', 'heads', 'patch'}

# The settings of its own that a family reads.
READS: dict[str, frozenset[str]] = {
  'preresnet': frozenset({'depth', 'width'}),
  'resnet': frozenset({'depth'}),
  'mobilenetv2': frozenset({'padding'}),
  'mobilenetv2_cifar': frozenset(),
  'vit': _VIT,
  'deit': _VIT | {'distilled'},
  'swin': _DROPS | {'size'},
}
SIZES = {'vit': ('Ti', 'S', 'B', 'L'), 'deit': ('Ti', 'S', 'B'), 'swin': ('T', 'S', 'B')}
RESNET_DEPTHS = (18, 34, 50, 101, 152)


def check_model(model: ModelConfig) -> None:
  """Raises ConfigError for settings that a family does not read or cannot be built with.

  Args:
    model: the settings.

  Raises:
    ConfigError: if so; the message names the setting.

  Example:
    >>> check_model(ModelConfig(name='resnet', depth=50))
    >>> check_model(ModelConfig(name='resnet', depth=19))
    Traceback (most recent call last):
      ...
    saq_jax.training.bounds.ConfigError: config.model.depth=19: a ResNet has 18, 34, 50, 101, 152.
  """
  reads = _SHARED | READS[model.name]
  for field in dataclasses.fields(model):
    value = getattr(model, field.name)
    if field.name not in reads and value != field.default:
      known = ', '.join(sorted(reads - {'name'}))
      raise ConfigError(
        f'config.model.{field.name}={value!r}: {model.name} does not read it; it reads {known}.'
      )
  sizes = SIZES.get(model.name)
  if sizes and model.size not in sizes:
    known = ', '.join(map(repr, sizes))
    raise ConfigError(f'config.model.size={model.size!r}: {model.name} has the sizes {known}.')
  depth = model.depth
  if depth is not None and model.name == 'preresnet' and (depth < 8 or (depth - 2) % 6):
    raise ConfigError(f'config.model.depth={depth}: must be 6 n + 2: 8, 14, 20, 32, ...')
  if depth is not None and model.name == 'resnet' and depth not in RESNET_DEPTHS:
    known = ', '.join(map(str, RESNET_DEPTHS))
    raise ConfigError(f'config.model.depth={depth}: a ResNet has {known}.')

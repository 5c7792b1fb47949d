"""What network a set of leaves is of, told by their paths and shapes: to say what does not fit."""

import collections
import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

# A path that only this family has, or none of those above it.
_SIGNS = {
  'params/pos_embed': 'ViT',
  'params/patch_norm/scale': 'Swin',
  'params/conv/kernel': 'PreResNet',
  'params/layers_0/conv1/kernel': 'MobileNetV2Cifar',
  'params/conv2/kernel': 'MobileNetV2',
  'params/conv1/kernel': 'ResNet',
}
_FIRST = ('patch_embed', 'conv', 'conv1')
_BLOCK = re.compile(r'params/((?:block|layers|layer|stage)\d*_\d+)/')


def describe(shapes: Shapes) -> dict[str, str]:
  """Tells family and size of a network of this package.

  Args:
    shapes: of its leaves, by 'params/...'.

  Returns:
    Words by what they are of: 'family', 'depth', 'width', ...; empty for other networks.

  Example:
    >>> shapes = {'params/conv1/kernel': (7, 7, 3, 64), 'params/layer1_0/bn1/scale': (64,)}
    >>> describe(shapes)
    {'family': 'ResNet', 'image channels': '3', 'width': '64', 'depth': '4'}
  """
  family = next((name for path, name in _SIGNS.items() if path in shapes), None)
  first = next((shapes[p] for n in _FIRST if (p := f'params/{n}/kernel') in shapes), ())
  if family is None or len(first) != 4:
    return {}
  facts = {'family': family, 'image channels': str(first[-2]), 'width': str(first[-1])}
  blocks = sorted({match[1] for path in shapes if (match := _BLOCK.match(path))})
  stages = collections.Counter(block.rpartition('_')[0] for block in blocks)
  if family in ('ViT', 'Swin'):
    facts['patch'] = str(first[0])
  if family == 'Swin':
    facts['depths'] = ', '.join(map(str, stages.values()))
  elif family in ('ResNet', 'PreResNet'):
    # The first and the last layer beside the blocks' own; those of shortcuts do not count.
    bottleneck = family == 'ResNet' and 'params/layer1_0/conv3/kernel' in shapes
    facts['depth'] = str((3 if bottleneck else 2) * len(blocks) + 2)
  else:
    facts['depth' if family == 'ViT' else 'blocks'] = str(len(blocks))
  if family == 'ViT':
    facts['distilled'] = 'yes' if 'params/dist_token' in shapes else 'no'
  return facts


def differences(file: Shapes, model: Shapes) -> str:
  """Says how the network of a file and the model differ in kind or size.

  Args:
    file: shapes of the given leaves, by path.
    model: those of the wanted ones.

  Returns:
    'depth 34, and the model has depth 18'; empty where nothing of the kind differs.

  Example:
    >>> small, large = ({'params/conv/kernel': (3, 3, 3, width)} for width in (16, 64))
    >>> differences(small, large)
    'width 16, and the model has width 64'
  """
  theirs, ours = describe(file), describe(model)
  names = [name for name in theirs if name in ours and theirs[name] != ours[name]]
  if not names:
    return ''
  names = names[:1] if names[0] == 'family' else names
  listed = [', '.join(f'{name} {facts[name]}' for name in names) for facts in (theirs, ours)]
  return f'{listed[0]}, and the model has {listed[1]}'

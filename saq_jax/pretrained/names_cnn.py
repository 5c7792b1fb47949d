"""Names of convolutional networks: torchvision's, timm's, the SAQ authors', Hugging Face's."""

from saq_jax.pretrained.rules import Format, Rule

# Blocks of MobileNetV2's stages; where they are numbered through, this tells the stage.
_MOBILE_STAGES = (1, 2, 3, 4, 3, 3, 1)
_MOBILE_BLOCKS = tuple(
  f'layer{stage}_{i}' for stage, count in enumerate(_MOBILE_STAGES, 1) for i in range(count)
)

_RESNET = Format(
  library='torchvision, timm or SAQ',
  family='ResNet',
  tells=(r'conv1\.weight', r'bn1\.weight', r'layer1\.0\.conv1\.weight', r'layer4\..*'),
  rules=(
    Rule(r'conv1', 'conv1', 'first conv'),
    Rule(r'bn1', 'bn1', 'norm'),
    Rule(r'layer(\d)\.(\d+)\.conv(\d)', 'layer{0}_{1}/conv{2}', 'conv'),
    Rule(r'layer(\d)\.(\d+)\.bn(\d)', 'layer{0}_{1}/bn{2}', 'norm'),
    Rule(r'layer(\d)\.(\d+)\.downsample\.0', 'layer{0}_{1}/downsample_conv', 'conv'),
    Rule(r'layer(\d)\.(\d+)\.downsample\.1', 'layer{0}_{1}/downsample_bn', 'norm'),
    Rule(r'fc', 'fc', 'dense'),
  ),
)

_PRERESNET = Format(
  library='SAQ',
  family='PreResNet',
  tells=(r'conv\.weight', r'bn\.weight', r'layer1\.0\.bn1\.weight'),
  rules=(
    Rule(r'conv', 'conv', 'first conv'),
    Rule(r'bn', 'bn', 'norm'),
    Rule(r'layer(\d)\.(\d+)\.conv(\d)', 'layer{0}_{1}/conv{2}', 'conv'),
    Rule(r'layer(\d)\.(\d+)\.bn(\d)', 'layer{0}_{1}/bn{2}', 'norm'),
    Rule(r'layer(\d)\.(\d+)\.downsample', 'layer{0}_{1}/downsample', 'conv'),
    Rule(r'fc', 'fc', 'dense'),
  ),
)

_MOBILENET = Format(
  library='SAQ',
  family='MobileNetV2',
  tells=(r'conv1\.weight', r'conv2\.weight', r'layer1\.0\.conv2\.weight', r'layer7\..*'),
  rules=(
    Rule(r'conv1', 'conv1', 'first conv'),
    Rule(r'conv2', 'conv2', 'conv'),
    Rule(r'bn(\d)', 'bn{0}', 'norm'),
    Rule(r'layer(\d)\.(\d+)\.conv(\d)', 'layer{0}_{1}/conv{2}', 'conv'),
    Rule(r'layer(\d)\.(\d+)\.bn(\d)', 'layer{0}_{1}/bn{2}', 'norm'),
    Rule(r'fc', 'fc', 'dense'),
  ),
)

_MOBILENET_CIFAR = Format(
  library='SAQ',
  family='MobileNetV2Cifar',
  tells=(r'conv1\.weight', r'conv2\.weight', r'layers\.0\.conv1\.weight'),
  rules=(
    Rule(r'conv1', 'conv1', 'first conv'),
    Rule(r'conv2', 'conv2', 'conv'),
    Rule(r'bn(\d)', 'bn{0}', 'norm'),
    Rule(r'layers\.(\d+)\.conv(\d)', 'layers_{0}/conv{1}', 'conv'),
    Rule(r'layers\.(\d+)\.bn(\d)', 'layers_{0}/bn{1}', 'norm'),
    Rule(r'layers\.(\d+)\.shortcut\.0', 'layers_{0}/shortcut_conv', 'conv'),
    Rule(r'layers\.(\d+)\.shortcut\.1', 'layers_{0}/shortcut_bn', 'norm'),
    Rule(r'linear', 'linear', 'dense'),
  ),
)


def _torchvision_block(n: int, block: str) -> tuple[Rule, ...]:
  """Of 'features.n': the first block has no convolution that expands."""
  first = 2 if n == 1 else 1
  rules = []
  for place, i in enumerate(range(first, 3)):
    rules += [
      Rule(rf'features\.{n}\.conv\.{place}\.0', f'{block}/conv{i}', 'conv'),
      Rule(rf'features\.{n}\.conv\.{place}\.1', f'{block}/bn{i}', 'norm'),
    ]
  last = 3 - first
  return (
    *rules,
    Rule(rf'features\.{n}\.conv\.{last}', f'{block}/conv3', 'conv'),
    Rule(rf'features\.{n}\.conv\.{last + 1}', f'{block}/bn3', 'norm'),
  )


_TORCHVISION_MOBILENET = Format(
  library='torchvision',
  family='MobileNetV2',
  tells=(r'features\.0\.0\.weight', r'features\.1\.conv\.0\.0\.weight'),
  rules=(
    Rule(r'features\.0\.0', 'conv1', 'conv'),
    Rule(r'features\.0\.1', 'bn1', 'norm'),
    *(rule for n, block in enumerate(_MOBILE_BLOCKS, 1) for rule in _torchvision_block(n, block)),
    Rule(r'features\.18\.0', 'conv2', 'conv'),
    Rule(r'features\.18\.1', 'bn2', 'norm'),
    Rule(r'classifier\.1', 'fc', 'dense'),
  ),
)

_TIMM_MOBILENET = Format(
  library='timm',
  family='MobileNetV2',
  tells=(r'conv_stem\.weight', r'blocks\.0\.0\.conv_dw\.weight', r'conv_head\.weight'),
  prefixes=('timm_model.',),
  rules=(
    Rule(r'conv_stem', 'conv1', 'conv'),
    Rule(r'bn1', 'bn1', 'norm'),
    Rule(r'blocks\.0\.0\.conv_dw', 'layer1_0/conv2', 'conv'),
    Rule(r'blocks\.0\.0\.bn(\d)', 'layer1_0/bn{0+1}', 'norm'),
    Rule(r'blocks\.0\.0\.conv_pw', 'layer1_0/conv3', 'conv'),
    Rule(r'blocks\.(\d)\.(\d)\.conv_pw', 'layer{0+1}_{1}/conv1', 'conv'),
    Rule(r'blocks\.(\d)\.(\d)\.conv_dw', 'layer{0+1}_{1}/conv2', 'conv'),
    Rule(r'blocks\.(\d)\.(\d)\.conv_pwl', 'layer{0+1}_{1}/conv3', 'conv'),
    Rule(r'blocks\.(\d)\.(\d)\.bn(\d)', 'layer{0+1}_{1}/bn{2}', 'norm'),
    Rule(r'conv_head', 'conv2', 'conv'),
    Rule(r'bn2', 'bn2', 'norm'),
    Rule(r'classifier', 'fc', 'dense'),
  ),
)


def _conv_and_norm(pattern: str, block: str, conv: str, norm: str) -> tuple[Rule, Rule]:
  """Of a module of Hugging Face's that holds both."""
  return (
    Rule(rf'{pattern}\.convolution', f'{block}{conv}', 'conv'),
    Rule(rf'{pattern}\.normalization', f'{block}{norm}', 'norm'),
  )


def _hugging_face_block(n: int, block: str) -> tuple[Rule, ...]:
  """Of 'layer.n': the first block is part of the stem and not counted."""
  names = {'expand_1x1': 1, 'conv_3x3': 2, 'reduce_1x1': 3}
  return tuple(
    rule
    for name, i in names.items()
    for rule in _conv_and_norm(rf'layer\.{n}\.{name}', f'{block}/', f'conv{i}', f'bn{i}')
  )


_HUGGING_FACE_MOBILENET = Format(
  library='Hugging Face',
  family='MobileNetV2',
  tells=(r'conv_stem\.first_conv\.convolution\.weight', r'conv_1x1\.convolution\.weight'),
  prefixes=('mobilenet_v2.',),
  background=True,
  rules=(
    *_conv_and_norm(r'conv_stem\.first_conv', '', 'conv1', 'bn1'),
    *_conv_and_norm(r'conv_stem\.conv_3x3', 'layer1_0/', 'conv2', 'bn2'),
    *_conv_and_norm(r'conv_stem\.reduce_1x1', 'layer1_0/', 'conv3', 'bn3'),
    *(rule for n, block in enumerate(_MOBILE_BLOCKS[1:]) for rule in _hugging_face_block(n, block)),
    *_conv_and_norm(r'conv_1x1', '', 'conv2', 'bn2'),
    Rule(r'classifier', 'fc', 'dense'),
  ),
)

_STAGE = r'encoder\.stages\.(\d)\.layers\.(\d+)'

_HUGGING_FACE_RESNET = Format(
  library='Hugging Face',
  family='ResNet',
  tells=(r'embedder\.embedder\.convolution\.weight', rf'{_STAGE}\.layer\.0\.convolution\.weight'),
  prefixes=('resnet.',),
  rules=(
    *_conv_and_norm(r'embedder\.embedder', '', 'conv1', 'bn1'),
    *_conv_and_norm(rf'{_STAGE}\.layer\.(\d)', 'layer{0+1}_{1}/', 'conv{2+1}', 'bn{2+1}'),
    *_conv_and_norm(rf'{_STAGE}\.shortcut', 'layer{0+1}_{1}/', 'downsample_conv', 'downsample_bn'),
    Rule(r'classifier\.1', 'fc', 'dense'),
  ),
)

# MobileNetV2 before ResNet, whose tells it has too.
FORMATS = (
  _PRERESNET,
  _MOBILENET,
  _MOBILENET_CIFAR,
  _RESNET,
  _TORCHVISION_MOBILENET,
  _TIMM_MOBILENET,
  _HUGGING_FACE_MOBILENET,
  _HUGGING_FACE_RESNET,
)

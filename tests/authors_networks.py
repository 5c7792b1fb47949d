"""What both sides of the comparison with the authors' networks begin from.

Nothing that is large is stored: weights, clips, images and the directions along which tensors are
compared are made here from their PyTorch names. The numbers come from the raw output of Philox,
which NumPy keeps the same in all its versions, and are uniform: a normal distribution would go
through functions whose last bit depends on the machine.
"""

import zlib
from pathlib import Path

import numpy as np

RECORD = Path(__file__).parent / 'reference' / 'authors_steps.npz'
CLASSES, BATCH, STEPS = 10, 4, 2
# Pixels a side: the last feature map is 2x2, that of the last network 4x4.
SIZES = {'resnet18': 64, 'resnet50': 64, 'mobilenetv2': 64, 'mobilenetv2_cifar': 32}
# The last layer's weights are quantized without normalisation.
_LAST_CLIP = 0.03
_NORM = {'weight': 'scale', 'bias': 'bias', 'running_mean': 'mean', 'running_var': 'var'}


def uniform(key, shape, mean=0.0, std=1.0):
  """Numbers that depend on nothing but the key, which is a string."""
  bits = np.random.Philox(key=zlib.crc32(key.encode()))
  unit = (bits.random_raw(int(np.prod(shape))) >> np.uint64(11)) * 2.0**-53
  return mean + std * 12**0.5 * (unit.reshape(shape) - 0.5)


def first_value(case, name, shape):
  """Of a parameter, a clip or a running statistic, in PyTorch's layout."""
  module, leaf = name.rsplit('.', 1)
  key = f'{case}/{name}'
  if leaf == 'running_mean':
    return np.zeros(shape)
  if leaf == 'running_var':
    return np.ones(shape)
  # Most of what a norm puts out lies within the clip after it, else gradients grow with depth.
  # ReLU6 cuts some of it off, below some of the clips and above others.
  gain = 5.0 if case == 'mobilenetv2' else 1.0
  if leaf == 'activation_clip_value':
    return uniform(key, shape, 1.2 * gain, 0.1 * gain)
  if leaf == 'weight_clip_value':
    return uniform(key, shape, 1.0, 0.1) * (1.0 if _of_conv(module) else _LAST_CLIP / gain)
  if _of_norm(module):
    return gain * uniform(key, shape, 0.4 if leaf == 'weight' else 0.6, 0.1)
  if leaf == 'bias':
    return uniform(key, shape, 0.0, 0.1)
  std = (2 / (shape[0] * shape[2] * shape[3])) ** 0.5 if len(shape) == 4 else _LAST_CLIP / gain
  return uniform(key, shape, 0.0, std)


def direction(case, name, shape):
  """Along which the change of a tensor is measured."""
  return uniform(f'{case}/{name}/direction', shape)


def batch(case, step):
  """Images NCHW and their labels."""
  size = SIZES[case]
  images = uniform(f'{case}/images/{step}', (BATCH, 3, size, size))
  labels = np.random.Philox(key=step).random_raw(BATCH) % np.uint64(CLASSES)
  return images, labels.astype(np.int32)


def our_path(name):
  """'layer2.0.downsample.1.weight' -> ('model', 'layer2_0/downsample_bn/scale').

  The first convolution's clip of its input, which nothing uses, has no twin: None.
  """
  module, leaf = name.rsplit('.', 1)
  parts = module.split('.')
  if parts[0].startswith('layer'):
    parts[:2] = [f'{parts[0]}_{parts[1]}']
  if parts[-1] in ('0', '1'):
    parts[-2:] = [parts[-2] + ('_conv', '_bn')[int(parts[-1])]]
  ours = '/'.join(parts)
  if _of_norm(module):
    return ('batch_stats' if 'running' in leaf else 'model'), f'{ours}/{_NORM[leaf]}'
  if leaf == 'weight_clip_value':
    return 'scales', f'{ours}/kernel'
  if leaf == 'activation_clip_value':
    return None if ours == 'conv1' else ('model', f'{ours}/input/quant_scale')
  return 'model', f'{ours}/{"kernel" if leaf == "weight" else leaf}'


def their_shape(shape):
  """HWIO -> OIHW, IO -> OI, () -> (1,)."""
  order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), range(len(shape)))
  return tuple(shape[i] for i in order) or (1,)


def our_layout(x):
  """OIHW -> HWIO, OI -> IO."""
  order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(x.ndim)
  return x if order is None else np.ascontiguousarray(x.transpose(order))


def _of_norm(module):
  return module.split('.')[-1].startswith('bn') or module.endswith(('downsample.1', 'shortcut.1'))


def _of_conv(module):
  return module not in ('fc', 'linear')

"""Reads the recorded PyTorch tensors into this package's trees, name by name."""

from pathlib import Path

import numpy as np
from flax import traverse_util

RECORD = Path(__file__).parent / 'reference' / 'preresnet20_w4a4_steps.npz'
_NORM = {'weight': 'scale', 'bias': 'bias', 'running_mean': 'mean', 'running_var': 'var'}


def our_path(name):
  """'layer1.0.conv1.weight' -> ('model', 'layer1_0/conv1/kernel'); None where there is no twin."""
  *where, leaf = name.split('.')
  if where[0].startswith('layer'):
    where = [f'{where[0]}_{where[1]}', *where[2:]]
  module = '/'.join(where)
  if where[-1].startswith('bn'):
    return ('batch_stats' if 'running' in leaf else 'model'), f'{module}/{_NORM[leaf]}'
  if leaf == 'weight_clip_value':
    return 'scales', f'{module}/kernel'
  if leaf == 'activation_clip_value':
    # The authors' first convolution has a clip for its input, which it does not quantize.
    return None if module == 'conv' else ('model', f'{module}/input/quant_scale')
  return 'model', f'{module}/{"kernel" if leaf == "weight" else leaf}'


def our_layout(name, value):
  """OIHW -> HWIO, OI -> IO, clips of shape (1,) -> ()."""
  if name.endswith('clip_value'):
    return value.reshape(())
  order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim)
  return value if order is None else value.transpose(order)


def read(record, prefix):
  """All tensors under a prefix: (params, batch_stats) in float64."""
  flat = {'model': {}, 'scales': {}, 'batch_stats': {}}
  for key in record.files:
    if key.startswith(prefix + '/') and (path := our_path(key[len(prefix) + 1 :])):
      flat[path[0]][path[1]] = our_layout(key, record[key].astype(np.float64))
  model, stats = (traverse_util.unflatten_dict(flat[k], sep='/') for k in ('model', 'batch_stats'))
  return {'model': model, 'scales': flat['scales']}, stats

"""Files of PyTorch, read by PyTorch itself with nothing but tensors let in."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saq_jax.pretrained.errors import PretrainedError

SUFFIXES = ('.pth', '.pt', '.bin', '.ckpt', '.pth.tar')

# Where training scripts put the model's own tensors, beside the optimizer's and the step.
_WRAPPERS = ('state_dict', 'model', 'model_state_dict', 'net')


def read_torch(path: Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a PyTorch file, without running what a pickle may hold.

  Args:
    path: of a file that `torch.save` wrote.

  Returns:
    The tensors by name, those of the model where others are beside them.

  Raises:
    PretrainedError: if PyTorch is not installed, the file cannot be read, or it holds more than
      tensors and numbers.
  """
  try:
    import torch
  except ImportError as error:
    raise PretrainedError(
      f'{path}: reading it takes PyTorch, which is not installed: pip install torch, or convert '
      'the file where PyTorch is (safetensors.torch.save_file(state_dict, "model.safetensors"))'
    ) from error
  try:
    content = torch.load(path, map_location='cpu', weights_only=True)
  # PyTorch tells of a damaged file by several types, and of objects by words alone.
  except Exception as error:
    reason = str(error).strip() or type(error).__name__
    if held := re.search(r'global:? GLOBAL (\S+)', reason):
      raise PretrainedError(
        f'{path} holds Python objects beside tensors ({held[1]}), which are not loaded, for a '
        'pickle can run any code. If you trust it, load it with weights_only=False and save its '
        'tensors alone: torch.save(model.state_dict(), "weights.pth"), or the dict of tensors in it'
      ) from error
    raise PretrainedError(
      f'{path} is damaged or no PyTorch file: {reason.splitlines()[0][:200]}'
    ) from error
  tensors = _unwrapped(content, torch.Tensor)
  if not tensors:
    kind = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
    raise PretrainedError(f'{path} holds no tensors by name: {kind}')
  return {name: _to_numpy(x, torch) for name, x in tensors.items()}


def _unwrapped(content: Any, tensor: type) -> dict[str, Any]:
  """The tensors of a file, or of the first of the known keys that holds some."""
  if not isinstance(content, Mapping):
    return {}
  for key in _WRAPPERS:
    if isinstance(content.get(key), Mapping) and (found := _unwrapped(content[key], tensor)):
      return found
  return {str(name): x for name, x in content.items() if isinstance(x, tensor)}


def _to_numpy(x: Any, torch: Any) -> np.ndarray:
  """A numpy array, of float32 where the tensor is of a smaller float."""
  narrow = x.is_floating_point() and x.dtype != torch.float64
  return np.asarray((x.float() if narrow else x).detach().numpy())

"""What the settings beside a file ask of the model, and of the images that it is given."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from saq_jax.pretrained.errors import PretrainedError
from saq_jax.pretrained.files import WeightFile
from saq_jax.pretrained.formats import detect

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class _Kind:
  """What a `model_type` of Hugging Face's means here.

  Attributes:
    family: the class of the model.
    norm_eps: where the file does not say.
    only: values that the model here has and cannot change, by name of the setting.
  """

  family: str
  norm_eps: float
  only: Mapping[str, Any]


_VIT = _Kind('ViT', 1e-12, MappingProxyType({'hidden_act': 'gelu', 'qkv_bias': True}))
_KINDS = {
  'vit': _VIT,
  'deit': _VIT,
  'swin': _Kind(
    'Swin',
    1e-5,
    # Its library uses this epsilon in two of its norms, whatever the settings say.
    MappingProxyType(
      {
        'hidden_act': 'gelu',
        'qkv_bias': True,
        'use_absolute_embeddings': False,
        'layer_norm_eps': 1e-5,
      }
    ),
  ),
  'resnet': _Kind(
    'ResNet',
    1e-5,
    MappingProxyType(
      {
        'hidden_act': 'relu',
        'downsample_in_first_stage': False,
        'downsample_in_bottleneck': False,
      }
    ),
  ),
  'mobilenet_v2': _Kind(
    'MobileNetV2',
    1e-3,
    MappingProxyType({'hidden_act': 'relu6', 'output_stride': 32, 'expand_ratio': 6}),
  ),
}


def model_settings(file: WeightFile) -> dict[str, Any]:
  """Says with which fields a model must be built to compute what these weights were trained for.

  Args:
    file: what `open_weights` gave.

  Returns:
    'norm_eps', and for MobileNetV2 'padding' ('same' or 'torch'), where a config.json of Hugging
    Face's tells them; else nothing, and the model's own defaults are right.

  Raises:
    PretrainedError: if the settings ask for what no model here does, or belong to other weights.

  Example:
    >>> import numpy as np
    >>> names = 'cls_token', 'position_embeddings', 'patch_embeddings.projection.weight'
    >>> tensors = {f'vit.embeddings.{name}': np.zeros(1) for name in names}
    >>> model_settings(WeightFile(tensors, {'model_type': 'vit', 'layer_norm_eps': 1e-6}))
    {'norm_eps': 1e-06}
  """
  settings = file.settings
  kind = _KINDS.get(settings.get('model_type', ''))
  if kind is None:
    return {}
  form = detect(file)
  if form.family != kind.family:
    raise PretrainedError(
      f'{file.description}: config.json says {settings["model_type"]!r}, but the tensors are those '
      f'of a {form.family} ({form.library} names): it belongs to other weights'
    )
  for name, value in kind.only.items():
    if settings.get(name, value) != value:
      raise PretrainedError(
        f'{file.description}: config.json asks for {name}={settings[name]!r}; the {kind.family} '
        f'here has {value!r} and would compute something else'
      )
  if form.library != 'Hugging Face':
    return {}
  found: dict[str, Any] = {}
  # The library's ResNet has no such setting.
  found['norm_eps'] = float(settings.get('layer_norm_eps', kind.norm_eps))
  if kind.family == 'MobileNetV2':
    found['padding'] = 'same' if settings.get('tf_padding', True) else 'torch'
  return found


def image_statistics(file: WeightFile) -> Statistics | None:
  """Says by which mean and deviation the images were normalised that these weights have seen.

  Args:
    file: what `open_weights` gave.

  Returns:
    Means and standard deviations of the channels, of pixels from 0 to 1; None where nothing tells
    them.

  Example:
    >>> file = WeightFile({}, preprocessor={'image_mean': [0.5] * 3, 'image_std': [0.5] * 3})
    >>> image_statistics(file)
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
  """
  timm = file.settings.get('pretrained_cfg', {})
  mean = file.preprocessor.get('image_mean') or timm.get('mean')
  std = file.preprocessor.get('image_std') or timm.get('std')
  if mean and std and file.preprocessor.get('do_normalize', True):
    return tuple(map(float, mean)), tuple(map(float, std))
  if _heads_of_google(file):  # whose images all lie in [-1, 1]
    return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
  return None


def untold(file: WeightFile, model: Any) -> list[str]:
  """Says what the model has that the file should tell and does not.

  Args:
    file: what `open_weights` gave.
    model: of this package.

  Returns:
    A line each; none where all is told.
  """
  notes = []
  form = detect(file)
  kinds = [kind for kind in _KINDS.values() if kind.family == form.family]
  if form.library == 'Hugging Face' and not file.settings and kinds:
    same = "; padding 'same'" if form.family == 'MobileNetV2' else ''
    if model.norm_eps != kinds[0].norm_eps or same:
      notes.append(
        f'no config.json beside it: taken with norm_eps={model.norm_eps:g}'
        + (f' and padding={model.padding!r}' if same else '')
        + f"; that library's own default is {kinds[0].norm_eps:g}{same}"
      )
  heads = getattr(model, 'heads', None)
  told = 'num_attention_heads' in file.settings or form.library == 'Google'
  if isinstance(heads, int) and not told and model.width != 64 * heads:
    notes.append(
      f'the file does not tell the number of heads: the model has {heads}, and published networks '
      f'of width {model.width} have {model.width // 64}'
    )
  return notes


def require_settings(file: WeightFile, model: Any) -> None:
  """Raises unless a model was built as the settings beside its weights ask.

  Args:
    file: what `open_weights` gave.
    model: of this package.

  Raises:
    PretrainedError: if a field differs; the message names it.
  """
  wanted = model_settings(file)
  heads = file.settings.get('num_attention_heads') or _heads_of_google(file)
  if isinstance(heads, int) and isinstance(getattr(model, 'heads', None), int):
    wanted['heads'] = heads
  for name, value in wanted.items():
    if getattr(model, name) != value:
      raise PretrainedError(
        f'{file.description} asks for {name}={value!r}, and the model has '
        f'{getattr(model, name)!r}: build it with that, or these weights compute something else'
      )


def _heads_of_google(file: WeightFile) -> int | None:
  """The heads of attention, where a kernel has an axis for them; other formats do not show them."""
  query = next((x for name, x in file.tensors.items() if name.endswith('_1/query/kernel')), None)
  return query.shape[1] if query is not None and query.ndim == 3 else None

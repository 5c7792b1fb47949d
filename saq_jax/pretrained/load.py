"""From a source of public weights to the parameters of a model."""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from saq_jax._paths import PyTree, is_quant_scale
from saq_jax.pretrained.errors import PretrainedError, table
from saq_jax.pretrained.files import WeightFile, open_weights
from saq_jax.pretrained.fit import Fitted, Origin, fit
from saq_jax.pretrained.formats import recognise
from saq_jax.pretrained.rules import Converted, Format, convert
from saq_jax.pretrained.settings import require_settings, untold

_NAMES_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Weights for a model.

  Attributes:
    params: the model's parameters, numpy arrays in a nested dict; without those that are `fresh`,
      and without scales of activations that the file has not.
    batch_stats: its running statistics; empty where it has none.
    scales: of the weights, by path ('layer1_0/conv1/kernel'); from the SAQ authors' checkpoints.
    fresh: paths ('params/head/kernel') of what the model must begin anew, a replaced head.
    quantized: whether the file has clips: its weights were trained with quantizers.
    message: what was read, and what was changed to make it fit: one or more lines.
  """

  params: PyTree
  batch_stats: PyTree
  scales: dict[str, Any]
  fresh: frozenset[str]
  quantized: bool
  message: str


def load_pretrained(
  source: str | os.PathLike[str] | WeightFile,
  model: nn.Module,
  input_shape: tuple[int, int, int],
  *,
  keep_scales: bool = True,
  scale_paths: Collection[str] | None = None,
) -> Loaded:
  """Reads weights of any known format for a model.

  Args:
    source: as in `open_weights`, or what that gave.
    model: one of this package's, built with what `model_settings` says of the file.
    input_shape: height, width and channels of the images.
    keep_scales: whether the authors' clips of weights and activations are taken. They are those of
      `LIQ`; with another quantizer they must not be.
    scale_paths: of the kernels that the run quantizes; clips of others are dropped; None keeps all.

  Returns:
    The weights by the model's own paths, and a message about them.

  Raises:
    PretrainedError: if they cannot be read, or do not fit the model.
  """
  file = source if isinstance(source, WeightFile) else open_weights(os.fspath(source))
  form, named = recognise(file)
  wanted = model_leaves(model, input_shape)
  _require_family(file, form, model, wanted)
  converted = convert(named, form)
  quantized = bool(converted.scales)
  notes = _without_scales(converted) if not keep_scales else []
  notes += _without_background(converted, form, file.settings, wanted, _last_kernel(model))
  origin = Origin(file.description, converted.names, converted.shapes, tuple(converted.unknown))
  fitted = fit(
    converted.leaves,
    wanted,
    last_kernel=_last_kernel(model),
    image_size=input_shape[:2],
    scales=converted.scales,
    scale_paths=scale_paths,
    origin=origin,
  )
  require_settings(file, model)
  notes += _without_rich_head(file, converted, fitted, model)
  tree = traverse_util.unflatten_dict(fitted.leaves, sep='/')
  return Loaded(
    params=tree['params'],
    batch_stats=tree.get('batch_stats', {}),
    scales=fitted.scales,
    fresh=fitted.fresh,
    quantized=quantized,
    message='\n  '.join(
      [_summary(file, form, fitted), *notes, *fitted.notes, *untold(file, model)]
    ),
  )


def model_leaves(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, Any]:
  """Finds which leaves a model has, without computing any.

  Args:
    model: called as `model.init(key, images, train=False)`.
    input_shape: height, width and channels of the images.

  Returns:
    A `jax.ShapeDtypeStruct` by 'params/...' and 'batch_stats/...'.

  Example:
    >>> from saq_jax.models.preresnet import PreResNet
    >>> leaves = model_leaves(PreResNet(num_classes=3, depth=8, width=2), (8, 8, 1))
    >>> leaves['params/fc/kernel'].shape, leaves['batch_stats/bn/mean'].shape
    ((8, 3), (8,))
  """
  images = jnp.zeros((1, *input_shape))
  tree = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  return {
    path: leaf
    for path, leaf in traverse_util.flatten_dict(dict(tree), sep='/').items()
    if path.startswith(('params/', 'batch_stats/'))
  }


def _last_kernel(model: Any) -> str:
  return model.last_kernel


def _require_family(
  file: WeightFile, form: Format, model: nn.Module, wanted: Mapping[str, Any]
) -> None:
  """Raises if the file is of another family, with some names of both."""
  ours = type(model).__name__
  if form.family != ours:
    rows = list(zip(list(file.tensors)[:_NAMES_SHOWN], list(wanted)[:_NAMES_SHOWN]))
    raise PretrainedError(
      f'{file.description} holds a {form.family} ({form.library} names), and the model is a '
      f'{ours}: set the model to that family, or take other weights.\n'
      + table(rows, ('in the file', 'in the model'))
    )


def _without_scales(converted: Converted) -> list[str]:
  """Drops all clips; gives a note."""
  paths = [path for path in converted.leaves if is_quant_scale(path)]
  count = len(paths) + len(converted.scales)
  for path in paths:
    del converted.leaves[path]
  converted.scales.clear()
  return [f'{count} clips left out: this run quantizes otherwise'] if count else []


def _without_background(
  converted: Converted,
  form: Format,
  settings: Mapping[str, Any],
  wanted: Mapping[str, Any],
  last_kernel: str,
) -> list[str]:
  """Drops class 0 where it is one for the background and the model has one class fewer."""
  notes = []
  labels = settings.get('id2label') or {}
  for path in list(wanted):
    if not form.background or not re.fullmatch(f'params/(?:{last_kernel})', path):
      continue
    bias = path.removesuffix('kernel') + 'bias'
    classes = np.shape(converted.leaves.get(path, 0))[-1:]
    told = str(labels.get('0', '')) == 'background' or classes == (1001,)
    if told and classes == (wanted[path].shape[-1] + 1,) and bias in converted.leaves:
      for leaf in (path, bias):
        converted.leaves[leaf] = converted.leaves[leaf][..., 1:]
      notes.append(f'class 0 of {classes[0]}, the background, left out')
  return notes


def _without_rich_head(
  file: WeightFile, converted: Converted, fitted: Fitted, model: nn.Module
) -> list[str]:
  """Lets a head of more layers go with the head that is replaced; raises where that is kept."""
  if not converted.head:
    return []
  if not fitted.fresh:
    raise PretrainedError(
      f'{file.description} has a further layer before its head ({converted.head[0]}), which the '
      f'{type(model).__name__} has not: its head cannot be kept, only replaced by one for another '
      'number of classes'
    )
  return [f'{converted.head[0]} left out, with the head that it belongs to']


def _summary(file: WeightFile, form: Format, fitted: Fitted) -> str:
  """The first line of the message."""
  count = sum(int(np.size(x)) for path, x in fitted.leaves.items() if path.startswith('params/'))
  statistics = any(path.startswith('batch_stats/') for path in fitted.leaves)
  return (
    f'weights from {file.description}: {form.family}, {form.library} names, '
    f'{len(fitted.leaves)} tensors, {count:,} parameters'
    + (' and running statistics' if statistics else '')
    + (f', {len(fitted.scales)} scales of weights' if fitted.scales else '')
  )

"""From settings to a network: the model of a family and the quantizer of its weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from saq_jax.models.mobilenetv2 import MobileNetV2, MobileNetV2Cifar
from saq_jax.models.preresnet import PreResNet
from saq_jax.models.resnet import ResNet
from saq_jax.models.swin import Swin
from saq_jax.models.vit import ViT
from saq_jax.quantizers import LIQ, LSQ, PACT, DoReFa, Quantizer
from saq_jax.training.config import ModelConfig, QuantConfig, QuantizerName
from saq_jax.weights import QuantRule, WeightQuantizer, weight_quantizer

FLOATING = QuantConfig(
  bits=None, act_bits=None, first_bits=None, first_act_bits=None, last_bits=None
)


@dataclasses.dataclass(frozen=True)
class Network:
  """A model and the quantizer of its weights; hashable, with no array in it.

  Attributes:
    model: called as `model.apply(variables, images, train=...)`.
    quantize: of its parameters; the identity in a full-precision network.
  """

  model: nn.Module
  quantize: WeightQuantizer


def build_network(model: ModelConfig, quant: QuantConfig, num_classes: int) -> Network:
  """Makes the network that the settings describe.

  Args:
    model: family and size.
    quant: quantizers and bit-widths; `FLOATING` for full precision.
    num_classes: outputs.

  Returns:
    The model and its weight quantizer.
  """
  shared: dict[str, Any] = {
    'num_classes': num_classes,
    'act': _quantizer(quant, quant.acts, quant.act_bits, signed=False),
    'first_act': _quantizer(quant, quant.acts, quant.first_act_bits)
    if quant.first_act_bits is not None
    else None,
    'last_act': _quantizer(quant, quant.acts, quant.last_bits, signed=False),
    'remat': model.remat,
    'dtype': jnp.dtype(model.dtype) if model.dtype != 'float32' else None,
  }
  if model.norm_eps is not None:
    shared['norm_eps'] = model.norm_eps
  net = _FAMILIES[model.name](model, shared)
  rules = [
    QuantRule(net.first_kernel, _quantizer(quant, quant.weights, quant.first_bits, normalize=True)),
    QuantRule(net.last_kernel, _quantizer(quant, quant.weights, quant.last_bits)),
    QuantRule(r'.*/kernel', _quantizer(quant, quant.weights, quant.bits, normalize=True)),
  ]
  return Network(net, weight_quantizer(rules))


def _vit(model: ModelConfig, shared: dict[str, Any]) -> ViT:
  """A ViT or a DeiT of a named size, or one whose depth or width was changed."""
  assert model.size is not None
  given = {'depth': model.depth, 'width': model.width, 'heads': model.heads, 'patch': model.patch}
  return ViT.of_size(
    model.size,
    distilled=model.distilled,
    **{name: value for name, value in given.items() if value is not None},
    **_drops(model),
    **shared,
  )


def _swin(model: ModelConfig, shared: dict[str, Any]) -> Swin:
  assert model.size is not None
  return Swin.of_size(model.size, **_drops(model), **shared)


def _drops(model: ModelConfig) -> dict[str, Any]:
  """What a transformer leaves out at random in training."""
  return {
    'dropout': model.dropout,
    'attn_dropout': model.attn_dropout,
    'drop_path': model.drop_path,
  }


_FAMILIES: dict[str, Callable[[ModelConfig, dict[str, Any]], Any]] = {
  'preresnet': lambda model, shared: PreResNet(
    depth=model.depth or 8, width=model.width or 16, **shared
  ),
  'resnet': lambda model, shared: ResNet(depth=model.depth or 18, **shared),
  'mobilenetv2': lambda model, shared: MobileNetV2(padding=model.padding or 'torch', **shared),
  'mobilenetv2_cifar': lambda model, shared: MobileNetV2Cifar(**shared),
  'vit': _vit,
  'deit': _vit,
  'swin': _swin,
}


def _quantizer(
  quant: QuantConfig,
  name: QuantizerName,
  bits: int | None,
  *,
  signed: bool = True,
  normalize: bool = False,
) -> Quantizer:
  """A quantizer by its name in a config; only LIQ can normalise, and only LSQ has a choice."""
  if name == 'liq':
    return LIQ(bits=bits, signed=signed, normalize=normalize)
  if name == 'lsq':
    return LSQ(bits=bits, signed=signed, init_by=quant.lsq_init, grad_scale=quant.lsq_grad_scale)
  return {'pact': PACT, 'dorefa': DoReFa}[name](bits=bits, signed=signed)

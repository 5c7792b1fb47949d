"""Sharpness-Aware Quantization in JAX: quantizers, a weight quantizer over a tree, and `saq()`."""

from saq_jax._version import __version__
from saq_jax.quantizers import LIQ, LSQ, PACT, DoReFa, Quantizer
from saq_jax.transform import SAQState, qat, saq
from saq_jax.weights import QuantRule, WeightQuantizer, weight_quantizer

__all__ = [
  'LIQ',
  'LSQ',
  'PACT',
  'DoReFa',
  'QuantRule',
  'Quantizer',
  'SAQState',
  'WeightQuantizer',
  '__version__',
  'qat',
  'saq',
  'weight_quantizer',
]

r"""Sharpness-aware quantization in JAX: quantizers, a weight quantizer over a tree, and `saq()`.

A model, here a plain Flax one that knows nothing of this package, computes with quantized
weights; `saq` makes the sharpness-aware gradient of it, and an optimizer follows in the chain:

    >>> import flax.linen as nn
    >>> import jax, jax.numpy as jnp, optax
    >>> from saq_jax import LSQ, QuantRule, saq, weight_quantizer
    >>>
    >>> class Net(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x):
    ...     x = nn.relu(nn.Conv(8, (3, 3), name='stem')(x))
    ...     x = nn.relu(nn.Dense(16, name='hidden')(x.reshape(len(x), -1)))
    ...     return nn.Dense(10, name='head')(x)
    >>>
    >>> model = Net()
    >>> images = jax.random.normal(jax.random.key(0), (32, 8, 8, 1))
    >>> labels = jnp.arange(32) % 10
    >>> model_params = model.init(jax.random.key(1), images)['params']
    >>>
    >>> quantize = weight_quantizer([
    ...   QuantRule(r'(stem|head)/kernel', LSQ(bits=8)),
    ...   QuantRule(r'.*/kernel', LSQ(bits=4)),
    ... ])
    >>> params = quantize.init(model_params)        # adds the learnable scales
    >>> sorted(params['scales'])
    ['head/kernel', 'hidden/kernel', 'stem/kernel']
    >>> def loss(z):
    ...   logits = model.apply({'params': z['model']}, images)
    ...   return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    >>>
    >>> tx = optax.chain(saq(quantize, rho=0.05), optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    >>> opt_state = tx.init(params)
    >>> @jax.jit
    ... def step(params, opt_state):
    ...   grads = jax.grad(loss)(quantize(params))
    ...   updates, opt_state = tx.update(grads, opt_state, params, grad_fn=jax.grad(loss))
    ...   return optax.apply_updates(params, updates), opt_state
    >>> before = loss(quantize(params))
    >>> for _ in range(20):
    ...   params, opt_state = step(params, opt_state)
    >>> bool(loss(quantize(params)) < before)
    True
    >>> int(jnp.unique(quantize(params)['model']['hidden']['kernel']).size) <= 2**4
    True
"""

from saq_jax._version import __version__
from saq_jax.choices import at_random, every, hardest, where_steep
from saq_jax.oscillation import track_oscillation
from saq_jax.perturbation import only
from saq_jax.quantizers import LIQ, LSQ, PACT, DoReFa, Quantizer
from saq_jax.strategies import along_momentum, looksam, sometimes
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
  'along_momentum',
  'at_random',
  'every',
  'hardest',
  'looksam',
  'only',
  'qat',
  'saq',
  'sometimes',
  'track_oscillation',
  'weight_quantizer',
  'where_steep',
]

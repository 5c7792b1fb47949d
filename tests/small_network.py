"""A small network to train in tests, its loss written out again in jax.lax, and data for it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from saq_jax import LIQ, QuantRule, weight_quantizer
from saq_jax.layers import BatchNorm, Conv, Dense
from saq_jax.training.build import build_optimizer, build_slot
from saq_jax.training.config import SAQConfig, StageConfig
from saq_jax.training.network import Network
from saq_jax.training.state import new_state
from saq_jax.training.step import StepConfig

LIQ_ACT = LIQ(bits=4, signed=False)
PLAIN = StepConfig(mean=(0.4,), std=(0.3,))
AUGMENTED = StepConfig(mean=(0.4,), std=(0.3,), pad_crop=1, flip=True)
CLASSES = 3


class Small(nn.Module):
  """A convolution, a norm, a ReLU, the mean over the image, and a layer with a quantized input."""

  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, *, train):
    x = Conv(6, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name='conv')(x)
    norm = BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name='bn')
    x = jnp.mean(nn.relu(norm(x)), (1, 2))
    return Dense(CLASSES, dtype=self.dtype, input_quantizer=LIQ_ACT, name='fc')(x)


RULES = [QuantRule('conv/kernel', LIQ(bits=4, normalize=True)), QuantRule('fc/kernel', LIQ(bits=8))]
NETWORK = Network(Small(), weight_quantizer(RULES))
SGD = StageConfig(lr=0.2, scale_lr=0.02, weight_decay=0.0, schedule='cosine', epochs=40)


def written_out(z, stats, images, labels, smoothing=0.0, train=True):
  """Mean loss; hits, losses, and the batch's mean and unbiased variance."""
  p = z['model']
  images, kernel = images.transpose(0, 3, 1, 2), p['conv']['kernel'].transpose(3, 2, 0, 1)
  x = jax.lax.conv(images, kernel, (1, 1), 'SAME').transpose(0, 2, 3, 1)
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  n = x.size // x.shape[-1]
  found = {'bn': {'mean': mean, 'var': var * n / (n - 1)}}
  if not train:
    mean, var = stats['bn']['mean'], stats['bn']['var']
  x = (x - mean) / jnp.sqrt(var + 1e-5) * p['bn']['scale'] + p['bn']['bias']
  x = LIQ_ACT(jnp.maximum(x, 0).mean((1, 2)), p['fc']['input']['quant_scale'])
  logits = x @ p['fc']['kernel'] + p['fc']['bias']
  log_p = logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)
  losses = -(1 - smoothing) * log_p[jnp.arange(len(labels)), labels] - smoothing * log_p.mean(-1)
  return losses.mean(), (logits.argmax(-1) == labels, losses, found)


def parts_for(rho, stage=SGD, network=NETWORK):
  """What a step needs beside its settings; plain quantization-aware training for a rho of None."""
  slot = build_slot(network, None if rho is None else SAQConfig(rho=rho), steps_per_epoch=1)
  optimizer, lr = build_optimizer(stage, steps_per_epoch=1)
  return {'tx': optax.chain(slot, optimizer), 'lr': lr, 'network': network}


def start(parts, seed=0):
  """A state whose every leaf has memory of its own."""
  return new_state(parts['network'], parts['tx'], seed, jnp.zeros((1, 6, 6, 1)))


def make_batch(size=16, seed=0):
  """Noise with two bright rows, which say the class."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, CLASSES, size).astype(np.int32)
  images = rng.integers(0, 100, (size, 6, 6, 1), np.uint8)
  for image, label in zip(images, labels):
    image[2 * label : 2 * label + 2] += np.uint8(120)
    image[:, : label + 1] += np.uint8(30)
  return {'image': images, 'label': labels}


def normalized(images):
  return (images.astype(np.float64) / 255 - 0.4) / 0.3

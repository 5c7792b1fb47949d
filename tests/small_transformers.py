"""Small Transformers' variables, what they do in NumPy, and how their quantizers are seen."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from saq_jax import LSQ
from saq_jax._paths import named_leaves
from saq_jax.layers import ActQuant

ACT, LAST, FIRST = LSQ(bits=4), LSQ(bits=5), LSQ(bits=6)
QUANTIZED = {'act': ACT, 'last_act': LAST, 'first_act': FIRST}
KEY = jax.random.key(0)


@functools.cache
def shapes(model, *image):
  """The variables' shapes, without computing."""
  x = jnp.zeros((2, *image))
  return jax.eval_shape(functools.partial(model.init, train=False), KEY, x)


def random_params(model, *image, seed=0):
  """Random numbers for every parameter, of a size at which each matters and grids are not full."""
  rng = np.random.default_rng(seed)

  def draw(path, s):
    x = rng.normal(size=s.shape)
    name = path.rsplit('/', 1)[-1]
    if name == 'kernel':
      return jnp.asarray(x * 1.5 / np.sqrt(x[..., 0].size))
    if name == 'quant_scale':
      return jnp.asarray(0.05 if path.endswith('mix/lhs/quant_scale') else 0.3 + 0.1 * abs(x))
    return jnp.asarray(1 + 0.3 * x if name == 'scale' else 0.5 * x)

  found = shapes(model, *image)['params']
  leaves = [draw(path, s) for path, s in named_leaves(found).items()]
  return jax.tree.unflatten(jax.tree.structure(found), leaves)


def signs(model, *image):
  """Whether each activation quantizer is signed, by the path of its scale."""
  found = {}

  def look(method, args, kwargs, context):
    if isinstance(context.module, ActQuant):
      found['/'.join(context.module.path)] = context.module.quantizer.signed
    return method(*args, **kwargs)

  with nn.intercept_methods(look):
    shapes.__wrapped__(model, *image)
  return found


class InNumpy:
  """The parts of a Transformer in float64, from its parameters by name."""

  def __init__(self, params, act=None):
    self.p = {name: np.asarray(x, np.float64) for name, x in named_leaves(params).items()}
    self.bits = act

  def quantize(self, x, name, bits=None, signed=True):
    """LSQ, where there are bits: of the call or those of all layers."""
    bits = bits or self.bits
    if bits is None:
      return x
    s = self.p[f'{name}/quant_scale']
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.rint(np.clip(x / s, low, high)) * s

  def norm(self, x, name, eps):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * self.p[f'{name}/scale'] + self.p[f'{name}/bias']

  def plain_dense(self, x, name):
    return x @ self.p[f'{name}/kernel'] + self.p.get(f'{name}/bias', 0)

  def dense(self, x, name, bits=None):
    return self.plain_dense(self.quantize(x, f'{name}/input', bits), name)

  def attention(self, x, name, heads, bias=0.0):
    """Attention among the tokens [..., N, C], one head after the other."""
    x = self.quantize(x, f'{name}/input')
    size = x.shape[-1] // heads
    q, k, v = (self.plain_dense(x, f'{name}/{n}') for n in 'qkv')
    q = self.quantize(q, f'{name}/product/scores/lhs')
    k = self.quantize(k, f'{name}/product/scores/rhs')
    v = self.quantize(v, f'{name}/product/mix/rhs')
    out = []
    for head in range(heads):
      part = slice(head * size, (head + 1) * size)
      logits = q[..., part] @ np.swapaxes(k[..., part], -1, -2) / np.sqrt(size)
      logits = logits + (bias[head] if np.ndim(bias) else bias)
      a = np.exp(logits - logits.max(-1, keepdims=True))
      a = self.quantize(a / a.sum(-1, keepdims=True), f'{name}/product/mix/lhs', signed=False)
      out.append(a @ v[..., part])
    return self.dense(np.concatenate(out, -1), f'{name}/proj')

  def mlp(self, x, name):
    y = self.dense(x, f'{name}/fc1')
    y = y * (1 + np.vectorize(math.erf)(y / np.sqrt(2))) / 2
    return self.dense(y, f'{name}/fc2')

  def patches(self, images, patch, bits):
    """The patch embedding [B, h, w, C], one patch after the other."""
    images = self.quantize(images, 'patch_embed/input', bits) if bits else images
    kernel = self.p['patch_embed/kernel']
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    out = np.zeros((len(images), rows, columns, kernel.shape[-1]))
    for r in range(rows):
      for c in range(columns):
        pixels = images[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
        out[:, r, c] = np.einsum('bijc,ijcd->bd', pixels, kernel)
    return out + self.p['patch_embed/bias']

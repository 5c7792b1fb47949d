"""The layers of convolutional networks written as sums over shifted images, to compare with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from saq_jax._paths import named_leaves
from saq_jax.layers import calibrate


def shapes(model, size):
  """Names and shapes of the variables, without computing."""
  x = jnp.zeros((2, size, size, 3))
  return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)


def random_variables(model, size, seed=0):
  """Random numbers for every parameter and running statistic, positive where they must be."""
  rng = np.random.default_rng(seed)

  def draw(path, s):
    x = rng.normal(size=s.shape)
    name = path.rsplit('/', 1)[-1]
    if name == 'kernel':
      x = x / np.sqrt(x[..., 0].size)
    return jnp.asarray({'var': 0.5 + x**2, 'quant_scale': 1.5}.get(name, x), float)

  found = shapes(model, size)
  leaves = [draw(path, s) for path, s in named_leaves(found).items()]
  return jax.tree.unflatten(jax.tree.structure(found), leaves)


def program(model, variables, size):
  """The traced program of a forward pass, as text."""
  x = jnp.zeros((2, size, size, 3))
  return str(jax.make_jaxpr(functools.partial(model.apply, train=False))(variables, x))


def value_and_grad(model, variables, x):
  """Logits, moved statistics and all gradients of one pass in training mode."""

  def loss(params):
    logits, moved = model.apply(
      {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
    )
    return jnp.sum(jnp.sin(logits)), (logits, moved)

  return jax.value_and_grad(loss, has_aux=True)(variables['params'])


def check_remat(model, size, more):
  """Values and gradients stay with `remat`, for which `more` convolutions are done again."""
  again = model.clone(remat=True)
  variables = random_variables(model, size)
  x = np.random.default_rng(1).normal(size=(4, size, size, 3))
  assert named_leaves(shapes(again, size)).keys() == named_leaves(variables).keys()
  passes = [functools.partial(value_and_grad, m) for m in (model, again)]
  found = [str(jax.make_jaxpr(fn)(variables, x)).count('conv_general_dilated[') for fn in passes]
  assert found[1] - found[0] == more
  runs = [jax.jit(fn)(variables, x) for fn in passes]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *runs)
  assert all(np.any(g != 0) for g in jax.tree.leaves(runs[0][1]))
  scales = [
    jax.jit(functools.partial(calibrate, m, train=True))(variables, x) for m in (model, again)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *scales)


class Layers:
  """Layers in evaluation mode, with a network's variables.

  n are the levels above zero of the activations between the ends, last_n those of the last
  layer's input, first_n those of the images; None leaves them floating.
  """

  def __init__(self, variables, n=None, last_n=None, first_n=None, eps=1e-5, xp=np):
    self.xp = xp
    self.p, self.stats = (
      {path: xp.asarray(x) for path, x in named_leaves(variables[kind]).items()}
      for kind in ('params', 'batch_stats')
    )
    self.n, self.last_n, self.first_n, self.eps = n, last_n, first_n, eps

  def input(self, x, name, n):
    """Unsigned."""
    if n is None:
      return x
    clip = self.p[f'{name}/input/quant_scale']
    return clip * self.xp.round(self.xp.clip(x / clip, 0, 1) * n) / n

  def images(self, x, name):
    """Signed, without a zero."""
    if self.first_n is None:
      return x
    clip, n = self.p[f'{name}/input/quant_scale'], self.first_n
    unit = (self.xp.clip(x / clip, -1, 1) + 1) / 2
    return clip * (2 * self.xp.round(unit * n) / n - 1)

  def conv(self, x, name, stride=1, groups=1, same=False, first=False):
    """Padded by (k-1)/2 on each side, or as TensorFlow's 'same' does."""
    x = self.images(x, name) if first else self.input(x, name, self.n)
    kernel = self.p[f'{name}/kernel']
    k, side = kernel.shape[0], x.shape[1]
    total = max((-(-side // stride) - 1) * stride + k - side, 0)
    pads = (total // 2, total - total // 2) if same else (k // 2, k // 2)
    x = self.xp.pad(x, ((0, 0), pads, pads, (0, 0)))
    out = (x.shape[1] - k) // stride + 1
    kernel = kernel.reshape(k, k, -1, groups, kernel.shape[-1] // groups)
    total = 0.0
    for i, j in np.ndindex(k, k):
      y = shifted(x, i, j, stride, out)
      y = y.reshape(*y.shape[:3], groups, -1)
      total = total + self.xp.einsum('bhwgi,igo->bhwgo', y, kernel[i, j])
    return total.reshape(*total.shape[:3], -1)

  def norm(self, x, name):
    mean, var = self.stats[f'{name}/mean'], self.stats[f'{name}/var']
    x = (x - mean) / self.xp.sqrt(var + self.eps)
    return x * self.p[f'{name}/scale'] + self.p[f'{name}/bias']

  def relu(self, x, most=np.inf):
    return self.xp.clip(x, 0, most)

  def max_pool(self, x):
    """3x3, stride 2."""
    out = (x.shape[1] - 1) // 2 + 1
    x = self.xp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = [shifted(x, i, j, 2, out) for i, j in np.ndindex(3, 3)]
    return functools.reduce(self.xp.maximum, windows)

  def last(self, x, name):
    x = self.input(x.mean((1, 2)), name, self.last_n)
    return x @ self.p[f'{name}/kernel'] + self.p[f'{name}/bias']


def shifted(x, i, j, stride, out):
  """Every stride-th pixel from (i, j) on."""
  end = stride * (out - 1) + 1
  return x[:, i : i + end : stride, j : j + end : stride]

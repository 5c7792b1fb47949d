"""What transformers are built of: attention with quantized products, the MLP, stochastic depth.

Quantized are the inputs of all products: those of q, k, v, proj, fc1 and fc2; q, k and v
themselves; and the attention probabilities. Norms, softmax, GELU and residual sums are not. This
placement follows the SAQ authors' later code for DeiT; that fc2's input, which follows a GELU, is
signed as all others are, is this project's choice: GELU goes down to -0.17.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from saq_jax.layers import ActQuant, Dense, Einsum, with_sign
from saq_jax.quantizers import Quantizer

Implementation = Literal['xla', 'cudnn'] | None

kernel_init = nn.initializers.normal(0.02)


def layer_norm(eps: float, dtype: Any, name: str) -> nn.LayerNorm:
  """Makes a layer norm that finds its variance around the mean, as PyTorch's does.

  Flax's default, mean of squares minus square of the mean, loses digits where a channel is large,
  as some of Transformers are.

  Args:
    eps: added to the variance.
    dtype: of the result; statistics are in float32 or better.
    name: of the module.

  Returns:
    The module.
  """
  return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class DotProductAttention(nn.Module):
  r"""Multi-head attention's two products, their four operands quantized (Vaswani, 1706.03762).

  With `Q` an activation quantizer, each operand with its own scale, and d the size of a head:

      a = softmax(Q(q) Q(k)^T / sqrt(d) + bias)
      y = Q_u(dropout(a)) Q(v)

  `Q_u` is unsigned. Softmax is in float32 or better. Where nothing is quantized and no dropout is
  active, `jax.nn.dot_product_attention` computes the same in one call, which may never hold `a`.

  Attributes:
    act: the quantizer of q, k and v (signed), or None. The scales are the parameters
      'scores/lhs/quant_scale', 'scores/rhs/quant_scale' and 'mix/rhs/quant_scale'.
    probs_act: the quantizer of a (unsigned), or None. Parameter 'mix/lhs/quant_scale'.
    dropout: the rate at which entries of a are dropped in training, from 0 to 1.
    implementation: of `jax.nn.dot_product_attention`: 'xla', 'cudnn' (on NVIDIA GPUs, with 16-bit
      floats) or None, which leaves it the choice.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from saq_jax import LSQ
    >>> product = DotProductAttention(LSQ(bits=8), LSQ(bits=8, signed=False))
    >>> q = k = v = jnp.ones((2, 5, 3, 4))  # batch, tokens, heads, size of a head
    >>> y, variables = product.init_with_output(jax.random.key(0), q, k, v, train=False)
    >>> y.shape, sorted(variables['params'])
    ((2, 5, 3, 4), ['mix', 'scores'])
  """

  act: Quantizer | None = None
  probs_act: Quantizer | None = None
  dropout: float = 0.0
  implementation: Implementation = None

  @nn.compact
  def __call__(
    self, q: Array, k: Array, v: Array, bias: Array | None = None, *, train: bool
  ) -> Array:
    """Attends: q, k, v [..., N, heads, d], bias [..., heads, N, N]; the shape of q comes back."""
    quantizers = [x for x in (self.act, self.probs_act) if x is not None and x.bits is not None]
    if quantizers or (train and self.dropout > 0):
      return self.unfused(q, k, v, bias, train=train)
    if bias is not None and q.ndim > 4:
      # The fused product knows one batch axis, along which its bias is whole or one.
      bias = jnp.broadcast_to(bias, (*q.shape[:-3], *bias.shape[-3:]))
      bias = bias.reshape(-1, *bias.shape[-3:])
    shape, (q, k, v) = q.shape, (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    # Parameters are made on any machine, and the place where they are used may be another one.
    implementation = None if self.is_initializing() else self.implementation
    if bias is not None and implementation == 'cudnn':
      bias = bias.astype(q.dtype)
    y = jax.nn.dot_product_attention(q, k, v, bias, implementation=implementation)
    return y.reshape(shape)

  @nn.nowrap
  def unfused(
    self, q: Array, k: Array, v: Array, bias: Array | None = None, *, train: bool
  ) -> Array:
    """Attends by two `Einsum`s, quantized or not; runs inside of a call of this module.

    Args:
      q: queries [..., N, heads, d].
      k: keys, of the same shape.
      v: values, of the same shape.
      bias: added to the logits: broadcasts to [..., heads, N, N]; or None.
      train: whether dropout is active; it takes the random key 'dropout'.

    Returns:
      An array of the shape and dtype of q.
    """
    wide = functools.partial(
      jnp.einsum, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32)
    )
    scores = Einsum('...qhd,...khd->...hqk', self.act, self.act, einsum=wide, name='scores')
    logits = scores(q, k) * q.shape[-1] ** -0.5
    probs = nn.softmax(logits if bias is None else (logits + bias).astype(logits.dtype))
    probs = nn.Dropout(self.dropout, name='drop')(probs, deterministic=not train)
    mix = Einsum('...hqk,...khd->...qhd', self.probs_act, self.act, einsum=_narrow, name='mix')
    return mix(probs, v)


def _narrow(equation: str, probs: Array, v: Array) -> Array:
  """An einsum in the dtype of v: probabilities are rounded to it only after they are quantized."""
  return jnp.einsum(equation, probs.astype(v.dtype), v)


class SelfAttention(nn.Module):
  """Multi-head self-attention, its input quantized once for q, k and v.

  Attributes:
    heads: a divisor of the number of channels.
    act: the quantizer of all operands of products, made signed here, for the probabilities
      unsigned; or None. The input's scale is the parameter 'input/quant_scale'.
    dropout: the rate after the projection.
    attn_dropout: the rate on the probabilities.
    implementation: of `jax.nn.dot_product_attention`.
    dtype: of the computation.

  Raises:
    ValueError: if the heads do not divide the channels.
  """

  heads: int
  act: Quantizer | None = None
  dropout: float = 0.0
  attn_dropout: float = 0.0
  implementation: Implementation = None
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, bias: Array | None = None, *, train: bool) -> Array:
    """Maps tokens [..., N, C] to [..., N, C]; the bias [..., heads, N, N] joins the logits."""
    width = x.shape[-1]
    if width % self.heads:
      raise ValueError(f'attention with heads={self.heads}: must divide the {width} channels.')
    act = with_sign(self.act, True)
    dense = functools.partial(
      Dense, width, dtype=self.dtype, kernel_init=kernel_init, input_quantizer=act
    )
    inputs = x if act is None else ActQuant(act, name='input')(x)
    by_head = (*x.shape[:-1], self.heads, width // self.heads)
    q, k, v = (dense(input_is_quantized=True, name=n)(inputs).reshape(by_head) for n in 'qkv')
    y = DotProductAttention(
      act,
      with_sign(self.act, False),
      dropout=self.attn_dropout,
      implementation=self.implementation,
      name='product',
    )(q, k, v, bias, train=train)
    y = dense(name='proj')(y.reshape(x.shape))
    return nn.Dropout(self.dropout)(y, deterministic=not train)


class Mlp(nn.Module):
  """Two dense layers with an exact GELU between them, both inputs quantized.

  Attributes:
    hidden: channels between the layers.
    act: the quantizer of both inputs, made signed here; or None.
    dropout: the rate after each layer.
    dtype: of the computation.
  """

  hidden: int
  act: Quantizer | None = None
  dropout: float = 0.0
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Maps [..., C] to [..., C]."""
    dense = functools.partial(
      Dense,
      dtype=self.dtype,
      kernel_init=kernel_init,
      input_quantizer=with_sign(self.act, True),
    )
    y = nn.gelu(dense(self.hidden, name='fc1')(x), approximate=False)
    y = nn.Dropout(self.dropout)(y, deterministic=not train)
    y = dense(x.shape[-1], name='fc2')(y)
    return nn.Dropout(self.dropout)(y, deterministic=not train)


class StochasticDepth(nn.Module):
  r"""Drops a residual branch for a whole example (Huang et al., arXiv 1603.09382).

  With p the rate and b one Bernoulli(1 - p) an example: `y = b x / (1 - p)` in training, so that
  its mean is x, and `y = x` otherwise. The random key is 'dropout'; none is needed where nothing
  can be dropped.

  Attributes:
    rate: p, at least 0 and below 1.

  Raises:
    ValueError: if the rate is not in that range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> layer, x = StochasticDepth(0.5), jnp.ones((4, 2))
    >>> y = layer.apply({}, x, train=True, rngs={'dropout': jax.random.key(1)})
    >>> set(y.sum(1).tolist()) <= {0.0, 4.0}
    True
  """

  rate: float

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Maps a branch [B, ...] to the same shape."""
    if not 0 <= self.rate < 1:
      raise ValueError(f'StochasticDepth(rate={self.rate}): must be at least 0 and below 1.')
    drop = nn.Dropout(self.rate, broadcast_dims=range(1, x.ndim))
    return drop(x, deterministic=not train)

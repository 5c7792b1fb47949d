"""The loss of a batch and how much of it is right, for plain and for mixed labels."""

import jax
import jax.numpy as jnp
import optax
from jax import Array


def cross_entropy(logits: Array, labels: Array, smoothing: float) -> Array:
  """Softmax cross-entropy of each example, in float32 or better.

  Args:
    logits: [B, classes].
    labels: int32 [B], or targets that sum to 1, [B, classes].
    smoothing: alpha: the target is `(1 - alpha) onehot + alpha/classes`.

  Returns:
    [B].
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1])
  return optax.safe_softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))


def hits(logits: Array, labels: Array) -> Array:
  """How far the largest logit of each example is right.

  Args:
    logits: [B, classes].
    labels: int32 [B], or targets that sum to 1, [B, classes].

  Returns:
    [B]: 1 where it is that of the label and 0 elsewhere; of mixed targets its share in the target.
  """
  best = jnp.argmax(logits, -1)
  if labels.ndim == 1:
    return best == labels
  return jnp.take_along_axis(labels, best[:, None], -1)[:, 0]

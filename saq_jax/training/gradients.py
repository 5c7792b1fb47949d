"""The gradients of a step as functions of the weights: of a batch, in parts, of a part of it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from saq_jax import _axes as axes
from saq_jax._paths import PyTree
from saq_jax.choices import hardest
from saq_jax.training.loss import cross_entropy, hits
from saq_jax.training.sharding import Layout
from saq_jax.training.state import variables


class Seen(NamedTuple):
  """What a pass saw beside the mean loss.

  Attributes:
    batch_stats: running statistics after it.
    accuracy: on its examples.
    losses: [B], of each example; None where the batch went through in parts.
  """

  batch_stats: PyTree
  accuracy: Array
  losses: Array | None


# (z, batch_stats, model) -> ((loss, seen), gradient)
GradFn = Callable[[PyTree, PyTree, nn.Module], tuple[tuple[Array, Seen], PyTree]]
# The same, with the clean loss of each example.
SecondFn = Callable[[PyTree, PyTree, nn.Module, Array | None], tuple[tuple[Array, Seen], PyTree]]


class Gradients(NamedTuple):
  """What the two passes of a step compute.

  Attributes:
    first: at z; None where the strategy has no use for it.
    second: at the perturbed point.
    first_is_whole: whether `first` sees the whole batch, so that statistics come from it.
  """

  first: GradFn | None
  second: SecondFn
  first_is_whole: bool


@dataclasses.dataclass(frozen=True)
class PassConfig:
  """How the gradients are taken.

  Attributes:
    label_smoothing: 0 to below 1.
    batch_stats_from_both: running statistics move in the second pass too.
    second_pass_float32: the second pass computes in float32, whatever the model does.
    accumulate: parts that each gradient is added up from.
    shards: devices that the batch is spread over; each part has a piece of each one's share.
    first_examples: the part of the batch of which the first gradient is taken; 0 for none.
    second_examples: the part of which the second is: where the perturbation raises the loss most.
  """

  label_smoothing: float = 0.0
  batch_stats_from_both: bool = False
  second_pass_float32: bool = True
  accumulate: int = 1
  shards: int = 1
  first_examples: float = 1.0
  second_examples: float = 1.0


def gradients(images: Array, labels: Array, key: Array, config: PassConfig) -> Gradients:
  """Makes the gradients of a step.

  Args:
    images: floating [B, H, W, C], normalised.
    labels: int32 [B], or float32 [B, classes].
    key: of dropout; both passes drop the same units, where they see the same examples.
    config: of which examples, and how.

  Returns:
    Both, as functions of the weights.
  """
  whole = batch_gradient(images, labels, key, config)
  first: GradFn | None = whole
  if not config.first_examples:
    first = None
  elif config.first_examples < 1:
    some, theirs = first_part((images, labels), config.first_examples, config.shards)
    first = batch_gradient(some, theirs, key, config)
  second: SecondFn = lambda z, stats, model, _: whole(z, stats, model)  # noqa: E731
  if config.second_examples < 1:
    second = hardest_gradient(images, labels, key, config)
  return Gradients(first, second, config.first_examples == 1)


def batch_gradient(images: Array, labels: Array, key: Array, config: PassConfig) -> GradFn:
  """Makes the gradient of the mean loss over a batch, as a function of the weights.

  With `accumulate` n the batch goes through the model in n parts, one after the other, and the
  gradient is the mean of theirs: that of the whole batch, but for norms over the batch, whose
  statistics are each part's own.

  Args:
    images: floating [B, H, W, C], normalised.
    labels: int32 [B], or float32 [B, classes].
    key: of dropout; both passes drop the same units.
    config: the loss, and the parts.

  Returns:
    A function of (z, batch_stats, model).
  """

  def loss_fn(
    z: PyTree, batch_stats: PyTree, model: nn.Module, images: Array, labels: Array, key: Array
  ) -> tuple[Array, Seen]:
    losses, right, stats = _forward(z, batch_stats, model, images, labels, key, config)
    return losses.mean(), Seen(stats, right.mean(), losses)

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  count = config.accumulate
  if count == 1:
    return lambda z, stats, model: grad_fn(z, stats, model, images, labels, key)
  parts = in_parts((images, labels), count, config.shards)

  def accumulated(z: PyTree, batch_stats: PyTree, model: nn.Module) -> Any:
    def add(carry: Any, part: Any) -> tuple[Any, None]:
      stats, sums = carry
      i, (images, labels) = part
      own_key = jax.random.fold_in(key, i)
      (loss, seen), g = grad_fn(z, stats, model, images, labels, own_key)
      return (seen.batch_stats, jax.tree.map(jnp.add, sums, (loss, seen.accuracy, g))), None

    (loss, seen), g = jax.eval_shape(
      lambda: grad_fn(z, batch_stats, model, *jax.tree.map(lambda x: x[0], parts), key)
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, seen.accuracy, g))
    begin = axes.like(images, (batch_stats, zeros))
    (stats, sums), _ = one_by_one(add, begin, (jnp.arange(count), parts))
    loss, right, g = jax.tree.map(lambda x: x / count, sums)
    return (loss, Seen(stats, right, None)), g

  return accumulated


def hardest_gradient(images: Array, labels: Array, key: Array, config: PassConfig) -> SecondFn:
  """Makes the gradient of the examples whose loss the perturbation raises most (ESAM's SDS).

  A forward pass of the whole batch finds them; see `saq_jax.hardest`. Each device finds its own, so
  that no image crosses the wire. Norms over the batch see the chosen examples in the gradient.

  Args:
    images: floating [B, H, W, C], normalised.
    labels: int32 [B], or float32 [B, classes].
    key: of dropout.
    config: the loss, and the part of the examples.

  Returns:
    A function of (z, batch_stats, model, clean losses). The loss that it returns is of the whole
    batch, and so are the statistics and the accuracy.
  """
  shards = config.shards

  def second(z: PyTree, stats: PyTree, model: nn.Module, clean: Array | None) -> Any:
    assert clean is not None
    losses, right, moved = _forward(z, stats, model, images, labels, key, config)
    places = hardest(clean, losses, config.second_examples, shards)

    def chosen(x: Array) -> Array:
      shares = x.reshape(shards, -1, *x.shape[1:])
      found = jax.vmap(lambda share, place: share[place])(shares, places)
      return found.reshape(-1, *x.shape[1:])

    part = batch_gradient(chosen(images), chosen(labels), key, config)
    _, g = part(z, stats, model)
    return (losses.mean(), Seen(moved, right.mean(), losses)), g

  return second


def over_layout(gradients: Gradients, layout: Layout) -> Gradients:
  """Takes gradients at weights that are cut over devices, and cuts them likewise.

  Args:
    gradients: of `gradients`.
    layout: of the parameters.

  Returns:
    The same, of which each brings the weights together before the model uses them.
  """

  def cut(grad_fn: Any) -> Any:
    def over(z: PyTree, *rest: Any) -> Any:
      found, g = grad_fn(layout.whole(z), *rest)
      return found, layout.spread(g)

    return over

  first = None if gradients.first is None else cut(gradients.first)
  return gradients._replace(first=first, second=cut(gradients.second))


def in_parts(tree: PyTree, count: int, shards: int) -> PyTree:
  """Cuts a batch into parts, each with a piece of every device's share.

  Args:
    tree: arrays [B, ...].
    count: parts, n; B is a multiple of n times `shards`.
    shards: devices that the batch is spread over.

  Returns:
    Arrays [n, B / n, ...], of which the second axis is spread as the first was.

  Example:
    >>> in_parts(jnp.arange(8), 2, 2).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
  """

  def cut(x: Array) -> Array:
    pieces = x.reshape(shards, count, -1, *x.shape[1:])
    return pieces.swapaxes(0, 1).reshape(count, -1, *x.shape[1:])

  return jax.tree.map(cut, tree)


def first_part(tree: PyTree, fraction: float, shards: int) -> PyTree:
  """The first examples of every device's share.

  Args:
    tree: arrays [B, ...].
    fraction: of them, above 0 and at most 1; at least one of each share is taken.
    shards: devices that the batch is spread over.

  Returns:
    Arrays [n, ...], n a multiple of `shards`.

  Example:
    >>> first_part(jnp.arange(8), 0.5, 2).tolist()
    [0, 1, 4, 5]
  """

  def cut(x: Array) -> Array:
    shares = x.reshape(shards, -1, *x.shape[1:])
    count = max(1, round(fraction * shares.shape[1]))
    return shares[:, :count].reshape(-1, *x.shape[1:])

  return jax.tree.map(cut, tree)


def _forward(
  z: PyTree,
  batch_stats: PyTree,
  model: nn.Module,
  images: Array,
  labels: Array,
  key: Array,
  config: PassConfig,
) -> tuple[Array, Array, PyTree]:
  """The loss of each example, whether it is answered right, and the new statistics."""
  logits, moved = model.apply(
    variables(z, batch_stats), images, train=True, mutable=['batch_stats'], rngs={'dropout': key}
  )
  losses = cross_entropy(logits, labels, config.label_smoothing)
  return losses, hits(logits, labels), moved.get('batch_stats', {})


def one_by_one(step: Any, carry: Any, parts: Any) -> tuple[Any, Any]:
  """`jax.lax.scan`, written out for a CPU, where XLA's convolutions in a loop are 40x slower.

  Args:
    step: (carry, part) -> (carry, result).
    carry: at the start.
    parts: a tree of arrays, whose first axis is gone through.

  Returns:
    The carry at the end, and the results, stacked.
  """
  return jax.lax.scan(step, carry, parts, unroll=jax.default_backend() == 'cpu')

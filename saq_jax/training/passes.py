"""The two gradients of a step: on a batch at once, in parts, or group by group."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from saq_jax import _axes as axes
from saq_jax._paths import PyTree
from saq_jax.training.loss import cross_entropy, hits
from saq_jax.training.network import Network
from saq_jax.training.sharding import Layout
from saq_jax.training.state import variables

# (z, batch_stats, model) -> ((loss, (new batch_stats, accuracy)), gradient)
GradFn = Callable[[PyTree, PyTree, nn.Module], tuple[tuple[Array, tuple[PyTree, Array]], PyTree]]
UpdateFn = Callable[..., tuple[PyTree, Any]]


class Found(NamedTuple):
  """What the two passes found.

  Attributes:
    loss: of the first pass.
    accuracy: of the first pass.
    batch_stats: running statistics after the pass, or both, that the settings say.
    loss_perturbed: of the second pass; None where there is none.
  """

  loss: Array
  accuracy: Array
  batch_stats: PyTree
  loss_perturbed: Array | None


@dataclasses.dataclass(frozen=True)
class PassConfig:
  """How the gradients are taken.

  Attributes:
    label_smoothing: 0 to below 1.
    batch_stats_from_both: running statistics move in the second pass too.
    second_pass_float32: the second pass computes in float32, whatever the model does.
    accumulate: parts that each gradient is added up from.
    shards: devices that the batch is spread over; each part has a piece of each one's share.
  """

  label_smoothing: float = 0.0
  batch_stats_from_both: bool = False
  second_pass_float32: bool = True
  accumulate: int = 1
  shards: int = 1


@dataclasses.dataclass(frozen=True)
class Groups:
  """A perturbation for each group of examples (m-sharpness) instead of one for the batch.

  Attributes:
    slot: `saq(..., has_aux=True)` or `qat`, without an axis.
    optimizer: that follows it.
    mesh: the devices; each goes through its own share of the batch.
    size: examples a group, which divides a device's share; None for the share itself.
  """

  slot: optax.GradientTransformationExtraArgs
  optimizer: optax.GradientTransformation
  mesh: Mesh
  size: int | None = None


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
  ) -> tuple[Array, tuple[PyTree, Array]]:
    logits, moved = model.apply(
      variables(z, batch_stats), images, train=True, mutable=['batch_stats'], rngs={'dropout': key}
    )
    loss = cross_entropy(logits, labels, config.label_smoothing).mean()
    return loss, (moved.get('batch_stats', {}), hits(logits, labels).mean())

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
      (loss, (stats, right)), g = grad_fn(z, stats, model, images, labels, own_key)
      return (stats, jax.tree.map(jnp.add, sums, (loss, right, g))), None

    (_, (_, right)), _ = shapes = jax.eval_shape(
      lambda: grad_fn(z, batch_stats, model, *jax.tree.map(lambda x: x[0], parts), key)
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0][0], right, shapes[1]))
    (stats, sums), _ = _one_by_one(add, (batch_stats, zeros), (jnp.arange(count), parts))
    loss, right, g = jax.tree.map(lambda x: x / count, sums)
    return (loss, (stats, right)), g

  return accumulated


def two_passes(
  update_fn: UpdateFn,
  opt_state: Any,
  params: PyTree,
  z: PyTree,
  batch_stats: PyTree,
  grad_fn: GradFn,
  network: Network,
  config: PassConfig,
) -> tuple[PyTree, Any, Found]:
  """The clean gradient at z, and the second one inside the transformation.

  Args:
    update_fn: of the chain, or of its first link alone.
    opt_state: its state, with the `SAQState` as itself or first.
    params: the latent weights.
    z: `network.quantize(params)`.
    batch_stats: running statistics.
    grad_fn: of `batch_gradient`.
    network: model and weight quantizer.
    config: which pass moves the running statistics, and in what the second computes.

  Returns:
    The updates, the new state without the second pass's `aux`, and what the passes found.
  """
  (loss, (stats, accuracy)), g = grad_fn(z, batch_stats, network.model)
  # In bfloat16 most of a perturbation is below the spacing of the weights, and is rounded away.
  again = network.model.clone(dtype=None) if config.second_pass_float32 else network.model

  # So it is where an accelerator takes float32 products in bfloat16 or TF32, as they do by default.
  precision = 'highest' if config.second_pass_float32 else None

  def second_grad(z: PyTree) -> tuple[PyTree, tuple[Array, PyTree]]:
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
      (loss, (stats_after_both, _)), g2 = grad_fn(z, stats, again)
    return g2, (loss, stats_after_both)

  updates, opt_state = update_fn(g, opt_state, params, grad_fn=second_grad)
  alone = hasattr(opt_state, 'aux')
  slot = opt_state if alone else opt_state[0]
  perturbed = None
  if slot.aux is not None:
    perturbed, stats_after_both = slot.aux
    stats = stats_after_both if config.batch_stats_from_both else stats
  slot = slot._replace(aux=None)
  opt_state = slot if alone else (slot, *opt_state[1:])
  return updates, opt_state, Found(loss, accuracy, stats, perturbed)


def grouped_passes(
  groups: Groups,
  slot_state: Any,
  params: PyTree,
  batch_stats: PyTree,
  images: Array,
  labels: Array,
  key: Array,
  network: Network,
  config: PassConfig,
) -> tuple[PyTree, Any, Found]:
  """The sharpness-aware gradient of each group of examples by itself, and the mean of all.

  Each device goes through the groups of its share of the batch one by one; one mean over the
  devices ends it. Nothing else crosses the wire: the clean gradients, the perturbations and the
  statistics of norms over the batch are each group's own (m-sharpness, arXiv 2010.01412, section
  4.1; the authors' code does so with a group a GPU).

  Args:
    groups: the first link of the chain, the devices, and the size of a group.
    slot_state: its state.
    params: the latent weights, on every device.
    batch_stats: running statistics.
    images: [B, ...], spread over the devices.
    labels: [B] or [B, classes], likewise.
    key: of dropout; each group has its own.
    network: model and weight quantizer.
    config: of the passes.

  Returns:
    As `two_passes`, for the first link.
  """
  names = groups.mesh.axis_names
  whole, split = PartitionSpec(), PartitionSpec(names)

  def device(params: PyTree, stats: PyTree, slot_state: Any, key: Array, *batch: Array) -> Any:
    # Else a gradient with respect to what all devices share would be summed over them by JAX.
    params, stats, slot_state = axes.own((params, stats, slot_state), names)
    count = len(batch[0]) // (groups.size or len(batch[0]))
    parts = in_parts(batch, count, 1)
    first = jax.lax.axis_index(names) * count

    def one(stats: PyTree, part: Any) -> tuple[PyTree, Any]:
      i, (images, labels) = part
      grad_fn = batch_gradient(images, labels, jax.random.fold_in(key, first + i), config)
      z = network.quantize(params)
      updates, state, found = two_passes(
        groups.slot.update, slot_state, params, z, stats, grad_fn, network, config
      )
      return found.batch_stats, (updates, state, found)

    stats, each = _one_by_one(one, stats, (jnp.arange(count), parts))
    updates, state, found = axes.mean(
      jax.tree.map(lambda x: x.mean(0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0], each),
      names,
    )
    return updates, state, found._replace(batch_stats=axes.mean(stats, names))

  updates, state, found = jax.shard_map(
    device,
    mesh=groups.mesh,
    in_specs=(whole, whole, whole, whole, split, split),
    out_specs=whole,
  )(params, batch_stats, slot_state, key, images, labels)
  wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), updates)
  return updates, state._replace(sharp_grad_norm=optax.tree.norm(wide)), found


def over_layout(grad_fn: GradFn, layout: Layout) -> GradFn:
  """Takes the gradient at weights that are cut over devices, and cuts it likewise.

  Args:
    grad_fn: of `batch_gradient`.
    layout: of the parameters.

  Returns:
    A function like it, which brings the weights together before the model uses them.
  """

  def cut(z: PyTree, batch_stats: PyTree, model: nn.Module) -> Any:
    found, g = grad_fn(layout.whole(z), batch_stats, model)
    return found, layout.spread(g)

  return cut


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


def _one_by_one(step: Any, carry: Any, parts: Any) -> tuple[Any, Any]:
  """`jax.lax.scan`, written out for a CPU, where XLA's convolutions in a loop are 40x slower."""
  return jax.lax.scan(step, carry, parts, unroll=jax.default_backend() == 'cpu')

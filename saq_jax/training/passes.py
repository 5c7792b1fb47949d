"""The two passes of a step: over the batch at once, or group by group."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from saq_jax import _axes as axes
from saq_jax._paths import PyTree
from saq_jax.perturbation import ratio, wide
from saq_jax.training.gradients import Gradients, PassConfig, Seen, gradients, in_parts, one_by_one
from saq_jax.training.network import Network


class Found(NamedTuple):
  """What the two passes found.

  Attributes:
    loss: of the first pass; of the only one, if there is one.
    accuracy: likewise.
    batch_stats: running statistics after the pass, or both, that the settings say.
    loss_perturbed: of the second pass, 0 where it was skipped; None where there is none.
  """

  loss: Array
  accuracy: Array
  batch_stats: PyTree
  loss_perturbed: Array | None


@dataclasses.dataclass(frozen=True)
class Groups:
  """A perturbation for each group of examples (m-sharpness) instead of one for the batch.

  Attributes:
    slot: `saq(..., has_aux=True)`, a strategy of it, or `qat`, without an axis.
    optimizer: that follows it.
    mesh: the devices; each goes through its own share of the batch.
    size: examples a group, which divides a device's share; None for the share itself.
  """

  slot: optax.GradientTransformationExtraArgs
  optimizer: optax.GradientTransformation
  mesh: Mesh
  size: int | None = None


def two_passes(
  tx: optax.GradientTransformationExtraArgs,
  opt_state: Any,
  params: PyTree,
  z: PyTree,
  batch_stats: PyTree,
  grads: Gradients,
  network: Network,
  config: PassConfig,
  taken: bool | None = None,
) -> tuple[PyTree, Any, Found]:
  """The clean gradient at z, and the second one inside the transformation.

  Args:
    tx: an `optax.chain` that begins with `saq(has_aux=True)`, a strategy of it, or `qat`.
    opt_state: its state.
    params: the latent weights.
    z: `network.quantize(params)`.
    batch_stats: running statistics.
    grads: of `gradients`.
    network: model and weight quantizer.
    config: which pass moves the running statistics, and in what the second computes.
    taken: whether a strategy takes the second gradient, where that is known before the step.

  Returns:
    The updates, the new state without the second pass's `aux`, and what the passes found. Where
    the first pass is left out or sees a part of the batch, statistics come from the second.
  """
  first: tuple[Array, Seen] | None = None
  if grads.first is None:
    g = jax.tree.map(jnp.zeros_like, z)
  else:
    first, g = grads.first(z, batch_stats, network.model)
  began = first[1].batch_stats if first and config.batch_stats_from_both else batch_stats
  clean = first[1].losses if first else None
  # In bfloat16 most of a perturbation is below the spacing of the weights, and is rounded away.
  again = network.model.clone(dtype=None) if config.second_pass_float32 else network.model
  # So it is where an accelerator takes float32 products in bfloat16 or TF32, as they do by default.
  precision = 'highest' if config.second_pass_float32 else None

  def second_grad(z: PyTree) -> tuple[PyTree, tuple[Array, Seen]]:
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
      found, g2 = grads.second(z, began, again, clean)
    return g2, found

  updates, (slot, *rest) = tx.update(g, opt_state, params, grad_fn=second_grad, taken=taken)
  found = _found(first, slot, grads.first_is_whole, config.batch_stats_from_both)
  return updates, (slot._replace(aux=None), *rest), found


def _found(first: tuple[Array, Seen] | None, slot: Any, first_is_whole: bool, both: bool) -> Found:
  """Puts together what the passes saw; the second may have been skipped at run time."""
  if slot.aux is None:
    assert first is not None
    return Found(first[0], first[1].accuracy, first[1].batch_stats, None)
  perturbed, second = slot.aux
  if first is None:
    return Found(perturbed, second.accuracy, second.batch_stats, None)
  stats = first[1].batch_stats
  if both or not first_is_whole:
    stats = jax.tree.map(lambda a, b: jnp.where(slot.second > 0, b, a), stats, second.batch_stats)
  return Found(first[0], first[1].accuracy, stats, perturbed)


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
  taken: bool | None = None,
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
    taken: as in `two_passes`.

  Returns:
    As `two_passes`, for the first link.
  """
  names = groups.mesh.axis_names
  slot, config = optax.chain(groups.slot), dataclasses.replace(config, shards=1)
  whole, split = PartitionSpec(), PartitionSpec(names)

  def device(params: PyTree, stats: PyTree, slot_state: Any, key: Array, *batch: Array) -> Any:
    # Else a gradient with respect to what all devices share would be summed over them by JAX.
    params, stats, slot_state = axes.own((params, stats, slot_state), names)
    count = len(batch[0]) // (groups.size or len(batch[0]))
    parts = in_parts(batch, count, 1)
    first = jax.lax.axis_index(names) * count

    def one(stats: PyTree, part: Any) -> tuple[PyTree, Any]:
      i, (images, labels) = part
      grads = gradients(images, labels, jax.random.fold_in(key, first + i), config)
      z = network.quantize(params)
      updates, (state,), found = two_passes(
        slot, (slot_state,), params, z, stats, grads, network, config, taken
      )
      # The step is a whole number, of which no mean is taken.
      return found.batch_stats, (updates, state._replace(step=None), found)

    stats, each = one_by_one(one, stats, (jnp.arange(count), parts))
    updates, state, found = axes.mean(jax.tree.map(lambda x: x.mean(0), each), names)
    return updates, state, found._replace(batch_stats=axes.mean(stats, names))

  updates, state, found = jax.shard_map(
    device,
    mesh=groups.mesh,
    in_specs=(whole, whole, whole, whole, split, split),
    out_specs=whole,
  )(params, batch_stats, slot_state, key, images, labels)
  if found.loss_perturbed is not None:  # the mean of those groups that took a second gradient
    found = found._replace(loss_perturbed=ratio(found.loss_perturbed, state.second))
  state = state._replace(
    step=optax.safe_increment(slot_state.step), sharp_grad_norm=optax.tree.norm(wide(updates))
  )
  return updates, state, found

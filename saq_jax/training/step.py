"""One training step and one evaluation step: pure functions of the state and a batch."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from saq_jax._paths import PyTree
from saq_jax.data import augment, mix
from saq_jax.training.gather import gather_weights
from saq_jax.training.gradients import PassConfig, gradients, over_layout
from saq_jax.training.loss import cross_entropy, hits
from saq_jax.training.network import Network
from saq_jax.training.passes import Groups, grouped_passes, two_passes
from saq_jax.training.sharding import Layout
from saq_jax.training.state import TrainState, variables

Batch = dict[str, Array]
Metrics = dict[str, Array]

# Of the step's key; crops and flips split the key itself, which takes 0 and 1.
_DROPOUT, _ERASING, _MIXING = 2, 3, 4


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """What a step does beside the network and the optimizer.

  Attributes:
    mean: of the channels, of pixels in 0 to 1.
    std: of the channels.
    pad_crop: pixels of padding before a random crop; 0 is none.
    flip: random horizontal flips.
    erasing: probability that a box of an image becomes noise.
    mixup: alpha of mixup; 0 is none.
    cutmix: alpha of cutmix; 0 is none.
    num_classes: of the labels; where they are mixed alone.
    label_smoothing: 0 to below 1.
    batch_stats_from_both: running statistics move in the second pass too.
    second_pass_float32: the second pass computes in float32, whatever the model does.
    accumulate: parts that each gradient is added up from.
    shards: devices that the batch is spread over.
    gather_codes: where weights are cut over devices, send integer codes for the first pass.
    first_examples: the part of the batch of which the first gradient is taken; 0 for none.
    second_examples: the part of the batch of which the second is.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  pad_crop: int = 0
  flip: bool = False
  erasing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0
  num_classes: int = 0
  label_smoothing: float = 0.0
  batch_stats_from_both: bool = False
  second_pass_float32: bool = True
  accumulate: int = 1
  shards: int = 1
  gather_codes: bool = False
  first_examples: float = 1.0
  second_examples: float = 1.0

  @property
  def passes(self) -> PassConfig:
    """What of it concerns the gradients."""
    return PassConfig(
      self.label_smoothing,
      self.batch_stats_from_both,
      self.second_pass_float32,
      self.accumulate,
      self.shards,
      self.first_examples,
      self.second_examples,
    )


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  network: Network,
  tx: optax.GradientTransformationExtraArgs,
  lr: optax.Schedule,
  config: StepConfig,
  groups: Groups | None = None,
  layout: Layout | None = None,
  taken: bool | None = None,
) -> tuple[TrainState, Metrics]:
  """One step from a batch as it comes from the host; see `train_on`.

  Args:
    state: with the seed that, folded with the step, gives the key of the augmentation.
    batch: 'image' uint8 [B, H, W, C] and 'label' int32 [B]; 'damaged' bool [B] is counted.
    network: as in `train_on`, like the other arguments.
    tx: the chain.
    lr: the schedule.
    config: augmentation, loss and batch statistics.
    groups: as in `train_on`.
    layout: as in `train_on`.
    taken: as in `train_on`.

  Returns:
    As `train_on`.
  """
  images, labels = augmented(batch, config, step_key(state))
  state, metrics = train_on(
    state,
    images,
    labels,
    network=network,
    tx=tx,
    lr=lr,
    config=config,
    groups=groups,
    layout=layout,
    taken=taken,
  )
  if 'damaged' in batch:
    metrics['damaged'] = jnp.sum(batch['damaged'])
  return state, metrics


def step_key(state: TrainState) -> Array:
  """The key of all random numbers of a step: of the run's seed and the number of steps taken.

  Args:
    state: before the step.

  Returns:
    A JAX random key.
  """
  return jax.random.fold_in(jax.random.key(state.seed), state.step)


def train_on(
  state: TrainState,
  images: Array,
  labels: Array,
  *,
  network: Network,
  tx: optax.GradientTransformationExtraArgs,
  lr: optax.Schedule,
  config: StepConfig,
  groups: Groups | None = None,
  layout: Layout | None = None,
  taken: bool | None = None,
) -> tuple[TrainState, Metrics]:
  """The clean gradient at z = quantize(params), the second one inside `tx`, and the update.

  Both passes see the same images and drop the same units. Under `jax.jit` with a batch sharded over
  devices, gradients, norms and batch statistics are those of the global batch.

  Args:
    state: its `opt_state` begins with the `SAQState` of `saq(has_aux=True)`, a strategy of it, or
      `qat`.
    images: floating [B, H, W, C], normalised.
    labels: int32 [B], or float32 [B, classes] where they are mixed.
    network: model and weight quantizer.
    tx: `optax.chain(slot, ...)` with one of these as slot.
    lr: the schedule, for the metrics.
    config: loss, batch statistics and the second pass.
    groups: takes a perturbation for each group of examples instead of one; its slot and optimizer
      are then those of `tx`.
    layout: of the parameters, where they are cut over devices.
    taken: whether a strategy takes the second gradient, where that is known before the step.

  Returns:
    The next state, and the metrics of this step as scalars: loss, accuracy, lr, grad_norm,
    sharp_grad_norm, cosine and second (see `SAQState`), and for `saq` rho and loss_perturbed,
    which is 0 where the second gradient was skipped. With `track_oscillation` in `tx` also
    codes_changed and codes_oscillating.
  """
  key = jax.random.fold_in(step_key(state), _DROPOUT)
  slot_state, *rest = state.opt_state
  if groups is None:
    grads = gradients(images, labels, key, config.passes)
    if layout is None:
      z = network.quantize(state.params)
    else:
      z = gather_weights(network.quantize, state.params, layout, codes=config.gather_codes)
      grads = over_layout(grads, layout)
    updates, opt_state, found = two_passes(
      tx,
      state.opt_state,
      state.params,
      z,
      state.batch_stats,
      grads,
      network,
      config.passes,
      taken,
    )
    slot_state = opt_state[0]
  else:
    sharp, slot_state, found = grouped_passes(
      groups,
      slot_state,
      state.params,
      state.batch_stats,
      images,
      labels,
      key,
      network,
      config.passes,
      taken,
    )
    updates, after = groups.optimizer.update(sharp, rest[0], state.params)
    opt_state = (slot_state, after)
  metrics = {
    'loss': found.loss,
    'accuracy': found.accuracy,
    'lr': lr(state.step),
    'grad_norm': slot_state.grad_norm,
    'sharp_grad_norm': slot_state.sharp_grad_norm,
    'cosine': slot_state.cosine,
    'second': slot_state.second,
  }
  if found.loss_perturbed is not None:
    metrics |= {'rho': slot_state.rho, 'loss_perturbed': found.loss_perturbed}
  for name in ('changed', 'oscillating'):
    if (codes := optax.tree.get(opt_state, name)) is not None:
      metrics[f'codes_{name}'] = codes
  return state.replace(  # type: ignore[attr-defined]
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=found.batch_stats,
    opt_state=opt_state,
  ), metrics


def eval_step(
  z: PyTree, batch_stats: PyTree, batch: Batch, *, network: Network, config: StepConfig
) -> Metrics:
  """Sums over the real examples of one padded batch, from which an exact mean is made.

  Args:
    z: quantized parameters, `network.quantize(params)`.
    batch_stats: running statistics.
    batch: as in `train_step`, and 'mask' [B], 1 for an example and 0 for padding or damage.
    network: model and weight quantizer.
    config: the normalisation; nothing random is done, and no label is smoothed.

  Returns:
    'correct', 'loss' and 'count', each a sum, and 'damaged' where the batch has it.
  """
  images = prepare_images(batch['image'], config)
  logits: Array = network.model.apply(  # type: ignore[assignment]
    variables(z, batch_stats), images, train=False
  )
  sums = {
    'correct': jnp.sum(hits(logits, batch['label']) * batch['mask']),
    'loss': jnp.sum(cross_entropy(logits, batch['label'], 0.0) * batch['mask']),
    'count': jnp.sum(batch['mask']),
  }
  return sums | ({'damaged': jnp.sum(batch['damaged'])} if 'damaged' in batch else {})


def augmented(batch: Batch, config: StepConfig, key: Array) -> tuple[Array, Array]:
  """What a training step sees of a batch.

  Args:
    batch: 'image' uint8 [B, H, W, C] and 'label' int32 [B].
    config: means, deviations and augmentation.
    key: of the step.

  Returns:
    Images, float32 [B, H, W, C], and labels, int32 [B], or float32 [B, classes] if they are mixed.
  """
  images, labels = prepare_images(batch['image'], config, key), batch['label']
  if not (config.mixup or config.cutmix):
    return images, labels
  targets = jax.nn.one_hot(labels, config.num_classes)
  mixing = jax.random.fold_in(key, _MIXING)
  return mix.mix(mixing, images, targets, config.mixup, config.cutmix)


def prepare_images(images: Array, config: StepConfig, key: Array | None = None) -> Array:
  """Augments (where there is a key) and normalises uint8 images.

  Args:
    images: uint8 [B, H, W, C].
    config: means, deviations and augmentation.
    key: of the augmentation; None for none.

  Returns:
    float32 [B, H, W, C].
  """
  if key is not None:
    crop_key, flip_key = jax.random.split(key)
    if config.pad_crop:
      images = augment.pad_crop(crop_key, images, config.pad_crop)
    if config.flip:
      images = augment.flip(flip_key, images)
  normalized = augment.normalize(images, config.mean, config.std)
  if key is None or not config.erasing:
    return normalized
  return mix.erase(jax.random.fold_in(key, _ERASING), normalized, config.erasing)


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

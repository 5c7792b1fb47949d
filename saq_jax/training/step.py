"""One training step and one evaluation step: pure functions of the state and a batch."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from saq_jax._paths import PyTree
from saq_jax.data import augment, mix
from saq_jax.training.network import Network
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


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  network: Network,
  tx: optax.GradientTransformationExtraArgs,
  lr: optax.Schedule,
  config: StepConfig,
) -> tuple[TrainState, Metrics]:
  """One step from a batch as it comes from the host; see `train_on`.

  Args:
    state: with the seed that, folded with the step, gives the key of the augmentation.
    batch: 'image' uint8 [B, H, W, C] and 'label' int32 [B]; 'damaged' bool [B] is counted.
    network: as in `train_on`, like the other arguments.
    tx: the chain.
    lr: the schedule.
    config: augmentation, loss and batch statistics.

  Returns:
    As `train_on`.
  """
  images, labels = augmented(batch, config, step_key(state))
  state, metrics = train_on(state, images, labels, network=network, tx=tx, lr=lr, config=config)
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
) -> tuple[TrainState, Metrics]:
  """The clean gradient at z = quantize(params), the second one inside `tx`, and the update.

  Both passes see the same images and drop the same units. Under `jax.jit` with a batch sharded over
  devices, gradients, norms and batch statistics are those of the global batch.

  Args:
    state: its `opt_state` begins with the `SAQState` of `saq(has_aux=True)` or `qat`.
    images: floating [B, H, W, C], normalised.
    labels: int32 [B], or float32 [B, classes] where they are mixed.
    network: model and weight quantizer.
    tx: `optax.chain(saq(...) or qat(...), ...)`.
    lr: the schedule, for the metrics.
    config: loss, batch statistics and the second pass.

  Returns:
    The next state, and the metrics of this step as scalars: loss, accuracy, lr, grad_norm,
    sharp_grad_norm and cosine (see `SAQState`), and for `saq` rho and loss_perturbed.
  """

  rngs = {'dropout': jax.random.fold_in(step_key(state), _DROPOUT)}

  def loss_fn(
    z: PyTree, batch_stats: PyTree, model: nn.Module
  ) -> tuple[Array, tuple[PyTree, Array]]:
    logits, moved = model.apply(
      variables(z, batch_stats), images, train=True, mutable=['batch_stats'], rngs=rngs
    )
    loss = cross_entropy(logits, labels, config.label_smoothing).mean()
    return loss, (moved.get('batch_stats', {}), hits(logits, labels).mean())

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  z = network.quantize(state.params)
  (loss, (stats, accuracy)), g = grad_fn(z, state.batch_stats, network.model)

  # In bfloat16 most of a perturbation is below the spacing of the weights, and is rounded away.
  again = network.model.clone(dtype=None) if config.second_pass_float32 else network.model

  def second_grad(z: PyTree) -> tuple[PyTree, tuple[Array, PyTree]]:
    (loss, (stats_after_both, _)), g2 = grad_fn(z, stats, again)
    return g2, (loss, stats_after_both)

  updates, opt_state = tx.update(g, state.opt_state, state.params, grad_fn=second_grad)
  slot, *rest = opt_state
  metrics = {
    'loss': loss,
    'accuracy': accuracy,
    'lr': lr(state.step),
    'grad_norm': slot.grad_norm,
    'sharp_grad_norm': slot.sharp_grad_norm,
    'cosine': slot.cosine,
  }
  if slot.aux is not None:
    loss_perturbed, stats_after_both = slot.aux
    metrics |= {'rho': slot.rho, 'loss_perturbed': loss_perturbed}
    stats = stats_after_both if config.batch_stats_from_both else stats
  return state.replace(  # type: ignore[attr-defined]
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=stats,
    opt_state=(slot._replace(aux=None), *rest),
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


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

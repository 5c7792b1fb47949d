"""From settings to the optax chain: the perturbation and the optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saq_jax._paths import is_embedding, is_norm, is_quant_scale, map_named
from saq_jax.choices import When, at_random, every, where_steep
from saq_jax.perturbation import only
from saq_jax.strategies import along_momentum, looksam, sometimes
from saq_jax.training.config import SAQConfig, StageConfig
from saq_jax.training.network import Network
from saq_jax.training.strategy_config import StrategyConfig
from saq_jax.transform import qat, saq


def build_slot(
  network: Network,
  config: SAQConfig | None,
  steps_per_epoch: float,
  strategy: StrategyConfig = StrategyConfig(),  # noqa: B008
  *,
  total_steps: int = 1,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """The first link of the chain: `qat` where there is no config, else `saq` or a strategy of it.

  Args:
    network: whose quantizer it uses.
    config: of the perturbation.
    steps_per_epoch: to turn its warm-up into steps; rho is 0 before.
    strategy: which steps take the second gradient, and which tensors are perturbed.
    total_steps: of the stage, for what changes over it.
    seed: of what is drawn at random.

  Returns:
    The transformation. `saq` leaves what the second pass returned in its state's `aux`.
  """
  if config is None:
    return qat(network.quantize)
  sharp = _build_saq(network, config, steps_per_epoch, strategy, seed)
  plain = qat(network.quantize)
  if strategy.name == 'full':
    return sharp
  if strategy.name == 'looksam':
    return looksam(sharp, plain, strategy.period, strategy.alpha)
  if strategy.name == 'momentum':
    return along_momentum(sharp, strategy.decay)
  if strategy.name == 'random':
    return sometimes(sharp, plain, _at_random(strategy, total_steps, seed))
  if strategy.name == 'adaptive':
    first, last = strategy.first_threshold, strategy.last_threshold
    when = where_steep(total_steps, first=first, last=last, decay=strategy.decay)
    return sometimes(sharp, plain, when)
  return sometimes(sharp, plain, every(strategy.period))


def known_choices(strategy: StrategyConfig, total_steps: int, seed: int) -> np.ndarray | None:
  """Which steps of a stage take the second gradient, where that is known before it begins.

  Args:
    strategy: the settings.
    total_steps: of the stage.
    seed: as for `build_slot`.

  Returns:
    bool [total_steps]; None where every step takes the same, or the gradient decides.
  """
  if strategy.name in ('interval', 'looksam'):
    return np.arange(total_steps) % strategy.period == 0
  if strategy.name != 'random':
    return None
  when = _at_random(strategy, total_steps, seed)
  with jax.ensure_compile_time_eval():  # a stage may be made while another program is traced
    return np.asarray(jax.vmap(lambda t: when.choose(t, t, None)[0])(jnp.arange(total_steps)))


def _at_random(strategy: StrategyConfig, total_steps: int, seed: int) -> When:
  first, last = strategy.first_probability, strategy.last_probability
  return at_random(optax.linear_schedule(first, last, max(1, total_steps - 1)), seed)


def _build_saq(
  network: Network,
  config: SAQConfig,
  steps_per_epoch: float,
  strategy: StrategyConfig,
  seed: int,
) -> optax.GradientTransformationExtraArgs:
  """`saq` with the mask and the radius of the settings."""
  warmup = round(config.warmup_epochs * steps_per_epoch)

  def shifted(path: str) -> bool:
    if is_quant_scale(path):
      of_weight = path.startswith('scales/')
      return config.perturb_weight_scales if of_weight else config.perturb_act_scales
    if is_norm(path):
      return config.perturb_norms
    return config.perturb_embeddings or not is_embedding(path)

  return saq(
    network.quantize,
    lambda step: jnp.where(step < warmup, 0.0, config.rho),
    case=config.case,
    mask=only(*strategy.perturb_only, among=shifted) if strategy.perturb_only else shifted,
    adaptive=config.adaptive,
    eta=config.eta,
    tensors=strategy.tensors,
    seed=seed,
    accumulate_clean_grad=config.accumulate_clean_grad,
    has_aux=True,
  )


def build_optimizer(
  stage: StageConfig, steps_per_epoch: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer that follows `saq` or `qat` in the chain.

  SGD, as PyTorch's: `d = g + decay p; m <- momentum m + d; p <- p - lr (d + momentum m)`. The
  learning rate after a linear warm-up of w of all T steps: cosine,
  `lr (1 + cos(pi (t-w)/(T-w)))/2`; step, `lr 0.1^(milestones passed)`; or constant.

  Args:
    stage: its settings; durations are in epochs.
    steps_per_epoch: training examples over the batch size, also a fraction.

  Returns:
    The optimizer, which has a learning rate of its own for the learnable scales, and the
    schedule of the other one.
  """
  lr, scale_lr = (_schedule(stage, top, steps_per_epoch) for top in (stage.lr, stage.scale_lr))
  by_group = optax.partition(
    {'weights': _base_optimizer(stage, lr), 'scales': _base_optimizer(stage, scale_lr)},
    functools.partial(map_named, lambda path, _: 'scales' if is_quant_scale(path) else 'weights'),
  )
  if stage.clip_norm is None:
    return by_group, lr
  return optax.chain(optax.clip_by_global_norm(stage.clip_norm), by_group), lr


def total_steps(stage: StageConfig, steps_per_epoch: float) -> int:
  """Steps in the stage, at least one.

  Args:
    stage: with its epochs.
    steps_per_epoch: training examples over the batch size.

  Returns:
    epochs times steps an epoch, rounded, at least 1.
  """
  return max(1, round(stage.epochs * steps_per_epoch))


def _schedule(stage: StageConfig, top: float, steps_per_epoch: float) -> optax.Schedule:
  """The learning rate by step."""
  warmup = round(stage.warmup_epochs * steps_per_epoch)
  rest = max(1, total_steps(stage, steps_per_epoch) - warmup)
  main: optax.Schedule
  if stage.schedule == 'cosine':
    main = optax.cosine_decay_schedule(top, rest)
  elif stage.schedule == 'step':
    drops: dict[int, float] = {}
    for epoch in stage.milestones:
      step = max(round(epoch * steps_per_epoch) - warmup, 0)
      drops[step] = 0.1 * drops.get(step, 1.0)
    main = optax.piecewise_constant_schedule(top, drops)
  else:
    main = optax.constant_schedule(top)
  if not warmup:
    return main
  rise = optax.linear_schedule(top / warmup, top, max(warmup - 1, 1))
  return optax.join_schedules([rise, main], [warmup])


def _base_optimizer(stage: StageConfig, lr: optax.Schedule) -> optax.GradientTransformation:
  """SGD with Nesterov momentum and decay in the gradient, or AdamW."""
  decayed = None if stage.decay == 'all' else functools.partial(map_named, _is_kernel)
  if stage.optimizer == 'adamw':
    return optax.adamw(lr, weight_decay=stage.weight_decay, mask=decayed)
  return optax.chain(
    optax.add_decayed_weights(stage.weight_decay, decayed),
    optax.sgd(lr, momentum=stage.momentum, nesterov=True),
  )


def _is_kernel(path: str, _: object) -> bool:
  return path.endswith('/kernel') and not is_quant_scale(path)

"""Settings of what makes SAQ cheaper: which steps take a second gradient, and on what."""

import dataclasses
from typing import Literal

from saq_jax.perturbation import only
from saq_jax.training.bounds import ABOVE_0, ConfigError, within


@dataclasses.dataclass(frozen=True)
class StrategyConfig:
  """Which steps of the 'saq' stage take two gradients, and of which examples and tensors.

  Attributes:
    name: 'full': every step. 'interval': every `period`-th, plain QAT between. 'looksam': the
      same, and what sharpness added is used again between. 'random': each with a probability that
      goes from `first_probability` to `last_probability`. 'adaptive': where the gradient is long
      for its kind (AE-SAM). 'momentum': none; every step takes one gradient, perturbed along a
      running mean of those before. See `saq_jax.strategies`.
    period: k of 'interval' and 'looksam'.
    alpha: of 'looksam', how much of what sharpness added is used again.
    first_probability: of 'random', at the start.
    last_probability: of 'random', at the end; linear between.
    first_threshold: of 'adaptive', deviations above the mean at the start.
    last_threshold: of 'adaptive', at the end; linear between.
    decay: of the running means of 'adaptive' and 'momentum'.
    first_examples: the part of the batch whose gradient makes the perturbation; 1 is all.
    second_examples: the part of the batch, that whose loss it raises most, of which the second
      gradient is taken (ESAM's SDS); 1 is all.
    tensors: the probability that a tensor is perturbed in a step (ESAM's SWP); 1 is all.
    perturb_only: regular expressions of whole paths ('model/.*norm.*'): no other tensor is
      perturbed (SAM-ON: the norms). Of those that the settings of `saq` leave in; empty is all.
  """

  name: Literal['full', 'interval', 'looksam', 'random', 'adaptive', 'momentum'] = 'full'
  period: int = within(5, 1)
  alpha: float = within(0.2, 0)
  first_probability: float = within(0.5, 0, 1)
  last_probability: float = within(0.5, 0, 1)
  first_threshold: float = within(1.0, -100)
  last_threshold: float = within(-1.0, -100)
  decay: float = within(0.9, 0, 0.999999)
  first_examples: float = within(1.0, ABOVE_0, 1)
  second_examples: float = within(1.0, ABOVE_0, 1)
  tensors: float = within(1.0, ABOVE_0, 1)
  perturb_only: tuple[str, ...] = ()


# Which strategies read a setting.
_READ_BY = {
  'period': ('interval', 'looksam'),
  'alpha': ('looksam',),
  'first_probability': ('random',),
  'last_probability': ('random',),
  'first_threshold': ('adaptive',),
  'last_threshold': ('adaptive',),
  'decay': ('adaptive', 'momentum'),
}


def check_strategy(
  strategy: StrategyConfig, *, accumulate: int, accumulate_clean_grad: bool
) -> None:
  """Raises ConfigError for a strategy whose settings do not go together.

  Args:
    strategy: the settings.
    accumulate: of the quantized stages.
    accumulate_clean_grad: of the perturbation.

  Raises:
    ConfigError: if they do not.
  """
  name, begins, ends = strategy.name, strategy.first_examples, strategy.second_examples
  try:
    if strategy.perturb_only:
      only(*strategy.perturb_only)
  except ValueError as error:
    raise ConfigError(f'config.strategy.perturb_only: {error}') from None
  plain = StrategyConfig()
  for setting, readers in _READ_BY.items():
    if name not in readers and getattr(strategy, setting) != getattr(plain, setting):
      raise ConfigError(
        f'config.strategy.{setting}: {name!r} does not read it: leave it out, or set '
        f'config.strategy.name to {" or ".join(map(repr, readers))}.'
      )
  if begins < 1 and name != 'full':
    raise ConfigError(
      f"config.strategy.first_examples={begins}: goes with name='full' alone, as steps without a "
      'second gradient need the whole first one.'
    )
  if ends < 1 and (begins < 1 or name == 'momentum'):
    raise ConfigError(
      f'config.strategy.second_examples={ends}: needs the loss of every example in the first pass, '
      "which first_examples below 1 and 'momentum' leave out."
    )
  if (begins < 1 or ends < 1) and accumulate > 1:
    raise ConfigError(
      f'config.quant_stage.accumulate={accumulate}: does not go with first_examples or '
      'second_examples below 1.'
    )
  if accumulate_clean_grad and (begins < 1 or name != 'full'):
    raise ConfigError(
      "config.saq.accumulate_clean_grad: goes with strategy.name='full' and first_examples=1 "
      'alone: steps that take one gradient would be half as long.'
    )

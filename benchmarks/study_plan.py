"""What the study compares: networks, bit-widths, methods with the settings tried, and seeds."""

import dataclasses
from collections.abc import Mapping

from study_data import DATA, SPLITS

from saq_jax.training.config import (
  ExperimentConfig,
  ModelConfig,
  QuantConfig,
  SAQConfig,
  StageConfig,
)
from saq_jax.training.data_config import AugmentConfig, DataConfig
from saq_jax.training.strategy_config import StrategyConfig

TUNING_BITS = 3
SHARPNESS_RHO, ADAPTIVE_RHO, ADAPTIVE_ETA = 0.1, 0.5, 0.01
_RHOS = (0.1, 0.3, 1.0, 3.0)
_LR_FACTORS = (0.1, 0.25, 0.5, 1.0)
# LookSAM's alpha goes with its period: what its authors take for each.
_ALPHA = {5: 0.2, 10: 0.7}


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is tuned; a method has four of them.

  Attributes:
    rho: the radius.
    period: of 'interval' and 'looksam'.
    lr_factor: multiplies the learning rates; tuned for QAT, whose best all methods take.
  """

  rho: float = 0.0
  period: int | None = None
  lr_factor: float = 1.0

  @property
  def words(self) -> str:
    """Such as 'rho 0.1, every 5'."""
    if not self.rho:
      return f'lr x {self.lr_factor:g}'
    return f'rho {self.rho:g}' + (f', every {self.period}' if self.period else '')


@dataclasses.dataclass(frozen=True)
class Method:
  """One way to train.

  Attributes:
    label: for a reader.
    case: of the perturbation; 0 has none.
    strategy: of the second gradients, but for its period.
    settings: what is tried; () where nothing is tuned.
    ours: whether the strategy is this package's own.
  """

  label: str
  case: int = 0
  strategy: StrategyConfig = dataclasses.field(default_factory=StrategyConfig)
  settings: tuple[Setting, ...] = tuple(Setting(rho) for rho in _RHOS)
  ours: bool = False

  def strategy_of(self, setting: Setting) -> StrategyConfig:
    """The strategy with the setting's period.

    Args:
      setting: one of the method's.

    Returns:
      The strategy.
    """
    if setting.period is None:
      return self.strategy
    strategy = dataclasses.replace(self.strategy, period=setting.period)
    if strategy.name != 'looksam':
      return strategy
    return dataclasses.replace(strategy, alpha=_ALPHA[setting.period])

  def gradients(self, second: float) -> float:
    """The cost of a step: gradients of the whole batch, in the mean over the steps.

    A gradient is a forward and a backward pass and counts as three forward passes. A gradient of a
    part of the batch counts as that part; SDS's search is one forward pass of the whole batch, a
    third. 'momentum' takes no first gradient.

    Args:
      second: the part of the steps that took a second gradient.

    Returns:
      1 for QAT, 2 for a case.
    """
    some = self.strategy.second_examples
    return self.strategy.first_examples + second * (some if some == 1 else some + 1 / 3)


_PAIRS = tuple(Setting(rho, period) for period in (5, 10) for rho in (0.3, 1.0))

METHODS: dict[str, Method] = {
  'float': Method('Full precision', settings=()),
  'ptq': Method('PTQ', settings=()),
  'qat': Method('QAT', settings=tuple(Setting(lr_factor=factor) for factor in _LR_FACTORS)),
  'case1': Method('QAT + SAM, case 1', 1),
  'case2': Method('QAT + SAM, case 2', 2),
  'saq': Method('SAQ (case 3)', 3),
  'interval': Method('SAQ every k-th step', 3, StrategyConfig('interval'), _PAIRS, ours=True),
  'looksam': Method('LookSAM', 3, StrategyConfig('looksam'), _PAIRS),
  'swp': Method('ESAM, SWP', 3, StrategyConfig(tensors=0.6)),
  'sds': Method('ESAM, SDS', 3, StrategyConfig(second_examples=0.5)),
  'adaptive': Method('AE-SAM', 3, StrategyConfig('adaptive')),
  'random': Method('RST, p = 1/2', 3, StrategyConfig('random')),
  'norms': Method('SAM-ON (norms only)', 3, StrategyConfig(perturb_only=(r'.*/(bn|norm)\d*/.*',))),
  'momentum': Method('Along momentum', 3, StrategyConfig('momentum'), ours=True),
  'small': Method('Ascent by 1/16 batch', 3, StrategyConfig(first_examples=1 / 16), ours=True),
}
TRAINED = tuple(name for name in METHODS if name not in ('float', 'ptq'))


@dataclasses.dataclass(frozen=True)
class Plan:
  """How much is trained.

  Attributes:
    networks: of 'cnn' and 'vit'.
    data: of `DATA`.
    bits: of weights and activations; settings are chosen at 3 alone, for all of them.
    methods: of `METHODS`, beside full precision and PTQ, QAT first.
    settings: tried for each method, the first ones it has.
    tuning_seeds: whose runs choose the settings.
    final_seeds: whose runs the figures are of.
    seeds_at_once: trained together.
    epochs: of the digits in the quantized stage; the other data take as many steps.
    vit_depth: blocks of the ViT.
  """

  networks: tuple[str, ...] = ('cnn', 'vit')
  data: tuple[str, ...] = DATA
  bits: tuple[int, ...] = (3, 2, 4)
  methods: tuple[str, ...] = TRAINED
  settings: int = 4
  tuning_seeds: tuple[int, ...] = tuple(range(100, 104))
  final_seeds: tuple[int, ...] = tuple(range(16))
  seeds_at_once: int = 4
  epochs: float = 6.0
  vit_depth: int = 2

  def tried(self, method: str) -> tuple[Setting, ...]:
    """The settings tried for a method.

    Args:
      method: its name.

    Returns:
      As many for each method; none for full precision and PTQ.
    """
    return METHODS[method].settings[: self.settings]

  def groups(self, seeds: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Seeds in groups that are trained together.

    Args:
      seeds: all of them.

    Returns:
      The groups.
    """
    return [seeds[i : i + self.seeds_at_once] for i in range(0, len(seeds), self.seeds_at_once)]


FULL = Plan()
QUICK = Plan(
  networks=('vit',),
  data=('hard',),
  bits=(TUNING_BITS,),
  methods=('qat', 'saq', 'interval'),
  settings=2,
  tuning_seeds=(100, 101),
  final_seeds=(0, 1),
  seeds_at_once=2,
  epochs=0.3,
  vit_depth=1,
)


def config_of(plan: Plan, network: str, bits: int) -> ExperimentConfig:
  """The experiment of a network: its recipe at full precision and for the quantized stages.

  Args:
    plan: for the length of the stages.
    network: 'cnn' or 'vit'.
    bits: of weights and activations; first and last layer have 8.

  Returns:
    The experiment.
  """
  if network == 'cnn':
    model = ModelConfig(name='preresnet', depth=8, width=8)
    quant = QuantConfig(bits=bits, act_bits=bits)
    augment = AugmentConfig()
    floating = StageConfig(epochs=plan.epochs, lr=0.05)
    quantized = StageConfig(epochs=plan.epochs, lr=0.1, scale_lr=0.1)
  else:
    model = ModelConfig(name='vit', size='Ti', depth=plan.vit_depth, width=32, heads=2, patch=4)
    quant = QuantConfig(weights='lsq', acts='lsq', bits=bits, act_bits=bits)
    # It does not learn shifted digits in so few steps.
    augment = AugmentConfig(pad_crop=0)
    floating = StageConfig(
      epochs=2 * plan.epochs, warmup_epochs=1, optimizer='adamw', lr=1e-2, weight_decay=0.05
    )
    quantized = dataclasses.replace(
      floating, epochs=plan.epochs, warmup_epochs=0, lr=8e-3, scale_lr=8e-3
    )
  return ExperimentConfig(
    data=DataConfig(train_split=SPLITS['train'], batch_size=32, eval_batch_size=128),
    augment=augment,
    model=model,
    quant=quant,
    float_stage=floating,
    quant_stage=quantized,
  )


def variant(method: str, setting: Setting) -> str:
  """The name of what is compiled for a method: radius and learning rate are arguments of it.

  Args:
    method: its name.
    setting: one of its settings.

  Returns:
    Such as 'interval-5'.
  """
  return method if setting.period is None else f'{method}-{setting.period}'


def variants(plan: Plan, config: ExperimentConfig) -> Mapping[str, ExperimentConfig]:
  """The experiments of all methods but QAT.

  Args:
    plan: its methods.
    config: what they have in common.

  Returns:
    By the name of the variant.
  """
  return {
    variant(name, setting): dataclasses.replace(
      config, saq=SAQConfig(case=METHODS[name].case), strategy=METHODS[name].strategy_of(setting)
    )
    for name in plan.methods
    if name != 'qat'
    for setting in plan.tried(name)
  }

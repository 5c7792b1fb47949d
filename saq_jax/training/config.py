"""The whole schema of an experiment, as frozen dataclasses.

The defaults are an experiment of their own, the digits at 4 bits. `saq_jax.training.parsing`
fills these from a config file; nothing beyond it ever sees a ConfigDict.
"""

import dataclasses
from typing import Literal

from saq_jax.training.bounds import ABOVE_0, within
from saq_jax.training.checkpoint_config import CheckpointConfig
from saq_jax.training.data_config import AugmentConfig, DataConfig
from saq_jax.training.strategy_config import StrategyConfig
from saq_jax.training.watch_config import WatchConfig

QuantizerName = Literal['lsq', 'liq', 'pact', 'dorefa']


ModelName = Literal[
  'preresnet', 'resnet', 'mobilenetv2', 'mobilenetv2_cifar', 'vit', 'deit', 'swin'
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network. A setting that the family does not read must keep its default.

  Attributes:
    name: the family; docs/models.md lists them.
    size: of a transformer: 'Ti', 'S', 'B' or 'L' of ViT; 'Ti', 'S' or 'B' of DeiT; of Swin 'T', 'S'
      or 'B'.
    depth: layers of a ResNet (18, 34, 50, 101, 152; default 18) or PreResNet (6 n + 2; default 8);
      blocks of a ViT or DeiT, where not those of its size.
    width: channels of the first stage of a PreResNet (default 16); of the tokens of a ViT or DeiT,
      where not those of its size.
    heads: of a ViT or DeiT, where not those of its size.
    patch: side of the patches of a ViT or DeiT; default 16.
    distilled: DeiT with the distillation token.
    dropout: of a transformer, after the embedding and each layer of a block.
    attn_dropout: of a transformer, on the attention probabilities.
    drop_path: stochastic depth of a transformer, in the last block; it grows linearly from 0.
    padding: of MobileNetV2's 3x3 convolutions: 'torch' or, as in TensorFlow, 'same'. None: as the
      weights of `init_from` were trained, else 'torch'.
    norm_eps: added to the variance in every norm. None: as the weights of `init_from` were trained,
      else the family's own: 1e-6 in ViT and DeiT, 1e-5 in all others.
    remat: compute each block again in the backward pass instead of keeping its activations.
    dtype: of the computation, 'float32' or 'bfloat16'; parameters are float32 in either case.
  """

  name: ModelName = 'preresnet'
  size: Literal['Ti', 'T', 'S', 'B', 'L'] | None = None
  depth: int | None = within(None, 1)
  width: int | None = within(None, 1)
  heads: int | None = within(None, 1)
  patch: int | None = within(None, 1)
  distilled: bool = False
  dropout: float = within(0.0, 0, 0.999)
  attn_dropout: float = within(0.0, 0, 0.999)
  drop_path: float = within(0.0, 0, 0.999)
  padding: Literal['torch', 'same'] | None = None
  norm_eps: float | None = within(None, ABOVE_0)
  remat: bool = False
  dtype: Literal['float32', 'bfloat16'] = 'float32'


@dataclasses.dataclass(frozen=True)
class QuantConfig:
  """How the weights and activations are quantized. A bit-width None leaves them floating.

  Attributes:
    weights: the quantizer of the weights. 'liq' normalises them in all layers but the last.
    acts: the quantizer of the activations: unsigned in the convolutional networks and for the
      attention after its softmax, signed elsewhere in the transformers.
    bits: of the weights of the layers between the first and the last; 2 to 8.
    act_bits: of the inputs of those layers, and of what attention multiplies.
    first_bits: of the weights of the first layer.
    first_act_bits: of the images that the first layer multiplies, signed; None leaves them.
    last_bits: of the weights and inputs of the last layer.
    lsq_init: how 'lsq' finds its first scale, see `saq_jax.LSQ`.
    lsq_grad_scale: what 'lsq' counts in its gradient scale, see `saq_jax.LSQ`.
  """

  weights: QuantizerName = 'liq'
  acts: QuantizerName = 'liq'
  bits: int | None = within(4, 2, 8)
  act_bits: int | None = within(4, 2, 8)
  first_bits: int | None = within(8, 2, 8)
  first_act_bits: int | None = within(None, 2, 8)
  last_bits: int | None = within(8, 2, 8)
  lsq_init: Literal['mean', 'least_squares'] = 'mean'
  lsq_grad_scale: Literal['scale', 'tensor', 'feature'] = 'scale'


@dataclasses.dataclass(frozen=True)
class SAQConfig:
  """The perturbation; see `saq_jax.saq`.

  Attributes:
    case: 1, 2 or 3.
    rho: its radius.
    warmup_epochs: epochs with rho = 0 at the start.
    adaptive: ASAM scaling.
    eta: of ASAM.
    accumulate_clean_grad: step along g(Q(w)) + g(Q(w) + eps).
    perturb_weight_scales: shift the learnable scales of weights too (case 2 alone, in which the
      weights are quantized after the shift).
    perturb_act_scales: shift the learnable scales of activations too.
    perturb_norms: shift the scales and biases of norms too, as the authors' code does for
      convolutional networks.
    perturb_embeddings: shift class tokens, position embeddings and biases too.
    batch_stats_from_both: running statistics move in both passes, as in the authors' code.
    perturbation: 'batch': one of the whole batch's gradient. 'device': each device perturbs by the
      gradient of its own share (m-sharpness), as in the authors' code. 'group': each group of
      `group_size` examples by its own. In the latter two norms over the batch are each group's.
    group_size: of 'group'; it divides each device's share of the batch.
    second_pass_float32: with a model in bfloat16, take the second gradient in float32 (ours). In
      bfloat16 most of a perturbation is below the spacing of the weights and is rounded away.
  """

  case: int = within(3, 1, 3)
  rho: float = within(0.1, 0)
  warmup_epochs: float = within(0.0, 0)
  adaptive: bool = False
  eta: float = within(0.01, 0)
  accumulate_clean_grad: bool = False
  perturb_weight_scales: bool = False
  perturb_act_scales: bool = False
  perturb_norms: bool = True
  perturb_embeddings: bool = True
  batch_stats_from_both: bool = False
  perturbation: Literal['batch', 'device', 'group'] = 'batch'
  group_size: int | None = within(None, 1)
  second_pass_float32: bool = True


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How the state lies on the devices.

  Attributes:
    fsdp: devices that share the parameters and the optimizer's state among them; it divides the
      number of devices. The batch is spread over all devices in any case.
    min_shard: arrays of fewer elements are whole on every device.
    gather: what crosses the wire where weights come together for the first pass: 'floats', or
      'codes': the integers that they are quantized to (packed in pairs at 4 bits and less), from
      which the same weights are made. With `saq.perturbation` of 'device' or 'group' floats are.
  """

  fsdp: int = within(1, 1)
  min_shard: int = within(2**14, 0)
  gather: Literal['floats', 'codes'] = 'floats'


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One training run: the full-precision one, or each of the quantized ones.

  Attributes:
    epochs: passes over the training split; may be a fraction.
    optimizer: 'sgd' (Nesterov) or 'adamw'.
    lr: the learning rate at its highest.
    scale_lr: the same for the learnable scales.
    momentum: of 'sgd'.
    weight_decay: added to the gradient for 'sgd', decoupled for 'adamw'.
    decay: 'all' parameters, scales too, as in the authors' CNN recipe, or 'kernels' alone.
    schedule: 'cosine' to zero, 'step' (times 0.1 at each milestone) or 'constant'.
    milestones: epochs, for 'step'.
    warmup_epochs: of a linear rise of the learning rate.
    clip_norm: clips the gradient that the optimizer gets to this global norm; None does not.
    label_smoothing: 0 to below 1.
    accumulate: parts of the batch that go through the network one after the other, for want of
      memory. Gradients and perturbation are those of the whole batch; only norms over the batch
      and the gradient scale of LSQ's activations (but for `quant.lsq_grad_scale='feature'`) see
      each part by itself.
  """

  epochs: float = within(40.0, ABOVE_0)
  optimizer: Literal['sgd', 'adamw'] = 'sgd'
  lr: float = within(0.05, 0)
  scale_lr: float = within(0.05, 0)
  momentum: float = within(0.9, 0, 1)
  weight_decay: float = within(1e-4, 0)
  decay: Literal['all', 'kernels'] = 'all'
  schedule: Literal['cosine', 'step', 'constant'] = 'cosine'
  milestones: tuple[float, ...] = within((), 0)
  warmup_epochs: float = within(0.0, 0)
  clip_norm: float | None = within(None, ABOVE_0)
  label_smoothing: float = within(0.0, 0, 0.999)
  accumulate: int = within(1, 1)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  """A comparison of QAT and cases 1 to 3 over many seeds; off unless `seeds` is positive.

  It trains QAT and cases 1 to 3: `methods`, `saq.case` and `saq.rho` have no part in it.

  Attributes:
    seeds: runs a method, at least 2; seed s is a run with the experiment's seed + s. 0: train
      one network a method instead.
    seeds_at_once: vectorised together. A few suffice for CPUs, an accelerator takes all.
    rhos: the radii tried for each case; the best on `validation_split` is taken.
    validation_split: overlaps neither the training split nor the test split.
    sharpness_rho: the radius at which the sharpness of all methods is measured.
  """

  seeds: int = within(0, 0)
  seeds_at_once: int = within(4, 1)
  rhos: tuple[float, ...] = within((0.05, 0.1, 0.2, 0.4), 0)
  validation_split: str = 'train[80%:]'
  sharpness_rho: float = within(0.1, ABOVE_0)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """One experiment: a full-precision stage, then the quantized ones started from it.

  Attributes:
    seed: of the parameters, the order of the examples and the augmentation.
    init_from: weights to start the quantized stages from, instead of a float stage: a work
      directory of this package or a checkpoint in one, or public weights (safetensors, .npz, .pth,
      a Hugging Face directory, 'hf://org/name'; docs/models.md). Learnt scales come along where
      they were found for the same quantization.
    methods: the quantized stages, of 'qat' and 'saq'.
    eval_every_epochs: how often the test split is looked at for the curves.
    checkpoint_every_epochs: how often the state is saved.
    log_every_steps: how often a line of metrics is written.
  """

  seed: int = within(0, 0, 2**31 - 1)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
  model: ModelConfig = ModelConfig()
  quant: QuantConfig = QuantConfig()
  saq: SAQConfig = SAQConfig()
  strategy: StrategyConfig = dataclasses.field(default_factory=StrategyConfig)
  mesh: MeshConfig = MeshConfig()
  float_stage: StageConfig = StageConfig()
  quant_stage: StageConfig = StageConfig(epochs=30.0, lr=0.02, scale_lr=0.02)
  compare: CompareConfig = CompareConfig()
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
  init_from: str | None = None
  methods: tuple[Literal['qat', 'saq'], ...] = ('qat', 'saq')
  eval_every_epochs: float = within(2.0, ABOVE_0)
  checkpoint_every_epochs: float = within(5.0, ABOVE_0)
  log_every_steps: int = within(10, 1)

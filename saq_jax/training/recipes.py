"""The recipes that the files in configs/ are put together from, each with where it comes from.

[code] is the SAQ authors' PyTorch code (github ziplab/SAQ), [later code] the first author's later
repository (github liujingcs/Q-ViT-DeiT), [ours] a choice of this project and not the paper's.
"""

from ml_collections import config_dict

from saq_jax.data.catalog import IMAGENET_100 as IMAGENET_100

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_STATISTICS = {
  'cifar10': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
  'cifar100': ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def cifar_data(config: config_dict.ConfigDict, name: str) -> None:
  """CIFAR-10 or -100, batches of 128, random crops of 32 after padding by 4, flips [code].

  Args:
    config: is changed.
    name: 'cifar10' or 'cifar100'.

  Example:
    >>> from saq_jax.training.parsing import default_config
    >>> config = default_config()
    >>> cifar_data(config, 'cifar100')
    >>> config.augment.pad_crop
    4
  """
  data = config.data
  data.name = name
  data.mean, data.std = CIFAR_STATISTICS[name]
  data.batch_size, data.eval_batch_size = 128, 512
  config.augment.pad_crop, config.augment.flip = 4, True


def image_data(
  config: config_dict.ConfigDict,
  name: str,
  *,
  batch_size: int,
  size: int = 224,
) -> None:
  """Photographs of any size: random crops and flips to train, resize and centre crop to evaluate.

  Sizes (256, 224) and means are [code]'s for ImageNet. The fast interpolation of training images is
  [ours]; 'bilinear' is [code]'s, at 0.6 of the speed (docs/benchmarks.md).

  Args:
    config: is changed.
    name: of the dataset, or 'folder:PATH'.
    batch_size: global.
    size: side of the images.
  """
  data = config.data
  data.name = name
  data.mean, data.std = IMAGENET_MEAN, IMAGENET_STD
  data.batch_size, data.eval_batch_size = batch_size, 512
  data.image_size, data.resize = size, round(size * 256 / 224)
  data.interpolation = 'fast'
  config.augment.pad_crop, config.augment.flip = 0, True


def deit_augmentation(config: config_dict.ConfigDict) -> None:
  """DeiT's augmentation (arXiv 2012.12877, table 9), which [later code] has too.

  RandAugment 9 with deviation 0.5 (two of timm's fifteen operations that grow with the magnitude),
  mixup 0.8 or cutmix 1 of each batch, random erasing 0.25, label smoothing 0.1, each image three
  times in a row, bicubic crops.

  Args:
    config: is changed.
  """
  augment = config.augment
  augment.rand_augment, augment.rand_augment_std = 9.0, 0.5
  augment.mixup, augment.cutmix = 0.8, 1.0
  augment.erasing, augment.repeats = 0.25, 3
  config.quant_stage.label_smoothing = 0.1
  config.data.interpolation = 'bicubic'


def authors_quantization(config: config_dict.ConfigDict, bits: int) -> None:
  """LIQ with normalised weights, first and last layer at 8 bits, clips shifted too [code].

  Running statistics move in the first pass only [ours]; `saq.batch_stats_from_both` does as [code].

  Args:
    config: is changed.
    bits: of weights and activations.
  """
  config.quant.bits = config.quant.act_bits = bits
  config.saq.perturb_act_scales = True


def authors_imagenet_stage(config: config_dict.ConfigDict) -> None:
  """SGD with Nesterov momentum, batch 512, rate 0.02 to 0 by cosine in 90 epochs, rho 0.3 [code].

  Args:
    config: is changed.
  """
  stage = config.quant_stage
  stage.epochs, stage.schedule = 90.0, 'cosine'
  stage.lr = stage.scale_lr = 0.02
  stage.weight_decay = 1e-4
  config.saq.rho = 0.3
  config.eval_every_epochs = config.checkpoint_every_epochs = 1.0


def authors_cifar_stages(config: config_dict.ConfigDict) -> None:
  """SGD with Nesterov momentum, rate 0.01, times 0.1 at epochs 80 and 120 of 200, rho 0.4 [code].

  The full-precision stage before it, 200 epochs at 0.1 with the same drops, is [ours].

  Args:
    config: is changed.
  """
  for stage, lr in ((config.float_stage, 0.1), (config.quant_stage, 0.01)):
    stage.epochs, stage.schedule, stage.milestones = 200.0, 'step', (80.0, 120.0)
    stage.lr = stage.scale_lr = lr
    stage.weight_decay = 1e-4
  config.saq.rho = 0.4
  config.checkpoint_every_epochs = 5.0


def transformer_quantization(config: config_dict.ConfigDict, bits: int) -> None:
  """LSQ with a least-squares start; patch embedding and head at 8 bits [later code].

  Kernels and biases of products are shifted; norms, tokens, position embeddings and scales are not
  [later code]. There the perturbation lives in a domain of normalised weights, here at the
  quantized weights themselves [ours]; its fc2 input has an offset, here it is signed [ours].

  Args:
    config: is changed.
    bits: of weights and activations.
  """
  quant = config.quant
  quant.weights = quant.acts = 'lsq'
  quant.lsq_init, quant.lsq_grad_scale = 'least_squares', 'tensor'
  quant.bits = quant.act_bits = bits
  quant.first_act_bits = 8
  config.saq.perturb_norms = config.saq.perturb_embeddings = False


def transformer_stage(config: config_dict.ConfigDict, *, epochs: float, lr: float) -> None:
  """AdamW, decay 0.05 on kernels, cosine to 0, drop path 0.1, DeiT's augmentation [later code].

  rho 0.05 is from the range that [later code] swept (0.001 to 0.1), a clip norm of 1 is [ours].

  Args:
    config: is changed.
    epochs: of the stage.
    lr: for a batch of 512; it is scaled with the batch.
  """
  stage = config.quant_stage
  stage.optimizer, stage.epochs, stage.schedule = 'adamw', epochs, 'cosine'
  stage.lr = stage.scale_lr = lr * config.data.batch_size / 512
  stage.weight_decay, stage.decay = 0.05, 'kernels'
  stage.clip_norm = 1.0
  config.model.drop_path = 0.1
  config.saq.rho = 0.05
  deit_augmentation(config)
  config.eval_every_epochs = config.checkpoint_every_epochs = 1.0

r"""PreResNet-20 on CIFAR-100 with 3-bit weights and activations.

    python -m saq_jax.main --config configs/preresnet20_3bit_cifar100.py

The paper's row: PreResNet-20 (its ResNet-20), 3 bits, 392.1M bit operations, top-1 67.7 %, top-5
90.8 %.

Recipe: [code] (SGD, 200 epochs, rho 0.4); that the same rho holds for 3 bits is [ours]; that of
the full-precision stage is [ours].

CIFAR is prepared once (docs/data.md). A full-precision stage comes first, then QAT and SAQ from
it; `init_from` takes weights instead, such as an authors' checkpoint.

Hardware and hours: not measured on an accelerator; docs/benchmarks.md has the step on a CPU.
"""

from ml_collections import config_dict

from saq_jax.training import recipes
from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """PreResNet-20 at 3 bits."""
  config = default_config()
  recipes.cifar_data(config, 'cifar100')
  recipes.authors_quantization(config, bits=3)
  recipes.authors_cifar_stages(config)
  config.model.depth, config.model.width = 20, 16
  return config
